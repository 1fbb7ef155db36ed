"""The engine loop and its handle, without HTTP: order, slots, full queue, cancellation, death, close."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import cancelled_at, until

from engine import Delta, EngineFailed, EngineSpec, Prompt, QueueFull, Refused, Sampling, Started
from engine_handle import Engine
from pace import GrammarPace


def prompt(text):
    return Prompt(({"role": "user", "content": text},))


def finish(job, timeout=30):
    """All events of a job up to its end."""
    events, end = [], time.monotonic() + timeout
    while not events or not (isinstance(events[-1], Exception) or getattr(events[-1], "finish", None)):
        assert time.monotonic() < end, events
        events += job.take(0.1)
    return events


def text(events):
    return "".join(e.text for e in events if isinstance(e, Delta))


class Script:
    def __init__(self, folder, slots=2, max_jobs=4):
        self.folder, self.changes = Path(folder), []
        self.engine = Engine(
            EngineSpec("scripted:Scripted", str(folder), slots), max_jobs, 60, lambda e: self.changes.append(e.progress)
        )

    def ready(self):
        until(lambda: self.engine.ready)
        return self

    def submit(self, words, **sampling):
        return self.engine.submit([prompt(words)], Sampling(**sampling))

    def calls(self):
        return (self.folder / "log").read_text().splitlines()


@pytest.fixture
def script(tmp_path):
    made = Script(tmp_path).ready()
    yield made
    made.engine.close()


def test_load_tells_its_progress(script):
    until(lambda: script.changes == [0.5, 1.0])
    info = script.engine.info
    assert (info.slots, info.context, info.library) == (2, 2000, "scripted 1")
    assert info.fingerprint.startswith("fp_")


def test_a_job(script):
    events = finish(script.submit("echo héllo"))
    assert events[0] == replace(Started(11, 3), at=events[0].at)
    assert text(events) == "héllo"
    assert sum(e.tokens for e in events[1:]) == 7  # six bytes and EOS
    assert events[-1].finish == "stop"
    until(lambda: not script.engine.jobs)


def test_jobs_run_in_order_and_share_the_slots(script):
    words = [f"echo job {i} {'.' * 800}" for i in range(4)]  # long enough to be seen at it
    jobs = [script.submit(said, seed=i) for i, said in enumerate(words)]
    until(lambda: script.engine.queue_depth() == 2)
    assert [job.running for job in jobs] == [True, True, False, False]
    assert ["echo " + text(finish(job)) for job in jobs] == words
    starts = [line for line in script.calls() if line.startswith("start")]
    assert starts == [f"start {i + 1} {said} seed={i}" for i, said in enumerate(words)]


def test_full_queue(script):
    (script.folder / "hold").touch()
    jobs = [script.submit("echo a") for _ in range(4)]
    with pytest.raises(QueueFull):
        script.submit("echo b")
    (script.folder / "hold").unlink()
    for job in jobs:
        finish(job)
    assert text(finish(script.submit("echo b"))) == "b"


def test_choices_wait_for_the_first_and_have_their_own_seed(script):
    events = finish_all(script.submit("echo abc", n=3, seed=10), 3)
    for i in range(3):
        assert "".join(e.text for e in events if isinstance(e, Delta) and e.choice == i) == "abc"
    starts = [line for line in script.calls() if line.startswith("start")]
    assert starts == [f"start {i + 1} echo abc seed={10 + i}" for i in range(3)]
    assert len([e for e in events if isinstance(e, Started)]) == 1


def finish_all(job, choices):
    events = []
    until(lambda: events.extend(job.take(0.1)) or sum(isinstance(e, Delta) and e.finish is not None for e in events) == choices)
    return events


def test_cancel_active_frees_the_slot(script):
    jobs = [script.submit("forever"), script.submit("forever")]
    until(lambda: all(job.running for job in jobs))
    waiting = script.submit("echo x")
    jobs[0].cancel()
    jobs[0].cancel()  # harmless
    assert text(finish(waiting)) == "x"
    assert cancelled_at(script.calls(), 1) < 1900
    jobs[1].cancel()
    until(lambda: cancelled_at(script.calls(), 2))
    assert cancelled_at(script.calls(), 2) < 1900
    assert script.engine.jobs == {}


def test_cancel_waiting_frees_its_place(script):
    (script.folder / "hold").touch()
    jobs = [script.submit("echo " + "a" * 200) for _ in range(4)]
    jobs[3].cancel()
    jobs.append(script.submit("echo b"))
    (script.folder / "hold").unlink()
    assert text(finish(jobs[4])) == "b"
    assert len([line for line in script.calls() if line.startswith("start")]) == 4


def test_what_cannot_fit_is_refused(script):
    (refusal,) = finish(script.submit("x" * 2000))
    assert isinstance(refusal, Refused)
    assert refusal.code == "context_length_exceeded"
    (refusal,) = finish(script.submit("x" * 1000, max_tokens=1001))
    assert "1000 tokens and max_tokens is 1001" in refusal.message
    with pytest.raises(Refused, match="far longer"):  # before anything is sent
        script.submit("x" * 1_000_000)
    events = finish(script.submit("forever" + "x" * 1893))
    assert (events[0].prompt_tokens, sum(e.tokens for e in events[1:]), events[-1].finish) == (1900, 100, "length")
    assert script.engine.jobs == {}


@pytest.mark.parametrize("words", ["badencode", "badstart"])
def test_an_error_of_one_job_is_that_jobs(script, words):
    other = script.submit("echo fine")
    assert isinstance(finish(script.submit(words))[-1], EngineFailed)
    assert text(finish(other)) == "fine"
    assert script.engine.ready


@pytest.mark.parametrize("how", ["die", "raise"])
def test_death_is_told_to_all_and_to_late_comers(script, how):
    (script.folder / "hold").touch()
    jobs = [script.submit("forever"), script.submit(how), script.submit("echo waits")]
    (script.folder / "hold").unlink()
    for job in jobs:
        assert isinstance(finish(job)[-1], EngineFailed)
    until(lambda: script.engine.dead is not None)
    assert ("signal 9" if how == "die" else "exit status 1") in script.engine.dead
    with pytest.raises(EngineFailed):
        script.submit("echo late")


def test_failed_load(tmp_path):
    (tmp_path / "fail").touch()
    script = Script(tmp_path)
    until(lambda: script.engine.dead is not None)
    assert script.engine.info is None
    assert "the script says: no" in script.engine.dead


def test_close_is_polite(script):
    job = script.submit("forever")
    until(lambda: job.running)
    script.engine.close()
    assert script.calls()[-1] == "close"
    assert isinstance(finish(job)[-1], EngineFailed)


def test_its_pipe_is_closed_when_nobody_writes_into_it_any_more(script):
    """The number of one that is closed is given to the next process's, which would get what was meant for this one."""
    pipe, inside, go_on = script.engine.conn, threading.Event(), threading.Event()

    class Slow:
        def __getattr__(self, name):
            return getattr(pipe, name)

        def send_bytes(self, data):
            inside.set()
            go_on.wait(20)

    script.engine.conn = Slow()
    script.submit("echo x")
    assert inside.wait(10)
    script.engine.process.kill()
    until(lambda: script.engine.dead)
    time.sleep(0.3)
    assert not pipe.closed
    go_on.set()
    until(lambda: pipe.closed)


