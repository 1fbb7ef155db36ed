"""Another server as an engine: what it gets, and what becomes of its faults. Real sockets; one real other server."""

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from conftest import from_client, serve_scripted, serve_upstream, sse, until
from test_cli import Command, one_line, run

from backends import missing_library
from engine import Prompt, Refused, Sampling
from upstream import Chunked, Events, Whole

LIST = {"object": "list", "data": [{"id": "far/model", "object": "model", "max_model_len": 500}]}
OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def reply(status, body, headers=""):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status} X\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode() + data


def chunk(**members):
    data = b"data: " + json.dumps({"id": "x", "choices": [], **members}).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


def piece(text, finish=None, index=0):
    return chunk(choices=[{"index": index, "delta": {"content": text}, "finish_reason": finish}])


USAGE = chunk(usage={"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}})
DONE = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
ANSWER = OK + b"Transfer-Encoding: chunked\r\n\r\n" + piece("Hi ") + piece("there") + piece("", "stop") + USAGE + DONE


class Far:
    """An upstream by hand: `script(connection, body)` answers a POST, and says whether the connection goes on."""

    listing = b""  # what GET /v1/models says; empty: LIST

    def __init__(self):
        self.script = self.answer(ANSWER)
        self.bodies, self.heads, self.connections = [], [], 0
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    @staticmethod
    def answer(*pieces, go_on=True, pause=0.0):
        def script(connection, _):
            for data in pieces:
                connection.sendall(data)
                time.sleep(pause)
            return go_on

        return script

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self.talk, args=(connection,), daemon=True).start()

    def talk(self, connection):
        posted = False
        with contextlib.suppress(OSError, ValueError), connection, connection.makefile("rb") as lines:
            while request := lines.readline():
                head = dict(line.decode().strip().split(": ", 1) for line in iter(lines.readline, b"\r\n"))
                if request.startswith(b"GET /v1/models"):
                    connection.sendall(reply(200, self.listing or LIST))
                    continue
                self.connections += not posted
                posted = True
                self.heads.append(head)
                self.bodies.append(json.loads(lines.read(int(head["Content-Length"]))))
                if not self.script(connection, self.bodies[-1]):
                    return

    def close(self):
        self.socket.shutdown(socket.SHUT_RDWR)  # to close it alone would not wake the thread that accepts
        self.socket.close()


@pytest.fixture
def far():
    made = Far()
    yield made
    with contextlib.suppress(OSError):
        made.close()


@pytest.fixture
def front(far):
    with serve_upstream(far.url, slots=2, max_jobs=4, request_timeout=3) as served:
        yield served


def test_the_answer_has_this_servers_shape(front, far):
    assert [card["id"] for card in front.request("GET", "/v1/models")[1]["data"]] == ["far/model"]
    status, body, _ = front.chat("Hello", model="any", max_tokens=9)
    assert (status, body["model"], body["choices"][0]["message"]["content"]) == (200, "any", "Hi there")
    assert body["choices"][0]["finish_reason"] == "stop"
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (7, 3)
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    chunks = front.stream("Hello", stream_options={"include_usage": True})
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Hi there"
    assert chunks[-1]["usage"]["total_tokens"] == 10
    assert far.connections == 1  # kept alive


def test_who_leaves_with_the_last_word_hangs_up_nothing(front, far):
    asked, engine = threading.Event(), front.models.engine
    far.script = lambda connection, _: asked.wait(30) and not connection.sendall(ANSWER)
    job, left = engine.submit([Prompt(messages=({"role": "user", "content": "x"},))], Sampling()), threading.Event()

    def sink(event):
        if getattr(event, "finish", None):
            job.cancel()
            left.set()
        return True

    job.sink = sink
    asked.set()
    assert left.wait(60) and not job.dropped
    until(lambda: len(engine.idle) == 1)


def test_a_connection_that_is_being_hung_up_is_not_kept(front, far):
    """Its job has been dropped, and the end of its answer comes before the hanging up."""
    asked, engine = threading.Event(), front.models.engine
    far.script = lambda connection, _: asked.wait(30) and not connection.sendall(ANSWER)
    job = engine.submit([Prompt(messages=({"role": "user", "content": "x"},))], Sampling())
    until(lambda: far.bodies)
    with engine.lock:
        del engine.jobs[job.number]
    asked.set()
    until(lambda: engine.slots.free == 2)
    until(lambda: job.queue.qsize() >= 5)
    assert not engine.idle
    assert front.chat("Hello")[0] == 200


def test_what_is_sent(front, far):
    front.chat(
        "Hello", max_tokens=9, temperature=0.5, top_p=0.5, top_k=3, min_p=0.1, seed=4, n=2, stop=["x", 5], stop_token_ids=[6],
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, min_tokens=2, ignore_eos=True, logit_bias={"7": -100},
        logprobs=True, top_logprobs=3, chat_template_kwargs={"a": 1}, add_generation_prompt=False, user="me", n_unknown=1,
    )  # fmt: skip
    assert far.bodies[-1] == {
        "model": "far/model", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9, "temperature": 0.5, "top_p": 0.5, "top_k": 3,
        "min_p": 0.1, "seed": 4, "n": 2, "stop": ["x"], "stop_token_ids": [5, 6], "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True, "logit_bias": {"7": -100}, "logprobs": True,
        "top_logprobs": 3, "chat_template_kwargs": {"a": 1}, "add_generation_prompt": False,
    }  # fmt: skip
    front.chat("Hello")
    assert set(far.bodies[-1]) == {"model", "stream", "stream_options", "messages"}  # what is not said is the upstream's own
    front.request("POST", "/v1/completions", {"prompt": ["a", "b"], "logprobs": 2, "echo": True})
    assert far.bodies[-1] | {"prompt": ["a", "b"], "logprobs": 2, "echo": True, "max_tokens": 16} == far.bodies[-1]
    front.chat("Hello", structured_outputs={"choice": ["yes", "no"]})
    assert "root ::=" in far.bodies[-1]["structured_outputs"]["grammar"]


def test_what_vllm_wants_said_in_another_way(front, far):
    """Seen on vLLM 0.32: seed -1 is none; n greedy choices are refused."""
    front.chat("Hello", temperature=0, n=2, top_k=5)
    assert {name: far.bodies[-1][name] for name in ("temperature", "top_k", "n")} == {"temperature": 1, "top_k": 1, "n": 2}
    front.chat("Hello", temperature=0)
    assert far.bodies[-1]["temperature"] == 0 and "top_k" not in far.bodies[-1]
    for seed, n, sent in ((-1, 1, 2**62 - 1), (-2, 2, 2**62 - 2), (-2, 1, -2), (0, 1, 0)):
        front.chat("Hello", seed=seed, n=n)
        assert far.bodies[-1]["seed"] == sent


def test_what_vllm_says_in_another_way(front, far):
    """Seen on vLLM 0.32: a prompt that is too long, a refusal inside a 200, a token counted at max_tokens 0, EOS among logprobs."""
    far.script = far.answer(reply(400, {"error": {"message": "too long.", "param": "input_tokens", "code": 400}}))
    error = front.chat("Hello")[1]["error"]
    assert (error["param"], error["code"], error["message"]) == ("messages", "context_length_exceeded", "too long.")
    refusal = chunk(error={"message": "no token 999", "param": "body.logit_bias", "code": 400})
    far.script = far.answer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + refusal, go_on=False)
    status, body, _ = front.chat("Hello", logit_bias={"999": 1})
    assert (status, body["error"]["param"]) == (400, "logit_bias")
    one = {"index": 0, "text": "Hi", "finish_reason": "length"}
    far.script = far.answer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(choices=[one]) + USAGE + DONE)
    fields = {"prompt": "Hi", "echo": True, "max_tokens": 0}
    assert front.request("POST", "/v1/completions", fields)[1]["usage"]["completion_tokens"] == 0
    entries = [
        {"token": token, "bytes": list(token.encode()), "logprob": -1.0, "top_logprobs": []} for token in ("Hi", "<end>")
    ]
    for reason, shown in ((None, ["Hi"]), (7, ["Hi"]), ("Hi", ["Hi", "<end>"])):
        last = {"index": 0, "delta": {"content": "Hi"}, "logprobs": {"content": entries}, "finish_reason": "stop"}
        last["stop_reason"] = reason
        far.script = far.answer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(choices=[last]) + USAGE + DONE)
        content = front.chat("Hello", logprobs=True)[1]["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in content] == shown


def test_a_stop_string_that_the_upstream_tells(front, far):
    for told, stop in (("END", ("stop_sequence", "END")), (None, ("end_turn", None)), (7, ("end_turn", None))):
        last = {"index": 0, "delta": {"content": "Hi"}, "finish_reason": "stop", "stop_reason": told}
        far.script = far.answer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(choices=[last]) + USAGE + DONE)
        asked = {"max_tokens": 9, "messages": [{"role": "user", "content": "Hello"}], "stop_sequences": ["END"]}
        status, body, _ = front.request("POST", "/v1/messages", asked)
        assert (status, body["content"][0]["text"]) == (200, "Hi"), body
        assert (body["stop_reason"], body["stop_sequence"]) == stop
        assert far.bodies[-1]["stop"] == ["END"]


