"""What is read from a model's own files: GGUF headers, config.json and its neighbours. Opens files, imports no library.

A model is somebody else's work: nothing in it is read without a bound, and no link that leads out of its folder is followed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import struct
from dataclasses import dataclass, field
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
    """Scalars and strings of a GGUF file's metadata; arrays (the vocabulary) are skipped, of labels it is told how many.

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

        def skip_array() -> int:
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
            return int(count)

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
                size = skip_array()
                if key.endswith(".classifier.output_labels"):
                    meta[key] = size
            elif kind == GGUF_STRING:
                meta[key] = string()
            elif kind in GGUF_SCALARS:
                meta[key] = unpack(GGUF_SCALARS[kind])
            else:
                raise ValueError(f"the header has a value of unknown type {kind}")
        return meta


PART = re.compile(r"-(\d{5})-of-(\d{5})(?=\.(?:gguf|safetensors)$)")  # a file that is one of several


def part_name(before: str, number: int, total: str, after: str) -> str:
    return f"{before}-{number:05d}-of-{total}{after}"


def parts(path: str) -> list[str]:
    """The files of a model that is named by one of them."""
    part = PART.search(path)
    if not part:
        return [path]
    return [part_name(path[: part.start()], i, part[2], path[part.end() :]) for i in range(1, int(part[2]) + 1)]


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


# ─────────────────────────────── what a model is for, and how one that embeds pools ──────────────────────────────

TASKS = {  # "task" in GET /v1/models → what such a model does, and where, for the 400
    "generate": ("generates text", "/v1/chat/completions"),
    "embed": ("embeds texts, and generates none", "/v1/embeddings, /v1/rerank or /v1/score"),
    "rerank": ("scores documents for a query, and generates none", "/v1/rerank or /v1/score"),
}
GGUF_ENCODERS = (  # architectures of GGUF that have no causal attention: they cannot generate
    "bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "eurobert",
    "gemma-embedding", "t5encoder",
)  # fmt: skip
GGUF_RANK = 4  # <arch>.pooling_type: 0 none, 1 mean, 2 cls, 3 last, 4 rank


def gguf_task(meta: dict[str, Any]) -> str:
    """A key of TASKS. A model that generates says nothing of pooling."""
    arch = meta.get("general.architecture", "")
    pooling = meta.get(f"{arch}.pooling_type", 0)
    if pooling == GGUF_RANK or (arch in GGUF_ENCODERS and meta.get(f"{arch}.classifier.output_labels")):
        return "rerank"
    return "embed" if pooling or arch in GGUF_ENCODERS else "generate"


def folder_task(folder: str, config: dict[str, Any]) -> str:
    """Of a Hugging Face or IR folder: a key of TASKS, or "classify", which nothing here serves."""
    known = config.get("architectures")
    architecture = str(known[0]) if isinstance(known, list) and known else ""
    if architecture.endswith("ForSequenceClassification"):
        return "rerank" if labels(config) == 1 else "classify"
    encodes = architecture.endswith(("Model", "ForMaskedLM")) and not architecture.endswith("LMHeadModel")
    return "embed" if encodes or os.path.exists(os.path.join(folder, "modules.json")) else "generate"


def labels(config: dict[str, Any]) -> int:
    """transformers' own default is two."""
    named = config.get("id2label")
    return len(named) if isinstance(named, dict) else int(config.get("num_labels") or 2)


@dataclass(frozen=True, slots=True)
class PoolingFiles:
    """How a folder's model makes a vector of a text, as sentence-transformers writes it: modules.json and what that names."""

    modes: tuple[str, ...] = ("mean",)  # side by side, where there are several
    normalize: bool = True  # scaled to length 1
    dense: tuple[str, ...] = ()  # folders in it of the layers behind the pooling
    longest: int | None = None  # tokens
    lower: bool = False  # the text becomes lower case first
    prompts: dict[str, str] = field(default_factory=dict)  # by name; "": before every text that asks for none


LEGACY_MODES = {  # of 1_Pooling/config.json before sentence-transformers 6, in the order in which they stand side by side
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


def read_pooling(folder: str) -> PoolingFiles:
    """Without modules.json: the mean, of length 1. Raises OSError, ValueError: a module that this server does not know."""
    try:
        listed = json.loads(read_text(folder, "modules.json"))
        modules = [(str(module["type"]).rpartition(".")[2], str(module.get("path") or "")) for module in listed]
    except FileNotFoundError:
        modules = [("Normalize", "")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError("modules.json is not a list of modules") from None
    if unknown := [kind for kind, _ in modules if kind not in ("Transformer", "Pooling", "Dense", "Normalize")]:
        raise ValueError(f"modules.json has a module {unknown[0]}, which this server does not know")
    if out := [path for _, path in modules if os.path.isabs(path) or ".." in path.replace("\\", "/").split("/")]:
        raise ValueError(f"modules.json leads out of its folder: {out[0]!r}")
    paths = dict(modules)
    pooling = parse_json(folder, os.path.join(paths["Pooling"], "config.json")) if paths.get("Pooling") else {}
    if pooling.get("include_prompt") is False:
        raise ValueError("its pooling leaves the prompt out, which this server does not do")
    modes = pooling.get("pooling_mode") or [mode for key, mode in LEGACY_MODES.items() if pooling.get(key)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if unknown := [mode for mode in modes if mode not in LEGACY_MODES.values()]:
        raise ValueError(f"this server knows no pooling {unknown[0]}")
    own = read_json(folder, "config_sentence_transformers.json")
    given = own.get("prompts")
    prompts = {str(name): str(text) for name, text in given.items() if text is not None} if isinstance(given, dict) else {}
    prompts[""] = prompts.get(str(own.get("default_prompt_name")), "")
    first = read_json(folder, os.path.join(paths.get("Transformer", ""), "sentence_bert_config.json"))
    longest = first.get("max_seq_length")
    return PoolingFiles(
        modes,
        "Normalize" in paths,
        tuple(path for kind, path in modules if kind == "Dense"),
        longest if isinstance(longest, int) and longest > 0 else None,
        bool(first.get("do_lower_case")),
        prompts,
    )
