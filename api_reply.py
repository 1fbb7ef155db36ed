"""What a reply looks like: a completion, its chunks, its log probabilities. Pure functions over deltas: no socket, no engine.

One assembler, Completion, stands above all engines, so that an answer has the same shape whichever of them made it.
"""

from __future__ import annotations

import base64
import codecs
import json
import math
import struct
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from api_errors import ApiError
from api_request import Constraint
from constraints import violation
from engine import Delta, Details, Event, Started, TokenLogprob, log
from metrics import Tally

ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for every call


def compact(value: Any) -> bytes:
    return ENCODER.encode(value).encode("utf-8", "replace")


@dataclass(slots=True)
class Part:
    """A run of one choice: text, reasoning, or one call with its arguments."""

    kind: str  # "content" | "reasoning" | "call"
    pieces: list[str] = field(default_factory=list)
    name: str = ""  # of a call, as its id
    id: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def call(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.text}}


class Choice:
    """One choice, assembled from its deltas."""

    def __init__(self) -> None:
        self.parts: list[Part] = []  # in the order in which they came
        self.finish: str | None = None
        self.logprobs: list[TokenLogprob] = []
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # for text_offset: characters may span tokens
        self.offset = 0  # characters of the tokens so far
        self.stop = ""  # the stop string that ended it
        self.last_at = 0.0  # its last delta's, where gaps are counted

    def add(self, delta: Delta) -> None:
        if delta.kind == "call":
            self.parts.append(Part("call", [], delta.text, delta.id))
        elif delta.text:
            if not self.parts or delta.kind not in (self.parts[-1].kind, "arguments"):
                self.parts.append(Part(delta.kind))
            self.parts[-1].pieces.append(delta.text)

    def said(self, kind: str) -> str:
        """All its text of one kind."""
        return "".join(part.text for part in self.parts if part.kind == kind)

    @property
    def text(self) -> str:
        return self.said("content")

    @property
    def calls(self) -> list[Part]:
        return [part for part in self.parts if part.kind == "call"]

    def record(self) -> dict[str, Any]:
        """What --record keeps of it: all that is the same when the request is run again."""
        calls = [{"name": part.name, "arguments": part.text} for part in self.calls]
        more = {"reasoning": self.said("reasoning"), "tool_calls": calls}
        return {"text": self.text, "finish_reason": self.finish} | {name: value for name, value in more.items() if value}


