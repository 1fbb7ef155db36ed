# /// script
# requires-python = ">=3.10"
# dependencies = ["openvino-genai==2026.4.1.0", "llguidance==1.9.1", "jinja2==3.1.6", "pip"]
# ///
"""Serve a local language model over the OpenAI API:  python openai_api_endpoint.py --model-dir X --port 9999

The law: one engine process per loaded model; in it, one thread is the only one that ever touches the native library;
a producer never waits for a consumer. (engine.py draws the engine's side.)

This module owns the routes, the way of one request from its bytes to an engine and back, and start and stop:
  http11.Connection -> ROUTES -> body -> read_fields -> Prompt + Sampling -> models.submit -> Job -> deltas -> JSON or SSE
What a request may say stands in api_request.py, what a reply looks like in api_reply.py and api_errors.py; bytes are http11.py's.
Back-pressure is the socket's timeout. Cancellation is one `finally: job.cancel()`. Every error is raised anywhere and
rendered in `Handler.fail`. The first delta decides the status line: until then any error has its real status.
"""

from __future__ import annotations

if __name__ == "__main__":  # an engine's process takes as long to import its modules as this one: both do it now
    import children

    children.begin_ahead("backends", "numpy")

import argparse
import contextlib
import difflib
import functools
import hashlib
import logging
import os
import random
import re
import secrets
import signal
import sqlite3
import ssl
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import children
import logs
import memory
import messages_api
import model_init
import responses_api
from access import Access, Keys, host_of, is_loopback, key_in, network, origin_of
from api_errors import ApiError, as_api_error, rename
from api_reply import (
    CHAT_SHAPE,
    DONE,
    TEXT_SHAPE,
    Choice,
    Chunks,
    Completion,
    Rendering,
    Shape,
    compact,
    embeddings,
    merge,
    pair_scores,
    piece_json,
    ranking,
    sse,
)
from api_request import (
    BODIES,
    CHAT,
    COMPLETIONS,
    DETOKENIZE,
    EMBEDDINGS,
    OPERATE,
    PROMPT_FIELDS,
    RERANK,
    SCORE,
    TEMPLATE,
    TOKENIZE,
    Field,
    capabilities,
    chat_prompt,
    check_limits,
    check_together,
    constraint_of,
    parse_json,
    promised,
    read_fields,
    refuse_lacking,
    require,
    sampling_from,
)
from backends import LACKS, WITH_EMBEDDINGS
from background import Background, Running
from catalog import Model, UsageError
from engine import Answer, Delta, Details, Event, Prompt, Refused, Sampling, Started, log, weight_files
from engine_handle import Job, Sink
from http11 import PEER_CHECK_S, PREFIX, Connection, HttpLimits, HttpServer, PeerGone, tls_context
from metrics import CONTENT_TYPE, Metrics, Tally
from model_files import TASKS
from model_init import AnyEngine, Conflict, Life, Models, Profile, StillLoading, UnknownModel
from page import Page, read_page, wants_page
from progress import Progress
from state import State, StateError, default_path

VERSION = "0.2.0"

# ─────────────────────────────────────────────── the way of one request ──────────────────────────────────────────

PREFLIGHT = (
    ("Access-Control-Allow-Methods", "GET, POST, DELETE, OPTIONS"),
    ("Access-Control-Allow-Headers", "*, Authorization"),
    ("Access-Control-Max-Age", "86400"),
)
LARGE_BODY = 1 << 20  # bytes
LARGE_ONES = threading.Lock()  # are read one by one: their JSON takes ten times their size, and the interpreter for itself
GIVE_BACK_S = 5.0  # how often memory is given back, while requests come
IGNORED = "X-Ignored-Fields"  # the header that names what was asked for and is not heeded


