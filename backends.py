"""Engines: tokens, sequences and native libraries. Nothing here knows HTTP or the OpenAI schema.

The law: one engine process per loaded model; in it, one thread is the only one that ever touches the native library;
a producer never waits for a consumer.

Server process                                   Engine process (spawned, one per loaded model)
  handler threads: Engine.submit() -> Job          run_engine: EngineLoop over one Backend
  writer thread:   outbox ──── pipe ────────────►    receive() -> admit() -> step() -> one message of events
  reader thread:   Job.events ◄──── pipe ────────┘   EOF on the pipe is how either side learns of the other's death
"""

from __future__ import annotations

import codecs
import ctypes
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import pickle
import queue
import random
import select
import signal
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, NamedTuple, Protocol

log = logging.getLogger("openai_api_endpoint")

# ───────────────────────────────────────────── what crosses the pipe ─────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to complete: chat messages for the model's template, or text, or token ids; exactly one of the three."""

    messages: tuple[dict[str, Any], ...] | None = None  # [{role, content: str, ...}]
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    generation_prompt: bool = True  # end with the beginning of an assistant message
    continue_final: bool = False  # end inside the last message, for the model to go on
    template_kwargs: dict[str, Any] = field(default_factory=dict)  # more variables for the template
    details: bool = False  # Details are wanted

    def least_tokens(self) -> int:
        """Taken for a lower bound before the prompt costs anything. Text of over 32 characters per token is not text."""
        if self.messages is not None:
            return max(len(self.messages), sum(len(m["content"]) for m in self.messages) // 32)
        return len(self.tokens) if self.tokens is not None else len(self.text or "") // 32


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. None means: the model's own generation_config, else FALLBACK. top_k 0 is off."""

    max_tokens: int | None = None  # None: what the context has left after the prompt; 0 only with echo
    cut: bool = False  # max_tokens is a default: cut down to what the context has left, instead of refused
    temperature: float | None = None  # 0 is greedy
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0  # over the completion so far
    frequency_penalty: float = 0.0  # over the completion so far
    repetition_penalty: float = 1.0  # over prompt and completion
    seed: int | None = None  # choice i of a request uses seed + i
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # until then no EOS is sampled, and nothing ends the completion
    ignore_eos: bool = False
    n: int = 1
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, -100..100); -100 bans
    logprobs: int | None = None  # log-softmax of the raw logits, with so many alternatives; None: not wanted
    echo: bool = False  # the prompt comes first, with logprobs of its own where they are wanted
    grammar: str | None = None  # GBNF that the completion must follow

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


MANY_PROMPTS = 8  # in one request; more are read one by one between steps
FALLBACK = {"temperature": 0.7, "top_p": 1.0, "top_k": 0}  # where neither the request nor the model says


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has taken the request: the first event of every job that is not refused."""

    prompt_tokens: int
    cached_tokens: int | None  # None: this engine cannot tell, and we do not guess
    at: float = 0.0  # seconds on the engine's monotonic clock


@dataclass(frozen=True, slots=True)
class Details:
    """What the model is really given: the prompt after its template, its token ids, the sampling with every default filled in."""

    prompt: str
    prompt_token_ids: list[int]
    sampling: dict[str, Any]


class TokenLogprob(NamedTuple):
    """One token's log probability under the raw logits, and the best alternatives as (bytes, logprob)."""

    data: bytes  # UTF-8, maybe half a character
    logprob: float | None  # None: a prompt's first token has none
    top: tuple[tuple[bytes, float], ...] = ()
    shown: bool = True  # False: it ended the completion, and is not part of its text


class Delta(NamedTuple):  # the one that crosses for every token: a tuple is pickled in C, a slotted dataclass in Python
    """What one step added to one choice. `text` may be empty: half a character, or the beginning of a stop string."""

    choice: int
    text: str
    tokens: int
    finish: str | None = None  # "stop" | "length", set on a choice's last delta
    logprobs: tuple[TokenLogprob, ...] = ()
    at: float = 0.0  # seconds on the engine's monotonic clock


@dataclass(frozen=True, slots=True)
class Answer:
    """The one event of a call that generates nothing: tokens, text or embeddings."""

    value: Any


