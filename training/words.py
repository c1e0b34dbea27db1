"""Tokenizers for which every word of a small grammar is a single token."""

import itertools
import string
from collections.abc import Iterable, Sequence

from transformers import CLIPTokenizer, LlamaTokenizer


def merges(words: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first (ties by spelling), until every word is a single token.

    Args:
        words: each as the pieces it is spelled with.
    """
    pieces = [list(word) for word in words]
    found: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in pieces):
        counts: dict[tuple[str, str], int] = {}
        for word in pieces:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        found.append(best)
        for word in pieces:
            place = 0
            while place < len(word) - 1:
                if (word[place], word[place + 1]) == best:
                    word[place : place + 2] = ["".join(best)]
                place += 1
    return found


def _vocabulary(tokens: Iterable[str], found: Iterable[tuple[str, str]]) -> dict[str, int]:
    every = dict.fromkeys([*tokens, *("".join(pair) for pair in found)])
    return {token: number for number, token in enumerate(every)}


def clip_tokenizer(words: Iterable[str], max_length: int) -> CLIPTokenizer:
    """A CLIP tokenizer with one token for each of the words, smaller pieces for other lower-case words."""
    found = merges([*word[:-1], word[-1] + "</w>"] for word in words)
    letters = string.ascii_lowercase
    # The end token is not 2, which transformers takes for the sign of an old CLIP and then pools the highest token.
    tokens = ["<|startoftext|>", "<|endoftext|>", "<unk>", ",", ",</w>", *letters, *(c + "</w>" for c in letters)]
    return CLIPTokenizer(vocab=_vocabulary(tokens, found), merges=found, unk_token="<unk>", model_max_length=max_length)


def llama_tokenizer(words: Iterable[str], max_length: int) -> LlamaTokenizer:
    """A Llama tokenizer with one token for each of the words, smaller pieces for other lower-case words.

    Other characters are left out. Every text starts with a token of its own, so none is empty.
    """
    found = merges("▁" + word for word in words)
    tokens = ["<unk>", "<s>", "</s>", "<pad>", "▁", *string.ascii_lowercase]
    return LlamaTokenizer(
        vocab=_vocabulary(tokens, found),
        merges=found,
        add_bos_token=True,
        pad_token="<pad>",
        padding_side="right",
        model_max_length=max_length,
    )
