# /// script
# requires-python = ">=3.10"
# dependencies = ["openvino-genai==2026.4.1.0", "jinja2==3.1.6", "pip"]
# ///
"""Serve a local language model over the OpenAI API:  python openai_api_endpoint.py --model-dir X --port 9999

The law: one engine process per loaded model; in it, one thread is the only one that ever touches the native library;
a producer never waits for a consumer. (backends.py draws the engine's side.)

This module owns HTTP, JSON, SSE and the OpenAI schema. The main thread only accepts; each connection has a thread of its own:
  ROUTES -> body -> read_fields -> Prompt + Sampling -> models.submit -> Job -> events -> JSON or SSE -> socket
Back-pressure is the socket's timeout. Cancellation is one `finally: job.cancel()`. Every error is an ApiError,
raised anywhere and rendered in one place. The first delta decides the status line: until then any error has its real status.
"""

from __future__ import annotations

import argparse
import hmac
import json
import logging
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import model_init
from backends import LOG_FORMAT, Delta, Engine, EngineFailed, Event, Job, Prompt, QueueFull, Refused, Sampling, Started, log
from model_init import Models, NotReady, UsageError

VERSION = "0.1.0"

# ───────────────────────────────────────────────────── errors ────────────────────────────────────────────────────

ERROR_TYPES = {  # what is not here is the client's fault
    401: "authentication_error",
    409: "conflict_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "upstream_error",
    503: "unavailable_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """An error with its wire face. `close`: the connection's framing is lost, so it ends with this reply."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        close: bool = False,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers, self.close = tuple(headers), close

    def body(self) -> dict[str, Any]:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class PeerGone(Exception):
    """The client has left: nobody is there to tell."""


def as_api_error(error: Exception) -> ApiError:
    """What the layers below raise, as a client sees it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Refused):
        return ApiError(400, error.message, error.param, error.code)
    if isinstance(error, QueueFull):
        return ApiError(
            429,
            "All slots are busy and the queue is full. Try again in a moment.",
            code="queue_full",
            headers=[("Retry-After", "1")],
        )
    if isinstance(error, NotReady):
        return ApiError(503, f"Not ready: {error}.", code="not_ready", headers=[("Retry-After", "2")])
    if isinstance(error, EngineFailed):
        return ApiError(500, f"The engine failed: {error}. Try again.", code="engine_failed")
    log.error("bug: %s", error, exc_info=error)
    return ApiError(500, "Internal error; the server's log has the details.", code="internal_error")


# ──────────────────────────────────────────── the request, field by field ────────────────────────────────────────


class Kind(NamedTuple):
    """A type with its range: `says` completes "must be …", `read` returns the value or raises ValueError."""

    says: str
    read: Callable[[Any], Any]


def check(condition: bool) -> None:
    if not condition:
        raise ValueError


def number(low: float, high: float, above: bool = False) -> Kind:
    def read(value: Any) -> float:
        check(isinstance(value, (int, float)) and not isinstance(value, bool))
        check(low <= value <= high and not (above and value == low))  # NaN fails it
        return float(value)

    if high == BIG:
        return Kind(f"a number above {low:g}" if above else f"a number, {low:g} or more", read)
    return Kind(f"a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}", read)


def integer(low: int, high: int) -> Kind:
    def read(value: Any) -> int:
        check(isinstance(value, (int, float)) and not isinstance(value, bool))
        check(low <= value <= high and value == int(value))  # clients send 1 and 1.0 alike
        return int(value)

    if high == BIG:
        return Kind(f"an integer, {low} or more", read)
    return Kind("an integer" if low == -BIG else f"an integer from {low} to {high}", read)


def read_boolean(value: Any) -> bool:
    check(isinstance(value, bool))
    return bool(value)


def read_string(value: Any) -> str:
    check(isinstance(value, str))
    return str(value)


def read_stop(value: Any) -> list[str | int]:
    items = value if isinstance(value, list) else [value]
    check(len(items) <= 16)
    for item in items:
        if isinstance(item, str):
            check(0 < len(item) <= 256)
        else:
            check(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < BIG)
    return items


def read_stream_options(value: Any) -> bool:
    check(isinstance(value, dict) and set(value) <= {"include_usage", "include_obfuscation"})
    check(value.get("include_obfuscation", False) in (False, None))
    return read_boolean(value.get("include_usage") or False)


BIG = 2**63 - 1
BOOLEAN = Kind("true or false", read_boolean)
STRING = Kind("a string", read_string)
STOP = Kind("a string of 1 to 256 characters, a token id, or up to 16 of either", read_stop)
STREAM_OPTIONS = Kind('an object like {"include_usage": true}', read_stream_options)

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_KEYS = ("name", "tool_calls", "tool_call_id", "reasoning_content")  # passed on: templates know them


def read_messages(value: Any) -> tuple[dict[str, Any], ...]:
    """[{role, content}] with the content's text parts joined. Other keys that clients send back are dropped."""
    if not isinstance(value, list) or not value:
        raise ApiError(400, "'messages' must be a non-empty array of {role, content}.", "messages")
    return tuple(read_message(message, f"messages[{i}]") for i, message in enumerate(value))


def read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f"'{where}' must be an object with role and content.", where)
    role = message.get("role")
    if role not in ROLES:
        raise ApiError(400, f"'{where}.role' must be one of {', '.join(ROLES)}.", f"{where}.role")
    content = message.get("content")
    if content is None and role != "assistant":
        raise ApiError(400, f"'{where}.content' must be a string or an array of text parts.", f"{where}.content")
    kept = {key: message[key] for key in MESSAGE_KEYS if message.get(key)}
    return {"role": role, "content": read_content(content, f"{where}.content"), **kept}


