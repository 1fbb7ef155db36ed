"""examples/selftest.py: this server passes it, and a server that only pretends does not."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, serve_one

from backends import missing_library
from engine import EngineSpec

SELFTEST = ROOT / "examples" / "selftest.py"


def selftest(*arguments, timeout=900):
    done = subprocess.run([sys.executable, SELFTEST, *arguments], capture_output=True, text=True, timeout=timeout)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, done.stdout


def verdicts(url, *arguments):
    status, told = selftest("--json", url, *arguments)
    return status, {name: found["verdict"] for name, found in json.loads(told)[url].items()}


class Pretender(BaseHTTPRequestHandler):
    """Says 200 and the same to everything."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        message = {"role": "assistant", "content": "Once there was a light.", "refusal": None}
        reply = {
            "id": "x", "object": "list" if self.path == "/v1/models" else "chat.completion", "created": 1, "model": "m", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "me"}],
            "choices": [{"index": 0, "message": message, "text": "and so on", "logprobs": None, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11},
        }  # fmt: skip
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def pretender():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pretender)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_what_is_only_accepted_is_ignored(pretender):
    status, told = verdicts(pretender, "--only", "fields")
    assert status == 1
    honest = {"fields: user, metadata, store: null and harmless values"}  # which change nothing, and shall not
    assert {name for name, verdict in told.items() if verdict == "honoured"} == honest
    for name in ("temperature", "seed", "stop", "n", "logprobs", "max_tokens", "presence_penalty", "ignore_eos"):
        assert told[f"fields: {name}"] == "ignored", name


def test_bad_input_that_is_accepted_is_wrong(pretender):
    _, told = verdicts(pretender, "--only", "bad input")
    assert set(told.values()) == {"wrong"} and len(told) >= 16


def test_constraints_and_tools_are_judged_by_the_text(pretender):
    told = verdicts(pretender, "--only", "constraints")[1] | verdicts(pretender, "--only", "tools")[1]
    assert set(told.values()) == {"ignored"} and len(told) >= 12


def test_a_table_of_two(pretender):
    _, told = selftest("--compare", pretender, f"{pretender}/v1", "--only", "GET /v1/models")
    assert f"| {pretender}/v1 |" in told and re.search(r"\| GET /v1/models +\| ok +\| ok +\|", told)


def test_this_server(demo):
    if lack := missing_library("openvino"):
        pytest.skip(lack)
    with serve_one(demo, EngineSpec("openvino", str(demo.path), 8, 0, 16384)) as served:
        status, told = verdicts(served.url)
    assert {name: verdict for name, verdict in told.items() if verdict in ("wrong", "ignored", "unclear")} == {}
    assert status == 0 and len(told) > 75
    assert sum(verdict == "honoured" for verdict in told.values()) >= 20
