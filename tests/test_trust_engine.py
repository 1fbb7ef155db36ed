"""What a client, a model's files or a broken library can do to the engine's side: little, and to nobody else.

Each test fails when its guard is taken out.
"""

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from multiprocessing import Pipe

import pytest
from conftest import ROOT, serve_scripted, sse, until
from scripted import Scripted
from test_engine import Script, finish, finish_all, prompt, text

import children
import engine as engine_module
from api_request import Constraint
from children import Child, begin_ahead, clock_seconds, end_spare, family
from engine import (
    Answer,
    Delta,
    Details,
    EngineFailed,
    EngineLoop,
    EngineSpec,
    Prompt,
    QueueFull,
    Refused,
    Sampling,
    Started,
    TokenLogprob,
    pack,
    pack_event,
    public,
    unpack,
    unpack_event,
)
from engine_handle import Engine, Outbox, Timeouts
from turns import Turns
from workshop import Closed, Order, Workshop

# Ends when the message says so, with the rest in front of it.
TEMPLATE = """{% if messages[-1].content == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}
{% elif messages[-1].content == 'power' %}{{ 7 ** (messages | length * 999999999) }}
{% elif messages[-1].content == 'memory' %}{{ 'x' * 2000000000 }}
{% else %}{{ messages[-1].content }}{% endif %}"""
TEMPLATE = TEMPLATE.replace("\n", "")


@contextlib.contextmanager
def templated(folder, source=TEMPLATE, prepare_timeout=1.0, **options):
    (folder / "template").write_text(source)
    limits = {"prepare_timeout": prepare_timeout}
    with serve_scripted(folder, kind="Templated", lives=limits, **options) as served:
        yield served


def message(text):
    return [{"role": "user", "content": text}]


def said(reply):
    return reply[1]["choices"][0]["message"]["content"]


def error(reply):
    status, body, _ = reply
    return status, body["error"]["param"], body["error"]["code"]


def in_background(target):
    found = []
    thread = threading.Thread(target=lambda: found.append(target()), daemon=True)
    thread.start()
    return thread, found


def gone(*pids):
    """They have ended, though nobody may have waited for them."""
    return not any(row.state != "Z" for pid in pids for row in family(pid) if row.pid == pid)


# ────────────────────────────────────────────── stop ids, choices, memory ────────────────────────────────────────


def loop_over(tmp_path, slots=2):
    ours, theirs = Pipe()
    loop = EngineLoop(theirs, Scripted(EngineSpec("scripted:Scripted", str(tmp_path), slots), lambda fraction: None))
    loop.pipe = ours
    return loop


@pytest.mark.parametrize("length, told", [(999_999, True), (100, False), (None, False)])
def test_a_length_beyond_the_context_is_told(tmp_path, caplog, monkeypatch, length, told):
    ours, theirs = Pipe()
    ours.send(("close",))
    monkeypatch.setattr(engine_module.gc, "freeze", lambda: None)  # it is not alone in this process
    engine_module.run_engine(theirs, EngineSpec("scripted:Scripted", str(tmp_path), 2, length=length))
    assert ("--length 999999 is more than" in caplog.text) == told


def test_stop_ids_are_few_and_known(scripted):
    body = {"messages": message("echo a"), "stop_token_ids": [7] * 257}
    assert error(scripted.request("POST", "/v1/chat/completions", body))[:2] == (400, "stop_token_ids")
    status, reply, _ = scripted.chat("echo a", stop_token_ids=[1, 256])
    assert (status, reply["error"]["param"]) == (400, "stop_token_ids")  # the scripted vocabulary has 256 tokens
    assert said(scripted.chat("echo abc", stop_token_ids=[ord("b")])) == "a"


def test_one_set_of_stop_ids_for_a_job(tmp_path):
    loop = loop_over(tmp_path)
    sampling = Sampling(n=4, stop_token_ids=tuple(range(200)), logit_bias=((3, 1.0),))
    loop.submit(1, [replace(prompt(f"echo {i}"), details=True) for i in range(5)], sampling, "")
    while loop.work:
        loop.catch_up()
    choices = list(loop.waiting)
    assert len(choices) == 5 and len({id(choice.ends) for choice in choices}) == 1  # and siblings come when they are needed
    told = [choice.request.told for choice in choices]
    assert len(told) == 5 and len({id(one["stop_token_ids"]) for one in told}) == 1
    assert told[0]["max_tokens"] == loop.backend.context - len("echo 0") and "constraint" not in told[0]