class Handler(Connection):
    """The requests of one connection: each finds its route, and the route's method answers it."""

    server: Server
    names: Iterable[tuple[str, str]] = ()  # a chat request's fields → what a dialect calls them, for errors
    rendering: Rendering | None = None  # how the stream that has begun is told
    matched = ""  # the route, once it is found

    def answer(self) -> None:
        """Page, route, method and key are looked at before a byte of the body is read."""
        access, path = self.server.access, self.find_path()
        if self.command == "OPTIONS":
            return self.reply(204, None, PREFLIGHT)
        route, argument = find_route(path)
        methods = ROUTES.get(route)
        if methods is None:
            raise ApiError(404, f"There is no {path[:200]}. The routes are: {', '.join(ROUTES)}.", code="unknown_url")
        action = methods.get("GET" if self.command == "HEAD" else self.command)
        if action is None:
            allow = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
            raise ApiError(405, f"{self.command[:50]} is not allowed here, but {allow} is.", headers=[("Allow", allow)])
        self.matched = route
        if self.server.draining:
            raise ApiError(503, "The server is shutting down.", code="not_ready", close=True)
        peer = str(self.client_address[0])
        self.identity = access.client(peer, self.headers, action in OPERATORS, action in OPEN_TO_ALL)
        self.tell_ignored([f"?{name}" for name in self.query() if name not in QUERIES.get(action, ())])
        if action not in WITHOUT_BODY or self.unread != 0:
            self.body = self.read_body()
        action(self, *argument)

    def find_path(self) -> str:
        """The route that is asked for, without /v1. Raises ApiError where it is asked by a web page that may not."""
        try:
            target = urlsplit(self.path) if not self.path.startswith("/") else None
            path = target.path if target else self.path.partition("?")[0].partition("#")[0]
        except ValueError:
            raise ApiError(400, "The request's URL is malformed.") from None
        self.server.access.check_page(self.headers, target.netloc if target else "", self.command == "POST")
        path = (path[:-1] if path.endswith("/") and path != "/" else path) or "/"
        return path[3:] or "/" if path == "/v1" or path.startswith("/v1/") else path

    def fail(self, error: Exception) -> None:
        told = as_api_error(error)
        rename(told, self.names)
        if isinstance(error, Refused) and told.param == "prompt":  # the engine's word for it, on every route
            told.param = PROMPT_FIELDS.get(self.bare_path(), "prompt")
        self.log_note += f" {told.message[:300]}"
        if self.server.metrics and 400 <= told.status < 500:
            self.server.metrics.count("refused_total", told.code or "invalid_request")
        if self.streaming:
            return self.end_stream(self.rendering.failed(told) if self.rendering else sse(told.body()) + DONE)
        if self.status:  # it has been answered: a second reply would be taken for the next request's
            self.close_connection = True
            return
        self.close_connection |= told.close
        self.reply(*self.error_face(told), told.headers)
        if self.close_connection and self.unread != 0:
            self.linger()

    def error_face(self, error: ApiError) -> tuple[int, dict[str, Any]]:
        return error.status, error.body()

    def query(self) -> dict[str, str]:
        """What stands behind the ? of the URL; of a name that stands there twice, the last value."""
        text = self.path.partition("?")[2].partition("#")[0]
        return dict(parse_qsl(text, keep_blank_values=True)) if text else {}

    def bare_path(self) -> str:
        """Of the request, without /v1 and query."""
        return getattr(self, "path", "").partition("?")[0].rstrip("/").removeprefix("/v1")

    def clear(self) -> None:
        super().clear()
        self.identity = self.matched = ""
        self.names, self.rendering = (), None

    def note(self) -> None:
        if self.server.metrics:
            self.server.metrics.answered(self.command, self.matched, self.status)
        if (self.command == "GET" and self.status < 400) or not log.isEnabledFor(logging.INFO):
            return
        told = {
            "method": self.command, "path": self.path[:200], "status": self.status, "client": self.identity,
            "request_id": self.request_id, "seconds": round(time.monotonic() - self.started, 3),
        }  # fmt: skip
        who = f" client={self.identity!r}" if self.identity else ""
        line = logs.one_line(f"{self.command} {self.path[:200]} {self.status}{self.log_note}{who}", 1500)
        log.info("%s", line, extra={"request": told})

    def common_headers(self) -> list[tuple[str, str]]:
        headers = [*self.server.access.cors(self.headers), *super().common_headers()]
        if self.request_id:
            headers.append(("openai-processing-ms", f"{(time.monotonic() - self.started) * 1000:.0f}"))
        return headers

    def reply(self, status: int, payload: Any, headers: Iterable[tuple[str, str]] = ()) -> None:
        if payload is None:
            return self.write(self.head(status, headers))
        self.reply_bytes(status, payload if isinstance(payload, bytes) else compact(payload), "application/json", headers)

    # ── reading a request ──

    def read(self, table: dict[str, Field], chat: bool = True) -> dict[str, Any]:
        """The body's fields, and self.model. Names that nobody knows are told in a header. `chat`: no dialect's body."""
        with LARGE_ONES if len(self.body) > LARGE_BODY else contextlib.nullcontext():
            return self.read_body_fields(table, chat)

    def read_body_fields(self, table: dict[str, Field], chat: bool) -> dict[str, Any]:
        body, models, unknown = parse_json(self.body), self.server.models, None
        if not self.server.record:
            self.body = b""  # it can be large, and the answer can take long
        asked = body.get("model") if isinstance(body, dict) else None
        try:
            self.model = models.resolve(asked if isinstance(asked, str) else None)
        except UnknownModel as error:
            unknown, self.model = error, models.default()  # a bad field is told first
        values, ignored = read_fields(body, table, models.backend(self.model), self.server.strict)
        self.ignore(ignored)
        if chat:
            self.check_profile(values)
        if unknown:
            status = int(models.limits.unknown) if asked and models.limits.unknown.isdigit() else 404 if asked else 400
            raise ApiError(status, f"{unknown}.", "model", "model_not_found" if asked else None)
        return values

    def ignore(self, names: list[str]) -> None:
        self.server.note_ignored(names)
        self.tell_ignored(names)

    def tell_ignored(self, names: list[str]) -> None:
        """In one header however often this is called."""
        if not names:
            return
        headers = dict(self.extra)
        told = [headers[IGNORED]] if IGNORED in headers else []
        headers[IGNORED] = ", ".join(told + [ascii(name)[1:-1][:64] for name in names[:32]])
        self.extra = [*headers.items()]

    def read_chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """What a dialect has made a chat request of, read as one."""
        values, _ = read_fields(body, CHAT, self.server.models.backend(self.model))
        self.check_profile(values)
        check_together(values)
        return self.server.profile.sampling() | values

    def check_profile(self, values: dict[str, Any]) -> None:
        """What the profile asks of every request."""
        profile = self.server.profile
        roles = {*profile.roles, *(("tool",) if values.get("tools") or values.get("functions") else ())}  # results come back
        for i, message in enumerate(values.get("messages", ())):
            if message["role"] not in roles:
                where = f"messages[{i}].role"
                raise ApiError(400, f"'{where}' must be one of {', '.join(profile.roles)} (--roles).", where)
        for name in ("max_tokens", "max_completion_tokens"):
            if profile.max_tokens_limit and values.get(name, 0) > profile.max_tokens_limit:
                raise ApiError(400, f"'{name}' must be at most {profile.max_tokens_limit} (--max-tokens-limit).", name)

    def client(self) -> str:
        """Who asks, for fairness: the name of a key, else an address."""
        return self.identity

    def owner(self) -> str:
        """Whose the stored responses are: a key's, by its name, or by itself where it has none but its place in a list.

        Without keys they are everybody's who may ask.
        """
        if not self.server.access.keys:
            return ""
        nameless = re.fullmatch(r"key (key|line)[0-9]+", self.identity)
        return hashlib.sha256(key_in(self.headers).encode()).hexdigest()[:32] if nameless else self.identity

    def prefers_to_wait(self) -> float | None:
        """`Prefer: wait=N` (RFC 7240, section 4.3), in seconds."""
        found = re.search(r"(?:^|[,;\s])wait=(\d{1,6})\b", self.headers.get("Prefer", ""))
        if not found:
            return None
        self.extra.append(("Preference-Applied", f"wait={found[1]}"))
        return min(float(found[1]), self.server.request_timeout)

    def queried_model(self) -> Model:
        """The model that `?model=` names, else the default one."""
        name = self.query().get("model")
        return self.server.models.resolve(name) if name else self.server.models.default()

    def submit(self, start: Callable[[AnyEngine], Job]) -> Job:
        return self.server.models.submit(self.model, start, self.client(), self.peer_gone, self.prefers_to_wait())

    def must(self, *tasks: str) -> None:
        """Only a model of one of these tasks can do it; an upstream speaks for its own."""
        model = self.model
        if model.task not in tasks and model.kind != "upstream":
            does, route = TASKS[model.task]
            name = self.server.models.catalog.public(model)
            raise ApiError(400, f"The model {name} {does}: ask {route}.", "model", "unsupported_task")

    def model_name(self, values: dict[str, Any]) -> str:
        """A reply names the model as the request did."""
        return values.get("model") or self.server.models.catalog.public(self.model)

    # ── asking the engine ──

    def generate(
        self,
        prompts: list[Prompt],
        values: dict[str, Any],
        shape: Shape,
        max_tokens: int | None,
        cut: bool = False,
        render: Callable[[Completion], Rendering] | None = None,
        away: Callable[[Job, Completion, Rendering, Callable[..., None]], Callable[[], None]] | None = None,
    ) -> None:
        """`max_tokens`: where the request does not say. `cut`: it is cut down to what fits. `render`: as a dialect tells it.

        `away`: takes the job over, instead of this handler; it calls its last argument with Generation.seconds() at the end,
        and returns what this handler is still to do.
        """
        self.must("generate")
        told = values.get("return_prompt") or self.headers.get("X-Debug", "").strip().lower() == "prompt"
        if told:
            refuse_lacking("return_prompt", "inside", self.server.models.backend(self.model))
        check_limits(values, len(prompts), self.server.models.limits)
        if told or self.server.record:
            prompts = [replace(prompt, details=True) for prompt in prompts]
        sampling = sampling_from(values)
        if sampling.max_tokens is None or cut:
            sampling = replace(sampling, max_tokens=sampling.max_tokens or max_tokens, cut=True)
        client = self.client()
        job = self.submit(
            lambda engine: engine.submit(prompts, sampling, client, self.model.id if self.model.served_by else "")
        )
        with contextlib.ExitStack() as after:
            after.callback(job.cancel)  # from here on whatever happens frees the slot
            completion = self.completion_of(job, prompts, sampling, values, shape)
            rendering = render(completion) if render else Chunks(completion, values.get("stream_options", False))
            metrics = self.server.metrics
            if metrics:
                completion.gaps = Tally("inter_token_latency_seconds")
                metrics.begin(self.model.id, completion)
                after.callback(metrics.forget, completion)

            def ended(**seconds: float) -> None:
                if metrics:
                    metrics.end(completion, completion.gaps, **seconds)

            if away:
                go_on = away(job, completion, rendering, ended)
                after.pop_all()
                return go_on()
            self.rendering = rendering
            answer = Generation(self, job, completion, rendering, bool(told))
            try:
                self.server.peers.add(self, job.wake)
                if values.get("stream"):
                    answer.stream()
                else:
                    answer.reply()
                self.server.note_request(self.path, self.body, self.request_id, completion, answer.debug())
            finally:
                self.server.peers.discard(self)
                self.log_note = answer.describe()
                ended(**answer.seconds())

    def completion_of(
        self, job: Job, prompts: list[Prompt], sampling: Sampling, values: dict[str, Any], shape: Shape
    ) -> Completion:
        """The completion of a job that has just been submitted, still without a delta."""
        assert job.engine.info is not None
        return Completion(
            shape.prefix + f"{random.getrandbits(128):032x}",
            self.model_name(values),
            job.engine.info.fingerprint,
            [Choice() for _ in range(sampling.n * len(prompts))],
            shape,
            sampling.logprobs is not None,
            constraint_of(values),
            promised=promised(prompts[0]),
            reasons=shape is CHAT_SHAPE and bool(job.engine.syntax().get("reasoning")),
            hide_reasoning=values.get("include_reasoning") is False,
            functions="functions" in values and "tools" not in values,
        )

    def ask(self, name: str, **arguments: Any) -> Any:
        """One call to the engine."""
        client = self.client()
        of = self.model.id if self.model.served_by else ""
        job = self.submit(lambda engine: engine.call(name, arguments, client, of))
        until = time.monotonic() + self.server.request_timeout
        try:
            while time.monotonic() < until:
                for event in job.take(PEER_CHECK_S):
                    if isinstance(event, Answer):
                        return event.value
                    if isinstance(event, Exception):
                        raise event
                if self.peer_gone():
                    raise PeerGone
        finally:
            job.cancel()
        raise ApiError(504, f"No answer within {self.server.request_timeout:g} s (--request-timeout).", code="timeout")


