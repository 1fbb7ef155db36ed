#!/usr/bin/env python3
"""What does an OpenAI-compatible server really do?  python examples/selftest.py http://localhost:8000

Asks any server and judges by the effect, not by the status: a field is `honoured` when the answer shows it, `refused` when a 4xx
says so, and `ignored` when it was accepted and changed nothing. Routes, schemas, the bytes of a stream, structured output, tools,
bad input and clients that hang up. It needs a model that answers; greedy answers must repeat. Standard library only.

    python examples/selftest.py URL                     one server: a Markdown table
    python examples/selftest.py --compare URL URL …     several, side by side
    python examples/selftest.py --json URL              for programs
    options: --key KEY, --model NAME, --only WORD (checks whose name has it)

Exit status 1 where something was ignored, or answered wrongly.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

STORY = "Write a long story about a lighthouse."
SHORT = 24  # tokens of an answer that is compared with another
PATIENCE_S = 180


# ───────────────────────────────────────────── asking ─────────────────────────────────────────────


class Wrong(Exception):
    """The server's answer breaks the API."""


class Unclear(Exception):
    """This model's answers do not show it."""


class Refusal(Exception):
    """A status of 400 or more."""

    def __init__(self, reply: Reply):
        super().__init__(str(reply.status))
        self.reply = reply


class Reply(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            raise Wrong("the body is not JSON") from None

    @property
    def error(self) -> dict[str, Any]:
        """The member `error` in OpenAI's form, or {}."""
        with contextlib.suppress(Wrong):
            told = self.json
            if isinstance(told, dict) and isinstance(told.get("error"), dict):
                return dict(told["error"])
        return {}


@dataclass
class Target:
    """A server that is asked."""

    url: str
    key: str = ""
    model: str = ""
    known: dict[str, str] = field(default_factory=dict)  # greedy answers, by request

    def connect(self) -> http.client.HTTPConnection:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.netloc, timeout=PATIENCE_S)

    def path(self, route: str) -> str:
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1") + route

    def headers(self) -> dict[str, str]:
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})

    def request(self, method: str, route: str, body: Any = None, **headers: str) -> Reply:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        with contextlib.closing(self.connect()) as conn:
            conn.request(method, self.path(route), data, self.headers() | {k.replace("_", "-"): v for k, v in headers.items()})
            reply = conn.getresponse()
            return Reply(reply.status, reply.headers, reply.read())

    def ask(self, route: str, body: dict[str, Any]) -> Any:
        """The JSON of a 200. Raises Refusal."""
        reply = self.request("POST", route, {"model": self.model} | body)
        if reply.status != 200:
            raise Refusal(reply)
        return reply.json

    def chat(self, content: Any = STORY, **fields: Any) -> Any:
        messages = fields.pop("messages", None) or [{"role": "user", "content": content}]
        return self.ask("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": SHORT} | fields)

    def text(self, content: Any = STORY, **fields: Any) -> str:
        return said(self.chat(content, **fields))

    def base(self, content: str = STORY, **fields: Any) -> str:
        """The greedy answer, asked for once."""
        name = json.dumps([content, fields])
        if name not in self.known:
            self.known[name] = self.text(content, **fields)
        return self.known[name]

    def stream(self, content: str = STORY, route: str = "/v1/chat/completions", **fields: Any) -> tuple[Reply, list[Any]]:
        """A whole stream and its parsed `data:` events, [DONE] left out. Raises Refusal."""
        body = {
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": SHORT,
            "stream": True,
        } | fields
        reply = self.request("POST", route, {"model": self.model} | body)
        if reply.status != 200:
            raise Refusal(reply)
        lines = [line[5:].strip() for line in reply.body.decode().splitlines() if line.startswith("data:")]
        return reply, [json.loads(line) for line in lines if line != "[DONE]"]

    def raw(self, data: bytes, until: bytes = b"", timeout: float = 20) -> bytes:
        """What a bare socket gets for these bytes: up to `until`, the end, or the timeout."""
        parts = urlsplit(self.url)
        got = b""
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=timeout) as sock:
            sock.sendall(data)
            with contextlib.suppress(OSError):
                while not (until and until in got) and (more := sock.recv(65536)):
                    got += more
        return got

    def head(self, route: str, length: int | None, method: str = "POST", more: str = "") -> bytes:
        key = f"Authorization: Bearer {self.key}\r\n" if self.key else ""
        size = "" if length is None else f"Content-Length: {length}\r\n"
        host = urlsplit(self.url).netloc
        return f"{method} {self.path(route)} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{key}{size}{more}\r\n".encode()


def said(reply: Any) -> str:
    try:
        return reply["choices"][0]["message"].get("content") or ""
    except (LookupError, TypeError, AttributeError):
        raise Wrong("there is no choices[0].message") from None


def expect(condition: Any, why: str) -> None:
    if not condition:
        raise Wrong(why)


# ───────────────────────────────────────────── checks ─────────────────────────────────────────────

Outcome = bool | str | None  # of a check: True honoured, False ignored; of others: a note, or nothing