def test_prompts_times_n_is_bounded(scripted):
    body = {"prompt": ["echo a"] * 256, "n": 3}
    assert error(scripted.request("POST", "/v1/completions", body))[:2] == (400, "n")


def test_ids_wait_in_an_array(tmp_path):
    loop = loop_over(tmp_path)
    loop.submit(1, [Prompt(text="x" * 1500)], Sampling(max_tokens=5), "")
    loop.catch_up()
    (choice,) = loop.waiting
    assert sys.getsizeof(choice.request.ids) < 5 * 1500
    assert choice.request.text == ""  # nobody will ask for it


# ─────────────────────────────────────────────── constraints: measured first ─────────────────────────────────────

DEEP: dict = {}
for _ in range(200):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"choice": ["x" * 3_600_000]}},
        {"structured_outputs": {"choice": [f"w{i}" for i in range(30_000)]}},
        {"structured_outputs": {"json": {"enum": [f"w{i}" for i in range(30_000)]}}},
        {"structured_outputs": {"regex": "a" * 300_000}},
        {"structured_outputs": {"json": DEEP}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"description": "x" * 300_000}}}},
    ],
)
def test_constraints_are_measured_before_any_work(scripted, fields, monkeypatch):
    orders = []
    monkeypatch.setattr(scripted.models.engine.workshop, "put", orders.append)
    assert error(scripted.chat("echo a", **fields)) == (400, next(iter(fields)), "unsupported_constraint")
    assert not orders


def test_a_finished_text_is_not_checked_for_ever():
    """The engine has followed the grammar; where something cut the text, it is not said to satisfy what nobody has looked at."""
    words = [f"{i} " * 20 for i in range(1000)]
    for kind, source in (("choice", words), ("json", {"items": {"enum": words}}), ("regex", "(a|b|ab)*" * 100)):
        constraint = Constraint(kind, source, "structured_outputs")
        assert constraint.fault("ab" * 1_000_000, cut=False) is None
        assert "too long" in constraint.fault("ab" * 1_000_000, cut=True)
    assert Constraint("choice", words, "structured_outputs").fault("0 ", cut=False)  # what is small is looked at


def test_a_bad_constraint_is_a_400_that_names_its_field(scripted):
    for field, value in (
        ("json_schema", {"type": "nonsense"}),
        ("guided_regex", "("),
        ("structured_outputs", {"regex": "(?=a)"}),
        ("structured_outputs", {"grammar": "root ::= missing"}),
        ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}),
    ):
        assert error(scripted.chat("echo a", **{field: value})) == (400, field, "unsupported_constraint"), field
    assert said(scripted.chat("echo yes", structured_outputs={"choice": ["yes"]})) == "yes"
    assert scripted.models.engine.jobs == {}


def test_the_grammar_comes_to_the_engine_and_the_constraint_does_not(tmp_path):
    script = Script(tmp_path).ready()
    try:
        job = script.engine.submit(
            [replace(prompt("echo yes"), details=True)],
            Sampling(constraint=("choice", ["yes"], "structured_outputs"), max_tokens=5),
        )
        details = next(event for event in finish(job) if isinstance(event, Details))
        assert '"yes"' in details.sampling["grammar"]
    finally:
        script.engine.close()


# ─────────────────────────────────────────────────── chat templates ──────────────────────────────────────────────


@pytest.mark.parametrize("bomb", ["loop", "power", "memory"])
def test_a_template_that_runs_wild_is_its_own_requests(tmp_path, bomb):
    with templated(tmp_path) as served:
        victim, answer = in_background(
            lambda: served.request("POST", "/v1/completions", {"prompt": "forever", "stream": True, "max_tokens": 1500})
        )
        until(lambda: any("forever" in line for line in served.calls()))
        reply = served.chat(bomb)
        assert error(reply)[:2] == (400, "messages")
        assert ("MemoryError" if bomb == "memory" else "--prepare-timeout") in reply[1]["error"]["message"]
        assert said(served.chat("echo x")) == "x"  # by the next process
        victim.join(60)
        assert len("".join(chunk["choices"][0]["text"] for chunk in sse(answer[0][1]))) == 1500
        assert served.models.ready and served.calls().count("load") == 1


