"""Sequences that decode in one batch: what each step takes of whom, what is guessed, drawn and scored, and who yields when the cache is full.

What llama.cpp and OpenVINO have in common: both compute rows of tokens over a KV cache and give raw logits. How is their binding's business.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from engine import EngineSpec, Refused, Sampling, Scored, Step
from guidance import Guidance, Guides
from pace import Pace
from sampler import Sampler, Weights


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence of the KV cache. `kv` are the tokens it holds; a binding may keep them after the end, for the next prompt like it."""

    seq: int
    kv: list[int] = field(default_factory=list)
    todo: list[int] = field(default_factory=list)  # tokens to be decoded next: the rest of the prompt, or the one sampled
    table: list[int] = field(default_factory=list)  # its blocks, where the cache is of blocks
    sampler: Sampler | None = None  # None: the slot is free
    guidance: Guidance | None = None
    sampling: Sampling = Sampling()
    scores: list[Scored] = field(default_factory=list)  # of the prompt's tokens, where they are wanted
    used: int = 0  # when it was last started: the least recent is overwritten first
    drafts: list[int] = field(default_factory=list)  # guesses at what follows todo[0], decoded with it
    grams: dict[tuple[int, ...], int] = field(default_factory=dict)  # tokens in a row → where what followed them begins
    indexed: int = 0  # tokens of the sequence that `grams` knows
    left: int = 0  # tokens that may still be sampled
    begun: bool = False  # of its prompt something has been read
    told: int = 0  # tokens of its prompt that were found in the cache when it started
    late: int = 0  # and those beyond them, when it began
    passed: int = 0  # prompts that came later and began before it had been read

    @property
    def decodes(self) -> bool:
        """All that is to be computed is the token that was sampled last, or the last one of a prompt."""
        return len(self.todo) == 1 and bool(self.kv)

    @property
    def answering(self) -> bool:
        """Somebody waits for its next token, not for its first."""
        return self.left < (self.sampling.max_tokens or 1)

    @property
    def settled(self) -> bool:
        """It has got more than its first token."""
        return self.left < (self.sampling.max_tokens or 1) - 1

    def yield_cells(self) -> None:
        """Give its cells back, to be decoded anew when there is room: what was sampled, and the sampler, stay."""
        self.todo, self.kv = self.kv + self.todo, []
        if self.scores:  # of a prompt that is being scored, from its first token
            self.scores = [Scored(None)]


class Piece(NamedTuple):
    """A part of a batch: tokens of one sequence, the first of them at a position, and how many of the last need logits."""

    slot: Slot
    ids: list[int]
    position: int
    outputs: int


