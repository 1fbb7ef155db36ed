# /// script
# requires-python = ">=3.10"
# dependencies = ["openvino-genai==2026.4.1.0", "jinja2==3.1.6", "pip"]
# ///
"""Serve a local language model over the OpenAI API:  python openai_api_endpoint.py --model-dir X --port 9999

The law: one engine process per loaded model; in it, one thread is the only one that ever touches the native library;
a producer never waits for a consumer. (engine.py draws the engine's side.)

This module owns HTTP, JSON, SSE and the OpenAI schema. The main thread only accepts; each connection has a thread of its own:
  ROUTES -> body -> read_fields -> Prompt + Sampling -> models.submit -> Job -> events -> JSON or SSE -> socket
Back-pressure is the socket's timeout. Cancellation is one `finally: job.cancel()`. Every error is an ApiError,
raised anywhere and rendered in one place. The first delta decides the status line: until then any error has its real status.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import difflib
import errno
import hmac
import json
import logging
import os
import re
import select
import signal
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import model_init
from backends import LACKS, WITH_EMBEDDINGS
from constraints import (
    Unsupported,
    choice_grammar,
    object_grammar,
    own_grammar,
    regex_grammar,
    regex_matches,
    schema_grammar,
    violation,
)
from engine import (
    LOG_FORMAT,
    Answer,
    Delta,
    Details,
    EngineFailed,
    Event,
    Job,
    Prompt,
    QueueFull,
    Refused,
    Sampling,
    Started,
    TokenLogprob,
    Unloading,
    log,
)
from model_init import (
    RETRY_S,
    ROLES,
    AnyEngine,
    Conflict,
    Model,
    Models,
    NotReady,
    Profile,
    StillLoading,
    UnknownModel,
    UsageError,
)
from upstream import UpstreamFailed

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
        **more: Any,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers, self.close, self.more = tuple(headers), close, more

    def body(self) -> dict[str, Any]:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.more}}


class SpinningUp(ApiError):
    """No error, but no answer either: 202, with the body that llm-serve's clients know."""

    def body(self) -> dict[str, Any]:
        return {"object": "model.load", "status": "spinning_up"} | self.more


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
    later = [("Retry-After", str(RETRY_S))]
    if isinstance(error, NotReady):
        return ApiError(503, f"Not ready: {error}.", code="not_ready", headers=later)
    if isinstance(error, UnknownModel):
        return ApiError(404, f"{error}.", "model", "model_not_found")
    if isinstance(error, StillLoading):
        return SpinningUp(
            202, f"{error}", headers=later,
            model=error.model, current_model=error.current, retry_after_seconds=RETRY_S, eta_seconds=None,
        )  # fmt: skip
    if isinstance(error, Conflict):
        return ApiError(409, f"Try again: {error}.", "model", "model_conflict", later, current_model=error.current)
    if isinstance(error, UpstreamFailed):
        wait = error.retry_after or ("1" if error.status == 429 else str(RETRY_S))
        headers = [("Retry-After", wait)] if error.status in (429, 503) else []
        return ApiError(error.status, f"The upstream server failed: {error}.", code="upstream_failed", headers=headers)
    if isinstance(error, Unloading):
        return ApiError(409, f"Try again: {error}.", "model", "model_swapped", later, current_model=error.current)
    if isinstance(error, UsageError):
        return ApiError(400, f"This model cannot be loaded here: {error}.", "model", "unsupported_model")
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
        return Kind("an integer" if low == -BIG else f"an integer, {low} or more", read)
    return Kind(f"an integer from {low} to {high}", read)


def read_boolean(value: Any) -> bool:
    check(isinstance(value, bool))
    return bool(value)


def read_string(value: Any) -> str:
    check(isinstance(value, str))
    return str(value)


def read_name(value: Any) -> str:
    check(isinstance(value, str) and len(value) <= 256)
    return str(value)


def one_of(*names: str) -> Kind:
    def read(value: Any) -> str:
        check(value in names)
        return str(value)

    return Kind(" or ".join(names), read)


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
NAME = Kind("a string of up to 256 characters", read_name)
ANYTHING = Kind("anything", lambda value: value)
STOP = Kind("a string of 1 to 256 characters, a token id, or up to 16 of either", read_stop)
STREAM_OPTIONS = Kind('an object like {"include_usage": true}', read_stream_options)


def read_ids(value: Any) -> tuple[int, ...]:
    check(isinstance(value, list) and len(value) <= 1 << 20)
    check(all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in value))
    return tuple(value)


def read_prompts(value: Any) -> list[Prompt]:
    """A string, an array of strings, an array of token ids, or an array of those: up to 256 prompts."""
    if isinstance(value, str):
        return [Prompt(text=value)]
    check(isinstance(value, list) and bool(value))
    if isinstance(value[0], int):
        return [Prompt(tokens=read_ids(value))]
    check(len(value) <= 256)
    return [Prompt(text=item) if isinstance(item, str) else Prompt(tokens=read_ids(item)) for item in value]


def read_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    check(isinstance(value, dict) and len(value) <= 1024)
    bias = number(-100, 100).read
    check(all(re.fullmatch(r"[0-9]{1,9}", token) for token in value))
    return tuple((int(token), bias(weight)) for token, weight in value.items())


def read_template_kwargs(value: Any) -> dict[str, Any]:
    check(isinstance(value, dict) and not RESERVED & set(value))
    return dict(value)


RESERVED = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}  # the server's own template variables
PROMPTS = Kind("a string, an array of strings, an array of token ids, or an array of those (1 to 256)", read_prompts)
IDS = Kind("an array of token ids", read_ids)
LOGIT_BIAS = Kind("an object of token ids to numbers from -100 to 100", read_logit_bias)
TEMPLATE_KWARGS = Kind(f"an object without {', '.join(sorted(RESERVED))}", read_template_kwargs)


@dataclass(frozen=True, slots=True)
class Constraint:
    """What a completion must be: the grammar that the engine follows, and the check when it has ended."""

    grammar: str
    check: Callable[[str], str | None] | None  # what is wrong with a finished text, or None; without: only the engine knows

    def fault(self, text: str, cut: bool) -> str | None:
        """What is wrong with a text that the engine has ended, or that a stop string or token has cut."""
        if self.check is None:
            return "it ends where the grammar may not" if cut else None
        try:
            return self.check(text)
        except Unsupported as error:
            return str(error)