class Generation:
    """One completion on its way to its client: deltas of the engine's in, a reply or a stream out.

    All that is kept here belongs to the handler while it is awake, and while it sleeps in `deltas` to the engine's reader
    thread, which calls the sink with each event: a handler wakes for what is more than the next chunk.
    """

    def __init__(self, handler: Handler, job: Job, completion: Completion, rendering: Rendering, told: bool):
        self.handler, self.job, self.completion, self.rendering = handler, job, completion, rendering
        self.told = told  # what the model was given, as well
        self.begun = time.monotonic()  # when the engine's queue took it
        self.first_delta = 0.0  # when it came, by this process's clock
        self.clock = 0.0  # since when the engine owes us something; 0: it has not taken the job
        self.unsent = b""  # of a chunk that the sink could not write whole

    def reply(self) -> None:
        for delta in self.deltas(self.keep, streaming=False):
            self.add(delta)
        self.handler.reply(200, self.rendering.whole(self.debug() if self.told else {}))

    def begin(self, event: Event | Exception) -> bool:
        """The engine has taken the job, which nobody needs to wake for."""
        if not isinstance(event, Started):
            return False
        self.completion.start(event)
        self.clock = self.clock or time.monotonic()
        return True

    def keep(self, event: Event | Exception) -> bool:
        if not isinstance(event, Delta) or event.finish is not None:
            return self.begin(event)
        self.add(event)
        return True

    def add(self, delta: Delta) -> None:
        self.first_delta = self.first_delta or time.monotonic()
        self.completion.choices[delta.choice].logprobs += self.completion.add(delta).logprobs

    def stream(self) -> None:
        handler, completion, chunks = self.handler, self.completion, self.rendering
        sink = self.passing_on(chunks) if handler.can_write_now() else self.begin
        data = b""
        for delta in self.deltas(sink, streaming=True):
            data = data if self.first_delta else chunks.opening()
            self.first_delta = self.first_delta or time.monotonic()
            data += chunks.delta(completion.add(delta))
            if delta.finish and all(choice.finish for choice in completion.choices):
                break  # this goes with the end
            if not handler.streaming:
                handler.begin_stream(data)
            elif data:
                handler.write(handler.framed(data))
            data = b""
        data += chunks.end(self.debug() if self.told else {})
        if not handler.streaming:
            handler.begin_stream(data)
            data = b""
        handler.end_stream(data)

    def passing_on(self, chunks: Rendering) -> Sink:
        """A sink that writes a chunk for each delta, until the socket takes no more: then it is the handler's, who may wait."""
        handler, add, chunk = self.handler, self.completion.add, chunks.delta

        def pass_on(event: Event | Exception) -> bool:
            if not isinstance(event, Delta) or event.finish is not None or self.unsent:
                return self.begin(event)
            data = b"" if handler.streaming else chunks.opening()
            data += chunk(add(event))
            self.clock = time.monotonic()
            if not handler.streaming:
                self.first_delta = self.clock
                data = handler.stream_head(data)
            elif data:
                data = handler.framed(data)
            else:
                return True
            sent = handler.write_now(data)
            if sent < len(data):
                self.unsent = data[sent:]
                self.job.wake()
            return True

        return pass_on

    def deltas(self, sink: Sink, streaming: bool) -> Iterator[Delta]:
        """The job's deltas that the sink has not had, until all its choices have finished. Raises its errors, PeerGone, and 504.

        The clock starts when the engine has taken the job; for a stream it starts again with every delta.
        """
        completion, patience = self.completion, self.handler.server.request_timeout
        left = len(completion.choices)
        while left:
            wait = self.clock + patience - time.monotonic() if self.clock else patience
            events = self.job.take(min(max(wait, 0) + 0.01, 3600), sink)
            now = time.monotonic()
            if self.handler.left:
                raise PeerGone
            if self.clock and now - self.clock > patience and not (streaming and (events or self.unsent)):
                raise ApiError(504, f"No answer within {patience:g} s (--request-timeout).", code="timeout")
            if self.unsent:
                unsent, self.unsent = self.unsent, b""
                self.handler.write(unsent)
                self.clock = time.monotonic()  # what the client took to read is not the engine's
            for event in merge(events):
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Details):
                    completion.details.append(event)
                elif isinstance(event, Delta):
                    left -= event.finish is not None
                    yield event
                else:
                    self.begin(event)
            if streaming and events:
                self.clock = time.monotonic()

    def debug(self) -> dict[str, Any]:
        """What the model was given, for `return_prompt` and --record: enough to run the request again."""
        info = self.job.engine.info
        assert info is not None
        engine = {"backend": info.backend, "library": info.library, "slots": info.slots, "threads": info.threads}
        prompts = [asdict(details) for details in self.completion.details]
        return {"debug": {"prompts": prompts, "engine": engine, "fingerprint": info.fingerprint}}

    def seconds(self) -> dict[str, float]:
        """How long it waited in the engine's queue, for its first token, and for its end; 0: it did not come to that."""
        began, now = self.handler.started, time.monotonic()
        queued = max(0.0, self.completion.started_at - self.begun) if self.completion.started_at else 0.0
        return {"queued": queued, "first": max(0.0, self.first_delta - began), "whole": now - began}

    def describe(self) -> str:
        """The rest of the log line: what was asked of the engine, and how fast it was."""
        now, first, completion = time.monotonic(), self.first_delta, self.completion
        note = (
            f" {completion.id} model={completion.model[:80]!r} prompt={completion.prompt_tokens} completion={completion.tokens}"
        )
        note += f" cached={'?' if completion.cached_tokens is None else completion.cached_tokens}"
        if first:
            rate = (completion.tokens - 1) / (now - first) if now > first and completion.tokens > 1 else 0.0
            note += f" ttft={(first - self.handler.started) * 1000:.0f}ms tokens/s={rate:.1f}"
        return note + f" finish={','.join(c.finish or 'none' for c in completion.choices)}"


