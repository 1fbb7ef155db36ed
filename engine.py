"""Engines: what crosses the pipe, and the loop in the engine process. (Its handle in the server is engine_handle.py.) Nothing here knows HTTP.

The law: one engine process per loaded model; in it, one thread is the only one that ever touches the native library;
a producer never waits for a consumer.

Server process                                   Engine process (spawned, one per loaded model)
  handler threads: Engine.submit() -> Job          run_engine: EngineLoop over one Backend
  workshop:        template, constraint (workshop.py, prepare.py)
  writer thread:   outbox ──── pipe ────────────►    receive() -> admit() -> step() -> one message of events
  reader thread:   Job.put() ◄───── pipe ────────┘   EOF on the pipe is how either side learns of the other's death
  watcher thread:  does it live? (children.py)

The server does not trust the engine: what that sends is plain data, which names no class and calls nothing.
"""

from __future__ import annotations

import codecs
import gc
import hashlib
import importlib
import io
import itertools
import logging
import operator
import os
import pickle
import random
import re
import select
import time
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing.connection import Connection
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol

from pace import GrammarPace, PromptPace
from prefixes import Prefixes
from tool_parser import Chat, Parser
from tool_values import Part
from turns import Turns

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
    tools: tuple[dict[str, Any], ...] = ()  # [{type: function, function: {name, description, parameters, strict}}]
    tool_choice: str = "auto"  # | "none" | "required"
    callable: tuple[str, ...] | None = None  # the names that may be called; None: all of them
    parallel: bool = True  # several calls in one answer
    effort: str | None = None  # of reasoning: "none" … "xhigh"
    lenient: bool = False  # the effort is a hint: a template without such a switch does not refuse it
    details: bool = False  # Details are wanted
    rendered: bool = False  # the text is what the template has made of messages
    chat: Chat | None = None  # and this all that it has made of them

    def least_tokens(self) -> int:
        """Taken for a lower bound before the prompt costs anything. Text of over 32 characters per token is not text."""
        if self.messages is not None:
            return max(len(self.messages), characters([*self.messages, self.template_kwargs]) // CHARACTERS)
        return len(self.tokens) if self.tokens is not None else len(self.text or "") // CHARACTERS


CHARACTERS = 32  # the most that are taken for one token


def characters(value: Any) -> int:
    """Of all strings in a value that came as JSON, names too."""
    total, rest = 0, [value]
    while rest:
        one = rest.pop()
        if isinstance(one, str):
            total += len(one)
        elif isinstance(one, dict):
            rest += [*one, *one.values()]
        elif isinstance(one, (list, tuple)):
            rest += one
    return total


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
    grammar: str | None = None  # GBNF that the completion must follow; reasoning in front of it is free
    constraint: tuple[str, Any, str] | None = (
        None  # that becomes the grammar: its kind, its source, the field that it came from
    )
    thinking_budget: int | None = None  # tokens of reasoning, then its end is forced

    @property
    def scores_prompt(self) -> bool:
        return self.echo and self.logprobs is not None


FALLBACK = {"temperature": 0.7, "top_p": 1.0, "top_k": 0}  # where neither the request nor the model says


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has taken the request: the first event of every job that is not refused. More of them add up."""

    prompt_tokens: int
    cached_tokens: int | None  # None: this engine cannot tell, and we do not guess
    at: float = 0.0  # seconds on the engine's monotonic clock


@dataclass(frozen=True, slots=True)
class Details:
    """What the model is really given: the prompt after its template, its token ids, the sampling with every default filled in.

    With it how much of that was in the cache, and where it first differed from what was there (prefixes.py).
    """

    prompt: str
    prompt_token_ids: list[int]
    sampling: dict[str, Any]
    cache: dict[str, Any] = field(default_factory=dict)


class TokenLogprob(NamedTuple):
    """One token's log probability under the raw logits, and the best alternatives as (bytes, logprob)."""

    data: bytes  # UTF-8, maybe half a character
    logprob: float | None  # None: a prompt's first token has none
    top: tuple[tuple[bytes, float], ...] = ()
    shown: bool = True  # False: it ended the completion, and is not part of its text


class Delta(NamedTuple):  # the one that crosses for every token: a tuple is pickled in C, a slotted dataclass in Python
    """What one step added to one choice. `text` may be empty: half a character, or the beginning of a stop string.

    A choice's deltas are one ordered stream. A "call" begins a tool call, its text is the function's name; "arguments" are the
    JSON text of the call that began last, as it is made.
    """

    choice: int
    text: str
    tokens: int
    finish: str | None = None  # "stop" | "length" | "tool_calls", set on a choice's last delta
    logprobs: tuple[TokenLogprob, ...] = ()
    at: float = 0.0  # seconds on the engine's monotonic clock
    kind: str = "content"  # | "reasoning" | "call" | "arguments": what the text is a part of
    id: str = ""  # of a call that begins
    stop: str = ""  # the stop string that ended the choice


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


# ────────────────────────────────────── what the engine says: plain data, no classes ──────────────────────────────

EVENTS: dict[str, Callable[..., Event]] = {
    "delta": Delta, "started": Started, "details": Details, "answer": Answer, "refused": Refused, "failed": EngineFailed,
}  # fmt: skip


def pack(kind: str, payload: Any) -> bytes:
    return pickle.dumps((kind, payload), pickle.HIGHEST_PROTOCOL)


def pack_event(job: int, event: Event) -> tuple[int, str, tuple[Any, ...]]:
    if isinstance(event, Delta):
        return job, "delta", tuple(event) if not event.logprobs else (*event[:4], pack_logprobs(event.logprobs), *event[5:])
    if isinstance(event, Exception):
        return job, "refused" if isinstance(event, Refused) else "failed", event.args
    return job, type(event).__name__.lower(), tuple(getattr(event, one.name) for one in fields(event))


def pack_logprobs(logprobs: Sequence[TokenLogprob]) -> tuple[Any, ...]:
    """A binding may bring the numbers of its library, which are objects of classes of their own."""

    def number(value: float | None) -> float | None:
        return None if value is None else float(value)

    return tuple(
        (data, number(logprob), tuple((other, float(value)) for other, value in top), shown)
        for data, logprob, top, shown in logprobs
    )


def unpack_event(job: int, kind: str, given: tuple[Any, ...]) -> tuple[int, Event]:
    """Raises TypeError, KeyError for what no engine of ours says."""
    event = EVENTS[kind](*given)
    if isinstance(event, Delta) and event.logprobs:
        event = event._replace(logprobs=tuple(TokenLogprob(*one) for one in event.logprobs))
    return job, event


class PlainData(pickle.Unpickler):
    """Numbers, text and what contains them. A pickle may name any class, and call it; here it names none."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it names {module[:80]}.{name[:80]}")


def unpack(data: bytes) -> tuple[str, Any]:
    """Raises whatever a broken message brings: the sender is to be ended."""
    kind, payload = PlainData(io.BytesIO(data)).load()
    return kind, payload


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
    device: str = "auto"  # where it computes, as its library names devices
    dtype: str = "auto"  # and with what
    flags: tuple[tuple[str, Any], ...] = ()  # of its library alone, by name: those that were given
    draft: str = ""  # a small model of the same vocabulary, for speculative decoding
    ngram: int = 0  # speculative decoding by what so many last tokens were followed by before; 0: off
    draft_tokens: int = 0  # how many are guessed at once; 0: the engine's default
    tool_syntax: str = ""  # takes the place of what is found in the template
    options: tuple[str, ...] = ()  # flags of exllamav3's own model_init, as they stood on the command line
    task: str = "generate"  # | "embed" | "rerank": what the model is for
    step_target: float = 0.0  # milliseconds that a step may take in which others decode; 0: two that only decode, or 150
    deterministic: bool = False  # a request's text may not depend on what else runs


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
    placement: str = ""  # which devices hold how much of it, where the library tells
    models: tuple[str, ...] = ()  # an upstream's names for what it serves
    defaults: dict[str, float] = field(default_factory=dict)  # the sampling of a request that does not say; empty: not known
    recipe: tuple[Any, ...] = ()  # what a chat template is made again from, in the workshop; (): the engine renders


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
    error: Refused | EngineFailed | None = None  # the sequence cannot go on: its job is told so, and ends
    cached: int | None = None  # tokens found in the KV cache beside those that start() knew of


class Tokens(NamedTuple):
    """One input of a model that pools: a text, or a pair of them."""

    ids: Sequence[int]
    types: Sequence[int] = ()  # of a pair: 0 for the first text's, 1 for the second's, where the model tells them apart


class Template(Protocol):
    """A model's chat template: raises Refused for messages that it cannot render."""

    source: str | None
    tokens: dict[str, str]  # bos_token, eos_token

    def render(self, prompt: Prompt) -> str: ...


class Backend(Protocol):
    """A binding to one library. Constructed, used and closed by one thread of the engine process.

    `start` takes the token ids of a prompt and returns (seq, tokens found in the KV cache, or None when unknown);
    `step` advances every started sequence as far as one batch goes and returns the new token ids of each;
    `cancel` frees a sequence's slot, also of one that has ended. Which tokens end a completion, what text they are
    and how many may come is the loop's business. A binding may stop a sequence by itself, never emit past the end.
    """

    LIBRARIES: ClassVar[tuple[str, ...]]  # the modules that it imports, its own first
    INSTALL: ClassVar[str]  # what `pip install` brings it
    LACKS: ClassVar[frozenset[str]]  # names out of FEATURES
    SPECULATES: ClassVar[frozenset[str]]  # with "draft", "ngram" or both of EngineSpec
    library: str  # what was imported, with its version
    slots: int
    threads: int
    context: int
    cache_tokens: int
    # SPECIAL_IN_GRAMMAR: ClassVar[bool], True where it is not there: a grammar's literals may be special tokens
    vocabulary: int  # token ids are below it
    bos: int  # -1: none
    eos: frozenset[int]
    defaults: dict[str, float]  # the model's own sampling

    @property
    def template(self) -> Template: ...
    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]): ...  # loads; progress is 0..1
    def tokenize(self, text: str, add_special: bool) -> list[int]: ...  # special tokens in the text are always read as such
    def piece(self, token: int, special: bool) -> bytes: ...  # UTF-8; special tokens are empty unless `special`
    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]: ...
    def step(self) -> Iterable[Step]: ...
    def cancel(self, seq: int) -> None: ...
    def embed(self, inputs: Sequence[Tokens]) -> Iterator[list[bytes]]: ...  # one batch, in pieces; the vectors come last
    def close(self) -> None: ...


