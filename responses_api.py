"""/v1/responses as a translation: no socket, no engine, no sampling of its own.

  body ─ RESPONSES ─► values ─ Turn ─► the body of a chat request, which is validated as such; deltas ─ Answer ─► items, events

An item is JSON as clients send and get it: {"type", "id", …}. What is given is brought into the shape in which it is listed and
stored, and only that shape is turned into chat messages, so that a conversation that is continued by id, by reference or by
sending everything again makes the same prompt.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from api_errors import ApiError
from api_reply import CHAT_SHAPE, DONE, Completion, Part, chat_logprobs, compact, sse
from api_request import (
    ANYTHING,
    BIG,
    BOOLEAN,
    CHAT,
    FUNCTION_KEYS,
    GENERATION,
    NAME,
    STRING,
    Field,
    Kind,
    check,
    integer,
    never,
    one_of,
    read_boolean,
    refuse_indirect,
    same_value,
)
from constraints import Unsupported
from engine import Delta
from lark_syntax import lark_regex

Json = dict[str, Any]
SHAPE = CHAT_SHAPE._replace(prefix="resp_")
PREFIXES = {  # of the ids of items
    "message": "msg_", "reasoning": "rs_", "function_call": "fc_", "function_call_output": "fco_",
    "custom_tool_call": "ctc_", "custom_tool_call_output": "ctco_",
}  # fmt: skip


def new_id(kind: str) -> str:
    return PREFIXES[kind] + uuid.uuid4().hex


def bad(where: str, says: str) -> ApiError:
    return ApiError(400, f"'{where}' {says}.", where)


# ───────────────────────────────────────────────── items, as given ───────────────────────────────────────────────


def read_input(value: Any) -> list[Json]:
    """A string, or items, in the shape in which they are listed; references are still to be resolved."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise bad("input", "must be a string or an array of items")
    return [read_item(item, f"input[{i}]") for i, item in enumerate(value)]


def read_item(item: Any, where: str) -> Json:
    if not isinstance(item, dict):
        raise bad(where, "must be an object with a type")
    kind = item.get("type") or ("message" if "role" in item else "item_reference" if "id" in item else None)
    if kind not in READERS:
        raise bad(f"{where}.type", f"must be one of {', '.join(READERS)}: this server has no items of type {kind!r:.60}")
    read: Json = READERS[kind](item, where)
    given = item.get("id")
    if given is not None and not (isinstance(given, str) and 0 < len(given) <= 256):
        raise bad(f"{where}.id", "must be a string of 1 to 256 characters")
    return {"type": kind, "id": given or (new_id(kind) if kind in PREFIXES else given), **read}


def text_member(item: Json, name: str, where: str, most: int | None = None) -> str:
    value = item.get(name)
    if not isinstance(value, str) or (most and not 0 < len(value) <= most):
        raise bad(f"{where}.{name}", f"must be a string of 1 to {most} characters" if most else "must be a string")
    return value


def read_parts(content: Any, where: str, kind: str) -> list[Json]:
    """Content as parts of text. `kind`: what its text is called, "input_text" or "output_text"."""
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list):
        raise bad(where, "must be a string or an array of parts")
    return [read_part(part, f"{where}[{i}]", kind) for i, part in enumerate(content)]


def read_part(part: Any, where: str, kind: str) -> Json:
    if isinstance(part, dict) and part.get("type") == "refusal" and kind == "output_text":
        return {"type": "refusal", "refusal": text_member(part, "refusal", where)}
    if not isinstance(part, dict) or part.get("type") not in ("input_text", "output_text", "text"):
        found = part.get("type") if isinstance(part, dict) else None
        hint = f": this server has no parts of type {found!r:.60}" if isinstance(found, str) else ""
        raise bad(where, f'must be {{"type": "{kind}", "text": …}}{hint}')
    more: Json = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, "text": text_member(part, "text", where), **more}


def read_message(item: Json, where: str) -> Json:
    role = item.get("role")
    if role not in ("user", "assistant", "system", "developer"):
        raise bad(f"{where}.role", "must be user, assistant, system or developer")
    parts = read_parts(item.get("content"), f"{where}.content", "output_text" if role == "assistant" else "input_text")
    return {"status": "completed", "role": role, "content": parts}


def read_call(item: Json, where: str) -> Json:
    read = {"call_id": text_member(item, "call_id", where, 256), "name": text_member(item, "name", where, 256)}
    payload = "input" if item["type"] == "custom_tool_call" else "arguments"
    namespace = {"namespace": text_member(item, "namespace", where, 256)} if item.get("namespace") else {}
    return {**read, payload: text_member(item, payload, where), "status": "completed", **namespace}


