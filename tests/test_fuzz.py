"""Whatever bytes come: only whole replies, or the end of the connection; never a 500, never two replies to one request.

FUZZ sets how many examples each test takes (default 200); the same ones every time, unless it is set.
"""

import json
import os
import re
import socket
import tempfile

import pytest
from conftest import serve_scripted
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from api_request import BODIES, INERT
from http11 import HttpLimits

COUNT = int(os.environ.get("FUZZ", "200"))
BOUNDED = settings(
    max_examples=COUNT,
    derandomize="FUZZ" not in os.environ,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
MESSAGES = b'{"messages":[{"role":"user","content":"echo hi"}],"max_tokens":3}'
STREAMED = b'{"messages":[{"role":"user","content":"echo hi"}],"stream":true}'
SEEDS = [
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"HEAD /v1/models HTTP/1.1\r\nHost: x\r\nAccept: */*\r\n\r\n",
    b"OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: x\r\nOrigin: http://a\r\n\r\n",
    b"GET http://x/v1/models HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello",
    b"POST /v1/tokenize HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 15\r\n\r\n" + b'{"content":"x"}',
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(MESSAGES) + MESSAGES,
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n%x;a=b\r\n" % len(STREAMED)
    + STREAMED + b"\r\n0\r\nT: x\r\n\r\n",
]  # fmt: skip
SPICE = [
    b"\r",
    b"\n",
    b"\r\n",
    b"\r\n\r\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b";",
    b",",
    b"\xa0",
    b"\x0b",
    b"0\r\n\r\n",
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"GET / ",
]
SPICE += [
    b"Content-Length: 0\r\n",
    b"Content-Length: 7\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Host: y\r\n",
    b" folded\r\n",
    b"Connection: close\r\n",
]
SPICE += [
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"-1",
    b"+",
    b"1e3",
    b"ffffffffff",
    b"\x1b",
    b"\xff",
    b"\\",
    b'"',
    b"\x7f",
]


@st.composite
def mutated(draw):
    """Valid requests, glued, then cut, doubled and spiced at a few places."""
    data = b"".join(draw(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=3)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["insert", "replace", "remove", "cut", "repeat"]))
        size = draw(st.integers(1, 12))
        spice = draw(st.one_of(st.sampled_from(SPICE), st.binary(min_size=1, max_size=4)))
        data = {
            "insert": data[:at] + spice + data[at:],
            "replace": data[:at] + spice + data[at + len(spice) :],
            "remove": data[:at] + data[at + size :],
            "cut": data[:at],
            "repeat": data[: at + size] + data[at:],
        }[how]
    return data


@pytest.fixture(scope="module")
def served():
    with tempfile.TemporaryDirectory() as folder, serve_scripted(folder, limits=HttpLimits(header_s=2, idle_s=2)) as made:
        yield made


