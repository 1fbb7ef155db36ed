"""What schemas mean, seen from both sides: the texts that a grammar takes and the values that the check lets through.

The JSON Schema Test Suite comes from JSON_SCHEMA_TEST_SUITE where that names a checkout of it, else with an sdist by pip.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import tarfile
from typing import Any

import pytest
from conftest import download_sdist

import constraints as c
from grammar import Gbnf
from regular import Automaton


def taker(grammar: str) -> Any:
    """Whether a text is in a grammar, found out by this project's own automaton over the EBNF: no engine."""
    reader = Gbnf(c.ebnf_grammar(grammar), core=True)
    root = reader.read()
    automaton = Automaton(rules=reader.grammar.rules)

    def takes(text: str) -> bool:
        automaton.budget = 10_000_000
        state = automaton.start(root)
        for char in text:
            state = automaton.step(state, ord(char))
        return 0 in state

    return takes


def guided(grammar: str) -> Any:
    """Whether llguidance takes a text."""
    llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")
    tokens = llguidance.LLTokenizer("byte")

    def takes(text: str) -> bool:
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0)
        assert not matcher.is_error(), matcher.get_error()
        return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()

    return takes


def compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


FLAG = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}
# (schema, texts that satisfy it, texts that do not)
MEANINGS: list[tuple[Any, list[str], list[str]]] = [
    (FLAG | {"required": ["a"]}, ['{"a":1}', '{"b":2,"a":1}', '{"x":[],"a":1,"y":null}'], ['{"b":2}', '{"a":"1"}', '{"a":1,"b":"x"}']),
    (FLAG | {"additionalProperties": False}, ["{}", '{"b":1,"a":2}'], ['{"c":1}']),
    (FLAG | {"additionalProperties": {"type": "null"}}, ['{"c":null,"a":1}'], ['{"a":null}', '{"c":1}']),
    ({"allOf": [FLAG, {"required": ["c"]}], "additionalProperties": {"type": "string"}}, ['{"c":"x"}'], ['{"c":1}', '{"a":1,"c":"x"}']),
    ({"anyOf": [{"required": ["a"]}, {"required": ["b"]}], **FLAG}, ['{"a":1}', '{"b":1}'], ["{}", '{"c":1}', '{"a":""}']),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], **FLAG}, ['{"a":1}', '{"b":1,"c":2}'], ["{}", '{"a":1,"b":1}']),
    ({"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 2}]}, ["1", "2.5", "-7"], ["3", "1.5"]),
    ({"not": {"type": ["string", "object"]}}, ["1", "null", "[]", "true"], ['"x"', "{}"]),
    ({"not": {"enum": ["a", 1, None]}, "type": ["string", "integer", "null"]}, ['"b"', "2", '""'], ['"a"', "1", "null"]),
    ({"not": {"properties": {"a": {"type": "integer"}}, "required": ["a"]}, "type": "object"}, ["{}", '{"a":"x"}'], ['{"a":1}']),
    ({"if": {"properties": {"k": {"const": "x"}}, "required": ["k"]}, "then": {"required": ["v"]}, "else": {"maxProperties": 1}, "type": "object"},
     ['{"k":"x","v":1}', '{"k":"y"}', "{}"], ['{"k":"x"}', '{"k":"y","v":1}']),
    ({"dependentRequired": {"a": ["b"]}, **FLAG}, ["{}", '{"b":1}', '{"b":1,"a":1}'], ['{"a":1}']),
    ({"dependencies": {"a": {"properties": {"b": {"const": 7}}}}, **FLAG}, ['{"b":1}', '{"a":1,"b":7}'], ['{"a":1,"b":1}']),
    ({"type": "object", "patternProperties": {"^s_": {"type": "string"}, "n$": {"maxLength": 1}}, "additionalProperties": False},
     ['{"s_":"long"}', '{"s_n":"x"}', '{"n":5}'], ['{"s_":1}', '{"s_n":"xy"}', '{"x":1}', '{"s_n":1}']),
    ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, ['{"ab":1}'], ['{"A":1}', '{"":1}']),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "additionalProperties": False, "minProperties": 1, "maxProperties": 1}, ['{"b":1}'], ["{}", '{"a":1,"b":1}']),
    ({"type": "array", "contains": {"const": 1}}, ["[1]", "[0,1,2]"], ["[]", "[0]"]),
    ({"type": "array", "contains": {"type": "integer"}, "minContains": 2, "maxContains": 2}, ["[1,2]", '[1,"a",2]'], ["[1]", "[1,2,3]"]),
    ({"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True}, ['["c","a"]', "[]"], ['["a","a"]']),
    ({"type": "array", "items": [{"type": "null"}, {"type": "integer"}], "additionalItems": False}, ["[]", "[null]", "[null,1]"], ["[1]", "[null,1,2]"]),
    ({"type": "array", "prefixItems": [{"type": "null"}], "items": {"type": "integer"}, "minItems": 2}, ["[null,1]", "[null,1,2]"], ["[null]", "[1,1]"]),
    ({"type": "string", "pattern": "^[a-z]+$", "minLength": 2, "maxLength": 3}, ['"ab"', '"abc"'], ['"a"', '"abcd"', '"AB"']),
    ({"type": "string", "pattern": "a.*b|c", "maxLength": 4}, ['"xaby"', '"c"'], ['"ba"', '"aaaab"']),
    ({"allOf": [{"pattern": "a"}, {"pattern": "b"}, {"not": {"pattern": "c"}}], "type": "string"}, ['"ab"', '"b-a"'], ['"a"', '"abc"']),
    ({"type": "string", "pattern": r"^\p{Lu}[^\s\d]$"}, ['"Éé"', '"A-"'], ['"é1"', '"A "']),
    ({"type": "number", "minimum": 0.5, "exclusiveMaximum": 2.25}, ["0.5", "1", "2.2499"], ["0.49", "2.25", "-1"]),
    ({"type": "number", "minimum": 0, "exclusiveMinimum": True, "$schema": "http://json-schema.org/draft-04/schema#"}, ["0.1", "3"], ["0", "-1"]),
    ({"type": "number", "multipleOf": 0.05, "minimum": 0}, ["0.15", "2", "0"], ["0.12", "0.051"]),
    ({"type": "integer", "multipleOf": 7, "allOf": [{"multipleOf": 3}]}, ["0", "21", "-42"], ["7", "3"]),
    ({"$ref": "#/$defs/a", "maxLength": 2, "$defs": {"a": {"type": "string"}}}, ['"ab"'], ['"abc"', "1"]),
    ({"$ref": "#/definitions/a", "maxLength": 2, "definitions": {"a": {"type": "string"}}, "$schema": "http://json-schema.org/draft-07/schema#"}, ['"abc"'], ["1"]),
    ({"$ref": "#here", "$defs": {"x": {"$anchor": "here", "type": "null"}}}, ["null"], ["1"]),
    ({"$ref": "other", "$id": "http://x.example/root", "$defs": {"x": {"$id": "other", "type": "null"}}}, ["null"], ["1"]),
    ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {"type": "null"}}, "type": "object", "required": ["a"]}, ['{"a":null}'], ['{"a":1}']),
    ({"type": "object", "allOf": [{"properties": {"a": {}}}], "unevaluatedProperties": False}, ['{"a":1}', "{}"], ['{"b":1}']),
    ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]}, ["[[null],[]]", "null"], ["[1]"]),
    ({"type": "string", "maxlenght": 3, "x-foo": True, "format": "colour"}, ['"abcd"'], ["1"]),
    ({"anyOf": [{"enum": [["a"], {"k": "v"}, {}]}, {"type": "array", "items": {"enum": ["b"]}}, {"type": "object", "required": ["z"]}]},
     ['["a"]', '["b","b"]', "[]", '{"k":"v"}', "{}", '{"z":[]}'], ['["a","b"]', '{"k":1}']),
    ({"type": "integer", "$schema": "http://json-schema.org/draft-04/schema#"}, ["1"], ["1.0", "1.5"]),
    ({"properties": {"a": {"title": "A", "type": "null"}, "b": {"type": "null", "default": 1}, "c": {"properties": {"a": {"type": "null"}}}}, "type": "object"},
     ['{"a":null,"b":null,"c":{"a":null,"b":1}}'], ['{"a":1}', '{"b":1}', '{"c":{"a":1}}']),
    ({"enum": [["a"], {"k": 1}, "x"], "type": ["array", "object"], "minItems": 1}, ['["a"]', '{"k":1}'], ['"x"']),
    ({"type": "number", "not": {"multipleOf": 1}}, ["1.5", "10.50", "-0.1"], ["1.0", "2.00", "0.0", "-1.0", "100"]),
    ({"not": {"multipleOf": 3}}, ["4.0", "31", "0.3"], ["3.0", "30", "0"]),
    ({"type": "number", "oneOf": [{"multipleOf": 0.5}, {"multipleOf": 0.25}]}, ["1.25"], ["1.50", "1.5", "2"]),
    ({"enum": [[1], []], "unevaluatedItems": False}, ["[]"], ["[1]"]),
    ({"type": "object", "enum": [{"a": 1}, {"b": 2}], "properties": {"b": True}, "unevaluatedProperties": False}, ['{"b":2}'], ['{"a":1}']),
    ({"type": "number", "maximum": 1.7976931348623157e308, "exclusiveMaximum": 5}, ["4", "-1"], ["6", "5"]),
    ({"type": "number", "minimum": 0, "exclusiveMaximum": 1}, ["9.9e-1", "1.234567890123456e-5"], ["9.9999999999999999e-1", "1"]),
    ({"type": "array", "items": False, "uniqueItems": True}, ["[]"], ["[1]"]),
    ({"type": "string", "pattern": "^$^"}, ['""'], ['"a"']),
    ({"type": "string", "pattern": "^($|b)^"}, ['""'], ['"b"', '"cabb"']),
    ({"type": "string", "pattern": "(?=^.{4,}$)(?=.*[0-9])[a-z0-9]*$"}, ['"abc1"'], ['"ab1"', '"abcd"']),
    ({"type": "string", "pattern": r"^(?=.{3,8}$)(?![_.])(?!.*[_.]{2})[a-z._]+(?<![_.])$"},
     ['"abc"', '"a.b_c"'], ['"ab"', '"_abc"', '"a..b"', '"abc."', '"abcdefghi"']),
    ({"type": "string", "pattern": "^(?!^[0-9])[a-z0-9]+$"}, ['"a1"'], ['"1a"']),
    ({"type": "string", "pattern": r"^[\w-\.]+@([\w-]+\.)+[\w-]{2,4}$"}, ['"a-b.c@x.org"'], ['"@x.org"', '"a b@x.org"']),
]  # fmt: skip
# Where readers differ, or take the last of two: (schema, texts that satisfy it for all, texts that do not for some)
DISPUTED: list[tuple[Any, list[str], list[str]]] = [
    ({"pattern": r"^(?!\s*$).+", "type": "string"}, ['"a"', '" a"', '"é"'], ['" "', '"\u00a0"', '"\u3000"']),
    ({"not": {"pattern": r"\s"}, "type": "string"}, ['"ab"', '"é"'], ['"a b"', '"a\u00a0b"', '"\u2003"', '"\ufeff"']),
    ({"pattern": r"^(?!.*\d).*$", "type": "string"}, ['"ab"'], ['"1"', '"\u0663"']),
    ({"pattern": r"^(?!.*[^\w]).*$", "type": "string"}, ['"ab"'], ['"-"', '"\u00e9"']),
    ({"not": {"pattern": "^.$"}, "type": "string"}, ['""', '"ab"'], ['"a"', '"\u2028"']),
    ({"pattern": r"^(?!.*\p{L}).*$", "type": "string"}, ['"12"'], ['"a"', '"\U0001d49c"']),
    ({"pattern": r"^[^\p{L}]$", "type": "string"}, ['"1"'], ['"a"', '"\U0001d49c"']),
    ({"patternProperties": {r"^\w$": {"type": "null"}}, "additionalProperties": {"type": "integer"}, "type": "object"}, ['{"a":null,"--":1}'], ['{"é":1}', '{"a":1}']),
    ({"type": "object", "not": {"additionalProperties": {"type": "integer"}}}, ['{"x":"s"}', '{"a":1,"x":"s"}'], ['{"x":"s","x":1}', '{"a":1}', "{}"]),
    ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "not": {"patternProperties": {"^x": {"minimum": 5}}}},
     ['{"x":9,"x":1}', '{"a":"","x":1}'], ['{"x":1,"x":9}', '{"x":9}', "{}"]),
]  # fmt: skip
REFUSED: list[tuple[Any, str]] = [
    ({"type": "string", "pattern": "$a^"}, "no value"),
    ({"type": "number", "maximum": 1e40}, "'maximum'"),
    ({"type": "number", "minimum": 1e-50}, "'minimum'"),
    ({"const": {"a": 1}, "unevaluatedProperties": False}, "no value"),
    ({"type": "string", "pattern": r"(?!^\d+$).+"}, "looks back"),
    ({"type": "string", "pattern": r"(?=(?<!b))\W$"}, "looks back"),
    ({"type": "string", "pattern": "(?<=a$)b"}, "looks ahead"),
]


