"""Bridges to other programs, each alone in its file."""