def read_output(item: Json, where: str) -> Json:
    output = item.get("output")
    if not isinstance(output, str):
        output = read_parts(output, f"{where}.output", "input_text")
    return {"call_id": text_member(item, "call_id", where, 256), "output": output, "status": "completed"}


def read_reasoning(item: Json, where: str) -> Json:
    def texts(name: str, kind: str) -> list[Json]:
        parts = item.get(name) or []
        if not isinstance(parts, list) or not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
            raise bad(f"{where}.{name}", f'must be an array of {{"type": "{kind}", "text": …}}')
        return [{"type": kind, "text": part["text"]} for part in parts]

    read: Json = {"summary": texts("summary", "summary_text"), "content": texts("content", "reasoning_text")}
    if item.get("encrypted_content") is not None:
        read["encrypted_content"] = text_member(item, "encrypted_content", where)
    return read


def read_reference(item: Json, where: str) -> Json:
    text_member(item, "id", where, 256)
    return {}


READERS: dict[Any, Callable[[Json, str], Json]] = {
    "message": read_message,
    "function_call": read_call,
    "function_call_output": read_output,
    "custom_tool_call": read_call,
    "custom_tool_call_output": read_output,
    "reasoning": read_reasoning,
    "item_reference": read_reference,
}


PART_KEYS = dict.fromkeys(("type", "text", "refusal", "annotations", "logprobs", "prompt_cache_breakpoint"))
ITEM_KEYS: Json = {
    **dict.fromkeys(
        ("type", "id", "status", "role", "call_id", "name", "namespace", "arguments", "input", "encrypted_content")
    ),
    **dict.fromkeys(("content", "output", "summary"), PART_KEYS),
    **dict.fromkeys(("caller", "phase")),  # who called, and what a message was for: changes nothing
}


def text_of(parts: Any) -> str:
    return parts if isinstance(parts, str) else "".join(part.get("text", part.get("refusal", "")) for part in parts)


def seal(key: bytes, text: str) -> str:
    """Reasoning for the client to keep and send back: it can read it, and cannot make it."""
    data = text.encode("utf-8", "replace")
    return base64.urlsafe_b64encode(hmac.new(key, data, hashlib.sha256).digest() + data).decode()


def unseal(key: bytes, sealed: str) -> str | None:
    """None: this server has not sealed it."""
    try:
        data = base64.urlsafe_b64decode(sealed.encode())
    except ValueError:
        return None
    mac, data = data[:32], data[32:]
    return data.decode() if hmac.compare_digest(mac, hmac.new(key, data, hashlib.sha256).digest()) else None


# ──────────────────────────────────────────────── tools, as given ────────────────────────────────────────────────


class Tool(NamedTuple):
    """What the client knows a function of the chat request as."""

    kind: str  # "function" | "custom"
    name: str
    namespace: str = ""


def read_tools(value: Any) -> list[Json]:
    check(isinstance(value, list))
    return [read_tool(tool, f"tools[{i}]") for i, tool in enumerate(value)]


def read_tool(tool: Any, where: str) -> Json:
    """As it is told again in the response. What stands in a function is the chat request's to check."""
    if not isinstance(tool, dict) or not isinstance(tool.get("type"), str):
        raise bad(where, "must be an object with a type")
    if tool["type"] in OURS:
        refuse_indirect(tool, where)
    if tool["type"] == "function":
        text_member(tool, "name", where)
        return {"type": "function", **{name: tool.get(name) for name in ("name", "description", "parameters", "strict")}}
    if tool["type"] == "custom":
        text_member(tool, "name", where)
        form = tool.get("format") or {"type": "text"}
        if not isinstance(form, dict) or form.get("type") not in ("text", "grammar"):
            raise bad(f"{where}.format", 'must be {"type": "text"} or {"type": "grammar", "syntax", "definition"}')
        return {"type": "custom", "name": tool["name"], "description": tool.get("description"), "format": form}
    if tool["type"] == "namespace":
        inner = tool.get("tools")
        if not isinstance(inner, list):
            raise bad(f"{where}.tools", "must be an array of tools")
        tools = [read_tool(each, f"{where}.tools[{i}]") for i, each in enumerate(inner)]
        return {
            "type": "namespace",
            "name": text_member(tool, "name", where, 64),
            "description": tool.get("description") or "",
            "tools": tools,
        }
    return tool  # hosted: what becomes of it is the operator's choice