@dataclass(slots=True)
class Completion:
    """One request's answer as it comes: what every chunk repeats, and what the usage and the log line count."""

    id: str
    model: str
    fingerprint: str
    choices: list[Choice]
    shape: Shape
    logprobs: bool = False  # wanted
    constraint: Constraint | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    cached_tokens: int | None = 0  # None: the engine cannot tell, and the reply has no such member
    tokens: int = 0
    reasoning_tokens: int = 0  # of them
    promised: dict[str, Any] = field(default_factory=dict)  # tools whose calls satisfy their schema: name → schema
    reasons: bool = False  # the model does, or may
    hide_reasoning: bool = False
    functions: bool = False  # asked for in the older spelling, and told in it
    started_at: float = 0.0  # these three: seconds on the engine's clock
    first_at: float = 0.0
    last_at: float = 0.0
    details: list[Details] = field(default_factory=list)
    gaps: Tally | None = None  # the times between tokens, where they are wanted

    def start(self, event: Started) -> None:
        self.started_at = self.started_at or event.at
        self.prompt_tokens += event.prompt_tokens
        known = self.cached_tokens is not None and event.cached_tokens is not None
        self.cached_tokens = (self.cached_tokens or 0) + (event.cached_tokens or 0) if known else None

    def add(self, delta: Delta) -> Delta:
        """Take a delta in; returns it as the client is to see it: `stop` only where a constraint holds."""
        choice = self.choices[delta.choice]
        self.tokens += delta.tokens
        self.reasoning_tokens += delta.tokens if delta.kind == "reasoning" else 0
        self.first_at, self.last_at = self.first_at or delta.at, delta.at
        choice.add(delta)
        if delta.finish == "tool_calls" and (wrong := self.wrong_call(choice)):
            log.info("%s: a call leaves its schema: %s", self.id, wrong)
            delta = delta._replace(finish="length")
        if self.gaps and delta.tokens:
            if choice.last_at:
                self.gaps.observe((delta.at - choice.last_at) / delta.tokens, delta.tokens)
            choice.last_at = delta.at
        if delta.finish in ("stop", "cut"):
            text, cut = choice.text, delta.finish == "cut"
            wrong = self.constraint.fault(text, cut) if self.constraint else None
            if wrong:
                log.info("%s: a stop string or token has cut a constrained text: %s", self.id, wrong)
            delta = delta._replace(finish="length" if wrong else "stop")
        choice.finish, choice.stop = delta.finish, delta.stop
        return delta

    def wrong_call(self, choice: Choice) -> str | None:
        """What is wrong with a call that was promised to satisfy its schema; None where nothing is."""
        for call in choice.calls:
            schema = self.promised.get(call.name)
            if schema is not None and (wrong := violation(schema, json.loads(call.text))):
                return wrong
        return None

    def finishes(self) -> Iterable[str]:
        """How each choice ended, for the counters; none was begun where the engine has not taken the prompt."""
        return [choice.finish or "aborted" for choice in self.choices] if self.started_at else []

    def usage(self) -> dict[str, Any]:
        details = (
            {"completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens}}
            if self.reasons or self.reasoning_tokens
            else {}
        )
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "prompt_tokens_details": {} if self.cached_tokens is None else {"cached_tokens": self.cached_tokens},
            **details,
        }

    def finish_of(self, finish: str | None) -> str | None:
        return "function_call" if finish == "tool_calls" and self.functions else finish

    def timings(self) -> dict[str, Any]:
        """llama-server's names. Prefill up to the first token, then decoding; by the engine's clock, the queue left out."""
        prompt_ms, predicted_ms = (self.first_at - self.started_at) * 1000, (self.last_at - self.first_at) * 1000
        prompt_n = self.prompt_tokens - (self.cached_tokens or 0)
        return ({} if self.cached_tokens is None else {"cache_n": self.cached_tokens}) | {
            "prompt_n": prompt_n,
            "prompt_ms": round(prompt_ms, 3),
            "prompt_per_second": round(prompt_n / prompt_ms * 1000, 2) if prompt_ms > 0 else None,
            "predicted_n": self.tokens,
            "predicted_ms": round(predicted_ms, 3),
            "predicted_per_second": round(max(0, self.tokens - len(self.choices)) / predicted_ms * 1000, 2)
            if predicted_ms > 0
            else None,
        }

    def reply(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.shape.whole,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [
                {
                    "index": i,
                    **self.shape.content(self, choice),
                    "logprobs": self.shape.logprobs(choice, choice.logprobs) if self.logprobs else None,
                    "finish_reason": self.finish_of(choice.finish),
                }
                for i, choice in enumerate(self.choices)
            ],
            "usage": self.usage(),
            "timings": self.timings(),
        }


