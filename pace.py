"""How much of a prompt an engine reads in a step in which others wait for their next token: so much as fits into a time."""

from __future__ import annotations


class Pace:
    """Learns what steps take. Seconds; tokens."""

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
