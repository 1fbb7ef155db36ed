"""Bindings: one class for each native library.

Each is thin: load, tokenize, start, step, cancel. What every engine has in common stands in engine.py, what is read from a
model's own files in model_files.py, what embedding shares with them in libraries.py. A library is imported inside these classes
and nowhere else, so in the engine process alone; the server process only looks whether it is there.
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
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn

import memory
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
from grammar import ebnf_grammar, lark_grammar
from libraries import HfModel, LlamaModel, OpenVinoModel, installed, padded
from machine import (
    LONG,
    default_cache_tokens,
    lacks_cuda,
    machine_memory,
    physical_cores,
    torch_device,
    torch_dtype,
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
from prefixes import Prefixes
from regular import Unsupported
from sampler import Sampler, Weights

# ─────────────────────────────────────────────────── OpenVINO GenAI ──────────────────────────────────────────────


@dataclass(slots=True)
class Arriving:
    """A prompt that OpenVino lets be read in pieces before it is asked for: each a request for its beginning, found in the cache by the next."""

    ids: list[int]
    config: Any
    read: int = 0  # tokens, whole KV blocks
    handle: Any = None  # of the piece that is being read


class OpenVino(OpenVinoModel):
    """openvino-genai's ContinuousBatchingPipeline: an IR folder, or a GGUF file of a Llama or Qwen model, on CPU or Intel's GPUs.

    It knows prefix reuse, but not how much of a prompt was reused: cached tokens are None.
    """

    LACKS: ClassVar = frozenset({"logit_bias", "top_logprobs", "scores"})
    SPECULATES: ClassVar = frozenset({"ngram"})  # with a draft model 2026.4.1 fails under load: content_length <= prompt_ids…
    SPECIAL_IN_GRAMMAR: ClassVar = False
    BLOCK, BLOCK_GPU = 32, 16  # tokens per KV block
    BESIDE, BESIDE_TOKENS = 0, 1024  # sequences that nobody has asked for, and how long they are
    BATCH = 256  # tokens per step, so that the others keep decoding; the library fixes it when the pipeline is made
    GRAMMAR_S = 0.02  # a new grammar is compiled in the step that brings its first token
    GRAMMARS = 128  # that a pipeline compiles: it keeps them all, as a rule 1 MB each, so after so many it is made anew

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        super().__init__(spec)
        if spec.deterministic:
            spec = exactly(spec, self.device)
        if os.path.isfile(spec.path):
            meta = read_gguf(spec.path)
            context, kv_bytes = gguf_shape(meta)
            self.defaults = own_sampling(meta)
        else:
            context = read_json(spec.path, "config.json").get("max_position_embeddings") or 0
            kv_bytes = 0
            if not context:
                context = 4096
                log.warning(
                    "%s has no config.json with max_position_embeddings: taking its context for %d tokens", spec.path, context
                )
            self.defaults = own_sampling(read_json(spec.path, "generation_config.json"))
        self.cache_tokens = spec.cache_tokens or default_cache_tokens(spec.slots, context, kv_bytes)
        scheduler = self.genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = self.BATCH
        scheduler.max_num_seqs = spec.slots + self.BESIDE
        block = self.BLOCK if self.device == "CPU" else self.BLOCK_GPU
        scheduler.num_kv_blocks = -(-self.cache_tokens // block) + self.BESIDE * self.BESIDE_TOKENS // block
        scheduler.enable_prefix_caching = True
        progress(0.0)
        self.make_pipe = functools.partial(self.load, spec, scheduler)
        self.pipe = self.make_pipe()
        self.grammars: set[int] = set()  # hashes of those that it has compiled
        self.context = min(context, self.cache_tokens)
        self.read_tokenizer(self.pipe.get_tokenizer(), context)
        self.template = ChatTemplate(
            spec.chat_template or self.tokenizer.get_original_chat_template() or self.tokenizer.chat_template,
            self.tokenizer.get_bos_token(),
            self.tokenizer.get_eos_token(),
        )
        config = self.pipe.get_config()
        self.eos_id = self.tokenizer.get_eos_token_id()
        self.eos = frozenset(config.stop_token_ids) | {self.eos_id}
        self.pace = Pace(spec.step_target, self.BLOCK, max(self.BATCH - scheduler.max_num_seqs, self.BLOCK))
        self.handles: dict[int, Any] = {}
        self.arriving: dict[int, Arriving] = {}
        self.prefixes = Prefixes()  # what the cache may hold, since the library does not tell
        self.unread: set[int] = set()  # sequences that have got no token yet
        self.scored: set[int] = set()  # sequences whose logprobs are wanted
        self.numbers = itertools.count()
        self.take_cache()

    def take_cache(self) -> None:
        """The library allocates the KV cache at its first step."""
        with memory.taken_at_once():
            seq, _ = self.start([self.eos_id], Sampling(max_tokens=1, ignore_eos=True))
            while not self.step():
                pass
        self.cancel(seq)

    def load(self, spec: EngineSpec, scheduler: Any) -> Any:
        """To convert a GGUF file takes longer than all the rest of a start: its IR is kept in the cache folder."""

        def pipeline(path: str, **more: Any) -> Any:
            return self.genai.ContinuousBatchingPipeline(path, scheduler, self.device, self.properties(spec) | more, {})

        if os.path.isdir(spec.path) or "no_model_cache" in dict(spec.flags):
            return pipeline(spec.path)
        kept = cache_folder() / "openvino" / f"{file_mark(spec.path)}-{self.library.replace(' ', '-')}"
        if kept.is_dir():
            return pipeline(str(kept))
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=kept.parent) as made:
                gguf = os.path.join(made, "model.gguf")
                os.symlink(os.path.abspath(spec.path), gguf)  # the library writes beside what it reads
                self.genai.Tokenizer(gguf, enable_save_ov_model=True)
                pipe = pipeline(gguf, enable_save_ov_model=True)
                os.unlink(gguf)
                with contextlib.suppress(FileExistsError):  # another server was first
                    shutil.copytree(made, f"{made}.whole")
                    os.rename(f"{made}.whole", kept)  # whole or not at all
            log.info("kept the converted model in %s (--no-model-cache: convert at each start)", kept)
            return pipe
        except (
            OSError,
            RuntimeError,
        ) as error:  # no room, no links, not our folder: or it cannot be loaded, which is told again
            log.warning("the converted model is not kept (%s)", one_line(error))
            return pipeline(spec.path)

    def properties(self, spec: EngineSpec) -> dict[str, Any]:
        found = super().properties(spec)
        if spec.dtype == "float32":  # only all three keep what else is in the batch out of a token, but for 2e-5
            found |= {"KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        self.ngram, self.draft_tokens = spec.ngram, spec.draft_tokens or 4
        if spec.ngram:
            found["prompt_lookup"] = True
        return found

    @property
    def worn(self) -> bool:
        """It has compiled too much to go on: once what runs has ended, the next start() makes a new pipeline."""
        return len(self.grammars) >= self.GRAMMARS

    def renew(self) -> None:
        """Where that fails nothing is left to go on with: the process ends, and the server starts another."""
        log.info("the pipeline has compiled %d grammars: making a new one, since it keeps them all", len(self.grammars))
        self.pipe = self.tokenizer = None  # both hold what was compiled; and there is not room for two
        memory.give_back()
        try:
            self.pipe = self.make_pipe()
        except Exception as error:
            raise SystemExit(f"the model cannot be loaded again: {one_line(error)}") from error
        self.tokenizer = self.pipe.get_tokenizer()
        self.grammars.clear()
        self.prefixes = Prefixes()
        self.take_cache()
        memory.give_back()  # the second cache grows where the first one lay, and leaves as much behind

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        if self.worn and not self.handles and not self.arriving:
            self.renew()
        if self.ngram and sampling.min_tokens:
            raise Refused("OpenVINO has no 'min_tokens' beside speculative decoding (--ngram-match-min).", "min_tokens")
        config = self.genai.GenerationConfig()
        config.apply_chat_template = False
        config.max_new_tokens = sampling.max_tokens
        config.eos_token_id = self.eos_id
        config.ignore_eos = sampling.ignore_eos
        config.min_new_tokens = min(sampling.min_tokens, sampling.max_tokens or 0)
        config.stop_token_ids = set() if sampling.min_tokens or sampling.ignore_eos else {*self.eos, *sampling.stop_token_ids}
        config.logprobs = 0 if sampling.logprobs is None else 1
        if self.ngram:
            config.num_assistant_tokens, config.max_ngram_size = self.draft_tokens, self.ngram
        if sampling.grammar:
            config.structured_output_config = self.genai.StructuredOutputConfig(grammar=ebnf(sampling.grammar))
            self.grammars.add(hash(sampling.grammar))
        config.presence_penalty = sampling.presence_penalty
        config.frequency_penalty = sampling.frequency_penalty
        config.repetition_penalty = sampling.repetition_penalty
        if sampling.temperature:
            config.do_sample = True
            config.temperature = sampling.temperature
            config.top_p = sampling.top_p
            config.min_p = min(sampling.min_p, 0.999999)  # the library refuses 1
            config.rng_seed = sampling.seed
            if sampling.top_k:
                config.top_k = sampling.top_k
        seq = next(self.numbers)
        packed = array("i", ids)
        if (self.arriving or self.decodes()) and not self.ngram:
            known = self.prefixes.best("", packed)[0]
            self.arriving[seq] = Arriving(ids, config, known // self.BLOCK * self.BLOCK)
        else:
            self.handles[seq] = self.add(seq, ids, config)
            self.unread.add(seq)
        self.prefixes.remember("", packed, array("i"))
        if sampling.logprobs is not None:
            self.scored.add(seq)
        return seq, None

    def add(self, seq: int, ids: list[int], config: Any) -> Any:
        return self.pipe.add_request(seq, self.openvino.Tensor(self.numpy.array([ids], dtype=self.numpy.int64)), config)

    def decodes(self) -> bool:
        """Does anybody wait for a next token?"""
        return len(self.handles) > len(self.unread)

    def let_in(self) -> int:
        """As much of the prompts that wait as fits beside what decodes, the first one first. Returns tokens."""
        most = room = self.pace.piece()
        for seq, one in list(self.arriving.items()):
            if one.handle and one.handle.get_status() == self.genai.GenerationStatus.RUNNING:  # it waits for room in the cache
                break
            rest = len(one.ids) - one.read
            if rest > room and self.decodes():
                piece = room // self.BLOCK * self.BLOCK
                if piece:
                    config = self.genai.GenerationConfig()
                    config.apply_chat_template, config.max_new_tokens = False, 1
                    one.read, room = one.read + piece, room - piece
                    one.handle = self.add(next(self.numbers), one.ids[: one.read], config)
                break
            self.handles[seq] = self.add(seq, one.ids, one.config)
            self.unread.add(seq)
            del self.arriving[seq]
            room -= rest
        return min(most - room, self.BATCH)

    def step(self) -> list[Step]:
        began, more = time.monotonic(), self.let_in()
        self.pipe.step()
        if more or not self.unread:
            self.pace.learn(time.monotonic() - began, more)
        out = []
        for seq, handle in self.handles.items():
            if handle.can_read():
                outputs = handle.read()
                if not outputs:  # status IGNORED: the scheduler found that it can never fit
                    raise RuntimeError("OpenVINO ran out of KV cache; start with a larger --cache-size")
                for output in outputs.values():
                    scores = [Scored(logprob) for logprob in output.generated_log_probs] if seq in self.scored else ()
                    out.append(Step(seq, output.generated_ids, scores))
                    self.unread.discard(seq)
            elif handle.get_status() == self.genai.GenerationStatus.FINISHED:  # by itself, and too early
                out.append(Step(seq, (), error=EngineFailed("OpenVINO ended the completion before its end")))
        return out

    def cancel(self, seq: int) -> None:
        self.scored.discard(seq)
        self.unread.discard(seq)
        handle = self.arriving.pop(seq).handle if seq in self.arriving else self.handles.pop(seq)
        if handle and handle.get_status() == self.genai.GenerationStatus.RUNNING:
            handle.cancel()
            if not self.handles:
                self.pipe.step()  # a cancelled request keeps its KV blocks until the next step, and none may come

    def embed(self, inputs: Sequence[Tokens]) -> Iterator[list[bytes]]:
        raise no_embeddings()

    def close(self) -> None:
        del self.pipe


@functools.lru_cache(64)
def ebnf(text: str) -> str:
    """A grammar in the dialect of OpenVINO and llama.cpp. Raises Refused where it would be too large in it."""
    try:
        return ebnf_grammar(text)
    except Unsupported as error:
        raise Refused(f"The constraint cannot be honoured on this engine: {error}.", "structured_outputs") from None


# ───────────────────────────────────────────────────── llama.cpp ─────────────────────────────────────────────────


class LlamaGrammar:
    """llama.cpp's own sampler of a grammar, which only forbids. Where llguidance is not installed: it takes milliseconds a mask."""

    def __init__(self, lib: Any, sampler: Any, candidates: Any) -> None:
        self.lib, self.sampler = lib, sampler
        self.candidates = candidates  # llama_token_data (vocabulary), of all grammars; the ids are there

    def allows(self, token: int) -> bool:
        one = (self.lib.llama_token_data * 1)(self.lib.llama_token_data(token, 0.0, 0.0))
        self.lib.llama_sampler_apply(self.sampler, ctypes.byref(self.lib.llama_token_data_array(one, 1, -1, False)))
        return not math.isinf(one[0].logit)

    def allowed(self) -> Any:
        """bool (vocabulary)"""
        self.candidates["logit"] = 0.0
        data = self.candidates.ctypes.data_as(ctypes.POINTER(self.lib.llama_token_data))
        array = self.lib.llama_token_data_array(data, len(self.candidates), -1, False)
        self.lib.llama_sampler_apply(self.sampler, ctypes.byref(array))
        return self.candidates["logit"] == 0.0

    def accept(self, token: int) -> None:
        self.lib.llama_sampler_accept(self.sampler, token)

    def free(self) -> None:
        self.lib.llama_sampler_free(self.sampler)


