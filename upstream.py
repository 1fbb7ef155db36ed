"""An engine that is another server: vLLM, TensorRT-LLM, or anything that speaks the OpenAI API.

Upstream has the face of engine_handle.Engine, so that everything above it is the same; it lives in the server process, since
there is no native library to keep away. A job's thread asks, and one thread for all reads what comes and never waits for a
client; closing the connection is how a job is cancelled, there as here. Nothing is sent again once a byte has come back.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.client
import itertools
import json
import re
import selectors
import socket
import ssl
import struct
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from engine import (
    UPSTREAMS,
    Delta,
    EngineFailed,
    EngineInfo,
    EngineSpec,
    Event,
    Prompt,
    Refused,
    Sampling,
    Started,
    TokenLogprob,
    log,
)
from engine import Answer as Answered
from engine_handle import DEFAULT_TIMEOUTS, Job, Jobs, Timeouts
from grammar import ebnf_grammar
from regular import Unsupported

POLL_S, CONNECT_S = 2.0, 5.0
POOL = 64  # idle connections kept
CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]{1,12}")
REFUSALS = (400, 413, 422)  # an upstream's words for: not with this request
LISTING_MAX = 1 << 22  # bytes of its list of models
CALL_MAX = 1 << 28  # bytes of what it answers to a call: 2,048 vectors of 8,192 numbers fit
Take = Callable[[http.client.HTTPConnection, http.client.HTTPResponse], None]
TOKENS_MAX = 1 << 17  # taken for the longest answer where neither the request nor the upstream says
# What an answer may be at most, beside what its tokens explain: bytes of events, characters of text, pieces of it.
BASE_BYTES, BASE_TEXT, BASE_PIECES = 1 << 20, 1 << 16, 1 << 10
TOKEN_BYTES, LOGPROB_BYTES, TOKEN_TEXT, TOKEN_PIECES = 4096, 1024, 256, 4


class UpstreamFailed(EngineFailed):
    """An upstream server did not answer as it should, with the HTTP status that tells our client so."""

    def __init__(self, message: str, status: int = 502, retry_after: str | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def without_user(url: str) -> str:
    """A URL as it may be shown: its user and password are left out."""
    return re.sub(r"(?<=//)[^/?#]*@", "", url)


def authorization(spec: EngineSpec) -> dict[str, str]:
    """The header that lets us in: with the key, else with the user and password of the URL."""
    url = urlsplit(spec.path)
    if spec.key:
        return {"Authorization": f"Bearer {spec.key}"}
    if url.username is None:
        return {}
    user = f"{unquote(url.username)}:{unquote(url.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}


class UpstreamJob(Job):
    """A job, and the connection that it runs on."""

    def __init__(self, engine: Jobs, number: int, choices: int, client: str):
        super().__init__(engine, number, choices, client)
        self.dropped = False
        self.socket: socket.socket | None = None

    def hang_up(self) -> None:
        self.dropped = True
        if self.socket:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it


class Slots:
    """So many jobs at once; a slot goes to the client that has the fewest, and got its last one longest ago."""

    def __init__(self, count: int):
        self.free, self.turn = count, threading.Condition()
        self.waiting: list[UpstreamJob] = []
        self.running: Counter[str] = Counter()
        self.turns: dict[str, int] = {}  # when each client last got a slot
        self.clock = itertools.count(1)

    def enter(self, job: UpstreamJob) -> bool:
        """False: the job was dropped while it waited."""
        with self.turn:
            self.waiting.append(job)
            while not job.dropped and not (self.free and self.next() is job):
                self.turn.wait()
            self.waiting.remove(job)
            if not job.dropped:
                self.free -= 1
                self.running[job.client] += 1
                self.turns = self.turns if len(self.turns) < 10_000 else {}
                self.turns[job.client] = next(self.clock)
                job.running = True
            self.turn.notify_all()
            return not job.dropped

    def next(self) -> UpstreamJob | None:
        waiting = (job for job in self.waiting if not job.dropped)
        return min(waiting, key=lambda job: (self.running[job.client], self.turns.get(job.client, 0)), default=None)

    def leave(self, job: UpstreamJob) -> None:
        with self.turn:
            self.free += 1
            self.running -= Counter([job.client])
            self.turn.notify_all()

    def wake(self) -> None:
        with self.turn:
            self.turn.notify_all()


class Upstream(Jobs):
    """Another server as an engine; `spec.path` is its URL. It is ready once it lists a model, and dead when it has gone.

    Nothing that it says is believed further than an engine's word: what it may send is bounded by what was asked of it.
    Our clients never see where it is.
    """

    def __init__(
        self,
        spec: EngineSpec,
        max_jobs: float,
        patience: float,
        on_change: Callable[[Any], None],
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ):
        super().__init__(spec, max_jobs, patience, on_change, timeouts)
        url = urlsplit(spec.path)
        self.secure, self.host, self.port = url.scheme == "https", url.hostname or "localhost", url.port
        self.base = url.path.rstrip("/").removesuffix("/v1") + "/v1"
        self.place = without_user(spec.path)  # for the log
        self.headers = {"Content-Type": "application/json"} | authorization(spec)
        self.slots = Slots(spec.slots)
        self.reader = Reader()
        self.idle: deque[http.client.HTTPConnection] = deque(maxlen=POOL)  # under the lock
        self.gone = threading.Event()
        self.why = ""  # it is not there yet
        self.listed = b""  # what it last said of its models
        threading.Thread(target=self.watch, name="upstream-watch", daemon=True).start()

    # ── the face of an engine ──

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, client: str = "", model: str = "") -> Job:
        """`model`: which of the upstream's, where it serves several."""
        job = UpstreamJob(self, next(self.numbers), len(prompts) * sampling.n, client)
        if sampling.constraint is None:
            self.launch(job, prompts, sampling, model)
            return job

        def launch(grammar: bytes) -> None:
            try:
                self.launch(job, prompts, replace(sampling, constraint=None, grammar=grammar.decode()), model)
            except (Refused, RuntimeError) as error:
                self.drop(job)
                job.put(error if isinstance(error, Refused) else UpstreamFailed("no thread is left", 503))

        self.admit(job)
        self.prepare(job, ("grammar", sampling.constraint), sampling.constraint, launch, setup=False)
        return job

    def launch(self, job: UpstreamJob, prompts: Sequence[Prompt], sampling: Sampling, model: str) -> None:
        """Start what asks the upstream. Raises Refused, RuntimeError, and what admit() raises for a job that is new."""
        assert self.info is not None
        try:
            path, body = request_body(prompts, sampling, model or self.info.models[0])
        except Unsupported as error:
            raise Refused(
                f"The constraint cannot be honoured: {error}", "structured_outputs", "unsupported_constraint"
            ) from None
        if "extensions" in UPSTREAMS[self.spec.backend]:
            body.pop("top_k", None)  # only its neutral values have come so far, and they too are beyond OpenAI's
        else:
            body |= for_vllm(sampling)
        try:
            data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        except RecursionError:
            raise Refused("The request is nested too deeply.") from None
        self.enter(
            job, self.base + path, data,
            lambda connection, reply: self.reader.add(self.reply(connection, reply, job, sampling, len(data))),
        )  # fmt: skip

    def call(self, name: str, arguments: dict[str, Any], client: str = "", model: str = "") -> Job:
        """One of CALLS, passed on."""
        assert self.info is not None
        if name not in CALLS or CALLS[name].needs in UPSTREAMS[self.spec.backend]:
            told = f"The engine {self.spec.backend} does not {name} for others: ask that server yourself."
            raise Refused(told, "prompt", "unsupported_parameter")
        path, body, answer = CALLS[name].ask(**arguments)
        root = self.base if path in OWN_V1 else self.base.removesuffix("/v1")
        data = json.dumps({"model": model or self.info.models[0], **body}, ensure_ascii=False).encode()
        job = UpstreamJob(self, next(self.numbers), 1, client)

        def take(connection: http.client.HTTPConnection, reply: http.client.HTTPResponse) -> None:
            said = reply.read(CALL_MAX + 1)
            if len(said) > CALL_MAX:
                raise UpstreamFailed("its answer is too long")
            told = Answered(answer(json.loads(said)))
            keep = reply.isclosed() and not reply.will_close
            self.end(job, kept=connection if keep else None, last=[told])
            if not keep:
                connection.close()

        return self.enter(job, root + path, data, take)

    def enter(self, job: UpstreamJob, path: str, data: bytes, take: Take) -> Job:
        """`take` has a connection with a reply of status 200 from then on, and ends the job."""
        if job.order is None:  # whose constraint has been prepared is here already
            self.admit(job)
        try:
            threading.Thread(target=self.run, args=(job, path, data, take), name="upstream-job", daemon=True).start()
        except RuntimeError:  # no more threads: the job's place must not stay taken
            self.drop(job)
            raise
        return job

    def drop(self, job: Job) -> None:
        with self.lock:
            known = self.jobs.pop(job.number, None)
        if isinstance(known, UpstreamJob):
            if known.order:
                self.workshop.drop(known.order)
            known.hang_up()
            self.slots.wake()

    def kill(self) -> None:
        self.close()

    def close(self) -> None:
        self.gone.set()
        self.workshop.close()
        with self.lock:
            jobs = list(self.jobs.values())
        for job in jobs:
            self.drop(job)
        while self.idle:
            self.idle.pop().close()

    # ── is it there? ──

    def watch(self) -> None:
        """Ask for its models until it has gone; one that is not there yet is asked again."""
        failures = 0
        while not self.gone.is_set():
            try:
                connection = self.connect()
                with contextlib.closing(connection):
                    connection.request("GET", f"{self.base}/models", headers=self.headers)
                    reply = connection.getresponse()
                    data = reply.read(LISTING_MAX)
                if reply.status != 200:
                    raise OSError(f"GET /v1/models answers {reply.status}")
                failures = 0
                if self.info is None or data != self.listed:
                    self.be_ready(json.loads(data))
                self.listed = data
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
                failures += 1
                if self.info is None:
                    why = self.placeless(error)
                    log.log(30 if why != self.why else 10, "%s is not there yet: %s", self.place, error)
                    self.why = why
                elif failures == 3:
                    log.warning("%s has gone: %s", self.place, error)
                    self.die(
                        f"the upstream server has gone: {self.placeless(error)}", isinstance(error, ConnectionRefusedError)
                    )
            self.gone.wait(POLL_S if self.info else POLL_S / 4)

    def be_ready(self, listing: Any) -> None:
        names = tuple(name for card in listing["data"][:1000] if len(name := str(card["id"])) <= 256 and name.isprintable())
        card = listing["data"][0]
        library = f"{self.spec.backend} at {self.place}"
        mark = hashlib.sha256(f"{library} {names[0]}".encode()).hexdigest()[:12]
        self.info = EngineInfo(
            self.spec.backend, library, self.spec.slots, 0, int(card.get("max_model_len") or 0), 0, f"fp_{mark}", models=names
        )  # fmt: skip
        self.progress = 1.0
        self.tell()

    def die(self, reason: str, closed: bool) -> None:
        """`closed`: nobody listens any more. One that is only slow may yet answer the jobs that it has."""
        with self.lock:
            self.dead = reason
            jobs = list(self.jobs.values()) if closed else []
        self.gone.set()
        self.workshop.close()
        self.tell()
        for job in jobs:  # vLLM, told to stop, waits for its streams without another byte
            job.put(UpstreamFailed(reason))  # first: its thread, once hung up, says only that it broke off
            self.drop(job)

    # ── one job ──

    def connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        connection = kind(self.host, self.port, timeout=CONNECT_S)
        connection.connect()
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def run(self, job: UpstreamJob, path: str, data: bytes, take: Take) -> None:
        """Ask; the body of a good reply is then somebody else's."""
        try:
            if not self.slots.enter(job):
                return self.end(job)
            job.put(Started(0, 0, time.monotonic()))  # the clock runs; what the prompt counted is told at the end
            connection, reply = self.send(job, path, data)
            try:
                if reply.status != 200:
                    raise failure(reply.status, reply.headers.get("Retry-After"), reply.read(1 << 20))
                take(connection, reply)
            except BaseException:
                connection.close()
                raise
        except Exception as error:
            self.end(job, error)

    def reply(
        self, connection: http.client.HTTPConnection, reply: Any, job: UpstreamJob, sampling: Sampling, asked: int
    ) -> Reply:
        """`asked`: bytes of the request. With what it asked for they say how much may come."""
        assert self.info is not None
        each = self.info.context or TOKENS_MAX if sampling.max_tokens is None else sampling.max_tokens
        tokens, line = job.open * each, BASE_BYTES + 32 * asked
        events = Events(tokens * (TOKEN_BYTES + LOGPROB_BYTES * (sampling.logprobs or 0)) + line, line)
        return Reply(connection, reply, Answer(job, sampling, tokens, asked), self.end, events)

    def placeless(self, error: Exception) -> str:
        """What went wrong, as clients may read it."""
        return str(error).replace(self.place, "it").replace(self.host, "it")

    def end(
        self,
        job: UpstreamJob,
        error: Exception | None = None,
        kept: http.client.HTTPConnection | None = None,
        last: Iterable[Event] = (),
    ) -> None:
        """Of a job, once, whatever it ends by. `kept`: a connection that can be used again; `last`: what the job is still told."""
        if job.running:
            self.slots.leave(job)
        with self.lock:  # first: whoever has been told all drops the job, which would hang up
            known = self.jobs.pop(job.number, None)
            if kept and known:
                self.idle.append(kept)
        if kept and not known:  # it is being hung up
            kept.close()
        for event in last:
            job.put(event)
        if isinstance(error, (Refused, EngineFailed)):
            job.put(error)
        elif isinstance(error, ConnectionRefusedError):
            job.put(UpstreamFailed("it is not there", 503))
        elif error:  # resets, half lines, no JSON, a shape that nobody knows
            if not job.dropped:
                log.info("upstream: %s: %s", type(error).__name__, error)
            job.put(UpstreamFailed(f"it broke off: {self.placeless(error)[:200] or type(error).__name__}"))

    def send(self, job: UpstreamJob, path: str, data: bytes) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """A kept connection may have been closed meanwhile: then, and only then, a new one is tried."""
        with self.lock:
            kept = self.idle.pop() if self.idle else None
        for connection in ([kept] if kept else []) + [None]:
            connection = connection or self.connect()
            job.socket = connection.sock
            connection.sock.settimeout(None)  # the handler has the clock
            if job.dropped:
                job.hang_up()
            try:
                connection.request("POST", path, data, self.headers)
                return connection, connection.getresponse()
            except (ConnectionResetError, BrokenPipeError, http.client.RemoteDisconnected):
                connection.close()
                if connection is not kept:
                    raise
        raise AssertionError("not reached")


