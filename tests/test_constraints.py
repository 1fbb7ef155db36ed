"""The grammars of constraints.py: random sentences of each satisfy the schema, and what cannot be honoured is refused by name."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import jsonschema
import pytest

import constraints as c
from grammar import MAX_RULES, MAX_TEXT

SENTENCES = 30
OBJ = {"type": "object"}
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}, "lives": {"type": "integer"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"enum": ["dog", "wolf"]}, "name": {"type": "string"}}, "required": ["kind"]}
TREE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["v"],
}
LINKED = {
    "$defs": {
        "n": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
            "required": ["next"],
        }
    }
}


def props(required: Any = None, **members: Any) -> dict[str, Any]:
    return {"type": "object", "properties": members, "required": required or [], "additionalProperties": False}


def nested(depth: int, kind: str) -> Any:
    node: Any = {"type": "integer"}
    for _ in range(depth):
        node = {"type": "array", "items": node} if kind == "array" else props(["a"], a=node)
    return node


# (name, schema, None or a word of the refusal)
SCHEMAS: list[tuple[str, Any, str | None]] = [
    ("true", True, None),
    ("anything", {}, None),
    ("false", False, "false"),
    ("object", OBJ, None),
    ("array", {"type": "array"}, None),
    ("string", {"type": "string"}, None),
    ("integer", {"type": "integer"}, None),
    ("number", {"type": "number"}, None),
    ("boolean", {"type": "boolean"}, None),
    ("null", {"type": "null"}, None),
    ("several types", {"type": ["string", "null", "integer"]}, None),
    ("integer and number", {"type": ["integer", "number"], "minimum": 3}, None),
    ("empty object", {"type": "object", "properties": {}, "additionalProperties": False}, None),
    ("one required", props(["a"], a={"type": "integer"}), None),
    ("all optional", props(a={"type": "integer"}, b={"type": "boolean"}, c={"type": "null"}), None),
    ("mixed", props(["b", "d"], a={"type": "integer"}, b={"type": "boolean"}, c={"type": "null"}, d={}), None),
    ("optional around required", props(["m"], **{k: {"type": "null"} for k in "abcmxyz"}), None),
    ("properties without type", {"properties": {"a": {"type": "integer"}}, "required": ["a"]}, None),
    ("required without properties", {"type": "object", "required": ["x", "y"]}, None),
    ("required extra", {"type": "object", "properties": {"a": {}}, "required": ["z"], "additionalProperties": {"type": "integer"}}, None),
    ("required ruled out", {"type": "object", "properties": {}, "required": ["z"], "additionalProperties": False}, "required"),
    ("map", {"type": "object", "additionalProperties": {"type": "integer"}}, None),
    ("map with bounds", {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 3}, None),
    ("map of two at least", {"type": "object", "minProperties": 2}, "minProperties"),
    ("counts beside properties", {"type": "object", "properties": {"a": {}}, "maxProperties": 3}, None),
    ("odd names", props(['q"uo', "back\\slash", "new\nline", "é世😀", "", "a.b/c~d"], **dict.fromkeys(['q"uo', "back\\slash", "new\nline", "é世😀", "", "a.b/c~d"], {"type": "null"})), None),
    ("items", {"type": "array", "items": {"type": "boolean"}}, None),
    ("items with bounds", {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 4}, None),
    ("no items", {"type": "array", "maxItems": 0}, None),
    ("one item", {"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 1}, None),
    ("three or more", {"items": {"type": "string"}, "minItems": 3}, None),
    ("min over max", {"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    ("tuple", {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}], "items": False}, None),
    ("open tuple", {"type": "array", "prefixItems": [{"type": "null"}], "minItems": 1, "maxItems": 1}, None),
    ("long tuple", {"type": "array", "prefixItems": [{"type": "null"}], "minItems": 2}, None),
    ("tuple with rest", {"type": "array", "prefixItems": [{}], "items": {"type": "null"}}, None),
    ("unique", {"type": "array", "uniqueItems": True}, "uniqueItems"),
    ("contains", {"type": "array", "contains": {}}, None),
    ("enum", {"enum": ["red", "green", "blue"]}, None),
    ("enum of everything", {"enum": [1, 1.5, "a", None, True, False, [1, "x"], {"k": [], "é": "\"\\\n\x01"}]}, None),
    ("enum and type", {"type": "string", "enum": ["a", 1, None, "b"]}, None),
    ("enum and bounds", {"type": "integer", "minimum": 3, "enum": [1, 2, 3, 4.0, 5]}, None),
    ("enum and pattern", {"enum": ["ab", "b", "xay"], "pattern": "^a"}, None),
    ("enum without member", {"type": "integer", "enum": ["a", 1.5, True]}, "enum"),
    ("empty enum", {"enum": []}, "enum"),
    ("const", {"const": {"a": [1, None]}}, None),
    ("const beside type", {"const": 5, "type": "string"}, "const"),
    ("const null", {"const": None}, None),
    ("enum of prefixes", {"enum": ["a", "ab", "abc", "abd", "", "b"]}, None),
    ("min length", {"type": "string", "minLength": 3}, None),
    ("max length", {"type": "string", "maxLength": 5}, None),
    ("both lengths", {"type": "string", "minLength": 2, "maxLength": 4}, None),
    ("length nought", {"type": "string", "maxLength": 0}, None),
    ("too long", {"type": "string", "maxLength": 100_000}, None),
    ("lengths crossed", {"type": "string", "minLength": 5, "maxLength": 4}, "minLength"),
    ("pattern", {"type": "string", "pattern": "^[A-Z]{2}-\\d{3,5}$"}, None),
    ("pattern anywhere", {"type": "string", "pattern": "b+c"}, None),
    ("pattern at the start", {"type": "string", "pattern": "^(foo|bar)"}, None),
    ("pattern by branch", {"type": "string", "pattern": "^a$|b$|^c"}, None),
    ("pattern with sets", {"type": "string", "pattern": r"^[^a-z\s]\W.\S[\w.-]+é?$"}, None),
    ("pattern of quotes", {"type": "string", "pattern": '^"$'}, None),
    ("pattern lookahead", {"type": "string", "pattern": "^(?=a)b"}, "pattern"),
    ("pattern lookaheads", {"type": "string", "pattern": "^(?=.*[A-Z])(?=.*[0-9])(?!.*--)[A-Za-z0-9-]{4,}$"}, None),
    ("pattern and length", {"type": "string", "pattern": "a", "maxLength": 5}, None),
    ("date", {"type": "string", "format": "date"}, None),
    ("time", {"type": "string", "format": "time"}, None),
    ("date-time", {"format": "date-time"}, None),
    ("uuid", {"type": "string", "format": "uuid"}, None),
    ("ipv4", {"type": "string", "format": "ipv4"}, None),
    ("email", {"type": "string", "format": "email"}, None),
    ("hostname", {"type": "string", "format": "hostname"}, None),
    ("from nought", {"type": "integer", "minimum": 0}, None),
    ("below", {"type": "integer", "maximum": -7}, None),
    ("range", {"type": "integer", "minimum": -105, "maximum": 2374}, None),
    ("one integer", {"type": "integer", "minimum": 7, "maximum": 7}, None),
    ("exclusive", {"type": "integer", "exclusiveMinimum": 9, "exclusiveMaximum": 12}, None),
    ("fraction as bound", {"type": "integer", "minimum": 0.5, "maximum": 10.5}, None),
    ("no integer", {"type": "integer", "minimum": 5, "maximum": 4}, "minimum"),
    ("far range", {"type": "integer", "minimum": 10**17}, None),
    ("odd range", {"type": "integer", "minimum": 987, "maximum": 120345}, None),
    ("number range", {"type": "number", "minimum": -3, "maximum": 12}, None),
    ("number open", {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, None),
    ("number below", {"type": "number", "exclusiveMaximum": -5}, None),
    ("number above", {"type": "number", "minimum": 100}, None),
    ("number point", {"type": "number", "minimum": 4, "maximum": 4}, None),
    ("number nothing", {"type": "number", "minimum": 4, "exclusiveMaximum": 4}, "minimum"),
    ("number fraction", {"type": "number", "minimum": 0.5}, None),
    ("multipleOf", {"type": "number", "multipleOf": 0.01}, None),
    ("multipleOf one", {"type": "integer", "multipleOf": 1, "minimum": 0}, None),
    ("inert keywords", {"type": "integer", "minLength": 3, "pattern": "x", "items": {"type": "null"}}, None),
    ("anyOf", {"anyOf": [{"type": "string", "maxLength": 4}, {"type": "null"}]}, None),
    ("anyOf beside type", {"type": "string", "anyOf": [{"maxLength": 4}, {"enum": ["longer than four"]}]}, None),
    ("anyOf beside properties", {"properties": {"a": {}}, "anyOf": [{"required": ["a"]}, {}]}, None),
    ("oneOf types", {"oneOf": [{"type": "string"}, {"type": "integer"}, OBJ]}, None),
    ("oneOf discriminated", {"oneOf": [CAT, DOG]}, None),
    ("oneOf referenced", {"oneOf": [{"$ref": "#/$defs/c"}, {"$ref": "#/$defs/d"}], "$defs": {"c": CAT, "d": DOG}}, None),
    ("oneOf constants", {"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}, {"enum": [1, 2]}]}, None),
    ("oneOf overlapping", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, None),
    ("oneOf vague", {"oneOf": [OBJ, {"properties": {"a": {}}}]}, None),
    ("allOf", {"allOf": [{"type": "boolean"}], "description": "d"}, None),
    ("allOf two", {"allOf": [{"type": "integer"}, {"minimum": 3}]}, None),
    ("not", {"not": {"type": "null"}}, None),
    ("if", {"if": {}, "then": {}}, None),
    ("nullable", {"type": "string", "nullable": True}, None),
    ("patternProperties", {"type": "object", "patternProperties": {}}, None),
    ("ref", {"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}, "title": "t"}, None),
    ("ref to a name with a slash", {"$ref": "#/definitions/a~1b%20c", "definitions": {"a/b c": {"type": "null"}}}, None),
    ("ref elsewhere", {"$ref": "https://example.com/x"}, "$ref"),
    ("ref to nothing", {"$ref": "#/$defs/y", "$defs": {"x": {}}}, "$ref"),
    ("ref beside type", {"$ref": "#/$defs/x", "type": "string", "$defs": {"x": {}}}, None),
    ("tree", TREE, None),
    ("linked", {"$ref": "#/$defs/n", **LINKED}, None),
    ("counts beside very many", {"properties": {f"p{i}": {} for i in range(70)}, "minProperties": 60}, "minProperties"),
    ("never ends", {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "never end"),
    ("ref to itself", {"$ref": "#"}, "repeats"),
    ("left recursion", {"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "repeats"),
    ("two that never end", {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/b"}, "minItems": 1}, "b": props(["a"], a={"$ref": "#/$defs/a"})}}, None),
    ("deep", nested(20, "array"), None),
    ("deep objects", nested(20, "object"), None),
    ("too deep", nested(70, "object"), "nested"),
    ("tool call", props(["name", "arguments"], name={"enum": ["f", "g"]}, arguments=props(["city"], city={"type": "string"}, unit={"enum": ["C", "F"]})), None),
    ("inner $id", props(a={"$id": "x", "type": "null"}), None),
    ("no type at all", {"type": []}, "type"),
    ("bad type", {"type": "text"}, "type"),
    ("bad value", {"type": "string", "minLength": "3"}, "minLength"),
    ("more optional", props(**{f"p{i}": {} for i in range(65)}), None),
    ("many members", {"anyOf": [{"type": "string", "minLength": i} for i in range(101)]}, None),
    ("chunks", {"type": "array", "items": {"type": "string", "minLength": 33, "maxLength": 400}, "minItems": 40, "maxItems": 90}, None),
    ("many optional", props(**{f"field_{i}": {"type": "integer", "minimum": i} for i in range(60)}), None),
]  # fmt: skip
GOOD = [(name, schema) for name, schema, word in SCHEMAS if word is None]

# a reader and random writer of the notation, independent of the module under test

TOKEN = re.compile(r'\s*("(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|\{\d+(?:,\d*)?\}|[A-Za-z][A-Za-z0-9]*|[()|*+?])')
ESCAPE = re.compile(r"\\(?:u([0-9A-F]{4})|U([0-9A-F]{8})|(.))|(.)", re.S)


def characters(text: str) -> list[tuple[str, bool]]:
    plain = {"n": "\n", "r": "\r", "t": "\t"}
    return [
        (chr(int(a or b, 16)), True) if a or b else (plain.get(e, e), True) if e else (f, False)
        for a, b, e, f in ESCAPE.findall(text)
    ]


def read(grammar: str) -> dict[str, Any]:
    rules = {}
    for line in grammar.splitlines():
        name, body = line.split(" ::= ", 1)
        tokens = TOKEN.findall(body)
        assert TOKEN.sub("", body).strip() == "", body
        rules[name], rest = alternatives(tokens)
        assert not rest and name not in rules.keys() - {name}
    return rules


def alternatives(tokens: list[str]) -> tuple[Any, list[str]]:
    options: list[list[Any]] = [[]]
    while tokens and tokens[0] != ")":
        token, *tokens = tokens
        if token == "|":
            assert options[-1], "an empty alternative"
            options.append([])
            continue
        if token == "(":
            item, tokens = alternatives(tokens)
            tokens = tokens[1:]
        elif token[0] == '"':
            item = ("text", "".join(char for char, _ in characters(token[1:-1])))
        elif token[0] == "[":
            item = ("set", ranges(characters(token[1:-1])))
        else:
            item = ("rule", token)
        if tokens and tokens[0][0] in "*+?{":
            mark, *tokens = tokens
            bounds = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(mark) or counts(mark[1:-1])
            item = ("repeat", item, *bounds)
            assert not tokens or tokens[0][0] not in "*+?{", "two repetitions in a row"
        options[-1].append(item)
    assert options[-1], "an empty alternative"
    return ("any", options), tokens


def counts(text: str) -> tuple[int, int | None]:
    low, comma, high = text.partition(",")
    return int(low), int(high) if high else None if comma else int(low)


def ranges(found: list[tuple[str, bool]]) -> list[tuple[int, int]]:
    out, i = [], 0
    assert found and found[0] != ("^", False)
    while i < len(found):
        if i + 2 < len(found) and found[i + 1] == ("-", False):
            out.append((ord(found[i][0]), ord(found[i + 2][0])))
            i += 3
        else:
            out.append((ord(found[i][0]),) * 2)
            i += 1
    assert all(a <= b for a, b in out)
    return out


def costs(rules: dict[str, Any]) -> dict[str, int]:
    """How deep a rule's shortest derivation is, so that the writer can find its way out of a recursion."""
    cost = dict.fromkeys(rules, 10**6)
    for _ in range(len(rules) + 1):
        fresh = {name: 1 + cheapest(body, cost) for name, body in rules.items()}
        if fresh == cost:
            return cost
        cost = fresh
    return cost


