"""/v1/messages: requests into chat requests, deltas into blocks and events, and both over HTTP with the official SDK."""

import json

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from conftest import serve_scripted
from pydantic import TypeAdapter

from api_errors import ApiError, rename
from api_reply import CHAT_SHAPE, Choice, Completion
from api_request import read_fields
from engine import Delta, Started
from messages_api import MESSAGES, Answer, Turn, error_body, sign

KEY = b"k" * 32
EVENT = TypeAdapter(RawMessageStreamEvent)
USER = {"role": "user", "content": "q"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}


def turn(**body):
    table = {
        **MESSAGES,
        "tools": MESSAGES["tools"]._replace(needs=""),
        "tool_choice": MESSAGES["tool_choice"]._replace(needs=""),
    }
    return Turn(read_fields({"max_tokens": 9, "messages": [USER], **body}, table).values, KEY)


def completion(**fields):
    done = Completion("msg_1", "m", "fp", [Choice()], CHAT_SHAPE._replace(prefix="msg_"), created=7, **fields)
    done.start(Started(10, 4, 1.0))
    return done


def tell(deltas, **body):
    """(events, the whole message) of one answer, told both ways."""
    done = completion()
    answer = Answer(done, turn(**body))
    raw = b""
    for i, delta in enumerate(deltas):
        delta = done.add(delta)
        raw += (answer.opening() if i == 0 else b"") + answer.delta(delta)
    return parse(raw + answer.end({})), answer.whole({})


def parse(raw):
    """The events of a stream, each checked against the SDK's types."""
    *blocks, empty = raw.decode().split("\n\n")
    assert empty == ""
    events = []
    for block in blocks:
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    return events


def kinds(events):
    names = [event["type"] if "delta" not in event else event["delta"].get("type", "message_delta") for event in events]
    return [name for i, name in enumerate(names) if not i or name != names[i - 1]]


def test_text():
    events, message = tell([Delta(0, "Hé", 1), Delta(0, "", 1), Delta(0, '"y"', 1), Delta(0, "", 1, "stop")])
    assert kinds(events) == [
        "message_start", "content_block_start", "text_delta", "content_block_stop", "message_delta", "message_stop"
    ]  # fmt: skip
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["output_tokens"] == 0
    assert events[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"] == {
        "input_tokens": 6, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 4, "output_tokens": 4
    }  # fmt: skip
    Message.model_validate(message, strict=True)
    assert (message["content"], message["stop_reason"]) == ([{"type": "text", "text": 'Hé"y"'}], "end_turn")


def test_thinking_text_and_calls():
    deltas = [
        Delta(0, "let ", 1, kind="reasoning"), Delta(0, "me", 1, kind="reasoning"), Delta(0, "So:", 1),
        Delta(0, "f", 1, kind="call", id="call_1"), Delta(0, '{"a":', 1, kind="arguments"), Delta(0, "1}", 1, kind="arguments"),
        Delta(0, "g", 1, kind="call", id="call_2"), Delta(0, "{}", 1, kind="arguments"), Delta(0, "", 1, "tool_calls"),
    ]  # fmt: skip
    events, message = tell(deltas)
    around = ("content_block_start", "content_block_stop")
    assert kinds(events) == [
        "message_start", around[0], "thinking_delta", "signature_delta", around[1], around[0], "text_delta", around[1],
        around[0], "input_json_delta", around[1], around[0], "input_json_delta", around[1], "message_delta", "message_stop",
    ]  # fmt: skip
    assert [e["content_block"] for e in events if e["type"] == around[0]] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}},
        {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
    ]
    assert [e["index"] for e in events if e["type"] == around[0]] == [0, 1, 2, 3]
    Message.model_validate(message)
    assert message["stop_reason"] == "tool_use"
    assert message["content"] == [
        {"type": "thinking", "thinking": "let me", "signature": sign(KEY, "let me")},
        {"type": "text", "text": "So:"},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "toolu_2", "name": "g", "input": {}},
    ]


@pytest.mark.parametrize(
    ("delta", "stop"),
    [
        (Delta(0, "", 1, "stop"), ("end_turn", None)),
        (Delta(0, "", 1, "length"), ("max_tokens", None)),
        (Delta(0, "", 1, "tool_calls"), ("tool_use", None)),
        (Delta(0, "", 1, "cut", stop="END"), ("stop_sequence", "END")),
    ],
)
def test_stop_reasons(delta, stop):
    events, message = tell([Delta(0, "a", 1), delta])
    assert (message["stop_reason"], message["stop_sequence"]) == stop
    assert tuple(events[-2]["delta"].values()) == stop


