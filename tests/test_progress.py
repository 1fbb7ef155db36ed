"""Bars on a terminal, lines in a log."""

import io
import logging
import sys

import pytest
from conftest import serve_scripted, until

from catalog import run_shown
from progress import CLEAR, LogHandler, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, "openai_api_endpoint")
    return caplog


def test_a_log_has_a_line_for_every_tenth(log):
    shown = Progress("loading x", out=io.StringIO())
    for hundredths in [*range(101), 50]:  # what goes back is not told
        shown.show(hundredths / 100)
    assert log.messages == [f"loading x: {tenth}0%" for tenth in range(1, 11)]
    assert shown.out.getvalue() == ""


def test_rate_and_time_left():
    shown = Progress("loading x", 100_000_000, out=io.StringIO())
    shown.show(0.5)
    assert shown.line() == "loading x: 50%"  # too early to tell
    shown.began = shown.moved - 10
    assert shown.line(10) == "loading x: █████░░░░░ 50%, 5 MB/s, 10 s left"
    shown.show(1.0)
    shown.moved = shown.began + 20
    assert shown.line() == "loading x: 100%, 5 MB/s"
    unknown = Progress("loading y", out=io.StringIO())
    unknown.began -= 7.3
    assert unknown.line() == "loading y: 7 s"


def test_a_terminal_has_a_bar_that_goes_when_it_is_done():
    out, going = Terminal(), [True]
    shown = Progress("loading x", lasts=lambda: bool(going), out=out)
    shown.show(0.25)
    until(lambda: "loading x: █████░░░░░░░░░░░░░░░ 25%" in out.getvalue())
    going.clear()
    until(shown.ended.is_set)
    assert out.getvalue().endswith(CLEAR)
    told = out.getvalue()
    shown.close()
    assert out.getvalue() == told


def test_a_log_line_does_not_begin_behind_a_bar():
    for out, before in ((Terminal(), CLEAR), (io.StringIO(), "")):
        LogHandler(out).emit(logging.LogRecord("x", logging.INFO, "x", 1, "a line", (), None))
        assert out.getvalue() == f"{before}a line\n"


def test_what_a_command_fetches_is_shown(tmp_path, log):
    """As pip does: into the folder for temporary files, named as it likes."""
    script = """
import os, sys, tempfile, time
with tempfile.NamedTemporaryFile(dir=tempfile.mkdtemp()) as f:
    for part in range(10):
        f.write(bytes(100)); f.flush(); time.sleep(0.25)
sys.exit("the end")
"""
    status, said = run_shown([sys.executable, "-c", script], str(tmp_path), Progress("fetching", 1000, out=io.StringIO()))
    assert status == 1 and said == "the end\n"
    assert len(log.messages) >= 4 and all(line.startswith("fetching: ") for line in log.messages)


def test_a_load_is_told(tmp_path, log):
    lives = []
    (tmp_path / "slow").touch()
    with serve_scripted(tmp_path, ready=False) as served:
        until(lambda: served.models.current() and served.models.current().progress == 0.5)
        served.models.on_progress = lives.append
        served.models.current().engine.tell()
        assert {(life.model.id, life.progress) for life in lives} == {("scripted", 0.5)}
        served.script("slow", on=False)
        served.wait_ready()
