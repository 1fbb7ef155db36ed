"""Requests in, Sampling or a 400 that names the field out."""

import json

import pytest

from backends import Sampling
from openai_api_endpoint import FIELDS, INERT, REFUSED, ApiError, parse_json, read_fields, sampling_from

MESSAGES = [{"role": "user", "content": "hi"}]


def read(**fields):
    return read_fields({"messages": MESSAGES, **fields})


GOOD = [
    ({}, Sampling()),
    ({"temperature": 0}, Sampling(temperature=0)),
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
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [*MESSAGES, {"role": "boss", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]"),
    ({"logprobs": True}, "logprobs"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
]


@pytest.mark.parametrize(("fields", "param"), BAD)
def test_refused_by_name(fields, param):
    with pytest.raises(ApiError) as caught:
        read(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert param.split("[")[0] in caught.value.message


def test_unknown_fields_are_listed():
    assert read(bogus=1, user="u", other=None).ignored == ["bogus"]


def test_every_field_has_one_row():
    names = [*FIELDS, *REFUSED, *INERT]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("body", [[], "x", 3, None])
def test_body_must_be_an_object(body):
    with pytest.raises(ApiError) as caught:
        read_fields(body)
    assert caught.value.status == 400


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    sent = [
        {"role": "system", "content": parts},
        {"role": "developer", "content": "d", "name": "n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "refusal": None, "audio": None, "annotations": [], "provider_specific_fields": {}},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
    ]
    assert read_fields({"messages": sent}).values["messages"] == (
        {"role": "system", "content": "ab"},
        {"role": "developer", "content": "d", "name": "n"},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "t", "tool_call_id": "1"},
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
