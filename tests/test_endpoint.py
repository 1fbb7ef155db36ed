"""Real sockets: statuses, streams, framing, a peer that leaves, a reader that stalls, an engine that dies."""

import json
import re
import socket
import threading
import time

import pytest
from conftest import cancelled_at, serve_scripted, sse, threads_alive, until

from metrics import Metrics

CHAT = "/v1/chat/completions"


def body(content, **fields):
    return json.dumps({"messages": [{"role": "user", "content": content}], **fields}).encode()


def raw(served, data, timeout=10):
    """Send bytes, read until the server closes or falls silent."""
    with socket.create_connection((served.host, served.port), timeout=timeout) as sock:
        sock.sendall(data)
        out = b""
        try:
            while block := sock.recv(65536):
                out += block
                sock.settimeout(1)
        except TimeoutError:
            pass
        return out


def post(data, *headers, version="1.1", path=CHAT):
    lines = [f"POST {path} HTTP/{version}", "Host: x", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + data


def sized(data, *headers, **kw):
    return post(data, f"Content-Length: {len(data)}", *headers, **kw)


def idle(served):
    until(lambda: not served.models.engine.jobs and not served.server.busy.count)


# ── routes ──


def test_models(scripted):
    status, listed, _ = scripted.request("GET", "/v1/models")
    card = {
        "id": "scripted",
        "object": "model",
        "created": 1234,
        "owned_by": "local",
        "permission": [],
        "root": "scripted",
        "parent": None,
    }
    assert (status, listed) == (200, {"object": "list", "data": [card | {"status": "loaded", "loaded": True}]})
    assert scripted.request("GET", "/models/scripted")[1] == listed["data"][0]
    status, error, _ = scripted.request("GET", "/v1/models/org/other")
    assert (status, error["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/health", "/v1/health", "/health/", "/health?x=1", "http://x/health"])
def test_health(scripted, path):
    status, health, headers = scripted.request("GET", path)
    assert (status, health["status"]) == (200, "ok")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", health["timestamp"])
    assert headers["Access-Control-Allow-Origin"] == "*"


def test_healthz_and_root(scripted):
    assert scripted.request("GET", "/v1/healthz")[1] == {
        "status": "ok",
        "loaded": True,
        "model_id": "scripted",
        "inference_backend": "scripted:Scripted",
        "queue_depth": 0,
        "switch_in_progress": False,
        "switch_target_model": None,
    }
    assert scripted.request("GET", "/")[1]["model"] == "scripted"
    assert scripted.request("GET", "/v1")[1]["model"] == "scripted"


def test_options_404_405(scripted):
    status, _, headers = scripted.request("OPTIONS", "/anything")
    assert (status, headers["Access-Control-Allow-Origin"]) == (204, "*")
    status, error, _ = scripted.request("GET", "/v1/nothing")
    assert (status, error["error"]["type"]) == (404, "invalid_request_error")
    status, error, headers = scripted.request("GET", CHAT)
    assert (status, headers["Allow"]) == (405, "POST, OPTIONS")
    assert scripted.request("DELETE", "/v1/models")[0] == 405
    assert scripted.request("HEAD", "/health")[:2] == (200, b"")


# ── answers ──


def test_reply(scripted):
    status, reply, _ = scripted.chat("echo Hé!", model="any name")
    assert status == 200
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hé!", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert reply["model"] == "any name"
    assert reply["usage"] == {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "total_tokens": 14,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert scripted.chat("echo x")[1]["model"] == "scripted"


def test_compact_json(scripted):
    data = body("echo hi")
    assert b'"content":"hi"' in raw(scripted, sized(data, "Connection: close"))


def test_stream(scripted):
    status, data, headers = scripted.chat("echo abc", stream=True, stream_options={"include_usage": True})
    assert (status, headers["Content-Type"]) == (200, "text/event-stream")
    assert (headers["Cache-Control"], headers["X-Accel-Buffering"]) == ("no-cache", "no")
    first, *middle, last, usage = sse(data)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert "".join(c["choices"][0]["delta"]["content"] for c in middle) == "abc"
    assert all(c["choices"][0]["finish_reason"] is None and c["usage"] is None for c in [first, *middle])
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)
    assert len({(c["id"], c["created"], c["model"]) for c in [first, *middle, last, usage]}) == 1


def test_stream_of_three_choices(scripted):
    chunks = scripted.stream("echo abc", n=3)
    assert [c["choices"][0]["index"] for c in chunks if "role" in c["choices"][0]["delta"]] == [0, 1, 2]
    for i in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == i]
        assert "".join(c["delta"].get("content", "") for c in mine) == "abc"
        assert [c["finish_reason"] for c in mine][-1] == "stop"
    assert all("usage" not in c for c in chunks)


