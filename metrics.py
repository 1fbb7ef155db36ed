"""What is counted, and how Prometheus reads it (text format 0.0.4). Nothing here knows HTTP.

Requests are counted once, when they have ended; what the server is doing at the moment is looked up when somebody asks. The one
thing that is taken per token, the time between two of them, goes into a Tally of the request's own, without a lock.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from model_init import Models

PREFIX = "oae_"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SERIES = 1000  # of one family at most: what comes from outside may not fill the memory
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Family(NamedTuple):
    kind: str  # counter | gauge | histogram
    help: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()  # of a histogram's buckets, without the last, which has none


FAMILIES = {  # every name that is told; docs/metrics.md says what vLLM calls it
    "requests_total": Family("counter", "Requests that have been answered; status 499: the client had left", ("method", "route", "status")),
    "refused_total": Family("counter", "Requests that got a 4xx, by the error's code", ("code",)),
    "cancelled_total": Family("counter", "Requests whose client left before the answer was whole", ("route",)),
    "completions_total": Family("counter", "Choices that were begun, by how they ended", ("model", "finish_reason")),
    "prompt_tokens_total": Family("counter", "Tokens of prompts", ("model",)),
    "cached_tokens_total": Family("counter", "Of these, tokens that were found in the KV cache", ("model",)),
    "completion_tokens_total": Family("counter", "Tokens that were generated", ("model",)),
    "engine_restarts_total": Family("counter", "Engines that died and were replaced", ("model",)),
    "requests_running": Family("gauge", "Requests that have a slot", ("model",)),
    "requests_waiting": Family("gauge", "Requests that wait for a slot, or for their model", ("model",)),
    "slots": Family("gauge", "Requests that run at once at most", ("model",)),
    "kv_tokens_used": Family("gauge", "Tokens of the requests that run, in the KV cache", ("model",)),
    "kv_tokens": Family("gauge", "Tokens that the KV cache has room for", ("model",)),
    "models": Family("gauge", "Models that are served, by state", ("state",)),
    "resident_memory_bytes": Family("gauge", "Memory of the server and of each engine process", ("process", "model")),
    "time_to_first_token_seconds": Family("histogram", "From the request to its first token", ("model",),
        (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)),
    "inter_token_latency_seconds": Family("histogram", "Between two tokens of a choice", ("model",),
        (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)),
    "request_seconds": Family("histogram", "From the request to its last token", ("model",),
        (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)),
    "queue_seconds": Family("histogram", "In the engine's queue, waiting for a slot", ("model",),
        (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120)),
    "request_prompt_tokens": Family("histogram", "Tokens of one request's prompts", ("model",),
        (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)),
}  # fmt: skip


class Tally:
    """Counts by bucket, and the sum of what was counted. Not locked: it is one thread's own, or under Metrics' lock."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, family: str):
        self.bounds = FAMILIES[family].bounds
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def add(self, other: Tally) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class Counted(Protocol):
    """What is asked of a completion, running or ended."""

    prompt_tokens: int
    cached_tokens: int | None
    tokens: int

    def finishes(self) -> Iterable[str]: ...


Labels = tuple[str, ...]


