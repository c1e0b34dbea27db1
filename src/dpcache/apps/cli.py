"""The command line: the app, the options of every command, and exit codes. The commands are in `commands/`."""

import functools
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from dpcache.errors import missing_extra

try:
    import rich
    import typer
    from typer.core import TyperGroup
except ImportError as error:
    raise SystemExit(f"error: {missing_extra('the command line', error, 'dpcache[cli]')}") from error

from .commands import terminal
from .commands.bench import bench
from .commands.calibrate import calibrate
from .commands.compare import compare
from .commands.demo import demo
from .commands.export import export
from .commands.failures import Interrupted, failure
from .commands.generate import generate
from .commands.optimize import optimize
from .commands.plan import plan
from .commands.show import show
from .commands.ui import ui

del rich

_PANEL = "Options of every command"


class _Commands(TyperGroup):
    """Gives each command what all have: the options below, and a clean standard output with --json."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        shared = [option for option in self.params if getattr(option, "rich_help_panel", None) == _PANEL]
        _equip(self.commands, shared)


def _equip(commands: Mapping[str, Any], shared: Sequence[Any]) -> None:
    for command in commands.values():
        if isinstance(command, TyperGroup):
            _equip(command.commands, shared)
        else:
            command.params.extend(shared)
            command.callback = _running(command.callback)


def _running(command: Callable[..., Any]) -> Callable[..., None]:
    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> None:
        try:
            with terminal.results_apart():
                command(*args, **options)
        except KeyboardInterrupt as interrupt:
            raise Interrupted(str(interrupt)) from interrupt  # typer would leave without a word

    return run


app = typer.Typer(
    cls=_Commands,
    help="Diffusion transformers several times faster, without training: plan the key steps, predict the rest.",
    epilog="Example: `dpcache demo`. Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _ask(name: str) -> Callable[[bool], None]:
    def note_it(given: bool) -> None:
        if given:
            setattr(terminal.asked, name, True)

    return note_it


def _shared(name: str, *flags: str, text: str) -> Any:
    return typer.Option(*flags, help=text, callback=_ask(name), expose_value=False, rich_help_panel=_PANEL)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    json: Annotated[
        bool,
        _shared("json", "--json", text="The result as JSON on standard output, an error on standard error."),
    ] = False,
    quiet: Annotated[bool, _shared("quiet", "--quiet", "-q", text="No progress bars and no notes.")] = False,
    debug: Annotated[bool, _shared("debug", "--debug", text="Show the traceback of an error.")] = False,
) -> None:
    if version:
        from dpcache import __version__

        terminal.result({"version": __version__}, f"dpcache {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise typer.BadParameter("name a command.")


# One line a command, in the order of --help.
app.command(epilog="Example: `dpcache demo -o my-demo`")(demo)
app.command(epilog='Example: `dpcache calibrate tiny-flux "a red ring" "a blue star" -o flux.safetensors`')(calibrate)
app.command(
    epilog="Example: `dpcache optimize tiny-flux -k 13 -o flux-13.json`, "
    '`dpcache optimize tiny-flux -k 9,13 --budget "15 min" -o flux.json`'
)(optimize)
app.command(epilog="Example: `dpcache plan flux.safetensors -k 13 -o flux-13.json`")(plan)
app.command(
    epilog='Example: `dpcache generate tiny-flux "a small red ring" -s flux-13.json -o ring.png`, '
    '`dpcache generate black-forest-labs/FLUX.1-dev "a red ring" -k 13 --offload model --lora style.safetensors`, '
    '`dpcache generate tiny-flux "a red ring" -k 13 --image photo.png --strength 0.6`'
)(generate)
app.command(epilog="Example: `dpcache compare tiny-flux --prompts prompts.txt -s flux-13.json -s flux-9.json`")(compare)
app.command(
    epilog="Example: `dpcache bench black-forest-labs/FLUX.1-dev -k 13 --count 8`, "
    "`dpcache bench tiny-flux -s flux-13.json -o flux.json`"
)(bench)
app.command(epilog="Example: `dpcache show flux.safetensors -k 13`, `dpcache show s.json`, `dpcache show builtin`")(
    show
)
app.command(epilog="Example: `dpcache export flux-13.json --to cache-dit -o flux_13.py`")(export)
app.command(epilog="Example: `dpcache ui`, `dpcache ui tiny-flux -k 9`")(ui)


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted."""
    # Advice to developers (which image processor to import, ...) is noise in a terminal.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    terminal.begin()
    try:
        with terminal.hush():
            code = app(prog_name="dpcache", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:
        code = _failed(error)
    raise SystemExit(code if isinstance(code, int) else 0)


def _failed(error: BaseException) -> int:
    """Tells of an error, and returns the exit code."""
    found = failure(error)
    words = sys.argv[1:]  # an option is only known once everything before it was understood
    if terminal.asked.debug or "--debug" in words:
        traceback.print_exception(error)
    if terminal.asked.json or "--json" in words:
        terminal.error_document({"error": found.message, "type": found.kind, "exit_code": found.code})
    elif found.message:
        terminal.aside(found.message, heading="" if found.kind == "Interrupted" else "error")
    return found.code