class Guidance:
    """llguidance's matcher of a grammar: a mask of the whole vocabulary in microseconds, without the GIL."""

    def __init__(self, matcher: Any, numpy: Any, vocabulary: int) -> None:
        self.matcher, self.numpy, self.vocabulary = matcher, numpy, vocabulary

    def allows(self, token: int) -> bool:
        return bool(self.matcher.validate_tokens([token]))

    def allowed(self) -> Any:
        """bool (vocabulary). Raises Refused: the matcher has a limit, and then allows only the end."""
        packed = self.numpy.frombuffer(self.matcher.compute_bitmask(), dtype=self.numpy.uint8)
        if self.matcher.is_error():
            raise grammar_failed(self.matcher)
        return self.numpy.unpackbits(packed, count=self.vocabulary, bitorder="little").view(bool)

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)

    def free(self) -> None:
        pass


@dataclass(slots=True)
class LlamaSlot:
    """One sequence of the KV cache. `kv` are the tokens it holds, kept after the end for the next prompt like it."""

    seq: int
    kv: list[int] = field(default_factory=list)
    todo: list[int] = field(default_factory=list)  # tokens to be decoded next: the rest of the prompt, or the one sampled
    sampler: Sampler | None = None  # None: the slot is free
    grammar: LlamaGrammar | Guidance | None = None
    sampling: Sampling = Sampling()
    scores: list[Scored] = field(default_factory=list)  # of the prompt's tokens, where they are wanted
    used: int = 0  # when it was last started: the least recent is overwritten first
    drafts: list[int] = field(default_factory=list)  # guesses at what follows todo[0], decoded with it
    grams: dict[tuple[int, ...], int] = field(default_factory=dict)  # tokens in a row → where what followed them begins
    indexed: int = 0  # tokens of the sequence that `grams` knows
    left: int = 0  # tokens that may still be sampled

    @property
    def settled(self) -> bool:
        """It has got more than its first token."""
        return self.left < (self.sampling.max_tokens or 1) - 1

    def yield_cells(self) -> None:
        """Give its cells back, to be decoded anew when there is room: what was sampled, and the sampler, stay."""
        self.todo, self.kv = self.kv + self.todo, []
        if self.scores:  # of a prompt that is being scored, from its first token
            self.scores = [Scored(None)]


