"""What docs/security.md promises, each by an attempt to have it otherwise."""

import contextlib
import http.client
import io
import json
import logging
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from conftest import Served, cancelled_at, from_client, serve, serve_one, serve_scripted, serve_upstream, until
from test_cli import SCRIPT, Command, run
from test_endpoint import CHAT, body, idle, post, raw, sized, statuses
from test_models import HF, write_files, write_gguf
from test_upstream import OK, Far, chunk, piece, reply

import access
import catalog as catalog_room
import http11
import logs
import model_init
import openai_api_endpoint as endpoint
from access import Access, Keys
from catalog import Catalog
from engine import EngineSpec
from http11 import HttpLimits, address_of

GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
ZERO = b"0\r\n\r\n"


def connect(served, data=b""):
    sock = socket.create_connection((served.host, served.port), timeout=20)
    sock.sendall(data)
    return sock


def until_closed(sock):
    out = b""
    while block := sock.recv(65536):
        out += block
    return out


# ── HTTP: what can be read in two ways is refused ──


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(post(b"{}", "X: a\rTransfer-Encoding: chunked", "Content-Length: 2"), id="bare CR before a header"),
        pytest.param(post(b"{}", "X: a\rContent-Length: 2"), id="bare CR before Content-Length"),
        pytest.param(post(ZERO, "Transfer-Encoding: chunked").replace(b"0\r\n", b"0\n", 1), id="bare LF after a chunk size"),
        pytest.param(post(b"2\n{}\r\n" + ZERO, "Transfer-Encoding: chunked"), id="bare LF after a chunk size, with data"),
        pytest.param(post(b"2;a=\rb\r\n{}\r\n" + ZERO, "Transfer-Encoding: chunked"), id="CR in a chunk extension"),
        pytest.param(post(b"2\r\n{}\n" + ZERO, "Transfer-Encoding: chunked"), id="bare LF after a chunk"),
        pytest.param(post(b"2\r\n{}\r\n0\r\nX: a\n\r\n", "Transfer-Encoding: chunked"), id="bare LF in a trailer"),
        pytest.param(post(b"2\r\n{}\r\n0\r\n bad\r\n\r\n", "Transfer-Encoding: chunked"), id="a trailer that is none"),
        pytest.param(post(b" 2\r\n{}\r\n" + ZERO, "Transfer-Encoding: chunked"), id="space before a chunk size"),
        pytest.param(post(b"0x2\r\n{}\r\n" + ZERO, "Transfer-Encoding: chunked"), id="0x"),
        pytest.param(post(ZERO, "Transfer-Encoding:\r\n chunked"), id="obs-fold in Transfer-Encoding"),
        pytest.param(post(b"{}", "Content-Length: 2", "X: a\r\n b"), id="obs-fold"),
        pytest.param(post(b"{}", "Content-Length: \xa02").replace(b"\xc2", b""), id="no-break space before a length"),
        pytest.param(post(b"{}", "Content-Length: 2\x0b"), id="vertical tab after a length"),
        pytest.param(post(b"{}", "Content-Length : 2"), id="space before a colon"),
        pytest.param(post(b"{}", "Content-Length: 2, 2"), id="a list of lengths"),
        pytest.param(
            post(b"%x\r\n%s\r\n" % (len(body("echo x")), body("echo x")) + ZERO, "Transfer-Encoding: chunked", version="1.0"),
            id="Transfer-Encoding on HTTP/1.0",
        ),
        pytest.param(post(ZERO, "Transfer-Encoding: chunked, chunked"), id="chunked twice"),
        pytest.param(post(b"{}", "Content-Length: 2", "X: a\0b"), id="NUL in a value"),
        pytest.param(post(b"{}", "Content-Length: 2", "X\0: a"), id="NUL in a name"),
        pytest.param(b"GET /health HTTP/1.2\r\n\r\n", id="HTTP/1.2 without Host"),
        pytest.param(b"GET /health HTTP/1.1\nHost: x\n\n", id="bare LF"),
        pytest.param(b"GET  /health HTTP/1.1\r\nHost: x\r\n\r\n", id="two spaces"),
        pytest.param(b"GET\t/health HTTP/1.1\r\nHost: x\r\n\r\n", id="a tab"),
        pytest.param(b"GET /he\rth HTTP/1.1\r\nHost: x\r\n\r\n", id="bare CR in the target"),
        pytest.param(b"GET /health\r\n\r\n", id="HTTP/0.9"),
        pytest.param(b"GET /health HTTP/1.1\r\nHost: a b\r\n\r\n", id="a Host that is none"),
        pytest.param(b"GET /health HTTP/1.1\r\n Host: x\r\nHost: x\r\n\r\n", id="a fold before the first header"),
    ],
)
def test_what_two_readers_could_read_in_two_ways_is_refused(scripted, data):
    out = raw(scripted, data + GET)
    assert statuses(out) == [400] and b"Connection: close" in out, out


def test_a_minor_version_that_is_not_known_is_as_good_as_1_1(scripted):
    assert statuses(raw(scripted, GET.replace(b"1.1", b"1.2"))) == [200]


def test_empty_lines_before_a_request_mean_nothing(scripted):
    assert statuses(raw(scripted, b"\r\n" + GET + b"\r\n\r\n" + GET)) == [200, 200]


def test_chunks_of_nothing_much_are_refused(scripted):
    small, less_small = (b"%x\r\n%s\r\n" % (size, b" " * size) * 60_000 for size in (1, 99))
    said = body("echo x")
    for chunks, status in ((small, 400), (less_small, 200)):
        data = b"%x\r\n%s\r\n" % (len(said), said) + chunks + ZERO
        assert statuses(raw(scripted, post(data, "Transfer-Encoding: chunked"))) == [status]