def read_content(content: Any, where: str) -> str:
    """The one place that turns message parts into text."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ApiError(400, f"'{where}' must be a string or an array of text parts.", where)
    for i, part in enumerate(content):
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else None
            hint = f" This server has no parts of type {kind!r}." if isinstance(kind, str) and kind != "text" else ""
            raise ApiError(400, f'\'{where}[{i}]\' must be {{"type":"text","text":…}}.{hint}', f"{where}[{i}]")
    return "".join(part["text"] for part in content)


MESSAGES = Kind("a non-empty array of {role, content}", read_messages)

# Each field that is honoured: what it must be, and what it does. README's table is made from these rows.
FIELDS: dict[str, tuple[Kind, str]] = {
    "messages": (MESSAGES, "the conversation; content is a string or an array of text parts"),
    "model": (STRING, "any name: the one served model answers, and the name is echoed"),
    "stream": (BOOLEAN, "answer as server-sent events"),
    "stream_options": (STREAM_OPTIONS, "`include_usage`: one more chunk with the usage; only with stream"),
    "max_tokens": (integer(1, BIG), "most tokens to generate; default: what the context has left"),
    "max_completion_tokens": (integer(1, BIG), "the same, and wins over max_tokens"),
    "temperature": (number(0, 2), "0 is greedy; default: the model's own, else 0.7"),
    "top_p": (number(0, 1, above=True), "nucleus sampling; default: the model's own, else 1"),
    "top_k": (integer(-1, BIG), "sample from the k best; 0 or -1 is off; default: the model's own, else off"),
    "min_p": (number(0, 1), "drop tokens less likely than min_p times the best; default 0"),
    "presence_penalty": (number(-2, 2), "against tokens already in the completion; default 0"),
    "frequency_penalty": (number(-2, 2), "the same, by how often; default 0"),
    "repetition_penalty": (number(0, BIG, above=True), "against tokens already in prompt or completion, 1 is off; default 1"),
    "n": (integer(1, 8), "independent choices; they share one prefill; default 1"),
    "seed": (integer(-BIG, BIG), "same seed, same sampling; choice i uses seed + i"),
    "stop": (STOP, "end before this text or token; never part of the answer"),
}
ALIASES = {"repeat_penalty": "repetition_penalty"}
INERT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)  # change nothing about an answer

# Each field that would change the answer and is not honoured, with the values at which it changes nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": ("",),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
}


class Fields(NamedTuple):
    """A request body, read: fields that were given, and names that nobody knows."""

    values: dict[str, Any]
    ignored: list[str]


def read_fields(body: Any) -> Fields:
    """Every field is honoured, inert, refused by name (400), or unknown and listed. null is absent."""
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    values: dict[str, Any] = {}
    ignored: list[str] = []
    for sent, value in body.items():
        name = ALIASES.get(sent, sent)
        if value is None or name in INERT:
            continue
        if name in FIELDS:
            try:
                values[name] = FIELDS[name][0].read(value)
            except (ValueError, OverflowError):
                raise ApiError(400, f"'{sent}' must be {FIELDS[name][0].says}.", sent) from None
        elif name in REFUSED:
            if value not in REFUSED[name]:
                raise ApiError(400, f"'{sent}' is not supported by this server: leave it out.", sent, "unsupported_parameter")
        else:
            ignored.append(sent)
    check_together(values)
    return Fields(values, ignored)


def check_together(values: dict[str, Any]) -> None:
    """What relates two fields."""
    if "messages" not in values:
        raise ApiError(400, "'messages' is required: a non-empty array of {role, content}.", "messages")
    if "stream_options" in values and not values.get("stream"):
        raise ApiError(400, "'stream_options' is only allowed with stream: true.", "stream_options")


def sampling_from(values: dict[str, Any]) -> Sampling:
    same = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "n", "seed")
    stop = values.get("stop", [])
    top_k = values.get("top_k")
    return Sampling(
        max_tokens=values.get("max_completion_tokens", values.get("max_tokens")),
        top_k=None if top_k is None else min(max(top_k, 0), 2**31 - 1),
        stop=tuple(item for item in stop if isinstance(item, str)),
        stop_token_ids=tuple(item for item in stop if isinstance(item, int)),
        **{name: values[name] for name in same if name in values},
    )


def parse_json(body: bytes) -> Any:
    """JSON that cannot hurt: bounded numbers, bounded nesting, no text that is not Unicode."""

    def whole(digits: str) -> int:
        if len(digits) > 32:
            raise ValueError("a number is too long")
        return int(digits)

    try:
        value = json.loads(body, parse_int=whole)
        if b"\\ud" in body.lower():  # an escaped surrogate without its other half is not text, and no engine can encode it
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from None
    return value


# ───────────────────────────────────────────── the reply, pure functions ─────────────────────────────────────────


def compact(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


@dataclass(slots=True)
class Choice:
    """One choice, assembled from its deltas."""

    text: list[str] = field(default_factory=list)
    finish: str | None = None


@dataclass(slots=True)
class Completion:
    """One request's answer as it comes: what every chunk repeats, and what the usage and the log line count."""

    id: str
    model: str
    fingerprint: str
    choices: list[Choice]
    created: int = field(default_factory=lambda: int(time.time()))
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    tokens: int = 0

    def add(self, delta: Delta) -> None:
        choice = self.choices[delta.choice]
        self.tokens += delta.tokens
        choice.text.append(delta.text)
        choice.finish = delta.finish

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def reply(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": [
                {
                    "index": i,
                    "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
                    "logprobs": None,
                    "finish_reason": choice.finish,
                }
                for i, choice in enumerate(self.choices)
            ],
            "usage": self.usage(),
        }


