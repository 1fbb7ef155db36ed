"""The grammar of tool calls: what a model must write where calls are forced, or may write where a tool is strict. Text to text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from constraints import schema_grammar
from tool_parser import Syntax

RULE = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|[A-Za-z][\w-]*|\n', re.S)


def calls_grammar(
    syntax: Syntax, tools: Sequence[dict[str, Any]], names: Sequence[str] | None, forced: bool, parallel: bool
) -> tuple[str | None, bool]:
    """(GBNF or None where nothing is constrained, whether calls come as bare JSON objects). Raises Unsupported."""
    functions = [tool["function"] for tool in tools]
    if not forced:
        return None, False
    named = names is not None and len(names) == 1
    functions = [f for f in functions if names is None or f["name"] in names]
    native = syntax.form in ("json", "named") and not syntax.quote and bool(syntax.before or syntax.bare)
    before, between, after, middle = (
        (syntax.before, syntax.between, syntax.after, syntax.middle) if native else ("", "", "", "")
    )
    rules, calls = [], []
    for number, function in enumerate(functions):
        rules.append(prefixed(schema_grammar(parameters_of(function)), f"t{number}x"))
        calls.append(call_body(syntax if native else Syntax(form="json"), function["name"], middle, f"t{number}xroot", number))
    again = f" ({quoted(between)} call)*" if parallel and between and not named else ""
    head = [f"root ::= {quoted(before)} call{again} {quoted(after)}", f"call ::= {' | '.join(calls)}"]
    return "\n".join([*head, *rules]) + "\n", not native


def parameters_of(function: dict[str, Any]) -> Any:
    schema = function.get("parameters")
    return schema if schema else {"type": "object", "properties": {}, "additionalProperties": False}


def call_body(syntax: Syntax, name: str, middle: str, arguments: str, number: int) -> str:
    if syntax.form == "named":
        return f"{quoted(name + middle.replace(chr(0), str(number)))} {arguments}"
    if not syntax.name_keys:
        return f"{quoted('{' + json.dumps(name) + ': ')} {arguments} {quoted('}')}"
    head = f'{{"{syntax.name_keys[0]}": {json.dumps(name)}, "{syntax.argument_keys[0]}": '
    return f"{quoted(head)} {arguments} {quoted('}')}"


def quoted(text: str) -> str:
    """A literal; every character outside printable ASCII is escaped."""
    out = []
    for char in text:
        code = ord(char)
        if char in '"\\':
            out.append("\\" + char)
        elif 32 <= code < 127:
            out.append(char)
        else:
            out.append(
                {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(char) or (f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}")
            )
    return f'"{"".join(out)}"'


def prefixed(grammar: str, prefix: str) -> str:
    """The same grammar with other names for its rules, so that it can stand beside others."""
    return RULE.sub(lambda hit: prefix + hit.group() if hit.group()[0].isalpha() else hit.group(), grammar).strip()


def after_reasoning(grammar: str, begin: str, end: str, inside: bool) -> str:
    """The same grammar with free reasoning in front: up to its end mark where it is open, else between its marks or none at all."""
    rules = [f"root ::= {'free0' if inside else f'(space {quoted(begin)} free0)?'} space gxroot"]
    rules += ["space ::= ([ \\n] ([ \\n] [ \\n]?)?)?", *text_up_to(end, "free"), prefixed(grammar, "gx")]
    return "\n".join(rules) + "\n"


def text_up_to(mark: str, name: str) -> list[str]:
    """Rules name0, name1, …: any text up to the first time that the mark stands in it, and the mark. (Knuth, Morris and Pratt's.)"""
    letters = list(dict.fromkeys(mark))
    rules = []
    for state in range(len(mark)):
        ways = []
        for letter in letters:
            seen = mark[:state] + letter
            to = next(n for n in range(len(seen), -1, -1) if n <= len(mark) and mark.startswith(seen[len(seen) - n :]))
            ways.append((letter, to))
        moves = [f"{quoted(letter)} {name}{to}" if to < len(mark) else quoted(letter) for letter, to in ways if to]
        back = "".join(class_letter(letter) for letter, to in ways if to)
        rules.append(f"{name}{state} ::= {' | '.join([*moves, f'[^{back}] {name}0'])}")
    return rules


def class_letter(letter: str) -> str:
    """A character in a class."""
    code = ord(letter)
    return letter if letter.isascii() and letter.isalnum() else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"


def written(syntax: Syntax, calls: Sequence[tuple[str, str]]) -> str:
    """Calls, (name, JSON text of the arguments), as the model writes them; in a syntax of fences, as bare JSON."""
    if syntax.form == "pythonic":
        lists = [f"{name}({python_arguments(arguments)})" for name, arguments in calls]
        return f"{''.join(syntax.openers[:1])}[{', '.join(lists)}]{''.join(syntax.closers[:1])}"
    if syntax.form == "named" and syntax.before:
        texts = [f"{name}{syntax.middle.replace(chr(0), str(i))}{arguments}" for i, (name, arguments) in enumerate(calls)]
    elif syntax.name_keys:
        texts = [f'{{"{syntax.name_keys[0]}": {json.dumps(n)}, "{syntax.argument_keys[0]}": {a}}}' for n, a in calls]
    else:
        texts = [f"{{{json.dumps(name)}: {arguments}}}" for name, arguments in calls]
    native = syntax.form in ("json", "named")
    return f"{syntax.before}{(syntax.between or ' ').join(texts)}{syntax.after}" if native else "\n".join(texts)


def python_arguments(arguments: str) -> str:
    try:
        return ", ".join(f"{key}={value!r}" for key, value in json.loads(arguments).items())
    except ValueError:
        return "PARAMETER=VALUE"