# What a binding may have beside: `pool_tokens` and `pool_rows`, the most tokens (padding counts) and inputs of one embed();
# `prompts`, a model's own by name, "" being what stands before every text; `pair(query, document, limit) -> Tokens` of a
# reranker, whose embed() gives vectors of one number. A vector is little-endian float32.


FEATURES = {  # what an engine may lack → what it is, for the 400
    "logit_bias": "a bias on logits",
    "top_logprobs": "log probabilities of alternatives",
    "scores": "log probabilities of the prompt",
    "embeddings": "embeddings",
    "extensions": "sampling beyond OpenAI's",
    "constraints": "structured output",
    "template": "control over the chat template",
    "inside": "a look at prompt and tokens",
    "tokens": "tokenizing for others",
    "rerank": "scores of pairs of texts",
    "prompts": "an embedding model's own prompts",
    "tools": "tool calls and reasoning",
}
BEYOND_OPENAI = frozenset(FEATURES) - {"logit_bias", "top_logprobs", "tools"}
UPSTREAMS = {  # other servers as engines → what of FEATURES they lack; what is not known to be honoured there is refused here
    "vllm": frozenset({"inside", "prompts"}),
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
        self.hit = ""  # the stop string that was met

    def feed(self, text: str) -> tuple[str, bool]:
        """Returns (text that is safe to show, whether a stop string was met). Feed nothing after a hit."""
        if not self.stops:
            return text, False
        text = self.held + text
        hits = [(at + len(s), at) for s in self.stops if (at := text.find(s)) >= 0]
        if hits:
            end, at = min(hits)
            self.held, self.hit = "", text[at:end]
            return text[:at], True
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
        self.ends = request.ends if request.ends is not None else ends_of(sampling, request.eos)
        self.taken = 0
        self.made = array("i")  # tokens
        self.parser = request.chat.parser() if request.chat else None
        self.thinking = (
            Thinking(request) if request.chat and (request.chat.later or sampling.thinking_budget is not None) else None
        )

    def take(self, step: Step, backend: Backend) -> list[Delta]:
        """At least one delta; several where the text is of several kinds."""
        sampling, parser, before = self.request.sampling, self.parser, self.taken
        finish, text, inside = None, "", False
        self.made.extend(step.tokens)
        parts: list[Part] = []
        logprobs: list[TokenLogprob] = []
        if self.taken == 0 and sampling.echo:
            text, logprobs = self.request.text, self.prompt_logprobs(step.scores, backend)
        for i, token in enumerate(step.tokens):
            if finish or self.taken >= (sampling.max_tokens or 0) or (self.thinking and self.thinking.again is not None):
                break
            self.taken += 1
            may_end = self.taken > sampling.min_tokens
            ended = may_end and token in self.ends
            data = self.request.view(token, backend) if parser else backend.piece(token, False)
            if step.logprobs:
                logprobs.append(named(token, step.logprobs[i], backend, not ended and bool(data)))
            if parser:
                inside = parser.reasoning
                parts.append(Part("reasoning" if inside else "content", "", 1))
            if ended:
                finish, piece = "stop" if token in self.request.eos else "cut", self.rest()
            else:
                piece = self.utf8.decode(data)
                piece, hit = self.gate.feed(piece) if may_end else (piece, False)
                finish = "cut" if hit else None
            if parser:
                parts += parser.feed(piece) if piece else ()
                if self.thinking and not finish:
                    parts += self.thinking.look(token, inside, parser, backend)
            else:
                text += piece
        if self.thinking and self.thinking.restarted:
            self.begin_again(parts)
        if not finish and self.taken >= (sampling.max_tokens or 0):
            finish, piece = "length", self.rest()
            parts += parser.feed(piece) if parser else ()
            text += "" if parser else piece
            if self.thinking:
                self.thinking.again = None
        if parser and finish:
            parts += parser.finish(finish != "stop")
            finish = self.called(finish)
        if parser:
            return self.deltas(parts, text, finish, tuple(logprobs))
        tokens = self.taken - before
        return [Delta(self.index, text, tokens, finish, tuple(logprobs), time.monotonic(), stop=self.gate.hit)]

    def begin_again(self, parts: list[Part]) -> None:
        """What came is forgotten: it had no reasoning, and did not follow the grammar that comes after it."""
        assert self.request.chat and self.thinking
        self.taken, self.parser, self.thinking.restarted = 0, self.request.chat.parser(), False
        del self.made[:]
        self.utf8.reset()
        parts.clear()

    def called(self, finish: str) -> str:
        """The finish reason, where there may be calls: a call that did not come to its end is told as one that was cut."""
        assert self.parser
        if not self.parser.calls or finish == "length":
            return finish
        return "tool_calls" if self.parser.whole else "length"

    def deltas(self, parts: list[Part], text: str, finish: str | None, logprobs: tuple[TokenLogprob, ...]) -> list[Delta]:
        """One for each run of one kind; the last has what ends it."""
        now = time.monotonic()
        found: list[Delta] = []
        for kind, piece, tokens in (Part("content", text, 0), *parts):
            if found and (found[-1].kind == kind != "call" or not piece and kind == "content"):
                found[-1] = found[-1]._replace(text=found[-1].text + piece, tokens=found[-1].tokens + tokens)
            elif piece or tokens:
                id = f"call_{uuid.uuid4().hex[:24]}" if kind == "call" else ""
                found.append(Delta(self.index, piece, tokens, None, (), now, kind, id))
        found = found or [Delta(self.index, "", 0, None, (), now)]
        found[-1] = found[-1]._replace(finish=finish, logprobs=logprobs, stop=self.gate.hit)
        return found

    def rest(self) -> str:
        """What is left in the decoder and behind the gate when no more tokens come."""
        tail, hit = self.gate.feed(self.utf8.decode(b"", final=True))
        return tail if hit else tail + self.gate.flush()

    def prompt_logprobs(self, scores: Sequence[Scored], backend: Backend) -> list[TokenLogprob]:
        ids = self.request.ids[self.request.hidden :]
        return [named(token, score, backend) for token, score in zip(ids, scores[self.request.hidden :], strict=False)]


def ends_of(sampling: Sampling, eos: frozenset[int]) -> frozenset[int]:
    """The tokens that end a completion."""
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos)