class Refused(Exception):
    """This model can never serve this request; the client is told why (HTTP 400)."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message, param, code)  # all of them in args, or it would not survive the pipe
        self.message, self.param, self.code = message, param, code


class EngineFailed(Exception):
    """The engine broke under this request, or died (HTTP 500)."""


class Unloading(EngineFailed):
    """The model `current` leaves memory before the job has got a slot."""

    def __init__(self, current: str):
        super().__init__(f"{current} is being unloaded")
        self.current = current


class QueueFull(Exception):
    """All slots are busy and the queue is full (HTTP 429)."""


Event = Started | Details | Delta | Answer | Refused | EngineFailed | QueueFull


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """All that an engine process needs to load a model."""

    backend: str
    path: str
    slots: int = 8  # sequences decoded in one batch
    threads: int = 0  # 0: one per physical core
    cache_tokens: int | None = None  # KV cache over all slots; None: default_cache_tokens()
    chat_template: str | None = None  # Jinja source that takes the place of the model's own
    embeddings: bool = False  # also load what is needed for embeddings
    length: int | None = None  # most tokens that a request may use; None: what the model and the cache allow
    key: str = field(default="", repr=False)  # of an upstream


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the engine turned out to be, once loaded."""

    backend: str
    library: str  # name and version
    slots: int
    threads: int
    context: int  # tokens one request may use, prompt and completion together
    cache_tokens: int
    fingerprint: str  # changes with weights, library and batch settings
    tokenizer: dict[str, str | None] = field(default_factory=dict)  # bos_token, eos_token, chat_template
    model: str = ""  # an upstream's name for what it serves


# ──────────────────────────────────────────────── the seam: a backend ────────────────────────────────────────────


class Scored(NamedTuple):
    """A token's log probability, and the best alternatives as (token id, logprob)."""

    logprob: float | None
    top: Sequence[tuple[int, float]] = ()


class Step(NamedTuple):
    """What a step brought one sequence."""

    seq: int
    tokens: Sequence[int]
    logprobs: Sequence[Scored] = ()  # one for each token, where wanted
    scores: Sequence[Scored] = ()  # one for each prompt token, with the first of `tokens`, where wanted
    refused: Refused | None = None  # the sequence cannot go on: its job is told so, and ends


class Backend(Protocol):
    """A binding to one library. Constructed, used and closed by one thread of the engine process.

    `start` takes the token ids of a prompt and returns (seq, tokens found in the KV cache, or None when unknown);
    `step` advances every started sequence as far as one batch goes and returns the new token ids of each;
    `cancel` frees a sequence's slot, also of one that has ended. Which tokens end a completion, what text they are
    and how many may come is the loop's business. A binding may stop a sequence by itself, never emit past the end.
    """

    LIBRARY: ClassVar[str]  # the module to import
    INSTALL: ClassVar[str]  # what `pip install` brings it
    LACKS: ClassVar[frozenset[str]]  # names out of FEATURES
    library: str  # what was imported, with its version
    slots: int
    threads: int
    context: int
    cache_tokens: int
    vocabulary: int  # token ids are below it
    bos: int  # -1: none
    eos: frozenset[int]
    defaults: dict[str, float]  # the model's own sampling
    template: ChatTemplate

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]): ...  # loads; progress is 0..1
    def tokenize(self, text: str, add_special: bool) -> list[int]: ...  # special tokens in the text are always read as such
    def piece(self, token: int, special: bool) -> bytes: ...  # UTF-8; special tokens are empty unless `special`
    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]: ...
    def step(self) -> Iterable[Step]: ...
    def cancel(self, seq: int) -> None: ...
    def embed(self, ids: list[int]) -> Iterator[list[float]]: ...  # in pieces; what comes last is the vector
    def close(self) -> None: ...


FEATURES = {  # what an engine may lack → what it is, for the 400
    "logit_bias": "a bias on logits",
    "top_logprobs": "log probabilities of alternatives",
    "scores": "log probabilities of the prompt",
    "embeddings": "embeddings",
    "extensions": "sampling beyond OpenAI's",
    "constraints": "structured output",
    "template": "control over the chat template",
    "inside": "a look at prompt and tokens",
}
BEYOND_OPENAI = frozenset(FEATURES) - {"logit_bias", "top_logprobs"}
UPSTREAMS = {  # other servers as engines → what of FEATURES they lack; what is not known to be honoured there is refused here
    "vllm": frozenset({"embeddings", "inside"}),
    "tensorrt_llm": BEYOND_OPENAI,
    "openai": BEYOND_OPENAI,
}


