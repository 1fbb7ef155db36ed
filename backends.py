"""Bindings: one class for each native library.

Each is thin: load, tokenize, start, step, cancel. What every engine has in common stands in engine.py, what those over raw logits
have in slots.py, what is read from a model's own files in model_files.py, what embedding shares with them in libraries.py. A library
is imported inside classes that the engine process alone makes; the server process only looks whether it is there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import glob
import importlib
import importlib.metadata
import importlib.util
import itertools
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import guidance
import memory
from blocks import Blocks
from chat_syntax import ChatTemplate
from engine import (
    UPSTREAMS,
    Backend,
    EngineFailed,
    EngineSpec,
    Refused,
    Sampling,
    Scored,
    Step,
    Tokens,
    log,
    one_line,
)
from grammar import lark_grammar as lark_grammar  # a binding's dialect: taken from here by those who try grammars out
from guidance import Guidance, Guides, Words
from libraries import HfModel, LlamaModel, OpenVinoModel, installed, padded
from machine import (
    LONG,
    default_cache_tokens,
    lacks_cuda,
    machine_memory,
    physical_cores,
    torch_device,
    torch_dtype,
    with_a_cache,
)
from model_files import (
    cache_folder,
    file_mark,
    gguf_shape,
    own_sampling,
    read_gguf,
    read_json,
    text_config,
)
from pace import Pace
from slots import Piece, Slot, Slots, no_token_left

# ─────────────────────────────────────────────────── OpenVINO GenAI ──────────────────────────────────────────────


UNFINISHED = "unfinished-"  # so a folder's name begins while it is being made
UNFINISHED_S, UNUSED_S = 86_400, 90 * 86_400


def tidy(folder: Path) -> None:
    """Folders that a killed process has left unfinished, and those that nobody has used for months, go."""
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another was faster
            age = time.time() - entry.stat().st_mtime
            if age > (UNFINISHED_S if entry.name.startswith(UNFINISHED) else UNUSED_S):
                shutil.rmtree(entry.path)


class OpenVino(Slots, OpenVinoModel):
    """OpenVINO's paged attention: an IR folder, or a GGUF file of a Llama or Qwen model, on CPU or Intel's GPUs.

    openvino-genai brings the tokenizer and reads GGUF. Its pipeline would draw tokens by itself, and follow grammars with xgrammar, which
    compiles them while everyone waits and keeps them all: so its model is computed here, with the logits in sight.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("openvino_genai", "llguidance")
    INSTALL: ClassVar = f"{OpenVinoModel.INSTALL} {guidance.INSTALL}"
    LACKS: ClassVar = frozenset[str]()
    SPECULATES: ClassVar = frozenset({"ngram"})
    SPECIAL_IN_GRAMMAR: ClassVar = False
    BATCH = BATCH_TOGETHER = 256
    BESIDE = 0  # blocks for what nobody has asked for
    unified = True

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        super().__init__(spec)
        if spec.deterministic:
            spec = exactly(spec, self.device)
        progress(0.0)
        self.device = with_a_cache(self.device, self.openvino.Core().available_devices)
        trained = self.read_own(spec.path)
        with self.as_ir(spec) as folder, ThreadPoolExecutor(1) as beside:  # what is text is read while the model is compiled
            words = beside.submit(self.read_words, folder, spec, trained)
            self.compiled = self.compile(os.path.join(folder, "openvino_model.xml"), self.properties(spec))
            tokens = words.result()
        self.vocabulary = min(self.vocabulary, self.compiled.output(0).partial_shape[-1].get_length())
        self.eos = frozenset(token for token in self.eos if token < self.vocabulary)
        self.guides = Guides(self.numpy, tokens, self.vocabulary, self.eos)
        self.request = self.compiled.create_infer_request()
        self.inputs: dict[str, Any] = {}  # views of its tensors
        self.make_cache(spec, trained)
        self.context = min(trained, self.cache_tokens)
        self.make_slots(spec)
        with ThreadPoolExecutor(1) as beside:
            taken = beside.submit(self.take_cache)
            first = Slot(0)
            self.compute([Piece(first, [0], 0, 1)])  # makes the kernels; what it computes nobody reads
            self.drop(first)
            taken.result()

    def read_own(self, path: str) -> int:
        """What the model says of itself. Returns the tokens that it was trained for."""
        if os.path.isfile(path):
            meta = read_gguf(path)
            self.defaults = own_sampling(meta)
            return gguf_shape(meta)[0]
        self.defaults = own_sampling(read_json(path, "generation_config.json"))
        trained: int = read_json(path, "config.json").get("max_position_embeddings") or 0
        if not trained:
            log.warning("%s has no config.json with max_position_embeddings: taking its context for 4096 tokens", path)
        return trained or 4096

    def read_words(self, folder: str, spec: EngineSpec, trained: int) -> Any:
        """Tokens, text and template. Returns llguidance's view of the vocabulary."""
        llguidance: Any = importlib.import_module("llguidance")
        tokenizer = self.genai.Tokenizer(folder)
        own = os.path.join(folder, "generation_config.json")
        ends = self.genai.GenerationConfig(own).stop_token_ids if os.path.exists(own) else set()
        self.eos = frozenset(token for token in {*ends, tokenizer.get_eos_token_id()} if token >= 0)
        self.template = ChatTemplate(
            spec.chat_template or tokenizer.get_original_chat_template() or tokenizer.chat_template,
            tokenizer.get_bos_token(),
            tokenizer.get_eos_token(),
        )
        self.read_tokenizer(tokenizer, trained)
        words = Words(self.literals, self.pieces, min(self.eos, default=0), lambda text: self.tokenize(text, False))
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(words), eos_token=[*self.eos] or None)

    @contextlib.contextmanager
    def as_ir(self, spec: EngineSpec) -> Iterator[str]:
        """The model's folder. To convert a GGUF file takes longer than all the rest of a start: it is kept in the cache folder."""
        if os.path.isdir(spec.path):
            yield spec.path
            return
        keeps = "no_model_cache" not in dict(spec.flags)
        kept = cache_folder() / "openvino" / f"{file_mark(spec.path)}-{self.library.replace(' ', '-')}"
        if keeps and kept.is_dir():
            with contextlib.suppress(OSError):
                os.utime(kept)  # in use
            yield str(kept)
            return
        place = None
        with contextlib.suppress(OSError):  # not our folder: where temporary files are
            kept.parent.mkdir(parents=True, exist_ok=True)
            place = kept.parent if os.access(kept.parent, os.W_OK) else None
            tidy(kept.parent)
        with tempfile.TemporaryDirectory(prefix=UNFINISHED, dir=place) as made:
            folder = self.convert(spec.path, os.path.join(made, "whole"))
            if keeps:
                folder = self.keep_ir(folder, str(kept))
            yield folder

    def convert(self, gguf: str, folder: str) -> str:
        """The library writes beside what it reads."""
        os.mkdir(folder)
        link = os.path.join(folder, "model.gguf")
        os.symlink(os.path.abspath(gguf), link)
        self.genai.Tokenizer(link, enable_save_ov_model=True)
        scheduler = self.genai.SchedulerConfig()
        scheduler.num_kv_blocks = 1
        self.genai.ContinuousBatchingPipeline(link, scheduler, "CPU", {"enable_save_ov_model": True}, {})
        memory.give_back()
        os.unlink(link)
        return folder

    def keep_ir(self, folder: str, kept: str) -> str:
        """Whole or not at all. Returns where it is now."""
        try:
            os.rename(folder, kept)
        except OSError as error:
            if not os.path.isdir(kept):  # else another server was first
                log.warning("the converted model is not kept (%s)", one_line(error))
            return folder
        log.info("kept the converted model in %s (--no-model-cache: convert at each start)", kept)
        return kept

    def properties(self, spec: EngineSpec) -> dict[str, Any]:
        found = super().properties(spec)
        if spec.dtype == "float32":  # only all three keep what else is in the batch out of a token, but for 2e-5
            found |= {"KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        return found

    def compile(self, path: str, properties: dict[str, Any]) -> Any:
        """Attention over a paged KV cache, and logits of the rows alone that are asked for."""
        transformations: Any = importlib.import_module("openvino._offline_transformations")
        operations: Any = importlib.import_module("openvino.opset13")
        core = self.openvino.Core()
        model = core.read_model(path)
        transformations.paged_attention_transformation(model)
        head = model.output(0).get_node()
        while head.get_type_name() != "MatMul":  # behind it stands at most what changes logits one by one
            head = next(value for value in head.input_values() if value.get_partial_shape().is_dynamic).get_node()
        rows = operations.parameter([-1], dtype=self.numpy.int64, name="rows")
        rows.output(0).get_tensor().set_names({"rows"})
        axis = operations.constant(0, dtype=self.numpy.int64)
        head.input(0).replace_source_output(operations.gather(head.input_value(0), rows, axis).output(0))
        model.add_parameters([rows])
        model.validate_nodes_and_infer_types()
        return core.compile_model(model, self.device, properties)

    def make_cache(self, spec: EngineSpec, trained: int) -> None:
        """Its layout is the device's choice."""
        caches = {port.any_name: port for port in self.compiled.inputs if "_cache." in port.any_name}
        shapes = {name: [side.get_length() for side in [*port.partial_shape][1:]] for name, port in caches.items()}
        size = shapes["value_cache.0"][1]  # (blocks, heads, tokens, values)
        block_bytes = sum(math.prod(shapes[name]) * port.element_type.size for name, port in caches.items())
        self.cache_tokens = spec.cache_tokens or default_cache_tokens(spec.slots, trained, block_bytes // size)
        self.blocks = Blocks(-(-self.cache_tokens // size) + self.BESIDE, size)
        self.caches = {
            name: self.make_tensor(port.element_type, [self.blocks.count, *shapes[name]]) for name, port in caches.items()
        }
        for name, tensor in self.caches.items():
            self.request.set_tensor(name, tensor)

    def make_tensor(self, kind: Any, shape: list[int]) -> Any:
        device = self.compiled.get_property("EXECUTION_DEVICES")[0].strip("()")
        if device != "CPU":
            return self.openvino.Core().get_default_context(device).create_tensor(kind, self.openvino.Shape(shape), {})
        return self.openvino.Tensor(kind, self.openvino.Shape(shape))

    def take_cache(self) -> None:
        """The system has to give it now, not in the middle of somebody's answer."""
        for tensor in self.caches.values():
            if not isinstance(tensor, self.openvino.RemoteTensor):
                tensor.data.fill(0)

    def find(self, ids: list[int], limit: int) -> tuple[Slot, int]:
        slot = next(slot for slot in self.ring if slot.sampler is None)
        slot.table = self.blocks.find(ids[:limit])
        self.blocks.hold(slot.table)
        return slot, len(slot.table) * self.blocks.size

    def look_again(self, slot: Slot) -> None:
        slot.table = self.blocks.find(slot.todo[:-1])
        self.blocks.hold(slot.table)
        found = len(slot.table) * self.blocks.size
        slot.kv, slot.todo = slot.todo[:found], slot.todo[found:]

    def free_cells(self) -> int:
        return self.blocks.free * self.blocks.size

    def need(self, slot: Slot, more: int) -> int:
        size = self.blocks.size
        return (-(-(len(slot.kv) + more) // size) - len(slot.table)) * size

    def cut(self, slot: Slot) -> None:
        """What lies behind will be overwritten. A guess that was right may have filled a block."""
        self.blocks.fill(slot.table, slot.kv, max(0, len(slot.kv) - 1 - self.draft_tokens), len(slot.kv))

    def drop(self, slot: Slot) -> None:
        self.blocks.release(slot.table)
        slot.table = []

    def take_blocks(self, pieces: list[Piece]) -> None:
        for slot, ids, position, _ in pieces:
            while len(slot.table) * self.blocks.size < position + len(ids):
                slot.table.append(self.blocks.take())

    def fill_blocks(self, pieces: list[Piece]) -> None:
        """What has been computed others may share; not what was guessed."""
        for slot, ids, position, _ in pieces:
            self.blocks.fill(slot.table, slot.kv, position, position + len(ids) - len(slot.drafts))

    def compute(self, pieces: list[Piece]) -> None:
        self.take_blocks(pieces)
        for name, value in self.described(pieces).items():
            kept = self.inputs.get(name)
            if kept is not None and kept.shape == value.shape:
                kept[...] = value
            else:
                tensor = self.openvino.Tensor(value)
                self.inputs[name] = tensor.data
                self.request.set_tensor(name, tensor)
        logits = self.request.infer(share_outputs=True).to_tuple()[0]  # (rows, 1, vocabulary), or without the middle
        self.rows = logits.reshape(-1, logits.shape[-1])[:, : self.vocabulary]
        self.fill_blocks(pieces)

    def described(self, pieces: list[Piece]) -> dict[str, Any]:
        """What paged attention asks for: a batch is one row of tokens, and where each sequence begins in it and in the cache."""
        numpy, longs, shorts = self.numpy, self.numpy.int64, self.numpy.int32
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        blocks: list[int] = []
        begins, block_begins, longest = [0], [0], 0
        for slot, new, position, outputs in pieces:
            end = position + len(new)
            ids += new
            positions += range(position, end)
            rows += range(len(ids) - outputs, len(ids))
            blocks += slot.table[: -(-end // self.blocks.size)]
            begins.append(len(ids))
            block_begins.append(len(blocks))
            longest = max(longest, end)
        return {
            "input_ids": numpy.array(ids, longs),
            "position_ids": numpy.array(positions, longs),
            "past_lens": numpy.array([piece.position for piece in pieces], shorts),
            "subsequence_begins": numpy.array(begins, shorts),
            "block_indices": numpy.array(blocks, shorts),
            "block_indices_begins": numpy.array(block_begins, shorts),
            "max_context_len": numpy.array(longest, shorts),
            "rows": numpy.array(rows, longs),
        }

    def logits(self, row: int) -> Any:
        return self.rows[row]

    def cancel(self, seq: int) -> None:
        super().cancel(seq)
        slot = self.ring[seq]
        self.drop(slot)
        slot.kv = []

    def embed(self, inputs: Sequence[Tokens]) -> Iterator[list[bytes]]:
        raise no_embeddings()

    def close(self) -> None:
        del self.request, self.compiled


# ───────────────────────────────────────────────────── llama.cpp ─────────────────────────────────────────────────


class LlamaCpp(Slots, LlamaModel):
    """llama.cpp by its low-level Python binding: any GGUF file.

    Where memory allows, each slot has a KV cache of its own; else all share one, which is slower (each attends over everyone's
    cells) but lets one request use all of it.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("llama_cpp", "llguidance")
    INSTALL: ClassVar = f"{LlamaModel.INSTALL} {guidance.INSTALL}"
    LACKS: ClassVar = frozenset({"prompts"})
    SPECULATES: ClassVar = frozenset({"ngram"})
    FUSED = True  # attention by one kernel, which is faster and takes less memory
    pool_tokens, pool_rows = Slots.BATCH_BUSY, 64

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        super().__init__(spec, progress)
        lib, trained = self.lib, self.trained
        if spec.ngram and (lib.llama_model_is_recurrent(self.model) or lib.llama_model_is_hybrid(self.model)):
            raise RuntimeError("a recurrent model cannot take guesses back: leave out --ngram-match-min")
        self.cells, self.unified = self.layout(spec)
        with ThreadPoolExecutor(1) as beside:  # reads the vocabulary alone, while the KV cache is being cleared: both take long
            guides = beside.submit(self.make_guides)
            with memory.taken_from_both_ends(self.on_cpu):
                self.ctx = self.make_context()
            self.guides = guides.result()
        self.embedder = self.make_embedder() if spec.embeddings else None
        self.memory = lib.llama_get_memory(self.ctx)
        self.context = min(lib.llama_n_ctx_seq(self.ctx), trained)
        self.cache_tokens = lib.llama_n_ctx(self.ctx)
        self.batch = lib.llama_batch_init(self.BATCH_TOGETHER, 0, 1)
        self.rows: list[int] = []  # where in the batch each row of logits is
        self.row = ctypes.c_float * self.vocabulary  # the type of one
        self.make_slots(spec)

    def make_guides(self) -> Guides:
        made: Any = importlib.import_module("llguidance.llamacpp")
        tokens = made.lltokenizer_from_vocab(self.vocab, self.vocabulary, [*self.eos])
        return Guides(self.numpy, tokens, self.vocabulary, self.eos)

    def layout(self, spec: EngineSpec) -> tuple[int, bool]:
        return cache_layout(spec, self.trained, gguf_shape(self.meta)[1], self.on_cpu)

    def make_context(self) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx = self.cells
        params.n_batch, params.n_ubatch = self.BATCH_TOGETHER, self.BATCH
        params.n_seq_max = self.slots
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = self.unified
        types = {"f16": self.lib.GGML_TYPE_F16, "q8_0": self.lib.GGML_TYPE_Q8_0, "q4_0": self.lib.GGML_TYPE_Q4_0}
        params.type_k = types[self.flags.get("cache_type_k", "f16")]
        params.type_v = types[self.flags.get("cache_type_v", "f16")]
        params.flash_attn_type = getattr(self.lib, f"LLAMA_FLASH_ATTN_TYPE_{'ENABLED' if self.FUSED else 'DISABLED'}")
        params.no_perf = True
        ctx = self.lib.llama_init_from_model(self.model, params)
        if not ctx:
            raise RuntimeError(f"no memory for {params.n_ctx} tokens of KV cache: lower --cache-size ({self.last_error})")
        return ctx

    def find(self, ids: list[int], limit: int) -> tuple[Slot, int]:
        free = [slot for slot in self.ring if slot.sampler is None]
        slot = max(free, key=lambda s: (self.reusable(s, ids, limit), -s.used))
        common = self.reusable(slot, ids, limit)
        other = max(self.ring, key=lambda s: self.reusable(s, ids, limit))
        if (reusable := self.reusable(other, ids, limit)) >= common + 32:  # a copy costs about as much as decoding a few tokens
            self.lib.llama_memory_seq_rm(self.memory, slot.seq, -1, -1)
            self.lib.llama_memory_seq_cp(self.memory, other.seq, slot.seq, -1, -1)
            common = reusable
        if not self.lib.llama_memory_seq_rm(self.memory, slot.seq, common, -1):
            self.lib.llama_memory_seq_rm(self.memory, slot.seq, -1, -1)  # recurrent state cannot be cut: begin anew
            common = 0
        return slot, common

    def reusable(self, slot: Slot, ids: list[int], limit: int) -> int:
        """How many tokens of a slot's cache are the beginning of these, at most `limit`."""
        return shared(slot.kv, ids, limit)

    def free_cells(self) -> int:
        """Counts what sequences share as often as it is shared."""
        return self.cells - sum(len(slot.kv) for slot in self.ring)

    def cut(self, slot: Slot) -> None:
        self.lib.llama_memory_seq_rm(self.memory, slot.seq, len(slot.kv), -1)

    def drop(self, slot: Slot) -> None:
        self.lib.llama_memory_seq_rm(self.memory, slot.seq, -1, -1)

    def compute(self, pieces: list[Piece]) -> None:
        rows = ((piece.slot.seq, piece.position + i, token) for piece in pieces for i, token in enumerate(piece.ids))
        self.fill(self.batch, rows)
        self.rows, at = [], 0
        for piece in pieces:
            end = at + len(piece.ids)
            for index in range(at, end - piece.outputs):
                self.batch.logits[index] = False
            self.rows += range(end - piece.outputs, end)
            at = end
        status = self.lib.llama_decode(self.ctx, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}: {self.last_error}")

    def logits(self, row: int) -> Any:
        return self.row_of(self.rows[row])

    def row_of(self, index: int) -> Any:
        """The raw logits at a batch index."""
        pointer = self.lib.llama_get_logits_ith(self.ctx, index)
        return self.numpy.frombuffer(self.row.from_address(ctypes.addressof(pointer.contents)), self.numpy.float32)

    def make_embedder(self) -> Any:
        """A context of its own: pooling is a property of a context, and embeddings need no KV cache that lasts."""
        params = self.lib.llama_context_default_params()
        params.n_ctx = self.lib.llama_n_ctx_seq(self.ctx)
        params.n_batch = params.n_ubatch = self.BATCH_BUSY
        params.n_seq_max, params.kv_unified = self.pool_rows, True
        params.n_threads = params.n_threads_batch = self.threads
        params.embeddings = True
        params.pooling_type = self.lib.LLAMA_POOLING_TYPE_NONE  # the mean is taken here: a prompt comes in pieces
        ctx = self.lib.llama_init_from_model(self.model, params)
        if not ctx:
            raise RuntimeError(f"no memory for embeddings: lower --cache-size ({self.last_error})")
        return ctx

    def embed(self, inputs: Sequence[Tokens]) -> Iterator[list[bytes]]:
        """The mean over the tokens' last hidden states, scaled to length 1 as OpenAI's are."""
        if self.embedder is None:
            raise Refused("This server was started without --embeddings.", "model")
        lib, numpy = self.lib, self.numpy
        lib.llama_memory_clear(lib.llama_get_memory(self.embedder), True)
        totals = numpy.zeros((len(inputs), lib.llama_model_n_embd(self.model)))
        rows = [(seq, at, token) for seq, given in enumerate(inputs) for at, token in enumerate(given.ids)]
        for begin in range(0, len(rows), self.BATCH_BUSY):
            piece = rows[begin : begin + self.BATCH_BUSY]
            self.fill(self.batch, piece)
            if lib.llama_decode(self.embedder, self.batch):
                raise RuntimeError("llama_decode failed for embeddings")
            states = numpy.ctypeslib.as_array(lib.llama_get_embeddings(self.embedder), shape=(len(piece), totals.shape[1]))
            numpy.add.at(totals, [seq for seq, _, _ in piece], states)
            yield []
        yield [row.tobytes() for row in (totals / numpy.linalg.norm(totals, axis=1, keepdims=True)).astype("<f4")]

    def close(self) -> None:
        self.lib.llama_free(self.ctx)
        self.lib.llama_model_free(self.model)


MUCH = 8 << 30  # bytes of KV cache


def cache_layout(spec: EngineSpec, trained: int, kv_bytes: int, on_cpu: bool = True) -> tuple[int, bool]:
    """(cells of KV cache over all slots, whether the slots share them).

    A request may use LONG tokens, or what --length says, as far as model and memory allow. --cache-size without --length means
    an equal share for each slot.
    """
    memory = machine_memory()
    most = memory // 16
    if spec.slots > 8 and on_cpu:  # the more slots share cells, the more of others' each looks at in vain
        most = max(most, min(memory // 4, MUCH))
    length = min(spec.length or LONG, trained)
    if spec.cache_tokens and (spec.cache_tokens // spec.slots >= length or not spec.length):
        return max(min(spec.cache_tokens // spec.slots, trained), 256) * spec.slots, False
    if not spec.cache_tokens and kv_bytes and memory and spec.slots * length * kv_bytes <= most:
        return max(length, 256) * spec.slots, False
    return spec.cache_tokens or default_cache_tokens(spec.slots, trained, kv_bytes, memory), True


def shared(a: list[int], b: list[int], limit: int) -> int:
    """Length of the common beginning of two token lists, at most `limit`."""
    end = min(len(a), len(b), limit)
    if a[:end] == b[:end]:
        return end
    return next(i for i in range(end) if a[i] != b[i])


# ─────────────────────────────────────────────────── transformers ────────────────────────────────────────────────


@dataclass(slots=True, eq=False)
class TorchSequence:
    """A sequence of Transformers, beside what the library itself keeps of it."""

    seq: int
    ids: list[int]
    sampling: Sampling
    generator: Any = None  # torch.Generator
    guidance: Guidance | None = None
    sampled: list[int] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)  # of prompt and completion, once that is asked for
    cache: Any = None  # while its prompt is being scored
    scores: list[Scored] = field(default_factory=list)  # of the prompt's tokens so far, where they are wanted

    @property
    def greedy(self) -> bool:
        """The likeliest token by the raw logits is the one."""
        s = self.sampling
        changed = s.logit_bias or s.grammar or s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1
        return not s.temperature and not changed and len(self.sampled) >= s.min_tokens


class Transformers(HfModel):
    """Hugging Face transformers on torch: any causal language model that it knows, on CPU or another torch device.

    Batching, paged KV cache and prefix reuse are the library's own (its continuous batching); here its processor is stepped
    by our thread instead of one of its own, and tokens are chosen by `choose`, since its sampling is one for the whole batch.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("transformers", "torch", "llguidance")
    INSTALL: ClassVar = f"torch==2.13.0 transformers==5.23.0 {guidance.INSTALL}"
    LACKS: ClassVar = frozenset[str]()
    SPECULATES: ClassVar = frozenset[str]()
    SPECIAL_IN_GRAMMAR: ClassVar = False
    PAGE = 32  # tokens; prefixes are reused by whole pages
    BATCH, BATCH_LEAST = 256, 32  # tokens per step, and at least of prompts when others decode
    BATCH_SCORED = 64  # … of a prompt whose every token needs its logits
    pool_tokens, pool_rows = BATCH, 64

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        os.environ["HF_HUB_OFFLINE"] = "1"  # what is not in the folder is not fetched behind the user's back
        progress(0.0)
        self.torch: Any = importlib.import_module("torch")
        self.numpy: Any = importlib.import_module("numpy")
        transformers: Any = importlib.import_module(self.LIBRARIES[0])
        transformers.logging.set_verbosity_error()
        logging.getLogger("ContinuousBatchingLogger").disabled = not log.isEnabledFor(logging.DEBUG)
        transformers.logging.disable_progress_bar()
        self.library = f"{installed(self.LIBRARIES[0])}, {installed('torch')}"
        torch, self.slots = self.torch, spec.slots
        self.device = torch_device(torch, spec.device)
        if spec.deterministic:
            spec = exactly(spec, self.device.type)
        self.threads = spec.threads or physical_cores()
        torch.set_num_threads(self.threads)
        super().__init__(spec, transformers.AutoTokenizer.from_pretrained(spec.path).backend_tokenizer)
        dtype = torch_dtype(torch, spec.dtype, self.config, self.device)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(spec.path, dtype=dtype).to(self.device).eval()
        self.fit_vocabulary(int(self.model.get_input_embeddings().weight.shape[0]))
        trained = self.config.get("max_position_embeddings") or 4096
        free = torch.cuda.mem_get_info(self.device)[0] * 2 if self.device.type == "cuda" else None
        wanted = spec.cache_tokens or default_cache_tokens(spec.slots, trained, self.kv_bytes(dtype.itemsize), free)
        page = 256 if self.device.type == "cuda" else self.PAGE  # what flash attention asks for
        self.cache_tokens = -(-wanted // page) * page
        self.context = min(trained, self.cache_tokens)
        manager = self.model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(do_sample=False),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                page_size=page,
                num_blocks=self.cache_tokens // page,
                max_batch_tokens=max(self.BATCH, spec.slots),
                max_requests_per_batch=spec.slots,
                use_cuda_graph=False,  # tokens are chosen by Python code
                use_async_batching=False,
                auto_switch_to_flash=bool(importlib.util.find_spec("flash_attn")),
            ),
        )
        self.new_state = importlib.import_module("transformers.generation.continuous_batching.requests").RequestState
        with memory.taken_at_once():  # the KV cache
            self.processor = manager._create_batch_processor()
        self.processor.model_runner._sample = self.sample
        self.cache_class = transformers.DynamicCache
        self.paged = self.model.config._attn_implementation == "paged|eager"  # which works inside the batch alone
        self.pace, self.most = Pace(spec.step_target, self.BATCH_LEAST, self.BATCH), self.processor.max_batch_tokens
        self.rows: dict[int, TorchSequence] = {}
        self.scoring: list[TorchSequence] = []
        self.out: list[Step] = []
        self.numbers = itertools.count()

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        row = TorchSequence(next(self.numbers), ids, sampling)
        row.generator = self.torch.Generator(self.device).manual_seed(sampling.seed or 0)
        row.guidance = self.guides.start(sampling.grammar) if sampling.grammar else None
        self.rows[row.seq] = row
        if sampling.scores_prompt:
            row.scores, row.cache = [Scored(None)], self.cache_class()
            self.scoring.append(row)
            return row.seq, 0
        return row.seq, self.enter(row)

    def enter(self, row: TorchSequence) -> int:
        """Hand a sequence to the library's scheduler. Returns how many tokens of its prompt are in the KV cache."""
        scheduler, placed = self.processor.scheduler, set[str]()
        state = self.new_state(request_id=str(row.seq), initial_tokens=row.ids, max_new_tokens=None)
        scheduler.add_waiting_request(state)
        scheduler._infer_request_tokens(state, placed)  # looks for a shared prefix now, rather than in the next step
        scheduler._cleanup_waiting_queue(placed)
        return int(state.position_offset)

    def step(self) -> list[Step]:
        self.out = []
        self.score_next()
        decoding = sum(bool(row.sampled) for row in self.rows.values())
        self.processor.max_batch_tokens = min(self.most, decoding + self.pace.piece()) if decoding else self.most
        if self.processor.prepare_next_batch():
            batch, began = self.processor.inputs_and_outputs.requests_in_batch, time.monotonic()
            more = sum(one.query_length - one.has_new_token for one in batch)
            self.processor._generation_step(self.model)
            self.processor.update_batch()
            self.pace.learn(time.monotonic() - began, more)
        return self.out

    def sample(self, logits: Any, output_ids: Any) -> None:
        """In the place of ModelRunner._sample. logits: float32 (1, sequences, vocabulary), raw; output_ids: int32 (1, …)."""
        batch = self.processor.inputs_and_outputs.requests_in_batch
        rows = [self.rows[int(future.state.request_id)] for future in batch if future.has_new_token]
        likeliest = logits[0, : len(rows)].argmax(-1).tolist()  # a row more for each prompt that is not at its end yet
        for i, row in enumerate(rows):
            likeliest[i] = self.take(row, logits[0, i : i + 1], likeliest[i])
        output_ids[0, : len(rows)] = self.torch.tensor(likeliest, dtype=output_ids.dtype)

    def take(self, row: TorchSequence, logits: Any, likeliest: int) -> int:
        """Choose the next token of a sequence, and tell it. logits: float32 (1, vocabulary), raw."""
        try:
            token = likeliest if row.greedy else self.choose(row, logits[0])
        except Refused as refusal:
            self.out.append(Step(row.seq, (), error=refusal))
            return likeliest
        row.sampled.append(token)
        wanted = row.sampling.logprobs
        scores = self.score(logits, [token], wanted) if wanted is not None else ()
        self.out.append(Step(row.seq, [token], scores, row.scores))
        row.scores = []
        return token

    def choose(self, row: TorchSequence, logits: Any) -> int:
        """Bans, penalties, temperature, top_k, top_p, min_p, in the order of LlamaCpp. Raises Refused: no token is left."""
        torch, s, minus = self.torch, row.sampling, -math.inf
        logits = logits.clone()
        for token, bias in s.logit_bias:
            logits[token] += minus if bias <= -100 else bias
        if len(row.sampled) < s.min_tokens:
            logits[[*self.eos]] = minus
        if s.repetition_penalty != 1:
            row.seen = row.seen or {*row.ids}
            seen = torch.tensor([*row.seen], device=self.device)
            values = logits[seen]
            logits[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if (s.presence_penalty or s.frequency_penalty) and row.sampled:
            tokens, counts = torch.tensor(row.sampled, device=self.device).unique(return_counts=True)
            logits[tokens] -= s.presence_penalty + s.frequency_penalty * counts
        if row.guidance:
            logits[~torch.from_numpy(row.guidance.allowed()).to(self.device)] = minus
        if logits.max() == minus:
            raise no_token_left()
        token = self.draw(row, logits) if s.temperature else int(logits.argmax())
        if row.guidance:
            row.guidance.accept(token)
        if row.seen:
            row.seen.add(token)
        return token

    def draw(self, row: TorchSequence, logits: Any) -> int:
        torch, s, minus = self.torch, row.sampling, -math.inf
        logits = logits / s.temperature
        if s.top_k and s.top_k < len(logits):
            logits[logits < logits.topk(s.top_k).values[-1]] = minus
        if s.top_p is not None and s.top_p < 1:
            probs, order = logits.softmax(-1).sort(descending=True)
            logits[order[1:][(probs.cumsum(-1) - probs)[1:] >= s.top_p]] = minus  # the likeliest always stays
        if s.min_p:
            probs = logits.softmax(-1)
            logits[probs < s.min_p * probs.max()] = minus
        return int(torch.multinomial(logits.softmax(-1), 1, generator=row.generator))

    def score(self, logits: Any, tokens: list[int], alternatives: int) -> list[Scored]:
        """Log probabilities of one token per row of raw logits (tokens, vocabulary), with the best alternatives."""
        logprobs = logits.log_softmax(-1)
        own = logprobs[self.torch.arange(len(tokens)), self.torch.tensor(tokens, dtype=self.torch.long)].tolist()
        if not alternatives:
            return [Scored(logprob) for logprob in own]
        best = logprobs.topk(alternatives)
        tops = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [Scored(logprob, [*zip(*top, strict=True)]) for logprob, top in zip(own, tops, strict=True)]

    @contextlib.contextmanager
    def outside_the_batch(self) -> Iterator[None]:
        if self.paged:
            self.model.set_attn_implementation("eager")
        try:
            with self.torch.no_grad():
                yield
        finally:
            if self.paged:
                self.model.set_attn_implementation("paged|eager")

    def score_next(self) -> None:
        if self.scoring:
            row = self.scoring[0]
            try:
                self.score_piece(row)
            except Exception as error:
                self.out.append(Step(row.seq, (), error=EngineFailed(f"scoring the prompt failed: {one_line(error)}")))

    def score_piece(self, row: TorchSequence) -> None:
        """The next piece of a prompt whose tokens are to be scored, outside the batch; after the last it joins the batch."""
        torch, at = self.torch, len(row.scores) - 1
        piece = row.ids[at : at + self.BATCH_SCORED]
        with self.outside_the_batch():
            logits = self.model(torch.tensor([piece], device=self.device), past_key_values=row.cache).logits[0].float()
        following = row.ids[at + 1 : at + 1 + len(piece)]
        row.scores += self.score(logits[: len(following)], following, row.sampling.logprobs or 0)
        if len(row.scores) < len(row.ids):
            return
        self.scoring.remove(row)
        row.cache = None
        if row.sampling.max_tokens:
            self.enter(row)
        else:
            self.out.append(Step(row.seq, (), (), row.scores))

    @functools.cached_property
    def guides(self) -> Guides:
        llguidance: Any = importlib.import_module("llguidance")
        size = max(self.vocabulary, len(self.literals))
        tokens = llguidance.LLTokenizer(self.hf_tokenizer.to_str(), n_vocab=size, eos_token=[*self.eos] or None)
        return Guides(self.numpy, tokens, self.vocabulary, self.eos)

    def cancel(self, seq: int) -> None:
        row = self.rows.pop(seq)
        if row in self.scoring:
            self.scoring.remove(row)
        scheduler = self.processor.scheduler
        scheduler.set_request_cancellation(str(seq))
        scheduler.clear_cancelled_requests()
        scheduler.block_new_requests = False  # set when the cache was full; it clears that only where it ends a request itself

    def embed(self, inputs: Sequence[Tokens]) -> Iterator[list[bytes]]:
        """The mean over the tokens' last hidden states, scaled to length 1 as OpenAI's are."""
        torch, cache, total = self.torch, self.cache_class(), 0.0
        ids, mask = padded(torch, [given.ids for given in inputs], self.device)
        for at in range(0, ids.shape[1], self.BATCH):
            with self.outside_the_batch():  # padding stands behind, where nothing that comes before it looks
                hidden = self.model.base_model(ids[:, at : at + self.BATCH], past_key_values=cache).last_hidden_state
            total = total + (hidden.float() * mask[:, at : at + self.BATCH, None]).sum(1).cpu().double()
            yield []
        yield [row.tobytes() for row in torch.nn.functional.normalize(total, dim=-1).numpy().astype("<f4")]

    def close(self) -> None:
        del self.processor, self.model


# ──────────────────────────────────────────────────── exllamav3 ──────────────────────────────────────────────────


@dataclass(slots=True, eq=False)
class ExlSequence:
    """A sequence of ExLlamaV3."""

    job: Any
    sampling: Sampling
    penalty: Any = None  # the step of its sampler that penalises what is in the completion
    filters: list[Any] = field(default_factory=list)
    count: int = 0  # tokens that have come


class ExLlamaV3(HfModel):
    """exllamav3's Generator: EXL3 folders and unquantised Hugging Face folders, on CUDA.

    The model is loaded by exllamav3's own model_init with its own flags (spec.options): they mean here what they mean there.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ("exllamav3", "torch")
    INSTALL: ClassVar = "torch==2.13.0 exllamav3==1.6.5"
    LACKS: ClassVar = frozenset({"scores", "embeddings", "rerank", "prompts"})
    SPECULATES: ClassVar = frozenset({"draft", "ngram"})
    SPECIAL_IN_GRAMMAR: ClassVar = False
    PAGE = 256  # tokens
    RESERVE = 2048  # tokens of KV cache that a sequence reserves ahead; without it max_tokens, and few would fit

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        progress(0.0)
        self.torch: Any = importlib.import_module("torch")
        if lack := lacks_cuda(self.torch):
            raise RuntimeError(lack)
        self.lib: Any = importlib.import_module(self.LIBRARIES[0])  # compiles for minutes where there is no compiled extension
        self.library = f"{installed(self.LIBRARIES[0])}, {installed('torch')}"
        self.slots, self.threads = spec.slots, spec.threads or physical_cores()
        tokenizers: Any = importlib.import_module("tokenizers")
        super().__init__(spec, tokenizers.Tokenizer.from_file(os.path.join(spec.path, "tokenizer.json")))
        args = self.load(spec, progress)
        self.rows: dict[int, ExlSequence] = {}
        self.numbers = itertools.count()
        self.cache_tokens = args.cache_size
        trained = self.config.get("max_position_embeddings") or self.cache_tokens
        room = self.cache_tokens - 1 - self.generator.max_draft_tokens  # beyond this it cuts max_tokens itself
        self.context = min(trained, room)

    def load(self, spec: EngineSpec, progress: Callable[[float], None]) -> argparse.Namespace:
        model_init: Any = importlib.import_module("exllamav3.model_init")
        parser = Flags(prog="exllamav3")
        model_init.add_args(parser, add_draft_model_args=True, default_autosplit_max_batch_size=spec.slots)
        drafts = {"-dm": spec.draft, "-ngram": spec.ngram, "-ndt": spec.draft_tokens}
        drafting = [word for flag, value in drafts.items() if value for word in (flag, str(value))]
        args = parser.parse_args(["-m", spec.path, *spec.options, *drafting])
        weights = sum(e.stat().st_size for e in os.scandir(spec.path) if e.name.endswith(".safetensors"))
        devices = range(self.torch.cuda.device_count())  # layers are split over all of them, each with its part of the cache
        free = max(0, sum(self.torch.cuda.mem_get_info(device)[0] for device in devices) - weights)
        trained = self.config.get("max_position_embeddings") or 8192
        wanted = spec.cache_tokens or default_cache_tokens(spec.slots, trained, self.kv_bytes(2), 2 * free)
        args.cache_size = -(-wanted // self.PAGE) * self.PAGE
        self.model, config, cache, self.tokenizer, draft_model, _, draft_cache = model_init.init(
            args, quiet=True, progress=False, callback=lambda done, total: progress(done / total)
        )
        self.eos |= frozenset(config.eos_token_id_list)
        self.fit_vocabulary(config.vocab_size)
        gigabyte = 1 << 30
        self.generator = self.lib.Generator(  # swallows a misspelt argument: tests/test_exllamav3.py reads its signature
            model=self.model,
            cache=cache,
            tokenizer=self.tokenizer,
            max_batch_size=spec.slots,
            max_chunk_size=args.chunk_size,
            draft_model=draft_model,
            draft_cache=draft_cache,
            num_draft_tokens=args.num_draft_tokens,
            cpu_cache_size=int(args.cpu_cache_size * gigabyte),
            disk_cache_dir=args.disk_cache_dir,
            disk_cache_size=int(args.disk_cache_size * gigabyte),
            recurrent_cache_size=int(args.recurrent_cache_size * gigabyte),
            ngram_match_min=args.ngram_match_min,
            dynamic_draft_tokens=args.dynamic_draft,
            draft_confidence=args.draft_confidence,
            ngram_corpus=args.ngram_corpus,
            hybrid_draft_tokens=args.hybrid_draft_tokens,
            sparse_draft_head=args.sparse_draft_head,
        )
        return args

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        seq, s = next(self.numbers), sampling
        if s.ignore_eos and s.min_tokens:
            raise Refused("This engine has no 'min_tokens' beside 'ignore_eos'.", "min_tokens")
        if s.grammar and any(bias <= -100 for _, bias in s.logit_bias):  # a dead end would end the whole generator
            raise Refused("This engine cannot ban tokens ('logit_bias' of -100) beside structured output.", "logit_bias")
        sampler, penalty = self.make_sampler(s)
        filters = [self.make_filter(s.grammar)] if s.grammar else []
        job = self.lib.Job(
            input_ids=self.torch.tensor([ids]),
            max_new_tokens=s.max_tokens,
            min_new_tokens=s.min_tokens,
            sampler=sampler,
            seed=s.seed,
            stop_conditions=[] if s.ignore_eos else sorted(self.eos),
            decode_special_tokens=True,
            return_probs=s.logprobs is not None,
            return_top_tokens=s.logprobs or 0,
            filters=filters or None,
            max_rq_tokens=self.RESERVE,
            identifier=seq,
        )
        try:
            self.generator.enqueue(job)
        except AssertionError as error:  # its way to say that a job can never fit
            raise Refused(one_line(error), "prompt", "context_length_exceeded") from None
        self.rows[seq] = ExlSequence(job, s, penalty, filters)
        return seq, 0

    def make_sampler(self, s: Sampling) -> tuple[Any, Any]:
        """ComboSampler's steps, with penalties of presence and frequency that count the completion alone."""
        lib, steps, penalty = self.lib, [], None
        if s.logit_bias:
            steps.append(lib.SS_LogitBias({token: -math.inf if bias <= -100 else bias for token, bias in s.logit_bias}))
        if s.repetition_penalty != 1:
            steps.append(lib.SS_RepP(s.repetition_penalty))
        if s.presence_penalty or s.frequency_penalty:
            penalty = lib.SS_PresFreqP(s.presence_penalty, s.frequency_penalty)
            steps.append(penalty)
        if not s.temperature:
            return lib.CustomSampler([*steps, lib.SS_Argmax()]), penalty
        steps += [lib.SS_Temperature(s.temperature), lib.SS_MinP(s.min_p), lib.SS_TopK(s.top_k or 0)]
        steps += [lib.SS_TopP(1.0 if s.top_p is None else s.top_p), lib.SS_Sample()]
        return lib.CustomSampler(steps), penalty

    def make_filter(self, text: str) -> Any:
        """Raises Refused."""
        try:
            made = self.lib.LLGuidanceFilter(self.tokenizer, eos_after_completed=True, lark_grammar=self.grammar(text))
        except (ValueError, RuntimeError) as error:
            raise Refused(f"The grammar cannot be followed: {one_line(error)}", "structured_outputs") from None
        made._check_error = lambda: None  # it would raise in mid-step, and end everyone's; read() looks at the matcher instead
        return made

    def step(self) -> list[Step]:
        for row in self.rows.values():
            if row.penalty:  # it looks at so many of the last tokens, prompt or not
                row.penalty.sustain_range = row.job.rq_new_tokens + row.job.new_tokens
        return [step for result in self.generator.iterate() if (step := self.read(result))]

    def read(self, result: dict[str, Any]) -> Step | None:
        """One of Generator.iterate's results. What a stop token cut off is in `held`, and the stop token with it."""
        seq = result["job"].identifier
        row = self.rows.get(seq)
        if row is None or result["stage"] not in ("streaming", "error"):
            return None
        if result["stage"] == "error":
            return Step(seq, (), error=EngineFailed(f"exllamav3 failed: {one_line(result['error'])}"))
        if failed := [f._matcher for f in row.filters if f._matcher.is_error()]:
            return Step(seq, (), error=guidance.failed(failed[0]))
        tokens: list[int] = []
        scores: list[Scored] = []
        for part in (result, result.get("held") or {} if result["eos"] else {}):
            if "token_ids" in part:
                tokens += part["token_ids"][0].tolist()
                scores += self.scores_of(part) if row.sampling.logprobs is not None else ()
        cached = row.job.cached_pages * self.PAGE + row.job.cached_tokens if tokens and not row.count else None
        row.count += len(tokens)
        if result["eos"] and result["eos_reason"] == "end_filter":
            tokens.append(min(self.eos))  # the constraint leaves nothing but the end, which other engines have the model sample
            scores += [Scored(0.0)] if row.sampling.logprobs is not None else ()
        elif result["eos"] and result["eos_reason"] != "stop_token" and row.count < (row.sampling.max_tokens or 0):
            return Step(seq, (), error=EngineFailed(f"exllamav3 ended after {row.count} tokens: {result['eos_reason']}"))
        return Step(seq, tokens, scores, cached=cached) if tokens else None

    def scores_of(self, part: dict[str, Any]) -> list[Scored]:
        """token_probs (1, n), and top_k_tokens and top_k_probs (1, n, k): the softmax of the raw logits, so 0 may be among them."""
        own = [log_of(p) for p in part["token_probs"][0].tolist()]
        if "top_k_tokens" not in part:
            return [Scored(logprob) for logprob in own]
        ids, probs = part["top_k_tokens"][0].tolist(), part["top_k_probs"][0].tolist()
        tops = [[(i, log_of(p)) for i, p in zip(*pair, strict=True)] for pair in zip(ids, probs, strict=True)]
        return [Scored(logprob, top) for logprob, top in zip(own, tops, strict=True)]

    def cancel(self, seq: int) -> None:
        self.generator.cancel(self.rows.pop(seq).job)

    def embed(self, inputs: Sequence[Tokens]) -> Iterator[list[bytes]]:
        raise no_embeddings()

    def close(self) -> None:
        self.generator.clear_queue()
        self.generator.close()
        self.model.unload()


class Flags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # its own ends the process
        raise ValueError(message)


def log_of(probability: float) -> float:
    return math.log(max(probability, 1e-38))  # JSON has no minus infinity


def has_gpu() -> bool:
    """Is there a device that CUDA or ROCm may use? Looks at device files alone; where there are none to look at: maybe."""
    return os.name == "nt" or bool(glob.glob("/dev/nvidia[0-9]*")) or os.path.exists("/dev/dxg") or os.path.exists("/dev/kfd")


BACKENDS: dict[str, type[Backend]] = {
    "openvino": OpenVino,
    "llamacpp": LlamaCpp,
    "transformers": Transformers,
    "exllamav3": ExLlamaV3,
}
LACKS = {name: backend.LACKS for name, backend in BACKENDS.items()} | UPSTREAMS  # of every engine
WITH_EMBEDDINGS = ["llamacpp", "transformers"]  # of models that generate; for one that only embeds see catalog.EMBEDDERS


def exactly(spec: EngineSpec, device: str) -> EngineSpec:
    """As --deterministic asks for it: what is rounded to fewer bits depends on what else is in the batch."""
    if device.lower() != "cpu":
        raise RuntimeError(f"--deterministic is honoured on the CPU alone: add --device {'CPU' if device.isupper() else 'cpu'}")
    return replace(spec, dtype="float32")


def no_embeddings() -> Refused:
    return Refused(f"This engine has no embeddings of a model that generates; {' and '.join(WITH_EMBEDDINGS)} have.", "model")


def missing_library(name: str) -> str | None:
    """None when what the backend needs is there, else one line that says what is missing. Imports nothing."""
    backend = BACKENDS[name]
    if name == "exllamav3" and not has_gpu():
        return "backend exllamav3 needs a CUDA GPU, and this machine shows none"
    if missing := [library for library in backend.LIBRARIES if not importlib.util.find_spec(library)]:
        return f"backend {name} needs {' and '.join(missing)}: pip install {backend.INSTALL}"
    return None


def fits_exllamav3(folder: str, architecture: str) -> bool:
    """Does exllamav3 know this unquantised folder's architecture? It cannot trim hidden sizes that it has had to pad."""
    package = importlib.util.find_spec("exllamav3")
    size = text_config(folder).get("hidden_size")
    if not package or not package.submodule_search_locations or not isinstance(size, int) or size % 128:
        return False
    for source in glob.glob(os.path.join(package.submodule_search_locations[0], "architecture", "*.py")):
        with open(source, encoding="utf-8") as f:
            if f'"{architecture}"' in f.read():
                return True
    return False
