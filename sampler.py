"""How a token is drawn from logits, by numpy: bans, penalties, temperature, top_k, top_p, min_p. Nothing of a library, no text.

llama.cpp's own samplers hold a vocabulary as records of 12 bytes, and take ten times as long: 0.4 ms a token, which everyone waits for.
One sum of all weights and one of a block of them find the token that a random number falls on; only what top_k and top_p may leave is sorted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import Any

from engine import Sampling

BLOCK = 256  # weights that are summed up together
LIKELY = 2.0**-13  # of the likeliest token's weight: as a rule more than top_k have more
COLDEST = 1e-6  # below this temperature only the likeliest token is left, and 1 / temperature would be infinite


class Weights:
    """Room for one vocabulary of float32, padded to whole blocks with zeros. The samplers of an engine share it."""

    def __init__(self, numpy: Any, vocabulary: int):
        self.numpy = numpy
        self.blocks = numpy.zeros((-(-vocabulary // BLOCK), BLOCK), dtype=numpy.float32)
        self.all = self.blocks.reshape(-1)[:vocabulary]

    def draw(self, roll: float) -> int:
        """By the weights, not all of them zero; `roll`: 0 to 1."""
        sums = self.sums(self.numpy.add.reduce(self.blocks, 1))
        value = roll * sums[-1]
        block = falls_on(sums, value)
        inside = self.sums(self.blocks[block])
        return block * BLOCK + falls_on(inside, value - (sums[block - 1] if block else 0.0))

    def sums(self, weights: Any) -> Any:
        """Up to each, in float64. (cumsum with a dtype casts piece by piece, in ten times the time.)"""
        return self.numpy.add.accumulate(weights.astype(self.numpy.float64))


def falls_on(sums: Any, value: float) -> int:
    """The first sum that is greater; the first of the last ones, all alike, where rounding leaves none. Never one that adds nothing."""
    return int(min(sums.searchsorted(value, side="right"), sums.searchsorted(sums[-1])))


class Sampler:
    """Of one sequence: what its sampling asks for, and what was sampled so far. The order of the steps is that of vLLM and transformers."""

    def __init__(self, weights: Weights, eos: Iterable[int], ids: list[int], sampling: Sampling):
        self.weights, self.sampling = weights, sampling
        numpy = weights.numpy
        self.dice = random.Random(sampling.seed)
        self.eos, self.muted = [*eos], sampling.min_tokens  # tokens still to come before EOS may
        biases = [(token, -math.inf if bias <= -100 else bias) for token, bias in sampling.logit_bias]  # -100 bans
        self.biased = numpy.array([token for token, _ in biases], dtype=numpy.int64)
        self.biases = numpy.array([bias for _, bias in biases], dtype=numpy.float32)
        self.seen = self.counts = None
        if sampling.repetition_penalty != 1:
            self.seen = numpy.zeros(len(weights.all), dtype=bool)
            self.seen[ids] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = numpy.zeros(len(weights.all), dtype=numpy.float32)

    def choose(self, logits: Any, allowed: Any = None) -> int | None:
        """The next token; None: bans leave none. logits: float32 (vocabulary), raw; allowed: bool (vocabulary). See `accept`."""
        numpy, s, all_ = self.weights.numpy, self.sampling, self.weights.all
        values = logits if allowed is None and not self.changes else self.adjusted(logits, allowed)
        best = int(values.argmax())
        if values[best] == -math.inf:
            return None
        if not s.temperature or s.top_k == 1 or s.min_p >= 1:  # of logits in 16 bits the greatest may be there twice
            return best
        numpy.subtract(values, values[best], out=all_)
        numpy.divide(all_, max(s.temperature, COLDEST), out=all_)
        numpy.exp(all_, out=all_)
        if not s.top_k and (s.top_p is None or s.top_p >= 1) and not s.min_p:
            return self.weights.draw(self.dice.random())
        kept = self.kept()
        if not len(kept):  # min_p so near 1, or top_p so near 0, that rounding leaves none
            return best
        sums = self.weights.sums(all_[kept])
        return int(kept[falls_on(sums, self.dice.random() * sums[-1])])

    @property
    def changes(self) -> bool:
        """Whether the logits are not taken as they are."""
        return bool(self.muted or len(self.biased) or self.seen is not None or self.counts is not None)

    def adjusted(self, logits: Any, allowed: Any) -> Any:
        """In the room for weights: logits with bans, biases and penalties."""
        numpy, s, all_ = self.weights.numpy, self.sampling, self.weights.all
        numpy.copyto(all_, logits)
        if len(self.biased):
            all_[self.biased] += self.biases
        if self.muted:
            all_[self.eos] = -math.inf
        if self.seen is not None:
            values = all_[self.seen]
            all_[self.seen] = numpy.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if self.counts is not None:
            all_ -= s.frequency_penalty * self.counts + s.presence_penalty * (self.counts > 0)
        if allowed is not None:
            all_[~allowed] = -math.inf
        return all_

    def kept(self) -> Any:
        """Token ids that top_k, top_p and min_p leave, by the weights, of which the greatest is 1."""
        numpy, s, all_ = self.weights.numpy, self.sampling, self.weights.all
        top_k = min(s.top_k or len(all_), len(all_))
        if top_k < len(all_):
            kept = numpy.flatnonzero(all_ > LIKELY)
            kept = kept if len(kept) >= top_k else numpy.arange(len(all_))
            if len(kept) > top_k:
                kept = kept[all_[kept].argpartition(len(kept) - top_k)[-top_k:]]
            kept = kept[all_[kept] > 0]
        else:
            kept = numpy.flatnonzero(all_ > s.min_p)
        if s.top_p is not None and s.top_p < 1:
            kept = self.nucleus(kept, s.top_p)
        return kept[all_[kept] >= s.min_p]

    def nucleus(self, kept: Any, top_p: float) -> Any:
        """The likeliest tokens that together have top_p of the weight, and no one fewer."""
        numpy, weights = self.weights.numpy, self.weights.all[kept]
        total = float(weights.sum(dtype=numpy.float64))
        some = weights > total * (1 - top_p) / len(weights)  # all the others together have less than 1 - top_p
        kept, weights = kept[some], weights[some]
        order = (-weights).argsort(kind="stable")
        sums = self.weights.sums(weights[order])
        return kept[order[: int(sums.searchsorted(top_p * total)) + 1]]

    def accept(self, token: int) -> None:
        """What was chosen, or a guess that turned out right."""
        self.muted = max(0, self.muted - 1)
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