class Check(NamedTuple):
    group: str
    name: str
    run: Callable[[Target], Outcome]


CHECKS: list[Check] = []
GOOD, NEUTRAL = {"ok", "honoured"}, {"refused", "missing", "unclear"}


def check(group: str, name: str) -> Callable[[Callable[[Target], Outcome]], Callable[[Target], Outcome]]:
    def add(run: Callable[[Target], Outcome]) -> Callable[[Target], Outcome]:
        CHECKS.append(Check(group, name, run))
        return run

    return add


def judge(one: Check, target: Target) -> tuple[str, str]:
    """(verdict, note)"""
    fields = one.group in ("fields", "constraints", "tools")
    try:
        outcome = one.run(target)
    except Refusal as refusal:
        return judge_refusal(refusal.reply, one, fields)
    except Wrong as wrong:
        return "wrong", str(wrong)
    except Unclear as unclear:
        return "unclear", str(unclear)
    except TimeoutError:
        return "wrong", f"no answer in {PATIENCE_S} s"
    except (OSError, http.client.HTTPException) as error:
        return "wrong", f"no answer: {type(error).__name__}"
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return "wrong", f"a reply of another shape ({type(error).__name__}: {str(error)[:60]})"
    if fields:
        return (
            ("honoured", "") if outcome is True else ("ignored", "") if outcome is False else ("honoured", str(outcome or ""))
        )
    return "ok", outcome if isinstance(outcome, str) else ""


def judge_refusal(reply: Reply, one: Check, fields: bool) -> tuple[str, str]:
    error = reply.error
    if reply.status >= 500 and reply.status != 501:
        return "wrong", f"{reply.status} {error.get('message', '')}"[:90]
    if reply.status in (404, 405, 501) and not fields:
        return "missing", ""
    if not fields:
        return "wrong", f"{reply.status} {error.get('message', '')}"[:90]
    name = one.name.split()[0]
    named = bool(error.get("param")) or name in str(error.get("message"))
    return "refused", "" if named else f"{reply.status}, not by name"


# ── routes ──


@check("routes", "GET /v1/models")
def models(t: Target) -> Outcome:
    reply = t.request("GET", "/v1/models")
    if reply.status != 200:
        raise Refusal(reply)
    listed = reply.json
    expect(listed.get("object") == "list" and isinstance(listed.get("data"), list), "not {object: list, data: […]}")
    for model in listed["data"]:
        lacking = [name for name in ("id", "object", "created", "owned_by") if name not in model]
        expect(not lacking, f"a model without {', '.join(lacking)}")
    return None


@check("routes", "GET /v1/models/{id}")
def one_model(t: Target) -> Outcome:
    reply = t.request("GET", f"/v1/models/{quote(t.model)}")
    if reply.status != 200:
        raise Refusal(reply)
    expect(reply.json.get("id") == t.model and reply.json.get("object") == "model", "another object")
    return None


@check("routes", "POST /v1/chat/completions")
def chat_route(t: Target) -> Outcome:
    reply = t.chat()
    lacking = [name for name in ("id", "object", "created", "model", "choices", "usage") if name not in reply]
    expect(not lacking, f"without {', '.join(lacking)}")
    expect(reply["object"] == "chat.completion", f"object is {reply['object']!r}")
    choice = reply["choices"][0]
    expect(choice["message"]["role"] == "assistant" and choice["finish_reason"] in ("stop", "length"), "role or finish_reason")
    usage = reply["usage"]
    expect(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], "the usage does not add up")
    lacking = [name for name in ("refusal",) if name not in choice["message"]] + (
        ["logprobs"] if "logprobs" not in choice else []
    )
    expect(not lacking, f"required by OpenAI's specification and not there: {', '.join(lacking)}")
    return None