def tool_keys(tool: Json) -> Json | None:
    """What is read of a tool; nothing of a hosted one."""
    return TOOL_KEYS if tool.get("type") in OURS else None


OURS = ("function", "custom", "namespace")  # kinds of tools; the others are hosted
TOOL_KEYS: Json = {
    **FUNCTION_KEYS,
    **dict.fromkeys(("type", "defer_loading", "allowed_callers")),
    "format": dict.fromkeys(("type", "syntax", "definition")),
    "tools": tool_keys,
}
CHOICE_KEYS = dict.fromkeys(("type", "name", "namespace", "mode", "tools"))


def custom_function(tool: Json, where: str) -> Json:
    """A custom tool as a function with one argument, its input."""
    form, text = tool["format"], {"type": "string"}
    if form["type"] == "grammar":
        text["pattern"] = f"^(?:{input_regex(form, f'{where}.format')})$"
    schema = {"type": "object", "properties": {"input": text}, "required": ["input"], "additionalProperties": False}
    strict = {"strict": True} if "pattern" in text else {}
    return {"name": tool["name"], "description": tool["description"], "parameters": schema, **strict}


def input_regex(form: Json, where: str) -> str:
    definition = text_member(form, "definition", where)
    if form.get("syntax") == "regex":
        return definition
    if form.get("syntax") != "lark":
        raise bad(f"{where}.syntax", "must be lark or regex")
    try:
        return lark_regex(definition)
    except Unsupported as error:
        raise ApiError(
            400, f"'{where}.definition' cannot be honoured: {error}", f"{where}.definition", "unsupported_constraint"
        ) from None


def read_tool_choice(value: Any) -> Any:
    if isinstance(value, str):
        check(value in ("none", "auto", "required"))
        return value
    check(isinstance(value, dict) and value.get("type") in ("function", "custom", "allowed_tools"))
    if value["type"] != "allowed_tools":
        check(isinstance(value.get("name"), str))
        return value
    check(value.get("mode", "auto") in ("auto", "required") and isinstance(value.get("tools"), list))
    check(all(isinstance(tool, dict) and isinstance(tool.get("type"), str) for tool in value["tools"]))
    return {"type": "allowed_tools", "mode": value.get("mode", "auto"), "tools": value["tools"]}


# ────────────────────────────────────────────────── the table ────────────────────────────────────────────────────