class Thinking:
    """What is to be done where reasoning ends: a grammar begins, or the end itself is forced once there was too much of it.

    Both are the same move, which every engine knows: the sequence is cancelled, and started again with what there is.
    """

    def __init__(self, request: Request):
        assert request.chat
        self.request, self.chat = request, request.chat
        self.pending = self.chat.later  # the grammar has not begun
        self.tokens: list[int] = []  # that have come so far
        self.thought, self.reasoned = 0, False  # tokens of reasoning, and whether there was any
        self.again: list[int] | None = None  # ids of the prompt to start again with
        self.restarted = False  # with nothing of what has come

    def look(self, token: int, inside: bool, parser: Parser, backend: Backend) -> list[Part]:
        """After each token; `inside`: it came within reasoning. Returns what forcing the end of reasoning brings."""
        self.tokens.append(token)
        self.thought += inside
        self.reasoned |= inside or parser.reasoning
        budget = self.request.sampling.thinking_budget
        if parser.reasoning:
            if budget is not None and self.thought >= budget:
                self.again = [*self.request.ids, *self.tokens, *backend.tokenize(self.chat.think_end, False)]
                self.pending = False
                return parser.feed(self.chat.think_end)
        elif self.pending and self.reasoned:
            self.pending, self.again = False, [*self.request.ids, *self.tokens]
        elif self.pending and not parser.fresh:
            self.pending, self.again, self.restarted = False, list(self.request.ids), True
            self.tokens = []
        return []

    def started_again(self) -> None:
        assert self.again is not None
        self.tokens, self.again = self.again[len(self.request.ids) :], None


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
    ids: array[int]  # a list of them takes ten times the memory, and a queue holds many
    hidden: int  # tokens at the beginning that the tokenizer added, and the client did not send
    sampling: Sampling
    eos: frozenset[int]
    ends: frozenset[int] | None = None  # the tokens that end a completion: one set for all of a job
    first: int = 0  # the index of its first choice
    siblings: range = range(0)  # choices that are held back until the first one's prefill can be reused

    chat: Chat | None = None  # how its text is taken apart; None: it is not
    views: dict[int, bytes] = field(default_factory=dict)  # of tokens, as the parser is to see them
    told: dict[str, Any] | None = None  # of its sampling, where Details are wanted
    details: Details | None = None  # to be told with its first token, when all engines know how much was in the cache

    def view(self, token: int, backend: Backend) -> bytes:
        """A token's text, for the parser: special tokens are empty unless they are marks of its."""
        data = self.views.get(token)
        if data is None:
            data = backend.piece(token, False)
            if (
                not data
                and self.chat
                and (whole := backend.piece(token, True))
                and whole.decode("utf-8", "replace") in self.chat.marks
            ):
                data = whole
            self.views[token] = data
        return data


