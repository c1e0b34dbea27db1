"""Commands of the command line, each in its file; `cli.py` puts them together."""