INCLUDABLE = (  # the first two ask for something; the others are about hosted tools and images, of which there are none here
    "reasoning.encrypted_content", "message.output_text.logprobs", "file_search_call.results", "web_search_call.results",
    "web_search_call.action.sources", "message.input_image.image_url", "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)  # fmt: skip


def read_text(value: Any) -> Json:
    """{format, verbosity}, with the format as the response tells it again."""
    check(isinstance(value, dict) and set(value) <= {"format", "verbosity"})
    if value.get("verbosity") not in (None, "medium"):
        raise ApiError(400, "'text.verbosity' can only be medium here.", "text.verbosity", "unsupported_parameter")
    form = value.get("format") or {"type": "text"}
    check(isinstance(form, dict))
    if form.get("type") != "json_schema":
        return {"format": form}
    if not isinstance(form.get("schema"), (dict, bool)):
        raise ApiError(400, "'text.format.schema' must be a JSON Schema.", "text.format.schema")
    more = {"description": form.get("description"), "strict": bool(form.get("strict"))}
    return {"format": {"type": "json_schema", "name": form.get("name") or "response", "schema": form["schema"], **more}}


def read_reasoning_options(value: Any) -> Json:
    check(isinstance(value, dict) and set(value) <= {"effort", "summary", "generate_summary", "context", "mode"})
    for name in ("summary", "generate_summary"):
        if value.get(name) not in (None, "auto"):
            raise ApiError(
                400,
                f"'reasoning.{name}' can only be auto: reasoning is told as it is.",
                f"reasoning.{name}",
                "unsupported_parameter",
            )
    for name, free in (("context", "auto"), ("mode", "standard")):
        if value.get(name) not in (None, free):
            raise ApiError(400, f"'reasoning.{name}' can only be {free}.", f"reasoning.{name}", "unsupported_parameter")
    return {"effort": value.get("effort"), "summary": value.get("summary") or value.get("generate_summary")}


def read_metadata(value: Any) -> Json:
    check(isinstance(value, dict) and len(value) <= 16)
    check(all(len(name) <= 64 and isinstance(item, str) and len(item) <= 512 for name, item in value.items()))
    return dict(value)


def read_include(value: Any) -> list[str]:
    check(isinstance(value, list) and all(item in INCLUDABLE for item in value))
    return list(value)


def read_stream_options(value: Any) -> None:
    check(isinstance(value, dict) and set(value) <= {"include_obfuscation"})
    check(not read_boolean(value.get("include_obfuscation") or False))


METADATA = Kind("an object of up to 16 strings of up to 512 characters, with names of up to 64", read_metadata)
TEXT = Kind(
    'an object like {"format": {"type": "json_schema", "name", "schema"}}',
    read_text,
    {"verbosity": None, "format": dict.fromkeys(("type", "name", "description", "schema", "strict"))},
)
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed",
    "chat_template_kwargs",
)  # fmt: skip
RESPONSES = {
    "model": GENERATION["model"],
    "input": Field(Kind("a string or an array of items", read_input, ITEM_KEYS), "what is said: text, or messages, calls, their outputs, reasoning, references"),
    "instructions": Field(STRING, "a system message that comes first, for this response only"),
    "previous_response_id": Field(NAME, "go on from that response: what was given to it and what it said come first"),
    "store": Field(BOOLEAN, "keep the response, to be fetched or continued; default true"),
    "stream": GENERATION["stream"],
    "stream_options": Field(Kind('{"include_obfuscation": false}', read_stream_options), "nothing is padded"),
    **{name: CHAT[name] for name in SAMPLING},
    "max_output_tokens": Field(integer(1, BIG), "most tokens to generate, reasoning included; default: what the context has left"),
    "text": Field(TEXT, "`format`: text, any JSON object, or JSON that satisfies a schema"),
    "reasoning": Field(
        Kind('an object like {"effort": "low"}', read_reasoning_options), "`effort`: how much the model reasons, where its template has a switch"
    ),
    "tools": Field(Kind("an array of tools", read_tools, tool_keys), "functions, custom tools (their input text, or by a regex or a lark grammar), and namespaces of them", CHAT["tools"].needs, ([],)),
    "tool_choice": Field(
        Kind('none, auto, required, {"type": "function", "name": …}, {"type": "custom", "name": …} or {"type": "allowed_tools", "mode", "tools"}', read_tool_choice, CHOICE_KEYS),
        "whether a tool must be called, and which may be", CHAT["tool_choice"].needs, ("none", "auto"),
    ),
    "parallel_tool_calls": Field(BOOLEAN, "several calls in one answer; default true", CHAT["parallel_tool_calls"].needs, CHAT["parallel_tool_calls"].free),
    "max_tool_calls": Field(integer(1, BIG), "counts calls of hosted tools, of which there are none"),
    "top_logprobs": Field(integer(0, 20), "log probabilities of so many alternatives", "top_logprobs", (0,)),
    "include": Field(
        Kind(f"an array of {', '.join(INCLUDABLE)}", read_include),
        "`message.output_text.logprobs`; `reasoning.encrypted_content`: reasoning to be sent back where nothing is stored",
    ),
    "metadata": Field(METADATA, "kept with the response"),
    "client_metadata": Field(ANYTHING, "changes nothing"),
    "user": Field(STRING, "told again"),
    "safety_identifier": Field(STRING, "told again"),
    "prompt_cache_key": Field(STRING, "told again; what was prefilled is found by itself"),
    "prompt_cache_options": Field(ANYTHING, "changes nothing"),
    "service_tier": Field(STRING, "changes nothing"),
    "truncation": Field(one_of("disabled"), "what does not fit into the context is refused"),
    "background": Field(BOOLEAN, "answer at once, and go on while the client is away; only with `store`"),
    "conversation": never(),
    "prompt": never(),
    "context_management": never([]),
    "moderation": never(),
}  # fmt: skip
COUNTED = (
    "model",
    "input",
    "instructions",
    "previous_response_id",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "text",
    "reasoning",
    "truncation",
    "chat_template_kwargs",
)
BODIES = {"/responses": RESPONSES, "/responses/input_tokens": {name: RESPONSES[name] for name in COUNTED}}


# ──────────────────────────────────────────── a request, translated ──────────────────────────────────────────────


