"""What a request may say: the field tables, their readers, and what of them an engine honours. No socket, no engine.

A field is declared in one row: validation, GET /v1/capabilities and the tables in the docs all come from it. Whatever is
wrong with a body is an ApiError that names the field.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from api_errors import ApiError
from backends import LACKS
from constraints import Unsupported, regex_matches, unknown_words, violation
from engine import Prompt, Sampling
from model_init import ROLES, Limits

# ──────────────────────────────────────────────── kinds of values ────────────────────────────────────────────────


class Kind(NamedTuple):
    """A type with its range: `says` completes "must be …", `read` returns the value or raises ValueError.

    `keys`: what it reads of objects, or arrays of them, and of what is in these; None: all, or there is nothing to be read. By a
    function where that depends on the object.
    """

    says: str
    read: Callable[[Any], Any]
    keys: dict[str, Any] | Callable[[dict[str, Any]], Any] | None = None


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
        return Kind("an integer of up to 63 bits" if low == -BIG else f"an integer, {low} or more", read)
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


def prompts(most: int) -> Kind:
    """A string, an array of strings, an array of token ids, or an array of those."""

    def read(value: Any) -> list[Prompt]:
        if isinstance(value, str):
            return [Prompt(text=value)]
        check(isinstance(value, list) and bool(value))
        if isinstance(value[0], int):
            return [Prompt(tokens=read_ids(value))]
        check(len(value) <= most)
        return [Prompt(text=item) if isinstance(item, str) else Prompt(tokens=read_ids(item)) for item in value]

    return Kind(f"a string, an array of strings, an array of token ids, or an array of those (1 to {most})", read)


def read_texts(value: Any) -> list[str]:
    """A string or {"text": …}, or an array of them: as rerankers' clients write documents."""
    items = value if isinstance(value, list) else [value]
    check(0 < len(items) <= MANY_INPUTS)
    return [read_string(item.get("text") if isinstance(item, dict) and len(item) == 1 else item) for item in items]


def read_documents(value: Any) -> list[str]:
    check(isinstance(value, list))
    return read_texts(value)


def read_limit(value: Any) -> int:
    limit = integer(-1, BIG).read(value)
    check(limit != 0)
    return int(limit)


def read_logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    check(isinstance(value, dict) and len(value) <= 1024)
    bias = number(-100, 100).read
    check(all(re.fullmatch(r"[0-9]{1,9}", token) for token in value))
    return tuple((int(token), bias(weight)) for token, weight in value.items())


def read_template_kwargs(value: Any) -> dict[str, Any]:
    check(isinstance(value, dict) and not RESERVED & set(value))
    return dict(value)


RESERVED = {  # the server's own template variables, and what would be more than a variable to whoever renders the template
    "messages", "tools", "add_generation_prompt", "bos_token", "eos_token",
    "chat_template", "continue_final_message", "conversation", "max_length", "padding", "return_assistant_tokens_mask",
    "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "truncation",
}  # fmt: skip
MANY_INPUTS = 2048  # as OpenAI's
PROMPTS, INPUTS = prompts(256), prompts(MANY_INPUTS)
TEXTS = Kind(f"a string, or an array of 1 to {MANY_INPUTS}", read_texts)
DOCUMENTS = Kind(f'an array of 1 to {MANY_INPUTS} strings, or of {{"text": …}}', read_documents)
LIMIT = Kind("-1, or an integer, 1 or more", read_limit)
IDS = Kind("an array of token ids", read_ids)
LOGIT_BIAS = Kind("an object of token ids to numbers from -100 to 100", read_logit_bias)
TEMPLATE_KWARGS = Kind(f"an object without {', '.join(sorted(RESERVED))}", read_template_kwargs)


# ────────────────────────────────────────────────── constraints ──────────────────────────────────────────────────


