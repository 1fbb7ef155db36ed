"""What is read from a model's own files: GGUF headers, config.json and its neighbours. Opens files, imports no library."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where this server keeps what it would otherwise fetch or make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openai_api_endpoint"


def file_mark(path: str) -> str:
    """Tells files apart by size, time and both ends: to hash 40 GB would take longer than to load them."""
    found, ends = os.stat(path), 1 << 20
    with open(path, "rb") as f:
        digest = hashlib.sha256(f.read(ends))
        f.seek(max(0, found.st_size - ends))
        digest.update(f.read(ends) + repr((found.st_size, found.st_mtime_ns)).encode())
    return digest.hexdigest()[:24]


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
    """The sampling that a model's makers recommend, from generation_config.json or GGUF's general.sampling.*: what is sane of it."""
    gguf = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k"}
    found = {name: values.get(name, values.get(f"general.sampling.{key}")) for name, key in gguf.items()}
    numbers = {name: value for name, value in found.items() if isinstance(value, (int, float)) and 0 <= value < 1e9}
    if values.get("do_sample") is False:
        return {}
    if "temperature" in numbers and numbers["temperature"] < 1e-4:
        numbers["temperature"] = 0.0
    if not 0 < numbers.get("top_p", 1) <= 1:
        del numbers["top_p"]
    return {name: int(value) if name == "top_k" else float(value) for name, value in numbers.items()}


def read_json(folder: str, name: str) -> dict[str, Any]:
    """A model folder's optional JSON file; {} where there is none."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            data = json.load(f)
        return data if isinstance(data, dict) else {}
    except (OSError, ValueError):
        return {}


def text_config(folder: str) -> dict[str, Any]:
    """config.json; of a model that also sees, the part about its language model."""
    config = read_json(folder, "config.json")
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def token_text(value: Any) -> str:
    """A special token as tokenizer_config.json may write it: text, or an object with its text."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def hf_template(folder: str, tokenizer_config: dict[str, Any]) -> str | None:
    """A model folder's chat template, where its makers may have put it; of several the one named default."""
    try:
        with open(os.path.join(folder, "chat_template.jinja"), encoding="utf-8") as f:
            return f.read()
    except OSError:
        found = read_json(folder, "chat_template.json").get("chat_template") or tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
