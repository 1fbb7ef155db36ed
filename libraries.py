"""Models as their libraries load them: tokens, text and templates, which generating and embedding share.

A library is imported inside the class that stands for it, so in the engine process alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import memory
from chat_syntax import ChatTemplate
from engine import EngineSpec, Refused, log, too_long
from grammar import lark_grammar
from machine import free_memory, openvino_device, physical_cores
from model_files import hf_template, own_sampling, parts, read_gguf, read_json, text_config, token_text

READ = 1 << 30  # bytes of a file of weights that is read rather than mapped
LAYER_ON = re.compile(r"layer +\d+ assigned to device (\w+)")  # llama.cpp tells it in its log alone


class OpenVinoModel:
    """What generating and embedding on OpenVINO have in common: the library, its device and its tokenizer."""

    LIBRARIES: ClassVar[tuple[str, ...]] = ("openvino_genai",)
    INSTALL: ClassVar = "openvino-genai==2026.4.1.0"
    PRECISIONS: ClassVar = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

    def __init__(self, spec: EngineSpec):
        self.genai: Any = importlib.import_module(self.LIBRARIES[0])
        self.numpy: Any = importlib.import_module("numpy")
        self.openvino: Any = importlib.import_module("openvino")
        self.library = installed(self.INSTALL)
        self.device = openvino_device(spec.device, self.openvino.Core().available_devices)
        self.slots, self.threads = spec.slots, spec.threads or physical_cores()

    def properties(self, spec: EngineSpec) -> dict[str, Any]:
        found: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads} if self.device == "CPU" else {}
        if spec.dtype != "auto":
            found["INFERENCE_PRECISION_HINT"] = self.PRECISIONS[spec.dtype]
        return found

    def read_tokenizer(self, tokenizer: Any, context: int) -> None:
        self.tokenizer = tokenizer
        self.bos = tokenizer.get_bos_token_id()
        self.longest: float = math.inf
        # The tokenizer cuts a text at a limit of its own, and tells nobody; max_length does not lift it.
        cut = len(self.tokenize("a " * (context + 64), False))
        if cut <= context:
            self.longest = cut
        self.literals, self.pieces = self.read_vocabulary()
        self.vocabulary = len(self.literals)

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


class LlamaModel:
    """A GGUF file in llama.cpp's memory: weights, tokenizer, template. What is computed with it is its subclasses' business."""

    LIBRARIES: ClassVar[tuple[str, ...]] = ("llama_cpp",)
    INSTALL: ClassVar = "llama-cpp-python==0.3.36"

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        self.lib: Any = importlib.import_module(self.LIBRARIES[0])
        self.numpy: Any = importlib.import_module("numpy")
        lib = self.lib
        self.library = installed(self.INSTALL)
        self.last_error = ""
        self.keep: list[Any] = []  # callbacks: llama.cpp crashes when Python has collected one
        self.keep.append(lib.llama_log_callback(self.on_log))
        lib.llama_log_set(self.keep[-1], ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.slots, self.threads = spec.slots, spec.threads or physical_cores()
        self.flags, self.placed = dict(spec.flags), Counter[str]()
        params = self.place(lib.llama_model_default_params(), spec.path)

        def on_progress(fraction: float, _: Any) -> bool:
            progress(fraction)
            return True  # go on loading

        params.progress_callback = lib.llama_progress_callback(on_progress)
        self.keep.append(params.progress_callback)
        with memory.in_huge_pages(self.on_cpu):
            self.model = lib.llama_model_load_from_file(spec.path.encode(), params)
        if not self.model:
            raise RuntimeError(self.last_error or "llama.cpp cannot load it")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.vocabulary = lib.llama_vocab_n_tokens(self.vocab)
        self.bos = lib.llama_vocab_bos(self.vocab)
        self.eos = frozenset(t for t in range(self.vocabulary) if lib.llama_vocab_is_eog(self.vocab, t))
        self.meta = read_gguf(spec.path)
        self.defaults = own_sampling(self.meta)
        self.trained = lib.llama_model_n_ctx_train(self.model)  # tokens
        self.buffer = ctypes.create_string_buffer(4096)
        self.template = ChatTemplate(
            spec.chat_template or self.meta.get("tokenizer.chat_template"),
            self.token_text(lib.llama_vocab_bos(self.vocab)),
            self.token_text(lib.llama_vocab_eos(self.vocab)),
        )

    def place(self, params: Any, path: str) -> Any:
        """On which devices the weights lie, and how they come there."""
        flags, lib = self.flags, self.lib
        params.n_gpu_layers = flags.get("gpu_layers", params.n_gpu_layers)
        params.main_gpu = flags.get("main_gpu", params.main_gpu)
        if shares := flags.get("tensor_split"):
            most = lib.llama_max_devices()
            self.keep.append((ctypes.c_float * most)(*shares[:most]))
            params.tensor_split = self.keep[-1]
        modes = {
            ("off", False): lib.LLAMA_LOAD_MODE_NONE,
            ("off", True): lib.LLAMA_LOAD_MODE_MLOCK,
            ("on", False): lib.LLAMA_LOAD_MODE_MMAP,
            ("on", True): lib.LLAMA_LOAD_MODE_MMAP_MLOCK,
        }
        mapped = flags.get("mmap") or ("off" if self.is_better_read(path) else "on" if "mlock" in flags else "")
        params.load_mode = modes.get((mapped, "mlock" in flags), params.load_mode)
        return params

    def is_better_read(self, path: str) -> bool:
        """A file that is mapped lies in pages of 4 kB, and what is read need not. A large one gains less, and takes long to be read."""
        size = sum(map(os.path.getsize, parts(path)))
        return self.on_cpu and memory.has_huge_pages() and size <= min(READ, free_memory() // 2)

    @property
    def on_cpu(self) -> bool:
        """No part of it is on a GPU, whose driver may hold on to where memory is."""
        return self.flags.get("gpu_layers") == 0 or not self.lib.llama_supports_gpu_offload()

    @property
    def placement(self) -> str:
        return ", ".join(f"{count} layers on {device}" for device, count in self.placed.items())

    def on_log(self, level: int, text: bytes, _: Any) -> None:
        line = text.decode("utf-8", "replace").strip()
        if layer := LAYER_ON.search(line):
            self.placed[layer[1]] += 1
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

    def fill(self, batch: Any, rows: Iterable[tuple[int, int, int]]) -> None:
        """Put (sequence, position, token) into a llama_batch, each with an output of its own."""
        batch.n_tokens = 0
        for at, (seq, position, token) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, seq
            batch.logits[at] = True
            batch.n_tokens = at + 1


class HfModel:
    """What transformers and exllamav3 have in common: a folder with config.json, tokenizer.json and *.safetensors."""

    def __init__(self, spec: EngineSpec, tokenizer: Any):
        """`tokenizer` is a tokenizers.Tokenizer."""
        self.config = text_config(spec.path)
        own = read_json(spec.path, "special_tokens_map.json") | read_json(spec.path, "tokenizer_config.json")
        generation = read_json(spec.path, "generation_config.json")
        self.hf_tokenizer = tokenizer
        tokenizer.no_truncation()  # tokenizer.json keeps what its makers last tokenized with
        tokenizer.no_padding()
        self.defaults = own_sampling(generation)
        bos, eos = (token_text(own.get(name)) for name in ("bos_token", "eos_token"))
        self.bos = -1 if (found := tokenizer.token_to_id(bos)) is None else int(found)
        ends = [generation.get("eos_token_id"), self.config.get("eos_token_id"), tokenizer.token_to_id(eos)]
        self.eos = frozenset(i for end in ends for i in (end if isinstance(end, list) else [end]) if isinstance(i, int))
        self.adds_bos = bool(own.get("add_bos_token")) and self.bos >= 0
        special = {name: token_text(value) for name, value in own.items() if name.endswith("_token") and token_text(value)}
        self.template = ChatTemplate(spec.chat_template or hf_template(spec.path, own), bos, eos, special)
        self.literals, self.pieces = read_pieces(tokenizer)
        self.vocabulary = len(self.literals)

    def fit_vocabulary(self, vocabulary: int) -> None:
        """The weights' vocabulary; the tokenizer's may be smaller (padding), or larger (tokens that were added and never trained)."""
        self.vocabulary = vocabulary
        self.eos = frozenset(token for token in self.eos if token < vocabulary)

    def grammar(self, text: str) -> str:
        """For llguidance. Raises Refused."""
        if not self.eos:
            raise Refused("This model has no token that ends a text, which structured output needs.", "structured_outputs")
        return lark_grammar(text)

    def kv_bytes(self, bytes_per_value: int) -> int:
        """Bytes of KV cache per token; 0 where the configuration has other names for it."""
        get = self.config.get
        heads = get("num_attention_heads") or 1
        head_dim = get("head_dim") or (get("hidden_size") or 0) // heads
        return (get("num_hidden_layers") or 0) * (get("num_key_value_heads") or heads) * head_dim * 2 * bytes_per_value

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        ids: list[int] = self.hf_tokenizer.encode(text, add_special_tokens=add_special).ids
        return [self.bos, *ids] if add_special and self.adds_bos and ids[:1] != [self.bos] else ids

    def piece(self, token: int, special: bool) -> bytes:
        if token >= len(self.literals):  # the weights' vocabulary is padded, and such a token has no text
            return b""
        return self.literals[token] if special else self.pieces[token]


def byte_letters() -> dict[str, int]:
    """Byte-level BPE writes each byte as one letter: itself where it can be seen, else one from U+0100 on (GPT-2's table)."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(0x100 + i): byte for i, byte in enumerate(unseen)}


def read_pieces(tokenizer: Any) -> tuple[list[bytes], list[bytes]]:
    """UTF-8 bytes of each token of a tokenizers.Tokenizer; in the second list special tokens are empty."""
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    added: dict[int, Any] = tokenizer.get_added_tokens_decoder()
    byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
    letters = byte_letters()
    literals = [b""] * (max(vocabulary.values()) + 1)
    for text, i in vocabulary.items():
        if i in added:
            literals[i] = text.encode()
        elif byte_level:
            literals[i] = b"".join(bytes([letters[c]]) if c in letters else c.encode() for c in text)
        elif len(text) == 6 and text.startswith("<0x"):  # SentencePiece: <0xNN> is a byte, U+2581 a space
            literals[i] = bytes([int(text[3:5], 16)])
        else:
            literals[i] = text.replace("\u2581", " ").encode()
    return literals, [b"" if i in added and added[i].special else literal for i, literal in enumerate(literals)]


def installed(requirement: str) -> str:
    """Name and version of a distribution, given as pip takes it."""
    name = requirement.split("==")[0]
    return f"{name} {importlib.metadata.version(name)}"


def padded(torch: Any, rows: Sequence[Sequence[int]], device: Any, pad: int = 0) -> tuple[Any, Any]:
    """(ids, mask), both int64 (rows, longest): each row from the left, then `pad`, where the mask is 0."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([[len(row)] for row in rows], device=device)
    return ids, (torch.arange(width, device=device)[None] < lengths).long()