# ─────────────────────────────────────────── text: stop strings, half characters ─────────────────────────────────


class StopGate:
    """Push parser that lets text through up to a stop string, and holds what may be the beginning of one.

    The stop string that is complete first wins, and of those that end together the longest, so that the result does
    not depend on how the text is cut into pieces.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops = stops
        self.heads = {s[0] for s in stops}
        self.reach = max(map(len, stops), default=1) - 1
        self.held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Returns (text that is safe to show, whether a stop string was met). Feed nothing after a hit."""
        if not self.stops:
            return text, False
        text = self.held + text
        hits = [(at + len(s), at) for s in self.stops if (at := text.find(s)) >= 0]
        if hits:
            self.held = ""
            return text[: min(hits)[1]], True
        cut = len(text)
        for at in range(max(0, len(text) - self.reach), len(text)):
            if text[at] in self.heads and any(s.startswith(text[at:]) for s in self.stops):
                cut = at
                break
        self.held = text[cut:]
        return text[:cut], False

    def flush(self) -> str:
        """What was held, once no more text can come."""
        held, self.held = self.held, ""
        return held


class Choice:
    """One choice of a request while it is generated: steps in, deltas out. The only place that ends one."""

    def __init__(self, request: Request, index: int):
        self.request, self.index = request, index
        sampling = request.sampling
        self.gate = StopGate(sampling.stop)
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.ends = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else request.eos)
        self.taken = 0

    def take(self, step: Step, backend: Backend) -> Delta:
        sampling = self.request.sampling
        text, finish, count = "", None, 0
        logprobs: list[TokenLogprob] = []
        if self.taken == 0 and sampling.echo:
            text, logprobs = self.request.text, self.prompt_logprobs(step.scores, backend)
        for i, token in enumerate(step.tokens):
            if finish or self.taken >= (sampling.max_tokens or 0):
                break
            count += 1
            self.taken += 1
            may_end = self.taken > sampling.min_tokens
            ended = may_end and token in self.ends
            if step.logprobs:
                shown = not ended and bool(backend.piece(token, False))  # special tokens are no text
                logprobs.append(named(token, step.logprobs[i], backend, shown))
            if ended:
                finish, text = "stop" if token in self.request.eos else "cut", text + self.rest()
                break
            piece = self.utf8.decode(backend.piece(token, False))
            safe, hit = self.gate.feed(piece) if may_end else (piece, False)
            text += safe
            finish = "cut" if hit else None
        if not finish and self.taken >= (sampling.max_tokens or 0):
            finish, text = "length", text + self.rest()
        return Delta(self.index, text, count, finish, tuple(logprobs), time.monotonic())

    def rest(self) -> str:
        """What is left in the decoder and behind the gate when no more tokens come."""
        tail, hit = self.gate.feed(self.utf8.decode(b"", final=True))
        return tail if hit else tail + self.gate.flush()

    def prompt_logprobs(self, scores: Sequence[Scored], backend: Backend) -> list[TokenLogprob]:
        ids = self.request.ids[self.request.hidden :]
        return [named(token, score, backend) for token, score in zip(ids, scores[self.request.hidden :], strict=False)]


def named(token: int, score: Scored, backend: Backend, shown: bool = True) -> TokenLogprob:
    top = tuple((backend.piece(other, True), logprob) for other, logprob in score.top)
    return TokenLogprob(backend.piece(token, True), score.logprob, top, shown)


# ──────────────────────────────────────────────── in the engine process ──────────────────────────────────────────


@dataclass(slots=True)
class Request:
    """One prompt of a job inside the engine: its choices run as sequences of their own."""

    job: int
    client: str  # who asks, for fairness
    text: str
    ids: list[int]
    hidden: int  # tokens at the beginning that the tokenizer added, and the client did not send
    sampling: Sampling
    eos: frozenset[int]
    siblings: list[Choice] = field(default_factory=list)  # held back until the first choice's prefill can be reused