def test_a_template_that_cannot_even_be_compiled_does_not_hold_up_the_load(tmp_path):
    with templated(tmp_path, "{{ 7 ** 999999999 }}") as served:
        assert error(served.chat("echo x"))[:2] == (400, "messages")
        workshop = served.models.engine.workshop
        until(lambda: workshop.broken and workshop.child is None)
        workshop.start = None  # it is not tried again
        assert error(served.chat("echo x"))[:2] == (400, "messages")
        assert served.request("POST", "/v1/completions", {"prompt": "echo x"})[1]["choices"][0]["text"] == "x"


def test_other_routes_render_there_too(tmp_path):
    with templated(tmp_path) as served:
        for path in ("/apply-template", "/tokenize"):
            assert error(served.request("POST", path, {"messages": message("loop")}))[:2] == (400, "messages"), path
        assert served.request("POST", "/apply-template", {"messages": message("hello")})[1] == {"prompt": "hello"}
        assert served.request("POST", "/tokenize", {"messages": message("abc")})[1]["tokens"] == [97, 98, 99]


def test_who_hangs_up_frees_the_workshop(tmp_path):
    with templated(tmp_path, prepare_timeout=10_000) as served:
        engine = served.models.engine
        job = engine.submit([prompt("loop")], Sampling())
        until(lambda: engine.workshop.running is job.order and engine.workshop.is_set_up and engine.workshop.since)
        waiting = engine.submit([prompt("loop")], Sampling())
        waiting.cancel()
        job.cancel()
        assert said(served.chat("echo x")) == "x"
        assert not engine.jobs and not engine.workshop.orders


@pytest.mark.parametrize(("path", "times"), [("/v1/chat/completions", 1), ("/apply-template", 4), ("/tokenize", 4)])
def test_lengths_are_limited_on_every_route(tmp_path, path, times):
    most = times * 2000 * 32
    with templated(tmp_path) as served:
        workshop = served.models.engine.workshop
        until(lambda: workshop.is_set_up and not workshop.running)
        before = workshop.child
        for messages in (
            message("x" * (most + 32)),
            message("x") * (times * 2000 + 1),
            [{"role": "assistant", "content": "", "reasoning_content": "x" * (most + 32)}],
        ):
            status, reply, _ = served.request("POST", path, {"messages": messages})
            assert (status, reply["error"]["code"]) == (400, "context_length_exceeded")
        status, reply, _ = served.request("POST", "/detokenize", {"tokens": [97] * 8001})
        assert (status, reply["error"]["param"]) == (400, "tokens")
        assert workshop.child is before and not served.models.engine.jobs


# ───────────────────────────────────────────────────── the workshop ──────────────────────────────────────────────


class Repeat:
    """A workshop's work: says what it is told, or does not."""

    def __call__(self, order, tell):
        tell("stage")
        while order == b"for ever":
            pass
        if order == b"die":
            os._exit(1)
        return order


class Shop:
    def __init__(self, seconds=1000.0):
        self.workshop, self.said = Workshop("test_trust_engine:Repeat", seconds), []

    def put(self, client, data, **more):
        name = f"{client} {data.decode()}"
        order = Order(client, lambda: data, lambda _: self.said.append(name), lambda stage, why: self.said.append(why), **more)
        self.workshop.put(order)
        return order


@pytest.fixture
def shop():
    made = Shop()
    yield made
    made.workshop.close()


def test_orders_take_turns_by_client(shop):
    first = shop.put("a", b"for ever")
    until(lambda: shop.workshop.since)
    for i in range(3):
        shop.put("a", b"%d" % i)
    shop.put("b", b"0")
    shop.workshop.drop(first)
    until(lambda: len(shop.said) == 5)
    assert shop.said[1:] == ["a 0", "b 0", "a 1", "a 2"]
    assert "nobody" in shop.said[0]


def test_a_deadline_and_a_death(shop):
    shop.workshop.seconds = 0.3
    for data in (b"for ever", b"die", b"well"):
        shop.put("a", data)
    until(lambda: len(shop.said) == 3)
    assert "--prepare-timeout" in shop.said[0] and "memory" in shop.said[1] and shop.said[2] == "a well"


def test_nothing_is_left_of_a_closed_workshop(shop):
    shop.put("a", b"for ever")
    until(lambda: shop.workshop.since)
    pid = shop.workshop.child.process.pid
    shop.workshop.close()
    until(lambda: gone(pid) and shop.workshop.child is None)
    with pytest.raises(Closed):
        shop.put("a", b"late")