def request_body(prompts: Sequence[Prompt], s: Sampling, model: str) -> tuple[str, dict[str, Any]]:
    """What is asked of the upstream: only what differs from doing nothing, under the names that vLLM and OpenAI have."""
    first = prompts[0]
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if first.messages is not None:
        path, body["messages"] = "/chat/completions", list(first.messages)
        body |= tool_fields(first)
        body |= {} if s.logprobs is None else {"logprobs": True, "top_logprobs": s.logprobs}
        body |= {"chat_template_kwargs": first.template_kwargs} if first.template_kwargs else {}
        body |= {"continue_final_message": True} if first.continue_final else {}
        if first.continue_final or not first.generation_prompt:
            body["add_generation_prompt"] = False
    else:
        path = "/completions"
        texts = [p.text if p.text is not None else list(p.tokens or ()) for p in prompts]
        body["prompt"] = texts if len(texts) > 1 else texts[0]
        body |= {} if s.logprobs is None else {"logprobs": s.logprobs}
        body |= {"echo": True} if s.echo else {}
    neutral = Sampling()
    same = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "n", "seed")
    for name in (*same, "repetition_penalty", "min_tokens", "ignore_eos"):
        if (value := getattr(s, name)) != getattr(neutral, name):
            body[name] = value
    body |= {"stop": list(s.stop)} if s.stop else {}
    body |= {"stop_token_ids": list(s.stop_token_ids)} if s.stop_token_ids else {}
    body |= {"logit_bias": {str(token): bias for token, bias in s.logit_bias}} if s.logit_bias else {}
    body |= {"structured_outputs": {"grammar": ebnf_grammar(s.grammar)}} if s.grammar else {}
    return path, body