class EngineLoop:
    """receive, admit, step: the life of an engine. Owns all sequence state; only its thread calls the backend."""

    def __init__(self, conn: Connection, backend: Backend):
        self.conn, self.backend = conn, backend
        self.waiting: deque[Choice] = deque()
        self.active: dict[int, Choice] = {}  # by seq
        self.turns: dict[str, int] = {}  # when each client last got a slot
        self.clock = itertools.count(1)
        self.calls: deque[tuple[int, Iterator[Any]]] = deque()  # one piece of one call between two steps
        self.out: list[tuple[int, Event]] = []
        self.spoke = 0.0  # when the last message was sent
        self.inbox = select.poll()  # conn.poll() makes one of these for every call
        self.inbox.register(conn.fileno(), select.POLLIN)
        self.dispatch: dict[str, Callable[..., None]] = {"submit": self.submit, "call": self.call, "cancel": self.cancel}

    def run(self) -> None:
        """Until the server closes the pipe. An error in step() leaves the library in an unknown state: it ends the process."""
        try:
            while self.receive():
                self.admit()
                self.advance_call()
                self.flush()  # what was taken or refused is told before a step, which may be long
                self.step()
                self.flush()
        except (EOFError, OSError):
            pass  # the server is gone, or has closed us

    def flush(self) -> None:
        """One message per step; without news one a second, so that a long prefill is not taken for a hang."""
        now = time.monotonic()
        if self.out or now - self.spoke > 1:
            self.conn.send_bytes(pickle.dumps(("events", self.out), pickle.HIGHEST_PROTOCOL))  # a third of what conn.send takes
            self.out, self.spoke = [], now

    def receive(self) -> bool:
        """Take what has come; block only when there is nothing else to do."""
        idle = not self.active and not self.waiting and not self.calls
        while idle or self.inbox.poll(0):
            kind, *arguments = self.conn.recv()
            if kind == "close":
                return False
            self.dispatch[kind](*arguments)
            idle = False
        return True

    def guarded(self, job: int, what: str, action: Callable[[], Any]) -> Any:
        """An error here is this job's own: it is told, and None returned."""
        try:
            return action()
        except Refused as refusal:
            self.cancel(job)
            self.out.append((job, refusal))
        except Exception as error:
            log.exception("engine: could not %s job %d", what, job)
            self.cancel(job)
            self.out.append((job, EngineFailed(f"the engine could not {what} the request: {one_line(error)}")))
        return None

    # ── jobs that generate ──

    def submit(self, job: int, prompts: Sequence[Prompt], sampling: Sampling, client: str) -> None:
        if sampling.seed is None:
            sampling = replace(sampling, seed=random.getrandbits(32))  # one for the whole job: a record of it runs again
        if len(prompts) > MANY_PROMPTS:
            self.calls.append((job, self.read_many(job, prompts, sampling, client)))
            return
        requests = self.guarded(job, "read", lambda: [self.prepare(job, prompt, sampling, client) for prompt in prompts])
        self.enqueue(job, prompts, sampling, requests or [])

    def read_many(self, job: int, prompts: Sequence[Prompt], sampling: Sampling, client: str) -> Iterator[None]:
        """One prompt between two steps: to tokenize hundreds takes seconds."""
        requests = []
        for prompt in prompts:
            requests.append(self.prepare(job, prompt, sampling, client))
            yield None
        self.enqueue(job, prompts, sampling, requests)

    def enqueue(self, job: int, prompts: Sequence[Prompt], sampling: Sampling, requests: list[Request]) -> None:
        for at, request in enumerate(requests):
            first, *request.siblings = [Choice(request, at * sampling.n + i) for i in range(sampling.n)]
            self.waiting.append(first)
            if prompts[at].details:
                self.out.append((job, Details(request.text, request.ids, asdict(request.sampling))))

    def prepare(self, job: int, prompt: Prompt, sampling: Sampling, client: str) -> Request:
        """Token ids, and sampling with every default filled in. Refuses what can never fit, before it costs anything."""
        context = self.backend.context
        if prompt.least_tokens() > context:
            raise too_long("the prompt", "is far longer than", context)
        text, ids, hidden = encode(self.backend, prompt)
        room = context - len(ids)
        if not ids:
            raise Refused("The prompt is empty.", "prompt")
        if room < (sampling.max_tokens != 0):
            raise too_long(f"the prompt has {len(ids)} tokens, which", "leaves no room for a completion in", context)
        if sampling.max_tokens is not None and sampling.max_tokens > room and not sampling.cut:
            asked = f"the prompt has {len(ids)} tokens and max_tokens is {sampling.max_tokens}: together they"
            raise too_long(asked, "exceed", context)
        for token, _ in sampling.logit_bias:
            if token >= self.backend.vocabulary:
                raise Refused(
                    f"'logit_bias' names token {token}, but the ids end at {self.backend.vocabulary - 1}.", "logit_bias"
                )
        defaults = FALLBACK | self.backend.defaults
        sampling = replace(
            sampling,
            cut=False,
            max_tokens=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            **{name: value for name, value in defaults.items() if getattr(sampling, name) is None},  # type: ignore[arg-type]
        )
        return Request(job, client, text, ids, hidden, sampling, self.backend.eos)

    def next_waiting(self) -> Choice:
        """The first of the client that has the fewest slots, and of those the one that got its last one longest ago."""
        running = Counter(choice.request.client for choice in self.active.values())
        choice = min(self.waiting, key=lambda c: (running[c.request.client], self.turns.get(c.request.client, 0)))
        self.waiting.remove(choice)
        if len(self.turns) > 10_000:
            self.turns.clear()
        self.turns[choice.request.client] = next(self.clock)
        return choice

    def admit(self) -> None:
        while self.waiting and len(self.active) < self.backend.slots:
            choice = self.next_waiting()
            request, sampling = choice.request, choice.request.sampling
            assert sampling.seed is not None
            if sampling.max_tokens == 0 and not sampling.scores_prompt:  # a mere echo needs no engine
                self.out.append((request.job, Started(len(request.ids), 0, time.monotonic())))
                self.emit(choice, Step(-1, ()))
                continue
            # 2**32 - 1 is llama.cpp's word for "any seed"
            own = replace(sampling, seed=(sampling.seed + choice.index) % (2**32 - 1), n=1)
            started = self.guarded(request.job, "start", lambda: self.backend.start(request.ids, own))  # noqa: B023
            if started is None:
                continue
            seq, cached = started
            self.active[seq] = choice
            if choice.index % sampling.n == 0:
                self.out.append((request.job, Started(len(request.ids), cached, time.monotonic())))

    def step(self) -> None:
        if not self.active:
            return
        for step in self.backend.step():
            choice = self.active.get(step.seq)
            if choice is None:
                continue  # its job has just been refused
            if step.refused:
                self.cancel(choice.request.job)
                self.out.append((choice.request.job, step.refused))
            elif self.emit(choice, step):
                del self.active[step.seq]
                self.backend.cancel(step.seq)

    def emit(self, choice: Choice, step: Step) -> bool:
        """Send what a step brought. True when the choice has finished."""
        delta = choice.take(step, self.backend)
        self.out.append((choice.request.job, delta))
        if choice.request.siblings:
            self.waiting.extendleft(reversed(choice.request.siblings))
            choice.request.siblings = []
        return delta.finish is not None

    def cancel(self, job: int) -> None:
        self.waiting = deque(c for c in self.waiting if c.request.job != job)
        self.calls = deque(c for c in self.calls if c[0] != job)
        for seq in [seq for seq, c in self.active.items() if c.request.job == job]:
            del self.active[seq]
            self.backend.cancel(seq)

    # ── calls that generate nothing ──

    def call(self, job: int, name: str, arguments: dict[str, Any]) -> None:
        self.calls.append((job, CALLS[name](self.backend, **arguments)))

    def advance_call(self) -> None:
        if not self.calls:
            return
        job, work = self.calls.popleft()
        for value in self.guarded(job, "answer", lambda: [*itertools.islice(work, 1)]) or ():
            if value is None:
                self.calls.append((job, work))  # more to do; the others first
            else:
                self.out.append((job, Answer(value)))