class Constraint(NamedTuple):
    """What a completion must be, as it came. Here it is measured, and a finished text held against it: it becomes a grammar behind
    admission (prepare.py), for it may take long."""

    kind: str  # "json" | "spaced", JSON with whitespace | "regex" | "choice" | "grammar"
    source: Any
    where: str  # the field that it came from

    def unknown(self) -> list[str]:
        """The places of words in a schema that nobody knows: they constrain nothing, and are told as unknown fields are."""
        if self.kind not in ("json", "spaced"):
            return []
        try:
            measure(self.source, self.where, MOST_TOLD)
        except ApiError:  # too much to be looked through; maybe too much to be honoured, which is told later
            return []
        words = (place + f" ({meant}?)" * bool(meant) for place, meant in unknown_words(self.source).items())
        return [f"{self.where}.{'..' * (len(place) > 44)}{place[-44:]}" for place in words]

    def fault(self, text: str, cut: bool) -> str | None:
        """What is wrong with a text that the engine has ended, or that a stop string or token has cut."""
        if self.kind == "grammar":  # only the engine knows
            return "it ends where the grammar may not" if cut else None
        if len(text) * size(self.source) > MOST_CHECKED:  # then, too, its word must do
            return "it takes too long to be checked" if cut else None
        try:
            return FAULTS[self.kind](self.source, text)
        except Unsupported as error:
            return str(error)


def json_fault(schema: Any, text: str) -> str | None:
    try:
        return violation(schema, json.loads(text))
    except ValueError as error:
        return f"it is not JSON: {error}"


FAULTS: dict[str, Callable[[Any, str], str | None]] = {
    "json": json_fault,
    "spaced": json_fault,
    "regex": lambda pattern, text: None if regex_matches(pattern, text) else "it does not match the regex",
    "choice": lambda choices, text: None if text in choices else "it is none of the choices",
}
MOST_PARTS, DEEPEST = 20_000, 130  # values in a constraint, and how deep they nest
MOST_TOLD = 200_000  # characters of a schema that is looked through for words that nobody knows
MOST_CHECKED = 100_000_000  # characters of a finished text times the size of its constraint


def layers(source: Any) -> Iterator[tuple[int, int]]:
    """(characters, values) on each level of a constraint, the outermost first."""
    layer = [source]
    while layer:
        deeper: list[Any] = []
        characters = 0
        for one in layer:
            if isinstance(one, str):
                characters += len(one)
            elif isinstance(one, dict):
                characters += sum(map(len, one))
                deeper += one.values()
            elif isinstance(one, (list, tuple)):
                deeper += one
        yield characters, len(layer)
        layer = deeper


def size(source: Any) -> int:
    return sum(characters + parts for characters, parts in layers(source))


def measure(source: Any, where: str, most: int) -> None:
    """Refuses what is too much to be looked at: `most` characters in all, MOST_PARTS values, DEEPEST levels."""
    characters = parts = 0
    for depth, (more, values) in enumerate(layers(source)):
        characters, parts = characters + more, parts + values
        for over, says in (
            (characters > most, f"more than {most} characters (--max-constraint)"),
            (parts > MOST_PARTS, f"more than {MOST_PARTS} words and values"),
            (depth > DEEPEST, f"values nested deeper than {DEEPEST}"),
        ):
            if over:
                raise ApiError(400, f"'{where}' cannot be honoured: it has {says}.", where, "unsupported_constraint")


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
        return Constraint("json", {"type": "object"}, "response_format")
    value = given
    check(kind == "json_schema" and isinstance(value.get("json_schema"), dict))
    check(set(value["json_schema"]) <= {"name", "description", "schema", "strict"})
    check(isinstance(value["json_schema"].get("schema"), (dict, bool)))
    return Constraint("json", value["json_schema"]["schema"], "response_format")


