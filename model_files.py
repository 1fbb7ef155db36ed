"""What is read from a model's own files: GGUF headers, config.json and its neighbours. Opens files, imports no library.

A model is somebody else's work: nothing in it is read without a bound, and no link that leads out of its folder is followed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import struct
from pathlib import Path
from typing import Any, BinaryIO


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
GGUF_KEYS, GGUF_STRINGS = 1 << 16, 1 << 22  # most in one header: keys, and strings inside of arrays (a vocabulary has 2^18)
FILE_MAX = 1 << 25  # bytes of a text file that is read whole


# ─────────────────────────────────────────────────── opening files ───────────────────────────────────────────────


def is_inside(path: str, folder: str) -> bool:
    """Does a file of this folder, its links followed, lie in the folder?

    Hugging Face's cache is one folder to its users: `models--x/snapshots/<revision>/name` links to `models--x/blobs/<hash>`.
    """
    real, home = os.path.realpath(path), os.path.realpath(folder)
    roots = [home]
    snapshots = os.path.dirname(home)
    if os.path.basename(snapshots) == "snapshots" and os.path.basename(os.path.dirname(snapshots)).startswith("models--"):
        roots.append(os.path.join(os.path.dirname(snapshots), "blobs"))
    return any(real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def open_inside(folder: str, name: str) -> BinaryIO:
    """A regular file of a model's folder. Raises OSError: also where it is a link that leads out."""
    path = os.path.join(folder, name)
    if not is_inside(path, folder):
        os.stat(path)  # where there is none, that is told
        raise PermissionError(f"{name} is a link that leads out of the model's folder")
    # A pipe would be waited for; and what is a link by now was none a moment ago.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    file = os.open(os.path.realpath(path), flags)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise PermissionError(f"{name} is no regular file")
    return os.fdopen(file, "rb")


def read_text(folder: str, name: str) -> str:
    """Raises OSError, ValueError."""
    with open_inside(folder, name) as f:
        data = f.read(FILE_MAX + 1)
    if len(data) > FILE_MAX:
        raise ValueError(f"{name} is larger than {FILE_MAX >> 20} MiB")
    try:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()  # line ends as Python reads them
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8") from None


def leads_out(folder: str) -> str | None:
    """The first name in a folder and those in it that is a link which leads out of it."""
    for where, folders, files in os.walk(folder):
        for name in sorted(folders + files):
            path = os.path.join(where, name)
            if os.path.islink(path) and not is_inside(path, folder):
                return os.path.relpath(path, folder)
    return None


# ─────────────────────────────────────────────────────── GGUF ────────────────────────────────────────────────────


def read_gguf(path: str) -> dict[str, Any]:
    """Scalars and strings of a GGUF file's metadata; arrays (the vocabulary) are skipped.

    Format: the GGUF specification of the ggml project, versions 2 and 3. Raises ValueError for what is not one.
    """
    with open_inside(*os.path.split(os.path.realpath(path))) as f:
        strings = 0

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
            nonlocal strings
            kind, count = unpack("<I"), unpack("<Q")
            if kind == GGUF_STRING:
                strings += count
                if strings > GGUF_STRINGS:
                    raise ValueError("the header has too many strings")
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
        if count > GGUF_KEYS:
            raise ValueError("the header has too many keys")
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


def parse_json(folder: str, name: str) -> dict[str, Any]:
    """A model folder's JSON file; an empty one says nothing. Raises OSError, and ValueError for what is not a JSON object."""
    text = read_text(folder, name)
    try:
        data = json.loads(text) if text else {}
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{name} is not a JSON object")
    return data


def read_json(folder: str, name: str) -> dict[str, Any]:
    """A model folder's optional JSON file; {} where there is none, or none that can be read."""
    try:
        return parse_json(folder, name)
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
        return read_text(folder, "chat_template.jinja")
    except FileNotFoundError:
        found = read_json(folder, "chat_template.json").get("chat_template") or tokenizer_config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