@dataclass(slots=True)
class Work:
    """What a job asks of the engine before it has a slot, or without one: a piece of it is done between two steps."""

    job: int
    client: str
    what: str  # "read" | "answer"
    pieces: Iterator[Any]  # of None while there is more to do; an answer comes last


def readable(conn: Connection) -> Callable[[], bool]:
    """Asks whether something has come. conn.poll() makes a selector for every call, but it is there on every system."""
    if not hasattr(select, "poll"):
        return lambda: conn.poll(0)
    poller = select.poll()
    poller.register(conn.fileno(), select.POLLIN)
    return lambda: bool(poller.poll(0))


class Reader:
    """What a job's prompts become before they have a slot: token ids, and sampling with every default filled in; or a refusal."""

    def __init__(self, backend: Backend):
        self.backend = backend

    def read(self, job: int, prompts: Sequence[Prompt], sampling: Sampling, client: str) -> Iterator[list[Request] | None]:
        """One prompt at a time, since to tokenize hundreds takes seconds; all of them come last."""
        requests: list[Request] = []
        ends = self.check_ids(sampling)
        told = asdict(replace(sampling, constraint=None)) if any(prompt.details for prompt in prompts) else {}
        told.pop("constraint", None)
        for at, prompt in enumerate(prompts):
            if requests:
                yield None
            request = self.prepare(job, prompt, sampling, client)
            request.ends, request.first = ends, at * sampling.n
            request.siblings = range(request.first + 1, request.first + sampling.n)
            if prompt.details:
                own = {name: value for name in told if not isinstance(value := getattr(request.sampling, name), tuple)}
                request.told = told | own
            requests.append(request)
        yield requests

    def check_ids(self, sampling: Sampling) -> frozenset[int]:
        """Refuses tokens that the model does not have. Returns those that end a completion."""
        for name, tokens in (("logit_bias", dict(sampling.logit_bias)), ("stop_token_ids", sampling.stop_token_ids)):
            if tokens and max(tokens) >= self.backend.vocabulary:
                last = self.backend.vocabulary - 1
                raise Refused(f"'{name}' names token {max(tokens)}, but the ids end at {last}.", name)
        return ends_of(sampling, self.backend.eos)

    def prepare(self, job: int, prompt: Prompt, sampling: Sampling, client: str) -> Request:
        """Token ids, and sampling with every default filled in. Refuses what can never fit, before it costs anything."""
        context = self.backend.context
        if prompt.least_tokens() > context:
            raise too_long("the prompt", "is far longer than", context)
        chat, text, ids, hidden = self.read_prompt(prompt, sampling)
        if chat:
            sampling = replace(sampling, grammar=chat.grammar if chat.later else chat.whole_grammar or chat.grammar)
        room = context - len(ids)
        if not ids:
            raise Refused("The prompt is empty.", "prompt")
        if room < (sampling.max_tokens != 0):
            raise too_long(f"the prompt has {len(ids)} tokens, which", "leaves no room for a completion in", context)
        if sampling.max_tokens is not None and sampling.max_tokens > room and not sampling.cut:
            asked = f"the prompt has {len(ids)} tokens and max_tokens is {sampling.max_tokens}: together they"
            raise too_long(asked, "exceed", context)
        defaults = FALLBACK | self.backend.defaults
        sampling = replace(
            sampling,
            cut=False,
            max_tokens=room if sampling.max_tokens is None else min(room, sampling.max_tokens),
            **{name: value for name, value in defaults.items() if getattr(sampling, name) is None},  # type: ignore[arg-type]
        )
        kept = text if sampling.echo or prompt.details else ""
        return Request(
            job, client, kept, array("i", ids), hidden, sampling, self.backend.eos, chat=chat if chat and chat.syntax else None
        )

    def read_prompt(self, prompt: Prompt, sampling: Sampling) -> tuple[Chat | None, str, list[int], int]:
        """What the template makes of a conversation; (…, text, token ids, how many of them the tokenizer added in front)."""
        chat = prompt.chat
        if prompt.messages is not None and hasattr(self.backend.template, "prepare"):  # no workshop has done it
            chat = self.backend.template.prepare(prompt, sampling)
            prompt = replace(prompt, messages=None, text=chat.text, rendered=True)
        if chat and not getattr(self.backend, "SPECIAL_IN_GRAMMAR", True):
            chat = self.without_special(chat)
        return chat, *encode(self.backend, prompt, sampling.scores_prompt)

    def without_special(self, chat: Chat) -> Chat:
        """For an engine whose grammars cannot speak of special tokens: what of a request's grammar does not need them."""

        def plain(text: str) -> bool:
            return all(self.backend.piece(token, False) for token in self.backend.tokenize(text, False))

        if chat.grammar is None or chat.syntax is None:
            return chat
        if chat.optional and not plain("".join(chat.syntax.openers[:1])):
            return replace(chat, grammar=None, whole_grammar=None)
        if chat.whole_grammar and chat.syntax.form == "channels":
            return replace(chat, whole_grammar=None)
        return replace(chat, later=chat.whole_grammar is not None and not plain(chat.think_end))