def test_no_header_of_a_reply_can_be_broken(scripted):
    out = raw(scripted, sized(body("echo x", **{"a\r\nX-Evil: 1": 1}), "X-Request-Id: a\tb"))
    assert statuses(out) == [200] and b"\nX-Evil" not in out and b"X-Request-Id: ab\r\n" in out
    scripted.server.access = Access()
    scripted.server.access.cors = lambda headers: [("X-Odd", "a\r\nX-Evil: 1\0")]  # whoever makes a header of what
    assert b"X-Odd: a  X-Evil: 1 \r\n" in raw(scripted, GET)


def test_never_two_replies_to_one_request(tmp_path):
    with serve_scripted(tmp_path, record=str(tmp_path / "record")) as served:
        served.server.note_request = lambda *_: 1 / 0
        out = raw(served, sized(body("echo x")) + GET)
        assert statuses(out) == [200] and out.endswith(b"}")


# ── as early as it can be ──


@pytest.mark.parametrize(
    ("path", "key", "status"),
    [("/nonsense", "secret", 404), (CHAT, "wrong", 401), ("/health", "secret", 405), (CHAT, "secret", 413)],
)
def test_refused_before_the_body(tmp_path, path, key, status):
    with serve_scripted(tmp_path, api_key="secret") as served:
        size = 15 << 20 if status != 413 else 17 << 20
        sock = connect(served, post(b"", f"Authorization: Bearer {key}", f"Content-Length: {size}", path=path))
        assert statuses(sock.recv(65536)) == [status]  # of the body nothing has been sent
        sock.close()


def test_a_page_is_refused_before_the_body(tmp_path):
    with serve_scripted(tmp_path, access=Access(guard=True)) as served:
        sock = connect(served, post(b"", "Content-Length: 15000000").replace(b"Host: x", b"Host: evil.example"))
        assert statuses(sock.recv(65536)) == [403]
        sock.close()


def test_a_small_body_that_nobody_wants_is_read_over(scripted):
    out = raw(scripted, sized(body("x" * 100_000), path="/nonsense") + sized(body("echo yes")))
    assert statuses(out) == [404, 200]


def test_nobody_waits_for_a_body_that_was_not_asked_for(scripted):
    out = raw(scripted, post(b"", "Content-Length: 50", "Expect: 100-continue", path="/nonsense") + GET)
    assert statuses(out) == [404] and b"Connection: close" in out


def test_a_get_route_needs_no_length_to_be_refused(scripted):
    assert statuses(raw(scripted, post(b"", path="/v1/models"))) == [405]


# ── bodies ──


def test_all_bodies_together_have_a_limit(tmp_path):
    """Of large ones; a small request always gets in, and what was taken is given back."""
    limits = HttpLimits(all_bodies=4 << 20)
    with serve_scripted(tmp_path, limits=limits) as served:
        held = []
        for _ in range(4):  # 1 MB each has come, of 2 MB
            held.append(connect(served, post(b" " * (1 << 20), f"Content-Length: {2 << 20}")))
            until(lambda: served.server.bodies.held >= len(held) * ((1 << 20) - http11.Bodies.FREE))
        big, small = sized(b" " * (1 << 20) + body("echo big")), sized(body("echo small"))
        out = raw(served, big)
        assert statuses(out) == [503] and b"Retry-After: 1" in out
        assert statuses(raw(served, small)) == [200]
        for sock in held:
            sock.close()
        until(lambda: served.server.bodies.held == 0)
        assert statuses(raw(served, big)) == [200]
        assert served.server.bodies.held == 0 and not served.server.bodies.of


def test_one_address_gets_half_of_all_bodies(tmp_path):
    with serve_scripted(tmp_path, limits=HttpLimits(all_bodies=4 << 20), access=Access()) as served:
        held = [connect(served, post(b" " * (1 << 20), f"Content-Length: {2 << 20}")) for _ in range(2)]
        until(lambda: served.server.bodies.held >= 2 * ((1 << 20) - http11.Bodies.FREE))
        big = sized(b" " * (1 << 20) + body("echo big"))
        assert statuses(raw(served, big)) == [503]
        with socket.create_connection((served.host, served.port), source_address=("127.0.0.2", 0), timeout=20) as sock:
            sock.sendall(big)
            assert statuses(sock.recv(65536)) == [200]
        for sock in held:
            sock.close()


@pytest.mark.parametrize("head", ["Content-Length: 100000", "Transfer-Encoding: chunked"])
def test_a_body_has_a_least_rate(tmp_path, head):
    with serve_scripted(tmp_path, limits=HttpLimits(header_s=0.5, body_rate=1000)) as served:
        sock = connect(served, post(b"1\r\n" if "chunked" in head else b"", head))
        sock.settimeout(0.1)
        for _ in range(300):  # never silent for longer than 0.1 s
            try:
                if out := sock.recv(65536):
                    break
            except TimeoutError:
                sock.sendall(b"1" if "chunked" not in head else b"1\r\n1\r\n")
        assert statuses(out) == [408]


def test_a_body_that_keeps_the_rate_may_take_its_time(tmp_path):
    with serve_scripted(tmp_path, limits=HttpLimits(header_s=1, body_rate=100)) as served:
        data = sized(body("echo ok") + b" " * 1000)
        sock = connect(served)
        for at in range(0, len(data), 100):
            sock.sendall(data[at : at + 100])
            time.sleep(0.2)
        assert statuses(sock.recv(65536)) == [200]


def test_no_least_rate_means_all_the_time_there_is(tmp_path):
    with serve_scripted(tmp_path, limits=HttpLimits(idle_s=3e6, header_s=3e6, body_rate=0)) as served:
        sock, data = connect(served), sized(body("echo ok"))
        for piece in (data[:5], data[5:-5], data[-5:]):
            time.sleep(0.2)
            sock.sendall(piece)
        assert statuses(sock.recv(65536)) == [200]


# ── connections ──


def test_a_header_has_a_deadline_in_all(tmp_path):
    with serve_scripted(tmp_path, limits=HttpLimits(header_s=0.5)) as served:
        sock = connect(served, b"GET /health HTTP/1.1\r\nX: ")
        sock.settimeout(0.1)
        for _ in range(300):
            try:
                if out := sock.recv(65536):
                    break
            except TimeoutError:
                sock.sendall(b"x")
        assert statuses(out) == [408]


