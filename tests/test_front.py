"""The way of a delta from the engine's reader thread to its client: who writes it, in what order, and what a slow client costs."""

import contextlib
import gc
import queue
import re
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import cancelled_at, serve_scripted, sse, until
from test_endpoint import OK, body, idle, sized

import http11
from api_reply import CHAT_SHAPE, Choice, Chunks, Completion
from engine import Delta
from engine_handle import Job
from openai_api_endpoint import Generation

TEXT = 'Hé "☃"\t\\ back\n' * 40  # 760 tokens of the scripted backend, many of them half a character


@pytest.fixture
def writes(monkeypatch):
    """How many bytes each write_now was given, and how many it took."""
    seen, write_now = [], http11.Connection.write_now

    def counting(self, data):
        seen.append((len(data), write_now(self, data)))
        return seen[-1][1]

    monkeypatch.setattr(http11.Connection, "write_now", counting)
    return seen


def ask(served, content, small=False, version="1.1", **fields):
    sock = socket.socket()
    if small:  # its window holds a few chunks
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    sock.settimeout(60)
    sock.connect((served.host, served.port))
    sock.sendall(sized(body(content, stream=True, **fields), "Connection: close", version=version))
    return sock


def rest(sock):
    out = b""
    while data := sock.recv(65536):
        out += data
    return out


def dechunk(raw):
    """The body of a chunked reply, and the sizes of its chunks."""
    _, _, raw = raw.partition(b"\r\n\r\n")
    data, sizes = b"", []
    while True:
        line, _, raw = raw.partition(b"\r\n")
        sizes.append(int(line, 16))
        if not sizes[-1]:
            return data, sizes
        data, raw = data + raw[: sizes[-1]], raw[sizes[-1] + 2 :]


def text(events, index=0):
    return "".join(c["delta"].get("content", "") for e in events for c in e["choices"] if c["index"] == index)


def asleep(served):
    """Its only job's handler waits: each delta from here on is a chunk of its own."""
    jobs = list(served.models.engine.jobs.values())
    return len(jobs) == 1 and jobs[0].running and jobs[0].sink is not None


@contextlib.contextmanager
def small_buffers(folder, **options):
    with serve_scripted(folder, **options) as served:
        served.server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)  # what is accepted has it too
        yield served


def test_a_stream_is_the_plain_answer(scripted, writes):
    plain = scripted.chat("echo " + TEXT, seed=1)[1]
    assert plain["choices"][0]["message"]["content"] == TEXT
    with ask(scripted, "echo " + TEXT, stream_options={"include_usage": True}) as sock:
        raw = rest(sock)
    events = sse(dechunk(raw)[0])
    assert text(events) == TEXT
    assert events[-1]["usage"] == plain["usage"]
    assert len(writes) > len(TEXT) // 2  # the handler slept
    with ask(scripted, "echo " + TEXT, version="1.0") as sock:
        head, _, data = rest(sock).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert text(sse(data)) == TEXT


def test_a_chunk_for_every_token(scripted):
    scripted.script("hold")
    with ask(scripted, "forever", max_tokens=300) as sock:
        until(lambda: asleep(scripted))
        scripted.script("hold", False)
        data, _ = dechunk(rest(sock))
    pieces = [event["choices"][0]["delta"].get("content") for event in sse(data)]
    assert pieces == ["", *"x" * 300, None]


def test_choices_each_keep_their_order(scripted, writes):
    events = scripted.stream("echo " + TEXT, n=2, stop=["back\nHé", "no"])
    other = scripted.stream("echo " + TEXT, n=2, max_tokens=400)
    for i in range(2):
        assert text(events, i) == TEXT[: TEXT.index("back\nHé")]
        assert TEXT.startswith(text(other, i))
        assert [e["choices"][0]["finish_reason"] for e in other if e["choices"][0]["index"] == i][-1] == "length"
    assert writes


def test_completions(scripted):
    plain = scripted.request("POST", "/v1/completions", {"prompt": "echo " + TEXT, "max_tokens": 700})[1]
    raw = scripted.request("POST", "/v1/completions", {"prompt": "echo " + TEXT, "max_tokens": 700, "stream": True})[1]
    assert "".join(e["choices"][0]["text"] for e in sse(raw)) == plain["choices"][0]["text"]