def encode(backend: Backend, prompt: Prompt) -> tuple[str, list[int], int]:
    """(text, token ids, how many of them the tokenizer added in front)."""
    if prompt.messages is not None:
        text = backend.template.render(prompt)
        if len(text) // 32 > backend.context:  # tool calls and the like count too
            raise too_long("the prompt", "is far longer than", backend.context)
        return text, backend.tokenize(text, False), 0
    if prompt.tokens is not None:
        if any(token >= backend.vocabulary for token in prompt.tokens):
            raise Refused(f"The prompt has a token id over {backend.vocabulary - 1}, where the vocabulary ends.", "prompt")
        data = b"".join(backend.piece(token, True) for token in prompt.tokens)
        return data.decode("utf-8", "replace"), list(prompt.tokens), 0
    text = prompt.text or ""
    ids = backend.tokenize(text, True)
    plain = backend.tokenize(text, False)
    return text, ids, 1 if len(ids) > len(plain) and ids[0] == backend.bos else 0


def call_tokenize(backend: Backend, prompt: Prompt, add_special: bool, pieces: bool) -> Iterator[dict[str, Any]]:
    if prompt.least_tokens() > 4 * backend.context:
        raise too_long("the text", "is far longer than", backend.context)
    text = backend.template.render(prompt) if prompt.messages is not None else prompt.text or ""
    ids = backend.tokenize(text, add_special)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": backend.context}
    if pieces:
        answer["pieces"] = [backend.piece(token, True) for token in ids]
    yield answer


