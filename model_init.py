"""The command line and its profiles, and which models are in memory: the life of each, from loading to unloading.

`add_args(parser)` and `init(args)` compose into any script, as exllamav3's own model_init has them. Standard library only:
a library is looked up here, but imported in the engine process alone. Which models there are is catalog.py's to say.
"""

from __future__ import annotations

import argparse
import os
import re
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from backends import BACKENDS, LACKS, WITH_EMBEDDINGS
from catalog import DEMO_FILE, DEMO_SYNTAX, LOADERS, Catalog, Model, UsageError, choose_backend, demo_model, find_model
from engine import UPSTREAMS, EngineFailed, EngineInfo, EngineSpec, QueueFull, log, public
from engine_handle import Engine, Job, Timeouts
from model_files import leads_out
from tool_syntax import KNOWN
from upstream import Upstream, without_user

# ──────────────────────────────────────────────────── profiles ───────────────────────────────────────────────────

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Profile:
    """Defaults, as the users of one server know them. Each is also a flag; what a request says wins."""

    port: int = 8000
    host: str = "localhost"
    stream: bool = False
    max_tokens: int | None = None  # None: what the context has left
    max_tokens_limit: int | None = None
    temperature: float | None = None  # None, here and below: the model's own, else 0.7, 1 and off
    top_p: float | None = None
    top_k: int | None = None
    no_model: str = "default"
    unknown_model: str = "auto"
    roles: tuple[str, ...] = ROLES
    load_wait: float | None = None  # seconds; None: for an only model as long as it takes, else 0
    owned_by: str = "local"

    def sampling(self) -> dict[str, Any]:
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {name: value for name, value in given.items() if value is not None}


LONG = 600.0
PROFILES = {
    "neutral": Profile(),
    "exllamav3": Profile(
        stream=True, max_tokens=200, temperature=0.8, top_p=0.8, top_k=50, unknown_model="serve", load_wait=LONG, owned_by="user"
    ),
    "osaurus": Profile(
        8080, "127.0.0.1", max_tokens=2048, temperature=0.7, top_p=1.0, top_k=0, no_model="refuse", unknown_model="404",
        load_wait=LONG, owned_by="osaurus",
    ),
    "openvino": Profile(
        8000, "0.0.0.0", max_tokens=900, temperature=0.7, top_p=1.0, top_k=0, unknown_model="400", load_wait=LONG
    ),
    "llm-serve": Profile(
        11424, "127.0.0.1", max_tokens=1024, max_tokens_limit=8192, temperature=0.2, top_p=0.95, top_k=0,
        unknown_model="400", roles=("system", "user", "assistant"), load_wait=0.0,
    ),
    "metallama": Profile(
        8080, "0.0.0.0", max_tokens=256, temperature=0.8, top_p=0.95, top_k=40, unknown_model="serve", load_wait=LONG
    ),
}  # fmt: skip


# ────────────────────────────────────────────────── the command line ─────────────────────────────────────────────


def add_args(parser: argparse.ArgumentParser) -> None:
    """The flags that choose, load and limit models."""
    add_model_args(parser.add_argument_group("model"))
    add_default_args(parser.add_argument_group("what a request gets that does not say (default: the profile's)"))
    add_engine_args(parser.add_argument_group("engine"))
    add_llamacpp_args(parser.add_argument_group("llama.cpp"))
    add_limit_args(parser.add_argument_group("limits"))
    add_exllamav3_args(parser)


