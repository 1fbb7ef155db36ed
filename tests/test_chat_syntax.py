"""The syntax of real templates, and the parser over them: the same parts however the text is cut.

The templates are llama.cpp's collection, out of the source package of llama-cpp-python: fetched once, kept in the cache.
"""

import json
import tarfile
from pathlib import Path

import pytest
from conftest import download_sdist
from hypothesis import given, settings
from hypothesis import strategies as some

from catalog import demo_model
from chat_syntax import KEYS, NAME_A, NAME_B, ChatTemplate, Probe
from engine import Prompt, Sampling
from tool_parser import Parser
from tool_syntax import KNOWN, Syntax
from tool_values import kinds_of, typed

SOURCE = "llama-cpp-python==0.3.36"
SILENT = {  # show no calls
    "HuggingFaceTB-SmolLM3-3B", "google-gemma-2-2b-it", "llama-cpp-rwkv-world", "microsoft-Phi-3.5-mini-instruct",
}  # fmt: skip
UNSHOWN = {
    "Kimi-K2-Instruct",
    "Kimi-K2-Thinking",
    "LFM2-8B-A1B",
    "LFM2.5-Instruct",
    "ibm-granite-granite-3.3-2B-Instruct",
}  # past ones
ONE = {  # write one call at a time
    "GigaChat3-10B-A1.8B", "GigaChat3.1-10B-A1.8B", "meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct",
    "meta-llama-Llama-3.3-70B-Instruct", "openai-gpt-oss-120b",
}  # fmt: skip
FORMS = {
    "Qwen-Qwen3-0.6B": ("json", ("<think>", "</think>")),
    "Apertus-8B-Instruct": ("json", ("<|inner_prefix|>", "<|inner_suffix|>")),
    "Apriel-1.6-15b-Thinker-fixed": ("json", ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]")),
    "Cohere2MoE": ("json", ("<|START_THINKING|>", "<|END_THINKING|>")),
    "Mistral-Small-3.2-24B-Instruct-2506": ("named", ("", "")),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("named", ("[THINK]", "[/THINK]")),
    "mistralai-Mistral-Nemo-Instruct-2407": ("json", ("", "")),
    "deepseek-ai-DeepSeek-V3.1": ("named", ("<think>", "</think>")),
    "deepseek-ai-DeepSeek-V3.2": ("tagged", ("<think>", "</think>")),
    "Qwen3-Coder": ("tagged", ("", "")),
    "GLM-4.6": ("tagged", ("<think>", "</think>")),
    "ByteDance-Seed-OSS": ("tagged", ("<seed:think>", "</seed:think>")),
    "tencent-Hy3": ("tagged", ("<think:opensource>", "</think:opensource>")),
    "openbmb-MiniCPM5-1B": ("tagged", ("<think>", "</think>")),
    "MiniMax-M3": ("elements", ("<mm:think>", "</mm:think>")),
    "LFM2-8B-A1B": ("pythonic", ("", "")),
    "openai-gpt-oss-120b": ("channels", ("", "")),
    "muse-glimmer": ("channels", ("", "")),
    "google-gemma-4-31B-it": ("named", ("<|channel>thought", "<channel|>")),
    "meetkai-functionary-medium-v3.2": ("functionary", ("", "")),
}
STRINGS = {KEYS[0]: 'Vwords "quoted"\n<b>, é', KEYS[1]: -7}
SCHEMA = {"type": "object", "properties": {KEYS[0]: {"type": "string"}, KEYS[1]: {"type": "integer"}}}


def collection():
    """{name: source}; a reason where they cannot be had."""
    folder = Path(demo_model().path).parent / SOURCE.replace("==", "-")
    if not folder.exists():
        archive = download_sdist(SOURCE, folder)
        if isinstance(archive, str):
            return archive
        with tarfile.open(archive) as tar:
            for member in tar:
                if "/models/templates/" in member.name and member.name.endswith(".jinja"):
                    (folder / Path(member.name).name).write_bytes(tar.extractfile(member).read())
        archive.unlink()
    return {path.stem: path.read_text("utf-8") for path in folder.glob("*.jinja")}


