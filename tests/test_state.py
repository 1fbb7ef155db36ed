"""Stored responses: chains, owners, age and size, a killed process, another one at the same time."""

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from state import State, StateError, default_path

ROOT = Path(__file__).resolve().parent.parent


def response(id, previous=None, text="said"):
    return {"id": id, "previous_response_id": previous, "status": "completed", "output": [{"id": f"out-{id}", "text": text}]}


def put(state, id, previous=None, owner="me", text="said"):
    state.put(owner, response(id, previous, text), [{"id": f"in-{id}", "text": "given"}])


def ids(items):
    return [item["id"] for item in items]


@pytest.fixture
def state(tmp_path):
    state = State(str(tmp_path / "new" / "folder" / "state.sqlite3"))
    yield state
    state.close()


def test_what_is_put_is_got(state):
    put(state, "a")
    assert state.get("me", "a") == response("a")
    assert state.given("me", "a") == [{"id": "in-a", "text": "given"}]
    assert state.item("me", "in-a")["text"] == "given"
    assert state.item("me", "out-a")["text"] == "said"
    assert state.get("me", "b") is state.given("me", "b") is state.chain("me", "b") is state.item("me", "in-b") is None


def test_a_later_state_takes_the_place(state):
    put(state, "a", text="half")
    put(state, "a", text="whole")
    assert state.get("me", "a")["output"][0]["text"] == "whole"
    assert len(state.chain("me", "a")) == 2


def test_branches(state):
    put(state, "a")
    put(state, "b", "a")
    put(state, "c", "a")
    assert ids(state.chain("me", "b")) == ["in-a", "out-a", "in-b", "out-b"]
    assert ids(state.chain("me", "c")) == ["in-a", "out-a", "in-c", "out-c"]


def test_owners_do_not_find_each_others(state):
    put(state, "a", owner="me")
    for read in (state.get, state.given, state.chain):
        assert read("you", "a") is None
    assert state.item("you", "in-a") is None
    assert not state.delete("you", "a")
    put(state, "b", owner="you")
    state.put("you", response("b2"), [{"id": "in-a", "text": "mine"}])  # an item's id is its sender's to choose
    assert state.item("me", "in-a")["text"] == "given"
    assert state.item("you", "in-a")["text"] == "mine"


def test_delete_leaves_what_is_built_on_it(state):
    put(state, "a")
    put(state, "b", "a")
    assert state.delete("me", "a")
    assert not state.delete("me", "a")
    assert state.get("me", "a") is state.chain("me", "a") is state.item("me", "in-a") is None
    assert len(state.chain("me", "b")) == 4
    assert state.delete("me", "b")
    assert state.db.execute("SELECT COUNT(*) FROM responses").fetchone() == (0,)
    assert state.db.execute("SELECT COUNT(*) FROM items").fetchone() == (0,)


def test_age(tmp_path):
    state = State(str(tmp_path / "s"), ttl=60)
    put(state, "old")
    put(state, "root")
    state.db.execute("UPDATE responses SET created = created - 100")
    put(state, "leaf", "root")
    assert state.get("me", "old") is state.get("me", "root") is None
    state.prune()
    assert state.db.execute("SELECT id FROM responses ORDER BY id").fetchall() == [("leaf",), ("root",)]
    assert len(state.chain("me", "leaf")) == 4  # what a younger one is built on is kept for it


def test_size(tmp_path):
    state = State(str(tmp_path / "s"), size=50_000)
    for i in range(20):
        put(state, str(i), str(i - 1) if i else None, text="x" * 10_000)
    state.prune()
    kept = [id for (id,) in state.db.execute("SELECT id FROM responses ORDER BY created")]
    assert kept == [str(i) for i in range(20 - len(kept), 20)]
    assert 2 < len(kept) < 6
    assert state.chain("me", "19") is None  # its first turns are gone: not a conversation without its beginning


def test_the_file_is_for_its_owner_alone(tmp_path):
    State(str(tmp_path / "folder" / "s")).put("me", response("a"), [])
    for file in (tmp_path / "folder").iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o700


def test_another_server_at_the_same_file(tmp_path):
    one, two = State(str(tmp_path / "s")), State(str(tmp_path / "s"))
    put(one, "a")
    put(two, "b", "a")
    assert len(one.chain("me", "b")) == 4
    assert one.key == two.key


def test_files_that_cannot_be_used(tmp_path):
    (tmp_path / "text").write_text("this is no database, " * 100)
    with pytest.raises(StateError, match="not a database"):
        State(str(tmp_path / "text"))
    State(str(tmp_path / "newer")).db.execute("PRAGMA user_version = 99")
    with pytest.raises(StateError, match="another version"):
        State(str(tmp_path / "newer"))
    with pytest.raises(StateError):
        State(str(tmp_path / "text" / "below"))


KILLED = """
import sys
sys.path.insert(0, {root!r})
from state import State
state = State({path!r})
i = 0
while True:
    state.put("me", {{"id": str(i), "previous_response_id": str(i - 1) if i else None, "status": "completed", "output": [{{"id": f"out-{{i}}", "text": "x" * 5000}}]}}, [])
    print(i, flush=True)
    i += 1
"""


def test_kill_9(tmp_path):
    """Whatever was put before is there and whole; of what was being put, all or nothing."""
    path = str(tmp_path / "s")
    for _ in range(3):
        Path(path).unlink(missing_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED.format(root=str(ROOT), path=path)], stdout=subprocess.PIPE, text=True
        )
        last = 0
        while last < 50:
            last = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        last = int(([last, *process.stdout.read().split()])[-1])
        process.wait()
        process.stdout.close()
        state = State(path)
        assert state.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        count = state.db.execute("SELECT COUNT(*) FROM responses").fetchone()[0]
        assert count in (last + 1, last + 2)
        assert len(state.chain("me", str(last))) == last + 1
        state.close()
        for file in tmp_path.iterdir():
            file.unlink()


def test_a_failed_write_leaves_nothing(state):
    put(state, "a")
    with pytest.raises((sqlite3.Error, TypeError)):
        state.put("me", response("b"), [{"id": ["no", "text"]}])
    put(state, "c", "a")
    assert state.get("me", "b") is None
    assert len(state.chain("me", "c")) == 4


def test_default_path_is_the_users_state_folder(monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    monkeypatch.setenv("LOCALAPPDATA", "/somewhere")
    assert default_path() == Path("/somewhere/openai_api_endpoint/responses.sqlite3")


def test_the_command_lines_file(tmp_path, monkeypatch, caplog):
    import argparse

    from catalog import UsageError
    from openai_api_endpoint import open_state

    def opened(state):
        return open_state(argparse.Namespace(state=state, state_ttl=60.0, state_size=1))

    assert opened("none") == "none"
    state = opened(str(tmp_path / "given"))
    assert (state.ttl, state.size, (tmp_path / "given").exists()) == (60.0, 1 << 20, True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    opened("")
    assert default_path().exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--state"):
        opened(str(tmp_path / "file" / "below"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "file"))
    put(opened(""), "a")  # the default one cannot be used: in memory
    assert "in memory only" in caplog.text