@check("routes", "POST /v1/completions")
def text_route(t: Target) -> Outcome:
    reply = t.ask("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 8, "temperature": 0})
    expect(reply["object"] == "text_completion" and isinstance(reply["choices"][0]["text"], str), "another shape")
    expect(reply["usage"]["completion_tokens"] <= 8, "more tokens than max_tokens")
    return None


@check("routes", "POST /v1/completions, four kinds of prompt")
def prompts(t: Target) -> Outcome:
    for prompt, count in (("a", 1), (["a", "b"], 2), ([72, 73, 74], 1), ([[72, 73], [74]], 2)):
        try:
            reply = t.ask("/v1/completions", {"prompt": prompt, "max_tokens": 4})
        except Refusal as refusal:
            raise Wrong(f"{prompt!r} is refused ({refusal.reply.status})") from None
        expect(len(reply["choices"]) == count, f"{prompt!r} gives {len(reply['choices'])} choices")
    return None


@check("routes", "POST /v1/embeddings")
def embeddings(t: Target) -> Outcome:
    reply = t.request("POST", "/v1/embeddings", {"model": t.model, "input": ["a", "b"]})
    if reply.status != 200:
        return "refused for this model" if reply.status == 400 and reply.error else missing(reply)
    data = reply.json["data"]
    expect([row["index"] for row in data] == [0, 1] and len(data[0]["embedding"]) > 1, "not two vectors")
    return None


def missing(reply: Reply) -> Outcome:
    raise Refusal(reply)


@check("routes", "POST /v1/responses")
def responses(t: Target) -> Outcome:
    reply = t.ask("/v1/responses", {"input": "Say hello.", "max_output_tokens": 16})
    expect(reply["object"] == "response" and any(item["type"] == "message" for item in reply["output"]), "another shape")
    return None


@check("routes", "POST /v1/responses, streamed")
def responses_stream(t: Target) -> Outcome:
    _, events = t.stream(route="/v1/responses", input="Say hello.", max_output_tokens=16, messages=None, max_tokens=None)
    kinds = [event["type"] for event in events]
    expect(
        kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"),
        f"{kinds[0]} … {kinds[-1]}",
    )
    expect("response.output_text.delta" in kinds, "no response.output_text.delta")
    return None


@check("routes", "POST /v1/messages")
def messages(t: Target) -> Outcome:
    reply = t.ask("/v1/messages", {"max_tokens": 16, "messages": [{"role": "user", "content": "Say hello."}]})
    expect(
        reply["type"] == "message" and reply["content"][0]["type"] == "text" and reply["usage"]["output_tokens"] > 0,
        "another shape",
    )
    return None


@check("routes", "POST /v1/messages, streamed")
def messages_stream(t: Target) -> Outcome:
    _, events = t.stream("Say hello.", route="/v1/messages")
    kinds = [event["type"] for event in events]
    expect(kinds[0] == "message_start" and kinds[-1] == "message_stop", f"{kinds[0]} … {kinds[-1]}")
    return None


@check("routes", "POST /tokenize")
def tokenize(t: Target) -> Outcome:
    for route in ("/tokenize", "/extras/tokenize"):
        reply = t.request("POST", route, {"model": t.model, "content": "hello", "prompt": "hello", "input": "hello"})
        if reply.status == 200:
            expect(reply.json["tokens"], "no tokens")
            return route if route != "/tokenize" else None
        if reply.status == 400:
            reply = t.request("POST", route, {"model": t.model, "prompt": "hello"})
            if reply.status == 200:
                return None
    return missing(reply)


@check("routes", "GET /health")
def health(t: Target) -> Outcome:
    reply = t.request("GET", "/health")
    return None if reply.status == 200 else missing(reply)


# ── fields ──


def field_check(name: str) -> Callable[[Callable[[Target], Outcome]], Callable[[Target], Outcome]]:
    return check("fields", name)


@field_check("temperature")
def temperature(t: Target) -> Outcome:
    expect(t.text() == t.base(), "two greedy answers differ")
    return any(t.text(temperature=1.8) != t.base() for _ in range(4))


@field_check("top_p")
def top_p(t: Target) -> Outcome:
    return narrows(t, top_p=0.000001)


@field_check("top_k")
def top_k(t: Target) -> Outcome:
    return narrows(t, top_k=1)


@field_check("min_p")
def min_p(t: Target) -> Outcome:
    return narrows(t, min_p=1)


def narrows(t: Target, **fields: Any) -> bool:
    """Does it leave a hot answer only the likeliest tokens? Then answers repeat, but for tokens that are equally likely."""
    if len({t.text(temperature=1.9) for _ in range(3)}) == 1:
        raise Unclear("a temperature changes nothing")
    return len({t.text(temperature=1.9, **fields) for _ in range(4)}) < 4


@field_check("seed")
def seed(t: Target) -> Outcome:
    answers = [t.text(temperature=1.5, seed=number) for number in (1, 1, 2, 3)]
    return answers[0] == answers[1] and len(set(answers)) > 1


@field_check("max_tokens")
def max_tokens(t: Target) -> Outcome:
    reply = t.chat(max_tokens=5)
    return bool(reply["usage"]["completion_tokens"] == 5 and reply["choices"][0]["finish_reason"] == "length")


@field_check("max_completion_tokens")
def max_completion_tokens(t: Target) -> Outcome:
    reply = t.chat(max_completion_tokens=5, max_tokens=None)
    return bool(reply["usage"]["completion_tokens"] == 5 and reply["choices"][0]["finish_reason"] == "length")


@field_check("stop")
def stop(t: Target) -> Outcome:
    base = t.base()
    word = base.split()[len(base.split()) // 2]
    text = t.text(stop=[word])
    if text == base:
        return False
    expect(text == base.partition(word)[0], "the text is not cut before the stop string")
    expect(t.text(stop=word) == text, "a string and an array of it differ")
    return True


@field_check("n")
def n(t: Target) -> Outcome:
    choices = t.chat(n=3, temperature=1.5)["choices"]
    return len(choices) == 3 and len({choice["message"]["content"] for choice in choices}) > 1


@field_check("presence_penalty")
def presence_penalty(t: Target) -> Outcome:
    return changes(t, presence_penalty=2)


@field_check("frequency_penalty")
def frequency_penalty(t: Target) -> Outcome:
    return changes(t, frequency_penalty=2)


@field_check("repetition_penalty")
def repetition_penalty(t: Target) -> Outcome:
    return changes(t, repetition_penalty=2)


def changes(t: Target, **fields: Any) -> bool:
    """Does it change a greedy answer that repeats itself?"""
    again = "Repeat the word yes: yes yes yes yes yes yes yes yes yes yes"
    return t.text(again, max_tokens=60, **fields) != t.base(again, max_tokens=60)


@field_check("logit_bias")
def logit_bias(t: Target) -> Outcome:
    return t.text(logit_bias={"1000": 100}) != t.base()


@field_check("logprobs")
def logprobs(t: Target) -> Outcome:
    choice = t.chat(logprobs=True)["choices"][0]
    if not choice.get("logprobs"):
        return False
    entries = choice["logprobs"]["content"]
    expect(all(entry["logprob"] <= 0 for entry in entries), "a probability above 1")
    heard = b"".join(bytes(entry["bytes"]) if entry.get("bytes") else entry["token"].encode() for entry in entries)
    expect(heard.decode("utf-8", "replace").strip() == choice["message"]["content"].strip(), "the tokens are not the text")
    return True


@field_check("top_logprobs")
def top_logprobs(t: Target) -> Outcome:
    choice = t.chat(logprobs=True, top_logprobs=3)["choices"][0]
    entries = (choice.get("logprobs") or {}).get("content") or []
    if not entries or not entries[0].get("top_logprobs"):
        return False
    expect(all(len(entry["top_logprobs"]) == 3 for entry in entries), "not three alternatives")
    expect(
        all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in entries),
        "a greedy token that is not the likeliest",
    )
    return True


@field_check("min_tokens")
def min_tokens(t: Target) -> Outcome:
    return goes_on(t, min_tokens=40)


@field_check("ignore_eos")
def ignore_eos(t: Target) -> Outcome:
    return goes_on(t, ignore_eos=True)


def goes_on(t: Target, **fields: Any) -> bool:
    """Does an answer that would end at once go on?"""
    for question in ("Say only: yes", "What is the capital of France? One word.", "2+2=? Only the number."):
        if t.chat(question, max_tokens=40)["usage"]["completion_tokens"] < 30:
            return bool(t.chat(question, max_tokens=40, **fields)["usage"]["completion_tokens"] == 40)
    raise Unclear("no short answer to go on from")


@field_check("stream_options")
def stream_options(t: Target) -> Outcome:
    _, events = t.stream(stream_options={"include_usage": True})
    with_usage = [event for event in events if event.get("usage")]
    if not with_usage:
        return False
    expect(
        len(with_usage) == 1 and with_usage[0] is events[-1] and events[-1]["choices"] == [],
        "not one last event without choices",
    )
    expect(all("usage" in event for event in events), "no `usage: null` in the others")
    return True


@field_check("continue_final_message")
def continue_final_message(t: Target) -> Outcome:
    talk = [{"role": "user", "content": "Count to twenty."}, {"role": "assistant", "content": "1 2 3 4 5 6 7"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    return t.text(messages=talk, **fields) != t.text(messages=talk)


@field_check("reasoning_effort")
def reasoning_effort(t: Target) -> Outcome:
    reply = t.chat(reasoning_effort="low")
    return bool(reply["choices"][0]["message"].get("reasoning_content")) or said(reply) != t.base()


@field_check("echo (completions)")
def echo(t: Target) -> Outcome:
    body = {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "echo": True}
    return str(t.ask("/v1/completions", body)["choices"][0]["text"]).startswith("Once upon a time")


@field_check("logprobs (completions)")
def text_logprobs(t: Target) -> Outcome:
    told = t.ask("/v1/completions", {"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "logprobs": 2})
    shape = told["choices"][0].get("logprobs")
    if not shape:
        return False
    expect(
        len(shape["tokens"]) == len(shape["token_logprobs"]) == len(shape["text_offset"]) > 0,
        "not the lists of the legacy form",
    )
    return True


@field_check("suffix (completions)")
def suffix(t: Target) -> Outcome:
    body = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    plain, filled = (
        t.ask("/v1/completions", body | more)["choices"][0]["text"] for more in ({}, {"suffix": " and they died."})
    )
    return bool(plain != filled)


@field_check("user, metadata, store: null and harmless values")
def harmless(t: Target) -> Outcome:
    fields = {
        "user": "me",
        "store": False,
        "service_tier": "auto",
        "seed": None,
        "tools": None,
        "stop": None,
        "n": 1,
        "top_p": 1,
    }
    expect(t.text(**fields) == t.base(), "they change the answer")
    return True


# ── structured output ──

CONSTRAINED = 120  # tokens: enough for each of the schemas


def constrained(t: Target, schema: Any, good: Callable[[Any], bool]) -> Outcome:
    wrapped = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    reply = t.chat(max_tokens=CONSTRAINED, response_format=wrapped)
    return holds(reply, good)


def holds(reply: Any, good: Callable[[Any], bool]) -> Outcome:
    """JSON that is as asked; text that was cut before its end is no proof, but must not be called finished."""
    try:
        value = json.loads(said(reply))
    except ValueError:
        return "cut" if reply["choices"][0]["finish_reason"] == "length" and said(reply).lstrip()[:1] in '{["' else False
    return good(value)


@check("constraints", "response_format json_object")
def json_object(t: Target) -> Outcome:
    reply = t.chat(
        "Describe the sea as a JSON object with one short member.",
        max_tokens=CONSTRAINED,
        response_format={"type": "json_object"},
    )
    return holds(reply, lambda value: isinstance(value, dict))


@check("constraints", "response_format json_schema")
def json_schema(t: Target) -> Outcome:
    schema = {"type": "object", "properties": {"ray": {"enum": ["ultraviolet", "infrared"]}, "n": {"type": "integer", "minimum": 4711, "maximum": 4712}},
              "required": ["ray", "n"], "additionalProperties": False}  # fmt: skip
    return constrained(
        t, schema, lambda v: v.get("ray") in ("ultraviolet", "infrared") and v.get("n") in (4711, 4712) and len(v) == 2
    )


@check("constraints", "response_format with pattern, minItems, $ref, anyOf")
def rich_schema(t: Target) -> Outcome:
    code = {"type": "string", "pattern": "^[A-F]{3}-[0-9]{2}$"}
    schema = {
        "type": "array",
        "minItems": 2,
        "maxItems": 2,
        "items": {"anyOf": [{"$ref": "#/$defs/code"}, {"const": None}]},
        "$defs": {"code": code},
    }
    fits = lambda item: item is None or bool(re.fullmatch("[A-F]{3}-[0-9]{2}", str(item)))  # noqa: E731
    return constrained(t, schema, lambda value: isinstance(value, list) and len(value) == 2 and all(map(fits, value)))


@check("constraints", "response_format that is no schema: refused?")
def no_schema(t: Target) -> Outcome:
    constrained(t, {"type": "nonsense"}, lambda value: False)
    return False


@check("constraints", "structured_outputs regex")
def regex(t: Target) -> Outcome:
    return bool(re.fullmatch("[0-9]{3}-[xyz]{4}", t.text(structured_outputs={"regex": "[0-9]{3}-[xyz]{4}"}, max_tokens=40)))


@check("constraints", "structured_outputs choice")
def choice(t: Target) -> Outcome:
    return t.text(structured_outputs={"choice": ["ultraviolet", "infrared"]}) in ("ultraviolet", "infrared")


@check("constraints", "grammar (GBNF)")
def grammar(t: Target) -> Outcome:
    rules = 'root ::= "ultra" ("violet" | "sound")'
    try:
        text = t.text(structured_outputs={"grammar": rules})
        if text in ("ultraviolet", "ultrasound"):
            return True
    except Refusal:
        pass
    return t.text(grammar=rules) in ("ultraviolet", "ultrasound")


# ── tools ──

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "get_time", "description": "The time", "parameters": {"type": "object", "properties": {}}},
}
QUESTION = "What is the weather in Rome?"


def called(t: Target, choice: Any, **fields: Any) -> tuple[Any, list[Any]]:
    reply = t.chat(QUESTION, tools=[WEATHER, CLOCK], tool_choice=choice, max_tokens=CONSTRAINED, **fields)
    return reply, reply["choices"][0]["message"].get("tool_calls") or []


def check_call(call: Any) -> None:
    expect(call["type"] == "function" and call["id"], "a call without type or id")
    given = json.loads(call["function"]["arguments"])
    expect(isinstance(given, dict), "arguments that are no object")
    if call["function"]["name"] == "get_weather":
        expect(isinstance(given.get("city"), str) and len(given) == 1, "arguments that break the schema")


@check("tools", "tools with tool_choice auto")
def tools_auto(t: Target) -> Outcome:
    asked, _ = called(t, "auto")
    return bool(asked["usage"]["prompt_tokens"] > t.chat(QUESTION)["usage"]["prompt_tokens"])  # the model at least sees them


@check("tools", "tool_choice required")
def tools_required(t: Target) -> Outcome:
    reply, calls = called(t, "required")
    if not calls:
        return False
    for call in calls:
        check_call(call)
    expect(reply["choices"][0]["finish_reason"] == "tool_calls", "finish_reason is not tool_calls")
    return True


@check("tools", "tool_choice of a named tool")
def tools_named(t: Target) -> Outcome:
    _, calls = called(t, {"type": "function", "function": {"name": "get_time"}})
    return bool(calls) and all(call["function"]["name"] == "get_time" for call in calls)


@check("tools", "tool_choice none")
def tools_none(t: Target) -> Outcome:
    return bool(called(t, "required")[1]) and not called(t, "none")[1]  # where nothing is ever called, none says nothing


@check("tools", "tools, streamed")
def tools_streamed(t: Target) -> Outcome:
    _, events = t.stream(QUESTION, tools=[WEATHER, CLOCK], tool_choice="required", max_tokens=CONSTRAINED)
    parts = [call for event in events for choice in event["choices"] for call in choice["delta"].get("tool_calls") or []]
    if not parts:
        return False
    whole = "".join(part["function"].get("arguments") or "" for part in parts if part["index"] == 0)
    check_call(
        {"type": "function", "id": parts[0].get("id"), "function": {"name": parts[0]["function"]["name"], "arguments": whole}}
    )
    return True


@check("tools", "tools: a tool's result goes back")
def tools_result(t: Target) -> Outcome:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"Rome"}'}}
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    with_result = [*talk, {"role": "tool", "tool_call_id": "call_1", "content": "It rains frogs."}]
    replies = [t.chat(messages=each, tools=[WEATHER]) for each in (with_result, talk)]
    return bool(replies[0]["usage"]["prompt_tokens"] > replies[1]["usage"]["prompt_tokens"])


# ── the bytes of a stream ──


@check("stream", "the text is that of the whole answer")
def same_text(t: Target) -> Outcome:
    _, events = t.stream()
    pieces = [choice["delta"].get("content") or "" for event in events for choice in event["choices"]]
    expect("".join(pieces) == t.base(), "another text")
    expect(len([piece for piece in pieces if piece]) > 1, "all at once")
    return None


@check("stream", "content type, framing, [DONE]")
def framing(t: Target) -> Outcome:
    reply, _ = t.stream()
    expect(reply.headers.get_content_type() == "text/event-stream", f"Content-Type {reply.headers.get_content_type()}")
    blocks = reply.body.replace(b"\r\n", b"\n").split(b"\n\n")
    expect(blocks[-1] == b"" and blocks[-2] == b"data: [DONE]", "it does not end with `data: [DONE]`")
    expect(all(block.startswith((b"data: ", b":")) for block in blocks[:-1]), "a block that is neither data nor a comment")
    return None


@check("stream", "one id, created, model; role first; one finish_reason, last")
def chunks(t: Target) -> Outcome:
    _, events = t.stream()
    for name in ("id", "created", "model"):
        expect(len({event[name] for event in events}) == 1, f"several values of {name}")
    expect(all(event["object"] == "chat.completion.chunk" for event in events), "object is not chat.completion.chunk")
    expect(events[0]["choices"][0]["delta"].get("role") == "assistant", "no role in the first delta")
    ends = [choice["finish_reason"] for event in events for choice in event["choices"]]
    expect(ends[-1] == "length" and not any(ends[:-1]), f"finish reasons {[end for end in ends if end]}")
    return None


@check("stream", "an error before the first token has its status")
def early_error(t: Target) -> Outcome:
    reply = t.request("POST", "/v1/chat/completions", {"model": t.model, "messages": "no", "stream": True})
    expect(400 <= reply.status < 500, f"status {reply.status}")
    return None


@check("stream", "n choices, each with its index")
def stream_n(t: Target) -> Outcome:
    try:
        _, events = t.stream(n=2)
    except Refusal:
        return "n is refused"
    found = {choice["index"] for event in events for choice in event["choices"]}
    expect(found == {0, 1}, f"indices {sorted(found)}")
    return None


@check("stream", "two streams run at once")
def at_once(t: Target) -> Outcome:
    """The second one's first event comes before the first one's last."""
    ends: dict[str, float] = {}
    body = {
        "messages": [{"role": "user", "content": STORY}],
        "temperature": 0,
        "max_tokens": 150,
        "stream": True,
        "model": t.model,
    }

    def run(name: str) -> None:
        with contextlib.closing(t.connect()) as conn:
            conn.request("POST", t.path("/v1/chat/completions"), json.dumps(body), t.headers())
            reply = conn.getresponse()
            while (line := reply.readline()) and b"content" not in line:
                pass
            if not line:
                return
            ends[f"{name} begins"] = time.monotonic()
            reply.read()
            ends[f"{name} ends"] = time.monotonic()

    threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expect(len(ends) == 4, "one of them failed")
    expect(max(ends["a begins"], ends["b begins"]) < min(ends["a ends"], ends["b ends"]), "one after the other")
    return None


# ── bad input ──


def bad(name: str, expected: str | None, body: Any, route: str = "/v1/chat/completions") -> None:
    """A body that must get a 4xx whose error names `expected`."""

    def run(t: Target) -> Outcome:
        data = body if isinstance(body, bytes) else {"model": t.model} | body if isinstance(body, dict) else body
        reply = t.request("POST", route, data)
        expect(reply.status != 200, "accepted")
        expect(400 <= reply.status < 500, f"status {reply.status}")
        expect(reply.error.get("message"), "no error.message in OpenAI's form")
        if expected and str(reply.error.get("param")).split("[")[0].split(".")[0] != expected:
            return f"param is {reply.error.get('param')!r}"
        return None

    CHECKS.append(Check("bad input", name, run))


HELLO = [{"role": "user", "content": "hello"}]
bad("no JSON", None, b"{no json")
bad("an array for a body", None, [1])
bad("no messages", "messages", {})
bad("empty messages", "messages", {"messages": []})
bad("an unknown role", "messages", {"messages": [{"role": "wizard", "content": "hello"}]})
bad("content that is a number", "messages", {"messages": [{"role": "user", "content": 5}]})
bad("temperature as a word", "temperature", {"messages": HELLO, "temperature": "hot"})
bad("temperature true", "temperature", {"messages": HELLO, "temperature": True})
bad("temperature 99", "temperature", {"messages": HELLO, "temperature": 99})
bad("temperature NaN", None, b'{"messages":[{"role":"user","content":"hello"}],"temperature":NaN}')
bad("max_tokens -5", "max_tokens", {"messages": HELLO, "max_tokens": -5})
bad("n 0", "n", {"messages": HELLO, "n": 0})
bad("stop that is a number with a point", "stop", {"messages": HELLO, "stop": 1.5})
bad("top_logprobs without logprobs", "top_logprobs", {"messages": HELLO, "top_logprobs": 3, "max_tokens": 1})
bad(
    "stream_options without stream",
    "stream_options",
    {"messages": HELLO, "stream_options": {"include_usage": True}, "max_tokens": 1},
)
bad("JSON nested 100,000 deep", None, b"[" * 100_000)


@check("bad input", "a prompt longer than the context")
def too_long(t: Target) -> Outcome:
    reply = t.request(
        "POST",
        "/v1/chat/completions",
        {"model": t.model, "messages": [{"role": "user", "content": "long " * 300_000}], "max_tokens": 1},
    )
    expect(400 <= reply.status < 500, f"status {reply.status}")
    expect(reply.error, "no error in OpenAI's form")
    return None if reply.error.get("code") == "context_length_exceeded" else f"code is {reply.error.get('code')!r}"


@check("bad input", "an unknown field is told or refused")
def unknown_field(t: Target) -> Outcome:
    reply = t.request("POST", "/v1/chat/completions", {"model": t.model, "messages": HELLO, "max_tokens": 1, "frobnicate": 1})
    told = any("frobnicate" in value for value in reply.headers.values())
    expect(told or reply.status == 400, "accepted without a word")
    return "told in a header" if told else "refused"


@check("bad input", "an unknown path is a 404 in JSON")
def unknown_path(t: Target) -> Outcome:
    reply = t.request("GET", "/v1/frobnicate")
    expect(reply.status == 404 and reply.error.get("message"), f"{reply.status}, {'another' if reply.body else 'no'} body")
    return None


@check("bad input", "a wrong method is a 405 with Allow")
def wrong_method(t: Target) -> Outcome:
    reply = t.request("GET", "/v1/chat/completions")
    expect(
        reply.status == 405 and "POST" in reply.headers.get("Allow", ""), f"{reply.status}, Allow: {reply.headers.get('Allow')}"
    )
    return None


# ── HTTP ──


@check("http", "keep-alive, also after an error")
def keep_alive(t: Target) -> Outcome:
    with contextlib.closing(t.connect()) as conn:
        for body in (b"{no json", b'{"messages": []}', b"{no json"):
            conn.request("POST", t.path("/v1/chat/completions"), body, t.headers())
            reply = conn.getresponse()
            reply.read()
            expect(not reply.will_close, "it closes the connection")
    return None


@check("http", "pipelined requests get their replies in order")
def pipelined(t: Target) -> Outcome:
    one = t.head("/v1/models", None, "GET")
    got = t.raw(one + t.head("/v1/frobnicate", None, "GET", "Connection: close\r\n"))
    expect(re.findall(rb"HTTP/1.1 (\d+)", got) == [b"200", b"404"], "not two replies")
    return None


@check("http", "a chunked request body")
def chunked(t: Target) -> Outcome:
    data = json.dumps({"model": t.model, "messages": HELLO, "max_tokens": 1}).encode()
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:7], data[7:])) + b"0\r\n\r\n"
    got = t.raw(
        t.head("/v1/chat/completions", None, more="Transfer-Encoding: chunked\r\nConnection: close\r\n") + body, timeout=60
    )
    expect(got.startswith(b"HTTP/1.1 200"), got[:20].decode("latin-1") or "no answer")
    return None