def call_detokenize(backend: Backend, tokens: Sequence[int]) -> Iterator[str]:
    yield encode(backend, Prompt(tokens=tuple(tokens)))[0]


def call_render(backend: Backend, prompt: Prompt) -> Iterator[str]:
    yield backend.template.render(prompt)


def call_embed(backend: Backend, prompts: Sequence[Prompt]) -> Iterator[dict[str, Any] | None]:
    """One piece of a prompt between two steps, so that running answers go on."""
    vectors, tokens = [], 0
    for prompt in prompts:
        if prompt.least_tokens() > backend.context:
            raise too_long("an input", "is far longer than", backend.context)
        _, ids, _ = encode(backend, prompt)
        if not ids:
            raise Refused("An input is empty.", "input")
        vector: list[float] = []
        for vector in backend.embed(ids):  # noqa: B007 (the last one counts)
            yield None
        vectors.append(vector)
        tokens += len(ids)
    yield {"vectors": vectors, "tokens": tokens}


CALLS: dict[str, Callable[..., Iterator[Any]]] = {
    "tokenize": call_tokenize,
    "detokenize": call_detokenize,
    "render": call_render,
    "embed": call_embed,
}


def too_long(subject: str, verb: str, context: float) -> Refused:
    message = f"This model's context is {context} tokens, and {subject} {verb} it. Shorten the prompt or lower max_tokens."
    return Refused(message, "prompt", "context_length_exceeded")


def one_line(error: BaseException) -> str:
    """The last line that says something: native libraries put the reason at the end of a page of context."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def run_engine(conn: Connection, spec: EngineSpec, log_level: int) -> None:
    """The engine process's main. Tells the server how the load goes, then runs the loop."""
    for number in (signal.SIGINT, signal.SIGTERM):  # both may be sent to the whole group; the server ends us in its own order
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=log_level, format=LOG_FORMAT, stream=sys.stderr)

    def tell(kind: str, payload: Any) -> None:
        try:
            conn.send((kind, payload))
        except OSError:
            os._exit(0)  # the server is gone

    try:
        backend = backend_class(spec.backend)(spec, lambda fraction: tell("progress", fraction))
    except Exception as error:
        log.debug("load failed", exc_info=True)
        tell("failed", f"{spec.path}: {one_line(error)}")
        return
    backend.context = min(backend.context, spec.length or backend.context)
    info = EngineInfo(
        backend=spec.backend,
        library=backend.library,
        slots=backend.slots,
        threads=backend.threads,
        context=backend.context,
        cache_tokens=backend.cache_tokens,
        fingerprint=fingerprint(spec, backend.library, backend.slots, backend.threads),
        tokenizer=getattr(backend.template, "tokens", {}) | {"chat_template": getattr(backend.template, "source", None)},
    )
    tell("ready", info)
    gc.collect()
    gc.freeze()  # what was loaded stays: no collection walks it again between two steps
    EngineLoop(conn, backend).run()
    backend.close()


LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def fingerprint(spec: EngineSpec, *settings: object) -> str:
    """`system_fingerprint`: two replies with the same one come from the same weights, library and batch settings."""
    files = sorted(weight_files(spec.path))
    weights = [(os.path.basename(f), os.path.getsize(f), int(os.path.getmtime(f))) for f in files]
    text = repr((spec.backend, weights, spec.chat_template, settings))
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12]


def weight_files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return [e.path for e in os.scandir(path) if e.is_file() and e.name.endswith((".gguf", ".bin", ".xml", ".safetensors"))]


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


# ───────────────────────────────────────────── the handle in the server process ──────────────────────────────────