def tool_fields(prompt: Prompt) -> dict[str, Any]:
    """Tools and reasoning, as OpenAI's request has them."""
    fields: dict[str, Any] = {"reasoning_effort": prompt.effort} if prompt.effort else {}
    if not prompt.tools:
        return fields
    names = prompt.callable or ()
    choice: Any = prompt.tool_choice
    if choice == "required" and len(names) == 1:
        choice = {"type": "function", "function": {"name": names[0]}}
    elif names:
        functions = [{"type": "function", "function": {"name": name}} for name in names]
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": choice, "tools": functions}}
    return fields | {"tools": list(prompt.tools), "tool_choice": choice, "parallel_tool_calls": prompt.parallel}


# ── what generates nothing: (path, body, reply → what engine.CALLS would have answered), by vLLM's routes and names ──

Asked = tuple[str, dict[str, Any], Callable[[Any], Any]]
OWN_V1 = ("/embeddings", "/rerank", "/score")  # vLLM has its other routes at the root


def ask_embed(prompts: Sequence[Prompt], prompt_name: None = None, limit: int | None = None) -> Asked:
    given = [prompt.text if prompt.text is not None else list(prompt.tokens or ()) for prompt in prompts]

    def read(reply: Any) -> dict[str, Any]:
        rows = sorted(reply["data"], key=lambda row: int(row["index"]))
        vectors = [read_vector(row["embedding"]) for row in rows]
        if len(vectors) != len(given):
            raise UpstreamFailed(f"it gave {len(vectors)} embeddings of {len(given)} inputs")
        return {"vectors": vectors, "tokens": used(reply)}

    return "/embeddings", {"input": given, "encoding_format": "base64", **cut(limit)}, read


