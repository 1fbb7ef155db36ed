"""/v1/messages, Anthropic's, as a translation: no socket, no engine, no sampling of its own.

  body ─ MESSAGES ─► values ─ Turn ─► the body of a chat request, which is validated as such; deltas ─ Answer ─► blocks, events

Nothing is moved to another place on the way, and what changes from request to request without meaning anything is left out: the
prompt of a conversation that goes on begins with the prompt that it had before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from typing import Any

from api_errors import ApiError
from api_reply import CHAT_SHAPE, Completion, Part, compact, sse
from api_request import ANYTHING, BIG, CHAT, GENERATION, Field, Kind, check, integer, never, one_of, parse_json, refuse_indirect
from engine import Delta

Json = dict[str, Any]
SHAPE = CHAT_SHAPE._replace(prefix="msg_")

# ──────────────────────────────────────────────────── errors ─────────────────────────────────────────────────────

ERROR_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 405: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def error_body(error: ApiError, request_id: str) -> Json:
    """Anthropic's shape. What it has no member for, the field to blame, stands in the sentence."""
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    told: Json = {"type": ERROR_TYPES.get(error.status, other), "message": error.message}
    told |= {name: value for name, value in error.more.items() if name == "details"}
    return {"type": "error", "error": told, "request_id": request_id or None}


def error_status(error: ApiError) -> int:
    """202 is no error of HTTP's, and Anthropic's clients would take it for a message."""
    return 503 if error.status == 202 else error.status


# ──────────────────────────────────────────────── blocks, as given ───────────────────────────────────────────────


def bad(where: str, says: str) -> ApiError:
    return ApiError(400, f"'{where}' {says}.", where)


def read_blocks(content: Any, where: str, kinds: tuple[str, ...]) -> list[Json]:
    """A string or blocks, as blocks of the given kinds."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise bad(where, "must be a string or an array of blocks")
    return [read_block(block, f"{where}[{i}]", kinds) for i, block in enumerate(content)]


def read_block(block: Any, where: str, kinds: tuple[str, ...]) -> Json:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind not in kinds:
        hint = f": this server has no {kind!r:.60} here" if isinstance(kind, str) else ""
        raise bad(where, f"must be a block of type {' or '.join(kinds)}{hint}")
    for name in MEMBERS[kind]:
        if not isinstance(block.get(name), str):
            raise bad(f"{where}.{name}", "must be a string")
    if kind == "tool_use" and not isinstance(block.get("input"), dict):
        raise bad(f"{where}.input", "must be an object")
    if kind == "tool_result":
        given = block.get("content")
        return {**block, "content": read_blocks("" if given is None else given, f"{where}.content", ("text",))}
    return dict(block)


MEMBERS = {  # that are strings
    "text": ("text",), "tool_use": ("id", "name"), "tool_result": ("tool_use_id",), "thinking": ("thinking",),
    "redacted_thinking": ("data",),
}  # fmt: skip
MORE = ("type", "cache_control")  # that every block may have; the latter changes nothing, what can be reused is
TEXT_KEYS = dict.fromkeys((*MORE, "text"))
BLOCK_KEYS = {kind: dict.fromkeys((*MORE, *members)) for kind, members in MEMBERS.items()} | {
    "tool_use": dict.fromkeys((*MORE, "id", "name", "input", "caller")),  # the last says who called, which is the model here
    "tool_result": {**dict.fromkeys((*MORE, "tool_use_id", "is_error")), "content": TEXT_KEYS},
    "thinking": dict.fromkeys((*MORE, "thinking", "signature")),
}
KINDS = {  # of blocks, by role
    "user": ("text", "tool_result"), "system": ("text",), "assistant": ("text", "tool_use", "thinking", "redacted_thinking"),
}  # fmt: skip


def block_keys(block: Json) -> Json | None:
    return BLOCK_KEYS.get(str(block.get("type")))


def read_messages(value: Any) -> list[Json]:
    check(isinstance(value, list) and bool(value))
    return [read_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def read_message(message: Any, where: str) -> Json:
    if not isinstance(message, dict) or message.get("role") not in KINDS:
        raise bad(f"{where}.role", f"must be one of {', '.join(KINDS)}")
    role = message["role"]
    return {"role": role, "content": read_blocks(message.get("content"), f"{where}.content", KINDS[role])}


def read_system(value: Any) -> list[Json]:
    return read_blocks(value, "system", ("text",))


def text_of(blocks: list[Json]) -> str:
    return "".join(block["text"] for block in blocks if block["type"] == "text")


BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n?")  # Claude Code's; its cch= changes with every request


def system_text(blocks: list[Json]) -> str:
    """Blocks are paragraphs. The line that Claude Code puts there for Anthropic's billing is not for the model."""
    texts = (BILLING.sub("", block["text"], count=1) if BILLING.match(block["text"]) else block["text"] for block in blocks)
    return "\n\n".join(text for text in texts if text)


