"""README.md and docs/: every snippet runs, every command exists, every message quoted is one, the site builds."""

import ast
import importlib.util
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

import dpcache
from dpcache.apps import cli
from dpcache.run import layouts

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
#: Snippets that nothing runs here, for the reason in the comment before each: "<!-- no-run: needs two GPUs -->".
NOT_RUN: dict[str, int] = {"architecture.md": 1, "engines.md": 2, "integrations.md": 2}
SHELL = ("", "bash", "sh", "console")
FENCE = re.compile(
    r"^(?:<!-- *(?P<mark>no-run: *\S.*?|quick) *-->\n\n?)?```(?P<language>[\w-]*)[^\n]*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int
    language: str
    code: str
    mark: str

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command, without what the shell does with its output."""
        if self.language not in SHELL:
            return []
        found = []
        for line in self.code.replace("\\\n", " ").splitlines():
            if not re.match(r"(dpcache|make|python) ", line):
                continue  # other programs; or no commands at all
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split, words.commenters = True, "#"
            found.append([])
            for word in words:
                if set(word) <= set("><|&;"):
                    break
                found[-1].append(word)
        return found


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text(encoding="utf-8")
    return [
        Snippet(
            page, text[: found.start("code")].count("\n") + 1, found["language"], found["code"], found["mark"] or ""
        )
        for found in FENCE.finditer(text)
    ]


EVERY = [snippet for page in PAGES for snippet in snippets(page)]


def test_every_fence_is_seen_and_says_its_language() -> None:
    for page in PAGES:
        assert len(re.findall("^ *```", page.read_text(), re.MULTILINE)) == 2 * len(snippets(page)), page.name
    for snippet in EVERY:
        if not snippet.language:
            assert not re.search(r"^(import|from) \w|dpcache\.\w+\(", snippet.code, re.MULTILINE), snippet


def test_what_is_not_run_does_not_grow() -> None:
    counted = Counter(snippet.page.name for snippet in EVERY if snippet.mark.startswith("no-run"))
    assert counted == NOT_RUN


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: Any) -> Path:
    """An empty folder to work in, with one thread for small models and a terminal wide enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def files(folder: Path, loaded_flux: Any) -> None:
    """What pages take for granted: a calibration and a schedule by the names that they use."""
    settings = {"num_inference_steps": 12, "max_sequence_length": 32}
    calibration = dpcache.calibrate(loaded_flux, ["a small red ring"], progress=False, **settings)
    for name in ("calibration", "flux"):
        calibration.save(f"{name}.safetensors")
    for name in ("schedule", "flux-13"):
        calibration.plan(5).save(f"{name}.json")


@pytest.fixture
def table_as_it_was() -> Iterator[None]:
    before = dict(layouts.BLOCK_STACKS)
    yield
    layouts.BLOCK_STACKS.clear()
    layouts.BLOCK_STACKS.update(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("table_as_it_was")
def test_snippets_run(page: Path, request: Any, monkeypatch: Any) -> None:
    """In their order, as one program and one folder; of commands, those in a fence marked as quick."""
    runnable = [s for s in snippets(page) if s.language == "python" or s.mark == "quick"]
    runnable = [s for s in runnable if not s.mark.startswith("no-run")]
    if not runnable:
        return
    request.getfixturevalue("files")
    namespace: dict[str, Any] = {"__name__": page.stem}
    for snippet in runnable:
        if snippet.language == "python":
            # Blank lines before, so that a traceback names the page's own line.
            code = "\n" * (snippet.line - 1) + snippet.code
            exec(compile(code, str(page), "exec"), namespace)
            continue
        for command in snippet.commands:
            assert command[0] == "dpcache", f"{command} is not a quick one"
            monkeypatch.setattr(sys, "argv", command)
            with pytest.raises(SystemExit) as left:
                cli.main()
            assert not left.value.code, command


def test_what_is_not_quick_is_not_marked_so() -> None:
    assert all(snippet.commands for snippet in EVERY if snippet.mark == "quick")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.usefixtures("files")
def test_commands_are_as_the_programs_take_them(page: Path) -> None:
    for snippet in snippets(page):
        for program, *words in snippet.commands:
            if program == "dpcache":
                _parsed(words)
            elif program == "make":
                targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
                assert set(words) <= set(targets), words
            elif words[0] == "-m":
                assert importlib.util.find_spec(words[1]) is not None, words


def _parsed(words: list[str]) -> None:
    """Finds the command and has it take its words, as the command line does; raises what it would complain of."""
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context("dpcache", list(words))
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, list(words))
        context = command.make_context(name, list(words), parent=context)


def test_a_command_that_does_not_exist_is_seen() -> None:
    for words in (["plam", "c.safetensors"], ["plan", "c.safetensors", "--keys", "3"], ["plan"]):
        with pytest.raises(Exception, match=r"No such|Missing"):
            _parsed(words)


# ---------------------------------------------------------------------------------------------------- messages


@cache
def messages() -> tuple[str, ...]:
    """Every text in the library's code, ... in place of what is filled in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            texts = [part.value if isinstance(part, ast.Constant) else "..." for part in parts if _is_text(part)]
            found.append("".join(texts))
    return tuple(found)


def _is_text(part: ast.AST) -> bool:
    return isinstance(part, ast.FormattedValue) or (isinstance(part, ast.Constant) and isinstance(part.value, str))


def test_messages_are_quoted_as_they_are() -> None:
    """In troubleshooting.md, lines that begin with "> " quote errors and warnings."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^> (.+)$", text, re.MULTILINE)
    assert len(quoted) > 20
    missing = [quote for quote in quoted if not any(quote in message for message in messages())]
    assert not missing
    classes = set(re.findall(r"^\[`(\w+)`\]", text, re.MULTILINE))
    assert classes and all(issubclass(getattr(dpcache, name), dpcache.DPCacheError) for name in classes)


# ---------------------------------------------------------------------------------------------------- the site


def test_readme_is_two_screens_with_a_picture() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 95
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert all((ROOT / target).exists() for target in targets if "://" not in target)
    (picture,) = [ROOT / target for target in targets if target.endswith(".png")]
    assert picture.stat().st_size < 300_000
    with Image.open(picture) as opened:
        assert opened.width > 600


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path, monkeypatch: Any) -> None:
    """Strict: a link or anchor that leads nowhere, or a page that is not in the table of contents, is an error."""
    pytest.importorskip("material", reason='needs pip install "dpcache[docs]"')
    pytest.importorskip("latex2mathml", reason='needs pip install "dpcache[docs]"')
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert {f"{page.stem}.html" for page in PAGES[1:]} <= set(pages)
    tex = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").count("\n$$\n") // 2
    page = pages["how-it-works.html"]
    assert page.count('<div class="equation"><math') == tex > 10
    assert "\\hat" not in page and "$" not in re.sub(r"<(pre|code|script).*?</\1>", "", page, flags=re.DOTALL)
    for name, html in pages.items():
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"([^\"]+)\"", html)
        assert not [url for url in loaded if url.startswith(("http", "//"))], name