class Chunks:
    """The SSE events of one streamed completion. Only the text is serialized per chunk: the rest is the same in all."""

    def __init__(self, completion: Completion, include_usage: bool):
        head = {
            "id": completion.id,
            "object": "chat.completion.chunk",
            "created": completion.created,
            "model": completion.model,
        }
        head["system_fingerprint"] = completion.fingerprint
        self.head = b"data: " + compact(head)[:-1] + b',"choices":['
        self.tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def chunk(self, index: int, delta: bytes, finish: bytes = b"null") -> bytes:
        return b'%s{"index":%d,"delta":%s,"logprobs":null,"finish_reason":%s}%s' % (self.head, index, delta, finish, self.tail)

    def role(self, index: int) -> bytes:
        return self.chunk(index, b'{"role":"assistant","content":"","refusal":null}')

    def delta(self, delta: Delta) -> bytes:
        out = self.chunk(delta.choice, b'{"content":%s}' % compact(delta.text)) if delta.text else b""
        if delta.finish:
            out += self.chunk(delta.choice, b"{}", b'"%s"' % delta.finish.encode())
        return out

    def usage(self, usage: dict[str, Any]) -> bytes:
        return self.head + b'],"usage":' + compact(usage) + b"}\n\n"


DONE = b"data: [DONE]\n\n"