def cheapest(item: Any, cost: dict[str, int]) -> int:
    if item[0] == "any":
        return min(max((cheapest(part, cost) for part in option), default=0) for option in item[1])
    if item[0] == "repeat":
        return 0 if item[2] == 0 else cheapest(item[1], cost)
    return cost[item[1]] if item[0] == "rule" else 0


def write(item: Any, rules: dict[str, Any], cost: dict[str, int], rng: random.Random, depth: int = 0) -> str:
    kind = item[0]
    if kind == "text":
        return str(item[1])
    if kind == "set":
        low, high = rng.choice(item[1])
        return chr(rng.choice((low, high, rng.randint(low, high), rng.randint(low, min(high, low + 60)))))
    if kind == "rule":
        return write(rules[item[1]], rules, cost, rng, depth + 1)
    if kind == "repeat":
        _, part, low, high = item
        top = low if depth > 40 else min(high if high is not None else 1000, low + rng.choice((0, 1, 2, 8)))
        return "".join(write(part, rules, cost, rng, depth + 1) for _ in range(rng.randint(low, top)))
    options = item[1]
    if depth > 40:
        least = min(cheapest(("any", [option]), cost) for option in options)
        options = [option for option in options if cheapest(("any", [option]), cost) == least]
    return "".join(write(part, rules, cost, rng, depth) for part in rng.choice(options))