def read_vector(said: Any) -> bytes:
    """float32, little-endian; as numbers where the upstream does not know base64."""
    if isinstance(said, list):
        return struct.pack(f"<{len(said)}f", *said)
    vector = base64.b64decode(said, validate=True)
    if not vector or len(vector) % 4:
        raise UpstreamFailed("its embedding is not a row of float32")
    return vector


def ask_score(queries: Sequence[str], documents: Sequence[str], limit: int | None = None, ranks: bool = False) -> Asked:
    member, value = ("results", "relevance_score") if ranks else ("data", "score")

    def read(reply: Any) -> dict[str, Any]:
        scores = {int(row["index"]): float(row[value]) for row in reply[member]}
        if sorted(scores) != list(range(len(documents))):
            raise UpstreamFailed(f"it scored {len(scores)} texts of {len(documents)}")
        return {"scores": [scores[i] for i in range(len(documents))], "tokens": used(reply)}

    if ranks:
        return "/rerank", {"query": queries[0], "documents": list(documents), **cut(limit)}, read
    first = queries[0] if len(queries) == 1 else list(queries)
    return "/score", {"text_1": first, "text_2": list(documents), **cut(limit)}, read


def ask_tokenize(prompt: Prompt, add_special: bool, pieces: bool) -> Asked:
    body: dict[str, Any] = {"add_special_tokens": add_special, "return_token_strs": pieces}
    if prompt.messages is None:
        body["prompt"] = prompt.text
    else:
        body |= {"messages": list(prompt.messages), "add_generation_prompt": prompt.generation_prompt}
        body |= {"tools": list(prompt.tools)} if prompt.tools else {}
        body |= {"continue_final_message": True} if prompt.continue_final else {}
        body |= {"chat_template_kwargs": prompt.template_kwargs} if prompt.template_kwargs else {}

    def read(reply: Any) -> dict[str, Any]:
        answer = {
            "tokens": [int(i) for i in reply["tokens"]],
            "count": int(reply["count"]),
            "max_model_len": reply.get("max_model_len"),
        }
        return answer | ({"pieces": [str(piece).encode() for piece in reply["token_strs"]]} if pieces else {})

    return "/tokenize", body, read