def error_event(error: ApiError) -> bytes:
    return b"data: " + compact(error.body()) + b"\n\n"


def merge(events: list[Event]) -> Iterator[Event]:
    """One delta per choice out of what has queued up: a slow client gets bigger chunks, not a longer queue."""
    if len(events) == 1:
        yield events[0]
        return
    merged: dict[int, Delta] = {}
    for event in events:
        if not isinstance(event, Delta):
            yield event
        elif old := merged.get(event.choice):
            merged[event.choice] = Delta(event.choice, old.text + event.text, old.tokens + event.tokens, event.finish)
        else:
            merged[event.choice] = event
    yield from merged.values()


# ────────────────────────────────────────────────── HTTP/1.1 (RFC 9112) ──────────────────────────────────────────

CORS = (
    ("Access-Control-Allow-Origin", "*"),
    ("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
    ("Access-Control-Allow-Headers", "*, Authorization"),
    ("Access-Control-Max-Age", "86400"),
)
PEER_CHECK_S = 0.05  # how often a waiting or busy handler looks whether its client is still there
LINGER_S = 2.0  # how long a refused body is read on, so that the client gets to read the refusal


class Handler(BaseHTTPRequestHandler):
    """One connection: reads requests, and writes replies and streams."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60  # seconds for a silent client, reading or writing; it costs its own connection only

    # ── one request ──

    def handle_one_request(self) -> None:
        self.close_connection = True
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline:
                return
            if len(self.raw_requestline) > 65536:
                self.requestline = self.request_version = self.command = ""
                return self.send_error(414)
            if self.parse_request():
                with self.server.busy:
                    self.respond()
        except (OSError, PeerGone):  # reset, timed out, or left
            self.close_connection = True

    def respond(self) -> None:
        self.status, self.started, self.streaming = 0, time.monotonic(), False
        self.log_note = ""
        try:
            self.body = self.read_body()
            self.route()
        except PeerGone:
            self.status = 499  # nginx's number for it; nobody reads it but the log
            raise
        except OSError:
            self.status = 499
            raise
        except Exception as error:
            self.fail(as_api_error(error))
        finally:
            if self.command != "GET" or self.status >= 400:
                log.info("%s %s %s%s", self.command, self.path[:200], self.status, self.log_note)

    def fail(self, error: ApiError) -> None:
        """Render any error, before or inside a stream."""
        self.log_note += f" {error.message}"
        if self.streaming:
            self.write(self.framed(error_event(error) + DONE))
            self.end_stream()
            return
        if error.close:
            self.close_connection = True
        self.reply(error.status, error.body(), error.headers)
        if error.close:
            self.linger()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's own errors (a bad request line, too many headers) in the same JSON."""
        self.status, self.streaming, self.log_note = 0, False, ""
        self.fail(ApiError(int(code), f"{message or HTTPStatus(code).phrase}.", close=True))

    def route(self) -> None:
        if self.request_version == "HTTP/1.1" and len(self.headers.get_all("Host") or ()) != 1:
            raise ApiError(400, "An HTTP/1.1 request must have one Host header.", close=True)
        path = urlsplit(self.path).path if not self.path.startswith("//") else self.path
        path = (path[:-1] if path.endswith("/") and path != "/" else path) or "/"
        path = path[3:] or "/" if path == "/v1" or path.startswith("/v1/") else path
        if self.command == "OPTIONS":
            return self.reply(204, None, CORS[1:])
        methods, argument = ROUTES.get(path), None
        if methods is None and path.startswith("/models/"):
            methods, argument = ROUTES["/models/{id}"], unquote(path[len("/models/") :])
        if methods is None:
            raise ApiError(404, f"There is no {path}. The routes are: {', '.join(ROUTES)}.", code="unknown_url")
        action = methods.get("GET" if self.command == "HEAD" else self.command)
        if action is None:
            allow = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
            raise ApiError(405, f"{self.command} is not allowed here, but {allow} is.", headers=[("Allow", allow)])
        if self.server.draining:
            raise ApiError(503, "The server is shutting down.", code="not_ready", close=True)
        if action not in OPEN_TO_ALL:
            self.authenticate()
        action(self) if argument is None else action(self, argument)

    def authenticate(self) -> None:
        wanted = self.server.api_key
        if not wanted:
            return
        scheme, _, bearer = self.headers.get("Authorization", "").partition(" ")
        given = bearer.strip() if scheme.lower() == "bearer" else self.headers.get("X-Api-Key", "")
        if not hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode()):
            raise ApiError(
                401,
                "Wrong or missing API key: send it as Authorization: Bearer KEY.",
                code="invalid_api_key",
                headers=[("WWW-Authenticate", "Bearer")],
            )

    # ── reading ──

    def handle_expect_100(self) -> bool:
        return True  # answered in read_body, once it is clear that the body is wanted

    def read_body(self) -> bytes:
        """The request's body, whole. Whatever makes its end unclear closes the connection after the reply."""
        lengths, codings = self.headers.get_all("Content-Length") or [], self.headers.get_all("Transfer-Encoding") or []
        if codings and lengths:
            raise ApiError(400, "Content-Length and Transfer-Encoding exclude each other.", close=True)
        if codings and (len(codings) > 1 or codings[0].strip().lower() != "chunked"):
            raise ApiError(400, "The only Transfer-Encoding that this server knows is chunked.", close=True)
        if len({length.strip() for length in lengths}) > 1 or not all(re.fullmatch(r"\s*[0-9]{1,18}\s*", n) for n in lengths):
            raise ApiError(400, "Content-Length must be one decimal number.", close=True)
        if not codings and not lengths:
            if self.command in ("POST", "PUT", "PATCH"):
                raise ApiError(411, "Send a Content-Length or a chunked body.")
            return b""
        if lengths and int(lengths[0]) > self.server.max_body:
            raise self.too_large()
        if self.headers.get("Expect", "").lower() == "100-continue" and self.request_version == "HTTP/1.1":
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return self.read_exactly(int(lengths[0])) if lengths else self.read_chunked()

    def read_exactly(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise PeerGone
        return data

    def read_chunked(self) -> bytes:
        """RFC 9112, section 7.1. Extensions and trailers are read over."""
        body = bytearray()
        while True:
            line = self.rfile.readline(1026)
            digits = line.split(b";")[0].strip()
            if not line.endswith(b"\n") or not re.fullmatch(rb"[0-9A-Fa-f]{1,12}", digits):
                raise ApiError(400, "The chunked body is malformed.", close=True)
            size = int(digits, 16)
            if len(body) + size > self.server.max_body:
                raise self.too_large()
            if size == 0:
                break
            body += self.read_exactly(size)
            if self.read_exactly(2) != b"\r\n":
                raise ApiError(400, "The chunked body is malformed.", close=True)
        for _ in range(100):
            if self.rfile.readline(65537) in (b"\r\n", b"\n", b""):
                return bytes(body)
        raise ApiError(431, "Too many trailers.", close=True)

    def too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.server.max_body} bytes.", close=True)

    def linger(self) -> None:
        """Closing while the client still writes would reset the connection, and the reply with it (RFC 9112, 9.6)."""
        try:
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_S)
            until, left = time.monotonic() + LINGER_S, 64 << 20
            while left > 0 and time.monotonic() < until and (data := self.connection.recv(1 << 16)):
                left -= len(data)
        except OSError:
            pass

    def json_body(self) -> Any:
        return parse_json(self.body)

    def peer_gone(self) -> bool:
        """Has the client closed its side? Pipelined requests are data, not an end."""
        try:
            if hasattr(select, "poll"):  # select() cannot take file numbers over 1,023
                poller = select.poll()
                poller.register(self.connection, select.POLLIN | getattr(select, "POLLRDHUP", 0))
                happened = poller.poll(0)
                if not happened:
                    return False
                if happened[0][1] & ~select.POLLIN:
                    return True
            elif not select.select([self.connection], [], [], 0)[0]:
                return False
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    # ── writing ──

    def write(self, data: bytes) -> None:
        self.connection.sendall(data)

    def head(self, status: int, headers: Iterable[tuple[str, str]]) -> bytes:
        self.status = status
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"Date: {self.date_time_string()}"]
        lines += [f"{name}: {value}" for name, value in (CORS[0], *headers)]
        if self.close_connection:
            lines.append("Connection: close")
        elif self.request_version == "HTTP/1.0":
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def reply(self, status: int, payload: Any, headers: Iterable[tuple[str, str]] = ()) -> None:
        if payload is None:
            return self.write(self.head(status, headers))
        body = compact(payload)
        head = self.head(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers])
        self.write(head if self.command == "HEAD" else head + body)

    def begin_stream(self, first: bytes, headers: Iterable[tuple[str, str]]) -> None:
        """Status line, headers and the first events in one packet."""
        self.streaming, self.chunked = True, self.request_version == "HTTP/1.1"
        sse = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no")]
        if self.chunked:
            sse.append(("Transfer-Encoding", "chunked"))
        else:
            self.close_connection = True
        self.write(self.head(200, [*sse, *headers]) + self.framed(first))

    def framed(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data

    def end_stream(self) -> None:
        if self.chunked:
            self.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("http: " + format, *args)

    # ── GET routes ──

    def get_root(self) -> None:
        models = self.server.models
        self.reply(200, {
            "service": "openai_api_endpoint", "version": VERSION, "model": models.model.id, "status": models.status,
            "engine": models.spec.backend, "routes": list(ROUTES),
        })  # fmt: skip

    def get_health(self) -> None:
        if not self.server.models.ready:
            body = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
            return self.reply(503, body, [("Retry-After", "2")])
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        self.reply(200, {"status": "ok", "timestamp": stamp})

    def get_healthz(self) -> None:
        models = self.server.models
        status = {"loaded": "ok", "loading": "starting", "failed": "degraded"}[models.status]
        body = {
            "status": status,
            "loaded": models.ready,
            "model_id": models.model.id,
            "inference_backend": models.spec.backend,
            "queue_depth": models.queue_depth(),
            "switch_in_progress": False,
            "switch_target_model": None,
        }
        self.reply(200, body | ({"last_error": models.failure} if status == "degraded" else {}))

    def model_card(self) -> dict[str, Any]:
        models = self.server.models
        return {
            "id": models.model.id, "object": "model", "created": models.model.created, "owned_by": "local", "permission": [],
            "root": models.model.id, "parent": None, "status": models.status, "loaded": models.ready,
        }  # fmt: skip

    def get_models(self) -> None:
        self.reply(200, {"object": "list", "data": [self.model_card()]})

    def get_model(self, name: str) -> None:
        if name != self.server.models.model.id:
            raise ApiError(
                404,
                f"There is no model {name!r}; the one served is {self.server.models.model.id!r}.",
                "model",
                "model_not_found",
            )
        self.reply(200, self.model_card())

    # ── POST /v1/chat/completions ──

    def post_chat_completions(self) -> None:
        values, ignored = read_fields(self.json_body())
        headers = [("X-Ignored-Fields", ", ".join(ascii(name)[1:-1][:64] for name in ignored[:32]))] if ignored else []
        self.server.note_ignored(ignored)
        sampling = sampling_from(values)
        job = self.server.models.submit(Prompt(values["messages"]), sampling, self.peer_gone)
        assert job.engine.info is not None
        model = values.get("model") or self.server.models.model.id
        completion = Completion(
            f"chatcmpl-{uuid.uuid4().hex}", model, job.engine.info.fingerprint, [Choice() for _ in range(sampling.n)]
        )
        self.first_delta = 0.0
        try:
            if values.get("stream"):
                self.stream(job, completion, Chunks(completion, values.get("stream_options", False)), values, headers)
            else:
                for delta in self.deltas(job, completion, streaming=False):
                    completion.add(delta)
                self.reply(200, completion.reply(), headers)
        finally:
            job.cancel()
            self.log_note = self.describe(completion)

    def stream(
        self, job: Job, completion: Completion, chunks: Chunks, values: dict[str, Any], headers: list[tuple[str, str]]
    ) -> None:
        for delta in self.deltas(job, completion, streaming=True):
            completion.add(delta)
            data = chunks.delta(delta)
            if not self.streaming:
                self.begin_stream(b"".join(map(chunks.role, range(len(completion.choices)))) + data, headers)
            elif data:
                self.write(self.framed(data))
        last = chunks.usage(completion.usage()) if values.get("stream_options") else b""
        self.write(self.framed(last + DONE))
        self.end_stream()

    def deltas(self, job: Job, completion: Completion, streaming: bool) -> Iterator[Delta]:
        """The job's deltas until all its choices have finished. Raises its errors, PeerGone, and 504.

        The clock starts when the engine has taken the job; for a stream it starts again with every delta.
        """
        left, clock, look = len(completion.choices), 0.0, 0.0
        while left:
            events = job.take(PEER_CHECK_S)
            now = time.monotonic()
            if now >= look:
                look = now + PEER_CHECK_S
                if self.peer_gone():
                    raise PeerGone
            if clock and now - clock > self.server.request_timeout:
                self.server.models.suspect(job.engine, self.server.request_timeout)
                raise ApiError(504, f"No answer within {self.server.request_timeout:g} s (--request-timeout).", code="timeout")
            for event in merge(events):
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Started):
                    completion.prompt_tokens, completion.cached_tokens = event.prompt_tokens, event.cached_tokens
                    clock = now
                    continue
                self.first_delta = self.first_delta or now
                clock = now if streaming else clock
                left -= event.finish is not None
                yield event

    def describe(self, completion: Completion) -> str:
        """The rest of the log line: what was asked of the engine, and how fast it was."""
        now = time.monotonic()
        first = self.first_delta
        note = (
            f" {completion.id} model={completion.model[:80]!r} prompt={completion.prompt_tokens} completion={completion.tokens}"
        )
        note += f" cached={'?' if completion.cached_tokens is None else completion.cached_tokens}"
        if first:
            rate = (completion.tokens - 1) / (now - first) if now > first and completion.tokens > 1 else 0.0
            note += f" ttft={(first - self.started) * 1000:.0f}ms tokens/s={rate:.1f}"
        return note + f" finish={','.join(c.finish or 'none' for c in completion.choices)}"