def test_an_idle_connection_ends(tmp_path):
    with serve_scripted(tmp_path, limits=HttpLimits(idle_s=1)) as served:
        silent, used = connect(served), connect(served, GET)
        assert until_closed(silent) == b""
        assert statuses(until_closed(used)) == [200]


def settled(served, count):
    until(lambda: len(served.server.seats.quiet) == len(served.server.seats.taken) == count)


def test_the_oldest_idle_connection_makes_room(tmp_path):
    with serve_scripted(tmp_path, limits=HttpLimits(connections=4, per_address=100), access=Access()) as served:
        served.request("GET", "/health")
        settled(served, 0)
        socks = []
        for i in range(4):  # the second has begun a header, the third a body, the fourth has had an answer
            socks.append(connect(served, [b"", b"GET /", post(b"{", "Content-Length: 9"), GET][i]))
            settled(served, i + 1)
        assert statuses(socks[3].recv(65536)) == [200]
        socks[0].sendall(GET)
        assert statuses(socks[0].recv(65536)) == [200]  # now it is the youngest
        settled(served, 4)
        assert served.chat("echo in")[0] == 200
        assert until_closed(socks[1]) == b""
        for sock in (socks[0], socks[3]):
            sock.sendall(GET)
            assert statuses(sock.recv(65536)) == [200]


def test_who_is_being_answered_does_not_make_room(tmp_path):
    with serve_scripted(tmp_path, slots=2, limits=HttpLimits(connections=2, per_address=100), access=Access()) as served:
        streams = [connect(served, sized(body("forever", stream=True))) for _ in range(2)]
        for sock in streams:
            assert statuses(sock.recv(65536)) == [200]
        out = until_closed(connect(served))
        assert statuses(out) == [503] and json.loads(out.split(b"\r\n\r\n")[1])["error"]["code"] == "too_many_connections"
        for _ in range(20):  # what it had sent is not read, and yet it can read all that was said
            with contextlib.closing(http.client.HTTPConnection(served.host, served.port)) as conn:
                with served.server.seats.lock:
                    conn.request("GET", "/v1/models")
                    time.sleep(0.005)
                reply = conn.getresponse()
                assert (reply.status, json.loads(reply.read())["error"]["code"]) == (503, "too_many_connections")
        streams[0].close()
        until(lambda: len(served.server.seats.taken) == 1)
        assert served.request("GET", "/health")[0] == 200


def test_what_is_left_unread_does_not_cost_the_reply(tmp_path):
    with serve_scripted(tmp_path, access=Access()) as served:
        last = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        for _ in range(20):
            assert statuses(until_closed(connect(served, last + GET * 1000))) == [200]


def test_who_reads_slowly_gets_all(tmp_path, monkeypatch):
    monkeypatch.setattr(http11, "WRITE_S", 1.0)
    with serve_scripted(tmp_path, access=Access()) as served:
        monkeypatch.setitem(endpoint.ROUTES["/health"], "GET", lambda handler: handler.reply(200, {"text": "x" * (16 << 20)}))
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        sock.connect((served.host, served.port))
        sock.sendall(GET)
        got, began = 0, time.monotonic()
        while got < 16 << 20:
            data = sock.recv(1 << 16)
            assert data
            got += len(data)
            time.sleep(0.006)
        assert time.monotonic() - began > 1.5


def test_who_does_not_read_makes_room(tmp_path):
    with serve_scripted(tmp_path, limits=HttpLimits(connections=2, per_address=100), access=Access()) as served:
        socks = []
        for i in range(2):
            socks.append(socket.socket())
            socks[i].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            socks[i].connect((served.host, served.port))
            socks[i].setblocking(False)
            stuck = 0
            while stuck < 20:  # until no request is read any more, since no reply is
                try:
                    stuck = 0 * socks[i].send(GET * 1000)
                except BlockingIOError:
                    stuck += 1
                    time.sleep(0.05)
        assert served.chat("echo in")[0] == 200


def test_one_address_makes_room_for_itself(tmp_path):
    with serve_scripted(tmp_path, limits=HttpLimits(connections=100, per_address=3), access=Access()) as served:
        other = socket.create_connection((served.host, served.port), source_address=("127.0.0.2", 0), timeout=20)
        settled(served, 1)
        mine = []
        for i in range(3):
            mine.append(connect(served))
            settled(served, i + 2)
        assert served.request("GET", "/health")[0] == 200
        assert until_closed(mine[0]) == b""
        for sock in (other, mine[2]):
            sock.sendall(GET)
            assert statuses(sock.recv(65536)) == [200]
        other.close()
        mine[2].close()
        settled(served, 1)
        until(lambda: served.server.seats.of == {"127.0.0.1": 1})


def test_a_flood_of_connections_leaves_nothing_behind(tmp_path):
    with serve_scripted(tmp_path, limits=HttpLimits(connections=20)) as served:
        socks = [connect(served) for _ in range(300)]
        assert served.chat("echo in")[0] == 200
        assert len(os.listdir("/proc/self/fd")) < 300 + 200
        for sock in socks:
            sock.close()
        until(lambda: not served.server.seats.taken and not served.server.seats.of and not served.server.seats.leaving)