def ask_detokenize(tokens: Sequence[int]) -> Asked:
    return "/detokenize", {"tokens": list(tokens)}, lambda reply: str(reply["prompt"])


def cut(limit: int | None) -> dict[str, int]:
    return {} if limit is None else {"truncate_prompt_tokens": limit}


def used(reply: Any) -> int:
    usage = reply.get("usage") or {}
    return int(usage.get("prompt_tokens") or usage.get("total_tokens") or 0)


class Call(NamedTuple):
    ask: Callable[..., Asked]
    needs: str  # of FEATURES


CALLS = {
    "embed": Call(ask_embed, "embeddings"),
    "score": Call(ask_score, "rerank"),
    "tokenize": Call(ask_tokenize, "tokens"),
    "detokenize": Call(ask_detokenize, "tokens"),
}


def for_vllm(s: Sampling) -> dict[str, Any]:
    """What vLLM wants said in another way: it takes seed -1 for none (choice i has seed + i), and refuses n greedy choices."""
    fields: dict[str, Any] = {}
    if s.seed is not None and s.seed < 0 <= s.seed + s.n:
        fields["seed"] = s.seed + 2**62
    if s.temperature == 0 and s.n > 1:
        fields |= {"temperature": 1, "top_k": 1}
    return fields


class Chunked:
    """A chunked body (RFC 9112, section 7.1) as a push parser: bytes in as they come, the body's out. Trailers are read over."""

    def __init__(self) -> None:
        self.held = b""
        self.left = 0  # bytes of a chunk and its line end that are still to come
        self.last = self.ended = False  # the last chunk has begun; the body has ended

    def feed(self, data: bytes) -> bytes:
        """Raises ValueError."""
        self.held, out = self.held + data, b""
        while self.held and not self.ended:
            if self.left:
                piece, self.held = self.held[: self.left], self.held[self.left :]
                out += piece[: max(0, self.left - 2)]
                self.left -= len(piece)
                continue
            line, found, rest = self.held.partition(b"\r\n")
            if len(line) > 1024:
                raise ValueError("a line of its chunked body has no end")
            if not found:
                break
            self.held = rest
            if self.last:
                self.ended = not line
                continue
            digits = line.partition(b";")[0].strip()
            if not CHUNK_SIZE.fullmatch(digits):
                raise ValueError("its chunked body is malformed")
            size = int(digits, 16)
            self.last, self.left = size == 0, size + 2 if size else 0
        return out