Action = Callable[..., None]
ROUTES: dict[str, dict[str, Action]] = {  # each also under /v1; 404, 405 and Allow follow from it
    "/": {"GET": Handler.get_root},
    "/health": {"GET": Handler.get_health},
    "/healthz": {"GET": Handler.get_healthz},
    "/models": {"GET": Handler.get_models},
    "/models/{id}": {"GET": Handler.get_model},
    "/chat/completions": {"POST": Handler.post_chat_completions},
}
OPEN_TO_ALL = {Handler.get_root, Handler.get_health, Handler.get_healthz}  # no API key needed


class Busy:
    """Counts the requests being answered, so that a shutdown can wait for them."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.count -= 1


class Server(ThreadingHTTPServer):
    """Accepts connections, a daemon thread each."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        models: Models,
        *,
        api_key: str = "",
        request_timeout: float = 600,
        max_body: int = 16 << 20,
    ):
        self.models, self.api_key, self.request_timeout, self.max_body = models, api_key, request_timeout, max_body
        self.draining = False
        self.busy = Busy()
        self.ignored_seen: set[str] = set()
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        # HTTPServer's own looks its host name up in the DNS, which can take seconds.
        if os.name == "posix":
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def note_ignored(self, names: list[str]) -> None:
        for name in names:
            if name not in self.ignored_seen and len(self.ignored_seen) < 1000:
                self.ignored_seen.add(name)
                log.warning("request field %.64r is unknown and ignored (said once)", name)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.error("connection of %s", client_address, exc_info=True)

    def drain(self, grace: float) -> None:
        """Stop accepting, and let running answers finish for `grace` seconds."""
        self.draining = True
        self.server_close()
        until = time.monotonic() + grace
        while self.busy.count and time.monotonic() < until:
            time.sleep(0.02)