class Routes(Handler):
    """What each route answers."""

    # ── GET ──

    def get_root(self) -> None:
        page = self.server.page
        if page and wants_page(self.headers.get("Accept", "")):
            return self.reply_bytes(200, page.body, page.kind, page.headers)
        models = self.server.models
        current = models.current()
        self.reply(200, {
            "service": "openai_api_endpoint", "version": VERSION, "status": models.status(),
            "model": current and models.catalog.public(current.model), "engine": current and models.backend(current.model),
            "admin": self.server.access.admin is not None, "routes": list(ROUTES),
        }, [("Vary", "Accept")])  # fmt: skip

    def get_health(self) -> None:
        if not self.server.models.ready:
            body = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
            return self.reply(503, body, [("Retry-After", "2")])
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        self.reply(200, {"status": "ok", "timestamp": stamp})

    def get_healthz(self) -> None:
        models = self.server.models
        current, switch = models.current(), models.switch
        body = {
            "status": models.status(),
            "loaded": current is not None and current.state == "loaded",
            "model_id": current and models.catalog.public(current.model),
            "inference_backend": current and models.backend(current.model),
            "queue_depth": models.queue_depth(),
            "switch_in_progress": switch is not None,
            "switch_target_model": switch and models.catalog.public(switch.target.model),
        }
        self.reply(200, body | ({"last_error": self.server.without_paths(models.last_error)} if models.last_error else {}))

    def model_card(self, model: Model) -> dict[str, Any]:
        models = self.server.models
        name, status, failure = models.catalog.public(model), models.status_of(model), models.failure_of(model)
        return {
            "id": name, "object": "model", "created": model.created, "owned_by": self.server.profile.owned_by,
            "permission": [], "root": name, "parent": None, "status": status, "loaded": status == "loaded",
            **({"error": self.server.without_paths(failure)} if failure else {}),
            **({} if model.task == "generate" else {"task": model.task}),
        }  # fmt: skip

    def get_models(self) -> None:
        models, found = self.server.models, self.server.models.catalog.models()
        now = (
            found,
            {id: (models.status_of(life.model), life.failure) for id, life in list(models.lives.items())},
            dict(models.catalog.shown),
        )
        if self.server.listing[0] != now:  # thousands of models take milliseconds to write
            data = [self.model_card(model) for model in found.values()]
            self.server.listing = (now, compact({"object": "list", "data": data}))
        self.reply(200, self.server.listing[1])

    def get_model(self, name: str) -> None:
        model = self.server.models.catalog.find(name)
        if model is None:
            raise ApiError(404, f"There is no model {name!r}. GET /v1/models lists them.", "model", "model_not_found")
        self.reply(200, self.model_card(model))

    def get_capabilities(self) -> None:
        model = self.queried_model()
        syntax = self.found_in_template(model, LOOK_S)
        found = {"template": syntax} if syntax else {}  # known once the model is loaded
        self.reply(200, capabilities(self.server.models.backend(model), TABLES) | found)

    def found_in_template(self, model: Model, wait: float = 0.0) -> dict[str, Any]:
        """{}: nobody has looked yet, or its engine has no template of its own."""
        life = self.server.models.lives.get(model.id)
        return life.engine.syntax(wait) if life and life.engine else {}

    def get_tokenizer_info(self) -> None:
        """vLLM's route, by which lm-eval finds out that /tokenize and /detokenize are there."""
        models, model = self.server.models, self.queried_model()
        refuse_lacking("tokenizer_info", "inside", models.backend(model))
        info = models.acquire(model, self.client(), self.peer_gone, self.prefers_to_wait()).info
        self.reply(200, {"tokenizer_class": "remote", **(info.tokenizer if info else {})})

    def get_metrics(self) -> None:
        metrics = self.server.metrics
        if metrics is None:
            raise ApiError(404, "There are no metrics: start the server with --metrics.", code="metrics_off")
        self.reply_bytes(200, metrics.render(self.server.models), CONTENT_TYPE)

    # ── generation ──

    def post_chat_completions(self) -> None:
        profile, values = self.server.profile, self.read(CHAT)
        values = {"stream": profile.stream} | profile.sampling() | values
        check_together(values)
        self.generate([chat_prompt(values)], values, CHAT_SHAPE, profile.max_tokens)

    def post_completions(self) -> None:
        values = self.server.profile.sampling() | self.read(COMPLETIONS)
        check_together(values)
        self.generate(require(values, "prompt", COMPLETIONS), values, TEXT_SHAPE, 16)

    # ── what generates nothing ──

    def post_embeddings(self) -> None:
        values = self.read(EMBEDDINGS)
        prompts = require(values, "input", EMBEDDINGS)
        self.must("embed", "generate")
        if self.model.task == "generate" and self.model.kind != "upstream":
            self.check_embeds()
        limit = values.get("truncate_prompt_tokens")
        found = self.ask("embed", prompts=prompts, prompt_name=values.get("prompt_name"), limit=limit)
        self.reply(200, embeddings(found["vectors"], values, self.model_name(values), found["tokens"]))

    def check_embeds(self) -> None:
        """A model that generates embeds only where its engine can, and the server was told so."""
        spec, able = self.server.models.spec(self.model), " and ".join(WITH_EMBEDDINGS)
        if spec.backend in LACKS and spec.backend not in WITH_EMBEDDINGS:
            told = f"This model generates, and with such a model {spec.backend} does not embed; {able} can."
            raise ApiError(400, told, "input", "unsupported_parameter")
        if not spec.embeddings:
            told = f"This model generates; for its embeddings start the server with --embeddings (engines: {able})."
            raise ApiError(400, told, "model", "unsupported_parameter")

    def post_rerank(self) -> None:
        values = self.read(RERANK)
        query, documents = require(values, "query", RERANK), require(values, "documents", RERANK)
        found = self.score([query], documents, values, ranks=True)
        self.reply(200, ranking(found["scores"], values, self.model_name(values), found["tokens"]))

    def post_score(self) -> None:
        values = self.read(SCORE)
        first, second = require(values, "text_1", SCORE), require(values, "text_2", SCORE)
        if len(first) not in (1, len(second)):
            raise ApiError(400, "'text_1' must be one text, or as many as 'text_2'.", "text_1")
        found = self.score(first, second, values, ranks=False)
        self.reply(200, pair_scores(found["scores"], self.model_name(values), found["tokens"]))

    def score(self, queries: list[str], documents: list[str], values: dict[str, Any], ranks: bool) -> Any:
        self.must("rerank", "embed")
        limit = values.get("truncate_prompt_tokens")
        return self.ask("score", queries=queries, documents=documents, limit=limit, ranks=ranks)

    def post_tokenize(self) -> None:
        values = self.read(TOKENIZE)
        given = [values[name] for name in ("content", "prompt", "text") if name in values]
        if len(given) + ("messages" in values) != 1:
            raise ApiError(400, "Give one of 'content', 'prompt', 'text' and 'messages'.", "content")
        special = values.get("add_special", values.get("add_special_tokens", bool(given)))
        prompt = Prompt(text=given[0]) if given else chat_prompt(values)
        with_pieces, strings = values.get("with_pieces"), values.get("return_token_strs")
        answer = self.ask("tokenize", prompt=prompt, add_special=special, pieces=bool(with_pieces or strings))
        pieces = answer.pop("pieces", ())
        if strings:
            answer["token_strs"] = [piece.decode("utf-8", "replace") for piece in pieces]
        if with_pieces:
            answer["tokens"] = [
                {"id": i, "piece": piece_json(piece)} for i, piece in zip(answer["tokens"], pieces, strict=True)
            ]
        self.reply(200, answer)

    def post_detokenize(self) -> None:
        text = self.ask("detokenize", tokens=require(self.read(DETOKENIZE), "tokens", DETOKENIZE))
        self.reply(200, {"content": text, "prompt": text})  # llama-server's name, and vLLM's

    def post_apply_template(self) -> None:
        self.reply(200, {"prompt": self.ask("render", prompt=chat_prompt(self.read(TEMPLATE)))})

    # ── the operator's ──

    def read_operation(self) -> dict[str, Any]:
        """Here no other model stands in for the one that is named."""
        values, _ = read_fields(parse_json(self.body), OPERATE, strict=True)
        name = require(values, "model", OPERATE)
        if (model := self.server.models.catalog.find(name)) is None:
            raise ApiError(404, f"There is no model {name!r}. GET /v1/models lists them.", "model", "model_not_found")
        self.model = model
        return values

    def post_load(self) -> None:
        """Load a model and tell when it is there; `stream`: how far it is, as server-sent events."""
        values = self.read_operation()
        models, wait = self.server.models, self.prefers_to_wait()
        if values.get("stream"):
            return self.stream_load()
        models.acquire(self.model, self.client(), self.peer_gone, self.server.request_timeout if wait is None else wait)
        self.reply(200, self.load_event("loaded"))

    def stream_load(self) -> None:
        models, told = self.server.models, b""
        while True:
            try:
                models.acquire(self.model, self.client(), self.peer_gone, 0.1)
                status = "loaded"
            except (StillLoading, Conflict):
                status = "loading"
            life = models.lives.get(self.model.life)
            progress = 1.0 if status == "loaded" else round(life.progress, 3) if life else 0.0
            event = sse(self.load_event(status) | {"progress": progress})
            if not self.streaming:
                self.begin_stream(event)
            elif event != told:
                self.write(self.framed(event))
            told = event
            if status == "loaded":
                return self.end_stream(DONE)
            if self.peer_gone():
                raise PeerGone

    def post_unload(self) -> None:
        """Take a model out of memory, once it has answered what it has begun."""
        self.read_operation()
        life = self.server.models.unload(self.model)
        until = time.monotonic() + self.server.request_timeout
        while life.state == "draining" and time.monotonic() < until and not self.peer_gone():
            time.sleep(PEER_CHECK_S)
        self.reply(200, self.load_event(life.state) | {"object": "model.unload"})

    def load_event(self, status: str) -> dict[str, Any]:
        return {"object": "model.load", "status": status, "model": self.server.models.catalog.public(self.model)}


