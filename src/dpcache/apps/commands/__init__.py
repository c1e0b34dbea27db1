"""The commands, one module each: a plain function that parses nothing, calls the library and says what came of it.

A command ends with one call of `terminal.result`, which is all that it writes to standard output; what it says on the
way goes through `terminal.note`. The options of every command (`--json`, `--quiet`, `--debug`) are in `cli.py`, which
gives them to each. Nothing here imports torch or diffusers before a command runs.
"""
