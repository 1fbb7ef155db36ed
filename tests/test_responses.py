"""/v1/responses: requests into chat requests, deltas into items and events, and both over HTTP with the official SDK."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest
from conftest import serve_scripted, until
from openai.types.responses import Response, ResponseItemList, ResponseStreamEvent
from pydantic import TypeAdapter

import responses_api
from access import Access, Keys
from api_errors import ApiError, rename
from api_reply import CHAT_SHAPE, Choice, Completion
from api_request import read_fields
from engine import Delta, Started
from engine_handle import Job
from responses_api import RESPONSES, Answer, Turn, page, seal
from state import State

ROOT = Path(__file__).resolve().parent.parent
KEY = b"k" * 32
EVENT = TypeAdapter(ResponseStreamEvent)
MEMBERS = {  # of Open Responses' ResponseResource
    "id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id", "instructions",
    "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p", "presence_penalty",
    "frequency_penalty", "top_logprobs", "temperature", "reasoning", "user", "usage", "max_output_tokens", "max_tool_calls", "store",
    "background", "service_tier", "metadata", "safety_identifier", "prompt_cache_key",
}  # fmt: skip


def turn(past=(), find=lambda id: None, drop=False, **body):
    free = {name: RESPONSES[name]._replace(needs="") for name in ("tools", "tool_choice", "parallel_tool_calls")}
    table = {**RESPONSES, **free}
    values = read_fields(body, table).values
    return Turn({"store": True} | values, list(past), find, KEY, drop)


def completion(**fields):
    done = Completion("resp_1", "m", "fp", [Choice()], CHAT_SHAPE._replace(prefix="resp_"), created=7, **fields)
    done.start(Started(10, 4, 1.0))
    return done


def tell(deltas, asked=None, **fields):
    """(events, the whole response, what was stored) of one answer, told both ways."""
    kept = []
    done = completion(**fields)
    answer = Answer(done, asked or turn(input="hi"), {"temperature": 0.5, "top_p": 0.9}, kept.append)
    raw = b""
    for i, delta in enumerate(deltas):
        delta = done.add(delta)
        raw += (answer.opening() if i == 0 else b"") + answer.delta(delta)
    events = parse(raw + answer.end({}))
    plain = completion(**fields)
    other = Answer(plain, asked or turn(input="hi"), {"temperature": 0.5, "top_p": 0.9}, kept.append)
    for delta in deltas:
        plain.choices[0].logprobs += plain.add(delta).logprobs
    whole = other.whole({})
    assert nameless(whole) == nameless(events[-1]["response"])
    assert kept == [events[-1]["response"], whole]
    return events, whole


def nameless(value):
    if isinstance(value, dict):
        return {name: nameless(item) for name, item in value.items() if name not in ("id", "completed_at")}
    return [nameless(item) for item in value] if isinstance(value, list) else value


def parse(raw):
    """The events of a stream, each checked against the SDK's types; what comes before [DONE]."""
    *blocks, done, empty = raw.decode().split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    events = []
    for i, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == i
        EVENT.validate_python(event)
        if "response" in event:
            assert set(event["response"]) >= MEMBERS
        events.append(event)
    return events