class Job:
    """A submitted request as its handler sees it. The handler takes and cancels; the reader thread puts."""

    def __init__(self, engine: Any, number: int, choices: int, client: str):
        self.engine, self.number, self.client = engine, number, client
        self.open = choices  # choices that have not finished; changed by the engine's reader thread only
        self.running = False
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def take(self, timeout: float) -> list[Event]:
        """All events that have come, waiting up to `timeout` seconds for the first."""
        events: list[Event] = []
        try:
            events.append(self.events.get(timeout=timeout))
            while True:
                events.append(self.events.get_nowait())
        except queue.Empty:
            return events

    def cancel(self) -> None:
        """Free the slot or the place in the queue. Harmless when the job has finished."""
        self.engine.drop(self)


def displaced(jobs: Iterable[Job], client: str) -> Job:
    """The job that gives up its place in a full queue for a client that has far fewer: the last one waiting of whoever has most.

    Raises QueueFull where nobody has.
    """
    counts = Counter(job.client for job in jobs)
    waiting = [job for job in jobs if not job.running and counts[job.client] > counts[client] + 1]
    if not waiting:
        raise QueueFull
    return max(waiting, key=lambda job: (counts[job.client], job.number))


class Jobs:
    """What the server keeps of an engine, whichever kind it is: its jobs, and whether it lives.

    `on_change(self)` is called when it has become ready, has progressed, or is dead. After death `dead` holds the reason,
    every job has had its EngineFailed, and late-comers get it from admit().
    """

    def __init__(self, spec: EngineSpec, max_jobs: float, patience: float, on_change: Callable[[Any], None]):
        self.spec, self.max_jobs, self.patience, self.on_change = spec, max_jobs, patience, on_change
        self.info: EngineInfo | None = None
        self.progress = 0.0  # of loading, 0..1
        self.dead: str | None = None
        self.jobs: dict[int, Job] = {}
        self.lock = threading.Lock()  # guards jobs and dead
        self.numbers = itertools.count()

    @property
    def ready(self) -> bool:
        return self.info is not None and self.dead is None

    def admit(self, job: Job) -> None:
        """Raises EngineFailed, QueueFull."""
        loser = None
        with self.lock:
            if self.dead is not None:
                raise EngineFailed(self.dead)
            if len(self.jobs) >= self.max_jobs:
                loser = displaced(self.jobs.values(), job.client)
            self.jobs[job.number] = job
        if loser:
            self.drop(loser)
            loser.events.put(QueueFull())

    def drop(self, job: Job) -> None:
        raise NotImplementedError

    def tell(self) -> None:
        try:
            self.on_change(self)
        except Exception:  # whatever the listener does, the reader reads on
            log.exception("engine listener")

    def queue_depth(self) -> int:
        """Jobs that wait for a slot."""
        with self.lock:
            return sum(not job.running for job in self.jobs.values())

    def drop_waiting(self, name: str) -> None:
        """Jobs that wait for a slot end with Unloading; `name` is the model's."""
        with self.lock:
            waiting = [job for job in self.jobs.values() if not job.running]
        for job in waiting:
            self.drop(job)
            job.events.put(Unloading(name))

    def retire(self) -> bool:
        """Take no more jobs, if there are none now: late-comers get EngineFailed."""
        with self.lock:
            if not self.jobs and self.dead is None:
                self.dead = "the model has been unloaded"
            return not self.jobs