def sentences(grammar: str, count: int = SENTENCES, seed: int = 1) -> list[str]:
    rules, rng = read(c.ebnf_grammar(grammar)), random.Random(seed)
    cost = costs(rules)
    return [write(("rule", "root"), rules, cost, rng) for _ in range(count)]


# ---- schemas


@pytest.mark.parametrize("name,schema", GOOD, ids=[name for name, _ in GOOD])
def test_sentences_satisfy_the_schema(name: str, schema: Any) -> None:
    jsonschema.Draft202012Validator.check_schema(schema)
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for text in sentences(c.schema_grammar(schema)):
        text.encode()
        value = json.loads(text)
        assert json.loads(json.dumps(value, allow_nan=False)) == value
        outside = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
        assert not re.search(r"\s", outside)
        checker.validate(value)
        assert c.violation(schema, value) is None, (text, c.violation(schema, value))


@pytest.mark.parametrize("name,schema,word", [s for s in SCHEMAS if s[2]], ids=[s[0] for s in SCHEMAS if s[2]])
def test_refused_by_name(name: str, schema: Any, word: str) -> None:
    with pytest.raises(c.Unsupported) as caught:
        c.schema_grammar(schema)
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_refusal_says_where() -> None:
    with pytest.raises(c.Unsupported, match=re.escape("'uniqueItems' at $.properties.tags is not supported")):
        c.schema_grammar({"properties": {"tags": {"type": "array", "uniqueItems": True}}})


