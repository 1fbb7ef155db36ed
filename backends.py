"""Bindings: one class for each native library, and what is read from a model's own files.

Each is thin: load, tokenize, start, step, cancel. What every engine has in common stands in engine.py. A library is imported
in the constructor of its binding and nowhere else, which runs in the engine process.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from engine import UPSTREAMS, Backend, EngineSpec, Prompt, Refused, Sampling, Scored, Step, log, one_line, too_long

# ─────────────────────────────────────────────────── model files ─────────────────────────────────────────────────

GGUF_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


def read_gguf(path: str) -> dict[str, Any]:
    """Scalars and strings of a GGUF file's metadata; arrays (the vocabulary) are skipped.

    Format: the GGUF specification of the ggml project, versions 2 and 3. Raises ValueError for what is not one.
    """
    with open(path, "rb") as f:

        def unpack(fmt: str) -> Any:
            data = f.read(struct.calcsize(fmt))
            if len(data) < struct.calcsize(fmt):
                raise ValueError("the file is cut off inside its header")
            return struct.unpack(fmt, data)[0]

        def string() -> str:
            size = unpack("<Q")
            if size > 1 << 24:
                raise ValueError("the header is damaged")
            return f.read(size).decode("utf-8", "replace")

        def skip_array() -> None:
            kind, count = unpack("<I"), unpack("<Q")
            if kind == GGUF_STRING:
                for _ in range(count):
                    f.seek(unpack("<Q"), os.SEEK_CUR)
            elif kind in GGUF_SCALARS:
                f.seek(count * struct.calcsize(GGUF_SCALARS[kind]), os.SEEK_CUR)
            else:
                raise ValueError(f"the header has an array of unknown type {kind}")

        if f.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, _tensors, count = unpack("<I"), unpack("<Q"), unpack("<Q")
        if version not in (2, 3):
            raise ValueError(f"GGUF version {version} is not supported")
        meta: dict[str, Any] = {}
        for _ in range(count):
            key, kind = string(), unpack("<I")
            if kind == GGUF_ARRAY:
                skip_array()
            elif kind == GGUF_STRING:
                meta[key] = string()
            elif kind in GGUF_SCALARS:
                meta[key] = unpack(GGUF_SCALARS[kind])
            else:
                raise ValueError(f"the header has a value of unknown type {kind}")
        return meta


def gguf_shape(meta: dict[str, Any]) -> tuple[int, int]:
    """(training context in tokens, bytes of fp16 KV cache per token; 0 where the header does not say)."""
    arch = meta.get("general.architecture", "")

    def get(name: str) -> int:
        return int(meta.get(f"{arch}.{name}", 0))

    heads = get("attention.head_count") or 1
    head_dim = get("attention.key_length") or get("embedding_length") // heads
    return get("context_length"), get("block_count") * (get("attention.head_count_kv") or heads) * head_dim * 2 * 2


def own_sampling(values: dict[str, Any]) -> dict[str, float]:
    """The sampling that a model's makers recommend, from generation_config.json or GGUF's general.sampling.*."""
    gguf = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k"}
    found = {name: values.get(name, values.get(f"general.sampling.{key}")) for name, key in gguf.items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float)) and value >= 0}


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once: a second thread on a core slows a batch down."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as f:
                cores.add(f.read().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def default_cache_tokens(slots: int, context: int, kv_bytes_per_token: int) -> int:
    """KV cache tokens over all slots: up to 4,096 for each, as far as a quarter of the machine's memory goes."""
    wanted = slots * min(context, 4096)
    if kv_bytes_per_token and hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        wanted = min(wanted, max(slots * 256, memory // 4 // kv_bytes_per_token))
    return wanted


class ChatTemplate:
    """A model's Jinja chat template, rendered as Hugging Face's `apply_chat_template` does, in a sandbox."""

    def __init__(self, source: str | None, bos: str, eos: str):
        self.template = None
        self.source = source
        self.tokens = {"bos_token": bos, "eos_token": eos}
        self.has_developer = source is not None and "developer" in source
        if source:
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment

            env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
            env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
            env.globals["strftime_now"] = time.strftime
            env.globals["raise_exception"] = self.refuse
            self.template = env.from_string(source)

    @staticmethod
    def refuse(message: str) -> None:
        raise Refused(f"The model's chat template refuses these messages: {message}", "messages")

    def render(self, prompt: Prompt) -> str:
        if self.template is None:
            raise Refused("This model has no chat template: start the server with --chat-template FILE.", "messages")
        messages = [dict(m) for m in prompt.messages or ()]
        mark = ""
        if prompt.continue_final:  # where the last message ends only the template knows: mark the place and cut there
            mark = "\ue000cut\ue000"
            messages[-1]["content"] += mark
        if not self.has_developer:  # OpenAI's newer name for the system role; few templates know it
            for message in messages:
                if message["role"] == "developer":
                    message["role"] = "system"
        try:
            variables = {
                **self.tokens,
                **prompt.template_kwargs,
                "add_generation_prompt": prompt.generation_prompt and not mark,
            }
            text = str(self.template.render(messages=messages, **variables))
            if mark and mark not in text:
                raise Refused("The model's chat template cannot continue the final message.", "continue_final_message")
            return text.rpartition(mark)[0] if mark else text
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"The model's chat template cannot render these messages: {one_line(error)}", "messages") from None


# ─────────────────────────────────────────────────── OpenVINO GenAI ──────────────────────────────────────────────


class OpenVino:
    """openvino-genai's ContinuousBatchingPipeline: an IR folder, or a GGUF file of a Llama or Qwen model, on CPU.

    It knows prefix reuse, but not how much of a prompt was reused: cached tokens are None.
    """

    LIBRARY: ClassVar = "openvino_genai"
    INSTALL: ClassVar = "openvino-genai==2026.4.1.0"
    LACKS: ClassVar = frozenset({"logit_bias", "top_logprobs", "scores", "embeddings"})
    BLOCK = 32  # tokens per KV block on CPU

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        import numpy
        import openvino

        self.genai: Any = importlib.import_module(self.LIBRARY)
        self.library = installed(self.INSTALL)
        tensor: Any = openvino.Tensor
        self.tensor: Callable[[list[int]], Any] = lambda ids: tensor(numpy.array([ids], dtype=numpy.int64))
        self.slots, self.threads = spec.slots, spec.threads or physical_cores()
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
        scheduler.max_num_batched_tokens = 256  # a step of prefill stays short, so the others keep decoding
        scheduler.max_num_seqs = spec.slots
        scheduler.num_kv_blocks = -(-self.cache_tokens // self.BLOCK)
        scheduler.enable_prefix_caching = True
        progress(0.0)
        self.pipe = self.genai.ContinuousBatchingPipeline(
            spec.path, scheduler, "CPU", {"INFERENCE_NUM_THREADS": self.threads}, {}
        )
        self.context = min(context, self.cache_tokens)
        self.tokenizer = self.pipe.get_tokenizer()
        self.template = ChatTemplate(
            spec.chat_template or self.tokenizer.get_original_chat_template() or self.tokenizer.chat_template,
            self.tokenizer.get_bos_token(),
            self.tokenizer.get_eos_token(),
        )
        config = self.pipe.get_config()
        self.eos_id = self.tokenizer.get_eos_token_id()
        self.eos = frozenset(config.stop_token_ids) | {self.eos_id}
        self.bos = self.tokenizer.get_bos_token_id()
        self.longest: float = math.inf
        # The tokenizer cuts a text at a limit of its own, and tells nobody; max_length does not lift it.
        cut = len(self.tokenize("a " * (context + 64), False))
        if cut <= context:
            self.longest = cut
        self.literals, self.pieces = self.read_vocabulary()
        self.vocabulary = len(self.literals)
        self.handles: dict[int, Any] = {}
        self.scored: set[int] = set()  # sequences whose logprobs are wanted
        self.numbers = itertools.count()

    def read_vocabulary(self) -> tuple[list[bytes], list[bytes]]:
        """UTF-8 bytes of each token; in the second list special tokens are empty. decode() costs 40 us a call, this nothing."""
        by_id = {i: piece for piece, i in self.tokenizer.get_vocab().items()}
        ids = range(max(by_id) + 1)
        shown, every = (self.tokenizer.decode([[i] for i in ids], skip_special_tokens=skip) for skip in (True, False))
        spm = b"<0x0A>" in by_id.values()  # SentencePiece: U+2581 is a space, <0xNN> a byte

        def piece(i: int) -> bytes:
            raw: bytes = by_id.get(i, b"")
            if spm and len(raw) == 6 and raw.startswith(b"<0x"):
                return bytes([int(raw[3:5], 16)])
            return raw.replace("\u2581".encode(), b" ") if spm else raw

        literals = [piece(i) for i in ids]
        return literals, [b"" if shown[i] != every[i] else literals[i] for i in ids]

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special).input_ids.data[0].tolist()
        if len(ids) >= self.longest:
            raise too_long("the text", "is longer than", self.longest)
        return ids

    def piece(self, token: int, special: bool) -> bytes:
        return self.literals[token] if special else self.pieces[token]

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        config = self.genai.GenerationConfig()
        config.apply_chat_template = False
        config.max_new_tokens = sampling.max_tokens
        config.eos_token_id = self.eos_id
        config.ignore_eos = sampling.ignore_eos
        config.min_new_tokens = min(sampling.min_tokens, sampling.max_tokens or 0)
        config.stop_token_ids = set() if sampling.min_tokens or sampling.ignore_eos else {*self.eos, *sampling.stop_token_ids}
        config.logprobs = 0 if sampling.logprobs is None else 1
        if sampling.grammar:
            config.structured_output_config = self.genai.StructuredOutputConfig(grammar=sampling.grammar)
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
        self.handles[seq] = self.pipe.add_request(seq, self.tensor(ids), config)
        if sampling.logprobs is not None:
            self.scored.add(seq)
        return seq, None

    def step(self) -> list[Step]:
        self.pipe.step()
        out = []
        for seq, handle in self.handles.items():
            if handle.can_read():
                outputs = handle.read()
                if not outputs:  # status IGNORED: the scheduler found that it can never fit
                    raise RuntimeError("OpenVINO ran out of KV cache; start with a larger --cache-size")
                for output in outputs.values():
                    scores = [Scored(logprob) for logprob in output.generated_log_probs] if seq in self.scored else ()
                    out.append(Step(seq, output.generated_ids, scores))
        return out

    def cancel(self, seq: int) -> None:
        self.scored.discard(seq)
        handle = self.handles.pop(seq)
        if handle.get_status() == self.genai.GenerationStatus.RUNNING:
            handle.cancel()
            if not self.handles:
                self.pipe.step()  # a cancelled request keeps its KV blocks until the next step, and none may come

    def embed(self, ids: list[int]) -> Iterator[list[float]]:
        raise Refused("This engine has no embeddings; llamacpp has.", "model")

    def close(self) -> None:
        del self.pipe


def read_json(folder: str, name: str) -> dict[str, Any]:
    """A model folder's optional JSON file; {} where there is none."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            data = json.load(f)
        return data if isinstance(data, dict) else {}
    except (OSError, ValueError):
        return {}


# ───────────────────────────────────────────────────── llama.cpp ─────────────────────────────────────────────────


@dataclass(slots=True)
class LlamaSlot:
    """One sequence of the KV cache. `kv` are the tokens it holds, kept after the end for the next prompt like it."""

    seq: int
    kv: list[int] = field(default_factory=list)
    todo: list[int] = field(default_factory=list)  # tokens to be decoded next: the rest of the prompt, or the one sampled
    sampler: Any = None  # the sampler chain; None: the slot is free
    grammar: Any = None  # a sampler of its own, which only forbids
    sampling: Sampling = Sampling()
    muted: int = 0  # tokens still to come before EOS may (min_tokens): the chain's first sampler bans it
    scores: list[Scored] = field(default_factory=list)  # of the prompt's tokens, where they are wanted
    used: int = 0  # when it was last started: the least recent is overwritten first


class LlamaCpp:
    """llama.cpp by its low-level Python binding: any GGUF file.

    One llama_batch per step over all sequences; a long prompt is decoded in pieces so that the others keep going.
    Each slot has cache_tokens / slots tokens of KV cache of its own (a unified cache attends over everyone's cells).
    """

    LIBRARY: ClassVar = "llama_cpp"
    INSTALL: ClassVar = "llama-cpp-python==0.3.36"
    LACKS: ClassVar = frozenset[str]()
    BATCH = 512  # tokens per step when nobody waits for the next token …
    BATCH_BUSY = 256  # … and when somebody does
    BATCH_SCORED = 64  # … and of a prompt whose every token needs its logits

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        self.lib: Any = importlib.import_module(self.LIBRARY)
        self.numpy: Any = importlib.import_module("numpy")
        lib = self.lib
        self.library = installed(self.INSTALL)
        self.last_error = ""
        self.keep: list[Any] = []  # callbacks: llama.cpp crashes when Python has collected one
        self.keep.append(lib.llama_log_callback(self.on_log))
        lib.llama_log_set(self.keep[-1], ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.slots, self.threads = spec.slots, spec.threads or physical_cores()
        params = lib.llama_model_default_params()

        def on_progress(fraction: float, _: Any) -> bool:
            progress(fraction)
            return True  # go on loading

        params.progress_callback = lib.llama_progress_callback(on_progress)
        self.keep.append(params.progress_callback)
        self.model = lib.llama_model_load_from_file(spec.path.encode(), params)
        if not self.model:
            raise RuntimeError(self.last_error or "llama.cpp cannot load it")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.vocabulary = lib.llama_vocab_n_tokens(self.vocab)
        self.bos = lib.llama_vocab_bos(self.vocab)
        meta = read_gguf(spec.path)
        self.defaults = own_sampling(meta)
        trained = lib.llama_model_n_ctx_train(self.model)
        wanted = spec.cache_tokens or default_cache_tokens(spec.slots, trained, gguf_shape(meta)[1])
        self.ctx = self.make_context(min(wanted // spec.slots, trained))
        self.embedder = self.make_embedder() if spec.embeddings else None
        self.memory = lib.llama_get_memory(self.ctx)
        self.context = min(lib.llama_n_ctx_seq(self.ctx), trained)
        self.cache_tokens = lib.llama_n_ctx(self.ctx)
        self.batch = lib.llama_batch_init(self.BATCH, 0, 1)
        self.grammars: dict[str, Any] = {}  # compiled, by text
        self.scoring: list[tuple[LlamaSlot, int, int]] = []  # (slot, index in the batch, the prompt token that it predicts)
        row = [("id", "i4"), ("logit", "f4"), ("p", "f4")]  # llama_token_data
        self.candidates = self.numpy.zeros(self.vocabulary, dtype=row)
        self.ring = [LlamaSlot(i) for i in range(spec.slots)]
        self.clock = itertools.count(1)
        self.eos = frozenset(t for t in range(self.vocabulary) if lib.llama_vocab_is_eog(self.vocab, t))
        self.buffer = ctypes.create_string_buffer(4096)
        self.template = ChatTemplate(
            spec.chat_template or meta.get("tokenizer.chat_template"),
            self.token_text(lib.llama_vocab_bos(self.vocab)),
            self.token_text(lib.llama_vocab_eos(self.vocab)),
        )

    def make_context(self, per_slot: int) -> Any:
        params = self.lib.llama_context_default_params()
        params.n_ctx = max(per_slot, 256) * self.slots
        params.n_batch = params.n_ubatch = self.BATCH
        params.n_seq_max = self.slots
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = False
        params.flash_attn_type = self.lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        params.no_perf = True
        ctx = self.lib.llama_init_from_model(self.model, params)
        if not ctx:
            raise RuntimeError(f"no memory for {params.n_ctx} tokens of KV cache: lower --cache-size ({self.last_error})")
        return ctx

    def on_log(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if level == 4 and line:  # GGML_LOG_LEVEL_ERROR; the first says why, the rest that it failed
            self.last_error = self.last_error or line
        log.debug("llama.cpp: %s", line)

    def token_text(self, token: int) -> str:
        text: bytes = self.lib.llama_vocab_get_text(self.vocab, token) if token >= 0 else b""
        return text.decode("utf-8", "replace")

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        ids = (self.lib.llama_token * room)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, room, add_special, True)
        if count < 0:
            raise RuntimeError("llama_tokenize failed")
        return list(ids[:count])

    @functools.cache  # noqa: B019 (one backend lives as long as its process)
    def piece(self, token: int, special: bool) -> bytes:
        size = self.lib.llama_token_to_piece(self.vocab, token, self.buffer, len(self.buffer), 0, special)
        return bytes(self.buffer.raw[: max(size, 0)])

    # A sequence starts in the free slot whose KV cache shares the longest beginning with its prompt.

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        # The last token is always decoded: its logits are what we are after. A scored prompt needs those of all.
        limit = 0 if sampling.scores_prompt else len(ids) - 1
        free = [slot for slot in self.ring if slot.sampler is None]
        slot = max(free, key=lambda s: (shared(s.kv, ids, limit), -s.used))
        common = shared(slot.kv, ids, limit)
        other = max(self.ring, key=lambda s: shared(s.kv, ids, limit))
        if shared(other.kv, ids, limit) >= common + 32:  # a copy costs about as much as decoding a few tokens
            self.lib.llama_memory_seq_rm(self.memory, slot.seq, -1, -1)
            self.lib.llama_memory_seq_cp(self.memory, other.seq, slot.seq, -1, -1)
            slot.kv, common = list(other.kv), shared(other.kv, ids, limit)
        if not self.lib.llama_memory_seq_rm(self.memory, slot.seq, common, -1):
            self.lib.llama_memory_seq_rm(self.memory, slot.seq, -1, -1)  # recurrent state cannot be cut: begin anew
            common = 0
        slot.kv, slot.todo = ids[:common], ids[common:]
        slot.grammar = self.make_grammar(sampling.grammar) if sampling.grammar else None
        slot.sampler = self.make_sampler(ids, sampling)
        slot.sampling, slot.muted = sampling, sampling.min_tokens
        slot.scores = [Scored(None)] if sampling.scores_prompt else []  # nothing predicts the first token
        slot.used = next(self.clock)
        return slot.seq, common

    def make_sampler(self, ids: list[int], s: Sampling) -> Any:
        """Penalties, temperature, top_k, top_p, min_p, in the order of vLLM and transformers (llama.cpp's own cuts first)."""
        lib = self.lib
        chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        if s.min_tokens:
            lib.llama_sampler_chain_add(chain, self.make_bias([(token, -100.0) for token in self.eos]))
        if s.logit_bias:
            lib.llama_sampler_chain_add(chain, self.make_bias(s.logit_bias))
        everything = len(ids) + (s.max_tokens or 0)
        if s.repetition_penalty != 1:
            repetition = lib.llama_sampler_init_penalties(self.vocabulary, everything, s.repetition_penalty, 0.0, 0.0)
            for token in ids:
                lib.llama_sampler_accept(repetition, token)
            lib.llama_sampler_chain_add(chain, repetition)
        if s.presence_penalty or s.frequency_penalty:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_penalties(
                self.vocabulary, everything, 1.0, s.frequency_penalty, s.presence_penalty))  # fmt: skip
        if not s.temperature:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_greedy())
            return chain
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(s.temperature))
        if s.top_k:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_k(s.top_k))
        if s.top_p is not None and s.top_p < 1:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_top_p(s.top_p, 1))
        if s.min_p:
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_min_p(s.min_p, 1))
        lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(s.seed))
        return chain

    def make_bias(self, biases: Iterable[tuple[int, float]]) -> Any:
        """-100 bans, as OpenAI's reference says of logit_bias."""
        rows = [(token, -math.inf if bias <= -100 else bias) for token, bias in biases]
        array = (self.lib.llama_logit_bias * len(rows))(*rows)
        return self.lib.llama_sampler_init_logit_bias(self.vocabulary, len(rows), array)

    def make_grammar(self, text: str) -> Any:
        """A copy of the compiled grammar. Raises Refused: llama.cpp's parser gives NULL for a bad one."""
        if text not in self.grammars:
            self.last_error = ""
            grammar = self.lib.llama_sampler_init_grammar(self.vocab, text.encode(), b"root")
            if not grammar:
                raise Refused(f"The grammar is not valid GBNF: {self.last_error or 'it has no root'}.", "structured_outputs")
            if len(self.grammars) >= 64:
                self.lib.llama_sampler_free(self.grammars.pop(next(iter(self.grammars))))
            self.grammars[text] = grammar
        return self.lib.llama_sampler_clone(self.grammars[text])

    def step(self) -> list[Step]:
        ready = self.fill_batch()
        status = self.lib.llama_decode(self.ctx, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode failed with status {status}: {self.last_error}")
        for slot, index, token in self.scoring:
            slot.scores.append(self.score(index, token, slot.sampling.logprobs or 0))
        return [self.sample(slot, index) for slot, index in ready]

    def fill_batch(self) -> list[tuple[LlamaSlot, int]]:
        """One token of every sequence that decodes, then pieces of the prompts. Returns whose last logits are at which index."""
        batch, ready = self.batch, []
        busy = [slot for slot in self.ring if slot.sampler is not None]
        decoding = [slot for slot in busy if len(slot.todo) == 1]
        prefilling = sorted((slot for slot in busy if len(slot.todo) > 1), key=lambda s: s.used)
        room = max(self.BATCH_BUSY if decoding else self.BATCH, len(decoding) + 1)
        at = 0
        self.scoring = []
        for slot in decoding + prefilling:
            scored = slot.sampling.scores_prompt and len(slot.todo) > 1
            piece = slot.todo[: min(room, self.BATCH_SCORED) if scored else room]
            if not piece:
                break
            position, last = len(slot.kv), len(slot.todo) == len(piece)
            for i, token in enumerate(piece):
                batch.token[at] = token
                batch.pos[at] = position + i
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = slot.seq
                batch.logits[at] = scored or (last and i + 1 == len(piece))
                if scored and i + 1 < len(slot.todo):
                    self.scoring.append((slot, at, slot.todo[i + 1]))
                at += 1
            room -= len(piece)
            slot.kv += piece
            slot.todo = slot.todo[len(piece) :]
            if last:
                ready.append((slot, at - 1))
        batch.n_tokens = at
        return ready

    def sample(self, slot: LlamaSlot, index: int) -> Step:
        scores: list[Scored] = []
        token: int | None
        if slot.sampling.grammar:
            token = self.sample_constrained(slot, index)
        else:
            token = self.lib.llama_sampler_sample(slot.sampler, self.ctx, index)
        if token is None:
            slot.todo = [self.bos]  # never decoded: the choice ends here
            return Step(
                slot.seq, (), refused=Refused("'logit_bias' bans every token that the constraint allows.", "logit_bias")
            )
        if slot.muted:
            slot.muted -= 1
            if not slot.muted:
                self.lib.llama_sampler_free(self.lib.llama_sampler_chain_remove(slot.sampler, 0))
        wanted = slot.sampling.logprobs
        if wanted is not None:
            scores = [self.score(index, token, wanted)]
        prompt, slot.scores = slot.scores, []
        slot.todo = [token]
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

    def sample_constrained(self, slot: LlamaSlot, index: int) -> int | None:
        """Sample freely, and only when the grammar forbids that token, among those that it allows; None: bans leave none.

        To ask the grammar about one token costs microseconds, about the whole vocabulary milliseconds. With P the probability
        of all that is allowed, a token comes with p + (1 - P) * p / P = p / P: the distribution is the same.
        """
        token, logit = self.pick(slot, index, constrained=False)
        one = (self.lib.llama_token_data * 1)(self.lib.llama_token_data(token, 0.0, 0.0))
        array = self.lib.llama_token_data_array(one, 1, -1, False)
        self.lib.llama_sampler_apply(slot.grammar, ctypes.byref(array))
        if math.isinf(one[0].logit):
            token, logit = self.pick(slot, index, constrained=True)
        if math.isinf(logit):
            return None
        self.lib.llama_sampler_accept(slot.grammar, token)
        self.lib.llama_sampler_accept(slot.sampler, token)
        return token

    def pick(self, slot: LlamaSlot, index: int, constrained: bool) -> tuple[int, float]:
        """A token and its logit; minus infinity where bans and the grammar leave none."""
        self.candidates["id"] = self.numpy.arange(self.vocabulary)
        self.candidates["logit"] = self.logits(index)
        data = self.candidates.ctypes.data_as(ctypes.POINTER(self.lib.llama_token_data))
        array = self.lib.llama_token_data_array(data, self.vocabulary, -1, False)
        if constrained:
            self.lib.llama_sampler_apply(slot.grammar, ctypes.byref(array))
        self.lib.llama_sampler_apply(slot.sampler, ctypes.byref(array))
        chosen = array.data[array.selected]
        return int(chosen.id), float(chosen.logit)

    def cancel(self, seq: int) -> None:
        slot = self.ring[seq]
        self.lib.llama_sampler_free(slot.sampler)
        if slot.grammar:
            self.lib.llama_sampler_free(slot.grammar)
        slot.sampler, slot.grammar, slot.todo = None, None, []

    def make_embedder(self) -> Any:
        """A context of its own: pooling is a property of a context, and embeddings need no KV cache that lasts."""
        params = self.lib.llama_context_default_params()
        params.n_ctx = self.lib.llama_n_ctx_seq(self.ctx)
        params.n_batch = params.n_ubatch = self.BATCH_BUSY
        params.n_threads = params.n_threads_batch = self.threads
        params.embeddings = True
        params.pooling_type = self.lib.LLAMA_POOLING_TYPE_NONE  # the mean is taken here: a prompt comes in pieces
        ctx = self.lib.llama_init_from_model(self.model, params)
        if not ctx:
            raise RuntimeError(f"no memory for embeddings: lower --cache-size ({self.last_error})")
        return ctx

    def embed(self, ids: list[int]) -> Iterator[list[float]]:
        """The mean over the tokens' last hidden states, scaled to length 1 as OpenAI's are."""
        if self.embedder is None:
            raise Refused("This server was started without --embeddings.", "model")
        if len(ids) > self.context:
            raise too_long(f"an input has {len(ids)} tokens, which", "exceed", self.context)
        lib, numpy = self.lib, self.numpy
        lib.llama_memory_clear(lib.llama_get_memory(self.embedder), True)
        total = numpy.zeros(lib.llama_model_n_embd(self.model))
        for at in range(0, len(ids), self.BATCH_BUSY):
            piece = ids[at : at + self.BATCH_BUSY]
            tokens = (lib.llama_token * len(piece))(*piece)  # the batch only points at it
            if lib.llama_decode(self.embedder, lib.llama_batch_get_one(tokens, len(piece))):
                raise RuntimeError("llama_decode failed for embeddings")
            for i in range(len(piece)):
                total += numpy.ctypeslib.as_array(lib.llama_get_embeddings_ith(self.embedder, i), shape=total.shape)
            yield [float(x) for x in total / (numpy.linalg.norm(total) or 1)]

    def close(self) -> None:
        self.lib.llama_free(self.ctx)
        self.lib.llama_model_free(self.model)


def shared(a: list[int], b: list[int], limit: int) -> int:
    """Length of the common beginning of two token lists, at most `limit`."""
    end = min(len(a), len(b), limit)
    if a[:end] == b[:end]:
        return end
    return next(i for i in range(end) if a[i] != b[i])


BACKENDS: dict[str, type[Backend]] = {"openvino": OpenVino, "llamacpp": LlamaCpp}
LACKS = {name: backend.LACKS for name, backend in BACKENDS.items()} | UPSTREAMS  # of every engine


def installed(requirement: str) -> str:
    name = requirement.split("==")[0]
    return f"{name} {importlib.metadata.version(name)}"


def missing_library(name: str) -> str | None:
    """None when the backend's library is installed, else one line that says what brings it. Imports nothing."""
    backend = BACKENDS[name]
    if importlib.util.find_spec(backend.LIBRARY):
        return None
    return f"backend {name} needs {backend.LIBRARY}: pip install {backend.INSTALL}"