def test_file_numbers_are_kept_for_engines(demo):
    """More connections than `ulimit -n` has, and the engine killed: another one comes."""
    command = ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", sys.executable, SCRIPT, "-p", "0", "-m", str(demo.path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
    try:
        until(lambda: any("curl" in line for line in lines))
        port = int(re.search(r"port (\d+)", "".join(lines))[1])
        served = Served(type("Server", (), {"server_port": port}), None)
        socks = [connect(served) for _ in range(140)]
        assert served.request("GET", "/health")[0] == 200
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        engines = []
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread that has just ended
                found = (task / children.name).read_text().split()
                engines += [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
        assert engines
        for engine in engines:
            os.kill(engine, signal.SIGKILL)
        until(lambda: any("starting it again" in line for line in lines))
        until(lambda: served.request("GET", "/health")[0] == 200)
        assert served.chat("Hi", max_tokens=2)[0] == 200
        for sock in socks:
            sock.close()
    finally:
        process.terminate()
        process.wait(20)


# ── clients that shut their sending side ──


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_said_all_gets_its_answer(scripted, stream, version):
    """As `nc -N` does; twice, with something to wait for in between."""
    scripted.script("hold")
    data = sized(body("echo all of it", stream=stream), version=version)
    sock = connect(scripted, data)
    sock.shutdown(socket.SHUT_WR)
    until(lambda: scripted.models.running() == 1)
    time.sleep(0.3)
    assert scripted.models.running() == 1
    scripted.script("hold", False)
    out = until_closed(sock)
    assert out.startswith(b"HTTP/1.1 200 OK\r\nDate: ") and statuses(out) == [200]
    text = "".join(
        re.findall(rb'"content":"([^"]+)"', out)[i].decode() for i in range(len(re.findall(rb'"content":"([^"]+)"', out)))
    )
    assert text == "all of it"


def test_pipelined_requests_of_a_client_that_has_said_all(scripted):
    sock = connect(scripted, sized(body("echo one")) + GET + sized(body("echo two")))
    sock.shutdown(socket.SHUT_WR)
    out = until_closed(sock)
    assert statuses(out) == [200, 200, 200] and b"two" in out


def test_one_that_has_left_is_not_taken_for_one_that_waits(scripted):
    sock = connect(scripted, sized(body("forever")))
    until(lambda: scripted.models.running() == 1)
    sock.close()
    idle(scripted)
    until(lambda: cancelled_at(scripted.calls(), 1))  # the engine may hear of it after the server forgot it
    assert cancelled_at(scripted.calls(), 1) < 1900


# ── web pages ──


def page(served, host="localhost", origin=None, kind="application/json", method="POST", target=CHAT, **more):
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += [f"Origin: {origin}"] if origin is not None else []
    lines += [f"Content-Type: {kind}"] if kind else []
    lines += [f"{name}: {value}" for name, value in more.items()]
    data = body("echo x") if method == "POST" else b""
    out = raw(served, ("\r\n".join([*lines, f"Content-Length: {len(data)}"]) + "\r\n\r\n").encode() + data)
    head, _, rest = out.partition(b"\r\n\r\n")
    allowed = re.search(rb"Access-Control-Allow-Origin: (.*?)\r\n", head + b"\r\n")
    return statuses(out)[0], allowed and allowed[1].decode(), rest


PAGES = [  # Host, Origin, Content-Type → status, Access-Control-Allow-Origin
    ("localhost", None, "application/json", 200, None),
    ("localhost:8000", None, None, 200, None),
    ("127.0.0.1:8000", "http://localhost:3000", "application/json", 200, "http://localhost:3000"),
    ("127.8.9.1", "http://app.localhost", "application/json; charset=utf-8", 200, "http://app.localhost"),
    ("[::1]:8000", "http://[::1]:5", "application/json", 200, "http://[::1]:5"),
    ("LocalHost.", None, "application/json", 200, None),
    ("evil.example", None, "application/json", 403, None),
    ("evil.example:8000", "http://localhost", "application/json", 403, "http://localhost"),
    ("0.0.0.0:8000", None, "application/json", 403, None),
    ("localhost.evil.example", None, "application/json", 403, None),
    ("127.0.0.1.evil.example", None, "application/json", 403, None),
    ("", None, "application/json", 403, None),
    ("localhost", "http://evil.example", "application/json", 403, None),
    ("localhost", "https://localhost.evil.example", "application/json", 403, None),
    ("localhost", "http://localhost@evil.example", "application/json", 403, None),
    ("localhost", "null", "application/json", 403, None),
    ("localhost", "", "application/json", 403, None),
    ("localhost", "http://evil.example", "text/plain", 403, None),
    ("localhost", "http://localhost:3000", "text/plain", 415, "http://localhost:3000"),
    ("localhost", "http://localhost:3000", "text/plain;charset=UTF-8", 415, "http://localhost:3000"),
    ("localhost", "http://localhost:3000", "application/x-www-form-urlencoded", 415, "http://localhost:3000"),
    ("localhost", "http://localhost:3000", None, 415, "http://localhost:3000"),
]


def test_pages(tmp_path):
    with serve_scripted(tmp_path, access=Access(guard=True, json_only=True)) as served:
        for host, origin, kind, status, allowed in PAGES:
            assert page(served, host, origin, kind)[:2] == (status, allowed), (host, origin, kind)
        for method, target in (("GET", "/health"), ("GET", "/"), ("OPTIONS", CHAT)):
            assert page(served, "evil.example", method=method, target=target)[0] == 403
            assert page(served, "localhost", "http://evil.example", method=method, target=target)[0] == 403
        assert page(served, origin="http://localhost:1", method="OPTIONS")[:2] == (204, "http://localhost:1")
        status, _, rest = page(served, "evil.example")
        assert "--allow-host" in json.loads(rest)["error"]["message"]
        assert "--allow-origin" in json.loads(page(served, origin="http://evil.example")[2])["error"]["message"]
        assert page(served, target="http://evil.example/v1/chat/completions")[0] == 403  # the target counts, not Host
        assert page(served, target="http://localhost/v1/chat/completions")[0] == 200


def test_pages_that_are_let_in_by_name(tmp_path):
    names = Access(guard=True, hosts=frozenset(["my.example"]), origins=frozenset(["https://app.example"]))
    with serve_scripted(tmp_path, access=names) as served:
        assert page(served, "my.example:443", "https://my.example")[:2] == (200, "https://my.example")
        assert page(served, origin="https://APP.example/")[0] == 200
        assert page(served, origin="http://app.example")[0] == 403
        assert page(served, "app.example")[0] == 403


@pytest.mark.parametrize("open_", [Access(Keys(["k"]), guard=True), Access(guard=True, origins=frozenset(["*"])), Access()])
def test_with_a_key_or_by_word_all_pages_may_ask(tmp_path, open_):
    with serve_scripted(tmp_path, access=open_) as served:
        assert page(served, "evil.example", "http://evil.example", Authorization="Bearer k")[:2] == (200, "*")
        assert page(served, origin="http://evil.example", method="OPTIONS")[:2] == (204, "*")


# ── who a client is ──


def test_a_header_does_not_make_another_client(tmp_path):
    with serve_scripted(tmp_path, access=Access(Keys(["one", "two"]))) as served:
        seen = []
        served.models.submit, submit = (
            lambda model, start, client, *rest: seen.append(client) or submit(model, start, client, *rest),
            served.models.submit,
        )
        for headers in (
            {"Authorization": "Bearer one"},
            {"X-Api-Key": "one", "Authorization": "Basic abc"},
            {"X-Api-Key": "two"},
        ):
            assert served.chat("echo x", headers=headers | from_client(7))[0] == 200
        assert seen == ["key key1", "key key1", "key key2"]
        served.server.access = Access()
        for headers in ({"Authorization": "Bearer one"}, {"X-Api-Key": "two"}, from_client(7)):
            assert served.chat("echo x", headers=headers)[0] == 200
        assert seen[3:] == ["127.0.0.1"] * 3


def test_addresses():
    assert address_of("10.1.2.3") == address_of("::ffff:10.1.2.3") == "10.1.2.3"
    assert address_of("2001:db8:1:2:3::4") == address_of("2001:db8:1:2:ffff::") == "2001:db8:1:2::/64"
    assert address_of("2001:db8:1:3::1") != address_of("2001:db8:1:2::1")
    assert address_of("fe80::1%eth0") == "fe80::/64"


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("10.0.0.1", ["1.2.3.4"], "1.2.3.4"),
        ("10.0.0.1", ["6.6.6.6, 1.2.3.4"], "1.2.3.4"),  # what the client itself has written is not believed
        ("10.0.0.1", ["6.6.6.6", "1.2.3.4, 10.0.0.2"], "1.2.3.4"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["2001:db8::5"], "2001:db8::/64"),
        ("9.9.9.9", ["1.2.3.4"], "9.9.9.9"),
    ],
)
def test_whom_a_proxy_speaks_for(peer, forwarded, client):
    headers = http11.Headers()
    for value in forwarded:
        headers.add("X-Forwarded-For", value)
    rules = Access(proxies=(access.network("10.0.0.0/24"),))
    assert rules.address(peer, headers) == client