class EngineLoop:
    """receive, admit, step: the life of an engine. Owns all sequence state; only its thread calls the backend."""

    SHARE_S = 0.05  # what steps leave for other work adds up to so much

    def __init__(self, conn: Connection, backend: Backend):
        self.conn, self.backend = conn, backend
        self.work: Turns[Work] = Turns()
        self.waiting: Turns[Choice] = Turns()
        self.active: dict[int, Choice] = {}  # by seq
        self.turns: dict[str, int] = {}  # when each client last got a slot
        self.clock = itertools.count(1)
        self.pool = Pool(backend)
        self.reader, self.prefixes = Reader(backend), Prefixes()
        self.pace, self.prompts = GrammarPace(), PromptPace()
        self.credit = self.SHARE_S  # seconds that other work may take before the next step: half of what answers have taken
        self.out: list[tuple[int, Event]] = []
        self.spoke = 0.0  # when the last message was sent
        self.inbox_has = readable(conn)
        self.dispatch: dict[str, Callable[..., None]] = {"submit": self.submit, "call": self.call, "cancel": self.cancel}

    def run(self) -> None:
        """Until the server closes the pipe. An error in step() leaves the library in an unknown state: it ends the process."""
        try:
            while self.receive():
                self.admit()
                self.out += self.pool.advance()
                self.flush()  # what was taken or refused is told before a step, which may be long
                self.timed_step()
                self.flush()
        except (EOFError, OSError):
            pass  # the server is gone, or has closed us

    def unread(self) -> list[int]:
        """How long the prompts are that are being read."""
        return [len(choice.request.ids) for choice in self.active.values() if not choice.taken]

    def answering(self) -> bool:
        """Does the next step bring somebody a token, who did not just get the first? Who came together begins together."""
        return any(choice.taken > 1 for choice in self.active.values())

    def flush(self) -> None:
        """One message per step; without news one a second, so that a long prefill is not taken for a hang."""
        now = time.monotonic()
        if self.out or now - self.spoke > 1:
            self.conn.send_bytes(pack("events", [pack_event(*one) for one in self.out]))
            self.out, self.spoke = [], now

    def receive(self) -> bool:
        """Take what has come; block only when there is nothing else to do, and where others wait for a step be brief."""
        idle = not (self.active or self.waiting or self.work or self.pool.jobs)
        began = time.monotonic()
        while idle or self.inbox_has():
            kind, *arguments = self.conn.recv()
            if kind == "close":
                return False
            self.dispatch[kind](*arguments)
            idle = False
            if self.active and time.monotonic() - began > self.SHARE_S:
                break
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

    # ── work between steps ──

    def submit(self, job: int, prompts: Sequence[Prompt], sampling: Sampling, client: str) -> None:
        if sampling.seed is None:
            sampling = replace(sampling, seed=random.getrandbits(32))  # one for the whole job: a record of it runs again
        self.work.put(client, Work(job, client, "read", self.reader.read(job, prompts, sampling, client)))

    def call(self, job: int, name: str, arguments: dict[str, Any], client: str = "") -> None:
        self.work.put(client, Work(job, client, "answer", CALLS[name](self.backend, **arguments)))

    def catch_up(self) -> None:
        """Do what is to be done beside steps, in turns by client: while somebody waits for a step, for half of what steps take."""
        if not self.active:
            self.credit = self.SHARE_S
        while self.work and (self.credit > 0 or not (self.active or self.waiting)):
            began = time.monotonic()
            work = self.work.take()
            for value in self.guarded(work.job, work.what, lambda: [*itertools.islice(work.pieces, 1)]) or ():  # noqa: B023
                if value is None:
                    self.work.put(work.client, work)  # more to do; the others first
                elif work.what == "read":
                    for request in value:
                        self.waiting.put(work.client, Choice(request, request.first))
                elif isinstance(value, Pooling):
                    self.pool.jobs[work.job] = value
                else:
                    self.out.append((work.job, Answer(value)))
            self.credit -= time.monotonic() - began

    def next_waiting(self) -> Choice | None:
        """The first of the client that has the fewest slots, and of those the one that got its last one longest ago."""
        running = Counter(choice.request.client for choice in self.active.values())
        unread, answering = self.unread(), self.answering()

        def may_begin(request: Request) -> bool:
            last = len(self.active) == self.backend.slots - 1
            fits = self.prompts.allows([len(request.ids), *unread], answering, last)
            return fits and self.pace.allows(request.sampling.grammar)

        able = [client for client, line in self.waiting.lines.items() if may_begin(line[0].request)]
        if not able and self.active:
            return None
        client = min(able or self.waiting.lines, key=lambda client: (running[client], self.turns.get(client, 0)))
        choice = self.waiting.take(client)
        if len(self.turns) > 10_000:
            self.turns.clear()
        self.turns[client] = next(self.clock)
        return choice

    def admit(self) -> None:
        self.catch_up()
        while self.waiting and len(self.active) < self.backend.slots:
            choice = self.next_waiting()
            if choice is None:
                break
            request, sampling = choice.request, choice.request.sampling
            assert sampling.seed is not None
            if sampling.max_tokens == 0 and not sampling.scores_prompt:  # a mere echo needs no engine
                self.begin(choice, 0)
                self.emit(choice, Step(-1, ()))
                continue
            # 2**32 - 1 is llama.cpp's word for "any seed"
            own = replace(sampling, seed=(sampling.seed + choice.index) % (2**32 - 1), n=1)
            if choice.thinking and choice.thinking.pending:
                own = replace(own, grammar=None)
            began = time.monotonic()
            started = self.guarded(request.job, "start", lambda: self.backend.start(list(request.ids), own))  # noqa: B023
            self.pace.began(own.grammar, time.monotonic() - began, started is None)
            if started is None:
                continue
            seq, cached = started
            self.active[seq] = choice
            if choice.index == request.first:
                self.begin(choice, cached)

    def begin(self, choice: Choice, cached: int | None) -> None:
        """The engine has taken a prompt, with the first of its choices."""
        request = choice.request
        self.out.append((request.job, Started(len(request.ids), cached, time.monotonic())))
        if request.told is not None:
            cache = self.prefixes.explain(request.client, request.ids, cached, lambda ids: text_of(self.backend, ids))
            request.details = Details(request.text, list(request.ids), request.told, cache)
        self.prefixes.remember(request.client, request.ids, choice.made)

    def found(self, request: Request, cached: int) -> None:
        """Tokens of its prompt that the engine has found in its cache only when it came to compute."""
        self.out.append((request.job, Started(0, cached, time.monotonic())))
        if request.details:
            request.details.cache["cached_tokens"] = (request.details.cache["cached_tokens"] or 0) + cached

    def timed_step(self) -> None:
        reading, answering, began = bool(self.unread()), self.answering(), time.monotonic()
        self.step()
        took = time.monotonic() - began
        self.pace.stepped(took)
        given = self.prompts.stepped(took, reading, answering)
        self.credit = min(self.SHARE_S, self.credit + given / 2)

    def step(self) -> None:
        if not self.active:
            return
        again = []
        for step in self.backend.step():
            choice = self.active.get(step.seq)
            if choice is None:
                continue  # its job has just been refused
            if step.cached is not None and choice.index == choice.request.first:
                self.found(choice.request, step.cached)
            if step.error:
                self.cancel(choice.request.job)
                self.out.append((choice.request.job, step.error))
            elif self.emit(choice, step):
                del self.active[step.seq]
                self.backend.cancel(step.seq)
            elif choice.thinking and choice.thinking.again is not None:
                del self.active[step.seq]
                self.backend.cancel(step.seq)
                again.append(choice)
        for choice in again:
            self.start_again(choice)

    def start_again(self, choice: Choice) -> None:
        """Its reasoning has ended, or was ended: from here on with what there is, and the grammar."""
        request, thinking = choice.request, choice.thinking
        assert thinking and thinking.again is not None and request.sampling.seed is not None
        ids, sampling = thinking.again, request.sampling
        own = replace(
            sampling,
            n=1,
            grammar=request.chat.grammar if request.chat else None,  # what stood before it was for reasoning
            seed=(sampling.seed + choice.index) % (2**32 - 1),  # type: ignore[operator]
            max_tokens=(sampling.max_tokens or 0) - choice.taken,
            min_tokens=max(0, sampling.min_tokens - choice.taken),
        )
        thinking.started_again()
        began = time.monotonic()
        started = self.guarded(request.job, "start", lambda: self.backend.start(list(ids), own))
        self.pace.began(own.grammar, time.monotonic() - began, started is None)
        if started is not None:
            self.active[started[0]] = choice

    def emit(self, choice: Choice, step: Step) -> bool:
        """Send what a step brought. True when the choice has finished."""
        if choice.request.details:
            self.out.append((choice.request.job, choice.request.details))
            choice.request.details = None
        deltas = choice.take(step, self.backend)
        self.out += [(choice.request.job, delta) for delta in deltas]
        if choice.request.siblings:
            siblings, choice.request.siblings = choice.request.siblings, range(0)
            self.waiting.put_first(choice.request.client, [Choice(choice.request, index) for index in siblings])
        return deltas[-1].finish is not None

    def cancel(self, job: int) -> None:
        self.waiting.keep(lambda choice: choice.request.job != job)
        self.work.keep(lambda work: work.job != job)
        self.pool.jobs.pop(job, None)
        for seq in [seq for seq, c in self.active.items() if c.request.job == job]:
            del self.active[seq]
            self.backend.cancel(seq)