@pytest.fixture(scope="module")
def templates():
    found = collection()
    if isinstance(found, str):
        pytest.skip(found)
    assert len(found) >= 70
    return {name: ChatTemplate(source, "<s>", "</s>") for name, source in found.items()}


def parse(syntax, pieces, tools, **options):
    """([kind, text] with neighbours of one kind joined, whether the calls are whole)."""
    parser = Parser(syntax, tools, **options)
    parts = [part for piece in pieces for part in parser.feed(piece)] + parser.finish()
    joined = []
    for kind, text, _ in parts:
        if joined and joined[-1][0] == kind != "call":
            joined[-1][1] += text
        else:
            joined.append([kind, text])
    return joined, parser.whole


def calls_of(parts):
    calls = []
    for kind, text in parts:
        if kind == "call":
            calls.append([text, ""])
        elif kind == "arguments":
            calls[-1][1] += text
    return [(name, json.loads(arguments)) for name, arguments in calls]


def test_every_template_is_known(templates):
    for name, template in templates.items():
        assert bool(template.syntax.form) == (name not in SILENT), name
        template.about  # noqa: B018
    for name, (form, think) in FORMS.items():
        assert (templates[name].syntax.form, templates[name].syntax.think) == (form, think), name


def test_a_rendered_call_comes_back(templates):
    """Whole, by characters, and cut in two at every place."""
    tools = {NAME_A: SCHEMA, NAME_B: SCHEMA}
    for name, template in templates.items():
        if name in SILENT | UNSHOWN:
            continue
        probe = Probe(template)
        probe.text_arguments = template.syntax.text_arguments
        one, two = (NAME_A, STRINGS), (NAME_B, {KEYS[0]: "W"})
        calls = [one] if name in ONE else [one, two]
        text = next(text for content in ("", None) if NAME_A in (text := probe.said(content, calls)))
        if template.syntax.bare:
            text = text[len(probe.header(text[: text.find(NAME_A)], template.syntax.think)) :]
        whole = parse(template.syntax, [text], tools)
        assert calls_of(whole[0]) == calls, name
        assert whole[1], name
        assert parse(template.syntax, text, tools) == whole, name
        for at in range(1, len(text)):
            assert parse(template.syntax, [text[:at], text[at:]], tools) == whole, (name, at)


def test_past_calls_are_shown(templates):
    """By the template, or, where it has no words for them, in its syntax; and an answer to them."""
    function = {
        "name": NAME_A,
        "description": "",
        "parameters": SCHEMA | {"required": [], "additionalProperties": {"type": "string"}},
    }
    call = {"id": "call_" + "x" * 24, "type": "function", "function": {"name": NAME_A, "arguments": json.dumps(STRINGS)}}
    messages = (
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": call["id"], "name": NAME_A},
    )
    for name, template in templates.items():
        if name not in SILENT:
            chat = template.prepare(Prompt(messages, tools=({"type": "function", "function": function},)), Sampling())
            assert "Vwords" in chat.text and chat.text.count(NAME_A) > 1 and "42" in chat.text, name


def test_reasoning_comes_back(templates):
    for name, template in templates.items():
        begin, end = template.syntax.think
        if not end:
            continue
        text = f"{begin}\nHm <x>\n{end}\n\nHello"
        expected = [["reasoning", "Hm <x>"], ["content", "Hello"]]
        for pieces in ([text], text, *([text[:at], text[at:]] for at in range(1, len(text)))):
            assert parse(template.syntax, pieces, {})[0] == expected, (name, pieces)
        assert parse(template.syntax, [f"Hm{end}Hello"], {}, inside=True)[0] == [["reasoning", "Hm"], ["content", "Hello"]], (
            name
        )