def json_constraint(schema: Any, where: str) -> Constraint:
    def wrong(text: str) -> str | None:
        try:
            return violation(schema, json.loads(text))
        except ValueError as error:
            return f"it is not JSON: {error}"

    return Constraint(refuse_unsupported(schema_grammar, schema, where), wrong)


def refuse_unsupported(convert: Callable[[Any], str], source: Any, where: str) -> str:
    try:
        return convert(source)
    except Unsupported as error:
        raise ApiError(400, f"'{where}' cannot be honoured: {error}", where, "unsupported_constraint") from None


def read_response_format(value: Any) -> Constraint | None:
    check(isinstance(value, dict))
    given = {name: item for name, item in value.items() if item is not None}
    kind = given.get("type")
    if kind == "json_object" and "schema" in given:  # llama-server's spelling
        kind, given = "json_schema", {"type": "json_schema", "json_schema": {"schema": given.get("schema")}}
    check(set(given) <= {"type", "json_schema"} and (kind == "json_schema" or len(given) == 1))
    if kind == "text":
        return None
    if kind == "json_object":
        return Constraint(object_grammar(), json_constraint({"type": "object"}, "response_format").check)
    value = given
    check(kind == "json_schema" and isinstance(value.get("json_schema"), dict))
    check(set(value["json_schema"]) <= {"name", "description", "schema", "strict"})
    check(isinstance(value["json_schema"].get("schema"), (dict, bool)))
    return json_constraint(value["json_schema"]["schema"], "response_format")


def read_structured_outputs(value: Any) -> Constraint | None:
    check(isinstance(value, dict))
    given = {name: item for name, item in value.items() if item is not None}
    if not given:
        return None
    check(len(given) == 1)
    ((name, source),) = given.items()
    where = "structured_outputs"
    if name == "json":
        try:
            source = parse_json(source.encode()) if isinstance(source, str) else source
        except ApiError as error:
            raise ApiError(400, f"'{where}': {error.message}", where) from None
        return json_constraint(source, where)
    if name == "regex":
        check(isinstance(source, str))
        grammar = refuse_unsupported(regex_grammar, source, where)
        return Constraint(grammar, lambda text: None if regex_matches(source, text) else "it does not match the regex")
    if name == "choice":
        check(isinstance(source, list) and bool(source) and all(isinstance(item, str) and item for item in source))
        grammar = refuse_unsupported(choice_grammar, source, where)
        return Constraint(grammar, lambda text: None if text in source else "it is none of the choices")
    check(name == "grammar" and isinstance(source, str) and 0 < len(source) <= 100_000)
    return Constraint(refuse_unsupported(own_grammar, source, where), None)


RESPONSE_FORMAT = Kind(
    '{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": …}}', read_response_format
)
STRUCTURED = Kind("an object with one of json, regex, choice, grammar", read_structured_outputs)

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
            hint = f" This server has no parts of type {kind[:40]!r}." if isinstance(kind, str) and kind != "text" else ""
            raise ApiError(400, f'\'{where}[{i}]\' must be {{"type":"text","text":…}}.{hint}', f"{where}[{i}]")
    return "".join(part["text"] for part in content)


MESSAGES = Kind("a non-empty array of {role, content}", read_messages)


class Field(NamedTuple):
    """A request field. `needs`: what of FEATURES the engine must have, unless the value is one of `free`; NEVER: no engine has it."""

    kind: Kind
    help: str
    needs: str = ""
    free: tuple[Any, ...] = ()


NEVER = "never"


def never(*free: Any) -> Field:
    """A field that would change the answer and that nothing honours, with the values at which it changes nothing."""
    return Field(
        ANYTHING, "refused" + (f", but for {' and '.join(json.dumps(value) for value in free)}" if free else ""), NEVER, free
    )