@dataclass(slots=True, eq=False)
class Pooling:
    """What a call wants pooled, and what its answer is once all the vectors are there, in the inputs' order."""

    inputs: list[Tokens]
    answer: Callable[[list[bytes]], Any]
    todo: list[int] = field(init=False)  # inputs that are in no batch yet, the longest last
    vectors: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.todo = sorted(range(len(self.inputs)), key=lambda i: len(self.inputs[i].ids))


class Pool:
    """Inputs of all calls on their way to vectors: one batch between two steps, calls in turn, what is left of it to the next."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.tokens, self.rows = getattr(backend, "pool_tokens", 512), getattr(backend, "pool_rows", 1)
        self.jobs: dict[int, Pooling] = {}  # whose turn it is comes first
        self.batch: list[tuple[int, Pooling, int]] = []  # (job, its pooling, which input)
        self.work: Iterator[list[bytes]] = iter(())

    def advance(self) -> list[tuple[int, Event]]:
        """One piece of a batch. What has failed fails for all who had a part in it."""
        if not self.batch and not self.fill():
            return []
        try:
            vectors = next(self.work)
        except Exception as error:
            if not isinstance(error, Refused):
                log.exception("engine: could not embed")
            told = error if isinstance(error, Refused) else EngineFailed(f"the engine could not embed: {one_line(error)}")
            jobs = {job for job, pooling, _ in self.batch if self.jobs.get(job) is pooling}
            self.batch = []
            return [(job, told) for job in jobs if self.jobs.pop(job)]
        if not vectors:
            return []
        events: list[tuple[int, Event]] = []
        for (job, pooling, i), vector in zip(self.batch, vectors, strict=True):
            pooling.vectors[i] = vector
            if len(pooling.vectors) == len(pooling.inputs) and self.jobs.get(job) is pooling:
                del self.jobs[job]
                events.append((job, Answer(pooling.answer([pooling.vectors[at] for at in range(len(pooling.inputs))]))))
        self.batch = []
        return events

    def fill(self) -> bool:
        """The next batch. Its padding counts, so that inputs of like length come together."""
        longest = 0
        for job, pooling in list(self.jobs.items()):
            before = len(self.batch)
            while pooling.todo and len(self.batch) < self.rows:
                longest = max(longest, len(pooling.inputs[pooling.todo[-1]].ids))
                if self.batch and longest * (len(self.batch) + 1) > self.tokens:
                    break
                self.batch.append((job, pooling, pooling.todo.pop()))
            if len(self.batch) > before:
                self.jobs[job] = self.jobs.pop(job)  # the others first, next time
        self.work = self.backend.embed([pooling.inputs[i] for _, pooling, i in self.batch]) if self.batch else iter(())
        return bool(self.batch)


def known(backend: Backend, ids: Any) -> Any:
    """The ids, all of which the weights know: a tokenizer may have words that were added and never trained."""
    if ids and max(ids) >= backend.vocabulary:
        raise Refused(f"The prompt has a token id over {backend.vocabulary - 1}, where the vocabulary ends.", "prompt")
    return ids


def encode(backend: Backend, prompt: Prompt, hidden: bool = False) -> tuple[str, list[int], int]:
    """(text, token ids, how many of them the tokenizer added in front where `hidden` asks for that)."""
    if prompt.messages is not None or prompt.rendered:
        text = rendered(backend, prompt)
        if len(text) // CHARACTERS > backend.context:  # tool calls and the like count too
            raise too_long("the prompt", "is far longer than", backend.context)
        return text, known(backend, backend.tokenize(text, False)), 0
    if prompt.tokens is not None:
        known(backend, prompt.tokens)
        return text_of(backend, prompt.tokens), list(prompt.tokens), 0
    text = prompt.text or ""
    ids = known(backend, backend.tokenize(text, True))
    plain = len(backend.tokenize(text, False)) if hidden and ids[:1] == [backend.bos] else len(ids)
    return text, ids, 1 if len(ids) > plain else 0


def text_of(backend: Backend, tokens: Sequence[int]) -> str:
    return b"".join(backend.piece(token, True) for token in tokens).decode("utf-8", "replace")


def rendered(backend: Backend, prompt: Prompt) -> str:
    """The text of a conversation: the workshop's, or that of a template which is the binding's own."""
    return backend.template.render(prompt) if prompt.messages is not None else prompt.text or ""


def call_tokenize(backend: Backend, prompt: Prompt, add_special: bool, pieces: bool) -> Iterator[dict[str, Any]]:
    if prompt.least_tokens() > 4 * backend.context:
        raise too_long("the text", "is far longer than", backend.context)
    text = rendered(backend, prompt)
    if len(text) // CHARACTERS > 4 * backend.context:
        raise too_long("the text", "is far longer than", backend.context)
    ids = backend.tokenize(text, add_special)
    answer: dict[str, Any] = {"tokens": ids, "count": len(ids), "max_model_len": backend.context}
    if pieces:
        answer["pieces"] = [backend.piece(token, True) for token in ids]
    yield answer


def call_detokenize(backend: Backend, tokens: Sequence[int]) -> Iterator[str]:
    yield encode(backend, Prompt(tokens=tuple(tokens)))[0]


def call_render(backend: Backend, prompt: Prompt) -> Iterator[str]:
    yield rendered(backend, prompt)


def call_embed(
    backend: Backend, prompts: Sequence[Prompt], prompt_name: str | None = None, limit: int | None = None
) -> Iterator[Pooling | None]:
    """`limit`: a longer input is cut there; -1: where the model ends; None: it is refused."""
    before = own_prompt(backend, prompt_name)
    inputs: list[Tokens] = []
    read = 0
    for prompt in prompts:
        inputs.append(pooled_text(backend, prompt, before, limit))
        read += len(inputs[-1].ids)
        if read > READ_AT_ONCE:  # running answers go on
            read = 0
            yield None
    tokens = sum(len(given.ids) for given in inputs)
    yield Pooling(inputs, lambda vectors: {"vectors": vectors, "tokens": tokens})


READ_AT_ONCE = 4096  # tokens of texts that are tokenized between two steps


def own_prompt(backend: Backend, name: str | None) -> str:
    prompts = getattr(backend, "prompts", {})
    if name is not None and name not in prompts:
        names = ", ".join(filter(None, prompts)) or "none"
        raise Refused(f"This model has no prompt of that name; it has: {names}.", "prompt_name")
    return str(prompts.get(name or "", ""))


def pooled_text(backend: Backend, prompt: Prompt, before: str, limit: int | None) -> Tokens:
    """Raises Refused: empty, too long, or ids that the weights do not know."""
    most = backend.context if limit in (None, -1) else min(limit or 0, backend.context)
    text = before + (prompt.text or "") if prompt.tokens is None else ""
    if limit is None and prompt.least_tokens() > most:
        raise too_long("an input", "is far longer than", most)
    if limit is not None:
        text = text[: 32 * most]  # a token is rarely longer, and the rest would be cut
    ids = known(backend, backend.tokenize(text, True) if prompt.tokens is None else list(prompt.tokens))
    if not ids:
        raise Refused("An input is empty.", "prompt")
    if len(ids) > most and limit is not None:
        plain = backend.tokenize(text, False) if prompt.tokens is None else ids
        at = next((at for at in range(4) if ids[at : at + len(plain)] == plain), 0)  # what stands around the text stays
        tail = ids[at + len(plain) :][: most - 1]
        ids = ids[: most - len(tail)] + tail
    if len(ids) > most:
        raise too_long(f"an input has {len(ids)} tokens, which", "exceed", most)
    return Tokens(ids)


def call_score(
    backend: Backend, queries: Sequence[str], documents: Sequence[str], limit: int | None = None, ranks: bool = False
) -> Iterator[Pooling | None]:
    """One number for each pair; an only query stands with every document. A reranker reads both texts at once, of a model
    that embeds it is the cosine of its two vectors, where it `ranks` each behind the model's prompt for its kind.
    """
    pair = getattr(backend, "pair", None)
    pairs = list(zip(queries, documents, strict=True)) if len(queries) > 1 else [(queries[0], text) for text in documents]
    kinds = (("query",), ("document", "passage", "corpus")) if ranks else ((), ())
    known_prompts = getattr(backend, "prompts", {})
    befores = [next((known_prompts[name] for name in kind if name in known_prompts), None) for kind in kinds]
    inputs: list[Tokens] = []
    read = 0
    texts: Sequence[Any] = pairs if pair else [*queries, *documents]
    for i, given in enumerate(texts):
        if pair:
            inputs.append(pooled_pair(backend, given[0], given[1], limit))
        else:
            before = befores[i >= len(queries)]
            before = own_prompt(backend, None) if before is None else before
            inputs.append(pooled_text(backend, Prompt(text=given), before, limit))
        read += len(inputs[-1].ids)
        if read > READ_AT_ONCE:
            read = 0
            yield None
    tokens = sum(len(given.ids) for given in inputs)

    def answer(vectors: list[bytes]) -> dict[str, Any]:
        numbers = [memoryview(vector).cast("f") for vector in vectors]
        if pair:
            return {"scores": [float(number[0]) for number in numbers], "tokens": tokens}
        others = numbers[len(queries) :]
        first = numbers[: len(queries)] if len(queries) > 1 else numbers[:1] * len(others)
        return {"scores": [cosine(a, b) for a, b in zip(first, others, strict=True)], "tokens": tokens}

    yield Pooling(inputs, answer)


def pooled_pair(backend: Any, query: str, document: str, limit: int | None) -> Tokens:
    """Raises Refused: too long."""
    most = backend.context if limit in (None, -1) else min(limit or 0, backend.context)
    if limit is None and (len(query) + len(document)) // 32 > most:
        raise too_long("a pair", "is far longer than", most)
    cut = document[: 32 * most] if limit is not None else document
    found: Tokens = backend.pair(query, cut, None if limit is None else most)
    known(backend, found.ids)
    if len(found.ids) > most:
        raise too_long(f"a query with its document has {len(found.ids)} tokens, which", "exceed", most)
    return found


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product, squares = sum(map(operator.mul, a, b)), sum(map(operator.mul, a, a)) * sum(map(operator.mul, b, b))
    return float(product / (squares**0.5 or 1.0))


CALLS: dict[str, Callable[..., Iterator[Any]]] = {
    "tokenize": call_tokenize,
    "detokenize": call_detokenize,
    "render": call_render,
    "embed": call_embed,
    "score": call_score,
}


def too_long(subject: str, verb: str, context: float) -> Refused:
    message = f"This model's context is {context} tokens, and {subject} {verb} it. Shorten the prompt or lower max_tokens."
    return Refused(message, "prompt", "context_length_exceeded")


def one_line(error: BaseException) -> str:
    """The last line that says something: native libraries put the reason at the end of a page of context."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


