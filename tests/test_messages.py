"""What messages and docstrings advise is there: options, commands, functions and their arguments."""

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("typer")
import typer

import dpcache
from dpcache.apps import cli
from dpcache.apps.commands.failures import _in_options

PACKAGE = Path(dpcache.__file__).parent
#: Options of other programs that messages name: Ray, and the engines that an export is for.
OTHERS = {"--head", "--backend", "--cache-dit-config", "--omni", "--cache-backend", "--cache-config"}
XDIT = {"--cache_method", "--cache_config", "--num_inference_steps"}
OPTION = re.compile(r"(?<![\w(-])--[a-z][\w-]*")


def texts() -> Iterator[tuple[str, str]]:
    """Where it is, and the text: every one in the package's code, ... in place of what is filled in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            known = [part.value if isinstance(part, ast.Constant) else "..." for part in parts]
            if all(isinstance(part, str) for part in known) and isinstance(node, ast.JoinedStr | ast.Constant):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", "".join(known)


@cache
def commands() -> dict[str, set[str]]:
    app = typer.main.get_command(cli.app)
    return {
        name: {"-h", "--help"} | {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
        for name, command in app.commands.items()  # type: ignore[attr-defined]
    }


def wrong(text: str) -> list[str]:
    """What it names that there is not."""
    every = {"--version"}.union(*commands().values()) | OTHERS | XDIT
    found = [option for option in OPTION.findall(text) if option not in every]
    for name, words in re.findall(r"`dpcache ([a-z]+)\b([^`]*)`", text):
        options = commands().get(name)
        if options is None:
            found.append(f"dpcache {name}")
        else:
            given = re.findall(r"(?<![\w-])--?[a-z][\w-]*", words)
            found += [f"dpcache {name} {option}" for option in given if option not in options]
    for name, words in re.findall(r"\bdpcache\.(\w+)\(([^()]*)\)", text):
        function = getattr(dpcache, {"enabled": "enable"}.get(name, name), None)
        if function is None:
            found.append(f"dpcache.{name}")
        elif name != "compare":  # its further arguments are the pipeline's
            taken = inspect.signature(function).parameters
            found += [f"dpcache.{name}({word}=)" for word in re.findall(r"(\w+)=", words) if word not in taken]
    return found


def test_what_is_advised_is_there() -> None:
    styled = ("apps/ui.py", "apps/ui_looks.py", "judge/report/plots.py")  # colours of CSS look like options
    advised = ((place, text) for place, text in texts() if not place.startswith(styled))
    assert not {place: missing for place, text in advised if (missing := wrong(text))}


def test_what_is_not_there_is_seen() -> None:
    assert wrong("calibrate with --sensitivty measured") == ["--sensitivty"]
    assert wrong("run `dpcache plam c.safetensors`") == ["dpcache plam"]
    assert wrong("run `dpcache plan c.safetensors --boundary output`") == ["dpcache plan --boundary"]
    assert wrong("call dpcache.enable(pipe, keys=3)") == ["dpcache.enable(keys=)"]
    assert wrong("call dpcache.follow(pipe)") == ["dpcache.follow"]


def test_arguments_are_told_as_options() -> None:
    """On the command line, what the library calls its arguments: also in calls of Python that a message advises."""
    for argument in (
        "num_key_steps",
        "max_error",
        "first_key_steps",
        "last_key_steps",
        "max_gap",
        "num_inference_steps",
    ):
        (option,) = OPTION.findall(_in_options(f"{argument} must be 1 or more"))
        assert option in commands()["plan"]
    call = "call dpcache.enable(pipe, num_key_steps=13)"
    assert _in_options(f"infeasible with max_gap=4: {call}") == f"infeasible with --max-gap 4: {call}"
    refused = {text for _, text in texts() if "or do without: dpcache.enable" in text}
    assert refused and all(" -k 13" in _in_options(text) and "enable" not in _in_options(text) for text in refused)