def test_a_reader_that_stalls_and_goes_on(tmp_path, writes):
    with small_buffers(tmp_path) as served, ask(served, "echo " + TEXT, small=True) as sock:
        until(lambda: any(sent < size for size, sent in writes))  # it takes no more
        until(lambda: len(served.models.engine.jobs) == 0)  # the engine has waited for nobody
        data, _ = dechunk(rest(sock))
        assert text(sse(data)) == TEXT


def test_stalls_again_and_again(tmp_path, writes):
    with small_buffers(tmp_path) as served, ask(served, "echo " + TEXT, small=True) as sock:
        until(lambda: any(sent < size for size, sent in writes))  # the first time, however slow the engine is
        out = b""
        while data := sock.recv(3000):
            out += data
            time.sleep(0.01)
        assert text(sse(dechunk(out)[0])) == TEXT
    assert any(sent < size for size, sent in writes)


def test_one_that_stalls_holds_up_no_other(tmp_path, writes):
    with small_buffers(tmp_path) as served, ask(served, "forever", small=True, max_tokens=1900) as stalled:
        until(lambda: any(sent < size for size, sent in writes))
        assert text(served.stream("echo " + TEXT)) == TEXT
        data, _ = dechunk(rest(stalled))
        assert text(sse(data)) == "x" * 1900


def test_a_slow_reader_is_not_a_slow_engine(tmp_path):
    with small_buffers(tmp_path, request_timeout=2) as served, ask(served, "forever", small=True, max_tokens=1900) as sock:
        until(lambda: any(job.queue.qsize() > 50 for job in list(served.models.engine.jobs.values())))  # its handler is stuck
        served.script("hold")
        time.sleep(2.5)  # the client's; now it reads what there is, and the engine still has its two seconds
        sock.settimeout(0.3)
        out = b""
        with contextlib.suppress(TimeoutError):
            while data := sock.recv(65536):
                out += data
        served.script("hold", False)
        sock.settimeout(60)
        data, _ = dechunk(out + rest(sock))
    assert text(sse(data)) == "x" * 1900


@pytest.mark.parametrize("how", ["close", "reset", "in silence"])
def test_a_client_that_leaves_a_stream_that_runs(scripted, writes, how):
    sock = ask(scripted, "forever")
    until(lambda: len(writes) > 20)
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    if how == "in silence":  # nothing is written that would tell
        scripted.script("hold")
    sock.close()
    idle(scripted)
    scripted.script("hold", False)
    until(lambda: cancelled_at(scripted.calls(), 1))
    assert cancelled_at(scripted.calls(), 1) < 1900


def test_a_client_that_leaves_while_it_stalls(tmp_path, writes):
    with small_buffers(tmp_path) as served:
        sock = ask(served, "forever", small=True)
        until(lambda: any(sent < size for size, sent in writes))
        sock.close()
        idle(served)


def test_a_request_that_follows_is_not_an_end(scripted, writes):
    with socket.create_connection((scripted.host, scripted.port)) as sock:
        sock.sendall(sized(body("forever", stream=True, max_tokens=300)))
        until(lambda: len(writes) > 5)
        sock.sendall(sized(body("echo two"), "Connection: close"))
        out = rest(sock)
    assert out.count(OK) == 2
    assert sum(map(len, re.findall(rb'"content":"(x+)"', out))) == 300
    assert b'"content":"two"' in out


def test_an_error_after_many_chunks(scripted, writes):
    sock = ask(scripted, "forever")
    until(lambda: len(writes) > 20)
    scripted.models.engine.process.kill()
    data, sizes = dechunk(rest(sock))
    *chunks, error = sse(data)
    assert error["error"]["code"] == "engine_failed"
    assert set(text(chunks)) == {"x"}
    sock.close()