@check("http", "Content-Length with Transfer-Encoding is refused")
def smuggled(t: Target) -> Outcome:
    got = t.raw(t.head("/v1/chat/completions", 5, more="Transfer-Encoding: chunked\r\n") + b"0\r\n\r\n", b"\r\n", 5)
    expect(got.startswith(b"HTTP/1.1 400"), got[:20].decode("latin-1") or "no answer")
    return None


@check("http", "OPTIONS for a page of another origin")
def preflight(t: Target) -> Outcome:
    reply = t.request("OPTIONS", "/v1/chat/completions", Origin="http://localhost:3000", Access_Control_Request_Method="POST")
    expect(reply.status in (200, 204), f"status {reply.status}")
    return reply.headers.get("Access-Control-Allow-Origin") or "no header that allows it"


# ── clients that leave ──


def seconds(t: Target) -> float:
    began = time.monotonic()
    t.text(max_tokens=2)
    return time.monotonic() - began


@contextlib.contextmanager
def long_answers(t: Target, count: int, stream: bool) -> Iterator[list[socket.socket]]:
    """Sockets on which long answers have begun, or shall have after a second."""
    body = {
        "model": t.model,
        "messages": [{"role": "user", "content": STORY}],
        "max_tokens": 1500,
        "temperature": 1.2,
        "stream": stream,
    }
    data = json.dumps(body).encode()
    parts = urlsplit(t.url)
    socks = [socket.create_connection((parts.hostname or "", parts.port or 80), timeout=20) for _ in range(count)]
    for sock in socks:
        sock.sendall(t.head("/v1/chat/completions", len(data)) + data)
    time.sleep(1)
    try:
        yield socks
    finally:
        for sock in socks:
            sock.close()