WRONG = [None, True, False, 0, 1, -1, 7, 1.0, 1.5, 12, 10**20, "", "a", "ab", "red", "é" * 6, "2024-02-30", [], [1], [None], [True, True], [1, 2, 3],
         {}, {"a": 1}, {"a": None}, {"a": True, "b": True}, {"kind": "cat"}, {"kind": "dog", "name": 1}, {"next": None}, {"v": 1, "kids": [{}]}, {"x": 1, "y": 2}]  # fmt: skip


@pytest.mark.parametrize("name,schema", GOOD, ids=[name for name, _ in GOOD])
def test_violation_agrees(name: str, schema: Any) -> None:
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for value in (
        WRONG if "time" not in name and name != "hostname" else ()
    ):  # jsonschema checks no time without another package
        assert (c.violation(schema, value) is None) == checker.is_valid(value), (value, c.violation(schema, value))


@pytest.mark.parametrize(
    "name,good,bad",
    [
        ("date", "2024-02-29 2000-12-31", "2023-02-29 1900-02-29 2024-04-31 24-01-01 2024-1-1"),
        ("time", "00:00:00Z 23:59:59.123456+05:30", "24:00:00Z 12:00:00 12:60:00Z"),
        ("date-time", "2024-02-29T12:00:00Z", "2024-02-30T12:00:00Z 2024-02-29"),
        ("ipv4", "0.0.0.0 255.249.10.1", "256.1.1.1 1.1.1 01.1.1.1"),
        ("email", "a.b@c.org x_1@mail.example.com", "@c.org a..b@c.org a@-c.org a@b@c"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000", "123e4567e89b12d3a456426614174000"),
    ],
)
def test_formats(name: str, good: str, bad: str) -> None:
    schema = {"type": "string", "format": name}
    assert [text for text in good.split() if c.violation(schema, text)] == []
    assert [text for text in bad.split() if not c.violation(schema, text)] == []


def test_every_integer_range() -> None:
    rng = random.Random(5)
    for low, high in [
        (0, 0),
        (-1, 1),
        (9, 10),
        (99, 101),
        (-1000, -999),
        *((a, a + rng.randint(0, 2500)) for a in range(-2600, 2600, 371)),
    ]:
        pattern = as_regex(read(c.schema_grammar({"type": "integer", "minimum": low, "maximum": high})))
        for value in {low, high, low - 1, high + 1, *range(low - 15, high + 15, 7), *range(-12, 13)}:
            assert bool(pattern.fullmatch(str(value))) == (low <= value <= high), (low, high, value)


def as_regex(rules: dict[str, Any]) -> re.Pattern[str]:
    def say(item: Any) -> str:
        if item[0] == "text":
            return re.escape(str(item[1]))
        if item[0] == "set":
            return "[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in item[1]) + "]"
        if item[0] == "rule":
            return say(rules[item[1]])
        if item[0] == "repeat":
            return f"(?:{say(item[1])}){{{item[2]},{'' if item[3] is None else item[3]}}}"
        return "(?:" + "|".join("".join(map(say, option)) for option in item[1]) + ")"

    return re.compile(say(("rule", "root")))