def kinds(events):
    """Types of events, runs of deltas as one."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for i, name in enumerate(names) if not (name.endswith("delta") and i and names[i - 1] == name)]


TEXT = [
    "output_item.added",
    "content_part.added",
    "output_text.delta",
    "output_text.done",
    "content_part.done",
    "output_item.done",
]
THOUGHT = [
    "output_item.added",
    "content_part.added",
    "reasoning_text.delta",
    "reasoning_text.done",
    "content_part.done",
    "output_item.done",
]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]


# ─────────────────────────────────────────────── deltas → items, events ───────────────────────────────────────────


def test_text():
    events, whole = tell([Delta(0, "Hé", 1), Delta(0, "", 1), Delta(0, '"y"', 1), Delta(0, "", 1, "stop")])
    assert kinds(events) == ["created", "in_progress", *TEXT, "completed"]
    assert "".join(e["delta"] for e in events if e["type"].endswith("delta")) == 'Hé"y"'
    assert all(e["item_id"] == events[2]["item"]["id"] for e in events if "item_id" in e)
    Response.model_validate(whole, strict=True)
    assert whole["output"][0]["content"] == [{"type": "output_text", "text": 'Hé"y"', "annotations": [], "logprobs": []}]
    assert (whole["status"], whole["temperature"], whole["top_p"]) == ("completed", 0.5, 0.9)
    assert whole["usage"] == {
        "input_tokens": 10, "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 14,
    }  # fmt: skip


def test_reasoning_text_and_calls():
    asked = turn(
        input="hi",
        tools=[
            {"type": "function", "name": "f"},
            {"type": "custom", "name": "patch"},
            {"type": "namespace", "name": "mcp__git__", "tools": [{"type": "function", "name": "log"}]},
        ],
        include=["reasoning.encrypted_content"],
    )
    events, whole = tell(
        [
            Delta(0, "let ", 1, kind="reasoning"), Delta(0, "me", 1, kind="reasoning"),
            Delta(0, "So:", 1),
            Delta(0, "f", 1, kind="call", id="call_1"), Delta(0, '{"a":', 1, kind="arguments"), Delta(0, "1}", 1, kind="arguments"),
            Delta(0, "patch", 1, kind="call", id="call_2"), Delta(0, '{"input":"*** \\n"}', 1, kind="arguments"),
            Delta(0, "mcp__git__log", 1, kind="call", id="call_3"), Delta(0, "{}", 1, kind="arguments"),
            Delta(0, "", 1, "tool_calls"),
        ],
        asked,
    )  # fmt: skip
    patch = ["output_item.added", "custom_tool_call_input.delta", "custom_tool_call_input.done", "output_item.done"]
    assert kinds(events) == ["created", "in_progress", *THOUGHT, *TEXT, *CALL, *patch, *CALL, "completed"]
    assert [item["type"] for item in whole["output"]] == [
        "reasoning", "message", "function_call", "custom_tool_call", "function_call"
    ]  # fmt: skip
    thought, _, call, custom, spaced = whole["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "let me"}]
    assert thought["encrypted_content"] == seal(KEY, "let me")
    assert (call["call_id"], call["name"], call["arguments"], call["status"]) == ("call_1", "f", '{"a":1}', "completed")
    assert (custom["name"], custom["input"]) == ("patch", "*** \n")
    assert (spaced["name"], spaced["namespace"]) == ("log", "mcp__git__")
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
    Response.model_validate(whole)
    indexes = [event["output_index"] for event in events if "output_index" in event]
    assert indexes == sorted(indexes)
    assert set(indexes) == {0, 1, 2, 3, 4}


def test_cut():
    events, whole = tell([Delta(0, "a", 1), Delta(0, "b", 1, "length")])
    assert kinds(events)[-1] == "incomplete"
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert whole["output"][0]["status"] == "incomplete"


def test_an_answer_of_nothing_is_an_empty_message():
    events, whole = tell([Delta(0, "", 1, "stop")])
    assert kinds(events) == ["created", "in_progress", *[kind for kind in TEXT if kind != "output_text.delta"], "completed"]
    assert whole["output"][0]["content"][0]["text"] == ""


def test_a_stream_that_fails():
    done, kept = completion(), []
    answer = Answer(done, turn(input="hi"), {}, kept.append)
    raw = answer.opening() + answer.delta(done.add(Delta(0, "half", 1))) + answer.failed(ApiError(500, "The engine failed."))
    last = parse(raw)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "The engine failed."}
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert kept == [last["response"]]


# ──────────────────────────────────────────────── requests → chat requests ────────────────────────────────────────

USER = {"role": "user", "content": "q"}
TRANSLATED = [
    ({"input": "q"}, [USER]),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}]}, [USER]),
    ({"input": "q", "instructions": "be brief"}, [{"role": "system", "content": "be brief"}, USER]),
    (
        {"input": [{"role": "developer", "content": "d"}, USER, {"role": "system", "content": "s"}], "instructions": "i"},
        [{"role": "system", "content": "i\n\nd"}, USER, {"role": "system", "content": "s"}],
    ),
    ({"input": [{"role": "developer", "content": "d"}, USER]}, [{"role": "developer", "content": "d"}, USER]),
    (
        {
            "input": [
                USER,
                {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "log", "arguments": "{}", "namespace": "git"},
                {"type": "function_call_output", "call_id": "c1", "output": "1"},
                {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
                {"type": "custom_tool_call", "call_id": "c3", "name": "patch", "input": "x"},
                {"type": "custom_tool_call_output", "call_id": "c3", "output": "3"},
            ]
        },
        [
            USER,
            {
                "role": "assistant",
                "content": "so",
                "reasoning_content": "hm",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                    {"id": "c2", "type": "function", "function": {"name": "git__log", "arguments": "{}"}},
                ],
            },
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
            {"role": "tool", "content": "2", "tool_call_id": "c2"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"id": "c3", "type": "function", "function": {"name": "patch", "arguments": '{"input": "x"}'}}],
            },
            {"role": "tool", "content": "3", "tool_call_id": "c3"},
        ],
    ),
    (
        {"input": [USER, {"type": "reasoning", "summary": [], "encrypted_content": seal(KEY, "sealed")}, {"role": "assistant", "content": "a"}, USER]},
        [USER, {"role": "assistant", "content": "a", "reasoning_content": "sealed"}, USER],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "messages"), TRANSLATED)
def test_messages(body, messages):
    assert turn(**body).messages == messages


def test_options():
    schema = {"type": "object"}
    chat = turn(
        input="q", model="m", max_output_tokens=5, temperature=0.1, parallel_tool_calls=False, top_logprobs=2,
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}, reasoning={"effort": "low"},
        tools=[{"type": "function", "name": "f", "parameters": schema, "strict": None}], tool_choice={"type": "function", "name": "f"},
    ).chat  # fmt: skip
    function = {"type": "function", "function": {"name": "f"}}
    assert {name: value for name, value in chat.items() if name != "messages"} == {
        "model": "m", "max_tokens": 5, "temperature": 0.1, "parallel_tool_calls": False, "logprobs": True, "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        "reasoning_effort": "low", "tool_choice": function,
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
    }  # fmt: skip


def test_tools():
    asked = turn(
        input="q",
        tools=[
            {"type": "custom", "name": "word", "format": {"type": "grammar", "syntax": "regex", "definition": "a|b"}},
            {"type": "namespace", "name": "git", "tools": [{"type": "function", "name": "log"}]},
        ],
        tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "word"}]},
    )
    word, log = (tool["function"] for tool in asked.chat["tools"])
    assert word["parameters"]["properties"] == {"input": {"type": "string", "pattern": "^(?:a|b)$"}}
    assert word["strict"] is True
    assert log["name"] == "git__log"
    names = [{"type": "function", "function": {"name": "word"}}]
    assert asked.chat["tool_choice"] == {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": names}}


def test_hosted_tools():
    tools = [{"type": "web_search"}, {"type": "function", "name": "f"}]
    with pytest.raises(ApiError) as caught:
        turn(input="q", tools=tools)
    assert (caught.value.param, caught.value.code) == ("tools[0]", "unsupported_tool")
    asked = turn(input="q", tools=tools, drop=True)
    assert asked.dropped == ["tools[0].web_search"]
    assert [tool["function"]["name"] for tool in asked.chat["tools"]] == ["f"]
    assert [tool["name"] for tool in asked.resource("r", "m", 1, {})["tools"]] == ["f"]


REFUSED = [
    ({}, "input"),
    ({"input": 3}, "input"),
    ({"input": []}, "input"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
    ({"input": [{"role": "boss", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": 3}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "function_call", "call_id": "c", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call_output", "output": ""}]}, "input[0].call_id"),
    ({"input": [USER, {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}]}, "input[1].encrypted_content"),
    ({"input": [USER, {"type": "item_reference", "id": "msg_unknown"}]}, "input[1].id"),
    ({"input": "q", "conversation": "c"}, "conversation"),
    ({"input": "q", "prompt": {"id": "p"}}, "prompt"),
    ({"input": "q", "truncation": "auto"}, "truncation"),
    ({"input": "q", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "q", "temperature": 3}, "temperature"),
    ({"input": "q", "text": {"verbosity": "low"}}, "text.verbosity"),
    ({"input": "q", "text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"input": "q", "reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"input": "q", "include": ["everything"]}, "include"),
    ({"input": "q", "metadata": {"a": 1}}, "metadata"),
    ({"input": "q", "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"input": "q", "tools": [{"type": "custom", "name": "x", "format": {"type": "grammar", "syntax": "lark", "definition": "start: start"}}]}, "tools[0].format.definition"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), REFUSED)
def test_refused_by_name(body, param):
    with pytest.raises(ApiError) as caught:
        turn(**body)
    assert (caught.value.status in (400, 404), caught.value.param) == (True, param)
    assert param.split("[")[0].split(".")[0] in caught.value.message


def test_the_chat_requests_words_are_this_ones():
    asked = turn(
        input=[USER, {"role": "assistant", "content": "a"}], instructions="i", tools=[{"type": "function", "name": "f"}]
    )
    for chat, own in (
        ("messages[0].content", "instructions.content"),
        ("messages[2].role", "input[1].role"),
        ("tools[0].function.parameters", "tools[0].parameters"),
        ("response_format", "text.format"),
        ("max_tokens", "max_output_tokens"),
        ("temperature", "temperature"),
    ):
        error = ApiError(400, f"'{chat}' is wrong.", chat)
        rename(error, asked.names)
        assert (error.param, error.message) == (own, f"'{own}' is wrong.")


def test_continued_is_the_same_prompt():
    """By id, by reference, or by sending everything again."""
    _, first = tell([Delta(0, "hm", 1, kind="reasoning"), Delta(0, "a", 1, "stop")], turn(input="q"))
    given = turn(input="q").given
    stored = [*given, *first["output"]]
    by_id = turn(stored, input="more")
    by_reference = turn(
        find={item["id"]: item for item in stored}.get,
        input=[*[{"type": "item_reference", "id": item["id"]} for item in stored], {"role": "user", "content": "more"}],
    )
    sent_again = turn(input=[*stored, {"role": "user", "content": "more"}])
    assert by_id.messages == by_reference.messages == sent_again.messages
    assert by_id.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}


def test_pages():
    items = [{"id": str(i)} for i in range(5)]

    def ids(**query):
        found = page(items, query)
        return [item["id"] for item in found["data"]], found["has_more"]

    assert ids() == (list("43210"), False)
    assert ids(order="asc", limit="2") == (list("01"), True)
    assert ids(order="asc", after="1", limit="3") == (list("234"), False)
    assert ids(order="desc", after="1") == (["0"], False)
    for query in ({"order": "up"}, {"limit": "0"}, {"limit": "101"}, {"limit": "x"}, {"after": "9"}):
        with pytest.raises(ApiError) as caught:
            ids(**query)
        assert caught.value.param == next(iter(query))


# ──────────────────────────────────────────────────── over HTTP ───────────────────────────────────────────────────


@pytest.fixture
def reader(tmp_path):
    with serve_scripted(tmp_path, kind="Reader") as served:
        yield served


def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0)


def ask(served, **body):
    return served.request("POST", "/v1/responses", body, {"X-Debug": "prompt"})


def prompt_of(body):
    return body["debug"]["prompts"][0]["prompt"]


def test_reply_and_stream(scripted):
    status, body, _ = scripted.request("POST", "/v1/responses", {"input": "echo hé", "metadata": {"a": "b"}, "user": "u"})
    assert status == 200
    assert set(body) >= MEMBERS
    Response.model_validate(body)
    assert (body["output"][0]["content"][0]["text"], body["metadata"], body["user"]) == ("hé", {"a": "b"}, "u")
    status, raw, headers = scripted.request("POST", "/v1/responses", {"input": "echo hé", "stream": True})
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    events = parse(raw)
    assert kinds(events) == ["created", "in_progress", *TEXT, "completed"]
    assert nameless(events[-1]["response"]["output"]) == nameless(body["output"])


def test_sdk(scripted):
    sdk = client(scripted)
    first = sdk.responses.create(model="m", input="echo one")
    assert (first.output_text, first.model) == ("one", "m")
    with sdk.responses.stream(model="m", input="echo two", previous_response_id=first.id) as stream:
        for _ in stream:
            pass
        second = stream.get_final_response()
    assert second.output_text == "two"
    assert sdk.responses.retrieve(second.id).previous_response_id == first.id
    items = sdk.responses.input_items.list(first.id)
    ResponseItemList.model_validate(items.to_dict())
    assert items.data[0].content[0].text == "echo one"
    assert sdk.responses.input_tokens.count(model="m", input="echo one").input_tokens == first.usage.input_tokens
    sdk.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError, match="background"):
        sdk.responses.cancel(second.id)
    with pytest.raises(openai.BadRequestError, match="not kept"):
        sdk.responses.retrieve(second.id, stream=True)


def test_a_conversation(reader):
    _, first, _ = ask(reader, input="echo one", instructions="be brief")
    _, second, _ = ask(reader, input="echo two", previous_response_id=first["id"], instructions="be long")
    assert prompt_of(second) == "system: be long\nuser: echo one\nassistant: one\nuser: echo two"
    _, branch, _ = ask(reader, input="echo three", previous_response_id=first["id"])
    assert prompt_of(branch) == "user: echo one\nassistant: one\nuser: echo three"
    assert reader.request("DELETE", f"/v1/responses/{first['id']}")[1]["deleted"]
    status, body, _ = ask(reader, input="echo x", previous_response_id=first["id"])
    assert (status, body["error"]["code"], body["error"]["param"]) == (
        404,
        "previous_response_not_found",
        "previous_response_id",
    )
    _, third, _ = ask(reader, input="echo four", previous_response_id=second["id"])
    assert prompt_of(third).endswith("user: echo two\nassistant: two\nuser: echo four")
    message = second["output"][0]["id"]
    _, referred, _ = ask(reader, input=[{"type": "item_reference", "id": message}, {"role": "user", "content": "echo y"}])
    assert prompt_of(referred) == "assistant: two\nuser: echo y"


def test_store_false_leaves_nothing(reader):
    _, body, _ = ask(reader, input="echo one", store=False)
    assert body["store"] is False
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        assert reader.request(method, f"/v1/responses/{body['id']}{path}", {} if method == "POST" else None)[0] == 404
    assert ask(reader, input="echo x", previous_response_id=body["id"])[0] == 404


def test_without_state(tmp_path):
    with serve_scripted(tmp_path, state="none") as served:
        assert served.request("POST", "/v1/responses", {"input": "echo x"})[1]["store"] is False
        status, body, _ = served.request("POST", "/v1/responses", {"input": "echo x", "store": True})
        assert (status, body["error"]["param"]) == (400, "store")
        assert served.request("GET", "/v1/responses/resp_1")[0] == 404


def test_stored_before_it_is_told_and_after_a_restart(tmp_path):
    path = str(tmp_path / "state")
    with serve_scripted(tmp_path, kind="Reader", state=State(path)) as served:
        events = parse(served.request("POST", "/v1/responses", {"input": "echo one", "stream": True})[1])
        body = events[-1]["response"]
        assert served.request("GET", f"/v1/responses/{body['id']}")[1] == body
    with serve_scripted(tmp_path, kind="Reader", state=State(path)) as served:
        assert served.request("GET", f"/v1/responses/{body['id']}")[1] == body
        _, second, _ = ask(served, input="echo two", previous_response_id=body["id"])
        assert prompt_of(second) == "user: echo one\nassistant: one\nuser: echo two"


def test_a_state_that_cannot_be_written_is_told(tmp_path):
    state = State(str(tmp_path / "state"))
    with serve_scripted(tmp_path, state=state) as served:
        state.db.execute("PRAGMA query_only = 1")
        status, body, _ = served.request("POST", "/v1/responses", {"input": "echo one"})
        assert (status, body["store"], body["output"][0]["content"][0]["text"]) == (200, False, "one")


KILLED = """
import sys, threading
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import serve_scripted
from state import State
if __name__ == "__main__":
    with serve_scripted({folder!r}, kind="Reader", state=State({path!r})) as served:
        print(served.port, flush=True)
        threading.Event().wait()