# ── keys ──


def test_several_keys_from_the_command_line_and_a_file(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("# our friends\n\nanna: a-key\nbare-key\n")
    file.chmod(0o600)
    keys = Keys(["first"], str(file))
    names = {key: keys.name_of(key) for key in ("first", "a-key", "bare-key", "anna", "", "# our friends")}
    assert names == {"first": "key1", "a-key": "anna", "bare-key": "line4", "anna": None, "": None, "# our friends": None}
    assert "read by others" not in caplog.text
    file.write_text("otto:o-key\n")
    os.utime(file, ns=(1, 1))  # whatever the clock's grain is
    assert (keys.name_of("a-key"), keys.name_of("o-key"), keys.name_of("first")) == (None, "otto", "key1")
    file.write_text("bad key\n")
    assert keys.name_of("o-key") == "otto" and "stays as it was" in caplog.text and "bad key" not in caplog.text
    file.write_text("# nobody\n")
    assert keys.name_of("o-key") is None and keys
    file.chmod(0o644)
    os.utime(file, ns=(2, 2))
    keys.refresh()
    assert "read by others" in caplog.text


def test_all_keys_are_compared(monkeypatch):
    compared = []
    monkeypatch.setattr(access.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    keys = Keys(["aaa", "b", "cc"])
    for key in ("aaa", "cc", "wrong"):
        keys.name_of(key)
    assert compared == [(32, 32)] * 9


def test_a_file_of_keys_at_work(tmp_path):
    file = tmp_path / "keys"
    file.write_text("anna:secret\n")
    with serve_scripted(tmp_path, access=Access(Keys(file=str(file)))) as served:
        assert [served.chat("echo x", headers={"X-Api-Key": key})[0] for key in ("secret", "other")] == [200, 401]
        file.write_text("anna:other!\n")
        assert [served.chat("echo x", headers={"X-Api-Key": key})[0] for key in ("secret", "other!")] == [401, 200]


def test_operators_keys(tmp_path):
    rules = Access(Keys(["user"]), Keys(["boss"]))
    with serve_scripted(tmp_path, access=rules) as served:
        statuses_ = {
            (path, key): served.request("POST", path, {"model": "scripted"}, {"X-Api-Key": key})[0]
            for path in ("/tokenize", "/v1/models/load")
            for key in ("user", "boss", "")
        }
        assert statuses_ == {
            ("/tokenize", "user"): 400, ("/tokenize", "boss"): 400, ("/tokenize", ""): 401,
            ("/v1/models/load", "user"): 401, ("/v1/models/load", "boss"): 200, ("/v1/models/load", ""): 401,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--api-key", ""], "empty key"),
        (["--api-key", "good", "--api-key", ""], "empty key"),
        (["--admin-key", ""], "empty key"),
        (["--api-key", "two words"], "without spaces"),
        (["--api-key-file", "/no/such/file"], "No such file"),
        (["--api-key-file", os.devnull], "no key in it"),
        (["--ssl-certfile", "/no/such/file"], "No such file"),
        (["--ssl-keyfile", "/no/such/file"], "needs --ssl-certfile"),
        (["--ssl-certfile", __file__], "--ssl-certfile"),
        (["--trusted-proxy", "nobody"], "not an address"),
        (["--uds", __file__], "cannot listen"),
    ],
)
def test_command_lines_that_would_be_a_mistake(demo, args, words):
    done = run("-m", str(demo.path), "-p", "0", *args)
    assert done.returncode == 2 and words in done.stderr and "secret" not in done.stderr, done.stderr


def test_an_open_door_is_told(demo):
    server = Command("-m", str(demo.path), "-H", "0.0.0.0")
    try:
        assert len([line for line in server.log().splitlines() if "no --api-key" in line]) == 1
    finally:
        server.end()


def test_the_command_line_guards(demo, tmp_path):
    """The rules are on where a server is started, on loopback without a key; a key of the file opens and is not told."""
    file = tmp_path / "keys"
    file.write_text("anna:very-secret\n")
    server = Command("-m", str(demo.path), "--log-format", "json")
    keyed = None
    try:
        served = Served(type("Server", (), {"server_port": int(server.url.rsplit(":", 1)[1])}), None)
        assert page(served, "evil.example", method="GET", target="/health")[0] == 403
        assert page(served, origin="http://localhost:1", kind="text/plain")[0] == 415
        assert "no --api-key" not in server.log()
        until(lambda: server.log().count('"path"') == 2)
        events = [json.loads(line) for line in server.log().splitlines() if '"path"' in line]
        assert [(event["method"], event["path"], event["status"]) for event in events] == [
            ("GET", "/health", 403),
            ("POST", CHAT, 415),
        ]
        keyed = Command("-m", str(demo.path), "--api-key-file", str(file), "--admin")
        served = Served(type("Server", (), {"server_port": int(keyed.url.rsplit(":", 1)[1])}), None)
        assert page(served, "evil.example")[0] == 401
        assert served.chat("Hi", max_tokens=2, headers={"Authorization": "Bearer very-secret"})[0] == 200
        until(lambda: " 200 " in keyed.log())
        (line,) = [line for line in keyed.log().splitlines() if " 200 " in line]
        assert line.endswith("client='key anna'") and "very-secret" not in keyed.log()
    finally:
        server.end()
        if keyed:
            keyed.end()


# ── TLS and Unix sockets ──


def certificate(folder, name):
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    try:
        subprocess.run(made, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl here to make a certificate with")
    return str(folder / "cert.pem"), str(folder / "key.pem")


def over_tls(served, cert, data=GET, **options):
    context = ssl.create_default_context(cafile=cert)
    if "minimum_version" in options:
        context.set_ciphers("ALL:@SECLEVEL=0")  # or this side would refuse it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TLS that is too old, which is what is tried
        for name, value in options.items():
            setattr(context, name, value)
    with context.wrap_socket(connect(served), server_hostname="127.0.0.1") as sock:
        sock.sendall(data)
        return sock.getpeercert()["subject"][0][0][1], sock.version(), until_closed(sock)


def test_tls(tmp_path):
    cert, key = certificate(tmp_path, "first")
    closing = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with serve_scripted(tmp_path, tls=http11.tls_context(cert, key), limits=HttpLimits(header_s=2)) as served:
        name, version, out = over_tls(served, cert, GET + sized(body("echo over tls", stream=True), "Connection: close"))
        assert (name, version, statuses(out)) == ("first", "TLSv1.3", [200, 200]) and b"[DONE]" in out
        assert over_tls(served, cert, closing, maximum_version=ssl.TLSVersion.TLSv1_2)[1] == "TLSv1.2"
        with pytest.raises(ssl.SSLError):
            over_tls(served, cert, closing, minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)
        assert until_closed(connect(served)) == b""  # a handshake has a deadline
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP/1.1" not in until_closed(connect(served, GET))
        sock = ssl.create_default_context(cafile=cert).wrap_socket(connect(served), server_hostname="127.0.0.1")
        sock.sendall(sized(body("forever")))
        until(lambda: served.models.running() == 1)
        sock.close()
        idle(served)
        until(lambda: not served.server.seats.taken)


def test_a_new_certificate_on_sighup(demo, tmp_path):
    cert, key = certificate(tmp_path, "first")
    server = Command("-m", str(demo.path), "--ssl-certfile", cert, "--ssl-keyfile", key)
    try:
        assert server.url.startswith("https://")
        served = Served(type("Server", (), {"server_port": int(server.url.rsplit(":", 1)[1])}), None)
        closing = GET.replace(b"Host: x\r\n\r\n", b"Host: localhost\r\nConnection: close\r\n\r\n")
        assert over_tls(served, cert, closing)[0] == "first"
        certificate(tmp_path, "second")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "read again" in server.log())
        assert over_tls(served, cert, closing)[0] == "second"
        Path(cert).write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "stays as it was" in server.log())
        certificate(tmp_path / "..", "other")
        with pytest.raises(ssl.SSLError):
            over_tls(served, str(tmp_path.parent / "cert.pem"), closing)
    finally:
        server.end()