class Slots:
    """The slots of an engine. A binding says how cells are found, held and given up, and computes.

    One batch per step over all sequences; a long prompt is decoded in pieces so that the others keep going.
    """

    BATCH, BATCH_TOGETHER = 512, 2048  # tokens per step when nobody waits for the next token, and of several whole prompts …
    BATCH_BUSY, BATCH_LEAST = 256, 32  # … and at most and at least when somebody does
    BATCH_SCORED = 64  # … and of a prompt whose every token needs its logits
    PASSED = 16  # prompts that may pass one that is long, or waits for room
    numpy: Any
    vocabulary: int
    bos: int
    eos: frozenset[int]
    context: int
    unified: bool  # all slots share the cells: a prompt waits until it fits, the youngest sequence yields when they run out
    guides: Guides | None

    def make_slots(self, spec: EngineSpec) -> None:
        self.ngram, self.draft_tokens = spec.ngram, spec.draft_tokens or 4
        self.ring = [Slot(i) for i in range(spec.slots)]
        self.pace = Pace(spec.step_target, self.BATCH_LEAST, self.BATCH_BUSY)
        self.weights = Weights(self.numpy, self.vocabulary)
        self.scoring: list[tuple[Slot, int, int]] = []  # (slot, row of the output, the prompt token that it predicts)
        self.clock = itertools.count(1)

    # What a binding says.

    def find(self, ids: list[int], limit: int) -> tuple[Slot, int]:
        """A free slot, with as much of the beginning of these tokens in its cache as can be found, at most `limit`."""
        raise NotImplementedError

    def free_cells(self) -> int:
        """Tokens that the cache has room for."""
        raise NotImplementedError

    def need(self, slot: Slot, more: int) -> int:
        """Cells that so many more tokens of a sequence take of what is free."""
        return more

    def look_again(self, slot: Slot) -> None:
        """Nothing of its prompt is in its cells: another may have computed its beginning meanwhile, or what it gave up may still be there."""

    def cut(self, slot: Slot) -> None:
        """Its cells hold more than `kv` says."""
        raise NotImplementedError

    def drop(self, slot: Slot) -> None:
        """All its cells are free."""
        raise NotImplementedError

    def compute(self, pieces: list[Piece]) -> None:
        raise NotImplementedError

    def logits(self, row: int) -> Any:
        """The raw logits of a row, counted over all pieces' outputs: float32 (vocabulary), until the next batch."""
        raise NotImplementedError

    # The life of a sequence.

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        guidance = self.guides.start(sampling.grammar) if sampling.grammar and self.guides else None
        sampler = Sampler(self.weights, self.eos, ids, sampling)  # what may fail comes before a slot is taken
        # The last token is always decoded: its logits are what we are after. A scored prompt needs those of all.
        slot, common = self.find(ids, 0 if sampling.scores_prompt else len(ids) - 1)
        slot.kv, slot.todo, slot.guidance = ids[:common], ids[common:], guidance
        slot.sampler, slot.sampling = sampler, sampling
        slot.scores = [Scored(None)] if sampling.scores_prompt else []  # nothing predicts the first token
        slot.used, slot.left = next(self.clock), sampling.max_tokens or 1
        slot.drafts, slot.grams, slot.indexed = [], {}, self.ngram
        slot.begun, slot.told, slot.late, slot.passed = False, common, 0, 0
        return slot.seq, common

    def step(self) -> list[Step]:
        if self.unified:
            self.make_room()
        pieces, ready = self.next_batch()
        began, tokens = time.monotonic(), sum(len(piece.ids) for piece in pieces)
        self.compute(pieces)
        self.pace.learn(time.monotonic() - began, tokens - len(ready), few=len(self.ring))
        for slot, row, token in self.scoring:
            slot.scores.append(self.score(row, token, slot.sampling.logprobs or 0))
        return [self.accept(slot, row) if slot.drafts else self.sample(slot, row) for slot, row in ready]

    def cancel(self, seq: int) -> None:
        slot = self.ring[seq]
        slot.sampler, slot.guidance, slot.todo, slot.grams = None, None, [], {}

    # Room.

    def make_room(self) -> None:
        """Cells for all that decode, and for the prompt that has waited longest.

        First go prompts that are kept for reuse, the oldest first; then the youngest sequence yields, of those that are answered the last of
        all. The oldest never does.
        """
        waiting = (self.need(slot, len(slot.todo)) for slot in self.ring if slot.sampler is not None and not slot.decodes)
        if self.free_cells() >= self.growth() + max(waiting, default=0):  # as a rule
            return
        kept = sorted((slot for slot in self.ring if slot.sampler is None and slot.kv), key=lambda s: s.used)
        busy = self.in_turn(slot for slot in self.ring if slot.sampler is not None)
        next_prompt = next((self.need(slot, len(slot.todo)) for slot in busy if not slot.decodes), 0)
        while self.free_cells() < self.growth() + next_prompt and kept:
            self.forget(kept.pop(0))
        while self.free_cells() < self.growth() or (next_prompt > self.free_cells() and not self.growth()):
            holding = [slot for slot in busy[1:] if slot.kv]
            if not holding:
                return
            self.forget(holding[-1])

    def growth(self) -> int:
        """Cells that a step needs at most for the sequences that decode."""
        each = 1 + self.draft_tokens * bool(self.ngram)
        return sum(self.need(slot, each) for slot in self.ring if slot.sampler is not None and slot.decodes)

    def forget(self, slot: Slot) -> None:
        self.drop(slot)
        if slot.sampler is None:
            slot.kv = []
        else:
            slot.yield_cells()

    # The next batch.

    def next_batch(self) -> tuple[list[Piece], list[tuple[Slot, int]]]:
        """One token of every sequence that decodes, then pieces of the prompts. With it whose last logits begin in which row."""
        pieces: list[Piece] = []
        ready: list[tuple[Slot, int]] = []
        busy = self.taking_part()
        decoding = [slot for slot in busy if slot.decodes]
        prefilling = self.in_turn(slot for slot in busy if not slot.decodes)
        waiting: list[Slot] = []  # until the whole of them fits
        room = max(self.room(decoding), len(decoding) + 1)
        free = self.free_cells() - self.growth() if self.unified else 0
        at = rows = 0
        self.scoring = []
        for slot in decoding if self.ngram else ():
            slot.drafts = self.guess(slot, min(self.draft_tokens, room // (2 if prefilling else 1) // len(decoding) - 1))
            slot.todo += slot.drafts
        for slot in decoding + prefilling:
            prompt = slot not in decoding
            if prompt and self.unified:
                halted = not slot.begun and any(one.passed >= self.PASSED for one in waiting)
                if halted or (left := self.left_by(slot, free)) < 0:
                    waiting.append(slot)
                    continue
                free = left
            scored = prompt and bool(slot.scores)
            ids = slot.todo[: min(room, self.BATCH_SCORED if scored else self.BATCH)]
            if scored or len(ids) < len(slot.todo):  # beyond BATCH come only whole prompts
                ids = ids[: max(0, self.BATCH - at, len(decoding) + 1 - at)]
            if not ids:
                break
            if not slot.begun:
                slot.begun, slot.late = True, max(0, len(slot.kv) - slot.told)
                for one in prefilling:
                    one.passed += one.used < slot.used and not one.decodes
            last = len(slot.todo) == len(ids)
            piece = Piece(slot, ids, len(slot.kv), len(ids) if scored else (1 + len(slot.drafts)) * last)
            if scored:
                self.scoring += [(slot, rows + i, slot.todo[i + 1]) for i in range(len(ids)) if i + 1 < len(slot.todo)]
            at, rows, room = at + len(ids), rows + piece.outputs, room - len(ids)
            slot.kv += ids
            slot.todo = slot.todo[len(ids) :]
            if last:
                ready.append((slot, rows - 1 - len(slot.drafts)))
            pieces.append(piece)
        return pieces, ready

    def left_by(self, slot: Slot, free: int) -> int:
        """Of so many free cells, those that are left when all of its prompt is there: below 0 it has to wait."""
        before = self.free_cells()
        looks = not (slot.kv or slot.scores)
        if looks:
            self.look_again(slot)
        left = free - (before - self.free_cells()) - self.need(slot, len(slot.todo))
        if left < 0 and looks and slot.kv:  # what it found is free for others while it waits
            self.forget(slot)
        return left

    def in_turn(self, slots: Iterable[Slot]) -> list[Slot]:
        """Those that are being answered first, then short prompts before long ones, but for those that were passed too often."""

        def rank(slot: Slot) -> tuple[bool, bool, int]:
            return not slot.answering, len(slot.todo) > self.BATCH_BUSY and slot.passed < self.PASSED, slot.used

        return sorted(slots, key=rank)

    def taking_part(self) -> list[Slot]:
        """In the next batch."""
        return [slot for slot in self.ring if slot.sampler is not None]

    def room(self, decoding: list[Slot]) -> int:
        """Tokens of the next batch."""
        settled = any(slot.settled for slot in decoding)  # who has just begun waits for those that came with it
        return self.pace.piece() if settled else self.BATCH_TOGETHER

    def guess(self, slot: Slot, most: int) -> list[int]:
        """What followed the last tokens when they were met before."""
        text, n = slot.kv + slot.todo, self.ngram
        for end in range(slot.indexed, len(text)):
            slot.grams[tuple(text[end - n : end])] = end  # the last n of all come later: something must follow them
        slot.indexed = max(slot.indexed, len(text))
        at = slot.grams.get(tuple(text[-n:]), len(text))
        return text[at : at + max(0, min(most, slot.left - 1, self.context - len(text)))]

    # Tokens out of logits.

    def accept(self, slot: Slot, row: int) -> Step:
        """Sample as if there had been no guesses, for as long as they turn out right: the same tokens, several in a step."""
        drafts, slot.drafts = slot.drafts, []
        first = step = self.sample(slot, row)
        tokens, scores = [*step.tokens], [*step.logprobs]
        while len(tokens) <= len(drafts) and step.tokens and tokens[-1] == drafts[len(tokens) - 1] not in self.eos:
            step = self.sample(slot, row + len(tokens))
            tokens += step.tokens
            scores += step.logprobs
        slot.kv = slot.kv[: len(slot.kv) - len(drafts) + len(tokens) - 1]
        self.cut(slot)
        return first._replace(tokens=tokens, logprobs=scores, error=step.error)

    def sample(self, slot: Slot, row: int) -> Step:
        assert slot.sampler
        scores: list[Scored] = []
        try:
            token = self.choose(slot, self.logits(row))
        except Refused as error:  # llguidance has limits, and bans may leave nothing
            slot.todo = [self.bos]  # never decoded: the choice ends here
            return Step(slot.seq, (), error=error)
        slot.sampler.accept(token)
        wanted = slot.sampling.logprobs
        if wanted is not None:
            scores = [self.score(row, token, wanted)]
        prompt, late, slot.scores, slot.late = slot.scores, slot.late, [], 0
        slot.todo, slot.left = [token], slot.left - 1
        return Step(slot.seq, [token], scores, prompt, cached=late or None)

    def score(self, row: int, token: int, alternatives: int) -> Scored:
        logits = self.logits(row)
        best = float(logits.max())
        shift = best + math.log(float(self.numpy.exp(logits - best, dtype=self.numpy.float64).sum()))
        top: list[tuple[int, float]] = []
        if alternatives:
            ids = self.numpy.argpartition(logits, -alternatives)[-alternatives:]
            top = sorted(((int(i), float(logits[i]) - shift) for i in ids), key=lambda pair: (-pair[1], pair[0]))
        return Scored(float(logits[token]) - shift, top)

    def choose(self, slot: Slot, logits: Any) -> int:
        """Sample freely, and only when the grammar forbids that token, among those that it allows. Raises Refused where bans leave none.

        To ask the grammar about one token costs microseconds, about the whole vocabulary more. With P
        the probability of all that is allowed, a token comes with p + (1 - P) * p / P = p / P: the distribution is the same.
        """
        assert slot.sampler
        token = slot.sampler.choose(logits)
        if slot.guidance and (token is None or not slot.guidance.allows(token)):
            token = slot.sampler.choose(logits, slot.guidance.allowed())
        if token is None:
            raise no_token_left()
        if slot.guidance:
            slot.guidance.accept(token)
        return token


def no_token_left() -> Refused:
    return Refused("'logit_bias' bans every token that may come next.", "logit_bias")