"""


def test_kill_9_in_mid_stream(tmp_path):
    import http.client

    path = str(tmp_path / "state")
    script = tmp_path / "serve.py"
    script.write_text(KILLED.format(root=str(ROOT), folder=str(tmp_path), path=path))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        conn = http.client.HTTPConnection("127.0.0.1", int(process.stdout.readline()), timeout=60)
        conn.request("POST", "/v1/responses", json.dumps({"input": "echo one"}))
        first = json.loads(conn.getresponse().read())
        conn.request(
            "POST", "/v1/responses", json.dumps({"input": "forever", "stream": True, "previous_response_id": first["id"]})
        )
        reply, seen = conn.getresponse(), b""
        while seen.count(b"output_text.delta") < 5:
            seen += reply.read1(1000)
        second = json.loads(seen.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    with serve_scripted(tmp_path, kind="Reader", state=State(path)) as served:
        assert served.request("GET", f"/v1/responses/{first['id']}")[1] == first
        assert served.request("GET", f"/v1/responses/{second}")[0] == 404
        _, third, _ = ask(served, input="echo two", previous_response_id=first["id"])
        assert prompt_of(third) == "user: echo one\nassistant: one\nuser: echo two"


def test_errors(scripted):
    for body, status, param, code in (
        ({"input": "echo " + "x" * 3000}, 400, "input", "context_length_exceeded"),
        ({"input": "echo x", "max_output_tokens": 10**6}, 400, "input", "context_length_exceeded"),
        ({"input": "echo x", "temperature": 9}, 400, "temperature", None),
        ({"input": "echo x", "text": {"format": {"type": "xml"}}}, 400, "text.format", None),
        ({"input": "badstart"}, 500, None, "engine_failed"),
    ):
        got, told, _ = scripted.request("POST", "/v1/responses", body)
        assert (got, set(told["error"])) == (status, {"message", "type", "param", "code"})
        assert (told["error"]["param"], told["error"]["code"]) == (param, code)
    status, body, _ = scripted.request("GET", "/v1/responses", headers={"Upgrade": "websocket"})
    assert (status, body["error"]["code"]) == (426, "no_websocket")
    assert scripted.request("GET", "/v1/responses")[0] == 405
    assert scripted.request("PUT", "/v1/responses/resp_1", b"")[2]["Allow"] == "GET, DELETE, HEAD, OPTIONS"


def test_a_failure_in_mid_stream(scripted):
    for verb in ("die", "raise"):
        raw = scripted.request("POST", "/v1/responses", {"input": verb, "stream": True})[1]
        last = parse(raw)[-1]
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        scripted.wait_ready()
        assert scripted.request("GET", f"/v1/responses/{last['response']['id']}")[1]["status"] == "failed"


def test_a_client_that_leaves_is_noticed(scripted):
    import http.client

    conn = http.client.HTTPConnection(scripted.host, scripted.port, timeout=60)
    conn.request("POST", "/v1/responses", json.dumps({"input": "forever", "stream": True}))
    conn.getresponse().read1(100)
    conn.close()
    until(lambda: any(line.startswith("cancel") for line in scripted.calls()))


def test_ignored_fields_are_told(tmp_path):
    with serve_scripted(tmp_path, drop_hosted=True) as served:
        _, _, headers = served.request("POST", "/v1/responses", {"input": "echo x", "client_metadata": {}, "bogus": 1})
        assert headers["X-Ignored-Fields"] == "bogus"


def test_ids_have_their_prefixes():
    assert all(responses_api.new_id(kind).startswith(prefix) for kind, prefix in responses_api.PREFIXES.items())


def test_a_key_has_its_own(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("ada: one\nbob: two\nthree\nfour\n")
    keys.chmod(0o600)
    with serve_scripted(tmp_path, access=Access(Keys(["five", "six"], str(keys)))) as served:
        stored = {}
        for key in ("one", "two", "three", "four", "five", "six"):
            header = {"Authorization": f"Bearer {key}"}
            stored[key] = served.request("POST", "/v1/responses", {"input": "echo x"}, header)[1]["id"]
            for other, id in stored.items():
                status = 200 if other == key else 404
                for path in ("", "/input_items"):
                    assert served.request("GET", f"/v1/responses/{id}{path}", None, header)[0] == status
                asked = {"input": "echo y", "previous_response_id": id}
                assert served.request("POST", "/v1/responses", asked, header)[0] == status
        keys.write_text("four\nada: seven\n")  # another key of the same name, another place
        for key, owner in (("seven", "one"), ("four", "four")):
            assert served.request("GET", f"/v1/responses/{stored[owner]}", None, {"X-Api-Key": key})[0] == 200


# ──────────────────────────────────────────────────── in the background ───────────────────────────────────────────


def status_of(served, id):
    return served.request("GET", f"/v1/responses/{id}")[1]["status"]


def test_background(scripted):
    scripted.script("hold")
    status, body, _ = scripted.request("POST", "/v1/responses", {"input": "echo hé", "background": True})
    assert (status, body["status"], body["background"], body["output"]) == (200, "queued", True, [])
    Response.model_validate(body)
    until(lambda: status_of(scripted, body["id"]) == "in_progress")
    asked = {"input": "echo x", "previous_response_id": body["id"]}
    assert scripted.request("POST", "/v1/responses", asked)[1]["error"]["code"] == "not_finished"
    scripted.script("hold", False)
    until(lambda: status_of(scripted, body["id"]) == "completed")
    done = scripted.request("GET", f"/v1/responses/{body['id']}")[1]
    assert (done["output"][0]["content"][0]["text"], done["usage"]["output_tokens"]) == ("hé", 4)
    assert scripted.request("POST", "/v1/responses", asked)[0] == 200
    assert scripted.request("POST", f"/v1/responses/{body['id']}/cancel", {})[1]["status"] == "completed"


def test_what_is_told_to_be_made_can_be_gone_on_from(scripted, monkeypatch):
    """Its thread may have more to do."""
    may_end, cancel = threading.Event(), Job.cancel

    def late(job):
        if threading.current_thread().name.startswith("background"):
            may_end.wait(60)
        cancel(job)

    monkeypatch.setattr(Job, "cancel", late)
    id = scripted.request("POST", "/v1/responses", {"input": "echo x", "background": True})[1]["id"]
    until(lambda: status_of(scripted, id) == "completed")
    assert scripted.server.running.under_way(id)
    assert scripted.request("POST", "/v1/responses", {"input": "echo y", "previous_response_id": id})[0] == 200
    may_end.set()
    until(lambda: not scripted.server.running.under_way(id))


def test_a_stream_is_found_again(scripted):
    """What the client had before it left, and what comes from there on, are the stream."""
    import http.client

    conn = http.client.HTTPConnection(scripted.host, scripted.port, timeout=60)
    conn.request("POST", "/v1/responses", json.dumps({"input": "echo " + "word " * 100, "background": True, "stream": True}))
    reply, seen = conn.getresponse(), b""
    while seen.count(b"\n\n") < 20:
        seen += reply.read1(2000)
    conn.close()
    had = [json.loads(event.split(b"data: ")[1]) for event in seen.split(b"\n\n")[:-1]]
    assert [event["sequence_number"] for event in had] == list(range(len(had)))
    last = had[9]["sequence_number"]
    id = had[0]["response"]["id"]
    rest = scripted.request("GET", f"/v1/responses/{id}?stream=true&starting_after={last}")[1].decode()
    *blocks, done, empty = rest.split("\n\n")
    assert (done, empty) == ("data: [DONE]", "")
    events = had[:10] + [json.loads(block.split("data: ")[1]) for block in blocks]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == "word " * 100 == events[-1]["response"]["output"][0]["content"][0]["text"]
    parse(scripted.request("GET", f"/v1/responses/{id}?stream=true")[1])
    for query, param in (("stream=true&starting_after=x", "starting_after"), ("stream=1", "stream")):
        assert scripted.request("GET", f"/v1/responses/{id}?{query}")[1]["error"]["param"] == param
    sdk = client(scripted)
    with sdk.responses.stream(response_id=id, starting_after=4) as stream:
        assert next(iter(stream)).sequence_number == 5
        assert stream.get_final_response().id == id


def test_cancel(scripted):
    _, body, _ = scripted.request("POST", "/v1/responses", {"input": "forever", "background": True})
    until(lambda: status_of(scripted, body["id"]) == "in_progress")
    cancelled = scripted.request("POST", f"/v1/responses/{body['id']}/cancel", {})[1]
    assert (cancelled["id"], cancelled["status"]) == (body["id"], "cancelled")
    assert status_of(scripted, body["id"]) == "cancelled"
    until(lambda: any(line.startswith("cancel") for line in scripted.calls()))
    until(lambda: not scripted.models.engine.jobs)


def test_cancel_needs_no_body(scripted):
    """As the reference's curl says it: a POST without a length."""
    _, body, _ = scripted.request("POST", "/v1/responses", {"input": "forever", "background": True})
    head = f"POST /v1/responses/{body['id']}/cancel HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    with socket.create_connection((scripted.host, scripted.port), timeout=60) as sock:
        sock.sendall(head)
        assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert status_of(scripted, body["id"]) == "cancelled"