class Dialects(Routes):
    """The routes of /v1/responses and /v1/messages: each makes a chat request of its body, and tells the completion its own way."""

    def is_messages(self) -> bool:
        path = self.bare_path()
        return path == "/messages" or path.startswith("/messages/")

    def error_face(self, error: ApiError) -> tuple[int, dict[str, Any]]:
        if not self.is_messages():
            return super().error_face(error)
        return messages_api.error_status(error), messages_api.error_body(error, self.request_id)

    def common_headers(self) -> list[tuple[str, str]]:
        own = [("request-id", self.request_id)] if self.is_messages() else []  # Anthropic's name for it
        return super().common_headers() + own

    def responses_turn(self, table: dict[str, Field]) -> responses_api.Turn:
        """The request, translated, with the conversation that it continues."""
        values, state = self.read(table, chat=False), self.server.state
        if values.get("store") and state is None:
            raise ApiError(400, "'store' is off: this server keeps no responses (--state none).", "store", "state_off")
        values["store"] = state is not None and values.get("store", True)
        if values.get("background") and not values["store"]:
            raise ApiError(400, "'background' is only allowed where the response is stored.", "background")
        past, before = [], values.get("previous_response_id")
        if before is not None:
            # Both: its thread may have more to do than to store it, and what could not be stored stays open.
            if state and state.is_open(self.owner(), before) and self.server.running.under_way(before):
                raise ApiError(
                    400, "'previous_response_id': that response is still being made.", "previous_response_id", "not_finished"
                )
            found = state.chain(self.owner(), before) if state else None
            if found is None:
                says = f"There is no response {before[:80]!r} to go on from: it was not stored, was deleted, or is too old."
                raise ApiError(404, says, "previous_response_id", "previous_response_not_found")
            past = found
        find = functools.partial(state.item, self.owner()) if state else lambda _: None
        turn = responses_api.Turn(values, past, find, self.server.key, self.server.drop_hosted)
        self.names = turn.names
        self.ignore(turn.dropped)
        return turn

    def post_responses(self) -> None:
        turn = self.responses_turn(responses_api.RESPONSES)
        values, owner, state = self.read_chat(turn.chat), self.owner(), self.server.state

        def keep(response: dict[str, Any]) -> None:
            if response["store"] and state:
                try:
                    state.put(owner, response, turn.given)
                except sqlite3.Error as error:
                    log.error("%s could not be stored: %s", response["id"], error)
                    response["store"] = False

        def render(completion: Completion) -> responses_api.Answer:
            return responses_api.Answer(completion, turn, self.sampling_defaults(), keep)

        def away(job: Job, completion: Completion, answer: Rendering, ended: Callable[..., None]) -> Callable[[], None]:
            """From here on nothing may ask this handler: its connection goes on with other requests."""
            assert isinstance(answer, responses_api.Answer)
            one = Background(job, completion, answer, self.server.request_timeout, ended)
            queued = {**answer.waiting()}
            one.start()
            self.server.running.add(completion.id, one)
            return lambda: self.follow(one, 0) if values.get("stream") else self.reply(200, queued)

        self.generate(
            [chat_prompt(values)], values, responses_api.SHAPE, self.server.profile.max_tokens, render=render,
            away=away if turn.values.get("background") else None,
        )  # fmt: skip

    def follow(self, one: Background, number: int) -> None:
        """Tell a response's events from this number on, as they come."""
        self.begin_stream(b"")
        ended = False
        while not ended:
            events, ended = one.after(number, 0.25)
            number += len(events)
            if events:
                self.write(self.framed(b"".join(events)))
            elif self.peer_gone():
                raise PeerGone
        self.end_stream(DONE)

    def sampling_defaults(self) -> dict[str, float]:
        engine = self.server.models.lives[self.model.id].engine
        return (engine.info.defaults if engine and engine.info else {}) | self.server.profile.sampling()

    def post_input_tokens(self) -> None:
        count = self.count(self.responses_turn(responses_api.BODIES["/responses/input_tokens"]).chat)
        self.reply(200, {"object": "response.input_tokens", "input_tokens": count})

    def count(self, chat: dict[str, Any], lenient: bool = False) -> int:
        """The tokens of a prompt, as the usage of an answer would tell them."""
        prompt = replace(chat_prompt(self.read_chat(chat)), lenient=lenient)
        return int(self.ask("tokenize", prompt=prompt, add_special=False, pieces=False)["count"])

    def stored(self, id: str, read: Callable[[State, str, str], Any]) -> Any:
        found = read(self.server.state, self.owner(), id) if self.server.state else None
        if found is None:
            raise ApiError(
                404, f"There is no response {id[:80]!r}: it was not stored, was deleted, or is too old.", "id", "not_found"
            )
        return found

    def get_responses(self) -> None:
        if self.headers.get("Upgrade"):
            raise ApiError(426, "There are no WebSockets here: POST the request instead.", code="no_websocket")
        raise ApiError(405, "GET is not allowed here, but POST, OPTIONS is.", headers=[("Allow", "POST, OPTIONS")])

    def get_response(self, id: str) -> None:
        """The response; with `stream=true` the events of one that is made in the background, again or on from `starting_after`."""
        response, query = self.stored(id, State.get), self.query()
        if query.get("stream", "false") not in ("true", "false"):
            raise ApiError(400, "'stream' must be true or false.", "stream")
        if query.get("stream") != "true":
            return self.reply(200, response)
        one, after = self.server.running.get(id), query.get("starting_after", "-1")
        if one is None:
            raise ApiError(
                400, "The events of this response are not kept (any more): get it without stream.", "stream", "no_events"
            )
        if not re.fullmatch(r"-1|[0-9]{1,9}", after):
            raise ApiError(400, "'starting_after' must be a sequence number.", "starting_after")
        self.follow(one, int(after) + 1)

    def delete_response(self, id: str) -> None:
        self.stored(id, State.get)
        self.server.running.forget(id)
        self.stored(id, lambda state, owner, id: state.delete(owner, id) or None)
        self.reply(200, {"id": id, "object": "response", "deleted": True})

    def get_input_items(self, id: str) -> None:
        self.reply(200, responses_api.page(self.stored(id, State.given), self.query()))

    def post_cancel(self, id: str) -> None:
        if not self.stored(id, State.get)["background"]:
            says = "Only a response with background: true can be cancelled, and this one was not."
            raise ApiError(400, says, "id", "not_cancellable")
        if (one := self.server.running.get(id)) and not one.done:
            one.cancel()
        self.reply(200, self.stored(id, State.get))  # one that had ended stays as it was

    def messages_turn(self, values: dict[str, Any]) -> messages_api.Turn:
        turn = messages_api.Turn(values, self.server.key)
        self.names = turn.names
        return turn

    def post_messages(self) -> None:
        values, limit = self.read(messages_api.MESSAGES, chat=False), self.server.profile.max_tokens_limit
        for name in ("max_tokens", "messages"):
            require(values, name, messages_api.MESSAGES)
        values["max_tokens"] = min(values["max_tokens"], limit or values["max_tokens"])
        turn = self.messages_turn(values)
        values = self.read_chat(turn.chat)
        self.ignore(turn.unheeded(self.found_in_template(self.model)))

        def render(completion: Completion) -> Rendering:
            return messages_api.Answer(completion, turn)

        prompt = replace(chat_prompt(values), lenient=turn.lenient)
        self.generate([prompt], values, messages_api.SHAPE, None, cut=True, render=render)

    def post_count_tokens(self) -> None:
        values = self.read(messages_api.BODIES["/messages/count_tokens"], chat=False)
        require(values, "messages", messages_api.MESSAGES)
        turn = self.messages_turn(values)
        self.reply(200, {"input_tokens": self.count(turn.chat, turn.lenient)})


