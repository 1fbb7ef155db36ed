"""Grammars of tool calls: a random sentence of one is read back as calls that fit their schemas."""

import json
import random

import pytest

from backends import lark_grammar
from constraints import Unsupported, spaced, violation, writing_grammar
from tool_grammar import after_reasoning, behind, calls_grammar, either
from tool_parser import Parser
from tool_syntax import KNOWN, Syntax

llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed: nothing here walks a grammar")

SCHEMAS = {
    "f": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Rome", "Ulm"]},
            "n": {"type": "integer"},
            "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["n"],
        "additionalProperties": False,
    },
    "g": {"type": "object", "properties": {}, "additionalProperties": False},
    "h": {"type": "object", "properties": {"b": {"type": "boolean"}, "c": {"type": "integer"}}, "additionalProperties": False},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}} for name, schema in SCHEMAS.items()
]
FENCES = Syntax(
    "fences",
    "tagged",
    ("<think>", "</think>"),
    before="<tool_call>\n<function=",
    between="\n</function>\n</tool_call>\n<tool_call>\n<function=",
    after="\n</function>\n</tool_call>",
    middle=">\n",
    openers=("<tool_call>", "<function="),
    closers=("</function>", "</tool_call>"),
    key=("<parameter=", ">"),
    value_end="</parameter>",
    value_line=True,
)
SYNTAXES = {"fences": FENCES} | {
    name: KNOWN[name] for name in ("hermes", "kimi", "mistral", "mistral-args", "lfm2", "llama3", "kimi-k3", "gemma")
}


def sentence(grammar, seed, most=2000):
    """A random text that the grammar allows, and ends; None where it has not ended by then."""
    from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

    letters = llguidance.LLTokenizer("byte")
    matcher, mask = llguidance.LLMatcher(letters, lark_grammar(grammar)), allocate_token_bitmask(1, letters.vocab_size)
    assert not matcher.get_error(), matcher.get_error()
    dice, out = random.Random(seed), b""
    while len(out) < most:
        fill_next_token_bitmask(matcher, mask)
        able = [i for i in range(256) if mask[0][i // 32] >> (i % 32) & 1]
        if not able or (matcher.is_accepting() and dice.random() < 0.5):
            return out.decode() if matcher.is_accepting() else None
        ending = [i for i in able if chr(i) in '"}]<\n']
        out += bytes([dice.choice(ending if ending and dice.random() < 0.5 else able)])
        matcher.consume_token(out[-1])
    return None


def calls_of(syntax, text, inside=False, neutral=False):
    parser = Parser(syntax, SCHEMAS, inside, neutral)
    calls = []
    for kind, piece, _ in parser.feed(text) + parser.finish():
        if kind == "call":
            calls.append([piece, ""])
        elif kind == "arguments":
            calls[-1][1] += piece
    return [(name, json.loads(arguments)) for name, arguments in calls], parser.whole


@pytest.mark.parametrize("name", SYNTAXES)
def test_forced_calls_fit_their_schemas(name):
    grammar, neutral = calls_grammar(SYNTAXES[name], TOOLS, None, True, True)
    assert not neutral
    seen = set()
    for seed in range(30):
        text = sentence(grammar, seed)
        if text is None:
            continue
        calls, whole = calls_of(SYNTAXES[name], text)
        assert calls and whole, text
        assert not any(violation(SCHEMAS[called], arguments) for called, arguments in calls), text
        seen |= {called for called, _ in calls}
    assert seen == set(SCHEMAS)


def test_one_call_where_one_is_named_or_parallel_is_off():
    for names, parallel in ((["g"], True), (None, False)):
        grammar, _ = calls_grammar(KNOWN["hermes"], TOOLS, names, True, parallel)
        texts = [text for seed in range(20) if (text := sentence(grammar, seed))]
        assert texts and all(len(calls_of(KNOWN["hermes"], text)[0]) == 1 for text in texts)


def test_other_families_are_forced_as_bare_json():
    grammar, neutral = calls_grammar(KNOWN["minimax-m3"], TOOLS, None, True, True)
    assert neutral
    calls, whole = calls_of(KNOWN["minimax-m3"], sentence(grammar, 1), neutral=True)
    assert calls and whole
    mark = "]<]minimax[>["  # where the engine does not follow the grammar, what the model writes is still a call
    own = f'{mark}<tool_call>{mark}<invoke name="f">{mark}<n>1{mark}</n>{mark}</invoke>{mark}</tool_call>'
    assert calls_of(KNOWN["minimax-m3"], own, neutral=True) == ([("f", {"n": 1})], True)


def test_a_strict_call_that_is_begun_is_constrained():
    """The text before it is free, and it need not come."""
    grammar, _ = calls_grammar(FENCES, TOOLS, None, False, True)
    letters = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(letters, lark_grammar(grammar))
    for text, fits in (
        ("Hello <tool", True),
        ("Hi<tool_call>\n<function=g>\n\n</function>\n</tool_call>", True),
        ("Hi<tool_call>\n<function=z", False),
        ("Hi<tool_call> no", False),
    ):
        matcher.reset()
        assert (matcher.validate_tokens(list(text.encode())) == len(text.encode())) == fits, text
    assert calls_grammar(FENCES, [{"type": "function", "function": {"name": "g"}}], None, False, True).text is None


def test_reasoning_in_front_is_free():
    grammar, _ = calls_grammar(KNOWN["hermes"], TOOLS, ["g"], True, True)
    call = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    letters = llguidance.LLTokenizer("byte")
    for inside, text, fits in (
        (True, f"So </thin</think>\n\n{call}", True),
        (True, call, True),  # still reasoning
        (False, f"<think>Hm</think>{call}", True),
        (False, call, True),
        (False, f"Hm</think>{call}", False),
    ):
        matcher = llguidance.LLMatcher(letters, lark_grammar(after_reasoning(grammar, "<think>", "</think>", inside)))
        assert (matcher.validate_tokens(list(text.encode())) == len(text.encode())) == fits, (inside, text)


def test_content_or_calls():
    grammar = either('root ::= "{" [a-z]* "}"\n', calls_grammar(KNOWN["hermes"], TOOLS, None, True, True)[0])
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer("byte"), lark_grammar(grammar))
    call = '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    for text, fits in (("{abc}", True), (call, True), ("abc", False), ("{abc}" + call, False)):
        matcher.reset()
        assert (matcher.validate_tokens(list(text.encode())) == len(text)) == fits, text


def test_a_tool_without_parameters_is_called_with_none():
    for parameters in ({}, {"type": "object", "properties": {}}, {"type": "object", "properties": {}, "title": "x"}):
        tools = [{"type": "function", "function": {"name": "g", "parameters": parameters}}]
        texts = {sentence(calls_grammar(KNOWN["llama3"], tools, None, True, False).text, seed) for seed in range(20)}
        assert texts == {'{"name": "g", "parameters": {}}'}
    free = [{"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}]
    texts = {sentence(calls_grammar(KNOWN["llama3"], free, None, True, False).text, seed) for seed in range(20)}
    assert len(texts - {None}) > 1


def test_whitespace_of_json_is_not_that_of_what_stands_around_it():
    """llguidance would skip blanks in reasoning and calls, too; and lost among other rules the wish would be ignored."""
    grammar = spaced(writing_grammar({"type": "object", "properties": {"a": {"type": "integer"}}}))
    for beside in (lambda: after_reasoning(grammar, "<think>", "</think>", False), lambda: behind("x", grammar)):
        with pytest.raises(Unsupported, match="whitespace"):
            beside()