def test_an_answer_of_nothing_has_no_block():
    events, message = tell([Delta(0, "", 1, "stop")])
    assert kinds(events) == ["message_start", "message_delta", "message_stop"]
    assert message["content"] == []


def test_a_call_that_was_cut():
    _, message = tell([Delta(0, "f", 1, kind="call", id="call_1"), Delta(0, '{"a', 1, "length", kind="arguments")])
    assert (message["content"][0]["input"], message["stop_reason"]) == ({}, "max_tokens")


def test_context_management_is_told():
    edits = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
    events, message = tell([Delta(0, "a", 1, "stop")], context_management=edits)
    assert message["context_management"] == events[-2]["context_management"] == {"applied_edits": []}


# ──────────────────────────────────────────────── requests → chat requests ────────────────────────────────────────

THOUGHT = {"type": "thinking", "thinking": "hm", "signature": sign(KEY, "hm")}
CALL = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TRANSLATED = [
    ({}, [USER]),
    ({"system": "s"}, [{"role": "system", "content": "s"}, USER]),
    (
        {"system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "t"}]},
        [{"role": "system", "content": "s\n\nt"}, USER],
    ),
    (
        {"messages": [USER, {"role": "system", "content": "now"}, {"role": "user", "content": [{"type": "text", "text": "r"}]}]},
        [USER, {"role": "system", "content": "now"}, {"role": "user", "content": "r"}],
    ),
    ({"messages": [USER, USER]}, [{"role": "user", "content": "q\n\nq"}]),
    (
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [THOUGHT, {"type": "text", "text": "so"}, {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "x"}], "is_error": True},
                        {"type": "text", "text": "go on"},
                    ],
                },
            ]
        },
        [
            USER,
            {"role": "assistant", "content": "so", "reasoning_content": "hm", "tool_calls": [CALL]},
            {"role": "tool", "content": "Error: x", "tool_call_id": "toolu_1"},
            {"role": "user", "content": "go on"},
        ],
    ),
    (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1"}]},
            ]
        },
        [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "", "tool_call_id": "toolu_1"},
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "messages"), TRANSLATED)
def test_messages(body, messages):
    assert turn(**body).messages == messages


def billed(cch):
    line = f"x-anthropic-billing-header: cc_version=2.1.37.0d9; cc_entrypoint=cli; cch={cch};"
    return [
        {"type": "text", "text": line},
        {"type": "text", "text": "You are Claude Code.", "cache_control": {"type": "ephemeral"}},
    ]


def test_claude_codes_billing_line_is_not_for_the_model():
    """It changes with every request, and would cost the prefix cache."""
    assert turn(system=billed("fa690")).messages == turn(system=billed("71fea")).messages
    assert turn(system=billed("fa690")).messages[0]["content"] == "You are Claude Code."
    joined = "\n".join(block["text"] for block in billed("1"))
    assert turn(system=joined).messages[0]["content"] == "You are Claude Code."
    about = "What is x-anthropic-billing-header: a line?"
    assert turn(system=about).messages[0]["content"] == about


def chat(**body):
    return {
        name: value for name, value in turn(**body).chat.items() if name not in ("messages", "max_tokens") and value is not None
    }