HERMES = Syntax("t", "json", ("<think>", "</think>"), openers=("<tool_call>",), closers=("</tool_call>",))
CALL = '<tool_call>{"name": "f", "arguments": {"a": "}<"}}</tool_call>'
WORDS = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    CALL,
    "{",
    '{"name": "f"',
    "a",
    "\n",
    " ",
    "<",
    "é",
    '"',
    ",",
    "]",
]


@settings(max_examples=300, deadline=None)
@given(
    some.lists(some.sampled_from(WORDS), max_size=12), some.integers(1, 9), some.sampled_from(sorted(KNOWN)), some.booleans()
)
def test_the_cut_makes_no_difference(words, size, name, inside):
    """For any text, in any syntax; and no letter of it is lost but for marks and the whitespace around them."""
    text = "".join(words)
    for syntax in (HERMES, KNOWN[name]):
        inside = inside and bool(syntax.think[1])
        whole = parse(syntax, [text], {"f": None}, inside=inside)
        assert parse(syntax, [text[at : at + size] for at in range(0, len(text), size)], {"f": None}, inside=inside) == whole
    shown = "".join(part for _, part in parse(KNOWN["kimi"], [text], {"f": None})[0])
    assert shown == text  # marks of others are nothing to it


SAID = [  # syntax, text, parts
    ("harmony", "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi", [["reasoning", "Hm"], ["content", "Hi"]]),
    ("harmony", "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": 1}<|call|>", [["call", "f"], ["arguments", '{"a": 1}']]),
    ("harmony", "no channel at all", [["content", "no channel at all"]]),
    ("harmony", "final answer", [["content", "final answer"]]),
    ("harmony", "analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Hi", [["reasoning", "Hm"], ["content", "Hi"]]),
    ("harmony", "<|channel|>analysis<|message|>Hm<|channel|>final<|message|>Hi", [["reasoning", "Hm"], ["content", "Hi"]]),
    ("harmony", 'commentary to=functions.f <|constrain|>json<|message|>{"a": 1}', [["call", "f"], ["arguments", '{"a": 1}']]),
    ("harmony", "<|channel|>commentary to=assistant<|channel|>analysis<|message|>Hm", [["reasoning", "Hm"]]),
    ("gemma", "<|channel><|channel>thought\n<channel|>Hi<|channel>thought\nHm<channel|><channel|>", [["content", "Hi"], ["reasoning", "Hm"]]),
    ("gemma", '<|tool_call>call:f{a:<|"|>x"y<|"|>,b:[1,true]}<tool_call|>', [["call", "f"], ["arguments", '{"a": "x\\"y", "b": [1, true]}']]),
    ("pythonic", "[f(a='x', b={'k': None}), f()]", [["call", "f"], ["arguments", '{"a": "x", "b": {"k": null}}'], ["call", "f"], ["arguments", "{}"]]),
    ("pythonic", "[link](url)", [["content", "[link](url)"]]),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', [["call", "f"], ["arguments", '{"a": 1}']]),
    ("llama3", '{"type": "function", "function": "f", "parameters": {"a": 1}}', [["call", "f"], ["arguments", '{"a": 1}']]),
    ("llama3", '{"title": "f"}', [["content", '{"title": "f"}']]),
    ("functionary", 'all\nHi\n>>>f\n{"a": 1}', [["content", "Hi"], ["call", "f"], ["arguments", '{"a": 1}']]),
    ("functionary", "all\nwrite >>> to quote", [["content", "write >>> to quote"]]),
    ("functionary", "f\nprint(1)", [["call", "f"], ["arguments", '{"code": "print(1)"}']]),
    ("mistral-args", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]f{}', [["call", "f"], ["arguments", '{"a": 1}'], ["call", "f"], ["arguments", "{}"]]),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', [["call", "f"], ["arguments", '{"a": 1}']]),
    ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', [["call", "f"], ["arguments", '{"a": 1}']]),
    ("hermes", "<tool_call>{'name': 'f', 'arguments': {'a': True, 'b': 'x\\'y'}}", [["call", "f"], ["arguments", '{"a": true, "b": "x\'y"}']]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', [["call", "f"], ["arguments", "{}"]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "parts"), SAID)
def test_what_families_write(name, text, parts):
    for pieces in ([text], text, *([text[:at], text[at:]] for at in range(1, len(text)))):
        assert parse(KNOWN[name], pieces, {"f": None})[0] == parts


def test_calls_within_reasoning():
    """They count where nothing follows them; else the model only thought about calling."""
    thought = f"Hm {CALL}"
    assert calls_of(parse(HERMES, thought, {"f": None}, inside=True)[0]) == [("f", {"a": "}<"})]
    parts, whole = parse(HERMES, f"{thought} no</think>Hi", {"f": None}, inside=True)
    assert parts == [["reasoning", f"{thought} no"], ["content", "Hi"]] and not whole


def test_reasoning_that_does_not_come():
    """The prompt has begun it, and the model calls or answers at once."""
    said = f"{CALL}\n\nDone"
    parts, whole = parse(HERMES, said, {"f": None}, inside=True)
    assert parts == [["call", "f"], ["arguments", '{"a": "}<"}'], ["content", "Done"]] and whole
    assert parse(HERMES, "<tool_call> is a mark", {"f": None}, inside=True)[0] == [["reasoning", "<tool_call> is a mark"]]
    assert parse(KNOWN["kimi-k3"], "<|open|>response<|sep|>Hi<|close|>response<|sep|>", {}, inside=True)[0] == [
        ["content", "Hi"]
    ]


def test_whitespace_between_marks_is_free(templates):
    """Whichever way the template has it."""
    for name in ("GLM-4.6", "GLM-4.7-Flash", "inclusionai-ling-3.0-flash"):
        for gap in ("", "\n"):
            said = f"<tool_call>f{gap}<arg_key>a</arg_key>{gap}<arg_value>1</arg_value>{gap}</tool_call>"
            assert calls_of(parse(templates[name].syntax, said, {"f": None})[0]) == [("f", {"a": 1})], (name, gap)
    said = "<tool_call>f<arg_key>"
    parser = Parser(templates["GLM-4.6"].syntax, {"f": None})
    assert "".join(part.text for part in parser.feed(said) + parser.finish()) == said  # its key never comes
    parser = Parser(templates["GLM-4.6"].syntax, {"f": None})
    assert [part.text for part in parser.feed(said) + parser.finish(True)] == ["f", "{"]


def test_reasoning_that_no_template_shows(templates):
    for name, think in (
        ("unsloth-Apriel-1.5", ("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]")),
        ("MiniMax-M1", ("<think>", "</think>")),
    ):
        assert templates[name].syntax.think == think


def test_a_template_for_tools_renders_without_them(templates):
    for name, template in templates.items():
        assert "Hello" in template.prepare(Prompt(({"role": "user", "content": "Hello"},)), Sampling()).text, name


def test_types_of_values():
    """Text between fences has the type that the schema says."""
    root = {"$defs": {"n": {"type": "integer"}}}
    for schema, text, value in (
        ({"type": "string"}, "12", "12"),
        ({"type": "integer"}, "12", 12),
        ({"type": "boolean"}, "True", True),
        ({"type": "array"}, "['a', None]", ["a", None]),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["integer", "string"]}, "2 pieces", "2 pieces"),
        ({"enum": ["a", "b"]}, "a", "a"),
        ({"anyOf": [{"type": "string"}, {"type": "object"}]}, "{x", "{x"),
        ({"$ref": "#/$defs/n"}, "7", 7),
        (None, "text", "text"),
        (None, "[1]", [1]),
    ):
        assert json.loads(typed(text, kinds_of(schema, root))) == value, schema