def add_model_args(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-m", "--model-dir", metavar="PATH", help="serve one model: a .gguf file, or a folder with a model")
    add(
        "--models-dir",
        metavar="DIR",
        help="serve every complete model in DIR; default: ./models where it exists, else a small demo model",
    )
    add("--default-model", metavar="NAME", help="for requests that name no model; loaded at the start")
    add(
        "--preload",
        metavar="NAMES",
        help="models to load at the start, with commas, or none; default: the default or only model",
    )
    add("--max-loaded-models", type=whole(1, 64), default=1, metavar="N", help="models in memory at once (default 1)")
    add(
        "--idle-unload",
        type=seconds,
        default=0.0,
        metavar="S",
        help="unload a model that has been idle so long; default: never",
    )
    add(
        "--load-wait",
        type=seconds,
        metavar="S",
        help="how long a request waits for its model to be loaded, before it gets a 202",
    )
    add("--switch-deadline", type=seconds, default=30.0, metavar="S",
        help="how long a busy model goes on taking requests while another one is asked for (default 30)")  # fmt: skip
    add("--no-model", choices=["default", "refuse"], help="a request without a model")
    add("--unknown-model", choices=["auto", "serve", "404", "400"],
        help="a request for a model that is not there; serve: the default one answers; auto: so where there is only one, else 404")  # fmt: skip
    add("--alias", "--served-model-name", type=alias, action="append", default=[], metavar="[ID=]NAME",
        help="the name that clients see and may ask for; with several models ID=NAME; repeatable")  # fmt: skip
    add("--chat-template", metavar="FILE", help="Jinja chat template to use instead of the model's own")
    add("--tool-syntax", choices=sorted(KNOWN),
        help="how the model writes tool calls, where its chat template does not show it")  # fmt: skip


def add_default_args(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--default-stream", choices=["true", "false"], help="stream chat completions")
    add("--default-max-tokens", type=whole(0, 1 << 30), metavar="N", help="of a chat completion; 0: what the context has left")
    add("--max-tokens-limit", type=whole(0, 1 << 30), metavar="N", help="more is refused; 0: the context is the limit")
    add("--default-temperature", type=between(0, 2), metavar="T", help="0 to 2")
    add("--default-top-p", type=between(1e-6, 1), metavar="P", help="above 0, up to 1")
    add("--default-top-k", type=whole(0, 1 << 30), metavar="K", help="0: off")
    add("--roles", type=roles, metavar="ROLES", help=f"roles that messages may have, with commas; default: {','.join(ROLES)}")


def add_engine_args(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--backend", choices=["auto", *LACKS], default="auto",
        help="auto: openvino for an IR folder; llamacpp for a .gguf where it is installed, else openvino; "
        "exllamav3 for a Hugging Face folder where it can run, else transformers")  # fmt: skip
    add("--upstream", metavar="URL", help="serve what another server serves, with --backend vllm, tensorrt_llm or openai")
    add("--upstream-key-env", metavar="NAME", help="the environment variable that holds the upstream's API key")
    add("--threads", type=whole(1, 1024), default=0, metavar="N", help="threads of the engine; default: one per physical core")
    add("-cs", "--cache-size", type=whole(256, 1 << 30), metavar="TOKENS",
        help="KV cache over all slots; default: up to 4,096 a slot, within a quarter of the memory")  # fmt: skip
    add(
        "--length",
        type=whole(1, 1 << 30),
        metavar="TOKENS",
        help="most tokens of one request; default: what model and cache allow",
    )
    add("--embeddings", action="store_true", help="also embed with a model that generates (llamacpp, transformers)")
    add("--no-model-cache", action="store_true",
        help="convert a GGUF file at each start, instead of keeping what it became in the cache folder (openvino)")  # fmt: skip
    add("-dm", "--draft-model-dir", metavar="PATH",
        help="speculative decoding: a small model of the same vocabulary guesses ahead (exllamav3)")  # fmt: skip
    add("-ngram", "--ngram-match-min", type=whole(0, 64), default=0, metavar="N",
        help="speculative decoding: guess what followed the last N tokens before; 0: off (openvino, llamacpp, exllamav3)")  # fmt: skip
    add("-ndt", "--num-draft-tokens", type=whole(1, 64), metavar="N", help="tokens guessed at once (default 4)")
    add("--step-target", type=between(1, 1e6), default=0.0, metavar="MS",
        help="how long a step may take in which others decode: prompts come in pieces that fit (openvino, llamacpp, transformers; "
        "default: 2 decode steps, at least 150)")  # fmt: skip
    add("--deterministic", action="store_true",
        help="the same text for the same request and seed, whatever else runs (openvino, llamacpp, transformers, on the CPU); slower")  # fmt: skip
    add("--device", default="auto", metavar="NAME",
        help="transformers: cpu, cuda, cuda:1, mps, …, default: a GPU if there is one; "
        "openvino: CPU, GPU, GPU.1, AUTO:GPU,CPU, …, default: CPU")  # fmt: skip
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="what to compute with (transformers, openvino); with float32 greedy text hardly depends on what else runs")  # fmt: skip


CACHE_TYPES = ("f16", "q8_0", "q4_0")
LLAMACPP_FLAGS = ("gpu_layers", "main_gpu", "tensor_split", "mmap", "mlock", "cache_type_k", "cache_type_v")
LIBRARY_FLAGS = {flag: ["llamacpp"] for flag in LLAMACPP_FLAGS} | {"no_model_cache": ["openvino"]}  # EngineSpec.flags


def add_llamacpp_args(group: argparse._ArgumentGroup) -> None:
    """For llama.cpp alone, under the names that llama-server gives them."""
    add = group.add_argument
    add("-ngl", "--gpu-layers", action=GpuLayers, nargs="?", metavar="N", help="layers on GPUs; default: all that fit")
    add("--main-gpu", type=whole(0, 63), metavar="I", help="the GPU for what is not split")
    add("--tensor-split", type=shares, metavar="N,N", help="how much of the model each GPU gets, as proportions")
    add("--mmap", action="store_const", const="on", help="map the file of the weights; default: one of up to 1 GiB is read")
    add("--no-mmap", dest="mmap", action="store_const", const="off", help="read the weights instead of mapping the file")
    add("--mlock", action="store_true", help="keep the weights from being swapped out")
    add("--cache-type-k", choices=CACHE_TYPES, help="of the KV cache's keys (default f16)")
    add("--cache-type-v", choices=CACHE_TYPES, help="of the KV cache's values (default f16)")


class GpuLayers(argparse.Action):
    """-ngl N is llama-server's; -ngl alone is exllamav3's --ngram_lock."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values is None and option_string == "-ngl":
            namespace.exllamav3 = [*namespace.exllamav3, "-ngl"]
            return
        try:
            namespace.gpu_layers = whole(0, 10_000)(values or "")
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from None


def shares(text: str) -> tuple[float, ...]:
    parts = tuple(between(0, 1e6)(part) for part in text.split(","))
    if not sum(parts) or len(parts) > 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not some numbers like 3,1")
    return parts


def add_limit_args(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--max-parallel", "--batch-size", type=whole(1, 256), default=8, metavar="N",
        help="slots: requests that a model runs at once (default 8)")  # fmt: skip
    add("--max-queue", type=whole(-1, 1 << 30), default=32, metavar="N",
        help="requests that may wait for a slot, -1: any number (default 32)")  # fmt: skip
    add("--request-timeout", type=some_seconds, default=600.0, metavar="S",
        help="longest answer; between two chunks when streaming (default 600)")  # fmt: skip
    add("--load-timeout", type=seconds, default=1800.0, metavar="S", help="longest load of a model (default 1800)")
    add("--engine-silence", type=seconds, default=300.0, metavar="S",
        help="an engine that computes and says nothing for so long is started anew (default 300)")  # fmt: skip
    add("--prepare-timeout", type=seconds, default=5.0, metavar="S",
        help="longest time to render a chat template and to compile a constraint (default 5)")  # fmt: skip
    add("--max-choices", type=whole(1, 1 << 20), default=512, metavar="N", help="prompts times n of one request (default 512)")
    add("--max-stop-ids", type=whole(0, 1 << 16), default=256, metavar="N", help="stop_token_ids of one request (default 256)")
    add("--max-constraint", type=whole(1, 1 << 30), default=200_000, metavar="CHARS",
        help="characters of one schema, regex, grammar or list of choices (default 200000)")  # fmt: skip


# The other flags of exllamav3's model_init (1.6.5), "-short --long", those that take a value first.
EXLLAMAV3_VALUES = """-gs --gpu-split, -or --override, -mcl --moe-cpu-offload, -mcs --moe-cpu-split, -mct --moe-cpu-threads,
    -tpb --tp-backend, -tp_attn --tp-max-parallelism-attn, -tp_mlp --tp-max-parallelism-mlp, -tp_moe --tp-max-parallelism-moe,
    -tp_linear --tp-max-parallelism-linear, -tp_linear_attn --tp-max-parallelism-linear-attn, -ambs --autosplit-max-batch-size,
    -chunk_size --chunk-size, -layer_map --layer-map, -cq --cache-quant, -cca --cache-compand-a, -ccs --cpu-cache-size,
    -dcd --disk-cache-dir, -dcs --disk-cache-size, -rcs --recurrent-cache-size, -hdt --hybrid-draft-tokens,
    -ngram_corpus --ngram-corpus, -sdh --sparse-draft-head, -dc --draft-confidence, -dmcl --draft-moe-cpu-layers"""
EXLLAMAV3_SWITCHES = """-lm --load-metrics, -tp --tensor-parallel, -mcpa --moe-cpu-pinned-arena,  --ngram-lock, -ngr --ngram-ram,
    -embd --embed-disk, -tp_moe_ts --tp-moe-tensor-split, -swa_full --swa-full, -lv --load-verbose, -asnf --autosplit-no-forward,
    -nw --no-warmup, -rs32 --recurrent-state-fp32, -mtp --mtp, -dds --dynamic-draft"""


def add_exllamav3_args(parser: argparse.ArgumentParser) -> None:
    """Kept as they stand for exllamav3's own parser; other engines have no use for them, and the log says so."""
    for names, more in ((EXLLAMAV3_VALUES, {}), (EXLLAMAV3_SWITCHES, {"nargs": 0})):
        for pair in names.split(","):
            parser.add_argument(*pair.split(), dest="exllamav3", action=Keep, default=[], help=argparse.SUPPRESS, **more)  # type: ignore[arg-type]


class Keep(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        name = option_string or ""
        name = "--" + name[2:].replace("-", "_") if name.startswith("--") else name
        namespace.exllamav3 = [*namespace.exllamav3, name, *([values] if isinstance(values, str) else [])]


def whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,12}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")
        return int(text)

    return parse


def some_seconds(text: str) -> float:
    if value := seconds(text):
        return value
    raise argparse.ArgumentTypeError("0 s is no time at all: nothing could be answered")


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < 1e9:  # NaN fails it
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def between(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:  # NaN fails it
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value

    return parse


def alias(text: str) -> tuple[str, str]:
    """(the model's name, or "" for the only one; its other name)"""
    asked, _, name = text.rpartition("=")
    if not 0 < len(name) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of 1 to 256 characters, nor ID=NAME")
    return asked, name


def roles(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= {*ROLES}:
        raise argparse.ArgumentTypeError(f"{text!r} is not some of {','.join(ROLES)}")
    return names


def same_dashes(argv: list[str]) -> list[str]:
    """--model_dir is --model-dir; what stands behind a `=` stays."""

    def one(word: str) -> str:
        name, sign, value = word.partition("=")
        return name.replace("_", "-") + sign + value if name.startswith("--") else word

    return [one(word) for word in argv]


def profile_of(args: argparse.Namespace) -> Profile:
    """The profile with what the flags say in its place."""
    stream = None if args.default_stream is None else args.default_stream == "true"
    given = {
        "port": args.port, "host": args.host, "stream": stream, "no_model": args.no_model, "unknown_model": args.unknown_model,
        "temperature": args.default_temperature, "top_p": args.default_top_p, "top_k": args.default_top_k,
        "roles": args.roles, "load_wait": args.load_wait,
    }  # fmt: skip
    profile = replace(PROFILES[args.profile], **{name: value for name, value in given.items() if value is not None})
    if args.default_max_tokens is not None:
        profile = replace(profile, max_tokens=args.default_max_tokens or None)
    if args.max_tokens_limit is not None:
        profile = replace(profile, max_tokens_limit=args.max_tokens_limit or None)
    return profile


def init(args: argparse.Namespace) -> Models:
    """Find the models and the backend that the arguments ask for; nothing is loaded yet. Raises UsageError."""
    catalog = find_models(args)
    template = read_template(args.chat_template)
    profile = profile_of(args)

    def make_spec(model: Model) -> EngineSpec:
        if args.upstream:
            backend = "openai" if args.backend == "auto" else args.backend
            key = os.environ.get(args.upstream_key_env or "", "")
            return EngineSpec(backend, args.upstream, args.max_parallel, key=key)
        backend = choose_backend(model, args.backend)
        for flag in useless_flags(args, backend) if model not in catalog.fixed else ():
            log.warning("%s: %s does nothing here, the engine is %s", model.id, spelled(flag), backend)
        if args.exllamav3 and backend != "exllamav3":
            names = ", ".join(word for word in args.exllamav3 if word.startswith("-"))
            log.warning("%s: for exllamav3 alone, backend %s has no use for it", names, backend)
        embeddings = args.embeddings and backend in WITH_EMBEDDINGS
        path = str(model.path)
        return EngineSpec(
            backend, path, args.max_parallel, args.threads, args.cache_size, template, embeddings, args.length,
            device=args.device, dtype=args.dtype, draft=args.draft_model_dir or "", ngram=args.ngram_match_min,
            draft_tokens=args.num_draft_tokens or 0, tool_syntax=args.tool_syntax or (DEMO_SYNTAX if model.path.name == DEMO_FILE else ""), options=tuple(args.exllamav3), task=model.task, deterministic=args.deterministic, step_target=args.step_target,
            flags=tuple((flag, value) for flag in LIBRARY_FLAGS if (value := getattr(args, flag)) is not None and value is not False),
        )  # fmt: skip

    models = Models(
        catalog,
        make_spec,
        Limits(
            max_jobs=float("inf") if args.max_queue < 0 else args.max_parallel + args.max_queue,
            patience=args.engine_silence,
            load_wait=profile.load_wait,
            longest_wait=args.request_timeout,
            load_timeout=args.load_timeout,
            prepare_timeout=args.prepare_timeout,
            choices=args.max_choices,
            stop_ids=args.max_stop_ids,
            constraint=args.max_constraint,
            max_loaded=args.max_loaded_models,
            idle_unload=args.idle_unload,
            switch_deadline=args.switch_deadline,
            default=args.default_model or (next(iter(catalog.models())) if catalog.fixed else None),
            absent=profile.no_model,
            unknown=profile.unknown_model,
        ),
    )
    backend = None if args.backend == "auto" else args.backend
    check_engine_flags(args, backend)  # first: a flag is mended sooner than a library is installed
    fixed = [models.spec(model).backend for model in catalog.fixed]
    check_engine_flags(args, backend or next(iter(fixed), None))
    for name in [args.default_model, *preloaded(args)]:
        if name and catalog.find(name) is None:
            raise UsageError(f"there is no model {name!r} to load; there are: {', '.join(catalog.models()) or 'none'}")
    return models


UNSET = (None, "", False, 0, "auto")  # what flags are that nobody has given


def engine_flags() -> dict[str, list[str]]:
    """Flags that mean something to some engines only, and to which."""
    draft, ngram = ([name for name, backend in BACKENDS.items() if how in backend.SPECULATES] for how in ("draft", "ngram"))
    return {
        "embeddings": WITH_EMBEDDINGS,
        "device": ["openvino", "transformers"],
        **LIBRARY_FLAGS,
        "dtype": ["openvino", "transformers"],
        "step_target": ["openvino", "llamacpp", "transformers"],
        "deterministic": ["openvino", "llamacpp", "transformers"],
        "draft_model_dir": draft,
        "ngram_match_min": ngram,
    }


def useless_flags(args: argparse.Namespace, backend: str) -> dict[str, list[str]]:
    """Those that were given and that this engine cannot honour, and who can."""
    given = {flag: able for flag, able in engine_flags().items() if getattr(args, flag) not in UNSET}
    return {flag: able for flag, able in given.items() if backend not in able}


def spelled(flag: str) -> str:
    return "--mmap, --no-mmap" if flag == "mmap" else f"--{flag.replace('_', '-')}"


def check_engine_flags(args: argparse.Namespace, backend: str | None) -> None:
    """Refuses what the engine could not honour; None: that depends on the model. Raises UsageError."""
    for flag, able in useless_flags(args, backend).items() if backend else ():
        raise UsageError(f"{spelled(flag)} needs --backend {' or '.join(able)}")
    if args.draft_model_dir and not Path(args.draft_model_dir).exists():
        raise UsageError(f"--draft-model-dir {args.draft_model_dir}: no such file or folder")
    if args.draft_model_dir and (link := leads_out(args.draft_model_dir)):
        raise UsageError(f"--draft-model-dir: {link} is a link that leads out of the folder")
    others = {*args.exllamav3} & {"-mtp", "--mtp", "-hdt", "--hybrid_draft_tokens"}
    if args.num_draft_tokens and not (args.draft_model_dir or args.ngram_match_min or others):
        raise UsageError("--num-draft-tokens needs --draft-model-dir or --ngram-match-min")
    if args.draft_model_dir and args.ngram_match_min:
        raise UsageError("--draft-model-dir and --ngram-match-min exclude each other")
    if args.deterministic:
        check_deterministic(args)


def check_deterministic(args: argparse.Namespace) -> None:
    """What would make a text depend on what else runs. Raises UsageError."""
    for flag, harmless in {"ngram_match_min": 0, "dtype": "float32", "cache_type_v": "f16"}.items():
        if (value := getattr(args, flag)) not in (*UNSET, harmless):
            raise UsageError(f"--deterministic and {spelled(flag)} {value} exclude each other")


def preloaded(args: argparse.Namespace) -> list[str]:
    return [name for name in (args.preload or "").split(",") if name and name != "none"]


def find_models(args: argparse.Namespace) -> Catalog:
    """What --model-dir and --models-dir name. Raises UsageError."""
    if args.upstream or args.backend in UPSTREAMS:
        return Catalog(fixed=[upstream_model(args)], aliases=args.alias)
    fixed = []
    folder = args.models_dir or ("models" if args.model_dir is None and Path("models").is_dir() else None)
    try:
        if folder and not Path(folder).is_dir():
            raise UsageError(f"--models-dir {folder}: no such folder")
        if args.model_dir is not None:
            fixed = [find_model(Path(args.model_dir))]
        elif folder is None:
            fixed = [demo_model()]
    except (OSError, RuntimeError) as error:  # unreadable, too long a name, no home folder, a full disk, …
        raise UsageError(f"{args.model_dir or folder or 'demo model'}: {error}") from None
    catalog = Catalog(Path(folder) if folder else None, fixed, args.profile == "osaurus", args.alias)
    for asked, name in args.alias:
        if not asked and len(catalog.models()) != 1:
            raise UsageError(f"--alias {name}: there are {len(catalog.models())} models, say which: --alias ID={name}")
        if asked and not catalog.alone(asked):
            raise UsageError(
                f"--alias {asked}={name}: there is no model {asked!r}; there are: {', '.join(catalog.models()) or 'none'}"
            )
    return catalog


def upstream_model(args: argparse.Namespace) -> Model:
    """Stands for whatever the upstream serves, until that has told its name. Raises UsageError."""
    if not args.upstream or args.backend not in ("auto", *UPSTREAMS):
        raise UsageError(f"--upstream URL and --backend {' or '.join(UPSTREAMS)} belong together")
    url = urlsplit(args.upstream)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UsageError(f"--upstream {without_user(args.upstream)}: not a URL like http://localhost:8000")
    if args.upstream_key_env and not os.environ.get(args.upstream_key_env):
        raise UsageError(f"--upstream-key-env {args.upstream_key_env}: there is no such environment variable")
    for flag in ("model_dir", "models_dir", "chat_template", "tool_syntax", "cache_size", "length", "record", *engine_flags()):
        if getattr(args, flag, None) not in UNSET:
            raise UsageError(f"{spelled(flag)} has no meaning with --upstream: that server has its own")
    if profile_of(args).top_k and "extensions" in LACKS["openai" if args.backend == "auto" else args.backend]:
        raise UsageError("such an upstream has no top_k: add --default-top-k 0, or take --backend vllm")
    return Model("upstream", Path("upstream"), "upstream", int(time.time()))  # clients are not told where it is


def read_template(path: str | None) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat-template {path}: {error}") from None


# ───────────────────────────────────────────────── the life of a model ───────────────────────────────────────────


class NotReady(Exception):
    """No engine to take the request (HTTP 503)."""


class UnknownModel(Exception):
    """No served model answers to the name, or there is no name and the profile asks for one."""


class StillLoading(Exception):
    """The model is on its way into memory (HTTP 202)."""

    def __init__(self, model: str, current: str | None):
        super().__init__(f"{model} is being loaded")
        self.model, self.current = model, current


class Conflict(Exception):
    """Another model is on its way into memory, or this one on its way out (HTTP 409)."""

    def __init__(self, current: str | None, message: str):
        super().__init__(message)
        self.current = current


MOVES = {  # the life of a model: what may follow what
    "unloaded": {"loading"},
    "loading": {"loaded", "loading", "failed"},
    "loaded": {"draining", "loading", "failed"},  # loading: its engine died, and a new one comes at once
    "draining": {"unloaded"},
    "failed": {"loading"},
}
IN_MEMORY = ("loading", "loaded", "draining")
RETRY_S = 2  # what a client is told to wait before it asks again for a model that is being loaded
HOLD_S = 5.0  # so long a model that was promised by a 202 stays for the client to come back, and so long a failure is told
PROMISE_S = 60.0  # after this a client that was promised a model is a new one


AnyEngine = Engine | Upstream


@dataclass(frozen=True, slots=True)
class Limits:
    """What Models may do."""

    max_jobs: float = 40  # requests per model, running and waiting
    patience: float = 300.0  # seconds: an engine with work that computes and says nothing for so long is ended
    load_wait: float | None = None  # seconds that a request waits for its model; None: for an only model `longest_wait`, else 0
    longest_wait: float = LONG
    load_timeout: float = 1800.0  # seconds that a model may take to be loaded
    prepare_timeout: float = 5.0  # seconds that the workshop may take for one request
    choices: int = 512  # prompts times n of a request
    stop_ids: int = 256  # of a request
    constraint: int = 200_000  # characters of a request's constraint
    max_loaded: int = 1
    idle_unload: float = 0.0  # seconds without work after which a model leaves memory; 0: never
    switch_deadline: float = 30.0  # seconds that a busy model goes on taking requests while another is asked for
    default: str | None = None  # the model of requests that name none
    absent: str = "default"  # or "refuse": a request that names no model
    unknown: str = "auto"  # a name that fits no model: "serve" the default; refuse: "404", "400"; auto: serve an only model


class Life:
    """One model's engine, and how far it is. Belongs to Models, and changes only under its lock."""

    def __init__(self, model: Model):
        self.model = model
        self.state = "unloaded"
        self.since = time.monotonic()  # when the state last changed
        self.engine: AnyEngine | None = None
        self.failure = ""  # why the last load or engine failed
        self.used = 0.0  # when it last had a job
        self.waiters = 0  # requests that wait for it to be loaded
        self.promised: dict[str, float] = {}  # clients that got a 202 for it and have not come back, and when they got it
        self.unlisted_since = 0.0  # when its files were first missed
        self.was_ready = False  # since it was last unloaded: an engine that dies is then replaced
        self.comes_back = False  # it is loaded because another could not be
        self.pause, self.born, self.restart_at = 0.0, 0.0, 0.0
        self.restarts = 0  # how often an engine of it has died and been replaced

    @property
    def hangs(self) -> bool:
        return self.engine is not None and self.engine.hangs

    def move(self, state: str) -> None:
        if state not in MOVES[self.state]:
            raise RuntimeError(f"{self.model.id} cannot go from {self.state} to {state}")
        self.state, self.since = state, time.monotonic()

    @property
    def progress(self) -> float:
        """0..1"""
        if self.state == "loading" and self.engine:
            return self.engine.progress
        return float(self.state in ("loaded", "draining"))

    def jobs(self) -> int:
        return len(self.engine.jobs) if self.engine else 0

    def wanted(self, now: float) -> bool:
        """Is there anyone whom unloading it would hurt?"""
        return bool(self.jobs() or self.waiters or (self.promised and now < self.since + HOLD_S))


@dataclass(slots=True)
class Switch:
    """`target` comes into memory in the place of `victim`, once that has nothing to do or the deadline has passed."""

    target: Life
    victim: Life
    deadline: float


class Models:
    """Which models are in memory. One lock; every move of a Life happens under it.

    Requests only ask (`acquire`). What takes time a keeper thread does: it unloads what has drained, then loads what was
    asked for, and brings back an engine that died; at once, but one that dies again soon after a pause that grows to a minute.
    """

    def __init__(self, catalog: Catalog, make_spec: Callable[[Model], EngineSpec], limits: Limits):
        self.catalog, self.make_spec, self.limits = catalog, make_spec, limits
        self.changed = threading.Condition()  # the lock, and what waiters wait on
        self.lives: dict[str, Life] = {}
        self.specs: dict[Model, EngineSpec] = {}
        self.switch: Switch | None = None
        self.last_error = ""  # why the last load or engine failed, until one succeeds
        self.closing = False
        self.on_ready: Callable[[AnyEngine], None] = lambda engine: None
        self.on_progress: Callable[[Life], None] = lambda life: None
        self.on_fatal: Callable[[str], None] = lambda reason: None  # the only model cannot be loaded: there is nothing to serve

    # ── what requests ask for ──

    def spec(self, model: Model) -> EngineSpec:
        """How to load the model. Raises UsageError when nothing here can."""
        if model not in self.specs:
            self.specs[model] = self.make_spec(model)
        return self.specs[model]

    def backend(self, model: Model) -> str:
        """The engine that loads the model, or would if it were installed."""
        try:
            return self.spec(model).backend
        except UsageError:
            return next(iter(LOADERS[model.kind]), "")

    def resolve(self, name: str | None) -> Model:
        """The model that a request means. Raises UnknownModel, and NotReady when there is none at all."""
        if name and (found := self.catalog.find(name)):
            return found
        if not name and self.limits.absent == "refuse":
            raise UnknownModel("'model' is required")
        models = self.catalog.models()
        if name and not (self.limits.unknown == "serve" or (self.limits.unknown == "auto" and len(models) == 1)):
            fits = self.catalog.fits(name)
            known = [self.catalog.public(model) for model in models.values()]
            hint = f"it fits {' and '.join(fits)}" if fits else f"the models are: {', '.join(known[:10]) or 'none'}"
            raise UnknownModel(f"There is no model {name!r}; {hint}")
        return self.default()

    def default(self) -> Model:
        """For a request that names none: --default-model, else the one in memory, else the first."""
        models = self.catalog.models()
        if self.limits.default and (found := self.catalog.find(self.limits.default)):
            return found
        if (current := self.current("loaded", "draining", "loading")) and current.model.id in models:
            return current.model
        if not models:
            raise NotReady(f"there is no complete model in {self.catalog.root}")
        return next((model for model in models.values() if self.loadable(model)), next(iter(models.values())))

    def loadable(self, model: Model) -> bool:
        try:
            return bool(self.spec(model))
        except UsageError:
            return False

    def acquire(self, model: Model, client: str, gone: Callable[[], bool], wait: float | None = None) -> AnyEngine:
        """The model's engine, as soon as it is ready, within `wait` seconds (None: --load-wait).

        Raises StillLoading, Conflict, NotReady, UsageError, QueueFull. `gone` is asked now and then whether the client has left.
        """
        until = time.monotonic() + (self.load_wait() if wait is None else wait)
        with self.changed:
            life = self.life(model)
            if life.waiters >= self.limits.max_jobs:
                raise QueueFull
            life.waiters += 1
            try:
                while not (life.state == "loaded" and life.engine and life.engine.ready):
                    self.want(life, client)
                    if time.monotonic() >= until or gone():
                        raise self.not_yet(life, client)
                    self.changed.wait(0.1)
                life.used = time.monotonic()
                life.promised.pop(client, None)
                return life.engine
            finally:
                life.waiters -= 1

    def submit(
        self, model: Model, start: Callable[[AnyEngine], Job], client: str, gone: Callable[[], bool], wait: float | None
    ) -> Job:
        """A job in the model's engine, made by `start`. Raises as acquire does."""
        while True:
            engine = self.acquire(model, client, gone, wait)
            try:
                return start(engine)
            except EngineFailed:
                continue  # it died or drained in between: ask again

    def load_wait(self) -> float:
        if self.limits.load_wait is not None:
            return self.limits.load_wait
        return self.limits.longest_wait if len(self.catalog.models()) == 1 else 0.0

    def life(self, model: Model) -> Life:
        life = self.lives.setdefault(model.life, Life(model))
        if life.state in ("unloaded", "failed"):
            life.model = model  # the file may be a new one
        return life

    def want(self, life: Life, client: str) -> None:
        """Bring the model into memory if that can begin now. Raises UsageError when it never can, NotReady when it has just failed."""
        if self.closing:
            raise NotReady("the server is shutting down")
        now = time.monotonic()
        if life.state == "failed":
            # Each client to whom it was promised is told once, before it is tried again.
            promised = now - life.promised.pop(client, -PROMISE_S) < PROMISE_S
            if life.restart_at or promised or now < life.since + HOLD_S:
                raise NotReady(f"the model failed: {life.failure}")
        if life.state == "loading" and life.model.kind == "upstream":
            why = life.engine.why if isinstance(life.engine, Upstream) and life.engine.why else "it has not answered"
            raise NotReady(f"the upstream server is not there yet: {why}")
        if life.state not in ("unloaded", "failed") or self.switch:
            return
        self.spec(life.model)
        life.was_ready = False  # whatever it was before: if it cannot be loaded now, that is told, and not tried for ever
        if self.room():
            self.start(life)
        elif loaded := [other for other in self.lives.values() if other.state == "loaded"]:
            victim = min(loaded, key=lambda other: (other.wanted(now), other.used))
            self.switch = Switch(life, victim, now + self.limits.switch_deadline)
            log.info("switching from %s to %s", victim.model.id, life.model.id)
            self.changed.notify_all()

    def room(self) -> bool:
        return sum(life.state in IN_MEMORY for life in self.lives.values()) < self.limits.max_loaded

    def not_yet(self, life: Life, client: str) -> Exception:
        current = self.current("loaded", "draining")
        in_memory = self.catalog.public(current.model) if current else None
        if life.state == "loading" or (self.switch and self.switch.target is life):
            if len(life.promised) < 1000:
                life.promised[client] = time.monotonic()
            return StillLoading(self.catalog.public(life.model), in_memory)
        if life.state == "failed":
            return NotReady(f"the model failed: {life.failure}")
        target = self.switch.target if self.switch else self.current("loading")
        going = f"the server is switching to {target.model.id}" if target else f"{life.model.id} is being unloaded"
        return Conflict(in_memory, going)

    def unload(self, model: Model) -> Life:
        """Take a model out of memory once it has answered what it has begun. Raises Conflict where it is on its way."""
        with self.changed:
            life = self.life(model)
            if life.state == "loading" or (self.switch and life in (self.switch.target, self.switch.victim)):
                raise Conflict(None, f"{model.id} is being loaded or switched; try again when that has ended")
            life.restart_at = 0.0
            if life.state == "loaded":
                self.drain(life)
            return life

    # ── what is told ──

    def current(self, *states: str) -> Life | None:
        """The model in memory that was used last; where there is none, the one on its way, or the one that failed."""
        for state in states or ("loaded", "draining", "loading", "failed"):
            if found := [life for life in list(self.lives.values()) if life.state == state]:
                return max(found, key=lambda life: life.used)
        return None

    @property
    def engine(self) -> AnyEngine | None:
        """The current model's."""
        current = self.current()
        return current.engine if current else None

    @property
    def ready(self) -> bool:
        """Can a request be taken? A model that is unloaded on purpose can: asking for it brings it back."""
        states = {life.model.life: "failed" if life.hangs else life.state for life in list(self.lives.values())}
        if self.switch or not {"loading", "draining"}.isdisjoint(states.values()):
            return "loaded" in states.values()
        return any(states.get(model.life) != "failed" for model in self.catalog.models().values())

    def status(self) -> str:
        return "switching" if self.switch else "degraded" if self.last_error else "ok" if self.ready else "starting"

    def status_of(self, model: Model) -> str:
        """One of loaded, loading, unloaded, failed."""
        if model.broken:
            return "failed"
        life, switch = self.lives.get(model.life), self.switch
        if life is None:
            return "unloaded"
        return "loading" if switch and switch.target is life else "loaded" if life.state == "draining" else life.state

    def failure_of(self, model: Model) -> str:
        """Why its status is failed."""
        life = self.lives.get(model.life)
        return model.broken or (life.failure if life and life.state == "failed" else "")

    def queue_depth(self) -> int:
        lives = list(self.lives.values())
        return sum(life.waiters + (life.engine.queue_depth() if life.engine else 0) for life in lives)

    def slots(self) -> int:
        """Of all engines that are ready: so many requests run at once."""
        return sum(engine.spec.slots for engine in self.engines() if engine.ready)

    def running(self) -> int:
        """Jobs that are waiting or generating."""
        return sum(life.waiters + life.jobs() for life in list(self.lives.values()))

    # ── what happens to a model ──

    def preload(self, names: Collection[str]) -> None:
        """Load these, and start the keeper. Without names: the default model, if it is clear which that is. Raises UsageError."""
        models = self.catalog.models()
        if not names and (self.limits.default or len(models) == 1):
            names = [self.default().id]
        with self.changed:
            for model in filter(None, map(self.catalog.find, names)):
                self.spec(model)
                if self.room() and self.life(model).state == "unloaded":
                    self.start(self.life(model))
        threading.Thread(target=self.keep, name="keeper", daemon=True).start()

    def start(self, life: Life) -> None:
        """Start an engine process; returns at once. Under the lock."""
        if self.closing:
            return
        life.born, life.restart_at = time.monotonic(), 0.0
        life.move("loading")
        try:
            spec = self.spec(life.model)
            if link := leads_out(spec.path):
                raise UsageError(f"{link} is a link that leads out of the model's folder")
            kind: type[AnyEngine] = Upstream if spec.backend in UPSTREAMS else Engine
            limits, timeouts = self.limits, Timeouts(self.limits.prepare_timeout, self.limits.load_timeout)
            life.engine = kind(
                spec, limits.max_jobs, limits.patience, lambda engine: self.engine_changed(life, engine), timeouts
            )
            log.info("loading %s with %s", without_user(spec.path), spec.backend)
        except Exception as error:  # no file numbers, no memory, no thread left: later, maybe
            self.failed(life, f"cannot start the engine: {error}")
            life.restart_at = time.monotonic() + 5.0 if life.was_ready else 0.0
        self.changed.notify_all()

    def failed(self, life: Life, reason: str) -> None:
        """A load came to nothing. Under the lock."""
        log.error("%s", reason)
        life.move("failed")
        life.failure = self.last_error = public(reason)
        if self.switch and self.switch.target is life:
            victim, self.switch = self.switch.victim, None
            if victim.state in ("unloaded", "failed"):
                victim.comes_back = True
                self.start(victim)
        self.changed.notify_all()

    def drain(self, life: Life) -> None:
        """No more requests for it; those in its queue are told. Under the lock."""
        life.move("draining")
        if life.engine:
            life.engine.drop_waiting(self.catalog.public(life.model))
        self.changed.notify_all()

    def engine_changed(self, life: Life, engine: AnyEngine) -> None:
        """From the engine's reader thread: progress, ready, or dead."""
        if engine.dead is not None:
            self.engine_died(life, engine)
        elif engine.info is None:
            self.on_progress(life)
        else:
            with self.changed:
                if life.engine is engine and life.state == "loaded":  # an upstream serves other models than before
                    self.tell_names(life, engine.info)
                if life.engine is not engine or life.state != "loading":
                    return
                life.move("loaded")
                life.used, life.failure, life.was_ready = life.since, "", True
                self.last_error = self.last_error if life.comes_back else ""
                life.comes_back = False
                if self.switch and self.switch.target is life:
                    self.switch = None
                self.tell_names(life, engine.info)
                self.changed.notify_all()
            log.info("%s is ready", life.model.id)
            self.on_ready(engine)

    def tell_names(self, life: Life, info: EngineInfo) -> None:
        if info.models:
            self.catalog.show(life.model, info.models)

    def engine_died(self, life: Life, engine: AnyEngine) -> None:
        reason = engine.dead or ""
        with self.changed:
            if self.closing or life.engine is not engine or life.state not in ("loading", "loaded"):
                return  # it was told to
            if not life.was_ready:
                self.failed(life, reason)
                fatal = not self.catalog.root and len(self.lives) == 1
            else:
                fatal = False
                self.replace(life, engine, reason)
        if fatal:
            self.on_fatal(reason)

    def replace(self, life: Life, engine: AnyEngine, reason: str) -> None:
        """A new engine for one that was ready once and died. Under the lock."""
        now = time.monotonic()
        pause = 0.0 if now - life.born > 30 else life.pause
        life.pause = min(60.0, max(1.0, pause * 2))
        life.failure = self.last_error = public(reason)
        leaves = self.switch is not None and self.switch.victim is life  # another is about to take its place
        # A request waits for an engine that comes back at once; otherwise it is told.
        life.move("loading" if engine.info and pause <= 2 and not leaves else "failed")
        life.restart_at = 0.0 if leaves else now + pause
        life.restarts += not leaves
        life.was_ready = not leaves  # should it come back, that is a load like any other
        log.error("%s%s", reason, "" if leaves else f"; starting it again{f' in {pause:.0f} s' if pause else ''}")
        self.changed.notify_all()

    # ── the keeper ──

    def keep(self) -> None:
        while not self.closing:
            try:
                present = {model.life for model in self.catalog.models().values()}
                with self.changed:
                    empty = self.next_move(time.monotonic(), present)
                    if empty is None:
                        moving = self.switch or any(life.state == "draining" for life in self.lives.values())
                        self.changed.wait(0.02 if moving else 0.5)
                if empty:
                    self.unload_now(empty)
            except Exception:  # the keeper keeps
                log.exception("keeper")
                time.sleep(1)

    def next_move(self, now: float, present: Collection[str]) -> Life | None:
        """Whatever is due. The answer is a model that has drained, to be unloaded outside the lock. Under the lock."""
        for life in list(self.lives.values()):
            if life.jobs():
                life.used = now
            if life.state == "draining" and (life.engine is None or life.engine.retire()):
                return life
            if life.restart_at and now >= life.restart_at:
                life.restart_at = 0.0
                if life.state == "loading" or self.room():
                    self.start(life)
            idle = 0 < self.limits.idle_unload < now - life.used
            life.unlisted_since = 0.0 if life.model.life in present else life.unlisted_since or now
            gone = life.unlisted_since and now - life.unlisted_since > 2 * self.catalog.RESCAN_S  # not by one bad look
            if life.state == "loaded" and (idle or gone) and not life.wanted(now) and not self.switch:
                log.info("unloading %s: %s", life.model.id, "nobody has asked for it" if idle else "its files are gone")
                self.drain(life)
        if switch := self.switch:
            victim = switch.victim
            if victim.state == "loaded" and (now >= switch.deadline or not victim.wanted(now)):
                self.drain(victim)
            elif victim.state not in IN_MEMORY and switch.target.state not in IN_MEMORY:
                self.start(switch.target)
        return None

    def unload_now(self, life: Life) -> None:
        assert life.engine is not None
        life.engine.close()
        with self.changed:
            life.engine, life.was_ready = None, False
            life.promised.clear()
            life.move("unloaded")
            self.changed.notify_all()
        log.info("unloaded %s", life.model.id)

    # ── the end ──

    def stop_restarting(self) -> None:
        self.closing = True

    def engines(self) -> list[AnyEngine]:
        return [life.engine for life in list(self.lives.values()) if life.engine]

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for engine in self.engines():
            engine.close()