def test_options():
    schema = {"type": "object"}
    function = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
    form = {"type": "json_schema", "schema": schema}
    assert chat(temperature=0.1, top_k=5, stop_sequences=["x"]) == {"temperature": 0.1, "top_k": 5, "stop": ["x"]}
    assert chat(tools=[TOOL]) == {"tools": [function], "tool_choice": "auto"}
    assert chat(tools=[TOOL], tool_choice={"type": "any"})["tool_choice"] == "required"
    assert chat(tools=[TOOL], tool_choice={"type": "none"})["tool_choice"] == "none"
    named = chat(tools=[TOOL], tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True})
    assert named["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert named["parallel_tool_calls"] is False
    asked = {"type": "json_schema", "json_schema": {"name": "output", "schema": schema}}
    assert chat(output_config={"format": form})["response_format"] == chat(output_format=form)["response_format"] == asked
    assert chat(thinking={"type": "disabled"}) == {"reasoning_effort": "none"}
    assert chat(thinking={"type": "adaptive"}) == {}
    assert chat(thinking={"type": "adaptive"}, output_config={"effort": "max"}) == {"reasoning_effort": "xhigh"}
    assert chat(thinking={"type": "enabled", "budget_tokens": 2000}) == {"reasoning_effort": "medium", "thinking_budget": 2000}
    assert chat(messages=[USER, {"role": "assistant", "content": "The"}])["continue_final_message"] is True
    assert chat(metadata={"user_id": "u"}, cache_control={"type": "ephemeral"}, service_tier="auto", mcp_servers=[]) == {}


def test_thinking_of_earlier_turns_can_be_left_out():
    messages = [USER, {"role": "assistant", "content": [THOUGHT, {"type": "text", "text": "a"}]}] * 3 + [USER]

    def thoughts(keep):
        edits = [{"type": "clear_thinking_20251015", **({"keep": keep} if keep else {})}]
        return [
            ("reasoning_content" in m)
            for m in turn(messages=messages, context_management={"edits": edits}).messages
            if m["role"] == "assistant"
        ]

    assert thoughts("all") == [True, True, True]
    assert thoughts({"type": "thinking_turns", "value": 2}) == [False, True, True]
    assert thoughts(None) == [False, False, True]


FOREIGN = {"type": "thinking", "thinking": "hm", "signature": "EqQBCkYIBBgC"}
REFUSED = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f"}]}]}, "messages[0].content[0].input"),
    ({"messages": [USER, {"role": "assistant", "content": [FOREIGN]}]}, "messages[1].content[0].signature"),
    ({"messages": [USER, {"role": "assistant", "content": [{**THOUGHT, "thinking": "changed"}]}]}, "messages[1].content[0].signature"),
    ({"messages": [USER, {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]}]}, "messages[1].content[0]"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop_sequences": "x"}, "stop_sequences"),
    ({"temperature": 3}, "temperature"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "enabled"}}, "thinking"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"container": "c"}, "container"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config"),
    ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management.edits[0]"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), REFUSED)
def test_refused_by_name(body, param):
    with pytest.raises(ApiError) as caught:
        turn(**body)
    assert (caught.value.status, caught.value.param) == (400, param)
    assert f"'{param}'" in caught.value.message  # Anthropic's errors have no other place for it


def test_the_chat_requests_words_are_this_ones():
    asked = turn(system="s", messages=[USER, {"role": "assistant", "content": "a"}], tools=[TOOL])
    for theirs, own in (
        ("messages[0].content", "system.content"),
        ("messages[2].role", "messages[1].role"),
        ("tools[0].function.parameters", "tools[0].input_schema"),
        ("tools[0].function.name", "tools[0].name"),
        ("response_format", "output_config.format"),
    ):
        error = ApiError(400, f"'{theirs}' is wrong.", theirs)
        rename(error, asked.names)
        assert (error.param, error.message) == (own, f"'{own}' is wrong.")


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"), (404, "not_found_error"),
        (411, "invalid_request_error"), (413, "request_too_large"), (429, "rate_limit_error"), (500, "api_error"), (503, "overloaded_error"),
    ],
)  # fmt: skip
def test_error_types(status, kind):
    assert error_body(ApiError(status, "no"), "req-1") == {
        "type": "error", "error": {"type": kind, "message": "no"}, "request_id": "req-1"
    }  # fmt: skip


# ──────────────────────────────────────────────────── over HTTP ───────────────────────────────────────────────────


@pytest.fixture
def reader(tmp_path):
    with serve_scripted(tmp_path, kind="Reader") as served:
        yield served


def client(served):
    return anthropic.Anthropic(base_url=served.url, api_key="any", max_retries=0)


def said(text):
    return [{"role": "user", "content": text}]


def post(served, path="", **body):
    return served.request("POST", f"/v1/messages{path}", body, {"anthropic-version": "2023-06-01"})


def test_sdk(scripted):
    sdk = client(scripted)
    message = sdk.messages.create(model="m", max_tokens=50, messages=said("echo one"))
    assert (message.content[0].text, message.stop_reason, message.model) == ("one", "end_turn", "m")
    with sdk.messages.stream(model="m", max_tokens=50, messages=said("echo hé"), stop_sequences=["zz"]) as stream:
        assert "".join(stream.text_stream) == "hé"
        assert stream.get_final_message().usage.output_tokens == 4
    count = sdk.messages.count_tokens(model="m", messages=said("echo one"), system="be brief").input_tokens
    usage = sdk.messages.create(model="m", max_tokens=50, messages=said("echo one"), system="be brief").usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens
    beta = sdk.beta.messages.create(model="m", max_tokens=50, messages=said("echo two"), betas=["x"])
    assert beta.content[0].text == "two"
    with pytest.raises(anthropic.BadRequestError) as caught:
        sdk.messages.create(model="m", max_tokens=50, messages=said("echo one"), stop_sequences=[""])
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert caught.value.request_id.startswith("req-")