# ───────────────────────────────────────────────────── routes ────────────────────────────────────────────────────

Action = Callable[..., None]
ROUTES: dict[str, dict[str, Action]] = {  # each also under /v1; 404, 405 and Allow follow from it
    "/": {"GET": Routes.get_root},
    "/health": {"GET": Routes.get_health},
    "/healthz": {"GET": Routes.get_healthz},
    "/models": {"GET": Routes.get_models},
    "/models/{id}": {"GET": Routes.get_model},
    "/capabilities": {"GET": Routes.get_capabilities},
    "/tokenizer_info": {"GET": Routes.get_tokenizer_info},
    "/metrics": {"GET": Routes.get_metrics},
    "/models/load": {"POST": Routes.post_load},
    "/models/unload": {"POST": Routes.post_unload},
    "/chat/completions": {"POST": Routes.post_chat_completions},
    "/completions": {"POST": Routes.post_completions},
    "/responses": {"GET": Dialects.get_responses, "POST": Dialects.post_responses},
    "/responses/input_tokens": {"POST": Dialects.post_input_tokens},
    "/responses/{id}": {"GET": Dialects.get_response, "DELETE": Dialects.delete_response},
    "/responses/{id}/input_items": {"GET": Dialects.get_input_items},
    "/responses/{id}/cancel": {"POST": Dialects.post_cancel},
    "/messages": {"POST": Dialects.post_messages},
    "/messages/count_tokens": {"POST": Dialects.post_count_tokens},
    "/embeddings": {"POST": Routes.post_embeddings},
    "/rerank": {"POST": Routes.post_rerank},
    "/v2/rerank": {"POST": Routes.post_rerank},  # Cohere's
    "/score": {"POST": Routes.post_score},
    "/tokenize": {"POST": Routes.post_tokenize},
    "/detokenize": {"POST": Routes.post_detokenize},
    "/apply-template": {"POST": Routes.post_apply_template},
}
QUERIES = {  # the words that may stand behind the ? of a URL; what else does is named as a field that nobody knows
    Routes.get_capabilities: ("model",), Routes.get_tokenizer_info: ("model",),
    Dialects.get_response: ("stream", "starting_after"), Dialects.get_input_items: ("order", "limit", "after"),
    Dialects.post_messages: ("beta",), Dialects.post_count_tokens: ("beta",),
}  # fmt: skip
WITHOUT_BODY = {Dialects.post_cancel}  # a POST that says no length has none
OPERATORS = {Routes.post_load, Routes.post_unload}  # only with --admin
OPEN_TO_ALL = {Routes.get_root, Routes.get_health, Routes.get_healthz}  # no API key needed


TABLES = BODIES | responses_api.BODIES | messages_api.BODIES  # the fields of every route's body
PATTERNS = sorted((path.split("{id}") for path in ROUTES if "{id}" in path), key=lambda ends: -len(ends[1]))


def find_route(path: str) -> tuple[str, tuple[str, ...]]:
    """(the row of ROUTES that a path means, the {id} in it)."""
    for before, after in PATTERNS if path not in ROUTES else ():
        if path.startswith(before) and path.endswith(after) and len(path) > len(before) + len(after):
            id = path[len(before) : len(path) - len(after)]
            if before == "/models/" or "/" not in id:  # a model's id may have slashes
                return f"{before}{{id}}{after}", (unquote(id),)
    return path, ()


class Server(HttpServer):
    """What all requests share. `api_key` and `admin` (None: off; "": for whoever may use the rest) are short for an `access`."""

    full = (
        PREFIX + b"503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: 138\r\n"
        b"Retry-After: 1\r\nConnection: close\r\n\r\n"
        b'{"error":{"message":"Too many connections. Try again in a moment.","type":"unavailable_error","param":null,'
        b'"code":"too_many_connections"}}'
    )

    def __init__(
        self,
        address: tuple[str, int],
        models: Models,
        *,
        api_key: str = "",
        request_timeout: float = 600,
        max_body: int = 0,
        strict: bool = False,
        record: str = "",
        profile: Profile | None = None,
        admin: str | None = None,
        access: Access | None = None,
        limits: HttpLimits | None = None,
        tls: ssl.SSLContext | None = None,
        uds: str = "",
        state: State | Literal["memory", "none"] = "memory",
        drop_hosted: bool = False,
        page: Page | None = None,
        metrics: Metrics | None = None,
    ):
        self.state = state if isinstance(state, State) else State() if state == "memory" else None  # of /v1/responses
        self.key = self.state.key if self.state else secrets.token_bytes(32)  # of what clients keep and send back
        self.running = Running()  # in the background
        self.drop_hosted = drop_hosted  # tools that this server does not have are left out, not refused
        self.profile = profile or Profile()
        self.page = page  # for browsers at /
        self.metrics = metrics  # None: nothing is counted
        self.access = access or Access(
            Keys([api_key] if api_key else []), None if admin is None else Keys([admin] if admin else [])
        )
        self.models, self.request_timeout = models, request_timeout
        self.strict, self.record, self.record_lock = strict, record, threading.Lock()
        self.ignored_seen: set[str] = set()
        self.listing: tuple[Any, bytes] = (None, b"")  # of GET /v1/models: what it was made from, and its JSON
        self.trimmed = (0, 0.0)  # requests so far, and the time, when memory was last given back
        limits = limits or HttpLimits()
        super().__init__(address, Dialects, replace(limits, max_body=max_body) if max_body else limits, tls, uds)
        self.access.guard &= not uds and is_loopback(str(self.server_address[0]))
        self.uncounted = self.access.trusts

    @property
    def admin(self) -> Keys | None:
        """None: the operator's routes are off."""
        return self.access.admin

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        memory.settle()
        super().serve_forever(poll_interval)

    def service_actions(self) -> None:
        """From serve_forever, twice a second, and after connections have come."""
        with contextlib.suppress(RuntimeError):  # no more threads: then there are as many as there can be
            self.workers.keep(min(self.models.slots(), self.limits.connections))
        total, at = self.trimmed
        if self.busy.total != total and time.monotonic() > at + GIVE_BACK_S:
            self.trimmed = (self.busy.total, time.monotonic())
            memory.give_back()

    def without_paths(self, text: str) -> str:
        """An error, as those may see it who have no key: it does not tell where the files are."""
        for life in list(self.models.lives.values()):
            text = text.replace(f"{life.model.path.parent}{os.sep}", "")
        return re.sub(r"(?<![\w:/\\])(?:[A-Za-z]:)?[/\\](?:[^\s/\\:]+[/\\])+", "", text)

    def note_ignored(self, names: list[str]) -> None:
        for name in (name[:64] for name in names):
            name = re.sub(r"\[[0-9]+\]", "[…]", name)
            if name not in self.ignored_seen and len(self.ignored_seen) < 1000:
                self.ignored_seen.add(name)
                log.warning("request field %.64r is unknown and ignored (said once)", name)

    def note_request(self, path: str, body: bytes, request_id: str, completion: Completion, debug: dict[str, Any]) -> None:
        """--record: one line of JSON per answered request, enough for examples/replay.py to run it again."""
        if not self.record:
            return
        answers = [choice.record() for choice in completion.choices]
        line = {
            "time": completion.created,
            "request_id": request_id,
            "id": completion.id,
            "path": path,
            "body": parse_json(body),
        }
        data = compact(line | debug | {"usage": completion.usage(), "choices": answers}) + b"\n"
        try:
            with self.record_lock:
                append_line(self.record, data)
        except OSError as error:
            log.error("--record %s: %s", self.record, error)


def opened_record(path: str) -> str:
    """Where nothing can be written is told at the start. Raises UsageError."""
    try:
        if path:
            append_line(path, b"")
    except OSError as error:
        raise UsageError(f"--record {path}: {error.strerror}") from None
    return path