def test_reasoning_and_calls_of_an_upstream(front, far):
    """What its parsers have taken apart comes back as it is; a call's index says where another begins."""
    deltas = [
        {"reasoning": "hm"},
        {"reasoning_content": "m"},
        {"content": "So: "},
        {"tool_calls": [{"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
        {"tool_calls": [{"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}}]},
    ]
    said = b"".join(chunk(choices=[{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas)
    last = chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "tool_calls"}])
    far.script = far.answer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + said + last + USAGE + DONE)
    functions = [{"type": "function", "function": {"name": name}} for name in "fg"]
    status, reply, _ = front.chat("Hello", tools=functions, tool_choice="required", reasoning_effort="low")
    assert status == 200
    assert reply["choices"][0]["message"] == {
        "role": "assistant", "content": "So: ", "refusal": None, "reasoning_content": "hmm", "reasoning": "hmm",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }  # fmt: skip
    assert reply["choices"][0]["finish_reason"] == "tool_calls"


def test_one_that_listens_no_more_and_lets_its_streams_hang(front, far):
    """As vLLM does when it is told to stop; the client is told within the few seconds that it takes to notice."""
    told = threading.Event()
    far.script = lambda connection, body: (
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n" + piece("Hi ")) or told.set() or time.sleep(30)
    )
    front.server.request_timeout = 60
    threading.Thread(target=lambda: told.wait(30) and far.close(), daemon=True).start()
    *_, error = sse(front.chat("Hello", stream=True)[1])
    assert error["error"]["type"] == "upstream_error" and "has gone" in error["error"]["message"]
    assert front.chat("Hello")[0] == 503
    until(lambda: not front.models.running())


def test_the_reason_why_it_is_not_there_is_told(far, monkeypatch):
    monkeypatch.setitem(globals(), "LIST", {"error": "who are you"})
    with serve_upstream(far.url, ready=False) as served:
        until(lambda: "not there yet: 'data'" in served.chat("Hello")[1]["error"]["message"])


def test_a_job_that_cannot_start_leaves_no_place_taken(front, far, monkeypatch):
    def no_more(*_, **__):
        raise RuntimeError("can't start new thread")

    engine = front.models.engine
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_more)
        with pytest.raises(RuntimeError):
            engine.submit([Prompt(text="x")], Sampling())
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(Refused):
        engine.submit([Prompt(messages=({"role": "user", "content": "x"},), template_kwargs=deep)], Sampling())
    assert not engine.jobs
    assert front.chat("Hello")[0] == 200


def test_a_constraint_that_the_upstream_ignores_is_not_called_finished(front, far):
    status, body, _ = front.chat("Hello", structured_outputs={"choice": ["yes", "no"]})
    assert (status, body["choices"][0]["finish_reason"]) == (200, "length")


FAULTS = [
    # (what comes, HTTP status, what the message says)
    ([reply(500, {"error": {"message": "it hurts"}})], 502, "it hurts"),
    ([reply(500, b"<html>")], 502, "<html>"),
    ([reply(401, {"error": {"message": "who are you"}})], 502, "who are you"),
    ([reply(404, {"error": {"message": "no such model"}})], 502, "no such model"),
    ([reply(400, {"error": {"message": "bad top_p", "param": "top_p"}})], 400, "bad top_p"),
    ([reply(429, {"error": {"message": "busy"}}, "Retry-After: 17\r\n")], 429, "busy"),
    ([reply(503, {"error": {"message": "loading"}}, "Retry-After: 9\r\n")], 503, "loading"),
    ([b"HTTP/1.1 200 OK\r\n"], 502, "without [DONE]"),
    ([b"nonsense\r\n\r\n"], 502, "broke off"),
    ([OK + b"\r\n"], 502, "without [DONE]"),
    ([OK + b"\r\ndata: {\"choices\":"], 502, "without [DONE]"),
    ([OK + b"\r\ndata: {half\n\n"], 502, "broke off"),
    ([OK + b"\r\ndata: [DONE]\n\n"], 502, "before the answer had"),
    ([OK + b"\r\ndata: {\"error\":{\"message\":\"out of memory\"}}\n\n"], 502, "out of memory"),
    ([OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"], 502, "broke off"),
    ([OK + b"\r\ndata: {\"choices\":[{\"index\":5,\"delta\":{}}]}\n\n"], 502, "nobody asked for"),
    ([OK + b"\r\ndata: [1]\n\n"], 502, "broke off"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("pieces", "status", "says"), FAULTS)
def test_faults_before_the_first_token(front, far, pieces, status, says, stream):
    far.script = far.answer(*pieces, go_on=False)
    got, body, headers = front.chat("Hello", stream=stream)
    assert got == status and says in body["error"]["message"], body
    assert body["error"]["type"] == {
        400: "invalid_request_error", 429: "rate_limit_error", 502: "upstream_error", 503: "unavailable_error"
    }[status]  # fmt: skip
    assert headers["Retry-After"] == {429: "17", 503: "9"}.get(status)
    far.script = far.answer(ANSWER)
    assert front.chat("Hello")[0] == 200
    until(lambda: not front.models.running())


@pytest.mark.parametrize("tail", [b"", b"data: {ha", b"7\r\ndata: {", chunk(error={"message": "out of memory"})])
def test_faults_in_mid_stream(front, far, tail):
    far.script = far.answer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + piece("Hi "), tail, go_on=False, pause=0.1)
    status, raw, _ = front.chat("Hello", stream=True)
    *_, error = sse(raw)
    assert status == 200 and error["error"]["type"] == "upstream_error"
    assert front.chat("Hello")[0] == 502
    assert len(far.bodies) == 2  # nothing is sent twice


def test_one_that_hangs(front, far):
    far.script = lambda connection, body: time.sleep(30)
    status, body, _ = front.chat("Hello")
    assert (status, body["error"]["type"]) == (504, "timeout_error")
    far.script = lambda connection, body: connection.sendall(ANSWER[:200]) or time.sleep(30)
    assert sse(front.chat("Hello", stream=True)[1])[-1]["error"]["type"] == "timeout_error"
    until(lambda: not front.models.running())


def test_a_kept_connection_that_was_closed_is_replaced_once(front, far):
    far.script = far.answer(ANSWER, go_on=False)
    for _ in range(3):
        assert front.chat("Hello")[0] == 200
    assert far.connections == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_carried_through(front, far, stream):
    """The connection to the upstream is closed, so that it stops too."""
    closed = threading.Event()

    def script(connection, body):
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n" + piece("Hi "))
        with contextlib.suppress(ConnectionResetError):
            if connection.recv(1):
                return
        closed.set()

    far.script = script
    with socket.create_connection((front.host, front.port)) as s:
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": stream}).encode()
        s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until(lambda: far.bodies)
    assert closed.wait(30)
    until(lambda: not front.models.running() and front.models.engine.slots.free == 2)


def test_slots_and_queue(front, far):
    """Two at once, two wait, the next gets 429; who leaves the queue is never sent; clients take turns."""
    gate = threading.Semaphore(0)
    far.script = lambda connection, body: gate.acquire(timeout=10) and (connection.sendall(ANSWER) or True)
    answers = []
    ask = lambda text, key: answers.append(front.chat(text, headers=from_client(ord(key)))[0])  # noqa: E731
    threads = []
    for text, key in (("one", "a"), ("two", "a"), ("three", "a"), ("four", "b")):
        threads.append(threading.Thread(target=ask, args=(text, key)))
        threads[-1].start()
        until(lambda: front.models.running() == len(threads))
    until(lambda: len(far.bodies) == 2)
    assert front.models.queue_depth() == 2
    status, body, headers = front.chat("five", headers=from_client(ord("a")))
    assert (status, body["error"]["code"], headers["Retry-After"]) == (429, "queue_full", "1")
    gate.release()
    until(lambda: len(far.bodies) == 3)
    gate.release(3)
    for thread in threads:
        thread.join()
    assert answers == [200] * 4
    assert [body["messages"][0]["content"] for body in far.bodies][2] == "four"


def test_one_that_is_not_there_yet_and_one_that_goes(far):
    url, port = far.url, far.socket.getsockname()[1]
    far.close()
    with serve_upstream(url, ready=False) as served:
        assert served.request("GET", "/health")[0] == 503
        status, body, _ = served.chat("Hello")
        assert (status, body["error"]["code"]) == (503, "not_ready") and "not there yet" in body["error"]["message"]
        again = Far.__new__(Far)
        again.script, again.bodies, again.heads, again.connections = Far.answer(ANSWER), [], [], 0
        again.socket = socket.create_server(("127.0.0.1", port))
        threading.Thread(target=again.accept, daemon=True).start()
        until(lambda: served.chat("Hello")[0] == 200)
        assert served.request("GET", "/health")[0] == 200
        again.close()
        until(lambda: served.chat("Hello")[0] == 503)
        until(lambda: served.request("GET", "/health")[0] == 503)


def test_its_address_and_its_password_are_told_to_nobody(far, caplog):
    url = far.url.replace("http://", "http://anna:hunter2@")
    with serve_upstream(url, ready=False) as served:
        until(lambda: served.chat("Hello")[0] == 200)
        far.close()
        until(lambda: served.chat("Hello")[0] == 503)
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/health"),
            ("GET", "/v1/models/status"),
            ("POST", "/v1/chat/completions"),
        ):
            told = str(
                served.request(method, path, {"messages": [{"role": "user", "content": "x"}]} if method == "POST" else None)
            )
            assert "hunter2" not in told and far.url.removeprefix("http://") not in told, (path, told)
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("backend", ["openai", "tensorrt_llm"])
def test_what_is_not_known_to_be_honoured_is_refused(far, backend):
    with serve_upstream(far.url, backend) as served:
        for name, value in (
            ("top_k", 5), ("min_p", 0.1), ("repetition_penalty", 1.2), ("min_tokens", 3), ("ignore_eos", True),
            ("stop_token_ids", [3]), ("stop", ["a", 5]), ("response_format", {"type": "json_object"}),
            ("structured_outputs", {"regex": "a"}), ("chat_template_kwargs", {"a": 1}), ("return_prompt", True),
            ("continue_final_message", True), ("add_generation_prompt", False),
        ):  # fmt: skip
            status, body, _ = served.chat("Hello", **{name: value})
            assert (status, body["error"]["param"]) == (400, name)
        assert not far.bodies
        assert served.chat("Hello", logit_bias={"5": 1}, top_k=0, response_format={"type": "text"}, seed=4, n=1)[0] == 200
        assert "top_k" not in far.bodies[-1] and far.bodies[-1]["seed"] == 4


def test_the_key_is_sent(far, monkeypatch):
    monkeypatch.setenv("FAR_KEY", "secret")
    command = Command("--backend", "vllm", "--upstream", far.url + "/v1/", "--upstream-key-env", "FAR_KEY")
    try:
        assert "far/model" in command.banner and "secret" not in command.banner
        data = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
        assert urllib.request.urlopen(command.url + "/v1/chat/completions", data).status == 200
        assert far.heads[-1]["Authorization"] == "Bearer secret"
        assert "secret" not in command.log()
    finally:
        command.end()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--upstream", "localhost:8000"], "not a URL"),
        (["--upstream", "http://x", "--backend", "llamacpp"], "belong together"),
        (["--backend", "vllm"], "belong together"),
        (["--upstream", "http://x", "-m", "y"], "--model-dir has no meaning"),
        (["--upstream", "http://x", "--record", "y"], "--record has no meaning"),
        (["--upstream", "http://x", "--upstream-key-env", "NO_SUCH"], "NO_SUCH"),
        (["--upstream", "http://x", "--profile", "metallama"], "--default-top-k 0"),
    ],
)
def test_wrong_command_lines(args, words):
    done = run(*args)
    assert done.returncode == 2 and words in one_line(done.stderr)


def test_a_scripted_engine_behind_that_dies(tmp_path):
    with serve_scripted(tmp_path) as behind, serve_upstream(behind.url) as served:
        assert served.chat("echo hi", max_tokens=9)[1]["choices"][0]["message"]["content"] == "hi"
        assert served.chat("die")[0] == 502
        assert sse(served.chat("die", stream=True)[1])[-1]["error"]["type"] == "upstream_error"
        until(lambda: served.chat("echo hi", max_tokens=9)[0] == 200)


def test_llama_cpp_pythons_own_server(demo):
    """Another server, and not by us: it streams no usage, and knows no [DONE] but this."""
    if lack := missing_library("llamacpp"):
        pytest.skip(lack)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(demo.path), "--port", str(port), "--n_ctx", "2048"]
    command += ["--interrupt_requests", "false"]  # else it breaks off one that is just ending
    other = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with serve_upstream(f"http://127.0.0.1:{port}", "openai") as served:
            status, body, _ = served.chat("What is the capital of France?", temperature=0, max_tokens=20)
            assert status == 200 and body["choices"][0]["message"]["content"]
            assert body["usage"]["completion_tokens"] > 3
            chunks = served.stream("What is the capital of France?", temperature=0, max_tokens=20)
            said = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
            assert said == body["choices"][0]["message"]["content"]
            assert served.chat("Hi", max_tokens=5, stop=["\n"], logit_bias={"5": 1.0})[0] == 200
            status, body, _ = served.request("POST", "/v1/completions", {"prompt": "One two three", "max_tokens": 4})
            assert status == 200 and body["choices"][0]["text"]
    finally:
        other.terminate()
        other.wait()


def test_an_upstream_with_several_models(far):
    """A router, or vLLM with adapters: all are listed, and each request goes to the one that it names."""
    far.listing = json.dumps({"data": [{"id": "base", "max_model_len": 100}, {"id": "org/adapter"}]}).encode()
    with serve_upstream(far.url, slots=2) as served:
        ids = [card["id"] for card in served.request("GET", "/v1/models")[1]["data"]]
        assert ids == ["base", "org/adapter"]
        for asked, told in (("org/adapter", "org/adapter"), ("base", "base"), (None, "base"), ("ADAPTER", "org/adapter")):
            status, reply, _ = served.chat("Hi", **({"model": asked} if asked else {}))
            assert (status, reply["model"], far.bodies[-1]["model"]) == (200, asked or "base", told)
        status, error, _ = served.chat("Hi", model="other")
        assert (status, error["error"]["code"]) == (404, "model_not_found")
        assert served.request("GET", "/v1/models/org/adapter")[1]["status"] == "loaded"
        far.listing = json.dumps({"data": [{"id": "base"}, {"id": "new"}, {"id": "third"}]}).encode()
        until(lambda: [card["id"] for card in served.request("GET", "/v1/models")[1]["data"]] == ["base", "new", "third"])
        assert served.chat("Hi", model="new")[0] == 200 and far.bodies[-1]["model"] == "new"


# ── what is read as it comes ──


def pieces_of(data, size):
    return [data[i : i + size] for i in range(0, len(data), size)]


def test_a_chunked_body_however_it_is_cut():
    body = b"5;ext=1\r\nhello\r\n1\r\n\n\r\nA\r\n0123456789\r\n0\r\nTrailer: x\r\n\r\n"
    for size in range(1, len(body) + 1):
        parser = Chunked()
        out = b"".join(map(parser.feed, pieces_of(body, size)))
        assert (out, parser.ended, parser.held) == (b"hello\n0123456789", True, b"")
        parser = Chunked()
        assert b"".join(map(parser.feed, pieces_of(body[:-1], size))) == b"hello\n0123456789"
        assert not parser.ended
    for bad in (b"x\r\n", b"\r\n", b"-1\r\n", b"1_0\r\n", b"1" * 2000):
        with pytest.raises(ValueError):
            Chunked().feed(bad)


def test_a_body_of_a_length_however_it_is_cut():
    for size in range(1, 12):
        parser = Whole(7)
        assert b"".join(map(parser.feed, pieces_of(b"1234567more", size))) == b"1234567"
        assert parser.ended
    assert not Whole(None).ended


def test_events_however_they_are_cut():
    told = [{"a": "é"}, {"b": 2}]
    data = ': note\nevent: x\ndata: {"a":"é"}\r\n\r\ndata:{"b":2}\n\ndata: [DONE]\n\nnoise\n'.encode()
    for size in range(1, len(data) + 1):
        parser, seen = Events(), []
        for piece_ in pieces_of(data, size):
            seen += parser.feed(piece_)
        assert (seen, parser.done) == (told, True)


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_an_answer_however_it_arrives(front, far, size):
    far.script = far.answer(*pieces_of(ANSWER, size), pause=0.0005)
    for _ in range(2):
        assert front.chat("Hello")[1]["choices"][0]["message"]["content"] == "Hi there"
    assert far.connections == 1


def test_many_at_once_and_one_that_breaks_off(far):
    def script(connection, body):
        text = body["messages"][0]["content"]
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for i in range(40):
            connection.sendall(piece(f"{text}-{i} "))
            if text == "3" and i == 20:
                return False
            time.sleep(0.001)
        connection.sendall(piece("", "stop") + DONE)
        return True

    far.script = script
    results = {}
    with serve_upstream(far.url, slots=16, max_jobs=16) as front:
        threads = [threading.Thread(target=lambda i=i: results.update({i: front.chat(str(i))})) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i, (status, reply_, _) in results.items():
            if i == 3:
                assert status == 502
            else:
                assert reply_["choices"][0]["message"]["content"] == "".join(f"{i}-{k} " for k in range(40))
        until(lambda: not any(thread.name == "upstream-reader" for thread in threading.enumerate()))
        assert front.chat("again")[0] == 200


@pytest.mark.parametrize("count", [130, 3000])
def test_an_upstream_behind_tls(far, tmp_path, monkeypatch, count):
    """One record holds more than is read of it at once; of many, some are read in a second turn."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl command")
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*make.split(), "-keyout", key, "-out", cert], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    words = [f"w{i} " for i in range(count)]
    chunks = b"".join(map(piece, words)) + piece("", "stop") + DONE
    far.script = far.answer(OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks)
    plain = far.talk
    far.talk = lambda connection: plain(context.wrap_socket(connection, server_side=True))
    with serve_upstream(far.url.replace("http://127.0.0.1", "https://localhost")) as front:
        for _ in range(2):
            assert front.chat("Hello")[1]["choices"][0]["message"]["content"] == "".join(words)
        assert far.connections == 1
