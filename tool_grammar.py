"""The grammar of tool calls: what a model must write where calls are forced, and may write where a tool is strict. Text to text.

Written in the core of grammar.py: rules named root and r0, r1, …, tokens t0, t1, …, positive classes, repetition of single rules only.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from constraints import Unsupported, regex_grammar, schema_grammar, spaced, writing_grammar
from tool_syntax import CHANNEL_FRAMES, Syntax
from tool_values import kinds_of

TOKEN = re.compile(r'("(?:\\.|[^"\\])*")|(\[(?:\\.|[^\]\\])*\])|\b([A-Za-z]\w*)\b', re.S)
FORMS = ("json", "named", "tagged", "pythonic", "functionary")  # that a grammar is written for; others are forced as bare JSON


class Rules:
    """A grammar while it is written: each body becomes a rule, and is spoken of by its name.

    A name that begins with t is a token's (grammar.py), and stays one.
    """

    def __init__(self) -> None:
        self.bodies: list[str] = []
        self.tokens: set[int] = set()  # which of them are tokens

    def add(self, body: str) -> str:
        self.bodies.append(body)
        return f"r{len(self.bodies) - 1}"

    def include(self, grammar: str) -> str:
        """The rules of another grammar, under names of their own: the name of its root."""
        if grammar.endswith(spaced("")):  # it would hold for the text around, too
            raise Unsupported("whitespace 'any' beside tools, or where the model reasons first")
        lines = dict(line.split(" ::= ", 1) for line in grammar.strip().splitlines() if line.strip())
        at = len(self.bodies)
        self.tokens |= {at + i for i, name in enumerate(lines) if name[0] == "t"}
        names = {name: f"{'t' if name[0] == 't' else 'r'}{at + i}" for i, name in enumerate(lines)}
        self.bodies += [TOKEN.sub(lambda m: m[1] or m[2] or names[m[3]], body) for body in lines.values()]
        return names["root"]

    def schema(self, schema: Any) -> str:
        return self.include(compiled(json.dumps(schema)))

    def maybe(self, body: str) -> str:
        return f"{self.add(body)}?"

    def many(self, body: str) -> str:
        return f"{self.add(body)}*"

    def up_to_times(self, body: str, most: int) -> str:
        rest = ""
        for _ in range(most):
            rest = self.maybe(joined(body, rest))
        return rest

    def one_of(self, bodies: Iterable[str]) -> str:
        return self.add(" | ".join(bodies))

    def space(self) -> str:
        """Up to three blanks and newlines."""
        blank = self.add("[ \\u000A]".replace(" ", "\\u0020"))
        return f"{blank}? {blank}? {blank}?"

    def up_to(self, mark: str, then: str = "") -> str:
        """Any text up to the first time that the mark stands in it, and the mark. (Knuth's, Morris' and Pratt's automaton.)

        `then`: what follows the mark; the text may then also end without it.
        """
        first = len(self.bodies)
        for state in range(len(mark)):
            ways = []
            for letter in dict.fromkeys(mark):
                to = longest(mark, mark[:state] + letter)
                if to:
                    ways.append(f"{quoted(letter)} {f'r{first + to}' if to < len(mark) else then}".strip())
            known = "".join(dict.fromkeys(letter for letter in mark if longest(mark, mark[:state] + letter)))
            ways.append(f"{other_than(known)} r{first}")
            self.bodies.append(" | ".join([*ways, '""'] if then else ways))
        return f"r{first}"

    def text(self, root: str) -> str:
        rules = (f"{'t' if i in self.tokens else 'r'}{i} ::= {body}" for i, body in enumerate(self.bodies))
        return "\n".join([f"root ::= {root}", *rules]) + "\n"


@functools.lru_cache(512)
def compiled(schema: str) -> str:
    """The same tools come with every request of an agent."""
    return writing_grammar(json.loads(schema))


def longest(mark: str, seen: str) -> int:
    """The length of the longest beginning of `mark` that `seen` ends in."""
    return next(n for n in range(len(seen), -1, -1) if n <= len(mark) and seen.endswith(mark[:n]))


@functools.lru_cache(256)
def other_than(letters: str) -> str:
    """The class of all characters but these."""
    return regex_grammar("[^" + "".join(f"\\U{ord(letter):08x}" for letter in letters) + "]").strip().removeprefix("root ::= ")


def quoted(text: str) -> str:
    """A literal; what is no printable ASCII is escaped."""
    if not text:
        return ""
    escape = {'"': '\\"', "\\": "\\\\"}
    plain = (
        escape.get(c) or (c if " " <= c < "\x7f" else f"\\u{ord(c):04X}" if c < "\U00010000" else f"\\U{ord(c):08X}")
        for c in text
    )
    return f'"{"".join(plain)}"'


def joined(*parts: str) -> str:
    return " ".join(filter(None, parts))


class CallsGrammar(NamedTuple):
    text: str | None  # GBNF; None: nothing is constrained
    neutral: bool = False  # calls come as bare JSON objects, whatever the syntax


def calls_grammar(
    syntax: Syntax, tools: Sequence[dict[str, Any]], names: Sequence[str] | None, forced: bool, parallel: bool
) -> CallsGrammar:
    """Forced: one call or, `parallel`, as many as there are tools (a small model would call for ever). Else, where a tool is strict: any text, and calls once one is begun. Raises Unsupported."""
    functions = [tool["function"] for tool in tools if names is None or tool["function"]["name"] in names]
    channels = syntax.form == "channels" and CHANNEL_FRAMES[syntax.name][3] is not None and forced
    native = channels or syntax.form in FORMS and bool(syntax.before or syntax.bare or syntax.form in FORMS[3:])
    if not forced and not (native and any(function.get("strict") for function in functions)):
        return CallsGrammar(None)
    form = spoken(syntax) if native else Syntax(form="json")
    rules = Rules()
    call = rules.one_of(one_call(rules, form, function, number, forced) for number, function in enumerate(functions))
    single = not parallel or not form.between or (forced and names is not None and len(names) == 1)
    more = joined(quoted(form.between), call)
    again = "" if single else rules.up_to_times(more, len(functions) - 1) if forced else rules.many(more)
    if forced:
        return CallsGrammar(rules.text(joined(quoted(form.before), call, again, quoted(form.after))), not native)
    opener = syntax.openers[0] if syntax.openers else ""
    if not opener or not form.before.startswith(opener):
        return CallsGrammar(None)
    calls = rules.add(joined(quoted(form.before[len(opener) :]), call, again, quoted(form.after)))
    return CallsGrammar(rules.text(rules.up_to(opener, calls)))


def behind(opening: str, grammar: str) -> str:
    """The same grammar with a literal in front."""
    rules = Rules()
    own = rules.include(grammar)
    return rules.text(joined(quoted(opening), own))


def either(one: str, other: str) -> str:
    """What one of two grammars allows."""
    rules = Rules()
    return rules.text(rules.one_of([rules.include(one), rules.include(other)]))


def after_reasoning(grammar: str, begin: str, end: str, inside: bool) -> str:
    """The same grammar with free reasoning in front: up to its end mark where it is open, else between its marks or none at all."""
    rules = Rules()
    own, thought = rules.include(grammar), rules.up_to(end)
    thought = thought if inside else rules.maybe(joined(rules.space(), quoted(begin), thought))
    return rules.text(joined(thought, rules.space(), own))


def spoken(syntax: Syntax) -> Syntax:
    """The syntax with what stands around its calls, where its record has no words for that."""
    if syntax.form == "pythonic":
        opener, closer = "" if syntax.bare else "".join(syntax.openers[:1]), "".join(syntax.closers[:1])
        return replace(syntax, before=f"{opener}[", between=", ", after=f"]{closer}")
    if syntax.form == "channels":
        before, middle = CHANNEL_FRAMES[syntax.name][3] or ("", "")
        return replace(syntax, form="named", before=before, middle=middle)
    if syntax.form == "functionary":
        return replace(syntax, form="named", middle="\n", between=">>>")
    return syntax


def one_call(rules: Rules, syntax: Syntax, function: Mapping[str, Any], number: int, promised: bool) -> str:
    """A tool that is not strict takes any arguments, but where all calls are promised to fit."""
    name, schema = function["name"], parameters_of(function) if promised or function.get("strict") else {"type": "object"}
    if syntax.form == "tagged":
        return joined(quoted(name + syntax.middle.replace("\0", str(number))), fenced_arguments(rules, syntax, schema))
    if syntax.form == "pythonic":
        return joined(quoted(f"{name}("), python_arguments(rules, schema), quoted(")"))
    arguments = rules.schema(schema)
    if syntax.form == "named":
        return joined(quoted(name + syntax.middle.replace("\0", str(number))), arguments)
    head = f"{{{json.dumps(name)}: "
    if syntax.name_keys:
        head = f'{{"{syntax.name_keys[0]}": {json.dumps(name)}, "{syntax.argument_keys[0]}": '
    return joined(quoted(head), arguments, quoted("}"))


SAYS_NOTHING = frozenset(("type", "properties", "required", "title", "description", "$schema"))


def parameters_of(function: Mapping[str, Any]) -> Any:
    """The schema of what a model is to write: nothing, for a tool that names no properties and says no more of them."""
    schema = function.get("parameters")
    if not schema or ("properties" in schema and not schema["properties"] and schema.keys() <= SAYS_NOTHING):
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return schema


def properties_of(schema: Any) -> list[tuple[str, Any, bool]]:
    """(name, schema with what it may refer to, whether it is required) of each property, in the schema's order."""
    schema_grammar(schema)  # what of it is not supported is refused here as anywhere
    properties = schema.get("properties", {}) if isinstance(schema, dict) else None
    if not isinstance(properties, dict):
        raise Unsupported("parameters that are no object with properties are not supported")
    around = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    whole = {key: {**own, **around} if isinstance(own, dict) else own for key, own in properties.items()}
    return [(key, own, key in schema.get("required", ())) for key, own in whole.items()]


def fenced_arguments(rules: Rules, syntax: Syntax, schema: Any) -> str:
    """Keys and values in fences. A string is any text up to its fence: the reply is checked when it is whole."""
    line, apart = "\n" if syntax.value_line else "", "\n" if syntax.middle.endswith("\n") else ""
    end, parts = line + syntax.value_end, []
    for key, own, required in properties_of(schema):
        kinds = kinds_of(own, schema) or frozenset(("string",))
        listed = own.get("enum") if isinstance(own, dict) else None
        head = quoted(syntax.key[0] + key + syntax.key[1].replace("\0", type_word(syntax, kinds)) + line)
        if kinds != frozenset(("string",)):
            value = joined(rules.schema(own), quoted(end + apart))
        elif listed:
            value = joined(rules.one_of(quoted(item) or '""' for item in listed), quoted(end + apart))
        else:
            value = joined(rules.up_to(end), quoted(apart))
        parts.append(joined(head, value) if required else rules.maybe(joined(head, value)))
    return joined(*parts)


def type_word(syntax: Syntax, kinds: frozenset[str]) -> str:
    """What the syntax says of a value's type: whether it is a string, or its name."""
    if kinds == frozenset(("string",)):
        return syntax.text_type
    kind = next(iter(kinds)) if len(kinds) == 1 else "object"
    return "false" if syntax.text_type == "true" else {"integer": "number"}.get(kind, kind)


def python_arguments(rules: Rules, schema: Any) -> str:
    """k=v, …, with JSON for values: first those that are required, then any of the others."""
    pairs = [(joined(quoted(f"{key}="), rules.schema(own)), required) for key, own, required in properties_of(schema)]
    needed, others = [pair for pair, required in pairs if required], [pair for pair, required in pairs if not required]
    comma = quoted(", ")
    if needed:
        return joined(f" {comma} ".join(needed), *(rules.maybe(joined(comma, other)) for other in others))
    ways = [joined(other, *(rules.maybe(joined(comma, o)) for o in others[i + 1 :])) for i, other in enumerate(others)]
    return f"{rules.one_of(ways)}?" if ways else ""


# ───────────────────────────────────────── calls as text, for a history ──────────────────────────────────────────


def written(syntax: Syntax, calls: Sequence[tuple[str, str]]) -> str:
    """Calls, (name, JSON text of the arguments), as the model writes them; in a syntax of fences, as bare JSON."""
    if syntax.form == "pythonic":
        form = spoken(syntax)
        return form.before + form.between.join(f"{name}({as_python(arguments)})" for name, arguments in calls) + form.after
    if syntax.form == "named" and syntax.before:
        texts = [f"{name}{syntax.middle.replace(chr(0), str(i))}{arguments}" for i, (name, arguments) in enumerate(calls)]
    elif syntax.name_keys:
        texts = [f'{{"{syntax.name_keys[0]}": {json.dumps(n)}, "{syntax.argument_keys[0]}": {a}}}' for n, a in calls]
    else:
        texts = [f"{{{json.dumps(name)}: {arguments}}}" for name, arguments in calls]
    native = syntax.form in ("json", "named")
    return f"{syntax.before}{(syntax.between or ' ').join(texts)}{syntax.after}" if native else "\n".join(texts)


def as_python(arguments: str) -> str:
    try:
        return ", ".join(f"{key}={value!r}" for key, value in json.loads(arguments).items())
    except ValueError:  # the example of a template that shows no tools
        return "PARAMETER=VALUE"