# ──────────────────────────────────────────────── other fields ───────────────────────────────────────────────────


def read_stops(value: Any) -> list[str]:
    check(isinstance(value, list) and len(value) <= 16 and all(isinstance(s, str) and 0 < len(s) <= 256 for s in value))
    return list(value)


def read_tools(value: Any) -> list[Json]:
    check(isinstance(value, list))
    for i, tool in enumerate(value):
        where = f"tools[{i}]"
        if not isinstance(tool, dict):
            raise bad(where, "must be an object with name and input_schema")
        if tool.get("type") not in (None, "custom"):
            raise ApiError(
                400,
                f"'{where}': this server has no tool {tool['type']!r:.60} of its own: leave it out.",
                where,
                "unsupported_tool",
            )
        if not isinstance(tool.get("input_schema"), dict):
            raise bad(f"{where}.input_schema", "must be a JSON Schema")
        refuse_indirect(tool, where)
    return list(value)


def read_tool_choice(value: Any) -> Json:
    check(isinstance(value, dict) and value.get("type") in ("auto", "any", "none", "tool"))
    check(isinstance(value.get("disable_parallel_tool_use", False), bool))
    check(value["type"] != "tool" or isinstance(value.get("name"), str))
    return dict(value)


def read_thinking(value: Any) -> Json:
    check(isinstance(value, dict) and value.get("type") in ("disabled", "adaptive", "enabled"))
    if value["type"] == "enabled":
        value = value | {"budget_tokens": integer(1, BIG).read(value.get("budget_tokens"))}
    if value.get("display") not in (None, "summarized"):
        raise ApiError(400, "'thinking.display' can only be summarized: thinking is told as it is.", "thinking.display")
    return dict(value)


def read_output_config(value: Any) -> Json:
    check(isinstance(value, dict) and set(value) <= {"effort", "format"})
    check(value.get("effort") in (None, "low", "medium", "high", "xhigh", "max"))
    read_format(value.get("format"))
    return dict(value)


def read_format(value: Any) -> Json | None:
    if value is not None:
        check(isinstance(value, dict) and value.get("type") == "json_schema" and isinstance(value.get("schema"), (dict, bool)))
    return value if value is None else dict(value)


def read_context_management(value: Any) -> list[Json]:
    """The edits. Clearing thinking of earlier turns can be done here; what depends on counted tokens cannot."""
    check(isinstance(value, dict) and isinstance(value.get("edits", []), list))
    for i, edit in enumerate(value.get("edits", [])):
        where = f"context_management.edits[{i}]"
        if not isinstance(edit, dict) or edit.get("type") != "clear_thinking_20251015":
            raise ApiError(400, f"'{where}' can only be clear_thinking_20251015 here.", where, "unsupported_parameter")
        keep = edit.get("keep", {"type": "thinking_turns", "value": 1})
        turns = keep.get("value") if isinstance(keep, dict) and keep.get("type") == "thinking_turns" else None
        if keep not in ("all", {"type": "all"}) and not (isinstance(turns, int) and not isinstance(turns, bool) and turns > 0):
            raise bad(f"{where}.keep", 'must be "all" or {"type": "thinking_turns", "value": 1 or more}')
    return list(value.get("edits", []))