def read_structured_outputs(value: Any, where: str = "structured_outputs") -> Constraint | None:
    check(isinstance(value, dict))
    given = {name: item for name, item in value.items() if item is not None}
    whitespace = given.pop("whitespace", "compact")
    check(whitespace == "compact" or (whitespace == "any" and "json" in given))
    if not given:
        return None
    check(len(given) == 1)
    ((name, source),) = given.items()
    if name == "json":
        try:
            source = parse_json(source.encode()) if isinstance(source, str) else source
        except ApiError as error:
            raise ApiError(400, f"'{where}': {error.message}", where) from None
        name = "spaced" if whitespace == "any" else name
    elif name == "regex":
        check(isinstance(source, str))
    elif name == "choice":
        check(isinstance(source, list) and bool(source) and all(isinstance(item, str) and item for item in source))
    else:
        check(name == "grammar" and isinstance(source, str) and 0 < len(source) <= 100_000)
    return Constraint(name, source, where)


RESPONSE_FORMAT = Kind(
    '{"type": "text"}, {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema": …}}', read_response_format
)
STRUCTURED = Kind(
    'an object with one of json, regex, choice, grammar; beside json maybe {"whitespace": "any"}', read_structured_outputs
)
CONSTRAINTS = ("response_format", "structured_outputs", "json_schema", "grammar",
    "guided_json", "guided_regex", "guided_choice", "guided_grammar")  # fmt: skip

# ───────────────────────────────────────────────────── tools ─────────────────────────────────────────────────────

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST_TOOLS = 128


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """[{type: function, function: {name, description, parameters, strict}}], each of them with what it was given."""
    if not isinstance(value, list) or len(value) > MOST_TOOLS:
        raise ApiError(400, f"'tools' must be an array of up to {MOST_TOOLS} tools.", "tools")
    tools = tuple(read_tool(tool, f"tools[{i}]") for i, tool in enumerate(value))
    return distinct(tools, "tools")


def distinct(tools: tuple[dict[str, Any], ...], where: str) -> tuple[dict[str, Any], ...]:
    names: set[str] = set()
    for i, tool in enumerate(tools):
        name = tool["function"]["name"]
        if name in names:
            raise ApiError(400, f"'{where}[{i}]' has the name {name!r}, which another has already.", f"{where}[{i}]")
        names.add(name)
    return tools


def read_tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type", "function") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else None
        hint = f" This server has no tools of type {kind[:40]!r}." if isinstance(kind, str) else ""
        raise ApiError(400, f'\'{where}\' must be {{"type": "function", "function": {{"name": …}}}}.{hint}', where)
    return {"type": "function", "function": read_function(tool.get("function"), f"{where}.function")}