def exchange(served, data, pieces):
    """Everything that comes back, the request being sent in so many pieces, and its sending side shut."""
    with socket.create_connection((served.host, served.port), timeout=30) as sock:
        out = b""
        try:
            for i in range(pieces):
                sock.sendall(data[len(data) * i // pieces : len(data) * (i + 1) // pieces])
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # refused already
        try:
            while block := sock.recv(1 << 16):
                out += block
        except ConnectionResetError:
            pass
        return out


HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z '-]+\r\n((?:[!-9;-~]+: [ -~\t\x80-\xff]*\r\n)*)\r\n")


def whole_replies(out, heads):
    """Splits the bytes into replies, strictly; the last may be a stream that ends with the connection. `heads`: which have no body."""
    replies, at = [], 0
    while at < len(out):
        found = HEAD.match(out, at)
        assert found, out[at : at + 200]
        status, at = int(found[1]), found.end()
        fields = dict(line.lower().split(b": ", 1) for line in found[2].split(b"\r\n") if line)
        if status == 100:
            continue
        closes = fields.get(b"connection") == b"close"
        if fields.get(b"transfer-encoding") == b"chunked":
            while True:
                size = re.compile(rb"([0-9a-f]+)\r\n").match(out, at)
                assert size, out[at : at + 200]
                at = size.end() + int(size[1], 16) + 2
                assert out[at - 2 : at] == b"\r\n"
                if int(size[1], 16) == 0:
                    break
        elif b"content-length" in fields:
            length, index = int(fields[b"content-length"]), len(replies)
            rest = out[at : at + length]
            if index in heads and (not rest or rest.startswith(b"HTTP/1.1 ")):
                length = 0
            assert len(out) >= at + length, "a reply is cut off"
            if length and b"json" in fields.get(b"content-type", b""):
                json.loads(out[at : at + length])
            at += length
        elif status != 204:
            assert closes and fields.get(b"content-type") == b"text/event-stream", fields
            at = len(out)
        replies.append((status, closes))
        if closes:
            assert at == len(out), "something follows the last reply"
    return replies


@BOUNDED
@given(data=mutated(), pieces=st.integers(1, 4))
def test_raw_bytes(served, data, pieces):
    out = exchange(served, data, pieces)
    heads = range(20) if b"HEAD" in data else ()
    replies = whole_replies(out, heads)
    assert not [status for status, _ in replies if status >= 500 and status not in (503, 505)], (data, replies)
    # No more replies than request lines that could be meant: a body is never taken for a request.
    assert len(replies) <= len(re.findall(rb"\n|\Z", data)), (data, replies)
    assert exchange(served, SEEDS[0], 1).startswith(b"HTTP/1.1 200 OK\r\n")


@BOUNDED
@given(
    count=st.integers(1, 4), seeds=st.lists(st.integers(0, len(SEEDS) - 1), min_size=1, max_size=5), pieces=st.integers(1, 6)
)
def test_valid_requests_glued_get_one_reply_each(served, count, seeds, pieces):
    data = b"".join(SEEDS[i] for i in seeds) * count
    replies = whole_replies(exchange(served, data, pieces), range(50))
    assert len(replies) == len(seeds) * count, replies


@BOUNDED
@given(rest=st.binary(max_size=40), seed=st.sampled_from(SEEDS))
def test_what_follows_a_refusal_is_not_read(served, rest, seed):
    replies = whole_replies(
        exchange(served, b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n" + rest + seed, 1),
        (),
    )
    assert replies == [(400, True)]


# ── JSON ──

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8),
    st.sampled_from(["", "auto", "none", "json_object", "text", "echo hi", "\ud800", "\0", "a" * 300, "float", "scripted"]),
)  # fmt: skip
NAMES = st.one_of(st.text(max_size=6), st.sampled_from(["type", "role", "content", "schema", "json_schema", "function", "name", "regex", "json", "choice", "grammar"]))  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=4)), max_leaves=8
)
GOOD = {
    "messages": [{"role": "user", "content": "echo hi"}], "prompt": "echo hi", "input": "x", "content": "x", "tokens": [104],
    "max_tokens": 4, "max_completion_tokens": 4, "stream": False, "n": 1, "temperature": 0.5, "seed": 1, "stop": ["a"],
    "model": "scripted", "logit_bias": {"3": 1}, "encoding_format": "float",
}  # fmt: skip
ROUTES = sorted(path for path in BODIES if not path.startswith("/models/"))


@st.composite
def bodies(draw):
    """(path, body): most fields well, a few with anything."""
    path = draw(st.sampled_from(ROUTES))
    table = sorted(BODIES[path])
    chosen = {name: GOOD[name] for name in table if name in GOOD and draw(st.integers(0, 9))}
    if "max_tokens" in table:
        chosen["max_tokens"] = 4
    for name in draw(st.lists(st.sampled_from([*table, *INERT, "other"]), max_size=3)):
        chosen[name] = draw(VALUES)
    return path, draw(st.one_of(st.just(chosen), st.just(chosen), st.just(chosen), VALUES))


def names_of(body):
    return {*body, *INERT} if isinstance(body, dict) else set()


@BOUNDED
@given(asked=bodies(), prefix=st.sampled_from(["", "/v1"]))
def test_bodies(served, asked, prefix):
    """2xx, or 4xx with a sentence, and a `param` that the route has."""
    path, body = asked
    status, reply, _ = served.request("POST", prefix + path, json.dumps(body).encode(), timeout=30)
    if isinstance(body, dict) and body.get("stream") is True and status == 200:
        assert reply.endswith(b"data: [DONE]\n\n")
        return
    assert 200 <= status < 500, (asked, reply)
    if status >= 400:
        error = reply["error"]
        assert isinstance(error["message"], str) and error["message"]
        known = {*BODIES[path], "repeat_penalty", "model"} | names_of(body)
        assert error["param"] is None or re.split(r"[.\[]", error["param"])[0] in known, (asked, error)


@BOUNDED
@given(
    path=st.sampled_from(ROUTES),
    data=st.one_of(st.binary(max_size=60), st.text('{}[],:"\\u0123eE+-.ntf \ud800\0', max_size=60)),
)
def test_bytes_that_are_hardly_json(served, path, data):
    data = data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass")
    status, reply, _ = served.request("POST", path, data, timeout=30)
    assert 200 <= status < 500, (data, reply)