class Turn:
    """One request as the body of a chat request (`chat`), and what the answer has to say of it.

    `past`: the items of the conversation that it continues. `find`: an item that was stored, by its id. Raises ApiError.
    """

    def __init__(
        self, values: Json, past: list[Json], find: Callable[[str], Json | None], key: bytes, drop_hosted: bool = False
    ):
        self.values, self.key = values, key
        self.dropped: list[str] = []  # hosted tools that were left out
        self.tools: dict[str, Tool] = {}  # by their names in the chat request
        self.names: list[tuple[str, str]] = [  # the chat request's words → this one's
            ("response_format", "text.format"), ("max_tokens", "max_output_tokens"), ("reasoning_effort", "reasoning.effort"),
            ("prompt", "input"),
        ]  # fmt: skip
        self.given = [self.resolved(item, i, find) for i, item in enumerate(values.get("input", []))]
        self.functions = list(self.read_functions(drop_hosted))
        self.messages: list[Json] = []
        if values.get("instructions"):
            self.say("instructions", "system", values["instructions"])
        for item in past:
            self.add(item, "previous_response_id")
        for i, item in enumerate(self.given):
            self.add(item, f"input[{i}]")
        if not self.messages:
            raise ApiError(400, "'input' is required: a string or an array of items.", "input")
        self.names.append(("messages", "input"))
        self.chat = self.chat_body()

    def resolved(self, item: Json, i: int, find: Callable[[str], Json | None]) -> Json:
        if item["type"] != "item_reference":
            return item
        found = find(item["id"])
        if found is None:
            where = f"input[{i}].id"
            raise ApiError(404, f"'{where}': there is no item {item['id']!r:.80}; was it stored?", where, "item_not_found")
        return found

    # ── items → messages ──

    def say(self, where: str, role: str, content: str, **more: Any) -> Json:
        self.names.append((f"messages[{len(self.messages)}]", where))
        self.messages.append({"role": role, "content": content, **more})
        return self.messages[-1]

    def add(self, item: Json, where: str) -> None:
        """One item. Reasoning, text and calls that follow each other are one message of the assistant's."""
        kind = item["type"]
        last = self.messages[-1] if self.messages and self.messages[-1]["role"] == "assistant" else None
        if kind == "message" and item["role"] != "assistant":
            self.add_said(item["role"], text_of(item["content"]), where)
        elif kind == "message":
            if last is None or last["content"] or "tool_calls" in last:
                last = self.say(where, "assistant", "")
            last["content"] = text_of(item["content"])
        elif kind == "reasoning":
            if last is None or last["content"] or "tool_calls" in last:
                last = self.say(where, "assistant", "")
            last["reasoning_content"] = last.get("reasoning_content", "") + self.reasoning_of(item, where)
        elif kind in ("function_call", "custom_tool_call"):
            last = last or self.say(where, "assistant", "")
            last.setdefault("tool_calls", []).append(self.call_of(item))
        else:
            self.say(where, "tool", text_of(item["output"]), tool_call_id=item["call_id"])

    def add_said(self, role: str, text: str, where: str) -> None:
        """System and developer messages at the beginning become one: many templates know only the first."""
        first = self.messages[0] if len(self.messages) == 1 else None
        if role in ("system", "developer") and first and first["role"] in ("system", "developer"):
            first["role"] = role if role == first["role"] else "system"
            first["content"] += "\n\n" + text
        else:
            self.say(where, role, text)

    def reasoning_of(self, item: Json, where: str) -> str:
        sealed = item.get("encrypted_content")
        text = text_of(item.get("content") or ())
        if sealed is None or text:
            return text or text_of(item["summary"])
        opened = unseal(self.key, sealed)
        if opened is None:
            where += ".encrypted_content"
            raise ApiError(
                400, f"'{where}' was not made by this server: leave the item out.", where, "invalid_encrypted_content"
            )
        return opened

    def call_of(self, item: Json) -> Json:
        custom = item["type"] == "custom_tool_call"
        name = flat_name(item["name"], item.get("namespace", ""))
        arguments = json.dumps({"input": item["input"]}, ensure_ascii=False) if custom else item["arguments"]
        return {"id": item["call_id"], "type": "function", "function": {"name": name, "arguments": arguments}}

    # ── tools ──

    def read_functions(self, drop_hosted: bool) -> Iterator[Json]:
        kept = []
        for i, tool in enumerate(self.values.get("tools", ())):
            where = f"tools[{i}]"
            if tool["type"] in ("function", "custom"):
                yield self.function(tool, where)
            elif tool["type"] == "namespace":
                for j, inner in enumerate(tool["tools"]):
                    yield self.function(inner, f"{where}.tools[{j}]", tool["name"])
            elif drop_hosted:
                self.dropped.append(f"{where}.{tool['type']}")
                continue
            else:
                raise ApiError(
                    400,
                    f"'{where}': this server has no tool {tool['type']!r:.60} of its own. Leave it out, or start the server with "
                    "--hosted-tools drop.",
                    where,
                    "unsupported_tool",
                )
            kept.append(tool)
        self.values["tools"] = kept

    def function(self, tool: Json, where: str, namespace: str = "") -> Json:
        if tool["type"] not in ("function", "custom"):
            raise ApiError(400, f"'{where}' must be a function or a custom tool.", where, "unsupported_tool")
        function = custom_function(tool, where) if tool["type"] == "custom" else {**tool}
        function.pop("type", None)
        function["name"] = flat_name(tool["name"], namespace)
        self.names.append((f"tools[{len(self.tools)}].function", where))
        self.names.append((f"tools[{len(self.tools)}]", where))
        if function["name"] in self.tools:
            raise ApiError(400, f"'{where}' has the name {function['name']!r}, which another has already.", where)
        self.tools[function["name"]] = Tool(tool["type"], tool["name"], namespace)
        return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}

    def choice(self) -> Any:
        """`tool_choice`, as the chat request spells it."""
        choice = self.values["tool_choice"]
        if isinstance(choice, str):
            return choice
        if choice["type"] != "allowed_tools":
            return self.named(choice)
        allowed = [self.named(tool) for tool in choice["tools"] if tool["type"] in ("function", "custom")]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice["mode"], "tools": allowed}}

    def named(self, tool: Json) -> Json:
        return {"type": "function", "function": {"name": flat_name(str(tool.get("name")), tool.get("namespace") or "")}}

    # ── the whole ──

    def chat_body(self) -> Json:
        values = self.values
        chat: Json = {name: values[name] for name in ("model", "stream", *SAMPLING) if name in values}
        chat |= {"messages": self.messages, "max_tokens": values.get("max_output_tokens")}
        if self.functions:
            chat |= {"tools": self.functions, "parallel_tool_calls": values.get("parallel_tool_calls")}
        if "tool_choice" in values and (self.functions or not same_value(values["tool_choice"], "auto")):
            chat["tool_choice"] = self.choice()
        form = values.get("text", {}).get("format", {"type": "text"})
        if form["type"] == "json_schema":
            given = {name: form[name] for name in ("name", "description", "schema", "strict") if form[name] is not None}
            form = {"type": "json_schema", "json_schema": given}
        chat["response_format"] = form
        chat["reasoning_effort"] = values.get("reasoning", {}).get("effort")
        if values.get("top_logprobs") or self.wants("message.output_text.logprobs"):
            chat |= {"logprobs": True, "top_logprobs": values.get("top_logprobs", 0)}
        return chat

    def wants(self, name: str) -> bool:
        return name in self.values.get("include", ())

    def resource(self, id: str, model: str, created: int, defaults: dict[str, float]) -> Json:
        """A response that has just begun, with every member. `defaults`: the sampling where the request does not say."""
        values = self.values
        sampling = {name: values.get(name, defaults.get(name, 1.0)) for name in ("temperature", "top_p")}
        told = {name: values.get(name) for name in TOLD}
        return {
            "id": id,
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "background": bool(values.get("background")),
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "parallel_tool_calls": values.get("parallel_tool_calls", True),
            "presence_penalty": values.get("presence_penalty", 0.0),
            "frequency_penalty": values.get("frequency_penalty", 0.0),
            "reasoning": values.get("reasoning", {"effort": None, "summary": None}),
            "service_tier": "default",
            "store": values["store"],
            **sampling,
            "text": {"format": {"type": "text"}, "verbosity": "medium"} | values.get("text", {}),
            "tool_choice": values.get("tool_choice", "auto"),
            "tools": values["tools"],
            "top_logprobs": values.get("top_logprobs", 0),
            "truncation": "disabled",
            "usage": None,
            "metadata": values.get("metadata", {}),
            **told,
        }


