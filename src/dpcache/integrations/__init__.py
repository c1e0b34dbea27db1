"""Bridges to other software, each alone in its file; none is imported before it is asked for."""