def chat_logprobs(_: Choice, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    def named(data: bytes, logprob: float | None) -> dict[str, Any]:
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": logprob}

    shown = [entry for entry in entries if entry.shown]
    content = [named(e.data, e.logprob) | {"top_logprobs": [named(*pair) for pair in e.top]} for e in shown]
    return {"content": content, "refusal": None}


def text_logprobs(choice: Choice, entries: Iterable[TokenLogprob]) -> dict[str, Any]:
    """The legacy shape. Every token is listed, also the EOS that ended the text; text_offset counts characters."""

    def name(data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    shape: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for entry in entries:
        shape["tokens"].append(name(entry.data))
        shape["token_logprobs"].append(entry.logprob)
        top = dict(reversed([(name(data), logprob) for data, logprob in entry.top]))
        shape["top_logprobs"].append(None if entry.logprob is None else {name(entry.data): entry.logprob} | top)
        shape["text_offset"].append(choice.offset)
        choice.offset += len(choice.utf8.decode(entry.data)) if entry.shown else 0
    return shape


def chat_content(completion: Completion, choice: Choice) -> dict[str, Any]:
    text, reasoning = choice.text, choice.said("reasoning")
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not choice.calls else None, "refusal": None}
    if reasoning and not completion.hide_reasoning:
        message |= {"reasoning_content": reasoning, "reasoning": reasoning}
    if choice.calls and completion.functions:
        message["function_call"] = choice.calls[0].call()["function"]
    elif choice.calls:
        message["tool_calls"] = [part.call() for part in choice.calls]
    return {"message": message}


class Shape(NamedTuple):
    """What differs between the chat and the legacy text route."""

    prefix: str
    whole: str  # "object" of a reply
    part: str  # "object" of a chunk
    content: Callable[[Completion, Choice], dict[str, Any]]
    logprobs: Callable[[Choice, Iterable[TokenLogprob]], dict[str, Any]]
    opening: bytes  # what a stream begins with, for each choice
    piece: bytes  # a chunk's text, already JSON
    closing: bytes


CHAT_SHAPE = Shape(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    chat_content,
    chat_logprobs,
    b'"delta":{"role":"assistant","content":"","refusal":null}',
    b'"delta":{"content":%s}',
    b'"delta":{}',
)
TEXT_SHAPE = Shape(
    "cmpl-",
    "text_completion",
    "text_completion",
    lambda _, choice: {"text": choice.text},
    text_logprobs,
    b"",
    b'"text":%s',
    b'"text":""',
)


class Rendering(Protocol):
    """How a route tells a completion: its deltas as a stream's events, or all of it at once. No socket: bytes and JSON.

    Each delta goes through Completion.add first. `debug` holds further members of a reply, or none.
    """

    def opening(self) -> bytes: ...  # once the engine has taken the request, before the first delta
    def delta(self, delta: Delta) -> bytes: ...  # empty where there is nothing to tell
    def end(self, debug: dict[str, Any]) -> bytes: ...
    def whole(self, debug: dict[str, Any]) -> dict[str, Any]: ...
    def failed(self, error: ApiError) -> bytes: ...  # the end of a stream that cannot go on


class Chunks:
    """The SSE events of one streamed completion. Only the text is serialized per chunk: the rest is the same in all."""

    def __init__(self, completion: Completion, include_usage: bool):
        self.completion, self.shape, self.include_usage = completion, completion.shape, include_usage
        head = {"id": completion.id, "object": self.shape.part, "created": completion.created, "model": completion.model}
        head["system_fingerprint"] = completion.fingerprint
        self.head = b"data: " + compact(head)[:-1] + b',"choices":['
        self.tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        pieces = (self.chunk(i, self.shape.piece % b"\0") for i in range(len(completion.choices)))
        self.around = [piece.split(b"\0") for piece in pieces]  # a piece of text, for each choice

    def chunk(self, index: int, content: bytes, logprobs: bytes = b"null", finish: bytes = b"null") -> bytes:
        return b'%s{"index":%d,%s,"logprobs":%s,"finish_reason":%s}%s' % (
            self.head,
            index,
            content,
            logprobs,
            finish,
            self.tail,
        )

    def opening(self) -> bytes:
        count = range(len(self.completion.choices))
        return b"".join(self.chunk(i, self.shape.opening) for i in count) if self.shape.opening else b""

    def delta(self, delta: Delta) -> bytes:
        out, logprobs = b"", b"null"
        if delta.logprobs and self.completion.logprobs:
            logprobs = compact(self.shape.logprobs(self.completion.choices[delta.choice], delta.logprobs))
        if delta.kind != "content":
            out = self.special(delta, logprobs)
        elif logprobs != b"null":
            out = self.chunk(delta.choice, self.shape.piece % compact(delta.text), logprobs)
        elif delta.text:
            before, after = self.around[delta.choice]
            out = before + compact(delta.text) + after
        if delta.finish:
            finish = self.completion.finish_of(delta.finish) or ""
            out += self.chunk(delta.choice, self.shape.closing, finish=b'"%s"' % finish.encode())
        return out

    def special(self, delta: Delta, logprobs: bytes) -> bytes:
        """A chunk of reasoning, or of a call; empty where there is nothing to tell."""
        completion = self.completion
        said: dict[str, Any] = {}
        index = len(completion.choices[delta.choice].calls) - 1
        if delta.kind == "reasoning":
            if delta.text and not completion.hide_reasoning:
                said = {"reasoning_content": delta.text, "reasoning": delta.text}
        elif completion.functions:
            call = {"name": delta.text, "arguments": ""} if delta.kind == "call" else {"arguments": delta.text}
            said = {"function_call": call} if index == 0 else {}
        elif delta.kind == "call":
            function = {"name": delta.text, "arguments": ""}
            said = {"tool_calls": [{"index": index, "id": delta.id, "type": "function", "function": function}]}
        elif delta.text:
            said = {"tool_calls": [{"index": index, "function": {"arguments": delta.text}}]}
        if not said and logprobs == b"null":
            return b""
        return self.chunk(delta.choice, b'"delta":%s' % compact(said), logprobs)

    def last(self, **members: Any) -> bytes:
        """A chunk without choices."""
        return self.head + b"]," + compact(members)[1:] + b"\n\n"

    def end(self, debug: dict[str, Any]) -> bytes:
        last = self.last(**debug) if debug else b""
        if self.include_usage:
            last += self.last(usage=self.completion.usage(), timings=self.completion.timings())
        return last + DONE

    def whole(self, debug: dict[str, Any]) -> dict[str, Any]:
        return self.completion.reply() | debug

    def failed(self, error: ApiError) -> bytes:
        return sse(error.body()) + DONE


DONE = b"data: [DONE]\n\n"


def sse(payload: Any, event: str = "") -> bytes:
    name = b"event: %s\n" % event.encode() if event else b""
    return name + b"data: " + compact(payload) + b"\n\n"


def merge(events: list[Event | Exception]) -> Iterator[Event | Exception]:
    """One delta per choice and kind of text out of what has queued up: a slow client gets bigger chunks, not a longer queue."""
    if len(events) == 1:
        yield events[0]
        return
    merged: dict[int, list[Delta]] = {}
    end = next((at for at, event in enumerate(events) if isinstance(event, Exception)), len(events))
    for event in events[:end]:
        if not isinstance(event, Delta):
            yield event
            continue
        run = merged.setdefault(event.choice, [])
        if run and run[-1].kind == event.kind != "call":
            old = run[-1]
            run[-1] = event._replace(
                text=old.text + event.text, tokens=old.tokens + event.tokens, logprobs=old.logprobs + event.logprobs
            )
        else:
            run.append(event)
    for run in merged.values():
        yield from run
    yield from events[end : end + 1]  # an error: what came before it is told before it, and what comes after it to nobody


def piece_json(piece: bytes) -> str | list[int]:
    """llama-server's rule: a string, or the bytes where they are half a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def embeddings(vectors: list[bytes], values: dict[str, Any], model: str, tokens: int) -> bytes:
    """The embeddings reply. Numbers are written here: JSON's own encoder would take longer than a small model does."""
    rows = []
    for i, vector in enumerate(vectors):
        packed = shortened(vector, values["dimensions"]) if "dimensions" in values else vector
        if values.get("encoding_format") == "base64":  # what the official SDK asks for
            said = b'"%s"' % base64.b64encode(packed)
        else:
            said = b"[%s]" % (b"%.9g," * (len(packed) // 4) % struct.unpack(f"<{len(packed) // 4}f", packed))[:-1]
        rows.append(b'{"object":"embedding","index":%d,"embedding":%s}' % (i, said))
    rest = compact({"model": model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return b'{"object":"list","data":[%s],%s' % (b",".join(rows), rest[1:])


def shortened(vector: bytes, wanted: int) -> bytes:
    """Its first numbers, of length 1 again."""
    numbers = struct.unpack(f"<{len(vector) // 4}f", vector)
    if wanted > len(numbers):
        raise ApiError(400, f"'dimensions' must be at most {len(numbers)} for this model.", "dimensions")
    if wanted == len(numbers):
        return vector
    length = math.hypot(*numbers[:wanted]) or 1.0
    return struct.pack(f"<{wanted}f", *(x / length for x in numbers[:wanted]))


def ranking(scores: list[float], values: dict[str, Any], model: str, tokens: int) -> dict[str, Any]:
    """The reply of /rerank, in Jina's and Cohere's shape: the best first."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: values.get("top_n")]
    results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if values.get("return_documents"):
        results = [result | {"document": {"text": values["documents"][result["index"]]}} for result in results]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"id": f"rerank-{uuid.uuid4().hex}", "object": "list", "model": model, "results": results, "usage": usage}


def pair_scores(scores: list[float], model: str, tokens: int) -> dict[str, Any]:
    """The reply of /score, in vLLM's shape."""
    data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
    head = {"id": f"score-{uuid.uuid4().hex}", "object": "list", "created": int(time.time()), "model": model, "data": data}
    return head | {"usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