# The one place where a field is declared: validation, GET /v1/capabilities and README's tables all come from these rows.
GENERATION = {
    "model": Field(NAME, "an id or alias of GET /v1/models; where only one is served, any name; the reply echoes it"),
    "stream": Field(BOOLEAN, "answer as server-sent events"),
    "stream_options": Field(STREAM_OPTIONS, "`include_usage`: one more chunk with the usage; only with stream"),
    "temperature": Field(number(0, 2), "0 is greedy; default: the model's own, else 0.7"),
    "top_p": Field(number(0, 1, above=True), "nucleus sampling; default: the model's own, else 1"),
    "top_k": Field(integer(-1, BIG), "sample from the k best; 0 or -1 is off; default: the model's own, else off", "extensions", (0, -1)),
    "min_p": Field(number(0, 1), "drop tokens less likely than min_p times the best; default 0", "extensions", (0,)),
    "presence_penalty": Field(number(-2, 2), "against tokens already in the completion; default 0"),
    "frequency_penalty": Field(number(-2, 2), "the same, by how often; default 0"),
    "repetition_penalty": Field(number(0.01, 100), "against tokens already in prompt or completion; 1, the default, is off", "extensions", (1,)),
    "n": Field(integer(1, 8), "independent choices; they share one prefill; default 1"),
    "seed": Field(integer(-BIG, BIG), "same seed, same sampling; choice i uses seed + i"),
    "stop": Field(STOP, "end before this text or token; never part of the answer"),
    "stop_token_ids": Field(IDS, "end before one of these tokens", "extensions", ([],)),
    "min_tokens": Field(integer(0, BIG), "no EOS is sampled, and nothing ends the completion, before so many tokens; default 0", "extensions", (0,)),
    "ignore_eos": Field(BOOLEAN, "go on after EOS, up to max_tokens", "extensions", (False,)),
    "logit_bias": Field(LOGIT_BIAS, "added to logits, by token id; -100 bans", "logit_bias", ({},)),
    "response_format": Field(RESPONSE_FORMAT, "text, any JSON object, or JSON that satisfies a schema", "constraints", ({"type": "text"},)),
    "structured_outputs": Field(STRUCTURED, "`json`: a schema; `regex`; `choice`: an array of strings; `grammar`: GBNF", "constraints", ({},)),
    "return_prompt": Field(BOOLEAN, "tell what the model was given: prompt, token ids, sampling (also header `X-Debug: prompt`)", "inside", (False,)),
    "guided_json": never(),
    "guided_regex": never(),
    "guided_choice": never(),
    "guided_grammar": never(),
    "grammar": never(""),
    "bad_words": never([]),
    "allowed_token_ids": never([]),
    "prompt_logprobs": never(),
    "prediction": never(),
}  # fmt: skip
CHAT = GENERATION | {
    "messages": Field(MESSAGES, "the conversation; content is a string or an array of text parts"),
    "max_tokens": Field(integer(1, BIG), "most tokens to generate; default: what the context has left"),
    "max_completion_tokens": Field(integer(1, BIG), "the same, and wins over max_tokens"),
    "logprobs": Field(BOOLEAN, "log probabilities of the tokens, from the raw logits"),
    "top_logprobs": Field(integer(0, 20), "and of so many alternatives; only with logprobs", "top_logprobs", (0,)),
    "chat_template_kwargs": Field(TEMPLATE_KWARGS, "more variables for the chat template", "template", ({},)),
    "add_generation_prompt": Field(BOOLEAN, "end the prompt with the beginning of an assistant message; default true", "template", (True,)),
    "continue_final_message": Field(BOOLEAN, "go on with the last message, which must be the assistant's", "template", (False,)),
    "tools": never([]),
    "tool_choice": never("none", "auto"),
    "parallel_tool_calls": never(True, False),
    "functions": never([]),
    "function_call": never("none", "auto"),
    "modalities": never(["text"]),
    "audio": never(),
    "reasoning_effort": never(),
    "verbosity": never(),
    "web_search_options": never(),
    "chat_template": never(),
    "echo": never(False),
    "best_of": never(1),
    "suffix": never(""),
}  # fmt: skip
COMPLETIONS = GENERATION | {
    "prompt": Field(PROMPTS, "a string, an array of strings, an array of token ids, or an array of those"),
    "max_tokens": Field(integer(0, BIG), "most tokens to generate; default 16, as OpenAI's; 0 only with echo"),
    "logprobs": Field(integer(0, 20), "log probabilities of the tokens, and of so many alternatives", "top_logprobs", (0,)),
    "echo": Field(BOOLEAN, "the prompt comes first; with logprobs its tokens are scored"),
    "best_of": Field(integer(1, 8), "honoured where it equals n"),
    "suffix": never(""),
}  # fmt: skip
EMBEDDINGS = {
    "model": GENERATION["model"],
    "input": Field(PROMPTS, "a string, an array of strings, an array of token ids, or an array of those", "embeddings"),
    "encoding_format": Field(one_of("float", "base64"), "base64: little-endian float32", "embeddings"),
    "dimensions": Field(integer(1, 1 << 16), "the first so many, scaled to length 1 again", "embeddings"),
}
TOKENIZE = {
    "model": GENERATION["model"],
    "content": Field(STRING, "the text; `prompt` and `text` are the same"),
    "prompt": Field(STRING, "the text"),
    "text": Field(STRING, "the text"),
    "messages": Field(MESSAGES, "or a conversation, rendered by the chat template"),
    "add_special": Field(BOOLEAN, "add BOS where the model wants it; default: only to text"),
    "add_special_tokens": Field(BOOLEAN, "the same"),
    "with_pieces": Field(BOOLEAN, "tell each token's text, or its bytes where they are not text"),
    "return_token_strs": Field(BOOLEAN, "the same as an array `token_strs`"),
    "add_generation_prompt": CHAT["add_generation_prompt"],
    "continue_final_message": CHAT["continue_final_message"],
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
}
DETOKENIZE = {"model": GENERATION["model"], "tokens": Field(IDS, "token ids")}
TEMPLATE = {
    name: CHAT[name]
    for name in ("model", "messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
}
OPERATE = {
    "model": GENERATION["model"],
    "stream": Field(BOOLEAN, "load: tell the progress as server-sent events"),
}
PROMPT_FIELDS = {
    "/chat/completions": "messages", "/embeddings": "input", "/tokenize": "content", "/detokenize": "tokens",
    "/apply-template": "messages",
}  # fmt: skip
ALIASES = {"repeat_penalty": "repetition_penalty"}
INERT = (  # change nothing about an answer
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip

# What a value or two fields together need of the engine: (says, condition, field to blame, feature).
COMBINED: tuple[tuple[str, Callable[[dict[str, Any]], bool], str, str], ...] = (
    ("`echo` with `logprobs`", lambda v: bool(v.get("echo")) and v.get("logprobs") is not None, "echo", "scores"),
    ("a token id in `stop`", lambda v: any(isinstance(item, int) for item in v.get("stop", ())), "stop", "extensions"),
)


class Fields(NamedTuple):
    """A request body, read: fields that were given, and names that nobody knows."""

    values: dict[str, Any]
    ignored: list[str]


def read_fields(body: Any, table: dict[str, Field], engine: str = "", strict: bool = False) -> Fields:
    """Every field is honoured, inert, refused by name (400), or unknown and listed (`strict`: refused). null is absent."""
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object.")
    values: dict[str, Any] = {}
    ignored: list[str] = []
    for sent, value in body.items():
        name = ALIASES.get(sent, sent)
        if value is None or name in INERT:
            continue
        if name not in table:
            ignored.append(sent)
            continue
        field_ = table[name]
        if field_.needs and not any(same_value(value, free) for free in field_.free):
            refuse_lacking(sent, field_.needs, engine)
        if field_.needs == NEVER:
            continue
        try:
            values[name] = field_.kind.read(value)
        except (ValueError, OverflowError):
            raise ApiError(400, f"'{sent}' must be {field_.kind.says}.", sent) from None
    if strict and ignored:
        raise ApiError(
            400, f"'{ignored[0]}' is not a field of this route (--strict): leave it out.", ignored[0], "unknown_parameter"
        )
    for says, condition, param, feature in COMBINED:
        if condition(values):
            refuse_lacking(param, feature, engine, says.replace("`", "'"))
    return Fields(values, ignored)


def same_value(a: Any, b: Any) -> bool:
    """0 and 0.0 are the same, 0 and false are not."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)


def engines_with(feature: str) -> list[str]:
    return [] if feature == NEVER else [name for name, lacks in LACKS.items() if feature not in lacks]


def refuse_lacking(param: str, feature: str, engine: str, says: str = "") -> None:
    able = engines_with(feature)
    if engine in able or (engine not in LACKS and feature != NEVER):  # a binding of the user's own speaks for itself
        return
    why = (
        f"is not supported by the engine {engine}; {', '.join(able)} can"
        if able
        else "is not supported by this server: leave it out"
    )
    raise ApiError(400, f"{says or repr(param)} {why}.", param, "unsupported_parameter")


def check_together(values: dict[str, Any]) -> None:
    """What relates two fields of a route that generates."""
    if "stream_options" in values and not values.get("stream"):
        raise ApiError(400, "'stream_options' is only allowed with stream: true.", "stream_options")
    if values.get("top_logprobs") and not values.get("logprobs"):
        raise ApiError(400, "'top_logprobs' is only allowed with logprobs: true.", "top_logprobs")
    if values.get("response_format") and values.get("structured_outputs"):
        raise ApiError(400, "'structured_outputs' and 'response_format' exclude each other.", "structured_outputs")
    if values.get("response_format") or values.get("structured_outputs"):
        if values.get("echo"):
            raise ApiError(400, "'echo' excludes a constraint: the prompt is no part of what is constrained.", "echo")
        for name in ("min_tokens", "ignore_eos"):
            if values.get(name):
                raise ApiError(400, f"'{name}' excludes a constraint: the constraint says when the text is complete.", name)
    if "best_of" in values and values["best_of"] != values.get("n", 1):
        raise ApiError(400, "'best_of' is only honoured where it equals 'n'.", "best_of", "unsupported_parameter")
    if values.get("max_tokens") == 0 and not values.get("echo"):
        raise ApiError(400, "'max_tokens' may only be 0 with echo: true.", "max_tokens")


def require(values: dict[str, Any], name: str, table: dict[str, Field]) -> Any:
    if name not in values:
        raise ApiError(400, f"'{name}' is required: {table[name].kind.says}.", name)
    return values[name]


def chat_prompt(values: dict[str, Any]) -> Prompt:
    messages = require(values, "messages", CHAT)
    go_on = values.get("continue_final_message", False)
    if go_on and (messages[-1]["role"] != "assistant" or not messages[-1]["content"]):
        raise ApiError(
            400, "'continue_final_message' needs a last message of the assistant's, with content.", "continue_final_message"
        )
    if go_on and values.get("add_generation_prompt"):
        raise ApiError(
            400, "'continue_final_message' and 'add_generation_prompt' exclude each other.", "continue_final_message"
        )
    return Prompt(
        messages,
        generation_prompt=values.get("add_generation_prompt", True),
        continue_final=go_on,
        template_kwargs=values.get("chat_template_kwargs", {}),
    )


def constraint_of(values: dict[str, Any]) -> Constraint | None:
    return values.get("response_format") or values.get("structured_outputs")


def sampling_from(values: dict[str, Any]) -> Sampling:
    same = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "n", "seed"]
    same += ["min_tokens", "ignore_eos", "logit_bias", "echo"]
    stop, top_k, logprobs, constraint = (
        values.get("stop", []),
        values.get("top_k"),
        values.get("logprobs"),
        constraint_of(values),
    )
    if isinstance(logprobs, bool):  # the chat route's spelling
        logprobs = values.get("top_logprobs", 0) if logprobs else None
    if values.get("temperature", 1) < 1e-4:  # greedy, as good as; the engines' float32 would overflow
        values["temperature"] = 0.0
    if "top_p" in values:
        values["top_p"] = max(values["top_p"], 1e-6)
    return Sampling(
        max_tokens=values.get("max_completion_tokens", values.get("max_tokens")),
        top_k=None if top_k is None else min(max(top_k, 0), 2**31 - 1),
        stop=tuple(item for item in stop if isinstance(item, str)),
        stop_token_ids=tuple(item for item in stop if isinstance(item, int)) + values.get("stop_token_ids", ()),
        logprobs=logprobs,
        grammar=constraint.grammar if constraint else None,
        **{name: values[name] for name in same if name in values},
    )


def capabilities(engine: str) -> dict[str, Any]:
    """What GET /v1/capabilities says: for each route and field, whether this engine honours it, and which do."""

    def row(field_: Field) -> dict[str, Any]:
        able = engines_with(field_.needs) if field_.needs else list(LACKS)
        free = {"always_accepted": list(field_.free)} if field_.free else {}
        return {
            "honoured": engine in able or (engine not in LACKS and field_.needs != NEVER),
            "engines": able,
            "must_be": field_.kind.says,
            **free,
        }

    tables = {f"/v1{path}": {name: row(f) for name, f in sorted(table.items())} for path, table in BODIES.items()}
    together = {
        says.replace("`", ""): {"honoured": engine in engines_with(feature), "engines": engines_with(feature)}
        for says, _, _, feature in COMBINED
    }
    return {"engine": engine, "routes": tables, "together": together, "inert": list(INERT), "aliases": ALIASES}


BODIES = {
    "/chat/completions": CHAT,
    "/completions": COMPLETIONS,
    "/embeddings": EMBEDDINGS,
    "/tokenize": TOKENIZE,
    "/detokenize": DETOKENIZE,
    "/apply-template": TEMPLATE,
    "/models/load": OPERATE,
    "/models/unload": OPERATE,
}


def parse_json(body: bytes) -> Any:
    """JSON that cannot hurt: bounded in numbers, nesting and members, and no text that is not Unicode (RFC 8259, section 8.1)."""
    if body.count(b"{") + body.count(b"[") > 100_000 or body.count(b",") > 1_000_000:
        raise ApiError(400, "The body has too many members.")  # a second of parsing would be a second for everyone

    def whole(digits: str) -> int:
        if len(digits) > 32:
            raise ValueError("a number is too long")
        return int(digits)

    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_int=whole)
        if b"\\ud" in body.lower():  # an escaped surrogate without its other half is not text, and no engine can encode it
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.") from None
    except ValueError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.") from None
    return value


# ───────────────────────────────────────────── the reply, pure functions ─────────────────────────────────────────


ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))  # json.dumps would make one for every call


def compact(value: Any) -> bytes:
    return ENCODER.encode(value).encode("utf-8", "replace")


class Choice:
    """One choice, assembled from its deltas."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.finish: str | None = None
        self.logprobs: list[TokenLogprob] = []
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # for text_offset: characters may span tokens
        self.offset = 0  # characters of the tokens so far


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
    cached_tokens: int | None = 0
    tokens: int = 0
    started_at: float = 0.0  # these three: seconds on the engine's clock
    first_at: float = 0.0
    last_at: float = 0.0
    details: list[Details] = field(default_factory=list)

    def start(self, event: Started) -> None:
        self.started_at = self.started_at or event.at
        self.prompt_tokens += event.prompt_tokens
        known = self.cached_tokens is not None and event.cached_tokens is not None
        self.cached_tokens = (self.cached_tokens or 0) + (event.cached_tokens or 0) if known else None

    def add(self, delta: Delta) -> Delta:
        """Take a delta in; returns it as the client is to see it: `stop` only where a constraint holds."""
        choice = self.choices[delta.choice]
        self.tokens += delta.tokens
        self.first_at, self.last_at = self.first_at or delta.at, delta.at
        choice.text.append(delta.text)
        if delta.finish in ("stop", "cut"):
            text, cut = "".join(choice.text), delta.finish == "cut"
            wrong = self.constraint.fault(text, cut) if self.constraint else None
            if wrong:
                log.info("%s: a stop string or token has cut a constrained text: %s", self.id, wrong)
            delta = delta._replace(finish="length" if wrong else "stop")
        choice.finish = delta.finish
        return delta

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.prompt_tokens + self.tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def timings(self) -> dict[str, Any]:
        """llama-server's names. Prefill up to the first token, then decoding; by the engine's clock, the queue left out."""
        prompt_ms, predicted_ms = (self.first_at - self.started_at) * 1000, (self.last_at - self.first_at) * 1000
        prompt_n = self.prompt_tokens - (self.cached_tokens or 0)
        return {
            "cache_n": self.cached_tokens,
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
                    **self.shape.content("".join(choice.text)),
                    "logprobs": self.shape.logprobs(choice, choice.logprobs) if self.logprobs else None,
                    "finish_reason": choice.finish,
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


class Shape(NamedTuple):
    """What differs between the chat and the legacy text route."""

    prefix: str
    whole: str  # "object" of a reply
    part: str  # "object" of a chunk
    content: Callable[[str], dict[str, Any]]
    logprobs: Callable[[Choice, Iterable[TokenLogprob]], dict[str, Any]]
    opening: bytes  # what a stream begins with, for each choice
    piece: bytes  # a chunk's text, already JSON
    closing: bytes


CHAT_SHAPE = Shape(
    "chatcmpl-",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    chat_logprobs,
    b'"delta":{"role":"assistant","content":"","refusal":null}',
    b'"delta":{"content":%s}',
    b'"delta":{}',
)
TEXT_SHAPE = Shape(
    "cmpl-", "text_completion", "text_completion", lambda text: {"text": text}, text_logprobs, b"", b'"text":%s', b'"text":""'
)


class Chunks:
    """The SSE events of one streamed completion. Only the text is serialized per chunk: the rest is the same in all."""

    def __init__(self, completion: Completion, include_usage: bool):
        self.completion, self.shape = completion, completion.shape
        head = {"id": completion.id, "object": self.shape.part, "created": completion.created, "model": completion.model}
        head["system_fingerprint"] = completion.fingerprint
        self.head = b"data: " + compact(head)[:-1] + b',"choices":['
        self.tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

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
        if delta.text or logprobs != b"null":
            out = self.chunk(delta.choice, self.shape.piece % compact(delta.text), logprobs)
        if delta.finish:
            out += self.chunk(delta.choice, self.shape.closing, finish=b'"%s"' % delta.finish.encode())
        return out

    def last(self, **members: Any) -> bytes:
        """A chunk without choices."""
        return self.head + b"]," + compact(members)[1:] + b"\n\n"


DONE = b"data: [DONE]\n\n"


def sse(payload: Any) -> bytes:
    return b"data: " + compact(payload) + b"\n\n"


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
            merged[event.choice] = event._replace(
                text=old.text + event.text, tokens=old.tokens + event.tokens, logprobs=old.logprobs + event.logprobs
            )
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
        self.extra: list[tuple[str, str]] = []
        self.request_id = re.sub(r"[^!-~]", "", self.headers.get("X-Request-Id", ""))[:128] or f"req-{uuid.uuid4().hex}"
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
            told = as_api_error(error)
            if isinstance(error, Refused) and told.param == "prompt":  # the engine's word for it, on every route
                told.param = PROMPT_FIELDS.get(self.path.partition("?")[0].rstrip("/").removeprefix("/v1"), "prompt")
            self.fail(told)
        finally:
            if self.command != "GET" or self.status >= 400:
                log.info("%s %s %s%s", self.command, self.path[:200], self.status, self.log_note)

    def fail(self, error: ApiError) -> None:
        """Render any error, before or inside a stream."""
        self.log_note += f" {error.message[:300]}"
        if self.streaming:
            self.write(self.framed(sse(error.body()) + DONE))
            self.end_stream()
            return
        if error.close:
            self.close_connection = True
        self.reply(error.status, error.body(), error.headers)
        if error.close:
            self.linger()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """http.server's own errors (a bad request line, too many headers) in the same JSON."""
        self.status, self.streaming, self.log_note, self.extra, self.request_id = 0, False, "", [], ""
        self.fail(ApiError(int(code), f"{message or HTTPStatus(code).phrase}.", close=True))

    def route(self) -> None:
        if self.request_version == "HTTP/1.1" and len(self.headers.get_all("Host") or ()) != 1:
            raise ApiError(400, "An HTTP/1.1 request must have one Host header.", close=True)
        try:
            path = urlsplit(self.path).path if not self.path.startswith("//") else self.path
        except ValueError:
            raise ApiError(400, "The request's URL is malformed.") from None
        path = (path[:-1] if path.endswith("/") and path != "/" else path) or "/"
        path = path[3:] or "/" if path == "/v1" or path.startswith("/v1/") else path
        if self.command == "OPTIONS":
            return self.reply(204, None, CORS[1:])
        methods, argument = ROUTES.get(path), None
        if methods is None and path.startswith("/models/"):
            methods, argument = ROUTES["/models/{id}"], unquote(path[len("/models/") :])
        if methods is None:
            raise ApiError(404, f"There is no {path[:200]}. The routes are: {', '.join(ROUTES)}.", code="unknown_url")
        action = methods.get("GET" if self.command == "HEAD" else self.command)
        if action is None:
            allow = ", ".join([*methods, *(["HEAD"] if "GET" in methods else []), "OPTIONS"])
            raise ApiError(405, f"{self.command} is not allowed here, but {allow} is.", headers=[("Allow", allow)])
        if self.server.draining:
            raise ApiError(503, "The server is shutting down.", code="not_ready", close=True)
        if action not in OPEN_TO_ALL:
            self.authenticate(action in OPERATORS)
        action(self) if argument is None else action(self, argument)

    def authenticate(self, operator: bool) -> None:
        wanted = self.server.api_key
        if operator:
            if self.server.admin is None:
                raise ApiError(403, "Loading and unloading by request is off: start the server with --admin.", code="admin_off")
            wanted = self.server.admin or wanted
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
        if self.headers.defects or self.headers.get_payload():  # Python's parser drops all headers after a malformed one
            raise ApiError(400, "A header line is malformed.", close=True)
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
        lines += [f"{name}: {value}" for name, value in (CORS[0], *self.extra, *headers)]
        if self.request_id:
            elapsed = (time.monotonic() - self.started) * 1000
            lines += [f"X-Request-Id: {self.request_id}", f"openai-processing-ms: {elapsed:.0f}"]
        if self.close_connection:
            lines.append("Connection: close")
        elif self.request_version == "HTTP/1.0":
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")

    def reply(self, status: int, payload: Any, headers: Iterable[tuple[str, str]] = ()) -> None:
        if payload is None:
            return self.write(self.head(status, headers))
        body = payload if isinstance(payload, bytes) else compact(payload)
        head = self.head(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body))), *headers])
        self.write(head if self.command == "HEAD" else head + body)

    def begin_stream(self, first: bytes) -> None:
        """Status line, headers and the first events in one packet."""
        self.streaming, self.chunked = True, self.request_version == "HTTP/1.1"
        sse = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no")]
        if self.chunked:
            sse.append(("Transfer-Encoding", "chunked"))
        else:
            self.close_connection = True
        self.write(self.head(200, sse) + self.framed(first))

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
        current = models.current()
        self.reply(200, {
            "service": "openai_api_endpoint", "version": VERSION, "status": models.status(),
            "model": current and models.catalog.public(current.model), "engine": current and models.backend(current.model),
            "routes": list(ROUTES),
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
        self.reply(200, body | ({"last_error": models.last_error} if models.last_error else {}))

    def model_card(self, model: Model) -> dict[str, Any]:
        name, status = self.server.models.catalog.public(model), self.server.models.status_of(model)
        return {
            "id": name, "object": "model", "created": model.created, "owned_by": self.server.profile.owned_by,
            "permission": [], "root": name, "parent": None, "status": status, "loaded": status == "loaded",
        }  # fmt: skip

    def get_models(self) -> None:
        models, found = self.server.models, self.server.models.catalog.models()
        now = (found, {id: models.status_of(life.model) for id, life in list(models.lives.items())}, dict(models.catalog.shown))
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
        self.reply(200, capabilities(self.server.models.backend(self.queried_model())))

    def get_tokenizer_info(self) -> None:
        """vLLM's route, by which lm-eval finds out that /tokenize and /detokenize are there."""
        models, model = self.server.models, self.queried_model()
        refuse_lacking("tokenizer_info", "inside", models.backend(model))
        info = models.acquire(model, self.client(), self.peer_gone, self.prefers_to_wait()).info
        self.reply(200, {"tokenizer_class": "remote", **(info.tokenizer if info else {})})

    # ── POST routes that generate ──

    def read(self, table: dict[str, Field]) -> dict[str, Any]:
        """The body's fields, and self.model. Names that nobody knows are told in a header."""
        body, models, unknown = parse_json(self.body), self.server.models, None
        asked = body.get("model") if isinstance(body, dict) else None
        try:
            self.model = models.resolve(asked if isinstance(asked, str) else None)
        except UnknownModel as error:
            unknown, self.model = error, models.default()  # a bad field is told first
        values, ignored = read_fields(body, table, models.backend(self.model), self.server.strict)
        self.server.note_ignored(ignored)
        if ignored:
            self.extra.append(("X-Ignored-Fields", ", ".join(ascii(name)[1:-1][:64] for name in ignored[:32])))
        self.check_profile(values)
        if unknown:
            status = int(models.limits.unknown) if asked and models.limits.unknown.isdigit() else 404 if asked else 400
            raise ApiError(status, f"{unknown}.", "model", "model_not_found" if asked else None)
        return values

    def check_profile(self, values: dict[str, Any]) -> None:
        """What the profile asks of every request."""
        profile = self.server.profile
        for i, message in enumerate(values.get("messages", ())):
            if message["role"] not in profile.roles:
                where = f"messages[{i}].role"
                raise ApiError(400, f"'{where}' must be one of {', '.join(profile.roles)} (--roles).", where)
        for name in ("max_tokens", "max_completion_tokens"):
            if profile.max_tokens_limit and values.get(name, 0) > profile.max_tokens_limit:
                raise ApiError(400, f"'{name}' must be at most {profile.max_tokens_limit} (--max-tokens-limit).", name)

    def client(self) -> str:
        """Who asks, for fairness: an API key from an address."""
        key = self.headers.get("Authorization", "") or self.headers.get("X-Api-Key", "")
        return f"{self.client_address[0]} {hash(key)}"

    def prefers_to_wait(self) -> float | None:
        """`Prefer: wait=N` (RFC 7240, section 4.3), in seconds."""
        found = re.search(r"(?:^|[,;\s])wait=(\d{1,6})\b", self.headers.get("Prefer", ""))
        if not found:
            return None
        self.extra.append(("Preference-Applied", f"wait={found[1]}"))
        return min(float(found[1]), self.server.request_timeout)

    def queried_model(self) -> Model:
        """The model that `?model=` names, else the default one."""
        names = parse_qs(urlsplit(self.path).query).get("model", [])
        return self.server.models.resolve(names[0]) if names else self.server.models.default()

    def submit(self, start: Callable[[AnyEngine], Job]) -> Job:
        return self.server.models.submit(self.model, start, self.client(), self.peer_gone, self.prefers_to_wait())

    def model_name(self, values: dict[str, Any]) -> str:
        """A reply names the model as the request did."""
        return values.get("model") or self.server.models.catalog.public(self.model)

    def post_chat_completions(self) -> None:
        profile, values = self.server.profile, self.read(CHAT)
        values = {"stream": profile.stream} | profile.sampling() | values
        check_together(values)
        self.generate([chat_prompt(values)], values, CHAT_SHAPE, profile.max_tokens)

    def post_completions(self) -> None:
        values = self.server.profile.sampling() | self.read(COMPLETIONS)
        check_together(values)
        self.generate(require(values, "prompt", COMPLETIONS), values, TEXT_SHAPE, 16)

    def generate(self, prompts: list[Prompt], values: dict[str, Any], shape: Shape, max_tokens: int | None) -> None:
        """`max_tokens`: where the request does not say."""
        told = values.get("return_prompt") or self.headers.get("X-Debug", "").strip().lower() == "prompt"
        if told:
            refuse_lacking("return_prompt", "inside", self.server.models.backend(self.model))
        if told or self.server.record:
            prompts = [replace(prompt, details=True) for prompt in prompts]
        sampling = sampling_from(values)
        if sampling.max_tokens is None:
            sampling = replace(sampling, max_tokens=max_tokens, cut=True)
        client = self.client()
        job = self.submit(lambda engine: engine.submit(prompts, sampling, client))
        assert job.engine.info is not None
        completion = Completion(
            shape.prefix + uuid.uuid4().hex,
            self.model_name(values),
            job.engine.info.fingerprint,
            [Choice() for _ in range(sampling.n * len(prompts))],
            shape,
            sampling.logprobs is not None,
            constraint_of(values),
        )
        self.first_delta = 0.0
        try:
            if values.get("stream"):
                self.stream(job, completion, values.get("stream_options", False), told)
            else:
                for delta in self.deltas(job, completion, streaming=False):
                    completion.choices[delta.choice].logprobs += delta.logprobs
                self.reply(200, completion.reply() | (self.debug(job, completion) if told else {}))
            self.server.note_request(self.path, self.body, self.request_id, completion, self.debug(job, completion))
        finally:
            job.cancel()
            self.log_note = self.describe(completion)

    def stream(self, job: Job, completion: Completion, include_usage: bool, told: bool) -> None:
        chunks = Chunks(completion, include_usage)
        for delta in self.deltas(job, completion, streaming=True):
            data = chunks.delta(delta)
            if not self.streaming:
                self.begin_stream(chunks.opening() + data)
            elif data:
                self.write(self.framed(data))
        last = chunks.last(**self.debug(job, completion)) if told else b""
        if include_usage:
            last += chunks.last(usage=completion.usage(), timings=completion.timings())
        self.write(self.framed(last + DONE))
        self.end_stream()

    def debug(self, job: Job, completion: Completion) -> dict[str, Any]:
        """What the model was given, for `return_prompt` and --record: enough to run the request again."""
        info = job.engine.info
        assert info is not None
        engine = {"backend": info.backend, "library": info.library, "slots": info.slots, "threads": info.threads}
        return {
            "debug": {"prompts": [asdict(d) for d in completion.details], "engine": engine, "fingerprint": info.fingerprint}
        }

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
            if clock and now - clock > self.server.request_timeout and not (streaming and events):
                job.engine.check_silence(self.server.request_timeout * 0.9)
                raise ApiError(504, f"No answer within {self.server.request_timeout:g} s (--request-timeout).", code="timeout")
            for event in merge(events):
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Started):
                    completion.start(event)
                    clock = clock or now
                elif isinstance(event, Details):
                    completion.details.append(event)
                elif isinstance(event, Delta):
                    self.first_delta = self.first_delta or now
                    left -= event.finish is not None
                    yield completion.add(event)
                    clock = time.monotonic() if streaming else clock  # what the client took to read is not the engine's

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

    # ── POST routes that ask the engine without generating ──

    def ask(self, name: str, **arguments: Any) -> Any:
        """One call to the engine."""
        client = self.client()
        job = self.submit(lambda engine: engine.call(name, arguments, client))
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

    # ── the operator's routes ──

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
            life = models.lives.get(self.model.id)
            progress = 1.0 if status == "loaded" else round(life.progress, 3) if life else 0.0
            event = sse(self.load_event(status) | {"progress": progress})
            if not self.streaming:
                self.begin_stream(event)
            elif event != told:
                self.write(self.framed(event))
            told = event
            if status == "loaded":
                self.write(self.framed(DONE))
                return self.end_stream()
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

    def post_embeddings(self) -> None:
        values = self.read(EMBEDDINGS)
        prompts = require(values, "input", EMBEDDINGS)
        if not self.server.models.spec(self.model).embeddings:
            raise ApiError(
                400,
                f"Start the server with --embeddings (engines: {', '.join(WITH_EMBEDDINGS)}).",
                "model",
                "unsupported_parameter",
            )
        answer = self.ask("embed", prompts=prompts)
        data = [embedding(i, vector, values) for i, vector in enumerate(answer["vectors"])]
        usage = {"prompt_tokens": answer["tokens"], "total_tokens": answer["tokens"]}
        self.reply(200, {"object": "list", "data": data, "model": self.model_name(values), "usage": usage})

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


def piece_json(piece: bytes) -> str | list[int]:
    """llama-server's rule: a string, or the bytes where they are half a character."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def embedding(index: int, vector: list[float], values: dict[str, Any]) -> dict[str, Any]:
    """One row of the embeddings reply; base64 is what the official SDK asks for."""
    wanted = values.get("dimensions", len(vector))
    if wanted > len(vector):
        raise ApiError(400, f"'dimensions' must be at most {len(vector)} for this model.", "dimensions")
    if wanted < len(vector):
        vector = vector[:wanted]
        length = sum(x * x for x in vector) ** 0.5 or 1.0
        vector = [x / length for x in vector]
    packed = (
        base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        if values.get("encoding_format") == "base64"
        else vector
    )
    return {"object": "embedding", "index": index, "embedding": packed}


Action = Callable[..., None]
ROUTES: dict[str, dict[str, Action]] = {  # each also under /v1; 404, 405 and Allow follow from it
    "/": {"GET": Handler.get_root},
    "/health": {"GET": Handler.get_health},
    "/healthz": {"GET": Handler.get_healthz},
    "/models": {"GET": Handler.get_models},
    "/models/{id}": {"GET": Handler.get_model},
    "/capabilities": {"GET": Handler.get_capabilities},
    "/tokenizer_info": {"GET": Handler.get_tokenizer_info},
    "/models/load": {"POST": Handler.post_load},
    "/models/unload": {"POST": Handler.post_unload},
    "/chat/completions": {"POST": Handler.post_chat_completions},
    "/completions": {"POST": Handler.post_completions},
    "/embeddings": {"POST": Handler.post_embeddings},
    "/tokenize": {"POST": Handler.post_tokenize},
    "/detokenize": {"POST": Handler.post_detokenize},
    "/apply-template": {"POST": Handler.post_apply_template},
}
OPERATORS = {Handler.post_load, Handler.post_unload}  # only with --admin
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
        strict: bool = False,
        record: str = "",
        profile: Profile | None = None,
        admin: str | None = None,
    ):
        self.profile = profile or Profile()
        self.admin = admin  # None: no operator's routes; "": for whoever may use the others; else their key
        self.models, self.api_key, self.request_timeout, self.max_body = models, api_key, request_timeout, max_body
        self.strict, self.record, self.record_lock = strict, record, threading.Lock()
        self.draining = False
        self.busy = Busy()
        self.ignored_seen: set[str] = set()
        self.listing: tuple[Any, bytes] = (None, b"")  # of GET /v1/models: what it was made from, and its JSON
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

    def get_request(self) -> tuple[Any, Any]:
        try:
            request: tuple[Any, Any] = super().get_request()
            return request
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.05)  # no file numbers left: the connection stays in the backlog, and we do not spin
            raise

    def note_ignored(self, names: list[str]) -> None:
        for name in (name[:64] for name in names):
            if name not in self.ignored_seen and len(self.ignored_seen) < 1000:
                self.ignored_seen.add(name)
                log.warning("request field %.64r is unknown and ignored (said once)", name)

    def note_request(self, path: str, body: bytes, request_id: str, completion: Completion, debug: dict[str, Any]) -> None:
        """--record: one line of JSON per answered request, enough for examples/replay.py to run it again."""
        if not self.record:
            return
        answers = [{"text": "".join(choice.text), "finish_reason": choice.finish} for choice in completion.choices]
        line = {
            "time": completion.created,
            "request_id": request_id,
            "id": completion.id,
            "path": path,
            "body": parse_json(body),
        }
        data = compact(line | debug | {"usage": completion.usage(), "choices": answers}) + b"\n"
        try:
            with self.record_lock, open(self.record, "ab") as f:
                f.write(data)
        except OSError as error:
            log.error("--record %s: %s", self.record, error)

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
        help="defaults as another server's users know them (README has the table); each is a flag of its own")  # fmt: skip
    add("-H", "--host", help="address to listen on; 0.0.0.0: all; default: the profile's (localhost)")
    add("-p", "--port", type=model_init.whole(0, 65535), help="port, 0: any free one; default: the profile's (8000)")
    add("--strict", action="store_true", help="refuse request fields that nobody knows, instead of ignoring them")
    add("--record", default="", metavar="FILE", help="append every answered request to FILE, for examples/replay.py")
    add("--grace", type=model_init.seconds, default=10.0, metavar="S",
        help="seconds that running answers get when the server is stopped (default 10)")  # fmt: skip
    add("--log-level", default="INFO", type=str.upper, choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
    add("--version", action="version", version=VERSION)
    model_init.add_args(parser)
    add = parser.add_argument_group("security").add_argument
    add("--api-key", default=os.environ.get("API_KEY", ""), metavar="KEY",
        help="ask clients for this key; default: the environment's API_KEY, else none")  # fmt: skip
    add("--admin", action="store_true", help="also serve /v1/models/load and /v1/models/unload")
    add("--admin-key", metavar="KEY", help="the same, for those who send this key")
    return parser


def banner(server: Server, engine: AnyEngine) -> str:
    info = engine.info
    assert info is not None
    name = info.model or next((life.model.id for life in server.models.lives.values() if life.engine is engine), "")
    inside = f", {info.threads} threads" if info.threads else ""
    cache = f", context {info.context} tokens, KV cache {info.cache_tokens} tokens" if info.cache_tokens else ""
    return f"""
  {name}
  {info.library}{inside}, {info.slots} slots{cache}
{listening(server)}"""


def listening(server: Server) -> str:
    host, port = str(server.server_address[0]), server.server_port
    url = f"http://{'localhost' if host in ('0.0.0.0', '::', '127.0.0.1') else host}:{port}"
    stream = ',"stream":false' if server.profile.stream else ""
    names = list(server.models.catalog.models().values())
    asked = names and (len(names) > 1 or server.models.limits.absent == "refuse")
    model = f'"model":"{server.models.catalog.public(names[0])}",' if asked else ""
    return f"""\
  listening on {url}  (OpenAI base_url: {url}/v1)

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{{model}"messages":[{{"role":"user","content":"What is the capital of France?"}}]{stream}}}'
"""


class Service:
    """Start-up and shut-down, in their order."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.exit_code, self.greeted, self.stopping = args, 0, False, False
        self.models = model_init.init(args)
        profile = model_init.profile_of(args)
        try:
            self.server = Server(
                (profile.host, profile.port),
                self.models,
                api_key=args.api_key,
                request_timeout=args.request_timeout,
                strict=args.strict,
                record=args.record,
                profile=profile,
                admin=args.admin_key or ("" if args.admin else None),
            )
        except OSError as error:
            raise UsageError(f"cannot listen on {profile.host}:{profile.port}: {error.strerror or error}") from None
        self.models.on_ready, self.models.on_progress, self.models.on_fatal = self.ready, self.progress, self.fatal

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        log.info("listening on port %d", self.server.server_address[1])
        self.models.preload(["none"] if self.args.preload == "none" else model_init.preloaded(self.args))
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
        if not self.greeted:
            self.greeted = True
            print(banner(self.server, engine), flush=True)

    def progress(self, fraction: float) -> None:
        if sys.stderr.isatty():
            print(f"\rloading {fraction:4.0%}", end="\n" if fraction >= 1 else "", file=sys.stderr, flush=True)

    def fatal(self, reason: str) -> None:
        print(f"openai_api_endpoint.py: {reason}", file=sys.stderr, flush=True)
        self.exit_code = 1
        threading.Thread(target=self.server.shutdown).start()

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