def test_a_unix_socket_is_for_its_owner(tmp_path):
    path = str(tmp_path / "socket")
    model = model_init.Model("scripted", tmp_path, "gguf", 1)
    lives = model_init.Models(
        Catalog(fixed=[model]), lambda _: EngineSpec("scripted:Scripted", str(tmp_path), 2), model_init.Limits(default=model.id)
    )
    server = endpoint.Server(("unused", 0), lives, uds=path, access=Access(guard=True))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        lives.preload([])
        until(lambda: lives.ready)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        with pytest.raises(OSError):  # somebody listens there
            endpoint.Server(("unused", 0), lives, uds=path)
        assert os.path.exists(path)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(sized(body("echo by file"), "Connection: close"))
            assert b"by file" in until_closed(sock)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(sized(body("echo half")))
            sock.shutdown(socket.SHUT_WR)
            assert b"half" in until_closed(sock)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(path)
            sock.sendall(sized(body("forever")))
            until(lambda: lives.running() == 1)
        until(lambda: not lives.engine.jobs)
    finally:
        server.shutdown()
        server.drain(5)
        lives.close()
    assert not os.path.exists(path)
    with socket.socket(socket.AF_UNIX) as dead:  # as a killed server leaves it
        dead.bind(path)
    endpoint.Server(("unused", 0), lives, uds=path).server_close()