def test_a_fault_in_one_stream_is_its_own(scripted, monkeypatch):
    delta = Chunks.delta

    def faulty(self, given):
        if self.completion.model == "faulty" and self.completion.tokens > 50:
            raise KeyError("bug")
        return delta(self, given)

    monkeypatch.setattr(Chunks, "delta", faulty)
    other = []
    thread = threading.Thread(target=lambda: other.append(text(scripted.stream("echo " + TEXT))))
    thread.start()
    *chunks, error = scripted.stream("forever", model="faulty")
    assert error["error"]["code"] == "internal_error"
    assert text(chunks) == "x" * 50
    thread.join()
    assert other == [TEXT]


def test_silence_in_mid_stream(tmp_path, writes):
    with serve_scripted(tmp_path, request_timeout=0.3) as served, ask(served, "forever") as sock:
        until(lambda: len(writes) > 20)
        served.script("hold")
        data, _ = dechunk(rest(sock))
        assert sse(data)[-1]["error"]["type"] == "timeout_error"
        served.script("hold", False)


# ── engine.Job ──


def letter(char, finish=None):
    return Delta(0, char, 1, finish)


def test_threads_are_kept_for_as_many_as_run_at_once(tmp_path, monkeypatch):
    """And those that a crowd has brought leave, once they have waited."""
    monkeypatch.setattr(http11.Threads, "KEPT_S", 0.1)
    answered_by = set()
    with serve_scripted(tmp_path, slots=3) as served:
        workers = served.server.workers
        until(lambda: workers.all == workers.idle == 3)
        respond = http11.Connection.respond

        def noting(self):
            answered_by.add(threading.get_ident())
            respond(self)

        monkeypatch.setattr(http11.Connection, "respond", noting)
        for _ in range(30):
            until(lambda: workers.idle == 3)
            served.chat("echo in")
        assert len(answered_by) <= 3
        crowd = [socket.create_connection((served.host, served.port)) for _ in range(20)]
        until(lambda: workers.all == 20 and not workers.idle)
        assert served.chat("echo in")[0] == 200
        for sock in crowd:
            sock.close()
        until(lambda: workers.all == workers.idle == 3)
    until(lambda: workers.all == 0)


def test_a_thread_outlives_what_it_runs():
    threads, done = http11.Threads(), threading.Semaphore(0)
    for _ in range(50):
        threads.run(done.release)
        assert done.acquire(timeout=60)
        until(lambda: threads.idle)
    assert threads.all == 1
    gate = threading.Event()
    for _ in range(5):
        threads.run(gate.wait)  # nothing waits for another to be done
    assert (threads.all, threads.idle) == (5, 0)
    gate.set()
    until(lambda: threads.idle == 5)
    threads.dismiss()
    until(lambda: not threads.all)
    threads.run(done.release)  # a connection that was accepted while the server closed
    assert done.acquire(timeout=60)


def test_fewer_slots_keep_fewer_threads():
    threads = http11.Threads()
    threads.keep(8)
    gate = threading.Event()
    for _ in range(12):
        threads.run(gate.wait)
    gate.set()
    until(lambda: threads.idle == 12)
    began = time.monotonic()
    threads.keep(2)
    until(lambda: threads.all == threads.idle == 2)
    threads.dismiss()
    until(lambda: not threads.all)
    assert time.monotonic() - began < http11.Threads.KEPT_S  # nobody had to wait until its time was up


def test_threads_meet_in_any_order(monkeypatch):
    """What is given while those that have waited leave is run, each time once."""
    monkeypatch.setattr(http11.Threads, "KEPT_S", 0.001)
    threads, ran = http11.Threads(), []
    threads.keep(2)
    for number in range(3000):
        threads.run(lambda number=number: ran.append(number))
        if number % 7 == 0:
            time.sleep(0.001)
    until(lambda: len(ran) == 3000)
    assert sorted(ran) == list(range(3000))
    until(lambda: threads.all == threads.idle <= 2)
    threads.dismiss()
    until(lambda: not threads.all)


