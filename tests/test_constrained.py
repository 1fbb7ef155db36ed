"""Constraints on the real engines: whatever schema is taken holds, for five seeds at temperature 1; what is not taken is a 400."""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest
from conftest import serve_one
from test_constraints import SCHEMAS

from backends import missing_library
from engine import EngineSpec

QUESTION = "Invent a person and answer in JSON."


@pytest.fixture(scope="module", params=["openvino", "llamacpp"])
def engine(request, demo):
    if lack := missing_library(request.param):
        pytest.skip(lack)
    with serve_one(demo, EngineSpec(request.param, str(demo.path), 8, 0, 16384), max_jobs=400) as served:
        yield served


def ask(served, body):
    messages = [{"role": "user", "content": QUESTION}]
    return served.request("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 160, "temperature": 1.0} | body)


def said(reply):
    choice = reply["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def schema_body(schema, seed):
    return {
        "seed": seed,
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": schema}},
    }


@pytest.fixture
def cut(caplog):
    """The server's word that an engine ended a text which its grammar does not allow to end."""
    caplog.set_level(logging.INFO)
    return lambda: [r.getMessage() for r in caplog.records if "constrained text" in r.getMessage()]


def test_sixty_schemas(engine, cut):
    """Nested, recursive, bounded, empty, impossible: each holds or is refused by name, and none hurts the engine."""
    pid = engine.models.engine.process.pid
    cases = SCHEMAS[::2]  # the others stand in test_constraints.py, without an engine
    assert len(cases) >= 60
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda case: ask(engine, schema_body(case[1], 1) | {"n": 3, "max_tokens": 80}), cases))
    finished = held = 0
    for (name, schema, refusal), (status, reply, _) in zip(cases, replies, strict=True):
        if refusal:
            assert (status, reply["error"]["param"]) == (400, "response_format"), name
            assert refusal in reply["error"]["message"], name
            continue
        assert status == 200, (name, reply)
        held += 3
        for choice in reply["choices"]:
            if choice["finish_reason"] == "stop":
                finished += 1
                jsonschema.Draft202012Validator(schema).validate(json.loads(choice["message"]["content"]))
    assert cut() == []
    assert finished > held / 2  # a small model at temperature 1 may talk a string to its end, but not most
    assert engine.models.engine.process.pid == pid


def test_json_object(engine):
    for seed in range(3):
        content, finish = said(ask(engine, {"response_format": {"type": "json_object"}, "seed": seed})[1])
        assert content.startswith("{")
        assert finish == "length" or isinstance(json.loads(content), dict)


@pytest.mark.parametrize(
    "pattern", [r"[a-z]{3,8}", r"\d{4}-\d{2}-\d{2}", r"(yes|no|maybe), (really|never)\.", r"A+B?[^a-z]{2}"]
)
def test_regex(engine, pattern, cut):
    for seed in range(4):
        for choice in ask(engine, {"structured_outputs": {"regex": pattern}, "seed": 8 * seed, "n": 8})[1]["choices"]:
            assert choice["finish_reason"] == "stop"
            assert re.fullmatch(pattern, choice["message"]["content"])
    assert cut() == []


def test_choice(engine):
    choices = ["red", "dark blue", 'quo"ted', "snow ☃"]
    seen = {said(ask(engine, {"structured_outputs": {"choice": choices}, "seed": seed})[1])[0] for seed in range(12)}
    assert seen <= set(choices)
    assert len(seen) > 1


def test_own_grammar(engine):
    body = {"structured_outputs": {"grammar": 'root ::= "<" letters ">" # two of three\nletters ::= [a-c]{2}'}, "seed": 1}
    assert re.fullmatch("<[a-c]{2}>", said(ask(engine, body)[1])[0])
    for bad in (
        "root ::= nowhere",
        "this is no grammar",
        'other ::= "a"',
        'root ::= "a',
        "root ::= root",
        'root ::= [b-a] "x"',
    ):
        status, reply, _ = ask(engine, {"structured_outputs": {"grammar": bad}})
        assert (status, reply["error"]["param"]) == (400, "structured_outputs"), bad
    assert ask(engine, body)[0] == 200


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_stream_n_and_seed(engine):
    body = schema_body(SCHEMA, 3)
    whole = ask(engine, body | {"n": 3})[1]
    for choice in whole["choices"]:
        jsonschema.validate(json.loads(choice["message"]["content"]), SCHEMA)
        assert choice["finish_reason"] == "stop"
    chunks = engine.stream(QUESTION, max_tokens=160, temperature=1.0, n=2, **body)
    for i in range(2):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        jsonschema.validate(json.loads("".join(c["delta"].get("content", "") for c in mine)), SCHEMA)
        assert mine[-1]["finish_reason"] == "stop"


def test_cut_is_length(engine):
    content, finish = said(ask(engine, schema_body(SCHEMA, 1) | {"max_tokens": 4})[1])
    assert finish == "length"
    content, finish = said(ask(engine, schema_body(SCHEMA, 1) | {"stop": ['"age"']})[1])
    assert (finish, content.endswith(",")) == ("length", True)