# ── files ──


def test_the_record_is_for_its_owner_and_whole(tmp_path):
    record = tmp_path / "record.jsonl"
    record.write_bytes(b'{"one":1}\n{"half of a li')
    record.chmod(0o644)
    with serve_scripted(tmp_path, record=str(record)) as served:
        served.chat("echo hi")
    assert stat.S_IMODE(record.stat().st_mode) == 0o600
    lines = record.read_text().splitlines()
    assert json.loads(lines[0]) == {"one": 1} and json.loads(lines[1])["choices"][0]["text"] == "hi" and len(lines) == 2
    fresh = tmp_path / "fresh"
    endpoint.append_line(str(fresh), b"{}\n")
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o600


def test_a_line_that_cannot_be_written_whole_is_not_written(tmp_path, monkeypatch):
    path, write = tmp_path / "record", os.write
    endpoint.append_line(str(path), b"first\n")

    def fills_up(file, data):
        if len(data) < 50:
            raise OSError(28, "No space left on device")
        return write(file, bytes(data)[:60])

    monkeypatch.setattr(os, "write", fills_up)
    with pytest.raises(OSError):
        endpoint.append_line(str(path), b"x" * 100 + b"\n")
    assert path.read_bytes() == b"first\n"


def test_a_bad_folder_is_listed_as_failed_and_harms_nothing(tmp_path):
    models = tmp_path / "models"
    for name, text in (("deep", "[" * 200_000), ("list", "[1]"), ("nojson", "{"), ("latin", b"\xff")):
        write_files(models / name, HF)
        (models / name / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    (models / "good").mkdir()
    write_gguf(models / "good" / "good.gguf")

    def spec(model):
        if model.broken:
            catalog_room.choose_backend(model, "auto")
        return EngineSpec("scripted:Scripted", str(models / "good"), 2)

    lives = model_init.Models(Catalog(models), spec, model_init.Limits(load_wait=20))
    with serve(lives, ready=False) as served:
        for path in ("/v1/models", "/health", "/healthz", "/", "/v1/models/deep", "/v1/capabilities"):
            assert served.request("GET", path)[0] == 200, path
        cards = {card["id"]: card for card in served.request("GET", "/v1/models")[1]["data"]}
        assert {id: card["status"] for id, card in cards.items()} == {"deep": "failed", "good": "unloaded", "latin": "failed", "list": "failed", "nojson": "failed"}  # fmt: skip
        assert "nested too deeply" in cards["deep"]["error"] and "not a JSON object" in cards["list"]["error"]
        assert "error" not in cards["good"] and str(models) not in json.dumps(cards)
        status, told, _ = served.chat("echo x", model="deep")
        assert (status, told["error"]["param"]) == (400, "model") and "nested too deeply" in told["error"]["message"]
        assert served.chat("echo x", model="good")[0] == 200
        (models / "deep" / "config.json").write_text("{}")  # mended
        lives.catalog.scanned -= 10
        until(lambda: lives.catalog.find("deep").broken == "")


def test_parts_by_the_thousand_are_counted_not_searched(tmp_path):
    names = [f"model-00001-of-{total}.safetensors" for total in (20_000, 99_999)]
    names += [f"model-{i:05d}-of-09999.safetensors" for i in range(1, 9999)]
    checks = []

    class Watched(list):
        def __contains__(self, name):
            checks.append(name)
            return super().__contains__(name)

    lacks = catalog_room.missing_files("hf", Watched(["config.json", "tokenizer.json", *names]))
    assert "model-00002-of-20000.safetensors" in lacks and len(lacks) == catalog_room.SHOWN_LACKS + 1
    assert len(checks) < 100
    assert catalog_room.missing_files("hf", ["config.json", "tokenizer.json", *names[2:]]) == [
        "model-09999-of-09999.safetensors"
    ]


def test_a_slow_folder_keeps_no_request(tmp_path, monkeypatch):
    write_gguf(tmp_path / "there.gguf")
    catalog = Catalog(tmp_path)
    gate = threading.Event()
    monkeypatch.setattr(catalog, "in_folder", lambda *_: gate.wait(30) and [])
    monkeypatch.setattr(Catalog, "PATIENCE_S", 0.01)
    catalog.scanned -= 100
    assert list(catalog.models()) == ["there"] and catalog.find("there") and catalog.find("nobody") is None
    assert catalog.looking
    gate.set()
    until(lambda: not catalog.models())


def test_no_link_out_of_a_models_folder_is_followed(tmp_path):
    from model_files import hf_template, leads_out, read_json

    secret = tmp_path / "secret"
    secret.write_text('{"secret": 1}')
    folder = tmp_path / "models" / "m"
    write_files(folder, HF)
    for name in ("chat_template.jinja", "generation_config.json"):
        (folder / name).symlink_to(secret)
    assert read_json(str(folder), "generation_config.json") == {}
    with pytest.raises(OSError):
        hf_template(str(folder), {})
    assert leads_out(str(folder)) == "chat_template.jinja"
    (folder / "inner").mkdir()
    (folder / "inner" / "config.json").symlink_to(folder / "config.json")  # inside: it may
    for name in ("chat_template.jinja", "generation_config.json"):
        (folder / name).unlink()
    assert leads_out(str(folder)) is None
    os.mkfifo(folder / "chat_template.jinja")  # to open it would wait for ever
    with pytest.raises(OSError):
        hf_template(str(folder), {})


def test_a_model_with_a_link_out_of_it_is_not_loaded(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "extra.json").symlink_to("/etc/passwd")
    model = model_init.Model("m", tmp_path / "m", "gguf", 1)
    with serve_one(model, EngineSpec("scripted:Scripted", str(model.path), 2), ready=False) as served:
        status, told, _ = served.chat("echo x")
        assert status == 503 and "extra.json is a link" in told["error"]["message"]
        assert not (model.path / "log").exists()  # no engine was started


def test_hugging_faces_cache_is_one_folder(tmp_path):
    from model_files import leads_out, read_json

    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text('{"a": 1}')
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert read_json(str(snapshot), "config.json") == {"a": 1} and leads_out(str(snapshot)) is None


def test_an_open_route_does_not_tell_where_files_are(tmp_path):
    with serve_scripted(tmp_path) as served:
        served.models.last_error = f"{tmp_path}/x.gguf: broken; see /opt/other/place/y.bin"
        told = served.request("GET", "/healthz")[1]["last_error"]
        assert told == f"{tmp_path.name}/x.gguf: broken; see y.bin"


# ── the log ──


def formatted(form, record, most=200):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.JsonLines(most) if form == "json" else logs.TextLines(most))
    handler.handle(record)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_line_of_the_log_is_one_line(form):
    record = logging.LogRecord("x", 20, "f", 1, "%s", ("a\n2026-01-01 ERROR forged\x1b[2J\u2028\x9b\ud800" + "x" * 900,), None)
    out = formatted(form, record)
    assert out.count("\n") == 1 and "\x1b" not in out and "\u2028" not in out and "\x9b" not in out and len(out) < 400
    record = logging.LogRecord("x", 20, "f", 1, "at http://user:pw@host/v1 and https://key@h", (), None)
    assert (
        "user" not in formatted(form, record)
        and "key" not in formatted(form, record)
        and "://host/v1" in formatted(form, record)
    )