def test_a_thread_whose_time_is_up_runs_what_it_was_given_meanwhile():
    threads, given, done = http11.Threads(), threading.Event(), threading.Semaphore(0)

    class Late(type(threads.given)):
        def get(self, timeout):
            if not given.is_set():
                given.wait()
                raise queue.Empty
            return super().get(timeout=timeout)

    threads.given = Late()
    threads.run(done.release)
    assert done.acquire(timeout=60)
    until(lambda: threads.idle)
    threads.run(done.release)
    given.set()
    assert done.acquire(timeout=60)
    threads.dismiss()


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream": False}, {"response_format": {"type": "json_object"}}])
def test_what_a_request_held_is_free_when_it_ends(scripted, fields):
    """Without a collection: it holds no circle."""

    def held():
        return [one for one in gc.get_objects() if isinstance(one, (Generation, Job, Completion))]

    gc.collect()
    before = held()  # of other tests, and what they still hold
    gc.disable()
    try:
        assert scripted.request("POST", "/v1/chat/completions", body("echo in", **fields))[0] == 200
        until(lambda: all(any(one is old for old in before) for one in held()))
    finally:
        gc.enable()


def test_the_sink_has_its_turn_while_the_handler_waits():
    job, sunk = Job(None, 0, 1, ""), []
    job.put(letter("a"))
    assert job.take(0, lambda e: e.finish is None and not sunk.append(e)) == [letter("a")]  # it was there before
    job.put(letter("b"))
    assert (sunk, job.take(0)) == ([], [letter("b")])  # the handler was awake

    def say():
        until(lambda: job.sink)
        for event in map(letter, "cd"):
            job.put(event)
        job.put(letter("e", "stop"))
        job.put(letter("f"))

    thread = threading.Thread(target=say)
    thread.start()
    taken = job.take(60, lambda e: e.finish is None and not sunk.append(e))
    thread.join()
    assert sunk == [letter("c"), letter("d")]
    assert taken + job.take(0) == [letter("e", "stop"), letter("f")]


def test_what_has_come_comes_first():
    job, sunk = Job(None, 0, 1, ""), []
    job.put(letter("a"))
    get = job.queue.get

    class Quick(type(job.queue)):  # a producer that is faster than the handler
        def get(self, timeout):
            job.put(letter("b"))
            return super().get()

    job.queue = Quick()
    job.queue.put(get())
    assert job.take(0, lambda e: e.finish is None and not sunk.append(e)) == [letter("a"), letter("b")]
    job = Job(None, 0, 1, "")
    assert job.take(0, lambda e: e.finish is None and not sunk.append(e)) == []
    job.put(letter("c"))
    assert (sunk, job.take(0)) == ([], [letter("c")])


def test_what_a_socket_does_not_take_wakes_the_handler():
    job, took = Job(None, 0, 1, ""), []
    completion = Completion("id", "m", "fp", [Choice()], CHAT_SHAPE)
    handler = SimpleNamespace(streaming=True, framed=bytes, write_now=lambda data: took.append(data) or 3)
    generation = Generation(handler, job, completion, Chunks(completion, False), told=False)
    sink = generation.passing_on(Chunks(completion, False))
    assert sink(letter("a"))
    assert (generation.unsent, completion.tokens) == (took[0][3:], 1)
    assert job.take(60) == []  # it is awake
    assert not sink(letter("b"))
    assert (generation.unsent, completion.tokens, len(took)) == (took[0][3:], 1, 1)


def test_a_sink_that_is_full_and_one_that_breaks():
    def full(delta):
        return False

    def broken(delta):
        raise KeyError("bug")

    for sink, got in ((full, "[Delta"), (broken, "[KeyError")):
        job = Job(None, 0, 1, "")
        thread = threading.Thread(target=lambda job=job: (until(lambda: job.sink), job.put(letter("a"))))
        thread.start()
        assert str(job.take(60, sink)).startswith(got)
        thread.join()
        assert job.sink is None
    job.wake()
    assert job.take(60) == []


def test_order_holds_however_handler_and_producer_meet():
    job, seen = Job(None, 0, 1, ""), []
    numbers = range(20_000)

    def sink(delta):
        if delta.tokens % 7:  # every seventh is not taken
            seen.append(delta.tokens)
        return bool(delta.tokens % 7)

    thread = threading.Thread(target=lambda: [job.put(Delta(0, "", i)) for i in numbers])
    thread.start()
    while len(seen) < len(numbers):
        seen += [delta.tokens for delta in job.take(0.001, sink)]
    thread.join()
    assert seen == list(numbers)