def test_turns():
    turns = Turns()
    for client, item in (("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5)):
        turns.put(client, item)
    turns.put_first("a", [-1, 0])
    assert len(turns) == 7
    turns.keep(lambda item: item != 2)
    assert [turns.take() for _ in range(3)] == [-1, 4, 0]
    assert turns.take("a") == 1 and [turns.take(), turns.take()] == [5, 3] and not turns
    with pytest.raises(LookupError):
        turns.take()


# ───────────────────────────────────────────────── between two steps ─────────────────────────────────────────────


class Clock:
    """Stands still but for what costs time."""

    def __init__(self, monkeypatch, backend, step=0.1, read=1.0):
        self.now, self.log = 100.0, []
        for name, cost in (("step", step), ("tokenize", read)):
            monkeypatch.setattr(backend, name, self.timed(name, getattr(backend, name), cost))
        monkeypatch.setattr(engine_module.time, "monotonic", lambda: self.now)

    def timed(self, name, call, cost):
        def timed(*arguments):
            self.now += cost
            self.log.append(name if name == "step" else arguments[0])
            return call(*arguments)

        return timed


def test_reading_prompts_leaves_half_of_the_time_to_steps(tmp_path, monkeypatch):
    loop = loop_over(tmp_path)
    clock = Clock(monkeypatch, loop.backend)
    loop.submit(1, [prompt("forever")], Sampling(), "victim")
    loop.submit(2, [Prompt(text=f"a{i}") for i in range(7)], Sampling(), "a")
    loop.submit(3, [Prompt(text="b0")], Sampling(), "b")
    for _ in range(100):
        loop.pipe.send(("cancel", -1))  # run() would wait for the next message once in a while
        loop.receive()
        loop.admit()
        loop.timed_step()
        loop.flush()
    reads = [at for at, what in enumerate(clock.log) if what != "step"]
    assert [clock.log[at] for at in reads[:4]] == ["forever", "a0", "b0", "a1"]  # in turns by client
    assert min(b - a for a, b in zip(reads[2:], reads[3:], strict=False)) > 18  # a second's reading, two of steps


class Slow(Scripted):
    """Reads 100 tokens of each prompt in a step, which then takes so much longer."""

    def start(self, ids, sampling):
        seq, cached = super().start(ids[:7], sampling)
        self.left = getattr(self, "left", {}) | {seq: len(ids)}
        return seq, cached

    def step(self):
        read = [step for step in super().step() if self.left[step.seq] <= 0]
        for seq in self.live:
            self.clock.now += 0.9 if self.left[seq] > 0 else 0
            self.left[seq] -= 100
        return read


def test_long_prompts_leave_half_of_the_steps_time_to_answers(tmp_path, monkeypatch):
    ours, theirs = Pipe()
    loop = EngineLoop(theirs, Slow(EngineSpec("scripted:Scripted", str(tmp_path), 8), lambda fraction: None))
    clock = loop.backend.clock = Clock(monkeypatch, loop.backend, step=0.1, read=0.0)
    loop.submit(1, [Prompt(text="forever")], Sampling(), "victim")
    loop.admit()
    for _ in range(3):
        loop.timed_step()
    loop.submit(2, [Prompt(text="forever " + "x" * 900) for _ in range(14)], Sampling(max_tokens=1), "a")
    loop.submit(3, [Prompt(text="forever") for _ in range(3)], Sampling(), "b")
    began, steps, most, long = clock.now, clock.log.count("step"), 0, 0
    while clock.now < began + 60:
        loop.admit()
        most = max(most, len(loop.unread()))
        long = max(long, sum(length > 900 for length in loop.unread()))
        loop.timed_step()
    assert clock.log.count("step") - steps > 0.4 * 600  # of those that it would have had alone
    assert (long, most) == (1, 4)  # one after the other, and another client's three short ones beside the first
    assert len(loop.waiting) <= 14 - 2  # and prompts do go on
    loop.cancel(1)
    loop.cancel(3)
    while loop.waiting or loop.active:  # nobody waits for a step: as fast as can be
        loop.admit()
        loop.timed_step()


def test_long_prompts_that_come_together_leave_a_slot(tmp_path):
    """Nobody is answered yet, so they begin at once; but who comes then does not wait until the first of them has ended."""
    loop = loop_over(tmp_path, slots=4)
    loop.submit(1, [Prompt(text="forever " + "x" * 900) for _ in range(6)], Sampling(max_tokens=1), "a")
    for _ in range(20):
        loop.admit()
    assert len(loop.active) == 3 and len(loop.waiting) == 3
    loop.submit(2, [Prompt(text="forever")], Sampling(), "b")
    for _ in range(20):
        loop.admit()
    assert [len(choice.request.ids) > 900 for choice in loop.active.values()] == [True, True, True, False]


def test_grammars_that_are_new_come_one_by_one(tmp_path, monkeypatch):
    loop = loop_over(tmp_path, slots=6)
    clock = Clock(monkeypatch, loop.backend, read=0.0)
    start, known = loop.backend.start, set()

    def compiling(ids, sampling):
        clock.now += 0.5 * (sampling.grammar not in {None, *known})
        known.add(sampling.grammar)
        return start(ids, sampling)

    loop.backend.start = compiling
    loop.submit(0, [prompt("forever")], Sampling(), "victim")
    for i in range(3):
        loop.submit(1 + i, [prompt("forever")], Sampling(grammar=f'root ::= "{i}"'), "a")
    loop.submit(9, [prompt("forever")], Sampling(grammar='root ::= "0"'), "b")
    began = []
    for _ in range(20):
        loop.admit()
        began.append(len(loop.active))
        loop.timed_step()
    assert began[0] == 3 and began[-1] == 5  # the victim, "0" twice; then one each half second
    assert began.index(4) >= 4 and began.index(5) >= 8 and clock.log.count("step") == 20


def test_the_outbox_is_bounded_and_gives_back():
    box = Outbox()
    box.put(1, b"x" * Outbox.LIMIT)  # one may be longer than all
    with pytest.raises(QueueFull):
        box.put(2, b"x")
    box.put(3, b"cancel", bounded=False)
    assert box.take_back(1) and not box.take_back(1)
    box.put(2, b"x")
    assert [box.get(), box.get()] == [b"cancel", b"x"] and box.size == 0
    box.close()
    assert box.get() is None


def test_what_was_not_sent_is_taken_back(tmp_path):
    script = Script(tmp_path, max_jobs=100).ready()
    try:
        os.kill(script.engine.process.pid, signal.SIGSTOP)
        jobs = [script.engine.submit([Prompt(text=f"{i}" * 20_000) for i in range(100, 200)], Sampling()) for _ in range(5)]
        assert script.engine.outbox.size > 10_000_000
        for job in jobs:
            job.cancel()
        assert script.engine.outbox.size < 10_000  # but for the cancel of the one that the writer has in hand
        os.kill(script.engine.process.pid, signal.SIGCONT)
        assert text(finish(script.submit("echo x"))) == "x"
    finally:
        script.engine.close()


# ─────────────────────────────────────────────────────── liveness ────────────────────────────────────────────────


def test_a_stopped_engine_is_told_and_replaced(tmp_path):
    with serve_scripted(tmp_path) as served:
        engine = served.models.engine
        engine.QUIET_S, engine.HANGS_S, engine.ENDS_S = 0.2, 0.2, 1e9
        victim, answer = in_background(lambda: served.chat("forever"))
        until(lambda: any("forever" in line for line in served.calls()))
        os.kill(engine.process.pid, signal.SIGSTOP)
        until(lambda: served.request("GET", "/health")[0] == 503)
        assert not answer
        os.kill(engine.process.pid, signal.SIGCONT)  # it was only a pause
        victim.join(60)
        assert answer[0][0] == 200 and served.request("GET", "/health")[0] == 200
        victim, answer = in_background(lambda: served.chat("forever"))
        until(lambda: engine.jobs and all(job.running for job in engine.jobs.values()))
        os.kill(engine.process.pid, signal.SIGSTOP)
        until(lambda: engine.hangs)
        engine.ENDS_S = 0.5
        victim.join(60)
        assert answer[0][0] == 500 and "hung" in answer[0][1]["error"]["message"]
        assert said(served.chat("echo x")) == "x"
        assert gone(engine.process.pid) and served.calls().count("load") == 2


def test_one_that_computes_does_not_hang(tmp_path):
    script = Script(tmp_path).ready()
    try:
        engine, looks = script.engine, []
        engine.QUIET_S, engine.HANGS_S, engine.ENDS_S = 0.1, 1.5, 2.0
        look = engine.pulse.still
        engine.pulse.still = lambda: looks.append(look()) or looks[-1]
        (tmp_path / "spin").touch()
        job = script.submit("echo x")
        until(lambda: len(looks) > 5)
        assert engine.ready and not engine.hangs
        engine.patience = 0
        failed = finish(job)[-1]
        assert isinstance(failed, EngineFailed) and "--engine-silence" in str(failed)
    finally:
        (tmp_path / "spin").unlink()
        script.engine.close()


def test_an_engine_without_work_may_be_silent(tmp_path):
    script = Script(tmp_path).ready()
    try:
        engine = script.engine
        engine.QUIET_S, engine.HANGS_S, engine.ENDS_S, engine.patience = 0.0, 0.0, 0.0, 0.0
        for _ in range(3):
            engine.look_after()
        assert not engine.hangs
        assert text(finish(script.submit("echo x"))) == "x"
    finally:
        script.engine.close()


def test_what_waits_for_the_workshop_is_no_work_of_the_engine(tmp_path):
    with templated(tmp_path, prepare_timeout=10_000) as served:
        engine = served.models.engine
        engine.QUIET_S, engine.HANGS_S, engine.ENDS_S, engine.patience = 0.0, 0.0, 0.0, 0.0
        job = engine.submit([prompt("loop")], Sampling())
        until(lambda: engine.workshop.is_set_up and engine.workshop.since)
        for _ in range(3):
            engine.look_after()
        assert engine.ready and not engine.hangs
        job.cancel()


def test_a_load_has_a_deadline(tmp_path):
    (tmp_path / "slow").touch()
    engine = Engine(EngineSpec("scripted:Scripted", str(tmp_path)), 4, 60, lambda engine: None, Timeouts(load=1))
    until(lambda: engine.dead)
    assert "--load-timeout" in engine.dead and gone(engine.process.pid)


def test_clocks_of_ps():
    assert [clock_seconds(text) for text in ("0:00.52", "12:34", "01:02:03", "2-00:00:01")] == [0.52, 754, 3723, 172801]


# ───────────────────────────────────────────────── the end of a server ───────────────────────────────────────────

SERVER = """
import sys, threading
sys.path[:0] = [{root!r}, {tests!r}]
from conftest import serve_scripted
from pathlib import Path
if __name__ == "__main__":
    with serve_scripted(Path({folder!r}), kind="Templated", lives={{"prepare_timeout": 1e6}}) as served:
        engine = served.models.engine
        threading.Thread(target=served.chat, args=("loop",), daemon=True).start()
        while not (engine.workshop.child and engine.workshop.is_set_up and engine.workshop.since):
            pass
        print(engine.process.pid, engine.workshop.child.process.pid, flush=True)
        threading.Event().wait()
"""


@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_outlives_a_server_that_was_killed(tmp_path, stopped):
    (tmp_path / "template").write_text(TEMPLATE)
    script = tmp_path / "serve.py"
    script.write_text(SERVER.format(root=str(ROOT), tests=str(ROOT / "tests"), folder=str(tmp_path)))
    server = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in server.stdout.readline().split()]
    assert len(pids) == 2 and not gone(pids[0]) and not gone(pids[1])
    everyone = [row.pid for row in family(server.pid) if row.pid != server.pid]
    if stopped:
        os.kill(pids[0], signal.SIGSTOP)  # only the kernel can end it now
    server.kill()
    server.wait()
    until(lambda: gone(*everyone), timeout=5)


def sleep_for_ever(conn):
    signal.pause()


def test_a_child_ends_with_its_lifeline():
    """Where the kernel does not see to it: a thread of its own waits for the end of the pipe."""
    child = Child(sleep_for_ever)
    pid = child.process.pid
    assert not gone(pid)
    child.close()
    until(lambda: gone(pid))


def say_what_is_imported(conn, *names):
    conn.send([name in sys.modules for name in names])


def test_a_process_may_begin_before_its_work_is_known(tmp_path, monkeypatch):
    (tmp_path / "a_broken_module.py").write_text("raise RuntimeError('no such processor')")
    monkeypatch.syspath_prepend(tmp_path)
    begin_ahead("colorsys", "no_such_module", "a_broken_module")
    ahead = children._spare.process
    child = Child(say_what_is_imported, "colorsys", "tabnanny")
    assert child.process is ahead and child.conn.recv() == [True, False]
    child.kill()
    child.close()
    begin_ahead()
    dead = children._spare
    dead.kill()
    child = Child(say_what_is_imported, "colorsys")
    assert child.process is not dead.process and dead.conn.closed and child.conn.recv() == [False]
    child.kill()
    child.close()


def test_a_process_that_nobody_needs_ends():
    begin_ahead()
    pid = children._spare.process.pid
    end_spare()
    assert gone(pid) and children._spare is None
    end_spare()


def group_gone(number):
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("flags", [["--model-dir", "no-such-folder"], ["--help"]])
def test_a_start_that_comes_to_nothing_leaves_no_process(flags):
    code = [sys.executable, str(ROOT / "openai_api_endpoint.py"), *flags]
    began = subprocess.Popen(code, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    said = began.communicate(timeout=60)[1]
    assert began.returncode in (0, 2) and said.count("\n") == (began.returncode == 2), said
    until(lambda: group_gone(began.pid))


def test_the_thread_that_starts_an_engine_may_end(tmp_path):
    made = []
    thread = threading.Thread(target=lambda: made.append(Script(tmp_path).ready()))
    thread.start()
    thread.join()
    try:
        assert text(finish(made[0].submit("echo x"))) == "x"
    finally:
        made[0].engine.close()


# ──────────────────────────────────────────────── what an engine may say ─────────────────────────────────────────

EVENTS = [
    Started(3, None, 1.5),
    Details("p", [1, 2], {"n": 1, "stop": ("a",)}),
    Delta(1, "text", 2, "stop", (TokenLogprob(b"\xff", None, ((b"a", -1.0),), False),), 2.5, "call", "call_1"),
    Answer({"vectors": [[0.5]], "tokens": 3}),
    Refused("no", "prompt", "code"),
    EngineFailed("broken"),
]


def test_events_come_as_they_went():
    numbers = list(range(len(EVENTS)))
    kind, payload = unpack(pack("events", [pack_event(i, event) for i, event in zip(numbers, EVENTS, strict=True)]))
    came = [unpack_event(*one) for one in payload]
    assert kind == "events" and [job for job, _ in came] == numbers
    assert [repr(event) for _, event in came] == [repr(event) for event in EVENTS]
    assert isinstance(came[2][1].logprobs[0], TokenLogprob)


def test_a_message_names_no_class():
    for harmless in (Delta(0, "", 0), Started(1, 1), os.getcwd):
        with pytest.raises(pickle.UnpicklingError):
            unpack(pickle.dumps(("events", harmless)))


def test_an_engine_that_was_taken_over_is_ended(tmp_path):
    made = []
    engine = Engine(EngineSpec("scripted:TakenOver", str(tmp_path)), 4, 60, made.append)
    until(lambda: engine.dead)
    assert "no message of its own" in engine.dead and gone(engine.process.pid)
    assert not (tmp_path / "touched").exists()


def test_a_reason_is_told_without_paths():
    assert public("/home/ann/models/m.gguf: no\x1b[2J\nspace") == "m.gguf: no [2J space"
    assert public(r"C:\models\m.gguf: 3/4 done, and/or not") == "m.gguf: 3/4 done, and/or not"
    assert public("http://user:pw@host:8000 has gone") == "the upstream has gone"
    assert len(public("x" * 1000)) == 300


def test_last_error_has_no_paths(tmp_path):
    (tmp_path / "fail").touch()
    with serve_scripted(tmp_path, ready=False) as served:
        until(lambda: served.models.last_error)
        told = json.dumps(served.request("GET", "/healthz")[1])
        assert "the script says: no" in told and str(tmp_path.parent) not in told
        status, reply, _ = served.chat("echo x")
        assert status == 503 and str(tmp_path.parent) not in json.dumps(reply)


def test_many_choices_still_all_come(tmp_path):
    script = Script(tmp_path, slots=3).ready()
    try:
        job = script.engine.submit([prompt(f"echo {i}") for i in range(20)], Sampling(n=4))
        events = finish_all(job, 80)
        shown = {i: "".join(e.text for e in events if isinstance(e, Delta) and e.choice == i) for i in range(80)}
        assert shown == {i: str(i // 4) for i in range(80)}
    finally:
        script.engine.close()