class Whole:
    """A body of `length` bytes; None: up to the end of the connection."""

    def __init__(self, length: int | None):
        self.left = length

    @property
    def ended(self) -> bool:
        return self.left == 0

    def feed(self, data: bytes) -> bytes:
        if self.left is not None:
            data = data[: self.left]
            self.left -= len(data)
        return data


class Events:
    """Server-sent events as a push parser: bytes in as they come, their JSON out, up to [DONE]; `most` bytes, `longest` in a line."""

    def __init__(self, most: int = 1 << 62, longest: int = BASE_BYTES) -> None:
        self.rest, self.done = b"", False
        self.most, self.longest = most, longest

    def feed(self, data: bytes) -> list[Any]:
        """Raises UpstreamFailed, Refused, ValueError."""
        self.most -= len(data)
        *lines, self.rest = (self.rest + data).split(b"\n")
        if self.most < 0 or len(self.rest) > self.longest:
            raise too_much()
        out = []
        for line in lines:
            if not line.startswith(b"data:") or self.done:
                continue  # comments, empty lines, names of events
            text = line[5:].strip()
            if text == b"[DONE]":
                self.done = True
                continue
            event = json.loads(text)
            if "error" in event:
                error = event["error"] if isinstance(event["error"], dict) else {"message": event["error"]}
                if error.get("code") in REFUSALS:  # vLLM: HTTP 200, and then what would have been a 400
                    raise failure(error["code"], None, text)
                raise UpstreamFailed(str(error.get("message"))[:300])
            out.append(event)
        return out


class Reply:
    """A reply of 200 on its way in: bytes to events to deltas, as they come."""

    def __init__(
        self, connection: http.client.HTTPConnection, reply: Any, answer: Answer, end: Callable[..., None], events: Events
    ):
        self.connection, self.reply, self.answer = connection, reply, answer
        self.end = end  # called with the job, what went wrong, and the connection if it can be used again
        assert answer.job.socket
        self.socket = answer.job.socket  # http.client forgets it where the connection is to be closed
        self.body = Chunked() if reply.chunked else Whole(reply.length)
        self.events = events
        self.error: Exception | None = None

    def begin(self) -> bool:
        """Take what came with the head. False: there is no more to come."""
        self.socket.setblocking(False)
        return self.take(lambda: self.reply.fp.read1(1 << 16) or None) and (not self.pending() or self.receive())

    def receive(self) -> bool:
        """Take what has come. False: there is no more to come."""
        while self.take(lambda: self.socket.recv(1 << 16)):
            if not self.pending():
                return True
        return False

    def pending(self) -> bool:
        """Has TLS something left, of which a selector knows nothing?"""
        return isinstance(self.socket, ssl.SSLSocket) and self.socket.pending() > 0

    def take(self, read: Callable[[], bytes | None]) -> bool:
        """`read` returns None where nothing has come, and nothing at the end of the connection."""
        try:
            try:
                data = read()
            except (BlockingIOError, ssl.SSLWantReadError):
                data = None
            if data is None:
                return not self.body.ended
            for event in self.events.feed(self.body.feed(data)):
                self.answer.take(event)
            return bool(data) and not self.body.ended
        except Exception as error:
            self.error = error
            return False

    def finish(self) -> None:
        again = self.error is None and self.body.ended and not self.reply.will_close
        last: list[Event] = []
        try:
            if self.error is None:
                if not self.events.done:
                    raise UpstreamFailed("it ended without [DONE]")
                last = [*self.answer.end()]
        except Exception as error:
            self.error = error
        with contextlib.suppress(OSError):
            self.reply.close()
            if not again:
                self.connection.close()
        self.end(self.answer.job, self.error, self.connection if again else None, last)