TOLD = (  # as given, else null
    "instructions", "max_output_tokens", "max_tool_calls", "previous_response_id", "prompt_cache_key", "safety_identifier", "user",
)  # fmt: skip


def flat_name(name: str, namespace: str) -> str:
    """A tool's name in the chat request, whose functions have no namespaces."""
    return f"{namespace.rstrip('_')}__{name}" if namespace else name


# ────────────────────────────────────────────── an answer, translated ────────────────────────────────────────────

ERROR_CODES = {429: "rate_limit_exceeded", 400: "invalid_prompt"}  # of a response that has failed; else server_error


class Answer:
    """A completion told as a response: api_reply.Rendering. `keep` stores it, before anybody is told that it is complete."""

    def __init__(self, completion: Completion, turn: Turn, defaults: dict[str, float], keep: Callable[[Json], None]):
        self.completion, self.turn, self.keep = completion, turn, keep
        self.choice = completion.choices[0]
        self.base = turn.resource(completion.id, completion.model, completion.created, defaults)
        self.ids: list[str] = []  # of the items so far
        self.number = 0  # of the next event
        self.begun = 0  # items that have been announced
        self.around = (b"", b"")  # a piece of text of the item that is being told
        self.logprobs: list[Json] = []

    # ── items ──

    def tool(self, part: Part) -> Tool:
        return self.turn.tools.get(part.name, Tool("function", part.name))

    def kind(self, part: Part) -> str:
        if part.kind == "call":
            return "custom_tool_call" if self.tool(part).kind == "custom" else "function_call"
        return "message" if part.kind == "content" else "reasoning"

    def item(self, i: int, status: str) -> Json:
        """The item that a part is, as far as it has come: without its text where it has only begun."""
        part = self.choice.parts[i]
        kind, text = self.kind(part), "" if status == "in_progress" else part.text
        if i == len(self.ids):
            self.ids.append(new_id(kind))
        item: Json = {"type": kind, "id": self.ids[i], "status": status}
        if kind == "message":
            parts = [] if status == "in_progress" else [self.text_part(text)]
            return item | {"role": "assistant", "content": parts}
        if kind == "reasoning":
            content = [{"type": "reasoning_text", "text": text}] if text else []
            sealed = self.turn.wants("reasoning.encrypted_content") and status != "in_progress"
            return (
                item
                | {"summary": [], "content": content}
                | ({"encrypted_content": seal(self.turn.key, text)} if sealed else {})
            )
        tool = self.tool(part)
        payload = {"input": custom_input(text)} if tool.kind == "custom" else {"arguments": text}
        space = {"namespace": tool.namespace} if tool.namespace else {}
        return item | {"call_id": part.id, "name": tool.name, **payload, **space}

    def text_part(self, text: str) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    def items(self) -> list[Json]:
        parts = self.choice.parts
        if not parts:
            parts.append(Part("content"))  # it has said nothing
        last = "incomplete" if self.choice.finish in (None, "length") else "completed"
        return [self.item(i, "completed" if i < len(parts) - 1 else last) for i in range(len(parts))]

    def finished(self) -> Json:
        """The whole response, stored."""
        cut = self.choice.finish == "length"
        response = self.base | {
            "status": "incomplete" if cut else "completed",
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self.items(),
            "usage": self.usage(),
        }
        self.keep(response)
        return response

    def usage(self) -> Json:
        done = self.completion
        return {
            "input_tokens": done.prompt_tokens,
            "input_tokens_details": {"cached_tokens": done.cached_tokens or 0, "cache_write_tokens": 0},
            "output_tokens": done.tokens,
            "output_tokens_details": {"reasoning_tokens": done.reasoning_tokens},
            "total_tokens": done.prompt_tokens + done.tokens,
        }

    def whole(self, debug: Json) -> Json:
        self.logprobs = chat_logprobs(self.choice, self.choice.logprobs)["content"] if self.completion.logprobs else []
        return self.finished() | debug

    # ── events ──

    def event(self, kind: str, **members: Any) -> bytes:
        self.number += 1
        return sse({"type": kind, "sequence_number": self.number - 1, **members}, kind)

    def at(self) -> Json:
        """Where the item that is being told stands."""
        return {"item_id": self.ids[self.begun - 1], "output_index": self.begun - 1}

    def opening(self) -> bytes:
        return self.event("response.created", response=self.base) + self.event("response.in_progress", response=self.base)

    def delta(self, delta: Delta) -> bytes:
        out = b""
        if delta.finish and not self.choice.parts:
            self.choice.parts.append(Part("content"))
        if len(self.choice.parts) > self.begun:
            out = (self.close("completed") if self.begun else b"") + self.begin()
        entries = []
        if delta.logprobs and self.completion.logprobs and delta.kind == "content":
            entries = chat_logprobs(self.choice, delta.logprobs)["content"]
            self.logprobs = self.logprobs + entries
        if (delta.text and delta.kind != "call" or entries) and self.around[0]:
            out += self.piece(delta.text, entries)
        if delta.finish:
            out += self.close("incomplete" if delta.finish == "length" else "completed")
        return out

    def begin(self) -> bytes:
        """An item that has just come up."""
        self.begun += 1
        part = self.choice.parts[self.begun - 1]
        out = self.event(
            "response.output_item.added", output_index=self.begun - 1, item=self.item(self.begun - 1, "in_progress")
        )
        kind, content = self.kind(part), {}
        if kind in ("message", "reasoning"):
            content = {"content_index": 0}
            empty = self.text_part("") if kind == "message" else {"type": "reasoning_text", "text": ""}
            out += self.event(
                "response.content_part.added",
                **self.at(),
                **content,
                part=empty | ({"logprobs": []} if kind == "message" else {}),
            )
        name = DELTAS[kind]
        head = compact({"type": name, **self.at(), **content})[:-1] + b',"delta":'
        self.around = (b"event: %s\ndata: %s" % (name.encode(), head), b',"sequence_number":%d}\n\n')
        if kind == "custom_tool_call":
            self.around = (b"", b"")  # its input stands in JSON, and is told once that is whole
        return out

    def piece(self, text: str, entries: list[Json]) -> bytes:
        before, after = self.around
        self.number += 1
        logprobs = b',"logprobs":%s' % compact(entries) if self.choice.parts[self.begun - 1].kind == "content" else b""
        return before + compact(text) + logprobs + after % (self.number - 1)

    def close(self, status: str) -> bytes:
        """The end of the item that is being told."""
        item = self.item(self.begun - 1, status)
        kind, at, out = item["type"], self.at(), b""
        if kind == "message":
            part = item["content"][0]
            at["content_index"] = 0
            out = self.event("response.output_text.done", **at, text=part["text"], logprobs=self.logprobs)
            out += self.event("response.content_part.done", **at, part=part)
        elif kind == "reasoning":
            part = {"type": "reasoning_text", "text": text_of(item["content"])}
            at["content_index"] = 0
            out = self.event("response.reasoning_text.done", **at, text=part["text"])
            out += self.event("response.content_part.done", **at, part=part)
        elif kind == "function_call":
            out = self.event("response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
        else:
            out = self.event(DELTAS[kind], **at, delta=item["input"]) if item["input"] else b""
            out += self.event("response.custom_tool_call_input.done", **at, input=item["input"])
        return out + self.event("response.output_item.done", output_index=self.begun - 1, item=item)

    def end(self, debug: Json) -> bytes:
        response = self.finished()
        return self.event(f"response.{response['status']}", response=response | debug) + DONE

    def waiting(self) -> Json:
        """The response before the engine has taken it, stored: for one that is made in the background."""
        self.base["status"] = "queued"
        self.keep(self.base)
        return self.base

    def begun_in_background(self) -> None:
        self.base["status"] = "in_progress"
        self.keep(self.base)

    def cancelled(self) -> bytes:
        output = self.items() if self.choice.parts else []
        self.keep(self.base | {"status": "cancelled", "output": output, "usage": self.usage()})
        return DONE

    def failed(self, error: ApiError) -> bytes:
        told = {"code": ERROR_CODES.get(error.status, "server_error"), "message": error.message}
        output = self.items() if self.choice.parts else []
        response = self.base | {"status": "failed", "error": told, "output": output, "usage": self.usage()}
        self.keep(response)
        return self.event("response.failed", response=response) + DONE


def split_events(data: bytes) -> list[bytes]:
    """A stream's events one by one, without its [DONE]."""
    return [event + b"\n\n" for event in data.removesuffix(DONE).split(b"\n\n") if event]


DELTAS = {
    "message": "response.output_text.delta",
    "reasoning": "response.reasoning_text.delta",
    "function_call": "response.function_call_arguments.delta",
    "custom_tool_call": "response.custom_tool_call_input.delta",
}


def custom_input(arguments: str) -> str:
    """A custom tool's input out of its function's arguments; as it stands where they are not whole."""
    try:
        value = json.loads(arguments)["input"]
    except (ValueError, KeyError, TypeError):
        return arguments
    return value if isinstance(value, str) else arguments


# ─────────────────────────────────────────────────── lists ───────────────────────────────────────────────────────


def page(items: list[Json], query: dict[str, str]) -> Json:
    """One page of a response's input items, as `order`, `limit` and `after` ask for."""
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after", "")
    if order not in ("asc", "desc"):
        raise bad("order", "must be asc or desc")
    if not limit.isdecimal() or not 1 <= int(limit) <= 100:
        raise bad("limit", "must be an integer from 1 to 100")
    items = items if order == "asc" else items[::-1]
    if after:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise bad("after", f"names no item of this response: {after[:80]!r}")
        items = items[ids.index(after) + 1 :]
    shown = items[: int(limit)]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {"first_id": None, "last_id": None}
    return {"object": "list", "data": shown, **ends, "has_more": len(items) > len(shown)}