# ────────────────────────────────────────────────────── main ─────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: {message}. Try --help.\n")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = Parser(description="Serve a local language model over the OpenAI API.", allow_abbrev=False)
    server = parser.add_argument_group("server")
    server.add_argument("-H", "--host", default="localhost", help="address to listen on; 0.0.0.0: all (default localhost)")
    server.add_argument(
        "-p", "--port", type=model_init.whole(0, 65535), default=8000, help="port, 0: any free one (default 8000)"
    )
    server.add_argument(
        "--api-key",
        default=os.environ.get("API_KEY", ""),
        metavar="KEY",
        help="ask clients for this key; default: the environment's API_KEY, else none",
    )
    server.add_argument(
        "--grace",
        type=model_init.seconds,
        default=10.0,
        metavar="S",
        help="seconds that running answers get when the server is stopped (default 10)",
    )
    server.add_argument(
        "--log-level", default="INFO", type=str.upper, choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
    )
    server.add_argument("--version", action="version", version=VERSION)
    model_init.add_args(parser)
    return parser.parse_args(model_init.same_dashes(argv))


def banner(server: Server, engine: Engine) -> str:
    info, model = engine.info, server.models.model
    assert info is not None
    host, port = str(server.server_address[0]), server.server_port
    url = f"http://{'localhost' if host in ('0.0.0.0', '::', '127.0.0.1') else host}:{port}"
    return f"""
  {model.id}
  {info.library}, {info.threads} threads, {info.slots} slots, context {info.context} tokens, KV cache {info.cache_tokens} tokens
  listening on {url}  (OpenAI base_url: {url}/v1)

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"messages":[{{"role":"user","content":"What is the capital of France?"}}]}}'
"""


