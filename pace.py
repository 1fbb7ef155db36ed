"""What newcomers may cost those who wait for their next token: how much of a prompt a step reads, when a prompt begins, and when a grammar.

Each learns what things take from what they took. Nothing here knows an engine.
"""

from __future__ import annotations

from collections.abc import Sequence


class Pace:
    """How much of a prompt is read in a step in which others decode: so much as fits into a time. Seconds; tokens."""

    STEP_S = 0.15  # what such a step may take, or two steps that only decode, if that is more
    SLOWLY = 0.2  # how much of a new value counts

    def __init__(self, target_ms: float, least: int, most: int):
        """`target_ms`: --step-target; 0: the default."""
        self.target_s, self.least, self.most = target_ms / 1000, least, most
        self.decode_s, self.token_s = 0.0, 0.0  # what a step takes that only decodes, and what a prompt's token adds

    def learn(self, took: float, more: int, few: int = 0) -> None:
        """`more`: tokens beside one for each sequence that got its next; up to `few` of them are not worth counting."""
        if more <= few:
            self.decode_s += (took - self.decode_s) * (self.SLOWLY if self.decode_s else 1)
        elif more >= self.least:
            self.token_s += (max(0.0, took - self.decode_s) / more - self.token_s) * (self.SLOWLY if self.token_s else 1)

    def piece(self) -> int:
        """Tokens of prompts in a step in which others decode."""
        spare = (self.target_s or max(2 * self.decode_s, self.STEP_S)) - self.decode_s
        fits = int(spare / self.token_s) if self.token_s else self.most
        return min(max(fits, self.least), self.most)


class PromptPace:
    """While somebody is answered, prompts take two thirds of the time that answers do, at most: what one has cost is paid for
    before the next begins, and long ones begin one after the other."""

    BURST_S, DEBT_S, AT_ONCE, SHORT, PRICE = 0.5, 10.0, 512, 64, 1.5

    def __init__(self) -> None:
        self.credit = self.BURST_S
        self.decode_s = 0.0  # what a step takes that reads no prompt

    def allows(self, lengths: Sequence[int], answering: bool, last: bool) -> bool:
        """May a prompt begin, so that prompts of these lengths are being read, its own first? A short one waits for no one's debt.

        `last`: it would take the last slot, which long prompts leave while several of them are read.
        """
        at_once = sum(lengths) - max(lengths) <= self.AT_ONCE
        if not answering:
            return not last or at_once or lengths[0] <= self.AT_ONCE
        return at_once and (self.credit > 0 or lengths[0] <= self.SHORT)

    def stepped(self, seconds: float, reading: bool, answering: bool) -> float:
        """A step has taken so long. Returns what of it went to answers; all of it where nobody waits for one."""
        if not answering:
            self.credit = self.BURST_S
            return seconds
        if not reading:
            self.decode_s += (seconds - self.decode_s) / (4 if self.decode_s else 1)
        given = min(seconds, self.decode_s or seconds / 2)  # no step without a prompt has been seen yet: a guess
        cost = self.PRICE * (seconds - given) if reading else 0
        self.credit = max(-self.DEBT_S, min(self.BURST_S, self.credit + given - cost))
        return given


class GrammarPace:
    """A grammar that an engine does not know yet takes it a while, in which nobody gets a token: as long then goes to steps."""

    SHARE_S, KNOWN = 0.05, 256

    def __init__(self) -> None:
        self.known: dict[int, None] = {}  # hashes, the latest last
        self.credit = self.SHARE_S  # seconds that new ones may take before the next step: as many as steps have taken

    def allows(self, grammar: str | None) -> bool:
        return grammar is None or hash(grammar) in self.known or self.credit > 0

    def began(self, grammar: str | None, took: float, refused: bool = False) -> None:
        """`took`: seconds of start(). One that the engine refused is no better known for it."""
        if grammar is None:
            return
        self.credit -= took
        if refused:
            return
        self.known.pop(hash(grammar), None)
        self.known[hash(grammar)] = None
        if len(self.known) > self.KNOWN:
            del self.known[next(iter(self.known))]

    def stepped(self, took: float) -> None:
        self.credit = min(self.SHARE_S, self.credit + took)