class Reader:
    """Reads all replies of an upstream, in one thread while there are any: one for each would have to be woken for each token."""

    def __init__(self) -> None:
        self.lock, self.running = threading.Lock(), False
        self.new: deque[Reply] = deque()
        self.selector = selectors.DefaultSelector()
        self.bell, self.ringer = socket.socketpair()
        for sock in (self.bell, self.ringer):
            sock.setblocking(False)
        self.selector.register(self.bell, selectors.EVENT_READ)

    def add(self, reply: Reply) -> None:
        with self.lock:
            if not self.running:
                threading.Thread(target=self.run, name="upstream-reader", daemon=True).start()
                self.running = True
            self.new.append(reply)
        with contextlib.suppress(BlockingIOError):  # it rings already
            self.ringer.send(b"!")

    def run(self) -> None:
        while self.busy():
            for key, _ in self.selector.select():
                if key.data is None:
                    self.bell.recv(4096)
                elif not key.data.receive():
                    self.selector.unregister(key.fileobj)
                    key.data.finish()
            while self.new:
                self.begin(self.new.popleft())

    def begin(self, reply: Reply) -> None:
        try:
            if reply.begin():
                self.selector.register(reply.socket, selectors.EVENT_READ, reply)
                return
        except (OSError, ValueError) as error:  # no room for another
            reply.error = error
        reply.finish()

    def busy(self) -> bool:
        with self.lock:
            self.running = bool(self.new) or len(self.selector.get_map()) > 1
            return self.running


def too_much() -> UpstreamFailed:
    return UpstreamFailed("it sends more than it was asked for")