class Engine(Jobs):
    """An engine process, and the jobs that run in it. One that has jobs and is silent for `patience` seconds is killed."""

    def __init__(self, spec: EngineSpec, max_jobs: float, patience: float, on_change: Callable[[Any], None]):
        super().__init__(spec, max_jobs, patience, on_change)
        self.heard = time.monotonic()  # when the engine last said anything
        self.outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # pickled messages; None ends the writer
        context = multiprocessing.get_context("spawn")
        self.conn, child = context.Pipe()
        self.process = context.Process(target=run_engine, args=(child, spec, log.getEffectiveLevel()), daemon=True)
        self.process.start()
        child.close()  # ours is the only other end now: its death is our EOF
        self.gone = threading.Event()
        self.reader = threading.Thread(target=self.read, name="engine-reader", daemon=True)
        try:
            self.reader.start()
            for target in (self.write, self.watch):
                threading.Thread(target=target, name=f"engine-{target.__name__}", daemon=True).start()
        except RuntimeError:  # no more threads
            self.process.kill()
            raise

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, client: str = "") -> Job:
        """Choice i of prompt p has the index p * n + i. Slots are shared out fairly among clients."""
        return self.enter(client, len(prompts) * sampling.n, "submit", tuple(prompts), sampling, client)

    def call(self, name: str, arguments: dict[str, Any], client: str = "") -> Job:
        """One of CALLS; the job's only event is an Answer."""
        return self.enter(client, 1, "call", name, arguments)

    def enter(self, client: str, choices: int, kind: str, *arguments: Any) -> Job:
        number = next(self.numbers)
        try:
            message = ForkingPickler.dumps((kind, number, *arguments))
        except RecursionError:
            raise Refused("The request is nested too deeply.") from None
        if not self.jobs:
            self.heard = time.monotonic()  # it had nothing to say until now
        job = Job(self, number, choices, client)
        self.admit(job)
        self.outbox.put(message)
        return job

    def drop(self, job: Job) -> None:
        with self.lock:
            known = self.jobs.pop(job.number, None)
        if known:
            self.outbox.put(ForkingPickler.dumps(("cancel", job.number)))

    def write(self) -> None:
        """The only sender: a handler must not wait for an engine that is inside a long step."""
        try:
            while message := self.outbox.get():
                self.conn.send_bytes(message)
        except OSError:
            pass  # dead: the reader tells

    def read(self) -> None:
        reason = f"{self.spec.path}: the engine process ended"
        while True:
            try:
                kind, payload = pickle.loads(self.conn.recv_bytes())
            except (EOFError, OSError):
                break
            self.heard = time.monotonic()
            if kind == "events":
                self.deliver(payload)
                continue
            if kind == "failed":
                reason = payload
                continue
            if kind == "ready":
                self.info, reason = payload, "the engine process ended"
            self.progress = payload if kind == "progress" else 1.0
            self.tell()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(10)
        if self.process.exitcode:
            reason += f" ({describe_exit(self.process.exitcode)})"
        with self.lock:
            self.dead = reason
            jobs, self.jobs = list(self.jobs.values()), {}
        for job in jobs:
            job.events.put(EngineFailed(reason))
        self.gone.set()
        self.outbox.put(None)
        self.conn.close()
        self.tell()

    def watch(self) -> None:
        while not self.gone.wait(1):
            self.check_silence(self.patience + 1)

    def check_silence(self, limit: float) -> None:
        """An engine that has work and has said nothing for so long hangs; a living one says something every second."""
        if self.ready and self.jobs and time.monotonic() - self.heard > limit:
            log.error("the engine has said nothing for %.0f s: killing it", limit)
            self.kill()

    def deliver(self, events: list[tuple[int, Event]]) -> None:
        for number, event in events:
            job = self.jobs.get(number)
            if job is None:
                continue  # cancelled; the engine had not heard of it yet
            if isinstance(event, Delta):
                job.open -= event.finish is not None
            elif isinstance(event, Started):
                job.running = True
            elif not isinstance(event, Details):
                job.open = 0
            if not job.open:
                with self.lock:
                    self.jobs.pop(number, None)
            job.events.put(event)

    def kill(self) -> None:
        """For an engine that hangs. Its jobs fail as in a crash; when this returns no job can be submitted to it any more."""
        self.process.kill()
        if threading.current_thread() is not self.reader:
            self.reader.join(5)

    def close(self) -> None:
        """End the process: politely, then not. One that is still loading would not listen."""
        if self.info is None:
            self.process.kill()
        self.outbox.put(ForkingPickler.dumps(("close",)))
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)


def describe_exit(code: int) -> str:
    if code < 0:
        return f"signal {-code}, {signal.strsignal(-code)}" if hasattr(signal, "strsignal") else f"signal {-code}"
    return f"exit status {code}"


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


def backend_class(name: str) -> type[Backend]:
    """By its name in BACKENDS, or as "module:Class" for a binding of your own."""
    if ":" not in name:
        return BACKENDS[name]
    module, _, attribute = name.partition(":")
    found: type[Backend] = getattr(importlib.import_module(module), attribute)
    return found


def installed(requirement: str) -> str:
    name = requirement.split("==")[0]
    return f"{name} {importlib.metadata.version(name)}"


def missing_library(name: str) -> str | None:
    """None when the backend's library is installed, else one line that says what brings it. Imports nothing."""
    backend = BACKENDS[name]
    if importlib.util.find_spec(backend.LIBRARY):
        return None
    return f"backend {name} needs {backend.LIBRARY}: pip install {backend.INSTALL}"