class Service:
    """Start-up and shut-down, in their order."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.exit_code, self.greeted, self.stopping = args, 0, False, False
        self.models = model_init.init(args)
        try:
            self.server = Server(
                (args.host, args.port), self.models, api_key=args.api_key, request_timeout=args.request_timeout
            )
        except OSError as error:
            raise UsageError(f"cannot listen on {args.host}:{args.port}: {error.strerror or error}") from None
        self.models.on_ready, self.models.on_progress, self.models.on_fatal = self.ready, self.progress, self.fatal

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        log.info(
            "listening on port %d, loading %s with %s",
            self.server.server_address[1],
            self.models.model.path,
            self.models.spec.backend,
        )
        self.models.load()
        self.server.serve_forever()
        self.server.drain(self.args.grace)
        self.models.close()
        return self.exit_code

    def ready(self, engine: Engine) -> None:
        if self.greeted:
            log.info("engine ready again")
        else:
            print(banner(self.server, engine), flush=True)
            self.greeted = True

    def progress(self, fraction: float) -> None:
        if sys.stderr.isatty():
            print(f"\rloading {fraction:4.0%}", end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)

    def fatal(self, reason: str) -> None:
        print(f"openai_api_endpoint.py: {reason}", file=sys.stderr, flush=True)
        self.exit_code = 1
        threading.Thread(target=self.server.shutdown).start()

    def stop(self, number: int, _frame: Any) -> None:
        if self.stopping:  # the second Ctrl-C
            if self.models.engine:
                self.models.engine.kill()
            os._exit(128 + number)
        self.stopping = True
        log.info("stopping: running answers have %g s (once more: at once)", self.args.grace)
        threading.Thread(target=self.server.shutdown).start()  # serve_forever runs in this very thread: do not wait for it


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=args.log_level, format=LOG_FORMAT, stream=sys.stderr)
    try:
        return Service(args).run()
    except UsageError as error:
        print(f"openai_api_endpoint.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