def test_stop_and_max_tokens(scripted):
    assert scripted.chat("echo one END two", stop=["END"])[1]["choices"][0]["message"]["content"] == "one "
    reply = scripted.chat("echo abcdef", max_tokens=3)[1]
    assert (reply["choices"][0]["message"]["content"], reply["choices"][0]["finish_reason"]) == ("abc", "length")
    assert scripted.chat("echo abc", stop=ord("b"))[1]["choices"][0]["message"]["content"] == "a"


def test_errors_name_the_field(scripted):
    status, error, _ = scripted.chat("echo x", temperature=3)
    assert (status, error["error"]) == (
        400,
        {
            "message": "'temperature' must be a number from 0 to 2.",
            "type": "invalid_request_error",
            "param": "temperature",
            "code": None,
        },
    )
    status, error, _ = scripted.chat("x" * 3000, stream=True)
    assert (status, error["error"]["code"]) == (400, "context_length_exceeded")
    assert scripted.chat("badencode", stream=True)[0] == 500


def test_ignored_fields_are_named(scripted, caplog):
    for _ in range(2):
        status, _, headers = scripted.chat("echo x", bogus=1, **{"other\r\nX: y": 2})
        assert (status, headers["X-Ignored-Fields"]) == (200, "bogus, other\\r\\nX: y")
    assert len([r for r in caplog.records if "bogus" in r.getMessage()]) == 1


def test_what_is_not_read_inside_a_field_is_named(scripted):
    """Clients send replies back whole: what is null or empty in them says nothing."""
    call = {"id": "c", "type": "function", "index": 0, "function": {"name": "f", "arguments": "{}", "more": 1}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "echo x", "cache_control": {"type": "ephemeral"}, "odd": 0}]},
        {"role": "assistant", "content": "", "refusal": None, "annotations": [], "audio": {"id": "a"}, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "y", "name": "f"},
    ]
    tools = [{"type": "function", "extra": True, "function": {"name": "f", "parameters": {"x-odd": 1}, "returns": "int"}}]
    status, _, headers = scripted.chat("x", messages=messages, tools=tools)
    assert (status, headers["X-Ignored-Fields"].split(", ")) == (200, [
        "messages[0].content[0].odd", "messages[1].audio", "messages[1].tool_calls[0].function.more",
        "tools[0].extra", "tools[0].function.returns",
    ])  # fmt: skip


@pytest.mark.parametrize("path, told", [
    ("/v1/models?limit=2&after=x", "?limit, ?after"), ("/v1/capabilities?model=scripted", None), ("/v1/capabilities?model=", None), ("/health?", None), ("/health?x", "?x"),
])  # fmt: skip
def test_words_behind_the_question_mark_are_read_or_named(scripted, path, told):
    status, _, headers = scripted.request("GET", path)
    assert (status, headers.get("X-Ignored-Fields")) == (200, told)


