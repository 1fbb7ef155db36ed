"""Requests in, Sampling or a 400 that names the field out."""

import json
import re

import pytest

from api_errors import ApiError
from api_request import (
    ALIASES,
    CHAT,
    COMPLETIONS,
    INERT,
    chat_prompt,
    check_together,
    parse_json,
    read_fields,
    sampling_from,
)
from backends import LACKS
from engine import Prompt, Sampling
from openai_api_endpoint import TABLES

DIALECTS = ("/responses", "/messages")  # which tell again, or check, what changes nothing elsewhere
MESSAGES = [{"role": "user", "content": "hi"}]


def read(table=CHAT, engine="llamacpp", strict=False, **fields):
    given = {"messages": MESSAGES} if table is CHAT else {"prompt": "hi"}
    values, ignored = read_fields({**given, **fields}, table, engine, strict)
    check_together(values)
    if table is CHAT:
        chat_prompt(values)
    return values, ignored


GOOD = [
    ({}, Sampling()),
    ({"temperature": 0}, Sampling(temperature=0)),
    ({"temperature": 1e-320, "top_p": 1e-320}, Sampling(temperature=0, top_p=1e-6)),
    ({"logprobs": True, "top_logprobs": 5}, Sampling(logprobs=5)),
    ({"logprobs": True}, Sampling(logprobs=0)),
    ({"logit_bias": {"5": -100, "7": 2.5}}, Sampling(logit_bias=((5, -100), (7, 2.5)))),
    ({"stop": [3], "stop_token_ids": [4]}, Sampling(stop_token_ids=(3, 4))),
    ({"min_tokens": 4, "ignore_eos": True}, Sampling(min_tokens=4, ignore_eos=True)),
    ({"temperature": 2, "top_p": 1, "min_p": 0.5}, Sampling(temperature=2, top_p=1, min_p=0.5)),
    ({"top_k": 0}, Sampling(top_k=0)),
    ({"top_k": -1}, Sampling(top_k=0)),
    ({"top_k": 40.0}, Sampling(top_k=40)),
    ({"max_tokens": 5}, Sampling(max_tokens=5)),
    ({"max_tokens": 5, "max_completion_tokens": 7}, Sampling(max_tokens=7)),
    ({"max_tokens": None, "temperature": None, "stop": None}, Sampling()),
    ({"stop": "a"}, Sampling(stop=("a",))),
    ({"stop": 7}, Sampling(stop_token_ids=(7,))),
    ({"stop": ["a", 7, "b"]}, Sampling(stop=("a", "b"), stop_token_ids=(7,))),
    ({"stop": []}, Sampling()),
    ({"seed": -3, "n": 8}, Sampling(seed=-3, n=8)),
    ({"presence_penalty": -2, "frequency_penalty": 2}, Sampling(presence_penalty=-2, frequency_penalty=2)),
    ({"repetition_penalty": 1.1}, Sampling(repetition_penalty=1.1)),
    ({"repeat_penalty": 1.2}, Sampling(repetition_penalty=1.2)),
    # what clients send at values that change nothing
    ({"logit_bias": {}, "logprobs": False, "tools": [], "tool_choice": "none", "parallel_tool_calls": False}, Sampling()),
    ({"response_format": {"type": "text"}, "store": False, "service_tier": "auto", "user": "u", "metadata": {}}, Sampling()),
    ({"echo": False, "best_of": 1, "suffix": "", "modalities": ["text"], "top_logprobs": 0}, Sampling()),
]


@pytest.mark.parametrize(("fields", "expected"), GOOD)
def test_honoured(fields, expected):
    values, ignored = read(**fields)
    assert sampling_from(values) == expected
    assert ignored == []


