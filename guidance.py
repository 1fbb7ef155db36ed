"""Which tokens a grammar allows next, told by llguidance: a whole vocabulary in microseconds, without the GIL.

A vocabulary is read once for an engine, a grammar compiled once for all that follow it.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from engine import Refused, one_line
from grammar import lark_grammar

INSTALL = "llguidance==1.9.1"
STACK = 256 << 20  # bytes: llguidance descends from rule to rule, at 6 kB each, and where its stack ends so does the process


class Guidance:
    """Of one sequence."""

    def __init__(self, matcher: Any, numpy: Any, vocabulary: int) -> None:
        self.matcher, self.numpy, self.vocabulary = matcher, numpy, vocabulary

    def allows(self, token: int) -> bool:
        return bool(self.matcher.validate_tokens([token]))

    def allowed(self) -> Any:
        """bool (vocabulary). Raises Refused: the matcher has a limit, and then allows only the end."""
        packed = self.numpy.frombuffer(self.matcher.compute_bitmask(), dtype=self.numpy.uint8)
        if self.matcher.is_error():
            raise failed(self.matcher)
        return self.numpy.unpackbits(packed, count=self.vocabulary, bitorder="little").view(bool)

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)

    def copy(self) -> Guidance:
        return Guidance(self.matcher.deep_copy(), self.numpy, self.vocabulary)


class Guides:
    """Of an engine: its vocabulary, and the grammars that were asked for last."""

    KEPT = 64

    def __init__(self, numpy: Any, tokens: Any, vocabulary: int, eos: frozenset[int]):
        """`tokens`: llguidance's view of a vocabulary, a LLTokenizer."""
        self.library: Any = importlib.import_module("llguidance")
        self.numpy, self.tokens, self.vocabulary, self.eos = numpy, tokens, vocabulary, eos
        self.compiled: dict[str, Guidance] = {}

    def start(self, text: str) -> Guidance:
        """For a sequence that follows a grammar. Raises Refused."""
        if not self.eos:
            raise Refused("This model has no token that ends a text, which structured output needs.", "structured_outputs")
        if text not in self.compiled:
            matcher = deeply(lambda: self.library.LLMatcher(self.tokens, self.library.grammar_from("lark", lark_grammar(text))))
            if matcher.is_error():
                raise failed(matcher)
            if len(self.compiled) >= self.KEPT:
                del self.compiled[next(iter(self.compiled))]
            self.compiled[text] = Guidance(matcher, self.numpy, self.vocabulary)
        return self.compiled[text].copy()


class Words:
    """A vocabulary as llguidance asks for it where it knows no better. Special tokens are those that have no text of their own."""

    bos_token_id = None

    def __init__(self, literals: Sequence[bytes], pieces: Sequence[bytes], eos: int, tokenize: Callable[[str], list[int]]):
        """Of literals and pieces (UTF-8; special tokens stand in the first alone) each token has one."""
        self.tokens, self.eos_token_id, self.tokenize = [*literals], eos, tokenize
        self.special_token_ids = [
            i for i, (literal, piece) in enumerate(zip(literals, pieces, strict=True)) if literal and not piece
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("text, please")  # it asks in this way what is taken
        return self.tokenize(text)


def deeply(work: Callable[[], Any]) -> Any:
    """What it returns, from a thread whose stack has room for all the rules that a grammar may have."""
    with ThreadPoolExecutor(1) as deep:
        usual = threading.stack_size(STACK)
        try:
            begun = deep.submit(work)
        finally:
            threading.stack_size(usual)
        return begun.result()


def failed(matcher: Any) -> Refused:
    """The grammar is bad, or takes more than llguidance's limits allow."""
    return Refused(f"The grammar cannot be followed: {one_line(ValueError(matcher.get_error()))}", "structured_outputs")
