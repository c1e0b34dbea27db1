"""What a MODEL's runs have to say: in the log and in the node it came from, each text once per prompt."""

import logging
from collections.abc import Hashable
from typing import Protocol

LOG = logging.getLogger("dpcache")


class Node(Protocol):
    """The node that a MODEL came from."""

    def prompt(self) -> Hashable | None:
        """What tells the prompt that runs now from another; None where nothing does."""

    def show(self, text: str) -> None:
        """Shows a text in the node, instead of the one before."""


class Voice:
    """Speaks for one MODEL.

    Args:
        node: where the MODEL came from; None in programs without nodes, where every run is a prompt of its own.
    """

    def __init__(self, node: Node | None) -> None:
        self._node = node
        self._prompt: Hashable | None = None
        self._said: list[str] = []

    def begin(self) -> bool:
        """Takes note of a run that begins; returns whether it is the first of its prompt."""
        prompt = self._node.prompt() if self._node is not None else None
        first = prompt is None or prompt != self._prompt
        if first:
            self._prompt = prompt
            self._said.clear()
        return first

    def warn(self, text: str) -> None:
        """Says what a user should know and may want to change."""
        if text not in self._said:
            LOG.warning("DPCache: %s", text)
            self._show(text)

    def inform(self, text: str) -> None:
        """Says what came of a run."""
        LOG.info("DPCache: %s", text)
        self._show(text)

    def _show(self, text: str) -> None:
        if text not in self._said:
            self._said.append(text)
            if self._node is not None:
                self._node.show("\n".join(self._said))