NAN, INF = float("nan"), float("inf")
BAD = [
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": NAN}, "temperature"),
    ({"temperature": INF}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"top_k": INF}, "top_k"),
    ({"min_p": NAN}, "min_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": []}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repeat_penalty": -1}, "repeat_penalty"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"seed": 1.5}, "seed"),
    ({"seed": True}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": True}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop": [None]}, "stop"),
    ({"stop": "a" * 257}, "stop"),
    ({"stream": 1}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    ({"model": 3}, "model"),
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"model": "m" * 257}, "model"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [*MESSAGES, {"role": "boss", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"logprobs": 1}, "logprobs"),
    ({"response_format": "json"}, "response_format"),
    ({"reasoning_effort": "lots"}, "reasoning_effort"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_refused_by_name(fields, param):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param.split("[")[0] in caught.value.message


def test_unknown_fields_are_listed():
    assert read(bogus=1, user="u", other=None)[1] == ["bogus"]
    with pytest.raises(ApiError) as caught:
        read(bogus=1, strict=True)
    assert (caught.value.status, caught.value.param) == (400, "bogus")


def test_every_field_has_one_row():
    for path, table in TABLES.items():
        assert not set(table) & {*ALIASES}
        assert path in DIALECTS or not set(table) & {*INERT}
        assert all(name in {**CHAT, **COMPLETIONS} for name in ALIASES.values())


@pytest.mark.parametrize(
    ("table", "fields", "param"),
    [
        (CHAT, {"logit_bias": {"5": 1}}, "logit_bias"),
        (CHAT, {"logprobs": True, "top_logprobs": 2}, "top_logprobs"),
        (COMPLETIONS, {"logprobs": 1}, "logprobs"),
        (COMPLETIONS, {"logprobs": 0, "echo": True}, "echo"),
    ],
)
def test_what_one_engine_lacks(table, fields, param, monkeypatch):
    monkeypatch.setitem(LACKS, "openvino", frozenset({"logit_bias", "top_logprobs", "scores"}))
    read(table, "llamacpp", **fields)
    with pytest.raises(ApiError) as caught:
        read(table, "openvino", **fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert re.search(r"; llamacpp\b.*can\.", caught.value.message)


@pytest.mark.parametrize("engine", ["openvino", "llamacpp"])
@pytest.mark.parametrize(
    ("table", "fields"),
    [
        (CHAT, {"logit_bias": {}, "logprobs": False, "top_logprobs": 0, "n": 1, "min_p": 0, "top_k": 0, "top_p": 1}),
        (CHAT, {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "stream": False}),
        (CHAT, {"tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "response_format": {"type": "text"}}),
        (CHAT, {"store": False, "service_tier": "default", "echo": False, "functions": [], "modalities": ["text"]}),
        (CHAT, {"logprobs": True}),
        (COMPLETIONS, {"suffix": "", "best_of": 1, "echo": False, "logprobs": 0}),
        (COMPLETIONS, {"suffix": None, "best_of": 2, "n": 2, "echo": True}),
    ],
)
def test_neutral_values_pass_on_every_engine(engine, table, fields):
    read(table, engine, **fields)


PROMPTS = [
    ("a", [Prompt(text="a")]),
    (["a", "b"], [Prompt(text="a"), Prompt(text="b")]),
    ([1, 2], [Prompt(tokens=(1, 2))]),
    ([[1, 2], [3]], [Prompt(tokens=(1, 2)), Prompt(tokens=(3,))]),
]


@pytest.mark.parametrize(("given", "expected"), PROMPTS)
def test_prompts(given, expected):
    assert read(COMPLETIONS, prompt=given)[0]["prompt"] == expected


@pytest.mark.parametrize("given", [[], 3, {}, [None], [-1], [True], [[1, "a"]], [1.5], ["a"] * 257])
def test_bad_prompts(given):
    with pytest.raises(ApiError) as caught:
        read(COMPLETIONS, prompt=given)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {"what": 1}}, "structured_outputs"),
        ({"structured_outputs": {"json": {}, "whitespace": "some"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "whitespace": "any"}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace": "any"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"]}, "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {"choice": ["a"]}, "min_tokens": 1}, "min_tokens"),
        ({"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}}, "structured_outputs"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"structured_outputs": {"choice": ["a"]}, "json_schema": {}}, "json_schema"),
        ({"guided_json": "{bad"}, "guided_json"),
        ({"grammar": 3}, "grammar"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_refused_completions(fields, param):
    with pytest.raises(ApiError) as caught:
        read(COMPLETIONS, **fields)
    assert (caught.value.status, caught.value.param) == (400, param)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("name", "value", "member"),
    [
        ("json_schema", SCHEMA, "json"),
        ("guided_json", SCHEMA, "json"),
        ("guided_json", json.dumps(SCHEMA), "json"),
        ("guided_regex", "[ab]{3}", "regex"),
        ("guided_choice", ["yes", "no"], "choice"),
        ("guided_grammar", 'root ::= "a"', "grammar"),
        ("grammar", 'root ::= "a"', "grammar"),
    ],
)
def test_other_servers_names_for_structured_outputs(name, value, member):
    kind, source, where = sampling_from(read(COMPLETIONS, structured_outputs={member: value})[0]).constraint
    assert sampling_from(read(COMPLETIONS, **{name: value})[0]).constraint == (kind, source, name)
    assert (kind, where) == (member, "structured_outputs")
    assert sampling_from(read(COMPLETIONS, grammar="")[0]).constraint is None


@pytest.mark.parametrize("body", [[], "x", 3, None])
def test_body_must_be_an_object(body):
    with pytest.raises(ApiError) as caught:
        read_fields(body, CHAT)
    assert caught.value.status == 400


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sent = [
        {"role": "system", "content": parts},
        {"role": "developer", "content": "d", "name": "n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "refusal": None, "audio": None, "annotations": [], "provider_specific_fields": {}},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    assert read_fields({"messages": sent}, CHAT).values["messages"] == (
        {"role": "system", "content": "ab"},
        {"role": "developer", "content": "d", "name": "n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "content": "t", "tool_call_id": "1", "name": "f"},
    )


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"a":"\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"temperature":' + b"1" * 10_000 + b"}",
        b'{"a":"\\ud800"}',
        b'{"a":"\\UD800"}',
        b'{"a":"\xed\xa0\x80"}',
        '{"a":1}'.encode("utf-16"),
        b"[" + b"{}," * 200_000 + b"{}]",
    ],
)
def test_json_that_would_hurt(body):
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400


def test_json_that_is_fine():
    assert parse_json(b'{"a":"\\ud83d\\ude00","b":NaN}')["a"] == "😀"
    keys = {f"key{i}": i for i in range(50_000)}
    assert parse_json(json.dumps(keys).encode()) == keys