def test_what_cannot_be_pickled_is_refused(script):
    """Pickle gives up on nesting before JSON does; the writer thread must not meet it."""
    nested = []
    for _ in range(900):
        nested = [nested]
    with pytest.raises(Refused):
        script.engine.submit([Prompt(({"role": "user", "content": "echo x", "tool_calls": nested},))], Sampling())
    assert script.engine.jobs == {}
    assert text(finish(script.submit("echo x"))) == "x"


def test_an_engine_that_hangs_with_nobody_waiting_is_killed(tmp_path):
    script = Script(tmp_path)
    script.engine.ENDS_S = 0
    script.ready()
    job = script.submit("hang")
    until(lambda: "hang" in script.calls())
    late = script.submit("echo x")
    job.cancel()
    assert isinstance(finish(late)[-1], EngineFailed)
    until(lambda: script.engine.dead)


def test_a_long_step_is_not_a_hang(script):
    """A living engine speaks once a second, also when it has nothing to tell."""
    job = script.submit("forever")
    until(lambda: job.running)
    before = script.engine.heard
    until(lambda: script.engine.heard > before)
    job.cancel()


def test_nothing_is_left_of_a_dead_engine(script):
    import threading

    script.engine.process.kill()
    until(lambda: script.engine.dead)
    until(lambda: not [t for t in threading.enumerate() if t is script.engine.reader])
    assert script.engine.conn.closed


def test_prompts_and_choices_are_numbered(script):
    job = script.engine.submit([prompt("echo a"), prompt("echo b")], Sampling(n=2))
    events = finish_all(job, 4)
    shown = {i: "".join(e.text for e in events if isinstance(e, Delta) and e.choice == i) for i in range(4)}
    assert shown == {0: "a", 1: "a", 2: "b", 3: "b"}
    assert sum(e.prompt_tokens for e in events if isinstance(e, Started)) == 12


def test_a_child_does_not_import_the_program_that_starts_it(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import children, scripted\n"
        "print('imported')\n"
        "if __name__ == '__main__':\n"
        "    child = children.Child(scripted.tell_program)\n"
        "    print(child.conn.recv())\n"
        "    child.kill()\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    said = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": paths}
    )
    assert said.stdout.split() == ["imported", "False"], said.stderr


def test_new_grammars_begin_as_fast_as_an_engine_takes_them():
    """Quick ones at once; after a slow one as much time goes to steps first. Those that it knows, and none at all, never wait."""
    pace = GrammarPace()
    for number in range(40):
        assert pace.allows(str(number))
        pace.began(str(number), 0.001)
    pace.began("slow", 0.4)
    assert not pace.allows("new") and pace.allows("slow") and pace.allows("1") and pace.allows(None)
    for _ in range(4):
        assert not pace.allows("new")
        pace.stepped(0.1)
    assert pace.allows("new")
    pace.stepped(9.0)  # a slow step says nothing about grammars
    assert pace.allows("new")
    pace.began("refused", 0.4, refused=True)  # it took its time, and the next one like it will too
    assert not pace.allows("refused")