STRAY_ITEMS = {
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "echo x", "odd": 1}], "phase": "final_answer", "why": "?"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed", "async": True},
        {"type": "function_call_output", "call_id": "c", "output": "y", "caller": {"type": "direct"}},
    ],
    "tools": [
        {"type": "function", "name": "f", "parameters": {"x-odd": 1}, "returns": "int", "defer_loading": False},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "g", "odd": 1}]},
    ],
    "tool_choice": {"type": "function", "name": "f", "odd": 1},
    "text": {"format": {"type": "text", "odd": 1}},
}
STRAY_BLOCKS = {
    "max_tokens": 5,
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}, "odd": 1}],
    "messages": [
        {"role": "user", "content": "echo x", "odd": 1},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"any": 1}, "text": "?"}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "y", "odd": 1}]}]},
    ],
    "tools": [{"name": "f", "input_schema": {"x-odd": 1}, "input_examples": [{"any": 1}], "cache_control": {"type": "ephemeral"}}],
    "tool_choice": {"type": "auto", "odd": 1},
    "thinking": {"type": "disabled", "odd": 1},
    "metadata": {"user_id": "u", "odd": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "path, body, told",
    [
        (
            "responses",
            STRAY_ITEMS,
            "input[0].content[0].odd, input[0].why, input[1].async, tools[0].returns, tools[1].tools[0].odd, "
            "tool_choice.odd, text.format.odd",
        ),
        (
            "messages",
            STRAY_BLOCKS,
            "system[0].odd, messages[0].odd, messages[1].content[0].text, messages[2].content[0].content[0].odd, "
            "tools[0].input_examples, tool_choice.odd, thinking.odd, metadata.odd",
        ),
        (
            "chat/completions",
            {
                "messages": [{"role": "user", "content": "echo x"}],
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "f", "odd": 1}},
            },
            "tool_choice.function.odd",
        ),
    ],
)
def test_unknown_keys_within_the_fields_of_each_dialect_are_named(scripted, path, body, told):
    headers = scripted.request("POST", f"/v1/{path}", body)[2]
    assert headers["X-Ignored-Fields"] == told


@pytest.mark.parametrize("path", ["responses", "messages"])
@pytest.mark.parametrize("member, free, other", [
    ("defer_loading", False, True), ("allowed_callers", ["direct"], ["direct", "code_execution_20250825"]),
])  # fmt: skip
def test_tools_for_other_callers_than_the_model_are_refused(scripted, path, member, free, other):
    asked = [{"role": "user", "content": "echo x"}]
    for value, status in ((free, 200), (other, 400)):
        tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, member: value}
        if path == "messages":
            tool = {"name": "f", "input_schema": {"type": "object"}, member: value}
        body = {"input": asked} if path == "responses" else {"messages": asked, "max_tokens": 5}
        found, reply, headers = scripted.request("POST", f"/v1/{path}", body | {"tools": [tool]})
        assert (found, headers.get("X-Ignored-Fields")) == (status, None), reply
    assert f"tools[0].{member}" in reply["error"]["message"]


def test_a_stranger_does_not_fill_the_log(scripted, caplog):
    """Words behind the ? are told to who wrote them, and not remembered: anybody may ask /health."""
    before = set(scripted.server.ignored_seen)
    scripted.request("GET", "/health?" + "&".join(f"n{i}" for i in range(50)))
    assert scripted.server.ignored_seen == before and "n49" not in caplog.text


def test_unknown_words_of_a_schema_are_named(scripted, caplog):
    """They constrain nothing, so they are told as unknown fields are, with the word that was perhaps meant; the format is one."""
    schema = {"type": "integer", "x-unit": "m", "minimun": 3, "properties": {"a": {"format": "colour", "title": "A"}}}
    format = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    status, reply, headers = scripted.chat("echo 12", response_format=format, bogus=1)
    assert (status, reply["choices"][0]["message"]["content"]) == (200, "12")
    assert set(headers["X-Ignored-Fields"].split(", ")) == {
        "bogus",
        "response_format.x-unit",
        "response_format.minimun (minimum?)",
        "response_format.properties.a.format",
    }
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("minimun (minimum?)" in line for line in said)
    del schema["x-unit"], schema["minimun"], schema["properties"]
    assert "X-Ignored-Fields" not in scripted.chat("echo 12", response_format=format)[2]


