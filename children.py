"""Processes of ours: how they are started, how they are seen to live, and how they end with the server. Nothing of models here.

The law: no process of ours outlives its server by more than GRACE_S, however that died. Two things see to it: on Linux the kernel
kills a child when the thread that spawned it ends, so all are spawned by one thread that lives as long as the server; and
everywhere a thread of the child's own waits for the end of a pipe that nobody ever writes into.

A process takes its work from its pipe, so it may begin before that is known, as the first one of a server does.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, NamedTuple

import logs

GRACE_S = 3.0  # what a child has for an orderly end once its server has gone
PR_SET_PDEATHSIG = 1  # linux/prctl.h

_spawner: ThreadPoolExecutor | None = None
_lock = threading.Lock()


class Process:
    """A process that waits to be told what to run, and our ends of its pipes."""

    def __init__(self, *modules: str):
        """It imports these while it waits. Raises OSError, RuntimeError."""
        global _spawner
        with _lock:
            _spawner = _spawner or ThreadPoolExecutor(1, "spawner")
        context = multiprocessing.get_context("spawn")
        self.conn, theirs = context.Pipe()
        watched, self.lifeline = context.Pipe(duplex=False)
        self.process = context.Process(target=begin, args=(os.getpid(), watched, theirs, modules), daemon=True)
        try:
            _spawner.submit(start_by_itself, self.process).result()
        except BaseException:
            self.close()
            raise
        finally:
            theirs.close()  # ours is the only other end now: its death is our EOF
            watched.close()

    def kill(self, wait: float = 10.0) -> None:
        self.process.kill()
        self.process.join(wait)

    def close(self) -> None:
        """Our ends of its pipes. A child that is still there takes it for our death."""
        self.conn.close()
        self.lifeline.close()


class Child(Process):
    """A process that has its work: the one that was begun ahead, or a new one."""

    def __init__(self, main: Callable[..., None], *arguments: Any):
        """Runs main(connection, *arguments) in a process of its own. Raises OSError, RuntimeError."""
        form = next((handler.formatter for handler in logging.getLogger().handlers), None)
        look = (logging.getLogger("openai_api_endpoint").getEffectiveLevel(), form if isinstance(form, logs.FORMS) else None)
        if not self.take_over((look, main, arguments)):
            super().__init__()
            with contextlib.suppress(OSError):  # it has died: whoever reads finds that out
                self.conn.send((look, main, arguments))

    def take_over(self, work: tuple[Any, ...]) -> bool:
        """Give it to the process that was begun ahead, if there is one and it lives."""
        spare = take_spare()
        if spare is None:
            return False
        try:
            spare.conn.send(work)
        except OSError:  # it has died
            spare.close()
            return False
        self.conn, self.lifeline, self.process = spare.conn, spare.lifeline, spare.process
        return True


_spare: Process | None = None


def begin_ahead(*modules: str) -> None:
    """Start the process of the first Child now: it imports what it will need while we import what we need."""
    global _spare
    with contextlib.suppress(OSError, RuntimeError):  # whoever needs a process will say so
        _spare = Process(*modules)
        atexit.register(end_spare)


def take_spare() -> Process | None:
    global _spare
    with _lock:
        spare, _spare = _spare, None
    return spare


def end_spare() -> None:
    """Nobody will need what was begun ahead."""
    if spare := take_spare():
        spare.kill()
        spare.close()


def start_by_itself(process: Any) -> None:
    """Without the program that we are, which a child would import first: what it runs it imports by name, in half the time."""
    program, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        process.start()
    finally:
        sys.modules["__main__"] = program


def begin(server: int, lifeline: Connection, conn: Connection, modules: Iterable[str]) -> None:
    """What a child does: it gets ready, waits for its work, and does it."""
    end_with(server, lifeline)
    for number in (signal.SIGINT, signal.SIGTERM):  # both may be sent to the whole group; the server ends us in its own order
        signal.signal(number, signal.SIG_IGN)
    for name in modules:
        with contextlib.suppress(Exception):  # whoever needs it says so
            importlib.import_module(name)
    try:
        work = conn.recv_bytes()
    except (EOFError, OSError):
        return  # nothing came of it
    look, main, arguments = pickle.loads(work)
    logs.start_like(*look)
    main(conn, *arguments)


def end_with(server: int, lifeline: Connection) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it died before we had asked
            os._exit(1)
    threading.Thread(target=wait_for_the_end, args=(lifeline,), name="lifeline", daemon=True).start()


def wait_for_the_end(lifeline: Connection) -> None:
    try:
        lifeline.recv_bytes()
    except (EOFError, OSError):
        time.sleep(GRACE_S)
    os._exit(1)


def describe_exit(code: int) -> str:
    if code < 0:
        return f"signal {-code}, {signal.strsignal(-code)}" if hasattr(signal, "strsignal") else f"signal {-code}"
    return f"exit status {code}"


# ───────────────────────────────────────────────── does it live? ─────────────────────────────────────────────────


class Row(NamedTuple):
    """A process as the system lists it."""

    pid: int
    parent: int
    state: str  # "R" runs, "S" sleeps, "D" waits for a disk, "T" is stopped, …
    seconds: float  # of CPU time so far


class Pulse:
    """How long the CPU time of a process has stood still. One that computes, or waits for a disk, does not stand still."""

    NOISE = 0.002  # of one core: what runtimes' idle threads use

    def __init__(self, pid: int | None):
        self.pid = pid
        self.rest()

    def rest(self) -> None:
        """It need not be looked at now: what it does from here on counts anew."""
        self.since, self.seconds = 0.0, -1.0

    def still(self) -> float:
        """Seconds; 0 where that cannot be told."""
        now, rows = time.monotonic(), family(self.pid)
        used = sum(row.seconds for row in rows)
        moved = used - self.seconds > 0.011 + self.NOISE * (now - self.since)  # a tick of the clock is 10 ms
        if self.seconds < 0 or moved or not rows or any(row.state == "D" for row in rows):
            self.since, self.seconds = now, used
        return now - self.since


def family(pid: int | None) -> list[Row]:
    """A process and all that descend from it: a compiler that it waits for works for it. Empty where that cannot be told."""
    rows = list(table())
    found = {row.pid: row for row in rows if row.pid == pid}
    while more := {row.pid: row for row in rows if row.parent in found and row.pid not in found}:
        found |= more
    return list(found.values())


def table() -> Iterator[Row]:
    if os.path.exists("/proc/self/stat"):
        tick = os.sysconf("SC_CLK_TCK")
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat", "rb") as f:
                    fields = f.read().rpartition(b")")[2].split()  # a name may hold anything
            except OSError:
                continue  # it has ended
            yield Row(int(name), int(fields[1]), fields[0].decode(), (int(fields[11]) + int(fields[12])) / tick)
    elif os.name == "posix":
        try:
            said = subprocess.run(
                ["ps", "-A", "-o", "pid=,ppid=,state=,time="], capture_output=True, text=True, timeout=5
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return
        for line in said.splitlines():
            pid, parent, state, used = line.split()[:4]
            yield Row(int(pid), int(parent), state[0], clock_seconds(used))


def clock_seconds(text: str) -> float:
    """Of ps: [[days-]hours:]minutes:seconds, maybe with a fraction."""
    days, _, clock = text.rpartition("-")
    total = 0.0
    for part in clock.split(":"):
        total = total * 60 + float(part)
    return total + 86400 * int(days or 0)