def test_deleted_while_it_is_made(scripted):
    _, body, _ = scripted.request("POST", "/v1/responses", {"input": "forever", "background": True})
    until(lambda: status_of(scripted, body["id"]) == "in_progress")
    assert scripted.request("DELETE", f"/v1/responses/{body['id']}")[1]["deleted"]
    until(lambda: not scripted.models.engine.jobs)
    assert scripted.request("GET", f"/v1/responses/{body['id']}")[0] == 404


def test_background_has_a_deadline(tmp_path):
    with serve_scripted(tmp_path, request_timeout=0.3) as served:
        _, body, _ = served.request("POST", "/v1/responses", {"input": "forever", "background": True})
        until(lambda: status_of(served, body["id"]) == "in_progress")
        served.script("hold")
        until(lambda: status_of(served, body["id"]) == "failed")
        served.script("hold", False)
        error = served.request("GET", f"/v1/responses/{body['id']}")[1]["error"]
        assert (error["code"], error["message"]) == ("server_error", "No answer within 0.3 s (--request-timeout).")


def test_background_failures(scripted, tmp_path):
    for text, code in (("echo " + "x" * 3000, "invalid_prompt"), ("raise", "server_error")):
        _, body, _ = scripted.request("POST", "/v1/responses", {"input": text, "background": True})
        until(lambda: status_of(scripted, body["id"]) == "failed")  # noqa: B023
        assert scripted.request("GET", f"/v1/responses/{body['id']}")[1]["error"]["code"] == code
        scripted.wait_ready()
    status, body, _ = scripted.request("POST", "/v1/responses", {"input": "echo x", "background": True, "store": False})
    assert (status, body["error"]["param"]) == (400, "background")
    assert scripted.request("POST", "/v1/responses", {"input": "echo x", "background": True, "temperature": 9})[0] == 400


def test_what_was_being_made_when_the_server_ended_has_failed(tmp_path):
    state = State(str(tmp_path / "state"))
    body = {
        "id": "resp_1",
        "previous_response_id": None,
        "status": "in_progress",
        "error": None,
        "background": True,
        "output": [],
    }
    state.put("", body, [])
    state.close()
    with serve_scripted(tmp_path, state=State(str(tmp_path / "state"))) as served:
        told = served.request("GET", "/v1/responses/resp_1")[1]
        assert (told["status"], told["error"]["code"]) == ("failed", "server_error")
        assert served.request("POST", "/v1/responses/resp_1/cancel", {})[1]["status"] == "failed"