def test_api_key(tmp_path):
    with serve_scripted(tmp_path, api_key="secret") as served:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": "Bearer secret"}, 200),
            ({"X-Api-Key": "secret"}, 200),
            ({"X-Api-Key": "sécret"}, 401),
        ):
            assert served.chat("echo x", headers=headers)[0] == status
        assert served.request("GET", "/v1/models")[1]["error"]["type"] == "authentication_error"
        assert served.request("GET", "/health")[0] == 200


def test_any_key_is_fine_when_none_is_set(scripted):
    assert scripted.chat("echo x", headers={"Authorization": "Bearer whatever"})[0] == 200


# ── HTTP framing ──

OK = b"HTTP/1.1 200 OK\r\n"


def statuses(out):
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", out)]


def test_pipelined_requests_each_get_their_reply(scripted):
    good, bad = sized(body("echo one")), sized(b"{")
    assert statuses(raw(scripted, good + bad + good + post(b"") + good)) == [200, 400, 200, 411, 200]


def test_a_stream_that_has_nothing_to_tell_yet_is_not_ended(scripted):
    """Its first delta may be the beginning of a stop string; and a chunk of nothing is HTTP's end."""
    for text, stop in (("ab", "abc"), ("", "x")):
        asked = {"prompt": f"echo {text}", "stop": stop, "stream": True}
        status, events, _ = scripted.request("POST", "/v1/completions", asked)
        assert status == 200
        assert "".join(event["choices"][0]["text"] for event in sse(events)) == text


def test_stream_keeps_the_connection(scripted):
    out = raw(scripted, sized(body("echo one", stream=True)) + sized(body("echo two")))
    assert statuses(out) == [200, 200]
    assert b"Transfer-Encoding: chunked" in out
    assert b"0\r\n\r\nHTTP/1.1 200" in out