class LlamaCpp(LlamaModel):
    """llama.cpp by its low-level Python binding: any GGUF file.

    One llama_batch per step over all sequences; a long prompt is decoded in pieces so that the others keep going.
    Where memory allows, each slot has a KV cache of its own; else all share one, which is slower (each attends over everyone's
    cells) but lets one request use all of it. There a prompt waits until it fits, and the youngest sequence yields when cells run out.
    """

    LACKS: ClassVar = frozenset({"prompts"})
    SPECULATES: ClassVar = frozenset({"ngram"})
    BATCH, BATCH_TOGETHER = 512, 2048  # tokens per step when nobody waits for the next token, and of several whole prompts …
    BATCH_BUSY, BATCH_LEAST = 256, 32  # … and at most and at least when somebody does
    FUSED = True  # attention by one kernel, which is faster and takes less memory
    BATCH_SCORED = 64  # … and of a prompt whose every token needs its logits
    pool_tokens, pool_rows = BATCH_BUSY, 64

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        super().__init__(spec, progress)
        lib, trained = self.lib, self.trained
        self.ngram, self.draft_tokens = spec.ngram, spec.draft_tokens or 4
        if spec.ngram and (lib.llama_model_is_recurrent(self.model) or lib.llama_model_is_hybrid(self.model)):
            raise RuntimeError("a recurrent model cannot take guesses back: leave out --ngram-match-min")
        self.cells, self.unified = self.layout(spec)
        with ThreadPoolExecutor(1) as beside:  # reads the vocabulary alone, while the KV cache is being cleared: both take long
            guidance = beside.submit(self.make_guidance)
            self.ctx = self.make_context()
            self.guidance = guidance.result()
        self.embedder = self.make_embedder() if spec.embeddings else None
        self.memory = lib.llama_get_memory(self.ctx)
        self.context = min(lib.llama_n_ctx_seq(self.ctx), trained)
        self.cache_tokens = lib.llama_n_ctx(self.ctx)
        self.batch = lib.llama_batch_init(self.BATCH_TOGETHER, 0, 1)
        self.grammars: dict[str, Any] = {}  # compiled, by text
        self.pace = Pace(spec.step_target, self.BATCH_LEAST, self.BATCH_BUSY)
        self.scoring: list[tuple[LlamaSlot, int, int]] = []  # (slot, index in the batch, the prompt token that it predicts)
        self.weights = Weights(self.numpy, self.vocabulary)
        self.ring = [LlamaSlot(i) for i in range(spec.slots)]
        self.clock = itertools.count(1)

    def make_guidance(self) -> Any:
        """llguidance's view of the vocabulary, where it is installed."""
        if not importlib.util.find_spec("llguidance"):
            return None
        made: Any = importlib.import_module("llguidance.llamacpp")
        return made.lltokenizer_from_vocab(self.vocab, self.vocabulary, [*self.eos])

    def layout(self, spec: EngineSpec) -> tuple[int, bool]:
        return cache_layout(spec, self.trained, gguf_shape(self.meta)[1])

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

    # A sequence starts in the free slot whose KV cache shares the longest beginning with its prompt.

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        # The last token is always decoded: its logits are what we are after. A scored prompt needs those of all.
        limit = 0 if sampling.scores_prompt else len(ids) - 1
        free = [slot for slot in self.ring if slot.sampler is None]
        slot = max(free, key=lambda s: (self.reusable(s, ids, limit), -s.used))
        common = self.reusable(slot, ids, limit)
        other = max(self.ring, key=lambda s: self.reusable(s, ids, limit))
        if (reusable := self.reusable(other, ids, limit)) >= common + 32:  # a copy costs about as much as decoding a few tokens
            self.lib.llama_memory_seq_rm(self.memory, slot.seq, -1, -1)
            self.lib.llama_memory_seq_cp(self.memory, other.seq, slot.seq, -1, -1)
            slot.kv, common = list(other.kv), reusable
        if not self.lib.llama_memory_seq_rm(self.memory, slot.seq, common, -1):
            self.lib.llama_memory_seq_rm(self.memory, slot.seq, -1, -1)  # recurrent state cannot be cut: begin anew
            common = 0
        slot.kv, slot.todo = ids[:common], ids[common:]
        slot.grammar = self.make_grammar(sampling.grammar) if sampling.grammar else None
        slot.sampler, slot.sampling = Sampler(self.weights, self.eos, ids, sampling), sampling
        slot.scores = [Scored(None)] if sampling.scores_prompt else []  # nothing predicts the first token
        slot.used, slot.left = next(self.clock), sampling.max_tokens or 1
        slot.drafts, slot.grams, slot.indexed = [], {}, self.ngram
        return slot.seq, common

    def reusable(self, slot: LlamaSlot, ids: list[int], limit: int) -> int:
        """How many tokens of a slot's cache are the beginning of these, at most `limit`."""
        return shared(slot.kv, ids, limit)

    def make_grammar(self, text: str) -> LlamaGrammar | Guidance:
        """A copy of the compiled grammar. Raises Refused."""
        if text not in self.grammars:
            made = self.compile_guidance(text) if self.guidance else self.compile_grammar(text)
            if len(self.grammars) >= 64:
                self.grammars.pop(next(iter(self.grammars))).free()
            self.grammars[text] = made
        kept = self.grammars[text]
        if isinstance(kept, Guidance):
            return Guidance(kept.matcher.deep_copy(), self.numpy, self.vocabulary)
        return LlamaGrammar(self.lib, self.lib.llama_sampler_clone(kept.sampler), kept.candidates)

    def compile_guidance(self, text: str) -> Guidance:
        if not self.eos:
            raise Refused("This model has no token that ends a text, which structured output needs.", "structured_outputs")
        llguidance: Any = importlib.import_module("llguidance")
        matcher = llguidance.LLMatcher(self.guidance, llguidance.grammar_from("lark", lark_grammar(text)))
        if matcher.is_error():
            raise grammar_failed(matcher)
        return Guidance(matcher, self.numpy, self.vocabulary)

    def compile_grammar(self, text: str) -> LlamaGrammar:
        """llama.cpp's parser gives NULL for a bad one."""
        self.last_error = ""
        grammar = self.lib.llama_sampler_init_grammar(self.vocab, ebnf(text).encode(), b"root")
        if not grammar:
            raise Refused(f"The grammar is not valid GBNF: {self.last_error or 'it has no root'}.", "structured_outputs")
        row = [("id", "i4"), ("logit", "f4"), ("p", "f4")]  # llama_token_data
        candidates = self.numpy.zeros(self.vocabulary, dtype=row)
        candidates["id"] = self.numpy.arange(self.vocabulary)
        return LlamaGrammar(self.lib, grammar, candidates)

    def step(self) -> list[Step]:
        if self.unified:
            self.make_room()
        ready = self.fill_batch()
        began = time.monotonic()
        status = self.lib.llama_decode(self.ctx, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}: {self.last_error}")
        self.pace.learn(time.monotonic() - began, self.batch.n_tokens - len(ready), few=len(self.ring))
        for slot, index, token in self.scoring:
            slot.scores.append(self.score(index, token, slot.sampling.logprobs or 0))
        return [self.accept(slot, index) if slot.drafts else self.sample(slot, index) for slot, index in ready]

    def make_room(self) -> None:
        """Cells for all that decode, and for the prompt that has waited longest.

        First go prompts that are kept for reuse, the oldest first; then the youngest sequence yields. The oldest never does.
        """
        kept = sorted((slot for slot in self.ring if slot.sampler is None and slot.kv), key=lambda s: s.used)
        busy = sorted((slot for slot in self.ring if slot.sampler is not None), key=lambda s: s.used)
        next_prompt = next((len(slot.todo) for slot in busy if len(slot.todo) > 1), 0)
        while self.free_cells() < self.growth() + next_prompt and kept:
            self.forget(kept.pop(0))
        while self.free_cells() < self.growth() or (next_prompt > self.free_cells() and not self.growth()):
            holding = [slot for slot in busy[1:] if slot.kv]
            if not holding:
                return
            self.forget(holding[-1])

    def growth(self) -> int:
        """Cells that a step needs at most for the sequences that decode."""
        return (1 + self.draft_tokens * bool(self.ngram)) * sum(len(s.todo) == 1 for s in self.ring if s.sampler is not None)

    def free_cells(self) -> int:
        """Counts what sequences share as often as it is shared."""
        return self.cells - sum(len(slot.kv) for slot in self.ring)

    def forget(self, slot: LlamaSlot) -> None:
        self.lib.llama_memory_seq_rm(self.memory, slot.seq, -1, -1)
        if slot.sampler is None:
            slot.kv = []
        else:
            slot.yield_cells()

    def fill_batch(self) -> list[tuple[LlamaSlot, int]]:
        """One token of every sequence that decodes, then pieces of the prompts. Returns whose last logits are at which index."""
        batch, ready = self.batch, []
        busy = self.taking_part()
        decoding = [slot for slot in busy if len(slot.todo) == 1]
        prefilling = sorted((slot for slot in busy if len(slot.todo) > 1), key=lambda s: s.used)
        room = max(self.room(decoding), len(decoding) + 1)
        free = self.free_cells() - self.growth() if self.unified else self.cells
        at = 0
        self.scoring = []
        if self.ngram:
            for slot in decoding:
                slot.drafts = self.guess(slot, min(self.draft_tokens, room // (2 if prefilling else 1) // len(decoding) - 1))
                slot.todo += slot.drafts
        for slot in decoding + prefilling:
            prompt = len(slot.todo) > 1 and not slot.drafts
            scored = prompt and bool(slot.scores)
            piece = slot.todo[: min(room, self.BATCH_SCORED if scored else self.BATCH)]
            if scored or len(piece) < len(slot.todo):  # beyond BATCH come only whole prompts
                piece = piece[: max(0, self.BATCH - at, len(decoding) + 1 - at)]
            if not piece or (prompt and len(slot.todo) > free):  # the next in line waits until the whole of it fits
                break
            free -= len(piece) * prompt
            position, last = len(slot.kv), len(slot.todo) == len(piece)
            for i, token in enumerate(piece):
                batch.token[at] = token
                batch.pos[at] = position + i
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = slot.seq
                batch.logits[at] = scored or (last and i + 1 + len(slot.drafts) >= len(piece))
                if scored and i + 1 < len(slot.todo):
                    self.scoring.append((slot, at, slot.todo[i + 1]))
                at += 1
            room -= len(piece)
            slot.kv += piece
            slot.todo = slot.todo[len(piece) :]
            if last:
                ready.append((slot, at - 1 - len(slot.drafts)))
        batch.n_tokens = at
        return ready

    def taking_part(self) -> list[LlamaSlot]:
        """In the next batch."""
        return [slot for slot in self.ring if slot.sampler is not None]

    def room(self, decoding: list[LlamaSlot]) -> int:
        """Tokens of the next batch."""
        settled = any(slot.settled for slot in decoding)  # who has just begun waits for those that came with it
        return self.pace.piece() if settled else self.BATCH_TOGETHER

    def guess(self, slot: LlamaSlot, most: int) -> list[int]:
        """What followed the last tokens when they were met before."""
        text, n = slot.kv + slot.todo, self.ngram
        for end in range(slot.indexed, len(text)):
            slot.grams[tuple(text[end - n : end])] = end  # the last n of all come later: something must follow them
        slot.indexed = max(slot.indexed, len(text))
        at = slot.grams.get(tuple(text[-n:]), len(text))
        return text[at : at + max(0, min(most, slot.left - 1, self.context - len(text)))]

    def accept(self, slot: LlamaSlot, index: int) -> Step:
        """Sample as if there had been no guesses, for as long as they turn out right: the same tokens, several in a step."""
        drafts, slot.drafts = slot.drafts, []
        first = step = self.sample(slot, index)
        tokens, scores = [*step.tokens], [*step.logprobs]
        while len(tokens) <= len(drafts) and step.tokens and tokens[-1] == drafts[len(tokens) - 1] not in self.eos:
            step = self.sample(slot, index + len(tokens))
            tokens += step.tokens
            scores += step.logprobs
        slot.kv = slot.kv[: len(slot.kv) - len(drafts) + len(tokens) - 1]
        self.lib.llama_memory_seq_rm(self.memory, slot.seq, len(slot.kv), -1)
        return first._replace(tokens=tokens, logprobs=scores, error=step.error)

    def sample(self, slot: LlamaSlot, index: int) -> Step:
        assert slot.sampler
        scores: list[Scored] = []
        try:
            token, refused = self.choose(slot, self.logits(index)), no_token_left()
        except Refused as error:  # llguidance has limits
            token, refused = None, error
        if token is None:
            slot.todo = [self.bos]  # never decoded: the choice ends here
            return Step(slot.seq, (), error=refused)
        slot.sampler.accept(token)
        wanted = slot.sampling.logprobs
        if wanted is not None:
            scores = [self.score(index, token, wanted)]
        prompt, slot.scores = slot.scores, []
        slot.todo, slot.left = [token], slot.left - 1
        return Step(slot.seq, [token], scores, prompt)

    def logits(self, index: int) -> Any:
        """The raw logits at a batch index, as a float32 array that lives until the next decode."""
        return self.numpy.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.ctx, index), shape=(self.vocabulary,))

    def score(self, index: int, token: int, alternatives: int) -> Scored:
        logits = self.logits(index)
        best = float(logits.max())
        shift = best + math.log(float(self.numpy.exp(logits - best, dtype=self.numpy.float64).sum()))
        top: list[tuple[int, float]] = []
        if alternatives:
            ids = self.numpy.argpartition(logits, -alternatives)[-alternatives:]
            top = sorted(((int(i), float(logits[i]) - shift) for i in ids), key=lambda pair: -pair[1])
        return Scored(float(logits[token]) - shift, top)

    def choose(self, slot: LlamaSlot, logits: Any) -> int | None:
        """Sample freely, and only when the grammar forbids that token, among those that it allows; None: bans leave none.

        To ask the grammar about one token costs microseconds, about the whole vocabulary more, of llama.cpp's own milliseconds. With P
        the probability of all that is allowed, a token comes with p + (1 - P) * p / P = p / P: the distribution is the same.
        """
        assert slot.sampler
        token = slot.sampler.choose(logits)
        if not slot.grammar:
            return token
        if token is None or not slot.grammar.allows(token):
            token = slot.sampler.choose(logits, slot.grammar.allowed())
        if token is not None:
            slot.grammar.accept(token)
        return token

    def cancel(self, seq: int) -> None:
        slot = self.ring[seq]
        if slot.grammar:
            slot.grammar.free()
        slot.sampler, slot.grammar, slot.todo, slot.grams = None, None, [], {}

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


