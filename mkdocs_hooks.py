"""What mkdocs does not do by itself: pages from outside docs/, and equations as MathML, which browsers draw alone."""

import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent
#: Linked from docs/ as ../benchmarks/..., and on the site under the same path.
OUTSIDE = ("benchmarks/results/*.md", "benchmarks/results/*.svg", "integrations/comfyui/README.md")

_EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and pictures from outside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Has links into docs/ and out of it find their pages on the site."""
    if "/" in page.file.src_uri:
        return markdown.replace("](../../docs/", "](../../")
    return markdown.replace("](../", "](")


def on_page_content(html: str, **_: Any) -> str:
    """TeX becomes MathML."""
    return _EQUATION.sub(lambda found: _mathml(found[2], found[1] == "div"), html)


def _mathml(tex: str, is_block: bool) -> str:
    equation: str = convert(unescape(tex), display="block" if is_block else "inline")
    return f'<div class="equation">{equation}</div>' if is_block else equation