def test_http_10(scripted):
    out = raw(scripted, sized(body("echo abc", stream=True), version="1.0"))
    assert b"Connection: close" in out
    assert b"chunked" not in out
    assert out.endswith(b"data: [DONE]\n\n")
    assert statuses(raw(scripted, b"GET /health HTTP/1.0\r\n\r\n")) == [200]
    out = raw(scripted, b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n" * 2)
    assert statuses(out) == [200, 200]
    assert out.count(b"Connection: keep-alive") == 2


def chunked(data, size=7):
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x;ext=1\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\nTrailer: x\r\n\r\n"


def test_chunked_body(scripted):
    request = post(chunked(body("echo abc")), "Transfer-Encoding: chunked")
    out = raw(scripted, request * 2)
    assert statuses(out) == [200, 200]
    assert out.count(b'"content":"abc"') == 2


def test_expect_continue(scripted):
    out = raw(scripted, sized(body("echo abc"), "Expect: 100-continue"))
    assert statuses(out) == [100, 200]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (post(b"{}", "Content-Length: 2", "Transfer-Encoding: chunked"), 400),
        (post(b"{}", "Content-Length: 2", "Content-Length: 3"), 400),
        (post(b"{}", "Content-Length: -1"), 400),
        (post(b"{}", "Content-Length: 1e3"), 400),
        (post(b"{}", "Content-Length: +2"), 400),
        (post(b"{}", "Transfer-Encoding: gzip"), 400),
        (post(b"zz\r\n", "Transfer-Encoding: chunked"), 400),
        (post(b"2\r\n{}XX0\r\n\r\n", "Transfer-Encoding: chunked"), 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"A: x\r\n" * 200 + b"\r\n", 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/9.9\r\n\r\n", 505),
        (sized(b"", "Content-Length: 99999999999"), 400),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nBad Header\r\nContent-Length: 3\r\n\r\n", 400),
        (b"GET http://[x/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
        (post(b"", "Content-Length: 99999999999"), 413),
        (post(b"fffffff\r\n", "Transfer-Encoding: chunked"), 413),
    ],
)
def test_bad_framing_gets_one_error_and_the_end(scripted, request_bytes, status):
    out = raw(scripted, request_bytes + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert statuses(out) == [status]
    assert b"Connection: close" in out
    assert json.loads(out.split(b"\r\n\r\n", 1)[1])["error"]["message"]


def test_a_refused_body_does_not_reset_the_connection(tmp_path):
    with serve_scripted(tmp_path, max_body=3000) as served:
        big = body("x" * 30_000_000)
        assert statuses(raw(served, sized(big))) == [413]
        assert served.chat("x" * 2900)[0] == 400  # within the limit, and too long for the context


def test_absolute_form(scripted):
    assert statuses(raw(scripted, b"GET http://x:1/v1/models HTTP/1.1\r\nHost: x\r\n\r\n")) == [200]


# ── faults ──


def leave_after(served, data, wait):
    """Send a request, wait for `wait` in the reply (or just a moment), and leave."""
    sock = socket.create_connection((served.host, served.port))
    sock.sendall(sized(data))
    if wait:
        seen = b""
        while wait not in seen:
            seen += sock.recv(65536)
    return sock


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(scripted, stream):
    sock = leave_after(scripted, body("forever", stream=stream), b"content" if stream else b"")
    until(lambda: scripted.models.running() == 1)
    sock.close()
    idle(scripted)
    until(lambda: cancelled_at(scripted.calls(), 1))
    assert cancelled_at(scripted.calls(), 1) < 1900


def test_a_client_that_leaves_the_queue_frees_its_place(scripted):
    socks = [leave_after(scripted, body("forever"), b"") for _ in range(2)]
    until(lambda: sum(line.startswith("start") for line in scripted.calls()) == 2)
    scripted.script("hold")
    socks += [leave_after(scripted, body("echo a"), b"") for _ in range(2)]
    until(lambda: scripted.models.running() == 4)
    status, error, headers = scripted.chat("echo b")
    assert (status, error["error"]["type"], headers["Retry-After"]) == (429, "rate_limit_error", "1")
    assert scripted.chat("echo b", stream=True)[0] == 429
    assert scripted.request("GET", "/healthz")[1]["queue_depth"] == 2
    for sock in socks:
        sock.close()
    until(lambda: scripted.models.running() == 0)
    scripted.script("hold", False)
    assert scripted.chat("echo b")[0] == 200


def test_a_reader_that_stalls_costs_only_itself(scripted):
    sock = leave_after(scripted, body("forever", stream=True, max_tokens=600), b"content")
    assert [scripted.chat("echo b")[0] for _ in range(5)] == [200] * 5
    sock.close()
    idle(scripted)


def test_engine_dies_before_the_first_token(scripted):
    scripted.script("hold")
    results = []
    threads = [threading.Thread(target=lambda s=s: results.append(scripted.chat("die", stream=s)[:2])) for s in (True, False)]
    for thread in threads:
        thread.start()
    until(lambda: scripted.models.running() == 2)
    scripted.models.engine.process.kill()
    for thread in threads:
        thread.join()
    assert [(status, error["error"]["code"]) for status, error in results] == [(500, "engine_failed")] * 2


def test_engine_dies_in_mid_stream_and_comes_back(scripted):
    sock = leave_after(scripted, body("forever", stream=True), b'"content":"x"')
    scripted.script("slow")  # the next load waits
    scripted.models.engine.process.kill()
    out = b""
    while b"[DONE]" not in out:
        out += sock.recv(65536)
    error, done = out.split(b"data: ")[-2:]
    assert re.search(rb'(^|\n)[0-9a-f]+\r\ndata: \{"error"', out)  # a chunk of its own
    assert json.loads(error.split(b"\n")[0])["error"]["type"] == "server_error"
    assert done.startswith(b"[DONE]")
    until(lambda: scripted.request("GET", "/health")[0] == 503)
    assert scripted.request("GET", "/health")[1] == {
        "error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}
    }
    assert scripted.request("GET", "/healthz")[1]["loaded"] is False
    results = []
    thread = threading.Thread(target=lambda: results.append(scripted.chat("echo back")))  # waits for the load
    thread.start()
    until(lambda: scripted.models.running() == 1)
    scripted.script("slow", False)
    thread.join()
    assert results[0][1]["choices"][0]["message"]["content"] == "back"
    assert scripted.request("GET", "/health")[0] == 200


def test_an_engine_that_dies_twice_comes_back_after_a_pause(scripted):
    for _ in range(2):
        engine = scripted.models.engine
        engine.process.kill()
        until(lambda engine=engine: engine.dead)
        assert scripted.chat("echo back")[1]["choices"][0]["message"]["content"] == "back"
    assert scripted.calls().count("load") == 3


def test_timeout(tmp_path):
    with serve_scripted(tmp_path, request_timeout=0.3) as served:
        for i, stream in enumerate((False, True), 1):
            served.script("hold")
            status, error, _ = served.chat("echo x", stream=stream)
            assert (status, error["error"]["type"]) == (504, "timeout_error")
            served.script("hold", False)
            until(lambda: cancelled_at(served.calls(), i))  # noqa: B023 (what waits for a slot has no clock yet)
        served.server.request_timeout = 60
        assert served.chat("echo y")[1]["choices"][0]["message"]["content"] == "y"
        assert served.calls().count("load") == 1  # the answer's limit is not the engine's


def test_an_engine_that_hangs_is_replaced(tmp_path):
    with serve_scripted(tmp_path) as served:
        served.models.engine.ENDS_S = 2
        assert served.chat("hang")[0] == 500
        assert served.chat("echo x")[1]["choices"][0]["message"]["content"] == "x"
        assert served.calls().count("load") == 2


def test_long_answers_do_not_time_out_when_streaming(tmp_path):
    with serve_scripted(tmp_path, request_timeout=1) as served:
        assert sum("content" in c["choices"][0]["delta"] for c in served.stream("forever", max_tokens=1900)) > 2
        assert served.chat("forever", max_tokens=1900)[0] == 504


def test_nesting_that_json_takes_and_pickle_does_not(scripted):
    nested = "[" * 600 + "]" * 600
    message = '{"messages":[{"role":"assistant","content":"echo x","tool_calls":NESTED}]}'.replace("NESTED", nested)
    assert scripted.request("POST", CHAT, message.encode())[0] == 400
    assert scripted.chat("echo x")[0] == 200


def test_unknown_names_are_not_hoarded(scripted):
    for i in range(3):
        scripted.chat("echo x", **{"k" * 100_000 + str(i): 1})
    assert sum(map(len, scripted.server.ignored_seen)) == 64


def test_every_reply_has_its_id(scripted):
    _, _, headers = scripted.chat("echo x", headers={"X-Request-Id": "mine-7"})
    assert headers["X-Request-Id"] == "mine-7"
    assert int(headers["openai-processing-ms"]) >= 0
    _, _, headers = scripted.chat("echo x", temperature=9)
    assert headers["X-Request-Id"].startswith("req-")


def test_completions(scripted):
    status, reply, _ = scripted.request("POST", "/v1/completions", {"prompt": ["echo ab", "echo c"], "n": 2, "echo": True})
    assert status == 200
    assert [(c["index"], c["text"]) for c in reply["choices"]] == [
        (0, "echo abab"),
        (1, "echo abab"),
        (2, "echo cc"),
        (3, "echo cc"),
    ]
    assert reply["object"] == "text_completion"
    assert reply["usage"]["prompt_tokens"] == 13
    status, raw_reply, _ = scripted.request("POST", "/completions", {"prompt": "echo abc", "stream": True})
    assert "".join(c["choices"][0]["text"] for c in sse(raw_reply)) == "abc"
    assert scripted.request("POST", "/v1/completions", {})[1]["error"]["param"] == "prompt"
    reply = scripted.request("POST", "/v1/completions", {"prompt": "echo abc", "echo": True, "max_tokens": 0})[1]
    assert (reply["choices"][0]["text"], reply["usage"]["completion_tokens"]) == ("echo abc", 0)
    reply = scripted.request("POST", "/v1/completions", {"prompt": "forever"})[1]
    assert reply["usage"]["completion_tokens"] == 16


def test_return_prompt(scripted):
    for reply in (
        scripted.chat("echo hi", return_prompt=True, seed=5)[1],
        scripted.chat("echo hi", seed=5, headers={"X-Debug": "prompt"})[1],
        scripted.stream("echo hi", return_prompt=True, seed=5)[-1],
    ):
        (prompt,) = reply["debug"]["prompts"]
        assert (prompt["prompt"], prompt["prompt_token_ids"]) == ("echo hi", list(b"echo hi"))
        assert (prompt["sampling"]["seed"], prompt["sampling"]["temperature"], prompt["sampling"]["max_tokens"]) == (
            5,
            0.7,
            1993,
        )
        assert reply["debug"]["engine"]["library"] == "scripted 1"
    assert isinstance(scripted.chat("echo hi", return_prompt=True)[1]["debug"]["prompts"][0]["sampling"]["seed"], int)
    assert "debug" not in scripted.chat("echo hi")[1]


def test_record(tmp_path):
    record = tmp_path / "requests.jsonl"
    with serve_scripted(tmp_path, record=str(record)) as served:
        served.chat("echo hi")
        served.stream("echo ho")
        served.chat("echo no", temperature=9)
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["choices"] for line in lines] == [[{"text": t, "finish_reason": "stop"}] for t in ("hi", "ho")]
    assert lines[0]["body"]["messages"][0]["content"] == "echo hi"
    assert isinstance(lines[0]["debug"]["prompts"][0]["sampling"]["seed"], int)


def test_tokenize(scripted):
    for name in ("content", "prompt", "text"):
        assert scripted.request("POST", "/tokenize", {name: "hé"})[1] == {
            "tokens": list("hé".encode()),
            "count": 3,
            "max_model_len": 2000,
        }
    reply = scripted.request("POST", "/v1/tokenize", {"content": "hé", "with_pieces": True})[1]
    assert reply["tokens"] == [{"id": 104, "piece": "h"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]
    reply = scripted.request("POST", "/tokenize", {"messages": [{"role": "user", "content": "x"}], "return_token_strs": True})[
        1
    ]
    assert (reply["tokens"], reply["token_strs"]) == ([120], ["x"])
    assert scripted.request("POST", "/tokenize", {})[0] == 400
    assert scripted.request("POST", "/detokenize", {"tokens": list("hé".encode())})[1] == {"content": "hé", "prompt": "hé"}
    assert scripted.request("POST", "/detokenize", {"tokens": [300]})[1]["error"]["type"] == "invalid_request_error"
    assert scripted.request("POST", "/apply-template", {"messages": [{"role": "user", "content": "x"}]})[1] == {"prompt": "x"}
    assert scripted.request("POST", "/v1/embeddings", {"input": "x"})[0] == 400


def test_strict(tmp_path):
    with serve_scripted(tmp_path, strict=True) as served:
        assert served.chat("echo x", bogus=1)[1]["error"]["param"] == "bogus"
        status, reply, _ = served.chat("x", messages=[{"role": "user", "content": "echo x", "bogus": 1}])
        assert (status, reply["error"]["param"]) == (400, "messages[0].bogus")


def test_nothing_leaks(scripted):
    """Clients that leave at every stage: afterwards all slots are free, and no thread is left over."""
    scripted.chat("echo warm")
    before = threads_alive()
    for i in range(60):
        sock = socket.create_connection((scripted.host, scripted.port))
        data = sized(body("forever", stream=bool(i % 2)))
        sock.sendall(data[: len(data) * (i % 7 + 1) // 7])
        if i % 3:
            time.sleep(0.003)
        sock.close()
    idle(scripted)
    until(lambda: threads_alive() <= before)
    assert scripted.request("GET", "/healthz")[1]["queue_depth"] == 0
    assert scripted.chat("echo fine")[0] == 200


def test_shutdown_lets_answers_finish(tmp_path):
    with serve_scripted(tmp_path) as served:
        served.script("hold")
        results = []
        thread = threading.Thread(target=lambda: results.append(served.chat("echo last")))
        thread.start()
        until(lambda: served.models.running() == 1)
        served.server.shutdown()
        drain = threading.Thread(target=served.server.drain, args=(30,))
        drain.start()
        until(lambda: served.server.draining)
        served.script("hold", False)
        thread.join()
        drain.join()
        assert results[0][1]["choices"][0]["message"]["content"] == "last"
        with pytest.raises(OSError):
            served.request("GET", "/health")


@pytest.mark.parametrize(
    ("path", "fields", "broken"),
    [
        ("/v1/chat/completions", {}, "openai_api_endpoint.Chunks"),
        ("/v1/messages", {"max_tokens": 9}, "messages_api.Answer"),
        ("/v1/responses", {"background": True}, "responses_api.Answer"),
        ("/v1/responses", {"background": True}, "openai_api_endpoint.Background.start"),
    ],
)
def test_a_fault_before_the_answer_begins_frees_the_slot(tmp_path, monkeypatch, path, fields, broken):
    def fails(*_):
        raise RuntimeError("it hurts")

    with serve_scripted(tmp_path, slots=1, queue=0, metrics=Metrics(), state="memory") as served:
        monkeypatch.setattr(broken, fails)
        body = {"messages" if path != "/v1/responses" else "input": [{"role": "user", "content": "forever"}], **fields}
        assert served.request("POST", path, body)[0] == 500
        assert served.models.engine.jobs == {}
        monkeypatch.undo()
        assert served.chat("echo again")[1]["choices"][0]["message"]["content"] == "again"
        until(lambda: served.server.metrics.live == {})  # the handler counts after its client has all


def test_return_prompt_tells_why_it_was_not_in_the_cache(scripted):
    def cache(text, client="127.0.0.9", **fields):
        headers = {"X-Forwarded-For": client}
        return scripted.chat(text, return_prompt=True, headers=headers, **fields)[1]["debug"]["prompts"][0]["cache"]

    assert cache("echo It is 12:00 now") == {"cached_tokens": 6, "best_match_tokens": 0, "first_difference": None}
    difference = {"token": 14, "prompt": "t is 12:34 now", "cached": "t is 12:00 nowIt"}  # what was said then is part of it
    assert cache("echo It is 12:34 now") == {"cached_tokens": 6, "best_match_tokens": 14, "first_difference": difference}
    assert cache("echo It is 12:00 nowIt is") == {"cached_tokens": 4, "best_match_tokens": 25, "first_difference": None}
    assert cache("echo It", n=2)["best_match_tokens"] == 7
    theirs = cache("echo It is 12:00 now", client="10.0.0.2")  # nobody is told what others have asked
    assert theirs == {"cached_tokens": 6, "best_match_tokens": 0, "first_difference": None}
    difference = cache("echo It is 12:34 now", client="10.0.0.2")[
        "first_difference"
    ]  # an address from afar may be a whole office's
    assert difference == {"token": 14, "prompt": "t is 12:34 now", "cached": None}
    prompts = scripted.request("POST", "/v1/completions", {"prompt": ["echo ab", "echo ac"], "return_prompt": True})[1]
    assert [one["cache"]["best_match_tokens"] for one in prompts["debug"]["prompts"]] == [0, 6]
    assert scripted.stream("echo Is", return_prompt=True)[-1]["debug"]["prompts"][0]["cache"]["best_match_tokens"] == 5