def read_function(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, dict):
        raise ApiError(400, f"'{where}' must be an object with name, description and parameters.", where)
    name = function.get("name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise ApiError(400, f"'{where}.name' must be 1 to 64 letters, digits, _, - and dots.", f"{where}.name")
    for key, kind, says in (
        ("description", str, "a string"),
        ("parameters", dict, "a JSON Schema"),
        ("strict", bool, "true or false"),
    ):
        if not isinstance(function.get(key), (kind, type(None))):
            raise ApiError(400, f"'{where}.{key}' must be {says}.", f"{where}.{key}")
    kept = {key: value for key, value in function.items() if value is not None and key in FUNCTION_KEYS}
    return {"description": "", "parameters": {"type": "object", "properties": {}}} | kept


def read_functions(value: Any) -> tuple[dict[str, Any], ...]:
    """The older spelling of tools."""
    check(isinstance(value, list) and len(value) <= MOST_TOOLS)
    tools = tuple({"type": "function", "function": read_function(f, f"functions[{i}]")} for i, f in enumerate(value))
    return distinct(tools, "functions")


def refuse_indirect(tool: dict[str, Any], where: str) -> None:
    """What both dialects have for tools that a model is to find first, or to call from a program: there is neither here."""
    for name, free in (("defer_loading", False), ("allowed_callers", ["direct"])):
        if tool.get(name) not in (None, free):
            raise ApiError(400, f"'{where}.{name}' is not built: leave it out.", f"{where}.{name}", "unsupported_tool")


class ToolChoice(NamedTuple):
    mode: str  # "none" | "auto" | "required"
    names: tuple[str, ...] | None = None  # only these; None: any


def read_tool_choice(value: Any) -> ToolChoice:
    if isinstance(value, str):
        check(value in ("none", "auto", "required"))
        return ToolChoice(value)
    check(isinstance(value, dict) and value.get("type") in ("function", "allowed_tools"))
    if value["type"] == "function":
        return ToolChoice("required", (named_function(value),))
    allowed = value.get("allowed_tools", value)
    check(isinstance(allowed, dict) and allowed.get("mode", "auto") in ("auto", "required"))
    check(isinstance(allowed.get("tools"), list) and bool(allowed["tools"]))
    return ToolChoice(allowed.get("mode", "auto"), tuple(named_function(tool) for tool in allowed["tools"]))


def named_function(value: Any) -> str:
    """Of {"type": "function", "function": {"name": …}}, and of the flat spelling."""
    check(isinstance(value, dict) and value.get("type") == "function")
    function = value.get("function", value)
    check(isinstance(function, dict) and isinstance(function.get("name"), str))
    return str(function["name"])


def read_function_call(value: Any) -> ToolChoice:
    if isinstance(value, str):
        check(value in ("none", "auto"))
        return ToolChoice(value)
    check(isinstance(value, dict) and isinstance(value.get("name"), str))
    return ToolChoice("required", (value["name"],))


FUNCTION_KEYS = dict.fromkeys(("name", "description", "parameters", "strict"))
NAMED_KEYS = {"type": None, "name": None, "function": {"name": None}}
TOOLS = Kind(
    f'an array of up to {MOST_TOOLS} of {{"type": "function", "function": {{"name", "description", "parameters", "strict"}}}}',
    read_tools,
    {"type": None, "function": FUNCTION_KEYS},
)
TOOL_CHOICE = Kind(
    'none, auto, required, {"type": "function", "function": {"name": …}}, or {"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}',
    read_tool_choice,
    {"type": None, "allowed_tools": {"mode": None, "tools": NAMED_KEYS}, "mode": None, "tools": NAMED_KEYS} | NAMED_KEYS,
)
FUNCTIONS = Kind(f"an array of up to {MOST_TOOLS} of {{name, description, parameters}}", read_functions, FUNCTION_KEYS)
FUNCTION_CALL = Kind('none, auto, or {"name": …}', read_function_call, {"name": None})
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


# ─────────────────────────────────────────────────── messages ────────────────────────────────────────────────────


def read_messages(value: Any) -> tuple[dict[str, Any], ...]:
    """[{role, content}] with the content's text parts joined, calls and their results. Other keys that clients send back are dropped."""
    if not isinstance(value, list) or not value:
        raise ApiError(400, "'messages' must be a non-empty array of {role, content}.", "messages")
    calls: dict[str, str] = {}  # the ids of calls so far → the names
    answered: set[str] = set()
    messages = []
    for i, message in enumerate(value):
        where = f"messages[{i}]"
        read = read_message(of_functions(message, i, calls), where)
        for j, call in enumerate(read.get("tool_calls", ())):
            if call["id"] in calls:
                raise ApiError(400, f"'{where}.tool_calls[{j}].id' is that of another call.", f"{where}.tool_calls[{j}].id")
            calls[call["id"]] = call["function"]["name"]
        if read["role"] == "tool" and "tool_call_id" in read:
            id = read["tool_call_id"]
            if id not in calls or id in answered:
                why = "answers a call that has been answered" if id in answered else "is the id of no call before it"
                raise ApiError(400, f"'{where}.tool_call_id' {why}.", f"{where}.tool_call_id")
            answered.add(id)
            read.setdefault("name", calls[id])
        messages.append(read)
    return tuple(messages)


def of_functions(message: Any, at: int, calls: dict[str, str]) -> Any:
    """A message in the older spelling, {function_call} and role function, in the newer one."""
    if not isinstance(message, dict):
        return message
    if isinstance(message.get("function_call"), dict) and not message.get("tool_calls"):
        return {**message, "tool_calls": [{"id": f"call_{at}", "type": "function", "function": message["function_call"]}]}
    if message.get("role") == "function":
        id = next((id for id, name in reversed(calls.items()) if name == message.get("name")), f"call_of_{message.get('name')}")
        return {**message, "role": "tool", "tool_call_id": id}
    return message


def read_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ApiError(400, f"'{where}' must be an object with role and content.", where)
    role = message.get("role")
    if role not in ROLES:
        raise ApiError(400, f"'{where}.role' must be one of {', '.join(ROLES)}.", f"{where}.role")
    content = message.get("content")
    if content is None and role != "assistant":
        raise ApiError(400, f"'{where}.content' must be a string or an array of text parts.", f"{where}.content")
    kept = {}
    for key in ("name", "tool_call_id"):
        if message.get(key) is not None and (key == "name" or role == "tool"):
            if not isinstance(message[key], str) or not message[key]:
                raise ApiError(400, f"'{where}.{key}' must be a string.", f"{where}.{key}")
            kept[key] = message[key]
    if role == "assistant":
        kept |= read_past(message, where)
    if role == "tool" and "tool_call_id" not in kept:
        raise ApiError(
            400, f"'{where}.tool_call_id' is required: the id of the call that this is the result of.", f"{where}.tool_call_id"
        )
    return {"role": role, "content": read_content(content, f"{where}.content"), **kept}


def read_past(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The reasoning and the calls of a turn that the client sends back."""
    kept: dict[str, Any] = {}
    for key in ("reasoning_content", "reasoning"):
        if isinstance(message.get(key), str) and message[key]:
            kept["reasoning_content"] = message[key]
    calls = message.get("tool_calls")
    if calls is None or calls == []:
        return kept
    if not isinstance(calls, list) or len(calls) > MOST_TOOLS:
        raise ApiError(400, f"'{where}.tool_calls' must be an array of up to {MOST_TOOLS} calls.", f"{where}.tool_calls")
    return kept | {"tool_calls": [read_past_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]}


def read_past_call(call: Any, where: str) -> dict[str, Any]:
    """{id, type, function: {name, arguments}}, with the arguments as the JSON text of an object."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise ApiError(400, f'\'{where}\' must be {{"id", "type": "function", "function": {{"name", "arguments"}}}}.', where)
    for key, value in (("id", call.get("id")), ("function.name", function.get("name"))):
        if not isinstance(value, str) or not value or len(value) > 256:
            raise ApiError(400, f"'{where}.{key}' must be a string of 1 to 256 characters.", f"{where}.{key}")
    arguments, place = function.get("arguments"), f"{where}.function.arguments"
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif isinstance(arguments, str):
        try:
            value = parse_json(arguments.encode() or b"{}")
        except ApiError as error:
            raise ApiError(400, f"'{place}': {error.message.replace('The body', 'It')}", place) from None
        if not isinstance(value, dict):
            raise ApiError(400, f"'{place}' must be the JSON text of an object.", place)
        arguments = arguments or "{}"
    else:
        raise ApiError(400, f"'{place}' must be the JSON text of an object.", place)
    return {"id": call["id"], "type": "function", "function": {"name": function["name"], "arguments": arguments}}


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


CALL_KEYS = {"name": None, "arguments": None}
MESSAGE_KEYS = dict.fromkeys(("role", "name", "tool_call_id", "reasoning", "reasoning_content")) | {
    # The last two change nothing: what can be reused is.
    "content": dict.fromkeys(("type", "text", "cache_control", "prompt_cache_breakpoint")),
    "tool_calls": {"id": None, "type": None, "index": None, "function": CALL_KEYS},
    "function_call": CALL_KEYS,
}
MESSAGES = Kind("a non-empty array of {role, content}", read_messages, MESSAGE_KEYS)


# ────────────────────────────────────────────────── the tables ───────────────────────────────────────────────────


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


def structured_as(name: str, member: str, says: str, whose: str) -> Field:
    """Another server's name for one member of structured_outputs; an empty grammar is none."""
    free = ("",) if member == "grammar" else ()
    kind = Kind(says, lambda value: None if value in free else read_structured_outputs({member: value}, name))
    return Field(kind, f"{whose} name for `structured_outputs.{member}`", "constraints", free)


# The one place where a field is declared: validation, GET /v1/capabilities and the docs' tables all come from these rows.
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
    "structured_outputs": Field(STRUCTURED, "`json`: a schema, with `whitespace`: `compact` or `any`; `regex`; `choice`: an array of strings; `grammar`: GBNF", "constraints", ({},)),
    "return_prompt": Field(BOOLEAN, "tell what the model was given: prompt, token ids, sampling, what of it was in the cache (also header `X-Debug: prompt`)", "inside", (False,)),
    "json_schema": structured_as("json_schema", "json", "a JSON schema", "llama-server's"),
    "grammar": structured_as("grammar", "grammar", "GBNF", "llama-server's"),
    "guided_json": structured_as("guided_json", "json", "a JSON schema", "vLLM's older"),
    "guided_regex": structured_as("guided_regex", "regex", "a regex", "vLLM's older"),
    "guided_choice": structured_as("guided_choice", "choice", "an array of strings", "vLLM's older"),
    "guided_grammar": structured_as("guided_grammar", "grammar", "GBNF", "vLLM's older"),
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
    "tools": Field(TOOLS, "functions that the model may call", "tools", ([],)),
    "tool_choice": Field(TOOL_CHOICE, "`none`, `auto`, `required`, one tool, or `allowed_tools`; forced calls satisfy their schema", "tools", ("none", "auto")),
    "parallel_tool_calls": Field(BOOLEAN, "several calls in one answer; default true", "tools", (True,)),
    "functions": Field(FUNCTIONS, "the older spelling of `tools`", "tools", ([],)),
    "function_call": Field(FUNCTION_CALL, "the older spelling of `tool_choice`", "tools", ("none", "auto")),
    "reasoning_effort": Field(one_of(*EFFORTS), "how much the model reasons, where its template has a switch", "tools"),
    "thinking_budget": Field(integer(0, BIG), "most tokens of reasoning; then its end is forced", "inside"),
    "include_reasoning": Field(BOOLEAN, "false: reasoning is left out of the reply; default true"),
    "modalities": never(["text"]),
    "audio": never(),
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
    "input": Field(INPUTS, "a string, an array of strings, an array of token ids, or an array of those", "embeddings"),
    "encoding_format": Field(one_of("float", "base64"), "base64: little-endian float32", "embeddings"),
    "dimensions": Field(integer(1, 1 << 16), "the first so many, scaled to length 1 again", "embeddings"),
    "prompt_name": Field(NAME, "one of the model's own prompts, as `query` or `document`: it stands before each text", "prompts"),
    "truncate_prompt_tokens": Field(LIMIT, "a longer input is cut after so many tokens, -1: where the model ends; default: it is refused", "embeddings"),
}  # fmt: skip
RERANK = {
    "model": GENERATION["model"],
    "query": Field(STRING, "what the documents are scored for", "rerank"),
    "documents": Field(DOCUMENTS, "the texts", "rerank"),
    "top_n": Field(integer(1, BIG), "tell only so many, the best; default: all", "rerank"),
    "return_documents": Field(BOOLEAN, "each result has its `document`; default false", "rerank"),
    "truncate_prompt_tokens": Field(LIMIT, "a document is cut so that it and the query have so many tokens, -1: what the model takes; default: refused", "rerank"),
    "rank_fields": never([], ["text"]),
    "max_tokens_per_doc": never(),
    "max_chunks_per_doc": never(),
}  # fmt: skip
SCORE = {
    "model": GENERATION["model"],
    "text_1": Field(TEXTS, "one text, for all of text_2, or as many as there", "rerank"),
    "text_2": Field(TEXTS, "the texts that it is scored with", "rerank"),
    "truncate_prompt_tokens": RERANK["truncate_prompt_tokens"],
}
TOKENIZE = {
    "model": GENERATION["model"],
    "content": Field(STRING, "the text; `prompt` and `text` are the same", "tokens"),
    "prompt": Field(STRING, "the text", "tokens"),
    "text": Field(STRING, "the text", "tokens"),
    "messages": Field(MESSAGES, "or a conversation, rendered by the chat template", "tokens"),
    "add_special": Field(BOOLEAN, "add BOS where the model wants it; default: only to text", "tokens"),
    "add_special_tokens": Field(BOOLEAN, "the same", "tokens"),
    "with_pieces": Field(BOOLEAN, "tell each token's text, or its bytes where they are not text", "inside", (False,)),
    "return_token_strs": Field(BOOLEAN, "the same as an array `token_strs`", "tokens"),
    "add_generation_prompt": CHAT["add_generation_prompt"],
    "continue_final_message": CHAT["continue_final_message"],
    "chat_template_kwargs": CHAT["chat_template_kwargs"],
    "tools": CHAT["tools"],
    "tool_choice": CHAT["tool_choice"],
    "reasoning_effort": CHAT["reasoning_effort"],
}
DETOKENIZE = {"model": GENERATION["model"], "tokens": Field(IDS, "token ids", "tokens")}
TEMPLATE = {
    name: CHAT[name]
    for name in (
        "model", "messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools", "tool_choice",
        "reasoning_effort",
    )
}  # fmt: skip
OPERATE = {
    "model": GENERATION["model"],
    "stream": Field(BOOLEAN, "load: tell the progress as server-sent events"),
}
PROMPT_FIELDS = {
    "/chat/completions": "messages", "/embeddings": "input", "/tokenize": "content", "/detokenize": "tokens",
    "/apply-template": "messages", "/responses": "input", "/messages": "messages", "/rerank": "documents", "/v2/rerank": "documents", "/score": "text_2",
}  # fmt: skip
ALIASES = {
    "repeat_penalty": "repetition_penalty",
    "reasoning_budget_tokens": "thinking_budget",
    "thinking_token_budget": "thinking_budget",
}
INERT = (  # change nothing about an answer
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip


def forced(values: dict[str, Any]) -> bool:
    choice = values.get("tool_choice") or values.get("function_call")
    return isinstance(choice, ToolChoice) and choice.mode == "required"  # a dialect's own is read once it is a chat request's


# What a value or two fields together need of the engine: (says, condition, field to blame, feature).
COMBINED: tuple[tuple[str, Callable[[dict[str, Any]], bool], str, str], ...] = (
    ("`echo` with `logprobs`", lambda v: bool(v.get("echo")) and v.get("logprobs") is not None, "echo", "scores"),
    ("a forced `tool_choice`", lambda v: forced(v), "tool_choice", "constraints"),
    ("a token id in `stop`", lambda v: any(isinstance(item, int) for item in v.get("stop", ())), "stop", "extensions"),
)


# ───────────────────────────────────────────────── reading a body ─────────────────────────────────────────────────


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
        if value is None or (name in INERT and name not in table):
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
        ignored += strays(value, field_.kind.keys, sent)
    if strict and ignored:
        raise ApiError(
            400, f"'{ignored[0]}' is not a field of this route (--strict): leave it out.", ignored[0], "unknown_parameter"
        )
    for says, condition, param, feature in COMBINED:
        if condition(values):
            refuse_lacking(param, feature, engine, says.replace("`", "'"))
    ignored += [place for value in values.values() if isinstance(value, Constraint) for place in value.unknown()]
    return Fields(values, ignored)


def strays(value: Any, keys: Any, place: str) -> list[str]:
    """The places of what stands in a value and is not read. null and what is empty say nothing: clients send replies back whole."""
    if keys is None:
        return []
    if isinstance(value, list):
        return [one for i, item in enumerate(value) for one in strays(item, keys, f"{place}[{i}]")]
    if callable(keys) and isinstance(value, dict):
        keys = keys(value)
    if not isinstance(value, dict) or keys is None:
        return []
    found = []
    for name, inner in value.items():
        if name in keys:
            found += strays(inner, keys[name], f"{place}.{name}")
        elif inner not in (None, [], {}):
            found.append(f"{place}.{name[:64]}")
    return found


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
    given = [name for name in CONSTRAINTS if values.get(name)]
    if len(given) > 1:
        raise ApiError(400, f"'{given[1]}' and '{given[0]}' exclude each other.", given[1])
    if given and forced(values):
        raise ApiError(
            400, f"'tool_choice' that forces a call and '{given[0]}' exclude each other: there is no content.", "tool_choice"
        )
    if given:
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
    tools, choice = tools_of(values)
    return Prompt(
        messages,
        tools=tools,
        tool_choice=choice.mode,
        callable=choice.names,
        parallel=values.get("parallel_tool_calls", not values.get("functions")),
        effort=values.get("reasoning_effort"),
        generation_prompt=values.get("add_generation_prompt", True),
        continue_final=go_on,
        template_kwargs=values.get("chat_template_kwargs", {}),
    )


def tools_of(values: dict[str, Any]) -> tuple[tuple[dict[str, Any], ...], ToolChoice]:
    """What may be called, and whether it must be."""
    newer = "tools" in values or "functions" not in values
    tools = values.get("tools" if newer else "functions", ())
    choice = values.get("tool_choice" if newer else "function_call") or ToolChoice("auto")
    param = "tool_choice" if newer else "function_call"
    if not tools and choice.mode == "required":
        raise ApiError(400, f"'{param}' needs tools to choose from.", param)
    unknown = set(choice.names or ()) - {tool["function"]["name"] for tool in tools}
    if unknown:
        raise ApiError(400, f"'{param}' names {min(unknown)!r}, which is not among the tools.", param)
    return tools, choice


def promised(prompt: Prompt) -> dict[str, Any]:
    """The tools whose calls satisfy their schema, where they are told as whole: name → schema."""
    functions = [tool["function"] for tool in prompt.tools]
    return {f["name"]: f["parameters"] for f in functions if prompt.tool_choice == "required" or f.get("strict")}


def constraint_of(values: dict[str, Any]) -> Constraint | None:
    return next((values[name] for name in CONSTRAINTS if values.get(name)), None)


def check_limits(values: dict[str, Any], prompts: int, limits: Limits) -> None:
    """What the operator allows of one request. Before any work is done for it."""
    if (choices := prompts * values.get("n", 1)) > limits.choices:
        raise ApiError(
            400, f"{choices} choices (prompts times n) are too many: {limits.choices} may be asked for (--max-choices).", "n"
        )
    if len(values.get("stop_token_ids", ())) > limits.stop_ids:
        raise ApiError(400, f"'stop_token_ids' may have {limits.stop_ids} ids at most (--max-stop-ids).", "stop_token_ids")
    if constraint := constraint_of(values):
        measure(constraint.source, constraint.where, limits.constraint)


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
        constraint=tuple(constraint) if constraint else None,
        thinking_budget=values.get("thinking_budget"),
        **{name: values[name] for name in same if name in values},
    )


def capabilities(engine: str, bodies: dict[str, dict[str, Field]]) -> dict[str, Any]:
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

    tables = {f"/v1{path}": {name: row(f) for name, f in sorted(table.items())} for path, table in bodies.items()}
    together = {
        says.replace("`", ""): {"honoured": engine in engines_with(feature), "engines": engines_with(feature)}
        for says, _, _, feature in COMBINED
    }
    return {"engine": engine, "routes": tables, "together": together, "inert": list(INERT), "aliases": ALIASES}


BODIES = {
    "/chat/completions": CHAT,
    "/completions": COMPLETIONS,
    "/embeddings": EMBEDDINGS,
    "/rerank": RERANK,
    "/score": SCORE,
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