def append_line(path: str, line: bytes) -> None:
    """Whole or not at all, into a file that is for its owner alone. What a crash left of a line before it is cut off."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.write(file, line)
            return
        if os.name == "posix" and stat.S_IMODE(os.fstat(file).st_mode) != 0o600:
            os.fchmod(file, 0o600)
        end = whole_lines(file)
        try:
            left = memoryview(line)
            while left:
                left = left[os.write(file, left) :]
        except OSError:
            os.ftruncate(file, end)
            raise
    finally:
        os.close(file)


def whole_lines(file: int) -> int:
    """Cut a file off behind its last whole line: where that is."""
    end = size = os.fstat(file).st_size
    while end:
        start = max(0, end - (1 << 16))
        os.lseek(file, start, os.SEEK_SET)
        if (at := os.read(file, end - start).rfind(b"\n")) >= 0:
            end = start + at + 1
            break
        end = start
    if end < size:
        os.ftruncate(file, end)
    return end


# ────────────────────────────────────────────────────── main ─────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        if found := re.match(r"unrecognized arguments: (-\S+)", message):
            word = model_init.same_dashes([found[1].partition("=")[0]])[0]
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(word, known, 1, 0.7)
            message = f"there is no flag {word}" + (f", did you mean {near[0]}?" if near else "")
        self.exit(2, f"{self.prog}: {message.rstrip('.')}{'' if message.endswith('?') else '.'} Try --help.\n")


def parse_args(argv: list[str]) -> argparse.Namespace:
    return make_parser().parse_args(model_init.same_dashes(argv))


def make_parser() -> Parser:
    parser = Parser(
        description="Serve local language models over the OpenAI API.",
        epilog="`_` may stand for `-`. The flags of exllamav3's model_init (-gs, --gpu_split, …) are accepted too.",
        allow_abbrev=False,
    )
    server = parser.add_argument_group("server")
    add = server.add_argument
    add("--profile", choices=list(model_init.PROFILES), default="neutral",
        help="defaults as another server's users know them (docs/coming-from.md has the table); each is a flag of its own")  # fmt: skip
    add("-H", "--host", help="address to listen on; 0.0.0.0: all; default: the profile's (localhost)")
    add("-p", "--port", type=model_init.whole(0, 65535), help="port, 0: any free one; default: the profile's (8000)")
    add("--strict", action="store_true", help="refuse request fields that nobody knows, instead of ignoring them")
    add("--metrics", action="store_true", help="count, and tell Prometheus at /metrics")
    add("--no-page", action="store_true", help="no page for browsers at /: JSON for everyone")
    add("--record", default="", metavar="FILE", help="append every answered request to FILE, for examples/replay.py")
    add("--state", default="", metavar="FILE",
        help="where /v1/responses keeps what it is to store; none: nowhere; default: a file in the user's state folder")  # fmt: skip
    add("--state-ttl", type=model_init.seconds, default=30 * 86400.0, metavar="S",
        help="seconds that a stored response is kept (default 30 days)")  # fmt: skip
    add("--state-size", type=model_init.whole(1, 1 << 30), default=1024, metavar="MIB",
        help="MiB of stored responses; beyond it the oldest are dropped (default 1024)")  # fmt: skip
    add("--hosted-tools", choices=["refuse", "drop"], default="refuse",
        help="tools that only OpenAI has (web_search, …), in a request to /v1/responses: refused, or left out and told so")  # fmt: skip
    add("--grace", type=model_init.seconds, default=10.0, metavar="S",
        help="seconds that running answers get when the server is stopped (default 10)")  # fmt: skip
    add("--log-level", default="INFO", type=str.upper, choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    add("--log-format", default="text", choices=["text", "json"], help="one line per event; json: one object (default text)")
    add(
        "--log-line",
        type=model_init.whole(80, 1 << 20),
        default=2000,
        metavar="N",
        help="characters of a message in the log (default 2000)",
    )
    add("--version", action="version", version=VERSION)
    model_init.add_args(parser)
    add_security_args(parser.add_argument_group("security"))
    add_connection_args(parser.add_argument_group("connections"))
    return parser


def add_security_args(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--api-key", action="append", metavar="KEY",
        help="ask clients for this key; again for more; default: the environment's API_KEY, else none")  # fmt: skip
    add(
        "--api-key-file",
        default="",
        metavar="FILE",
        help="and for one of these: a key a line, NAME:KEY; read again when it changes",
    )
    add("--admin", action="store_true", help="also serve /v1/models/load and /v1/models/unload")
    add("--admin-key", action="append", metavar="KEY", help="the same, for those who send this key; again for more")
    add("--admin-key-file", default="", metavar="FILE", help="the same, for the keys in a file")
    add("--allow-host", action="append", default=[], metavar="NAME",
        help="a name that Host may have beside this machine's, as behind a proxy; only asked of a server on loopback without a key")  # fmt: skip
    add("--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="web pages that may use such a server, as https://app.example; *: all")  # fmt: skip
    add("--trusted-proxy", action="append", default=[], type=proxy, metavar="ADDR",
        help="a proxy's address or network: its X-Forwarded-For names the client")  # fmt: skip
    add("--ssl-certfile", default="", metavar="FILE", help="speak TLS, with this certificate chain (PEM); read again on SIGHUP")
    add("--ssl-keyfile", default="", metavar="FILE", help="its key, where it is in a file of its own")
    add("--uds", default="", metavar="PATH", help="listen on a Unix socket for this user alone, instead of an address")


def add_connection_args(group: argparse._ArgumentGroup) -> None:
    add, limits, whole = group.add_argument, HttpLimits(), model_init.whole
    add("--max-connections", type=whole(1, 1 << 20), default=limits.connections, metavar="N",
        help="the oldest idle one makes room for a new one; default and most: three quarters of ulimit -n, up to 8,192")  # fmt: skip
    add("--max-connections-per-address", type=whole(0, 1 << 20), default=0, metavar="N",
        help="of one IPv4 address or IPv6 /64; default: three quarters of all")  # fmt: skip
    add("--header-timeout", type=model_init.seconds, default=limits.header_s, metavar="S",
        help="seconds for a whole request header, and for a TLS handshake (default 10)")  # fmt: skip
    add("--idle-timeout", type=model_init.seconds, default=limits.idle_s, metavar="S",
        help="seconds that a connection may be silent before a request (default 60)")  # fmt: skip
    add("--min-body-rate", type=whole(0, 1 << 30), default=int(limits.body_rate), metavar="N",
        help="bytes per second that a body must bring, 0: any (default 4096)")  # fmt: skip
    add("--max-body", type=whole(1, 1 << 10), default=limits.max_body >> 20, metavar="MIB", help="of one request (default 16)")
    add("--max-bodies", type=whole(1, 1 << 20), default=limits.all_bodies >> 20, metavar="MIB",
        help="of all requests at once, half of it from one address; beyond that 503 (default 128)")  # fmt: skip


def proxy(text: str) -> Any:
    try:
        return network(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address or a network") from None


def access_of(args: argparse.Namespace) -> Access:
    """Raises UsageError."""
    keys = args.api_key if args.api_key is not None or args.api_key_file else [os.environ.get("API_KEY", "")]
    if args.api_key is None:
        keys = [key for key in keys or () if key]  # an empty variable is as good as none
    admin = Keys(args.admin_key or (), args.admin_key_file, "--admin-key")
    return Access(
        Keys(keys, args.api_key_file),
        admin if admin or args.admin else None,
        guard=True,
        hosts=frozenset(host_of(name) for name in args.allow_host),
        origins=frozenset(origin_of(origin) for origin in args.allow_origin),
        proxies=tuple(args.trusted_proxy),
        json_only=True,
    )


def limits_of(args: argparse.Namespace) -> HttpLimits:
    return HttpLimits(
        args.max_connections, args.max_connections_per_address, args.header_timeout, args.idle_timeout,
        args.min_body_rate, args.max_body << 20, args.max_bodies << 20,
    )  # fmt: skip


def tls_of(args: argparse.Namespace) -> ssl.SSLContext | None:
    """Raises UsageError."""
    if not args.ssl_certfile:
        if args.ssl_keyfile:
            raise UsageError("--ssl-keyfile needs --ssl-certfile")
        return None
    try:
        return tls_context(args.ssl_certfile, args.ssl_keyfile)
    except OSError as error:
        files = " ".join(filter(None, (args.ssl_certfile, args.ssl_keyfile)))
        raise UsageError(f"--ssl-certfile {files}: {error.strerror or error}") from None


LOOK_S = 5.0  # seconds that the first look at a chat template may take, for who asks what was found in it


def banner(server: Server, engine: AnyEngine) -> str:
    info = engine.info
    assert info is not None
    name = ", ".join(info.models) or next((life.model.id for life in server.models.lives.values() if life.engine is engine), "")
    inside = f", {info.threads} threads" if info.threads else ""
    cache = f", context {info.context} tokens, KV cache {info.cache_tokens} tokens" if info.cache_tokens else ""
    placed = f", {info.placement}" if info.placement else ""
    return f"""
  {name}
  {info.library}{inside}, {info.slots} slots{cache}{placed}{template_line(engine.syntax(LOOK_S))}
{listening(server)}"""


def template_line(syntax: dict[str, Any]) -> str:
    """What the chat template was found to know."""
    if not syntax:
        return ""
    calls = syntax["tool_calls"] or "none shown (--tool-syntax)"
    reasoning = syntax["reasoning"]
    reasons = " … ".join(reasoning) if isinstance(reasoning, list) else reasoning or "none"
    switch = f", switch {syntax['thinking_switch']}" if syntax["thinking_switch"] else ""
    switch += f", efforts {', '.join(syntax['reasoning_efforts'])}" if syntax["reasoning_efforts"] else ""
    return f"\n  tool calls: {calls}; reasoning: {reasons}{switch}"


def listening(server: Server) -> str:
    host, port, scheme = str(server.server_address[0]), server.server_port, "https" if server.tls else "http"
    url = f"{scheme}://{'localhost' if host in ('0.0.0.0', '::', '127.0.0.1') else host}:{port}"
    where, curl = url, f"curl {url}"
    if server.uds:
        url, where = f"{scheme}://localhost", server.uds
        curl = f"curl --unix-socket {where} {url}"
    stream = ',"stream":false' if server.profile.stream else ""
    names = list(server.models.catalog.models().values())
    asked = names and (len(names) > 1 or server.models.limits.absent == "refuse")
    model = f'"model":"{server.models.catalog.public(names[0])}",' if asked else ""
    path, body = {
        "embed": ("/v1/embeddings", '"input":["The cat sat on the mat.","A cat was sitting on a rug."]'),
        "rerank": ("/v1/rerank", '"query":"Where is the cat?","documents":["On the mat.","In 1789."]'),
    }.get(names[0].task if names else "", (
        "/v1/chat/completions", f'"messages":[{{"role":"user","content":"What is the capital of France?"}}],"max_tokens":64{stream}'
    ))  # fmt: skip
    return f"""\
  listening on {where}  ({"a chat, in a browser; " if server.page else ""}OpenAI base_url: {url}/v1)

  {curl}{path} -H 'Content-Type: application/json' \\
    -d '{{{model}{body}}}'