def test_reply_and_stream(scripted):
    status, body, headers = post(scripted, max_tokens=9, messages=said("echo hé"))
    assert (status, headers["request-id"]) == (200, headers["X-Request-Id"])
    Message.model_validate(body, strict=True)
    status, raw, _ = post(scripted, max_tokens=9, messages=said("echo hé"), stream=True)
    assert status == 200
    assert kinds(parse(raw)) == [
        "message_start", "content_block_start", "text_delta", "content_block_stop", "message_delta", "message_stop"
    ]  # fmt: skip


def test_a_stop_sequence_is_told(scripted):
    _, body, _ = post(scripted, max_tokens=99, messages=said("echo one two three"), stop_sequences=["wo t", "three"])
    assert (body["content"][0]["text"], body["stop_reason"], body["stop_sequence"]) == ("one t", "stop_sequence", "wo t")


def test_more_tokens_than_fit_are_cut_to_the_context(scripted):
    _, body, _ = post(scripted, max_tokens=64_000, messages=said("forever"))
    assert (body["stop_reason"], body["usage"]["output_tokens"]) == ("max_tokens", 2000 - len("forever"))


def test_a_whole_conversation(reader):
    result = [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "7"}, {"type": "text", "text": "echo done"}]
    messages = [USER, {"role": "assistant", "content": "So:"}, {"role": "user", "content": result[1:]}]
    _, body, _ = reader.request(
        "POST", "/v1/messages?beta=true", {"max_tokens": 9, "messages": messages, "system": billed("1")}, {"X-Debug": "prompt"}
    )
    assert body["debug"]["prompts"][0]["prompt"] == "system: You are Claude Code.\nuser: q\nassistant: So:\nuser: echo done"
    assert body["content"][0]["text"] == "done"


def test_errors(scripted):
    for path, body, status, kind in (
        ("/v1/messages", b"{", 400, "invalid_request_error"),
        ("/v1/messages", {"messages": said("x")}, 400, "invalid_request_error"),
        ("/v1/messages", {"max_tokens": 5}, 400, "invalid_request_error"),
        ("/v1/messages", {"max_tokens": 5, "messages": said("x" * 3000)}, 400, "invalid_request_error"),
        ("/v1/messages", {"max_tokens": 5, "messages": said("badstart")}, 500, "api_error"),
        ("/v1/messages/batches", {}, 404, "not_found_error"),
        ("/messages/count_tokens", {}, 400, "invalid_request_error"),
    ):
        got, told, _ = scripted.request("POST", path, body)
        assert (got, told["type"], told["error"]["type"]) == (status, "error", kind), path
        assert set(told["error"]) == {"type", "message"}
    assert scripted.request("GET", "/v1/messages")[1]["type"] == "error"
    assert "param" in scripted.request("POST", "/v1/chat/completions", b"{")[1]["error"]  # on these routes alone


def test_keys(tmp_path):
    with serve_scripted(tmp_path, api_key="secret") as served:
        body = {"max_tokens": 5, "messages": said("echo x")}
        status, told, _ = served.request("POST", "/v1/messages", body)
        assert (status, told["error"]["type"]) == (401, "authentication_error")
        for headers in ({"x-api-key": "secret"}, {"Authorization": "Bearer secret"}):
            assert served.request("POST", "/v1/messages", body, headers)[0] == 200


def test_a_failure_in_mid_stream(scripted):
    raw = post(scripted, max_tokens=9, messages=said("die"), stream=True)[1].decode()
    assert raw.split("\n\n")[-2].startswith(
        'event: error\ndata: {"type":"error","error":{"type":"api_error","message":"The engine failed'
    )


def test_a_profiles_limit_cuts(tmp_path):
    from model_init import Profile

    with serve_scripted(tmp_path, profile=Profile(max_tokens_limit=5)) as served:
        assert post(served, max_tokens=99, messages=said("forever"))[1]["usage"]["output_tokens"] == 5