def test_thirty_two_at_once_beside_plain_ones(engine):
    """Constrained and plain requests together: every one is answered, each in its own way."""
    bodies = [schema_body(SCHEMA, seed) if seed % 4 else {"seed": seed, "max_tokens": 24} for seed in range(40)]
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda body: ask(engine, body), bodies))
    for seed, (status, reply, _) in enumerate(replies):
        assert status == 200
        content, finish = said(reply)
        if seed % 4:
            assert finish == "stop"
            jsonschema.validate(json.loads(content), SCHEMA)


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", "[", "a{200000}"])
def test_refused_regex(engine, pattern):
    status, reply, _ = ask(engine, {"structured_outputs": {"regex": pattern}})
    assert (status, reply["error"]["param"]) == (400, "structured_outputs")


@pytest.mark.parametrize(
    "constraint",
    [
        {"regex": r"(\w{1,20} ?){1,50}"},
        {"regex": "(([a-z ]{1,16}){1,16}){1,16}"},
        {"regex": "[a-z ]*" * 140},
        {"json": {"type": "string", "pattern": "^([A-Za-z]{1,30} ?){1,100}$"}},
        {"grammar": "root ::= " + "x " * 1500 + "\nx ::= [a-z ]*"},
    ],
)
def test_what_would_stall_the_others(engine, constraint):
    """Each of these once took an engine from 1.6 s a token to for ever: made deterministic, it is followed, or it is refused."""
    status, reply, _ = engine.chat("Say something.", max_tokens=5, structured_outputs=constraint)
    assert status == 200 or reply["error"]["param"] == "structured_outputs", reply
    assert engine.chat("Hi", max_tokens=2)[0] == 200


def test_a_regex_that_backtracks_for_ever_elsewhere(engine):
    """The stop string cuts the text, and the check of what is left must not take exponential time."""
    constraint = {"regex": "([a-z]|[a-z][a-z]){45}!"}
    status, reply, _ = engine.chat("Say x", structured_outputs=constraint, stop=["!"], max_tokens=100, temperature=1, seed=1)
    assert status == 200 and reply["choices"][0]["finish_reason"] == "length"
    assert engine.request("GET", "/health", timeout=5)[0] == 200


def test_a_stop_string_cuts_an_own_grammar(engine):
    grammar = 'root ::= "hello world"'
    for stop, expected in ((["lo"], ("hel", "length")), (["zzz"], ("hello world", "stop"))):
        status, reply, _ = engine.chat("Hi", structured_outputs={"grammar": grammar}, stop=stop, max_tokens=20)
        (choice,) = reply["choices"]
        assert (status, choice["message"]["content"], choice["finish_reason"]) == (200, *expected)


def test_llama_servers_spelling_of_a_schema(engine):
    schema = {"type": "object", "properties": {"zzz": {"const": 5}}, "required": ["zzz"], "additionalProperties": False}
    status, reply, _ = engine.chat("Hi", response_format={"type": "json_object", "schema": schema}, max_tokens=30)
    assert (status, reply["choices"][0]["message"]["content"]) == (200, '{"zzz":5}')


def test_bans_that_leave_a_constraint_nothing(engine):
    """llama.cpp ends its process when a token comes that its grammar forbids: the request ends, and nothing else."""
    if engine.models.engine.spec.backend != "llamacpp":
        return
    tokens = {i for word in ("yes", "y", "ye") for i in engine.request("POST", "/tokenize", {"content": word})[1]["tokens"]}
    pid = engine.models.engine.process.pid
    for temperature in (0, 1):
        status, reply, _ = engine.chat(
            "Hi", structured_outputs={"choice": ["yes"]}, logit_bias={str(i): -100 for i in tokens}, temperature=temperature
        )
        assert (status, reply["error"]["param"]) == (400, "logit_bias")
    assert engine.models.engine.process.pid == pid and not engine.models.engine.jobs


def test_whitespace(engine):
    """Between tokens where the client allows it."""
    schema = {
        "type": "object",
        "properties": {"name": {"maxLength": 9, "type": "string"}, "age": {"enum": [1, 2]}},
        "required": ["name", "age"],
    }
    allowed = {"json": schema, "whitespace": "any"}
    reply = ask(engine, {"structured_outputs": allowed, "n": 8, "seed": 3})[1]
    texts = [choice["message"]["content"] for choice in reply["choices"] if choice["finish_reason"] == "stop"]
    for text in texts:
        jsonschema.validate(json.loads(text), schema)
    assert any(re.sub(r'"[^"]*"', "", text) != re.sub(r'"[^"]*"|\s', "", text) for text in texts)
    for choice in ask(engine, {"structured_outputs": {"json": schema, "whitespace": "compact"}, "n": 8, "seed": 3})[1][
        "choices"
    ]:
        assert not re.search(r"\s", re.sub(r'"[^"]*"?', "", choice["message"]["content"]))