def read_metadata(value: Any) -> Json:
    check(isinstance(value, dict) and isinstance(value.get("user_id", ""), (str, type(None))))
    return dict(value)


def read_thread(_: Any) -> None:
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    raise ApiError(
        400, "'thread' is not built: send the whole conversation.", "thread", "unsupported_parameter", details=details
    )


FORMAT = Kind('{"type": "json_schema", "schema": …}', read_format, dict.fromkeys(("type", "schema")))
TOOL_KEYS = dict.fromkeys((*MORE, "name", "description", "input_schema", "strict", "defer_loading", "allowed_callers"))
TOOL_KEYS["eager_input_streaming"] = None  # changes nothing: arguments come as they are made
CONTENT = "text, tool_use, tool_result, thinking"
MESSAGES = {
    "model": GENERATION["model"],
    "max_tokens": Field(integer(1, BIG), "required: most tokens to generate; more than the context has left is cut down to that"),
    "messages": Field(Kind("a non-empty array of {role, content}", read_messages, {"role": None, "content": block_keys}), f"the conversation; roles user, assistant, system; blocks {CONTENT}"),
    "system": Field(Kind("a string or an array of text blocks", read_system, TEXT_KEYS), "the system prompt; its blocks are paragraphs"),
    "stop_sequences": Field(Kind("an array of up to 16 strings of 1 to 256 characters", read_stops), "end before one of these, which `stop_sequence` tells"),
    "stream": GENERATION["stream"],
    "temperature": CHAT["temperature"],
    "top_p": CHAT["top_p"],
    "top_k": CHAT["top_k"],
    "tools": Field(Kind("an array of {name, description, input_schema}", read_tools, TOOL_KEYS), "what the model may call", CHAT["tools"].needs, ([],)),
    "tool_choice": Field(
        Kind('{"type": "auto" or "any" or "none" or "tool", "name", "disable_parallel_tool_use"}', read_tool_choice, dict.fromkeys(("type", "name", "disable_parallel_tool_use"))),
        "whether a tool must be called, which, and whether several may be", CHAT["tool_choice"].needs, ({"type": "auto"}, {"type": "none"}),
    ),
    "thinking": Field(
        Kind('{"type": "disabled"}, {"type": "adaptive"} or {"type": "enabled", "budget_tokens": …}', read_thinking, dict.fromkeys(("type", "budget_tokens", "display"))),
        "whether the model reasons, where its template has a switch, and at most how long",
    ),
    "output_config": Field(Kind('an object like {"effort": "low", "format": {"type": "json_schema", "schema": …}}', read_output_config, {"effort": None, "format": FORMAT.keys}), "how much it reasons; JSON that satisfies a schema"),
    "output_format": Field(FORMAT, "the older place of `output_config.format`"),
    "context_management": Field(Kind('an object like {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}', read_context_management, {"edits": dict.fromkeys(("type", "keep"))}), "leave out the thinking of earlier turns"),
    "metadata": Field(Kind('an object like {"user_id": "…"}', read_metadata, {"user_id": None}), "changes nothing"),
    "cache_control": Field(ANYTHING, "here and in blocks: changes nothing, what was prefilled is found by itself"),
    "service_tier": Field(one_of("auto", "standard_only"), "changes nothing"),
    "speed": Field(one_of("standard"), "changes nothing"),
    "inference_geo": Field(ANYTHING, "changes nothing"),
    "diagnostics": Field(ANYTHING, "changes nothing"),
    "betas": Field(ANYTHING, "changes nothing"),
    "mcp_servers": never([]),
    "container": never(),
    "compaction": never(),
    "fallbacks": never([]),
    "thread": Field(Kind("absent", read_thread), "refused in a way that Anthropic's SDK understands: it sends the conversation itself"),
}  # fmt: skip
COUNTED = (
    "model",
    "messages",
    "system",
    "tools",
    "tool_choice",
    "thinking",
    "output_config",
    "output_format",
    "context_management",
    "cache_control",
    "speed",
    "mcp_servers",
    "betas",
)
BODIES = {"/messages": MESSAGES, "/messages/count_tokens": {name: MESSAGES[name] for name in COUNTED}}