def test_a_traceback_forges_no_line():
    try:
        raise ValueError("x\n2026-01-01 00:00:00,000 INFO forged")
    except ValueError:
        record = logging.LogRecord("x", 40, "f", 1, "bug", (), sys.exc_info())
    lines = formatted("text", record).splitlines()
    assert all(line.startswith("    ") for line in lines[1:]) and len(lines) > 2
    assert "forged" in json.loads(formatted("json", record))["exception"]


def test_what_a_client_sends_stays_on_its_line(scripted, caplog):
    caplog.set_level(logging.INFO)
    schema = {"type": "object", "properties": {"a\nPOST forged 200\x1b[31m": {"type": "nonsense\nPOST"}}}
    scripted.chat("echo x", response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    raw(scripted, b"GET /\xc2\x9b%0a HTTP/1.1\r\nHost: x\r\n\r\n")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith(("POST", "GET"))]
    assert len(lines) == 2 and all("\n" not in line and "\x1b" not in line and "\x9b" not in line for line in lines), lines


# ── upstream ──


@pytest.fixture
def far():
    made = Far()
    yield made
    with contextlib.suppress(OSError):
        made.close()


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "continue_final_message", "messages", "tools"])
def test_a_template_variable_is_no_way_round(far, scripted, name):
    with serve_upstream(far.url) as front:
        for served in (front, scripted):
            status, told, _ = served.chat("Hi", chat_template_kwargs={name: "{{ 1 }}"})
            assert (status, told["error"]["param"]) == (400, "chat_template_kwargs")
    assert not far.bodies


def test_nobody_sees_where_the_upstream_is(far, caplog):
    caplog.set_level(logging.DEBUG)
    url = far.url.replace("http://", "http://user:pass@word@") + "/v1"
    with serve_upstream(url) as front:
        front.chat("Hi")
        assert far.heads[-1]["Authorization"].startswith("Basic ")
        told = [front.request("GET", path)[1] for path in ("/", "/v1/models", "/healthz", "/capabilities")]
        far.script = far.answer(b"nonsense", go_on=False)
        told.append(front.chat("Hi")[1])
        far.close()
        until(lambda: front.models.last_error or front.request("GET", "/health")[0] == 503)
        told += [front.chat("Hi")[1], front.request("GET", "/healthz")[1]]
    port = far.url.rsplit(":", 1)[1]
    assert not [one for one in told if "127.0.0.1" in json.dumps(one) or port in json.dumps(one)], told
    assert "pass" not in caplog.text and "user" not in caplog.text


def endless(*pieces):
    def script(connection, _):
        connection.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for i in range(100_000):
            connection.sendall(pieces[i % len(pieces)])
        return False

    return script


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "pieces",
    [
        [piece("x" * 10_000)],
        [piece("x")],
        [b"64\r\n" + b": xx\n" * 20 + b"\r\n"],
        [b"400\r\n" + b"x" * 1024 + b"\r\n"],
        [chunk()],
    ],
)
def test_an_upstream_that_does_not_stop_is_stopped(far, pieces, stream):
    with serve_upstream(far.url, request_timeout=60) as front:
        far.script = endless(*pieces)
        status, told, _ = front.chat("Hi", max_tokens=5, stream=stream)
        text = json.dumps(told) if not stream or status != 200 else told.decode()
        assert (status == 502 or stream) and "more than it was asked for" in text
        assert len(text) < 1_000_000


@pytest.mark.parametrize(("sent", "told"), [("7", "7"), ("1\r\n X-Evil: 1", "1"), ("soon", "1"), ("9" * 30, "1")])
def test_retry_after_is_checked(far, sent, told):
    with serve_upstream(far.url) as front:
        far.script = lambda connection, _: connection.sendall(
            reply(429, {"error": {"message": "busy"}}, f"Retry-After: {sent}\r\n")
        )
        status, _, headers = front.chat("Hi")
        assert (status, headers["Retry-After"], headers["X-Evil"]) == (429, told, None)


def test_a_list_of_models_is_bounded(far):
    far.listing = {"data": [{"id": "x" * 9999}, {"id": "bad\x1bname"}, {"id": "good"}]}
    with serve_upstream(far.url) as front:
        assert front.models.engine.info.models == ("good",)
    far.listing = b"[" * 100_000
    with serve_upstream(far.url, ready=False) as front:
        until(lambda: "recursion" in getattr(front.models.engine, "why", ""))
        far.listing = b""
        front.wait_ready()