@pytest.mark.parametrize("schema,good,bad", DISPUTED, ids=range(len(DISPUTED)))
def test_what_readers_dispute_is_neither(schema: Any, good: list[str], bad: list[str]) -> None:
    for takes in (taker(c.schema_grammar(schema)), guided(c.lark_grammar(c.schema_grammar(schema)))):
        assert [text for text in good if not takes(text)] == []
        assert [text for text in bad if takes(text)] == []


@pytest.mark.parametrize("schema,word", REFUSED, ids=range(len(REFUSED)))
def test_refused_by_name(schema: Any, word: str) -> None:
    with pytest.raises(c.Unsupported, match=word):
        c.schema_grammar(schema)


DEEP = """
import llguidance, numpy, constraints, guidance
guides = guidance.Guides(numpy, llguidance.LLTokenizer("byte"), 256, frozenset([0]))
chain = {f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(1900)} | {"d1900": {}}
for schema in ({"type": "integer", "multipleOf": 1999}, {"$ref": "#/$defs/d0", "$defs": chain}):
    assert guides.start(constraints.writing_grammar(schema)).allowed().any()
"""


def test_rules_one_below_the_other_do_not_overflow_the_stack() -> None:
    """The engine's process would be gone, without a word."""
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    done = subprocess.run([sys.executable, "-c", DEEP], cwd=pathlib.Path(c.__file__).parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("schema,good,bad", MEANINGS, ids=range(len(MEANINGS)))
def test_meaning(schema: Any, good: list[str], bad: list[str]) -> None:
    takes = taker(c.schema_grammar(schema))
    assert [text for text in good if not takes(text)] == []
    assert [text for text in bad if takes(text)] == []
    assert [text for text in good if c.violation(schema, json.loads(text))] == []
    assert [text for text in bad if not c.violation(schema, json.loads(text))] == []


@pytest.mark.parametrize("schema,good,bad", MEANINGS, ids=range(len(MEANINGS)))
def test_meaning_in_the_engines_own_matchers(schema: Any, good: list[str], bad: list[str]) -> None:
    takes = guided(c.lark_grammar(c.schema_grammar(schema)))
    assert [text for text in good if not takes(text)] == []
    assert [text for text in bad if takes(text)] == []


ABC = {name: {"type": "integer"} for name in "abcdefg"}
# (schema, texts that only llguidance takes beside those that all do, texts that it does not)
BEYOND_EBNF: list[tuple[Any, list[str], list[str]]] = [
    (
        {"type": "object", "properties": ABC, "maxProperties": 3, "required": ["g"]},
        ['{"g":1}', '{"g":1,"b":2,"a":3}', '{"x":0,"g":1,"y":2}'],
        ['{"a":1}', '{"g":1,"b":2,"a":3,"c":4}', '{"g":1,"x":0,"y":0,"z":0}', '{"g":1,"g":1}'],
    ),
    (
        {"type": "object", "properties": ABC, "minProperties": 2},
        ['{"g":1,"a":2}', '{"x":1,"a":2}'],
        ["{}", '{"a":1}', '{"x":1,"x":2}'],
    ),
    (
        {"type": "object", "properties": ABC, "required": [*"gfedcba", *"zyxwv"]},
        ["{" + ",".join(f'"{name}":1' for name in "zaybxcwdvefg") + "}"],
        ["{" + ",".join(f'"{name}":1' for name in "zaybxcwdvef") + "}"],
    ),
    (
        {"type": "array", "items": {"enum": [*"abcdefghijkl"]}, "uniqueItems": True, "minItems": 2, "maxItems": 3},
        ['["l","a"]', '["c","b","a"]'],
        ['["a"]', '["a","b","a"]', '["d","c","b","a"]'],
    ),
    (
        {"type": "array", "items": {"enum": [*"abcdefgh"]}, "uniqueItems": True},
        ["[]", '["h","a"]'],
        ['["a","a"]', '["a","b","a"]'],
    ),
]
SPREAD = {"type": "object", "properties": {str(i): {} for i in range(99)}, "required": ["98", "0"]}


@pytest.mark.parametrize("schema,good,bad", BEYOND_EBNF, ids=range(len(BEYOND_EBNF)))
def test_any_order(schema: Any, good: list[str], bad: list[str]) -> None:
    """Of many members, in llguidance; what EBNF has of them is less, and never more."""
    takes, less = guided(c.lark_grammar(c.schema_grammar(schema))), taker(c.schema_grammar(schema))
    assert [text for text in good if not takes(text) or c.violation(schema, json.loads(text))] == []
    assert [text for text in bad if takes(text) or less(text)] == []


def any_object(rng: random.Random) -> tuple[Any, list[str]]:
    """A schema with named properties, counts and others, and texts of its properties in any order."""
    values = {f"k{i}": rng.choice(["null", "true"]) for i in range(rng.randint(0, 9))}
    kinds = {"null": "null", "true": "boolean"}
    schema: dict[str, Any] = {"type": "object", "properties": {name: {"type": kinds[value]} for name, value in values.items()}}
    schema["required"] = rng.sample([*values, "z"], rng.randint(0, min(len(values), 6)))
    more = {"additionalProperties": rng.choice([False, {"type": "null"}]), "patternProperties": {"^z": {"type": "boolean"}}}
    more |= {"maxProperties": rng.randint(0, len(values) + 2), "minProperties": rng.randint(0, len(values) + 1)}
    schema |= {word: value for word, value in more.items() if rng.random() < 0.5}
    texts = []
    for _ in range(12):
        names = rng.sample([*values, "z", "y"], rng.randint(0, len(values) + 2))
        names = list(dict.fromkeys(schema["required"] + names)) if rng.random() < 0.5 else names
        pairs = (
            f'"{name}":{rng.choice(["null", "true"]) if rng.random() < 0.1 else values.get(name, "null")}' for name in names
        )
        texts.append("{" + ",".join(pairs) + "}")
    return schema, texts


def test_any_object() -> None:
    """What is in a grammar is valid, in both dialects; what is valid is in llguidance's."""
    rng, refused = random.Random(7), 0
    for _ in range(60):
        schema, texts = any_object(rng)
        try:
            grammar = c.schema_grammar(schema)
        except c.Unsupported:
            refused += 1
            continue
        takes, less = guided(c.lark_grammar(grammar)), taker(grammar)
        for text in texts:
            valid = c.violation(schema, json.loads(text)) is None
            assert takes(text) <= valid and less(text) <= valid, (schema, text)
            assert takes(text) or not valid or "minProperties" in schema, (schema, text)  # names that nothing keeps apart
    assert refused < 30


def test_too_many_members_to_be_counted() -> None:
    takes = guided(c.lark_grammar(c.schema_grammar(SPREAD)))
    assert takes('{"98":1,"5":2,"0":3,"x":4}')
    assert not takes('{"98":1,"5":2}')


def test_whitespace() -> None:
    """Between tokens, not in them; only llguidance knows how."""
    grammar = c.spaced(c.writing_grammar({"type": "object", "properties": {"a": {"items": {"enum": [1, {"k": "b c"}]}}}}))
    takes = guided(c.lark_grammar(grammar))
    assert takes('{"a":[1,{"k":"b c"}]}') and takes('{\n  "a": [1, 1,\t{ "k": "b c" } ]\n}')
    assert not takes('{"a":[1 1]}') and not takes('{"a ":[]}') and not takes('{"a":[{"k":"bc"}]}')
    assert not guided(c.lark_grammar(grammar.removesuffix(c.spaced(""))))('{ "a":[1]}')
    with pytest.raises(c.Unsupported, match="whitespace"):
        c.ebnf_grammar(grammar)


def test_strict_keeps_the_order_and_to_what_is_named() -> None:
    takes = taker(c.schema_grammar(FLAG | {"required": ["a", "b"]}, strict=True))
    assert takes('{"a":1,"b":2}')
    assert not takes('{"b":2,"a":1}') and not takes('{"a":1,"b":2,"c":3}')


def test_unknown_words_are_told() -> None:
    schema = {
        "x-foo": 1,
        "properties": {"a": {"maxlenght": 3, "required": True}, "x-bar": {"format": "colour"}},
        "$defs": {"d": {"minimun": 1}},
    }
    assert c.unknown_words(schema) == {
        "x-foo": "",
        "properties.a.maxlenght": "maxLength",
        "properties.a.required": "a list",
        "properties.x-bar.format": "",
        "$defs.d.minimun": "minimum",
    }


def test_grammars_are_put_together() -> None:
    one, two = (
        c.prefixed(c.schema_grammar(schema), f"p{i}")
        for i, schema in enumerate(({"type": "integer"}, {"items": {"$ref": "#"}, "type": "array"}))
    )
    takes = taker('root ::= "<" (rp0root | rp1root) ">"\n' + one + two)
    assert takes("<12>") and takes("<[[],[]]>") and not takes("<true>")


SUITE = "jsonschema==4.26.0"  # its sdist carries the JSON Schema Test Suite in the folder json


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    if home := os.environ.get("JSON_SCHEMA_TEST_SUITE"):
        return pathlib.Path(home)
    folder = tmp_path_factory.mktemp("suite")
    archive = download_sdist(SUITE, folder)
    if isinstance(archive, str):
        pytest.skip(archive)
    with tarfile.open(archive) as tar:
        tests = [member for member in tar if "/json/tests/" in member.name]
        tar.extractall(folder, tests, filter="data")
    return folder


DRAFTS = {"draft4": 4, "draft6": 6, "draft7": 7, "draft2019-09": 2019, "draft2020-12": 2020}


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_json_schema_test_suite(draft: str, suite: pathlib.Path) -> None:
    """Each schema of the required tests is honoured or refused by name, and no verdict is wrong."""
    files = sorted(suite.glob(f"**/tests/{draft}/*.json"))
    assert len(files) > 20
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    for file in files:
        if file.stem in ("format", "vocabulary"):  # known formats are asserted; metaschemas from elsewhere are not read
            continue
        for group in json.loads(file.read_text()):
            counts["schemas"] += 1
            label = f"{file.stem}: {group['description']}"
            try:
                takes = taker(c.schema_grammar(group["schema"], DRAFTS[draft]))
            except c.Unsupported:
                takes = None
                counts["grammar refused"] += 1
            for test in group["tests"]:
                value, valid = test["data"], test["valid"]
                try:
                    said = c.violation(group["schema"], value, DRAFTS[draft]) is None
                    counts["verdicts"] += 1
                except c.Unsupported:
                    counts["checks refused"] += 1
                    said = valid
                taken = takes(compact(value)) if takes else None
                counts["valid instances outside the grammar"] += taken is False and valid
                if said != valid or (taken and not valid):
                    wrong.append(f"{label}: {test['description']}: check {said}, grammar {taken}, right is {valid}")
    print(draft, dict(counts))
    assert wrong == []