"""


def open_state(args: argparse.Namespace) -> State | Literal["memory", "none"]:
    """The file of --state. Where only the default one cannot be used, responses are kept in memory, and the log says so."""
    if args.state == "none":
        return "none"
    path = args.state or str(default_path())
    try:
        return State(path, args.state_ttl, args.state_size << 20)
    except StateError as error:
        if args.state:
            raise UsageError(f"--state {error}") from None
        log.warning("responses are kept in memory only: %s", error)
        return State(":memory:", args.state_ttl, args.state_size << 20)


class Service:
    """Start-up and shut-down, in their order."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.exit_code, self.greeted, self.stopping = args, 0, False, False
        self.loads: dict[AnyEngine, Progress] = {}  # engines that are being loaded
        self.models = model_init.init(args)
        profile = model_init.profile_of(args)
        try:
            self.server = Server(
                (profile.host, profile.port),
                self.models,
                request_timeout=args.request_timeout,
                strict=args.strict,
                record=opened_record(args.record),
                profile=profile,
                access=access_of(args),
                limits=limits_of(args),
                tls=tls_of(args),
                uds=args.uds,
                state=open_state(args),
                drop_hosted=args.hosted_tools == "drop",
                page=None if args.no_page else read_page(),
                metrics=Metrics() if args.metrics else None,
            )
        except OSError as error:
            where = args.uds or f"{profile.host}:{profile.port}"
            raise UsageError(f"cannot listen on {where}: {error.strerror or error}") from None
        if args.max_connections > self.server.limits.connections:
            log.warning("--max-connections is %d here: ulimit -n allows no more", self.server.limits.connections)
        if not (args.uds or self.server.access.keys or is_loopback(str(self.server.server_address[0]))):
            log.warning(
                "no --api-key: whoever reaches this address may use the models, and so may any web page opened where it can be reached"
            )
        self.models.on_ready, self.models.on_progress, self.models.on_fatal = self.ready, self.progress, self.fatal

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        if self.server.tls and hasattr(signal, "SIGHUP"):
            signal.signal(signal.SIGHUP, self.reload)
        log.info("listening on %s", self.args.uds or f"port {self.server.server_port}")
        self.models.preload(["none"] if self.args.preload == "none" else model_init.preloaded(self.args))
        children.end_spare()  # nothing is loaded yet, or it is an upstream's
        if not self.models.lives:
            self.greet_catalog()
        self.server.serve_forever()
        self.server.drain(self.args.grace)
        self.models.close()
        return self.exit_code

    def greet_catalog(self) -> None:
        """The banner of a server that loads models when they are asked for."""
        names = [self.models.catalog.public(model) for model in self.models.catalog.models().values()]
        shown = "\n  ".join(names[:20] + ([f"… and {len(names) - 20} more"] if len(names) > 20 else []))
        print(f"\n  {shown or 'no model yet'}\n  each loaded when it is asked for\n{listening(self.server)}", flush=True)
        self.greeted = True

    def ready(self, engine: AnyEngine) -> None:
        if shown := self.loads.pop(engine, None):
            shown.close()
        if not self.greeted:
            self.greeted = True
            greet = threading.Thread(target=lambda: print(banner(self.server, engine), flush=True), name="banner", daemon=True)
            greet.start()  # the look at the template may take a moment, and this thread is the engine's reader

    def progress(self, life: Life) -> None:
        """From an engine's reader thread."""
        engine = life.engine
        if engine is None:
            return
        if engine not in self.loads:
            self.loads = {other: shown for other, shown in self.loads.items() if other.dead is None}
            size = sum(map(os.path.getsize, weight_files(engine.spec.path))) if life.model.kind != "upstream" else 0
            self.loads[engine] = Progress(f"loading {life.model.id}", size, lambda: not engine.ready and engine.dead is None)
        self.loads[engine].show(engine.progress)

    def fatal(self, reason: str) -> None:
        print(f"openai_api_endpoint.py: {reason}", file=sys.stderr, flush=True)
        self.exit_code = 1
        threading.Thread(target=self.server.shutdown).start()

    def reload(self, _number: int, _frame: Any) -> None:
        """A new certificate, for connections from now on."""
        try:
            self.server.tls = tls_of(self.args)
            log.info("--ssl-certfile %s: read again", self.args.ssl_certfile)
        except UsageError as error:
            log.error("%s; the certificate stays as it was", error)

    def stop(self, number: int, _frame: Any) -> None:
        if self.stopping:  # the second Ctrl-C
            for engine in self.models.engines():
                engine.kill()
            os._exit(128 + number)
        self.stopping = True
        self.models.stop_restarting()
        log.info("stopping: running answers have %g s (once more: at once)", self.args.grace)
        threading.Thread(target=self.server.shutdown).start()  # serve_forever runs in this very thread: do not wait for it


def main(argv: list[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    logs.start(args.log_level, args.log_format, args.log_line)
    memory.be_sparing()
    try:
        return Service(args).run()
    except UsageError as error:
        print(f"openai_api_endpoint.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