class Answer:
    """An upstream's chunks as this server's deltas. Finish reasons are held back until the usage is known."""

    def __init__(self, job: UpstreamJob, sampling: Sampling, tokens: int = TOKENS_MAX, asked: int = 0):
        """`tokens`: how many it may have in all; `asked`: bytes of the request, which may come back as an echo."""
        self.job, self.sampling = job, sampling
        self.finish: dict[int, str] = {}
        self.stops: dict[int, str] = {}  # by choice: the stop string that ended it, where the upstream tells
        self.usage: dict[str, Any] = {}
        self.pieces = self.text = 0  # that have come; characters
        self.most_pieces = BASE_PIECES + TOKEN_PIECES * tokens
        self.most_text = BASE_TEXT + TOKEN_TEXT * tokens + (asked * job.open if sampling.echo else 0)
        self.calls: dict[int, int] = {}  # by choice: the index of the call that began last

    def take(self, chunk: dict[str, Any]) -> None:
        for choice in chunk.get("choices") or ():
            self.choice(choice)
        self.usage = chunk.get("usage") or self.usage

    def end(self) -> Iterator[Event]:
        """What the job is told when all has come. Raises UpstreamFailed where that is not all."""
        if len(self.finish) < self.job.open:
            raise UpstreamFailed("it ended before the answer had")
        usage = self.usage
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        now = time.monotonic()
        yield Started(int(usage.get("prompt_tokens") or 0), cached, now)
        # Where the upstream counts nothing, a piece is a token, as near as it gets.
        tokens = int(usage.get("completion_tokens", self.pieces)) if self.sampling.max_tokens != 0 else 0  # vLLM counts one
        thought = int((usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0)
        if thought and self.finish:
            yield Delta(next(iter(self.finish)), "", min(thought, tokens), None, (), now, "reasoning")
            tokens -= min(thought, tokens)
        for index, finish in self.finish.items():
            yield Delta(index, "", tokens, finish, (), now, stop=self.stops.get(index, ""))
            tokens = 0

    def choice(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        index, text = int(choice["index"]), choice.get("text") or delta.get("content") or ""
        if not 0 <= index < self.job.open:
            raise UpstreamFailed(f"it answers with a choice {index} that nobody asked for")
        logprobs = tuple(named_logprobs(choice.get("logprobs") or {})) if self.sampling.logprobs is not None else ()
        if logprobs and choice.get("finish_reason") == "stop" and not isinstance(choice.get("stop_reason", ""), str):
            logprobs = (*logprobs[:-1], logprobs[-1]._replace(shown=False))  # vLLM: an EOS or a stop token
        now = time.monotonic()
        found = [Delta(index, kind=kind, id=id, text=said, tokens=0, at=now) for kind, said, id in self.special(index, delta)]
        if text or (logprobs and not found):
            found.append(Delta(index, text, 0, None, (), now))
        if found:
            self.pieces, self.text = self.pieces + 1, self.text + sum(len(one.text) for one in found)
            if self.pieces > self.most_pieces or self.text > self.most_text:
                raise too_much()
            found[-1] = found[-1]._replace(logprobs=logprobs)
        for one in found:
            self.job.put(one)
        finish = choice.get("finish_reason")
        if finish and finish not in ("stop", "length", "content_filter", "tool_calls"):
            raise UpstreamFailed(f"it ended a choice with {finish!r}")
        if finish:
            cut = finish == "stop" and (self.sampling.stop or self.sampling.stop_token_ids)
            called = finish == "stop" and index in self.calls  # OpenAI's word where a call was forced
            self.finish[index] = "tool_calls" if called else "cut" if cut else finish
            if cut and choice.get("stop_reason") in self.sampling.stop:  # vLLM's
                self.stops[index] = choice["stop_reason"]

    def special(self, index: int, delta: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
        """(kind, text, id) of reasoning and of calls. A call's own index only says where another one begins."""
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            yield "reasoning", reasoning, ""
        for call in delta.get("tool_calls") or ():
            function, number = call.get("function") or {}, int(call.get("index") or 0)
            last = self.calls.get(index, -1)
            if function.get("name") and number > last:
                self.calls[index] = number
                yield "call", function["name"], call.get("id") or f"call_{uuid.uuid4().hex[:24]}"
            elif number != last:
                raise UpstreamFailed("it goes on with a tool call that has not begun, or has ended")
            if function.get("arguments"):
                yield "arguments", function["arguments"], ""


def named_logprobs(given: dict[str, Any]) -> Iterator[TokenLogprob]:
    """Of the chat shape (`content`) or the legacy one (`tokens`, `token_logprobs`, `top_logprobs`)."""

    def data(entry: dict[str, Any]) -> bytes:
        return bytes(entry["bytes"]) if entry.get("bytes") is not None else entry["token"].encode()

    for entry in given.get("content") or ():
        top = tuple((data(other), float(other["logprob"])) for other in entry.get("top_logprobs") or ())
        yield TokenLogprob(data(entry), float(entry["logprob"]), top, True)
    tokens, tops = given.get("tokens") or (), given.get("top_logprobs") or itertools.repeat(None)
    for token, logprob, others in zip(tokens, given.get("token_logprobs") or (), tops, strict=False):
        top = tuple((unname(other), float(value)) for other, value in (others or {}).items())
        yield TokenLogprob(unname(token), logprob, top, True)


def unname(token: str) -> bytes:
    r"""The legacy shape writes half a character as bytes:\xe2\x98."""
    if re.fullmatch(r"bytes:(\\x[0-9a-f]{2})+", token):
        return bytes.fromhex(token[len("bytes:") :].replace("\\x", ""))
    return token.encode()


def failure(status: int, retry_after: str | None, body: bytes) -> Exception:
    """What an upstream's refusal is to our client: its own 400 and 429, a 503 while it is not ready; the rest is 502."""
    try:
        error = json.loads(body)["error"]
        error = error if isinstance(error, dict) else {"message": error}
        message, param, code = str(error["message"])[:1000], error.get("param"), error.get("code")
    except (ValueError, LookupError, TypeError, AttributeError):
        message, param, code = body[:300].decode("utf-8", "replace"), None, None
    message = message.rstrip(".")
    if status in REFUSALS:
        param = param.removeprefix("body.")[:200] if isinstance(param, str) else None  # vLLM's path into the body
        if param in ("input_tokens", "input_text"):  # vLLM's word for a prompt that does not fit
            param, code = "prompt", "context_length_exceeded"
        return Refused(f"{message}.", param, code if isinstance(code, str) else None)
    retry_after = retry_after if re.fullmatch("[0-9]{1,6}", retry_after or "") else None
    told = status if status in (429, 503) else 502
    return UpstreamFailed(message if told != 502 else f"it answered {status}: {message}", told, retry_after)