def frees(t: Target, stream: bool) -> Outcome:
    """How long a short answer takes after long ones were left, beside how long it takes while they run."""
    alone = min(seconds(t) for _ in range(3))
    with long_answers(t, 4, stream):
        pass
    time.sleep(0.5)
    after = min(seconds(t) for _ in range(2))
    expect(
        after < max(4 * alone, alone + 1), f"a short answer takes {after:.1f} s, {alone:.1f} s before: it goes on for nobody"
    )
    return f"{after:.2f} s after, {alone:.2f} s before"


@check("leaving", "a stream that is left is ended")
def left_stream(t: Target) -> Outcome:
    return frees(t, True)


@check("leaving", "an answer without stream that is left is ended")
def left_whole(t: Target) -> Outcome:
    return frees(t, False)


# ───────────────────────────────────────────── telling ────────────────────────────────────────────


def run(target: Target, only: str) -> dict[str, tuple[str, str]]:
    found = {}
    for one in CHECKS:
        if only in f"{one.group} {one.name}":
            found[f"{one.group}: {one.name}"] = judge(one, target)
            if sys.stderr.isatty():
                print(f"\r\033[K{one.group}: {one.name}"[:80], end="", file=sys.stderr, flush=True)
    print(end="\r\033[K" if sys.stderr.isatty() else "", file=sys.stderr)
    return found