@pytest.mark.parametrize(
    "low,high", [(0, 33), (0, 47), (0, 48), (3, 64), (40, 40), (33, 100), (999, 1000), (0, 1000), (5, None), (50, None)]
)
def test_counts_are_exact(low: int, high: int | None) -> None:
    pattern = as_regex(read(c.regex_grammar(f"a{{{low},{'' if high is None else high}}}")))
    assert [n for n in range(1100) if pattern.fullmatch("a" * n)] == list(range(low, 1100 if high is None else high + 1))


# ---- objects, regexes, choices


def test_objects() -> None:
    for text in sentences(c.object_grammar(), 100):
        assert isinstance(json.loads(text), dict)


REGEXES = [
    "abc", "a|b|cd", "(ab|cd){2,3}", "[a-f0-9]{8}", r"\d+\.\d{2}", r"\w+@\w+\.com", r"[^abc]+", r"\s?\S\D\W", ".{3}", "^x$", "^a|b$", "(a?b*)+c",
    "(?:yes|no)(?: sir)?", "[]-]{2}[\\^\\\\]", "é[à-ü]😀", r"a{0,5}?b+?c*?", "(?P<name>x)y", "", "a{3}", "(a|)b", "((a{0,3}){0,3}){2}", r"[\d_-]+", "x{2,}", r"\n\t\"'", r"[^\W\d]+",
    r"\Aab\Z", "(a*)*b", "((a*)*)*", "(a|b|)*c", "(a?){0,1000}b", "((a?)*|(b?)*)*", "(a?b?)*c", "(a?(b*c?)+){2,3}", "((|a)(|b)){3}", "(){5}", "(|)*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REGEXES)
def test_regex_sentences_match(pattern: str) -> None:
    for text in sentences(c.regex_grammar(pattern)):
        assert re.fullmatch(pattern, text), text


@pytest.mark.parametrize(
    "pattern,word",
    [("(?:(?=a)b)*", "inside a repetition"), (r"(a)\1", "backreference"), (r"\bx", "word boundary"), ("(?m)x", "flag"), ("(?i:x)", "flag"),
     ("a^b", "no text"), ("(a$)b", "no text"), ("(?=a)b", "no text"), ("x{200000}", "repetition"), ("(", "cannot be read"), ("[z-a]", "cannot be read"), ("a" * 4001, "characters"), ("(" * 400 + ")" * 400, "."),
     ("(a)(?(1)b|c)", "conditional"), ("[^\\s\\S]", "character"), ("\0", "character"), ("a{1,99999999999999}", ".")],
)  # fmt: skip
def test_regex_refused_by_name(pattern: str, word: str) -> None:
    with pytest.raises(c.Unsupported, match=word):
        c.regex_grammar(pattern)


def test_choices() -> None:
    choices = ["yes", "no", "not sure", 'say "hi"\n', "é", "", "back\\slash", "yes"]
    assert set(sentences(c.choice_grammar(choices), 300)) == set(choices)
    for bad in ([], ["a\0"], ["\ud800"]):
        with pytest.raises(c.Unsupported):
            c.choice_grammar(bad)


# ---- hostile input


def chain(count: int) -> Any:
    links = {f"d{i}": props(["n"], n={"$ref": f"#/$defs/d{i + 1}"}) for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {"type": "null"}}}


