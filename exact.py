"""Bindings whose text is the same, bit for bit, whatever else runs (--deterministic).

A sum of floats depends on its order, and a library chooses the order by the shape of what it computes. So a token is always computed in the
same shape, whoever else is there. With llama.cpp:
- a prompt by itself, in pieces that begin at multiples of PIECE tokens; from a cache come whole such pieces, and nothing that was sampled;
- what is sampled, one token each for all that decode, where it has been tried out at the start that for these weights, on this machine,
  a row does not depend on how many there are; else each sequence by itself;
- attention not by the fused kernel, which goes by the number of sequences and the length of the longest;
- each slot with a KV cache of its own, in which a token lies at its position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from backends import LlamaCpp, OpenVino, TorchSequence, Transformers, shared
from engine import Backend, EngineSpec, Sampling, Step, log
from machine import default_cache_tokens
from slots import Piece, Slot


class ExactLlamaCpp(LlamaCpp):
    FUSED = False
    BATCH = BATCH_TOGETHER = BATCH_BUSY = pool_tokens = 128  # without the fused kernel a step's memory is batch times context
    PIECE = LlamaCpp.BATCH_SCORED  # tokens
    TRIED = 8  # tokens before the rows that are tried out

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        self.BATCH = self.BATCH_TOGETHER = max(self.BATCH, spec.slots)
        super().__init__(spec, progress)
        if not self.on_cpu:
            raise RuntimeError("--deterministic is honoured on the CPU alone: add --gpu-layers 0")
        self.part: list[Slot] = []  # what is computed now
        self.prompts = [0] * spec.slots  # tokens of each slot's prompt; what its cache holds behind them was sampled
        self.together = self.rows_alike()
        if not self.together:
            log.info("--deterministic: for this file each sequence is decoded by itself, since its rows depend on their number")

    def layout(self, spec: EngineSpec) -> tuple[int, bool]:
        """An equal share of the cache for each slot."""
        cells, unified = super().layout(spec)
        if not unified:
            return cells, False
        share, length = cells // spec.slots, min(spec.length or 0, self.trained)
        if share < length:
            raise RuntimeError(
                f"--deterministic gives each slot a cache of its own, here of {share} tokens: "
                f"--length {length} needs --cache-size {length * spec.slots} or a lower --max-parallel"
            )
        return max(min(share, self.trained), 256) * spec.slots, False

    def rows_alike(self) -> bool:
        """Is a row of logits the same, however many sequences decode with it?"""
        ids = [token * 7919 % self.vocabulary for token in range(1, self.TRIED + 2)]
        self.computed((0, at, token) for at, token in enumerate(ids[:-1]))
        for seq in range(1, self.slots):
            self.lib.llama_memory_seq_cp(self.memory, 0, seq, -1, -1)
        rows = []
        for count in sorted({*range(1, min(self.slots, 9) + 1), max(self.slots - 1, 1), self.slots}):
            rows += self.computed((seq, self.TRIED, ids[-1]) for seq in range(count))
            for seq in range(count):
                self.lib.llama_memory_seq_rm(self.memory, seq, self.TRIED, -1)
        self.lib.llama_memory_clear(self.memory, True)
        return all(self.numpy.array_equal(row, rows[0]) for row in rows)

    def computed(self, rows: Iterable[tuple[int, int, int]]) -> list[Any]:
        """The logits of each row of a batch."""
        self.fill(self.batch, rows)
        if self.lib.llama_decode(self.ctx, self.batch):
            raise RuntimeError(f"llama_decode failed: {self.last_error}")
        return [self.row_of(index).copy() for index in range(self.batch.n_tokens)]

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        seq, common = super().start(ids, sampling)
        self.prompts[seq] = len(ids)
        return seq, common

    def reusable(self, slot: Slot, ids: list[int], limit: int) -> int:
        found = shared(slot.kv, ids, min(limit, self.prompts[slot.seq]))
        return found - found % self.PIECE

    def step(self) -> list[Step]:
        """A token for each sequence that decodes, and a piece of the prompt that has waited longest."""
        busy = [slot for slot in self.ring if slot.sampler is not None]
        reading = sorted((slot for slot in busy if len(slot.kv) < self.prompts[slot.seq]), key=lambda s: s.used)
        decoding = [slot for slot in busy if slot not in reading]
        parts = [decoding] if self.together else [[slot] for slot in decoding]
        out: list[Step] = []
        for self.part in [*parts, reading[:1]]:
            out += super().step() if self.part else ()
        return out

    def taking_part(self) -> list[Slot]:
        return self.part

    def room(self, decoding: list[Slot]) -> int:
        return self.BATCH if decoding else self.PIECE - len(self.part[0].kv) % self.PIECE


class ExactTransformers(Transformers):
    """Each sequence computed by itself, with a cache of its own: the library's batch looks at everybody's keys at once."""

    PIECE = Transformers.BATCH_SCORED  # tokens

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        super().__init__(replace(spec, cache_tokens=self.PAGE * spec.slots), progress)  # the batch has nothing to do
        trained = self.config.get("max_position_embeddings") or 4096
        self.cache_tokens = spec.cache_tokens or default_cache_tokens(spec.slots, trained, self.kv_bytes(4))
        self.context = min(trained, self.cache_tokens // spec.slots)
        self.read: dict[int, int] = {}  # tokens of each sequence's prompt that have been computed

    def enter(self, row: TorchSequence) -> int:
        row.cache, self.read[row.seq] = self.cache_class(), 0
        return 0

    def step(self) -> list[Step]:
        self.out = []
        self.score_next()
        reading = [row for row in self.rows.values() if self.read.get(row.seq, len(row.ids)) < len(row.ids)]
        for row in [row for row in self.rows.values() if row.sampled] + reading[:1]:
            self.compute(row)
        return self.out

    def compute(self, row: TorchSequence) -> None:
        """The token that was sampled last, or a piece of the prompt, with which it may have come to its end."""
        at = self.read[row.seq]
        piece = row.sampled[-1:] or row.ids[at : at + self.PIECE]
        with self.outside_the_batch():
            logits = (
                self.model(self.torch.tensor([piece], device=self.device), past_key_values=row.cache).logits[0, -1:].float()
            )
        if not row.sampled:
            self.read[row.seq] = at + len(piece)
        if self.read[row.seq] == len(row.ids):
            self.take(row, logits, int(logits[0].argmax()))

    def cancel(self, seq: int) -> None:
        row = self.rows.pop(seq)
        self.read.pop(seq, None)
        if row in self.scoring:
            self.scoring.remove(row)


class ExactOpenVino(OpenVino):
    """float32, and never one row alone, for which the library has another kernel: a companion is computed along, which nobody reads."""

    BESIDE = 1

    def make_slots(self, spec: EngineSpec) -> None:
        super().make_slots(spec)
        self.companion = Slot(-1, table=[self.blocks.take()])

    def compute(self, pieces: list[Piece]) -> None:
        super().compute([*pieces, Piece(self.companion, [0], 0, 1)])


# What honours --deterministic.
EXACT: dict[str, type[Backend]] = {"openvino": ExactOpenVino, "llamacpp": ExactLlamaCpp, "transformers": ExactTransformers}