# ──────────────────────────────────────────── a request, translated ──────────────────────────────────────────────


def sign(key: bytes, thinking: str) -> str:
    return hmac.new(key, thinking.encode("utf-8", "replace"), hashlib.sha256).hexdigest()


class Turn:
    """One request as the body of a chat request (`chat`). Raises ApiError."""

    def __init__(self, values: Json, key: bytes):
        self.values, self.key = values, key
        self.names: list[tuple[str, str]] = [  # the chat request's words → this one's
            ("response_format", "output_config.format"), ("reasoning_effort", "thinking"), ("thinking_budget", "thinking.budget_tokens"),
            ("stop", "stop_sequences"), ("parallel_tool_calls", "tool_choice.disable_parallel_tool_use"), ("prompt", "messages"),
        ]  # fmt: skip
        self.messages: list[Json] = []
        if system := system_text(values.get("system", [])):
            self.say("system", "system", system)
        turns = [i for i, message in enumerate(values["messages"]) if message["role"] == "assistant"]
        self.thinks_from = turns[-kept] if (kept := self.thinking_turns()) and len(turns) > kept else 0
        for i, message in enumerate(values["messages"]):
            self.add(message, i)
        self.chat = self.chat_body()

    def thinking_turns(self) -> int:
        """Of how many of the last turns the thinking is kept; 0: of all."""
        keeps = [edit.get("keep", {"value": 1}) for edit in self.values.get("context_management", ())]
        return min((keep["value"] for keep in keeps if isinstance(keep, dict) and "value" in keep), default=0)

    def say(self, where: str, role: str, content: str, **more: Any) -> None:
        last = self.messages[-1] if self.messages else {}
        if role == "user" == last.get("role"):  # Anthropic's rule: they are one turn
            last["content"] += "\n\n" + content
            return
        self.names.append((f"messages[{len(self.messages)}]", where))
        self.messages.append({"role": role, "content": content, **more})

    def add(self, message: Json, i: int) -> None:
        where, blocks = f"messages[{i}]", message["content"]
        if message["role"] == "assistant":
            self.add_answer(blocks, i)
            return
        if message["role"] == "system":
            self.say(where, "system", system_text(blocks))
            return
        text: list[Json] = []
        for j, block in enumerate(blocks):  # results are messages of their own, in their place among the text
            if block["type"] == "text":
                text.append(block)
                continue
            if text:
                self.say(where, "user", text_of(text))
                text = []
            result = text_of(block["content"])
            if block.get("is_error"):
                result = f"Error: {result}" if result else "Error"
            self.say(f"{where}.content[{j}]", "tool", result, tool_call_id=block["tool_use_id"])
        if text or not blocks:
            self.say(where, "user", text_of(text))

    def add_answer(self, blocks: list[Json], i: int) -> None:
        calls = [
            {
                "id": b["id"],
                "type": "function",
                "function": {"name": b["name"], "arguments": json.dumps(b["input"], ensure_ascii=False)},
            }
            for b in blocks
            if b["type"] == "tool_use"
        ]
        thinking = "".join(self.thinking_of(b, f"messages[{i}].content[{j}]") for j, b in enumerate(blocks))
        more: Json = {"tool_calls": calls} if calls else {}
        if thinking and i >= self.thinks_from:
            more["reasoning_content"] = thinking
        self.say(f"messages[{i}]", "assistant", text_of(blocks), **more)

    def thinking_of(self, block: Json, where: str) -> str:
        if block["type"] == "redacted_thinking":
            raise ApiError(400, f"'{where}' was not made by this server: leave it out.", where, "invalid_signature")
        if block["type"] != "thinking":
            return ""
        signature = block.get("signature")
        if not isinstance(signature, str) or not hmac.compare_digest(
            signature.encode(), sign(self.key, block["thinking"]).encode()
        ):
            where += ".signature"
            raise ApiError(
                400, f"'{where}' does not fit: send thinking back as it came, or leave it out.", where, "invalid_signature"
            )
        return str(block["thinking"])

    def chat_body(self) -> Json:
        values = self.values
        same = ("model", "stream", "temperature", "top_p", "top_k", "max_tokens")
        chat: Json = {name: values[name] for name in same if name in values}
        chat |= {"messages": self.messages, "stop": values.get("stop_sequences")}
        if (
            self.messages[-1]["role"] == "assistant"
            and not self.messages[-1].get("tool_calls")
            and self.messages[-1]["content"]
        ):
            chat["continue_final_message"] = True  # Anthropic's prefill
        config = values.get("output_config", {})
        if form := config.get("format") or values.get("output_format"):
            chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "output", "schema": form["schema"]}}
        chat |= self.reasoning(config.get("effort"))
        return chat | self.tools()

    def reasoning(self, effort: str | None) -> Json:
        thinking = self.values.get("thinking", {})
        told: Json = {"thinking_budget": thinking["budget_tokens"]} if "budget_tokens" in thinking else {}
        if thinking.get("type") == "disabled":
            told["reasoning_effort"] = "none"
        elif effort or told:
            told["reasoning_effort"] = EFFORTS.get(effort, effort)
        return told

    @property
    def lenient(self) -> bool:
        """Whether a model that cannot reason as it is asked to does not matter. A budget is asked for by name."""
        return bool(self.values.get("thinking", {}).get("type") != "enabled")

    def unheeded(self, template: Json) -> list[str]:
        """What is asked for as a hint, and the model's template (what GET /v1/capabilities says of it) has no switch for."""
        hint = self.lenient and self.values.get("output_config", {}).get("effort")
        switches = template.get("thinking_switch") or template.get("reasoning_efforts")
        return ["output_config.effort"] if hint and template and not switches else []

    def tools(self) -> Json:
        tools, choice = self.values.get("tools") or [], self.values.get("tool_choice", {"type": "auto"})
        if not tools:
            if choice["type"] in ("any", "tool"):
                raise ApiError(400, "'tool_choice' needs tools to choose from.", "tool_choice")
            return {}
        functions = []
        for i, tool in enumerate(tools):
            self.names += [
                (f"tools[{i}].function.parameters", f"tools[{i}].input_schema"),
                (f"tools[{i}].function", f"tools[{i}]"),
            ]
            more = {name: tool[name] for name in ("description", "strict") if tool.get(name) is not None}
            function = {"name": tool.get("name"), "parameters": tool["input_schema"], **more}
            functions.append({"type": "function", "function": function})
        chat: Json = {"tools": functions, "tool_choice": CHOICES.get(choice["type"])}
        if choice["type"] == "tool":
            chat["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
        if choice.get("disable_parallel_tool_use"):
            chat["parallel_tool_calls"] = False
        return chat


CHOICES = {"auto": "auto", "any": "required", "none": "none"}
EFFORTS = {None: "medium", "max": "xhigh"}  # a budget without a word of effort; the chat request has no "max"

# ────────────────────────────────────────────── an answer, translated ────────────────────────────────────────────

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Answer:
    """A completion told as a message: api_reply.Rendering."""

    def __init__(self, completion: Completion, turn: Turn):
        self.completion, self.turn, self.choice = completion, turn, completion.choices[0]
        self.begun = 0  # blocks that have been announced
        self.around = (b"", b"")  # a piece of the block that is being told

    def usage(self) -> Json:
        """What was found in the KV cache is told apart from the other input."""
        done = self.completion
        cached = done.cached_tokens or 0
        return {
            "input_tokens": done.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": done.tokens,
        }

    def message(self, content: list[Json], **more: Any) -> Json:
        done = self.completion
        head = {"id": done.id, "type": "message", "role": "assistant", "model": done.model, "content": content}
        usage = self.usage() | {"service_tier": "standard"}
        return head | {"stop_reason": None, "stop_sequence": None, **more, "usage": usage} | self.edits()

    def edits(self) -> Json:
        return {"context_management": {"applied_edits": []}} if "context_management" in self.turn.values else {}

    def stop(self) -> Json:
        if self.choice.stop and self.choice.finish == "stop":
            return {"stop_reason": "stop_sequence", "stop_sequence": self.choice.stop}
        return {"stop_reason": STOP_REASONS[self.choice.finish or "stop"], "stop_sequence": None}

    def block(self, part: Part) -> Json:
        if part.kind == "content":
            return {"type": "text", "text": part.text}
        if part.kind == "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": sign(self.turn.key, part.text)}
        return {"type": "tool_use", "id": tool_id(part.id), "name": part.name, "input": call_input(part.text)}

    def whole(self, debug: Json) -> Json:
        return self.message([self.block(part) for part in self.choice.parts], **self.stop()) | debug

    # ── events ──

    def event(self, kind: str, **members: Any) -> bytes:
        return sse({"type": kind, **members}, kind)

    def opening(self) -> bytes:
        message = self.message([])
        message["usage"]["output_tokens"] = 0
        return self.event("message_start", message=message)

    def delta(self, delta: Delta) -> bytes:
        out = b""
        if len(self.choice.parts) > self.begun:
            out = self.close() + self.begin()
        if delta.text and delta.kind != "call":
            before, after = self.around
            out += before + compact(delta.text) + after
        if delta.finish:
            out += self.close()
        return out

    def begin(self) -> bytes:
        self.begun += 1
        index, part = self.begun - 1, self.choice.parts[self.begun - 1]
        block: Json = {"type": "tool_use", "id": tool_id(part.id), "name": part.name, "input": {}}
        if part.kind != "call":
            block = (
                {"type": "text", "text": ""}
                if part.kind == "content"
                else {"type": "thinking", "thinking": "", "signature": ""}
            )
        kind, member = PIECES[part.kind]
        head = b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":"%s","%s":'
        self.around = (head % (index, kind, member), b"}}\n\n")
        return self.event("content_block_start", index=index, content_block=block)

    def close(self) -> bytes:
        """The end of the block that is being told, if one is."""
        if not self.begun:
            return b""
        part, out = self.choice.parts[self.begun - 1], b""
        if part.kind == "reasoning":
            signed = {"type": "signature_delta", "signature": sign(self.turn.key, part.text)}
            out = self.event("content_block_delta", index=self.begun - 1, delta=signed)
        return out + self.event("content_block_stop", index=self.begun - 1)

    def end(self, debug: Json) -> bytes:
        last = self.event("message_delta", delta=self.stop(), usage=self.usage(), **self.edits(), **debug)
        return last + self.event("message_stop")

    def failed(self, error: ApiError) -> bytes:
        return sse(error_body(error, ""), "error")


PIECES = {  # of a block: the delta's type, and its member
    "content": (b"text_delta", b"text"), "reasoning": (b"thinking_delta", b"thinking"), "call": (b"input_json_delta", b"partial_json"),
}  # fmt: skip


def tool_id(id: str) -> str:
    """As Anthropic's begin."""
    return "toolu_" + id.removeprefix("call_")


def call_input(arguments: str) -> Json:
    """A call that was cut has no input: max_tokens is the reason that is told."""
    try:
        value = parse_json(arguments.encode() or b"{}")
    except ApiError:
        return {}
    return value if isinstance(value, dict) else {}