def cache_layout(spec: EngineSpec, trained: int, kv_bytes: int) -> tuple[int, bool]:
    """(cells of KV cache over all slots, whether the slots share them).

    A request may use LONG tokens, or what --length says, as far as model and memory allow. --cache-size without --length means
    an equal share for each slot.
    """
    memory = machine_memory()
    length = min(spec.length or LONG, trained)
    if spec.cache_tokens and (spec.cache_tokens // spec.slots >= length or not spec.length):
        return max(min(spec.cache_tokens // spec.slots, trained), 256) * spec.slots, False
    if not spec.cache_tokens and kv_bytes and memory and spec.slots * length * kv_bytes <= memory // 16:
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
    matcher: Any = None  # llguidance's, of a grammar
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
    INSTALL: ClassVar = "torch==2.13.0 transformers==5.23.0 llguidance==1.9.1"
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
        self.grammars: Any = None  # llguidance's tokenizer, made when first asked for
        self.out: list[Step] = []
        self.numbers = itertools.count()

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        row = TorchSequence(next(self.numbers), ids, sampling)
        row.generator = self.torch.Generator(self.device).manual_seed(sampling.seed or 0)
        row.matcher = self.make_matcher(sampling.grammar) if sampling.grammar else None
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
        if row.matcher:
            logits[~self.allowed(row.matcher)] = minus
        if logits.max() == minus:
            raise no_token_left()
        token = self.draw(row, logits) if s.temperature else int(logits.argmax())
        if row.matcher:
            row.matcher.consume_token(token)
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

    def make_matcher(self, text: str) -> Any:
        """Raises Refused."""
        llguidance: Any = importlib.import_module("llguidance")
        grammar = self.grammar(text)
        if self.grammars is None:
            size = max(self.vocabulary, len(self.literals))
            self.grammars = llguidance.LLTokenizer(self.hf_tokenizer.to_str(), n_vocab=size, eos_token=[*self.eos])
        matcher = llguidance.LLMatcher(self.grammars, llguidance.grammar_from("lark", grammar))
        if matcher.is_error():
            raise grammar_failed(matcher)
        return matcher

    def allowed(self, matcher: Any) -> Any:
        """Which tokens may come next: bool (vocabulary). Raises Refused: the matcher has a limit, and then allows only the end."""
        packed = self.numpy.frombuffer(matcher.compute_bitmask(), dtype=self.numpy.uint8)
        if matcher.is_error():
            raise grammar_failed(matcher)
        bits = self.numpy.unpackbits(packed, count=self.vocabulary, bitorder="little")
        return self.torch.from_numpy(bits).bool().to(self.device)

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
            return Step(seq, (), error=grammar_failed(failed[0]))
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


def no_token_left() -> Refused:
    return Refused("'logit_bias' bans every token that may come next.", "logit_bias")


def grammar_failed(matcher: Any) -> Refused:
    """Of llguidance's matcher: the grammar is bad, or takes more than its limits allow."""
    return Refused(f"The grammar cannot be followed: {one_line(ValueError(matcher.get_error()))}", "structured_outputs")


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