def table(results: dict[str, dict[str, tuple[str, str]]]) -> str:
    """Markdown; as wide as it must be."""
    targets = list(results)
    rows = [["check", *targets], ["---"] * (1 + len(targets))]
    group = ""
    for name in results[targets[0]]:
        kind, _, what = name.partition(": ")
        if kind != group:
            rows.append([f"**{kind}**", *[""] * len(targets)])
            group = kind
        cells = [(verdict, " ".join(note.split())) for verdict, note in (results[target][name] for target in targets)]
        rows.append([what, *((f"{verdict}: {note}" if note else verdict).replace("|", "\\|") for verdict, note in cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(1 + len(targets))]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width, "-" if cell == "---" else " ") for cell, width in zip(row, widths, strict=True))
        + " |"
        for row in rows
    )


def totals(found: dict[str, tuple[str, str]]) -> str:
    counts = {
        verdict: sum(told == verdict for told, _ in found.values())
        for verdict in ("ok", "honoured", "refused", "missing", "unclear", "ignored", "wrong")
    }
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)


def named(target: Target) -> Target:
    """The model to ask for: the first that is listed."""
    if not target.model:
        listed = target.request("GET", "/v1/models")
        if listed.status != 200 or not listed.json.get("data"):
            raise SystemExit(f"{target.url}: GET /v1/models names no model ({listed.status}); give --model")
        target.model = listed.json["data"][0]["id"]
    return target


def main() -> int:
    parser = argparse.ArgumentParser(description="What does an OpenAI-compatible server really do?")
    parser.add_argument("urls", nargs="+", metavar="URL")
    parser.add_argument("--compare", action="store_true", help="several servers, side by side")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--key", default="", help="API key")
    parser.add_argument("--model", default="", help="default: the first of GET /v1/models")
    parser.add_argument("--only", default="", metavar="WORD", help="checks whose group or name has it")
    args = parser.parse_args()
    if len(args.urls) > 1 and not args.compare:
        parser.error("several URLs go with --compare")
    try:
        results = {url: run(named(Target(url, args.key, args.model)), args.only) for url in args.urls}
    except OSError as error:
        raise SystemExit(f"no answer: {error}") from None
    if args.json:
        told = {
            url: {name: {"verdict": verdict, "note": note} for name, (verdict, note) in found.items()}
            for url, found in results.items()
        }
        print(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        print(table(results))
        for url, found in results.items():
            print(f"\n{url}: {totals(found)}")
    good = GOOD | NEUTRAL
    return int(any(verdict not in good for found in results.values() for verdict, _ in found.values()))


if __name__ == "__main__":
    sys.exit(main())