def doubling(count: int) -> Any:
    links = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(count)}
    return {"$ref": "#/$defs/d0", "$defs": {**links, f"d{count}": {"type": "null"}}}


HOSTILE: dict[str, Any] = {
    "a megabyte of properties": {"properties": {f"property number {i}": {"type": "integer"} for i in range(30_000)}},
    "a megabyte of annotation": {"type": "null", "description": "x" * 1_000_000},
    "ten thousand members": {"enum": [f"member {i}" for i in range(10_000)]},
    "ten thousand prefixes": {"enum": ["a" * (i % 600) for i in range(10_000)]},
    "prefixes of a thousand": {"enum": ["a" * i for i in range(1000)]},
    "members against a type": {"type": "string", "enum": list(range(10_000))},
    "long chain of references": chain(900),
    "longer chain of references": chain(3_000),
    "doubling": doubling(40),
    "hundred thousand deep": nested(100_000, "array"),
    "many alternatives": {"anyOf": [{"type": "string", "minLength": i % 1000} for i in range(10_000)]},
    "many of oneOf": {"oneOf": [{"const": i} for i in range(10_000)]},
    "repetitions": {"type": "array", "items": {"type": "array", "items": {"type": "string", "maxLength": 1000}, "maxItems": 1000}, "maxItems": 1000},
    "huge bounds": {"type": "integer", "minimum": -(10**4000), "maximum": 10**4000},
    "huge numbers": {"type": "number", "minimum": -(10**4000)},
    "huge float": {"type": "number", "maximum": 1e308},
    "infinite": {"type": "number", "maximum": float("inf")},
    "surrogate": {"enum": ["\ud800"]},
    "surrogate name": {"properties": {"\ud800": {}}},
    "surrogate keyword": {"\ud800": 1},
    "not a schema": [1, 2],
    "text": "x",
    "odd ref": {"$ref": "#/$defs/%zz~"},
    "odd type": {"type": [None, {}]},
    "empty type": {"type": []},
    "nan member": {"enum": [float("nan")]},
    "slow pattern": {"enum": ["a" * 30 + "b"], "pattern": "^(a+)+$"},
    "defs not a map": {"$ref": "#/$defs/x", "$defs": {"x": 5}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_are_quick(name: str) -> None:
    started = time.perf_counter()
    try:
        grammar = c.schema_grammar(HOSTILE[name])
        assert len(grammar) <= MAX_TEXT and grammar.count("\n") <= MAX_RULES
        if not re.search("thousand|chain|repetitions", name):
            sentences(grammar, 2)
    except c.Unsupported as error:
        assert len(str(error)) < 600
        str(error).encode("utf-8", "replace")
    assert time.perf_counter() - started < 5


def test_violation_never_hangs() -> None:
    value: Any = {"v": 1}
    for _ in range(3000):
        value = {"v": 1, "kids": [value]}
    assert c.violation(TREE, value)
    started = time.perf_counter()
    assert c.violation({"pattern": "^(a+)+$"}, "a" * 200 + "b")
    assert time.perf_counter() - started < 5
    for schema in ({"$ref": "#"}, {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}):
        with pytest.raises(c.Unsupported):
            c.violation(schema, 1)
    with pytest.raises(c.Unsupported):
        c.violation(doubling(40), 1)


OWN = [  # (grammar, texts that it makes, texts that it does not)
    ('root ::= "a" | "b"', ["a", "b"], ["c"]),
    ('root ::= x y # comment\nx ::= [a-c]\ny ::= ("1" | "2")?', ["a", "b1", "c2"], ["", "1"]),
    ('root ::= [^a-z\\n]+ "\\x41" "\\u0042"', ["12AB"], ["aAB"]),
    ('root ::=\n  "a"{2,3}\n  ("," "b"*)+', ["aa,", "aaa,bb,"], ["a,"]),
    ('root ::= . "-" [a-]', ["x-a", "--"], []),
    ('root-rule ::= "no"\nroot ::= "(" root ")" | root-rule', ["no", "(no)", "((no))"], ["("]),
]


@pytest.mark.parametrize(("text", "good", "bad"), OWN)
def test_own_grammars(text: str, good: list[str], bad: list[str]) -> None:
    """Written anew, the grammar makes the same texts."""
    made = set(sentences(c.own_grammar(text), 400))
    assert made
    assert not made & set(bad)
    assert made & set(good) or "." in text or "^" in text


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "root"),
        ('x ::= "a"', "root"),
        ("root ::= y", "'y'"),
        ('root ::= "a" root ::= "b"', "twice"),
        ('root ::= "a', "cannot be read"),
        ('root ::= ("a"', "')'"),
        ("root ::= root", "end"),
        ('root ::= root "a" | "b"', "reads nothing"),
        ("root ::= [b-a]", "no character"),
        ("root ::= []", "no character"),
        ('root ::= ("a"?){0,900} "b"', "empty"),
        ('root ::= x* "b"\nx ::= "a"?', "empty"),
        ('root ::= "a"{500000}', "repetition"),
        ('root ::= "a"{3,2}', "no number"),
        ('root ::= "\\q"', "escape"),
        ('root ::= "\\x00"', "character"),
        ("root ::= " + "(" * 5000 + '"a"' + ")" * 5000, "nested"),
        ("root ::= " + '"a" | ' * 3 + "§", "cannot be read"),
        (
            "root ::= r0\n" + "".join(f'r{i} ::= r{i + 1} r{i + 1} | ""\n' for i in range(5000)) + 'r5000 ::= "c"',
            "5000 rules, repeated groups counted",
        ),
    ],
)
def test_own_grammars_refused(text: str, word: str) -> None:
    with pytest.raises(c.Unsupported, match=re.escape(word)):
        c.own_grammar(text)
