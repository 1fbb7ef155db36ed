"""The workshop: a process beside an engine in which runs what a client wrote and may run wild. Nothing here knows what that is.

Templates and constraints are programs: they may loop, or ask for all the memory there is. So they are worked on neither by a
handler nor by the thread that steps, but here: one order at a time, in turns by client, each with a deadline and all with a
limit of memory. One that overruns it, or whose client has gone, ends with its process, and the next finds a new one.

  whoever has an order ──put()──► orders ──worker thread──► pipe ──► work(bytes) -> bytes in the process
                      ◄──done() or failed()───┘        watcher thread: the deadline
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

from children import Child
from turns import Turns

log = logging.getLogger("openai_api_endpoint")

MEMORY = 3 << 29  # bytes of address space; Python with Jinja takes a tenth of it
ANSWER = 64 << 20  # bytes: no order has a longer answer
START_S = 60.0  # to begin; a machine may be busy
AGAIN_S = 60.0  # after this a setup that came to nothing is tried again: the machine may only have been busy
GONE_S = 0.5  # what is nearly done is not ended when its client goes


@dataclass(eq=False)
class Order:
    """Something to be worked on. `make` is called when its turn has come; one of `done` and `failed` is called, on the worker thread."""

    client: str
    make: Callable[[], bytes]
    done: Callable[[bytes], None]
    failed: Callable[[str, str], None]  # with the stage it was at ("" before the first), and why: "took longer than …"
    setup: bool = False  # it needs what `Workshop.setup` sets up
    dropped: bool = False


class Failed(Exception):
    """No answer came: at which stage, and why."""

    def __init__(self, stage: str, why: str):
        super().__init__(stage, why)
        self.stage, self.why = stage, why


class Closed(Exception):
    """The workshop takes no more orders."""


class Workshop:
    """One process, started when it is first needed, and its orders.

    `work` is "module:name" of what makes, in the process, a function (order, tell) -> answer; tell(stage) says how far it is.
    """

    def __init__(self, work: str, seconds: float):
        self.work, self.seconds = work, seconds
        self.setup: bytes | None = None  # an order that each new process gets first
        self.learnt = b""  # its answer
        self.looked = threading.Event()  # there is one, or there will be none
        self.broken: Failed | None = None  # it had none: until `again`, no order that needs it is begun
        self.again = 0.0
        self.child: Child | None = None
        self.is_set_up = False
        self.orders: Turns[Order] = Turns()
        self.change = threading.Condition()  # guards orders, running, closed
        self.running: Order | None = None
        self.since = 0.0  # when `running` was begun, 0: its process is not there yet
        self.why = ""  # it was killed
        self.closed = self.has_threads = False

    def put(self, order: Order) -> None:
        """Raises Closed, and RuntimeError where no thread can be started."""
        with self.change:
            if self.closed:
                raise Closed
            self.orders.put(order.client, order)
            if not self.has_threads:
                for target in (self.watch, self.serve):
                    threading.Thread(target=target, name=f"workshop-{target.__name__}", daemon=True).start()
                self.has_threads = True
            self.change.notify_all()

    def warm(self) -> None:
        """Be there before the first request."""
        looks = self.setup is not None  # else its process begins, and there is nothing yet to be looked at

        def done(*_: object) -> None:
            if looks:
                self.looked.set()

        self.put(Order("", bytes, done, done, setup=True))

    def drop(self, order: Order) -> None:
        """Its client has gone. Neither `done` nor `failed` matters any more."""
        with self.change:
            order.dropped = True
            self.orders.keep(lambda one: not one.dropped)

    def close(self) -> None:
        with self.change:
            self.closed = True
            self.orders = Turns()
            if self.child:
                self.child.process.kill()
            self.change.notify_all()

    # ── the worker ──

    def serve(self) -> None:
        while order := self.next():
            self.work_on(order)
        self.end()

    def work_on(self, order: Order) -> None:
        answer, failure = b"", None
        try:
            answer = self.answer(order)
        except Failed as error:
            failure = error
        except RecursionError:
            failure = Failed("template", "is nested too deeply")
        except Exception as error:  # no file numbers, no memory, no thread left
            log.exception("workshop")
            failure = Failed("", f"could not be begun: {type(error).__name__}")
            self.end()
        with self.change:
            self.running, self.since = None, 0.0
        try:
            if failure:
                order.failed(failure.stage, failure.why)
            else:
                order.done(answer)
        except Exception:  # whatever becomes of the answer, the next order's turn comes
            log.exception("workshop")
        del order.make, order.done, order.failed  # they hold who asked, who holds the order

    def next(self) -> Order | None:
        with self.change:
            while not self.orders and not self.closed:
                self.change.wait()
            if self.closed:
                return None
            self.running, self.since, self.why = self.orders.take(), 0.0, ""
            self.change.notify_all()
            return self.running

    def answer(self, order: Order) -> bytes:
        """Raises Failed."""
        if order.setup and self.broken and time.monotonic() < self.again:
            raise Failed(self.broken.stage, self.broken.why)
        if self.child is None:
            self.start()
        if order.setup and not self.is_set_up and self.setup is not None:
            try:
                self.learnt = self.ask(self.setup)
            except Failed as error:
                self.broken = None if order.dropped or self.closed else error
                self.again = time.monotonic() + AGAIN_S
                raise
            self.is_set_up, self.broken = True, None
        data = order.make()
        return self.ask(data) if data else b""

    def start(self) -> None:
        child = Child(work_for_others, self.work, math.ceil(self.seconds))
        with self.change:
            self.child, self.is_set_up = child, False
            if self.closed:
                child.process.kill()
        if not child.conn.poll(START_S):
            self.why = "could not be begun"
            child.process.kill()
        self.receive(child)

    def ask(self, data: bytes) -> bytes:
        """Raises Failed."""
        assert self.child
        with self.change:
            self.since = time.monotonic()
        with contextlib.suppress(OSError):  # it has died: what it says of that is read below
            self.child.conn.send_bytes(data)
        answer = self.receive(self.child)
        with self.change:
            self.since = 0.0
        return answer

    def receive(self, child: Child) -> bytes:
        """Raises Failed."""
        stage = ""
        try:
            while (said := child.conn.recv_bytes(ANSWER))[:1] == b"~":
                stage = said[1:].decode()
            return said
        except (EOFError, OSError, ValueError):
            self.end()
            raise Failed(stage, self.why or "needed more memory than there is for it") from None

    def end(self) -> None:
        with self.change:
            child, self.child = self.child, None
        if child:
            child.kill()
            child.close()

    # ── the watcher ──

    def watch(self) -> None:
        while True:
            with self.change:
                while self.running is None and not self.closed:
                    self.change.wait()
                if self.closed:
                    return
                self.look(time.monotonic())
            time.sleep(0.05)

    def look(self, now: float) -> None:
        """Under the lock."""
        if not self.running or not self.since or not self.child or self.why:
            return
        if now - self.since > self.seconds:
            self.why = f"took longer than {self.seconds:g} s (--prepare-timeout)"
        elif self.running.dropped and now - self.since > GONE_S:
            self.why = "has nobody who waits for it"
        if self.why:
            log.warning("the preparation of a request %s: it is ended", self.why)
            self.child.process.kill()


# ───────────────────────────────────────────────── in the process ────────────────────────────────────────────────


def work_for_others(conn: Connection, work: str, seconds: int) -> None:
    """The process's main: a byte when it is ready, then an answer to each order."""
    module, _, name = work.partition(":")
    do = getattr(importlib.import_module(module), name)()
    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_AS", MEMORY)
    try:
        conn.send_bytes(b"!")
        for _ in itertools.count():
            data = conn.recv_bytes()
            if data:
                limit("RLIMIT_CPU", math.ceil(time.process_time()) + seconds + 30)  # should the server be unable to end us
            conn.send_bytes(do(data, lambda stage: conn.send_bytes(b"~" + stage.encode())))
    except (EOFError, OSError):
        pass  # the server is gone, or has closed us


def limit(name: str, value: int) -> None:
    """Where the system knows such a limit."""
    try:
        resource = importlib.import_module("resource")
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard < 0 else min(value, hard), hard))
    except (ImportError, AttributeError, ValueError, OSError):
        pass