def backend_class(name: str, task: str = "generate", exact: bool = False) -> type[Backend]:
    """By its name in backends.BACKENDS, exact.EXACT or embedders.EMBEDDERS, or as "module:Class" for a binding of your own."""
    if ":" not in name:  # imported here: they import us
        found: type[Backend] | None
        generating = ("exact", "EXACT") if exact else ("backends", "BACKENDS")
        room, table = generating if task == "generate" else ("embedders", "EMBEDDERS")
        found = getattr(importlib.import_module(room), table).get(name)
        if found is None:
            raise RuntimeError(f"{name} does not honour --deterministic")
        return found
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    return found


def public(reason: str) -> str:
    """A reason as anybody may read it: one line without control characters, of every path only the last name."""
    text = re.sub(r"\w+://\S+", "the upstream", reason)
    text = re.sub(r"(?<![\w.])(?:[A-Za-z]:)?(?:[/\\][^/\\\s:'\"]+)*[/\\](?=[^/\\\s:'\"])", "", text)
    return "".join(char if char.isprintable() else " " for char in text)[:300]


def run_engine(conn: Connection, spec: EngineSpec) -> None:
    """The engine process's main. Tells the server how the load goes, then runs the loop."""

    def tell(kind: str, payload: Any) -> None:
        try:
            conn.send_bytes(pack(kind, payload))
        except OSError:
            os._exit(0)  # the server is gone

    try:
        backend = backend_class(spec.backend, spec.task, spec.deterministic)(
            spec, lambda fraction: tell("progress", float(fraction))
        )
    except Exception as error:
        log.debug("load failed", exc_info=True)
        tell("failed", f"{spec.path}: {one_line(error)}")
        return
    if spec.length and spec.length > backend.context:
        log.warning("--length %d is more than this model's context here: %d tokens", spec.length, backend.context)
    backend.context = min(backend.context, spec.length or backend.context)
    if spec.tool_syntax:
        backend.template.choose(spec.tool_syntax)  # type: ignore[attr-defined]
    info = EngineInfo(
        backend=spec.backend,
        library=backend.library,
        slots=backend.slots,
        threads=backend.threads,
        context=backend.context,
        cache_tokens=backend.cache_tokens,
        fingerprint=fingerprint(spec, backend.library, backend.slots, backend.threads),
        placement=getattr(backend, "placement", ""),
        tokenizer=getattr(backend.template, "tokens", {}) | {"chat_template": getattr(backend.template, "source", None)},
        recipe=getattr(backend.template, "recipe", ()),
        defaults=FALLBACK | backend.defaults,
    )
    tell("ready", asdict(info))
    gc.collect()
    gc.freeze()  # what was loaded stays: no collection walks it again between two steps
    EngineLoop(conn, backend).run()
    backend.close()


def fingerprint(spec: EngineSpec, *settings: object) -> str:
    """`system_fingerprint`: two replies with the same one come from the same weights, library and batch settings.

    It ends in `_deterministic` where a text does not depend on what else runs.
    """
    files = sorted(weight_files(spec.path))
    weights = [(os.path.basename(f), os.path.getsize(f), int(os.path.getmtime(f))) for f in files]
    own = (
        spec.device,
        spec.dtype,
        spec.flags,
        spec.draft,
        spec.ngram,
        spec.draft_tokens,
        spec.options,
        spec.step_target,
        spec.deterministic,
    )
    text = repr((spec.backend, weights, spec.chat_template, own, settings))
    return "fp_" + hashlib.sha256(text.encode()).hexdigest()[:12] + "_deterministic" * spec.deterministic


def weight_files(path: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    return [e.path for e in os.scandir(path) if e.is_file() and e.name.endswith((".gguf", ".bin", ".xml", ".safetensors"))]