class Metrics:
    """The counters of one server."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards all of these
        self.counters: dict[str, dict[Labels, float]] = {name: {} for name, f in FAMILIES.items() if f.kind == "counter"}
        self.histograms: dict[str, dict[Labels, Tally]] = {name: {} for name, f in FAMILIES.items() if f.kind == "histogram"}
        self.live: dict[int, tuple[str, Counted]] = {}  # completions that are being generated, with their models, by id()

    def count(self, family: str, *labels: str, by: float = 1) -> None:
        with self.lock:
            self.add(family, labels, by)

    def add(self, family: str, labels: Labels, by: float) -> None:
        """Under the lock."""
        series = self.counters[family]
        if labels not in series and len(series) >= SERIES:
            labels = ("other",) * len(labels)
        series[labels] = series.get(labels, 0) + by

    def observe(self, family: str, model: str, value: float | Tally) -> None:
        """Under the lock."""
        series = self.histograms[family]
        tally = series.get((model,)) or series.setdefault((model,), Tally(family))
        tally.add(value) if isinstance(value, Tally) else tally.observe(value)

    def answered(self, method: str, route: str, status: int) -> None:
        """Any request; `route` is one of the server's own, or ""."""
        with self.lock:
            self.add("requests_total", (method if method.isalpha() else "other", route or "other", str(status)), 1)
            if status == 499:
                self.add("cancelled_total", (route or "other",), 1)

    def begin(self, model: str, completion: Counted) -> None:
        self.live[id(completion)] = (model, completion)

    def forget(self, completion: Counted) -> None:
        """Of one that was begun, and whose end nobody tells. Harmless when it has ended."""
        self.live.pop(id(completion), None)

    def end(self, completion: Counted, gaps: Tally | None, queued: float, first: float, whole: float) -> None:
        """A completion that was begun has ended, well or not. Seconds; 0: it never came to that."""
        model, _ = self.live.pop(id(completion))
        with self.lock:
            for finish in completion.finishes():
                self.add("completions_total", (model, finish), 1)
            self.add("prompt_tokens_total", (model,), completion.prompt_tokens)
            self.add("cached_tokens_total", (model,), completion.cached_tokens or 0)
            self.add("completion_tokens_total", (model,), completion.tokens)
            if completion.prompt_tokens:
                self.observe("request_prompt_tokens", model, completion.prompt_tokens)
                self.observe("queue_seconds", model, queued)
            if first:
                self.observe("time_to_first_token_seconds", model, first)
                self.observe("request_seconds", model, whole)
            if gaps:
                self.observe("inter_token_latency_seconds", model, gaps)

    def render(self, models: Models) -> bytes:
        """All families as text: what was counted, and what is the case now."""
        gauges = now(models, self.live)
        with self.lock:
            counters = {name: dict(series) for name, series in self.counters.items()}
            tallies = {
                name: [(labels, list(t.counts), t.sum) for labels, t in s.items()] for name, s in self.histograms.items()
            }
        counters["engine_restarts_total"] = {(life.model.id,): life.restarts for life in list(models.lives.values())}
        lines: list[str] = []
        for name, family in FAMILIES.items():
            lines += (f"# HELP {PREFIX}{name} {family.help}", f"# TYPE {PREFIX}{name} {family.kind}")
            if family.kind == "histogram":
                for labels, counts, total in tallies[name]:
                    lines += histogram(name, family, labels, counts, total)
            else:
                series = counters[name] if family.kind == "counter" else gauges.get(name, {})
                lines += [sample(name, family.labels, labels, value) for labels, value in series.items()]
        return ("\n".join(lines) + "\n").encode()


def now(models: Models, live: dict[int, tuple[str, Counted]]) -> dict[str, dict[Labels, float]]:
    """The gauges."""
    told: dict[str, dict[Labels, float]] = {name: {} for name, family in FAMILIES.items() if family.kind == "gauge"}
    memory = told["resident_memory_bytes"]
    memory["server", ""] = resident(os.getpid())
    states = dict.fromkeys(("loaded", "loading", "unloaded", "failed"), 0)
    lives = list(models.lives.values())
    for life in lives:
        states[models.status_of(life.model)] += 1
        name, engine = (life.model.id,), life.engine
        waiting = engine.queue_depth() if engine else 0
        told["requests_waiting"][name] = life.waiters + waiting
        told["requests_running"][name] = life.jobs() - waiting
        if engine and engine.info:
            told["slots"][name] = engine.info.slots
            told["kv_tokens"][name] = engine.info.cache_tokens
            told["kv_tokens_used"][name] = 0
        process = getattr(engine, "process", None)
        if process and process.pid and process.exitcode is None:
            memory["engine", life.model.id] = resident(process.pid)
    for model, completion in list(live.values()):
        if (model,) in told["kv_tokens_used"]:
            told["kv_tokens_used"][model,] += completion.prompt_tokens + completion.tokens
    states["unloaded"] += max(0, len(models.catalog.models()) - len(lives))
    told["models"] = {(state,): count for state, count in states.items()}
    told["resident_memory_bytes"] = {labels: size for labels, size in memory.items() if size}
    return told


def resident(pid: int) -> int:
    """Bytes; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/statm") as f:
            return int(f.read().split()[1]) * PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0


def histogram(name: str, family: Family, labels: Labels, counts: Sequence[int], total: float) -> Iterator[str]:
    """Cumulative buckets, as the format wants them."""
    so_far = 0
    for bound, count in zip([*map(number, family.bounds), "+Inf"], counts, strict=True):
        so_far += count
        yield sample(f"{name}_bucket", (*family.labels, "le"), (*labels, bound), so_far)
    yield sample(f"{name}_sum", family.labels, labels, total)
    yield sample(f"{name}_count", family.labels, labels, so_far)


def sample(name: str, names: Labels, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{escaped(label)}"' for key, label in zip(names, labels, strict=True))
    return f"{PREFIX}{name}{{{inside}}} {number(value)}"


def escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
