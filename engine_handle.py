"""The handle of an engine in the server process: its jobs, what is sent to it, what it says, whether it lives. Nothing here knows HTTP.

Handlers submit, take and cancel; one thread writes to the pipe, one reads it, one watches. A producer never waits for a consumer:
what is sent waits in the Outbox, what has come in the Job's queue, unless the Job's handler has left a sink for it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pickle
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from children import Child, Pulse, describe_exit
from engine import (
    Delta,
    Details,
    EngineFailed,
    EngineInfo,
    EngineSpec,
    Event,
    Prompt,
    QueueFull,
    Refused,
    Sampling,
    Started,
    Unloading,
    log,
    public,
    run_engine,
    too_long,
    unpack,
    unpack_event,
)
from workshop import Closed, Order, Workshop

Sink = Callable[[Event | Exception], bool]  # takes an event without waiting for anybody; False: it goes on the queue


class Job:
    """A submitted request as its handler sees it. The handler takes and cancels; whoever produces (one thread) puts.

    What the handler keeps of its stream belongs to one thread at a time: to the handler while it is awake, and while it
    sleeps in `take(…, sink)` to the producer, which calls the sink. So a token costs no thread that must be woken.
    """

    def __init__(self, engine: Jobs, number: int, choices: int, client: str):
        self.engine, self.number, self.client = engine, number, client
        self.open = choices  # choices that have not finished; changed by the producer only
        self.running = False
        self.order: Order | None = None  # what the workshop does for it first
        self.posted = False  # it is on its way to the engine, or there
        self.queue: queue.SimpleQueue[Event | Exception | None] = queue.SimpleQueue()  # None: wake up
        self.sink: Sink | None = None
        self.turn = threading.Lock()  # guards sink, and with it whose turn the stream is

    def put(self, event: Event | Exception) -> None:
        """Never waits for the handler: it is asleep, or awake and not in here."""
        with self.turn:
            if self.sink is not None:
                try:
                    if self.sink(event):
                        return
                except Exception as error:  # a sink's fault is its own request's
                    event = error
                self.sink = None
            self.queue.put(event)

    def take(self, timeout: float, sink: Sink | None = None) -> list[Event | Exception]:
        """All events that have come, waiting up to `timeout` seconds for the first.

        While it waits, `sink` gets each event, until it returns False for one: that one, and what follows, is on the queue.
        """
        if sink is not None:
            with self.turn:
                self.sink = sink if self.queue.empty() else None
        events = []
        with contextlib.suppress(queue.Empty):
            events.append(self.queue.get(timeout=timeout))
        if sink is not None:
            with self.turn:
                self.sink = None
        while not self.queue.empty():  # nobody else takes
            events.append(self.queue.get_nowait())
        return [event for event in events if event is not None]

    def wake(self) -> None:
        """Let take() return, maybe with nothing."""
        self.queue.put(None)

    def cancel(self) -> None:
        """Free the slot or the place in the queue. Harmless when the job has finished."""
        self.engine.drop(self)


def displaced(jobs: Iterable[Job], client: str) -> Job:
    """The job that gives up its place in a full queue for a client that has far fewer: the last one waiting of whoever has most.

    Raises QueueFull where nobody has.
    """
    counts = Counter(job.client for job in jobs)
    waiting = [job for job in jobs if not job.running and counts[job.client] > counts[client] + 1]
    if not waiting:
        raise QueueFull
    return max(waiting, key=lambda job: (counts[job.client], job.number))


class Timeouts(NamedTuple):
    """Seconds."""

    prepare: float = 5.0  # what the workshop may take for one request
    load: float = 1800.0  # what an engine may take to be ready


DEFAULT_TIMEOUTS = Timeouts()


class Jobs:
    """What the server keeps of an engine, whichever kind it is: its jobs, and whether it lives.

    `on_change(self)` is called when it has become ready, has progressed, or is dead. After death `dead` holds the reason,
    every job has had its EngineFailed, and late-comers get it from admit().
    """

    def __init__(
        self,
        spec: EngineSpec,
        max_jobs: float,
        patience: float,
        on_change: Callable[[Any], None],
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ):
        self.spec, self.max_jobs, self.patience, self.on_change = spec, max_jobs, patience, on_change
        self.info: EngineInfo | None = None
        self.progress = 0.0  # of loading, 0..1
        self.dead: str | None = None
        self.hangs = False  # it has work, says nothing and does not compute
        self.jobs: dict[int, Job] = {}
        self.lock = threading.Lock()  # guards jobs and dead
        self.numbers = itertools.count()
        self.workshop = Workshop("prepare:Preparation", timeouts.prepare)

    @property
    def ready(self) -> bool:
        return self.info is not None and self.dead is None

    def admit(self, job: Job) -> None:
        """Raises EngineFailed, QueueFull."""
        loser = None
        with self.lock:
            if self.dead is not None:
                raise EngineFailed(self.dead)
            if len(self.jobs) >= self.max_jobs:
                loser = displaced(self.jobs.values(), job.client)
            self.jobs[job.number] = job
        if loser:
            self.drop(loser)
            loser.put(QueueFull())

    def syntax(self, wait: float = 0.0) -> dict[str, Any]:
        """What the workshop has found of tool calls and reasoning in the template; {}: it has not looked, or there is none.

        `wait`: seconds that it may take for its first look.
        """
        if wait and self.workshop.setup is not None:
            self.workshop.looked.wait(wait)
        learnt = self.workshop.learnt
        found: dict[str, Any] = json.loads(learnt[1:] or b"{}") if learnt[:1] == b"+" else {}
        return found

    def drop(self, job: Job) -> None:
        raise NotImplementedError

    def prepare(self, job: Job, order: tuple[Any, ...], constraint: Any, done: Callable[[bytes], None], setup: bool) -> None:
        """Let the workshop work on an order (see prepare.py) for an admitted job, which is told where that fails."""

        def make() -> bytes:
            return pickle.dumps(order, pickle.HIGHEST_PROTOCOL)

        def answered(answer: bytes) -> None:
            kind, rest = answer[:1], answer[1:]
            if kind == b"+":
                return done(rest)
            failed(Refused(*json.loads(rest)) if kind == b"-" else EngineFailed(rest.decode("utf-8", "replace")))

        def failed(error: Exception) -> None:
            self.drop(job)
            job.put(error)

        def came_to_nothing(stage: str, why: str) -> None:
            if stage == "constraint" and constraint:
                where = constraint[2]
                failed(Refused(f"'{where}' cannot be honoured: what it asks for {why}.", where, "unsupported_constraint"))
            elif stage:
                failed(Refused(f"The model's chat template cannot render these messages: it {why}.", "messages"))
            else:
                failed(EngineFailed(f"the request's preparation {why}"))

        job.order = Order(job.client, make, answered, came_to_nothing, setup)
        try:
            self.workshop.put(job.order)
        except Closed:
            self.drop(job)
            raise EngineFailed(self.dead or "the engine is being ended") from None
        except RuntimeError:  # no more threads: the job's place must not stay taken
            self.drop(job)
            raise

    def tell(self) -> None:
        try:
            self.on_change(self)
        except Exception:  # whatever the listener does, the reader reads on
            log.exception("engine listener")

    def queue_depth(self) -> int:
        """Jobs that wait for a slot."""
        with self.lock:
            return sum(not job.running for job in self.jobs.values())

    def drop_waiting(self, name: str) -> None:
        """Jobs that wait for a slot end with Unloading; `name` is the model's."""
        with self.lock:
            waiting = [job for job in self.jobs.values() if not job.running]
        for job in waiting:
            self.drop(job)
            job.put(Unloading(name))

    def retire(self) -> bool:
        """Take no more jobs, if there are none now: late-comers get EngineFailed."""
        with self.lock:
            if not self.jobs and self.dead is None:
                self.dead = "the model has been unloaded"
            return not self.jobs


class Outbox:
    """Messages on their way to an engine, each of one job. Bounded in bytes; what has not been sent can be taken back."""

    LIMIT = 64 << 20  # bytes; one message may be longer

    def __init__(self) -> None:
        self.messages: deque[tuple[int, bytes]] = deque()
        self.size = 0
        self.closed = False
        self.change = threading.Condition()

    def put(self, job: int, data: bytes, bounded: bool = True) -> None:
        """Raises QueueFull."""
        with self.change:
            if bounded and self.messages and self.size + len(data) > self.LIMIT:
                raise QueueFull
            self.messages.append((job, data))
            self.size += len(data)
            self.change.notify()

    def take_back(self, job: int) -> bool:
        """False: it is gone."""
        with self.change:
            kept = deque(message for message in self.messages if message[0] != job)
            found = len(kept) < len(self.messages)
            self.messages, self.size = kept, sum(len(data) for _, data in kept)
            return found

    def get(self) -> bytes | None:
        """Waits for the next; None: there will be none."""
        with self.change:
            while not self.messages and not self.closed:
                self.change.wait()
            if not self.messages:
                return None
            _, data = self.messages.popleft()
            self.size -= len(data)
            return data

    def close(self) -> None:
        with self.change:
            self.closed = True
            self.change.notify_all()


class Engine(Jobs):
    """An engine process, and the jobs that run in it.

    One that has jobs, says nothing and does not compute either hangs: after HANGS_S no more is promised of it, after ENDS_S
    it is killed. One that computes may be silent for `patience` seconds.
    """

    QUIET_S, HANGS_S, ENDS_S = 1.5, 5.0, 15.0  # a living one says something every second
    MESSAGE = 256 << 20  # bytes: it says nothing longer

    def __init__(
        self,
        spec: EngineSpec,
        max_jobs: float,
        patience: float,
        on_change: Callable[[Any], None],
        timeouts: Timeouts = DEFAULT_TIMEOUTS,
    ):
        super().__init__(spec, max_jobs, patience, on_change, timeouts)
        self.load_timeout = timeouts.load
        self.born = self.heard = time.monotonic()  # when the engine last said anything
        self.outbox = Outbox()
        self.why = ""  # it was killed
        self.child = Child(run_engine, spec)
        self.conn, self.process = self.child.conn, self.child.process
        self.pulse = Pulse(self.process.pid)
        self.gone = threading.Event()
        self.writer, self.reader, watcher = (
            threading.Thread(target=target, name=f"engine-{target.__name__}", daemon=True)
            for target in (self.write, self.read, self.watch)
        )
        try:
            for thread in (self.writer, self.reader, watcher):
                thread.start()
            if spec.task == "generate":
                self.workshop.warm()  # its process begins while the model is loaded
        except RuntimeError:  # no more threads
            self.process.kill()
            self.outbox.close()
            raise

    def submit(self, prompts: Sequence[Prompt], sampling: Sampling, client: str = "", model: str = "") -> Job:
        """Choice i of prompt p has the index p * n + i. Slots are shared out fairly among clients. `model` is for upstreams."""
        return self.enter(client, len(prompts) * sampling.n, prompts, sampling, "submit", tuple(prompts), sampling, client)

    def call(self, name: str, arguments: dict[str, Any], client: str = "", model: str = "") -> Job:
        """One of CALLS; the job's only event is an Answer."""
        prompts = [one for value in arguments.values() for one in (value if isinstance(value, (list, tuple)) else [value])]
        prompts = [one for one in prompts if isinstance(one, Prompt)]
        if len(arguments.get("tokens", ())) > 4 * self.context:
            raise too_long("the text", "is far longer than", self.context)
        return self.enter(client, 1, prompts, Sampling(), "call", name, arguments, client)

    @property
    def context(self) -> int:
        assert self.info is not None
        return self.info.context

    def enter(
        self, client: str, choices: int, prompts: Sequence[Prompt], sampling: Sampling, kind: str, *arguments: Any
    ) -> Job:
        """A job for a message. What the message costs is known to be bounded when it has been admitted."""
        assert self.info is not None
        job = Job(self, next(self.numbers), choices, client)
        message = (kind, job.number, *arguments)
        for prompt in prompts:
            if prompt.least_tokens() > self.context * (1 if kind == "submit" else 4):
                raise too_long("the prompt", "is far longer than", self.context)
        render = bool(self.info.recipe) and any(prompt.messages is not None for prompt in prompts)
        if render or sampling.constraint:
            self.admit(job)
            order = ("message", self.context if kind == "submit" else 4 * self.context, render, message)
            self.prepare(job, order, sampling.constraint, lambda data: self.post_prepared(job, data), render)
            return job
        try:
            data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        except RecursionError:
            raise Refused("The request is nested too deeply.") from None
        self.admit(job)
        try:
            self.post(job, data)
        except QueueFull:
            self.drop(job)
            raise
        return job

    def post(self, job: Job, data: bytes) -> None:
        """Send a job's message, unless it has been dropped meanwhile. Raises QueueFull."""
        with self.lock:
            if job.number in self.jobs:
                self.outbox.put(job.number, data)
                job.posted = True

    def post_prepared(self, job: Job, data: bytes) -> None:
        try:
            self.post(job, data)
        except QueueFull as error:
            self.drop(job)
            job.put(error)

    def drop(self, job: Job) -> None:
        with self.lock:
            known = self.jobs.pop(job.number, None)
        if not known:
            return
        if job.order:
            self.workshop.drop(job.order)
        if job.posted and not self.outbox.take_back(job.number):
            self.outbox.put(job.number, pickle.dumps(("cancel", job.number)), bounded=False)

    def write(self) -> None:
        """The only sender: a handler must not wait for an engine that is inside a long step."""
        try:
            while message := self.outbox.get():
                self.conn.send_bytes(message)
        except OSError:
            pass  # dead: the reader tells

    def read(self) -> None:
        reason = f"{self.spec.path}: the engine process ended"
        while True:
            try:
                kind, payload = unpack(self.conn.recv_bytes(self.MESSAGE))
                self.heard = time.monotonic()
                if kind == "events":
                    self.deliver(itertools.starmap(unpack_event, payload))
                    continue
                if kind == "failed":
                    reason = str(payload)
                    continue
                if kind == "ready":
                    self.be_ready(EngineInfo(**payload))
                    reason = "the engine process ended"
                self.progress = float(payload) if kind == "progress" else 1.0
            except (EOFError, OSError):
                break
            except Exception as error:  # whatever a broken or taken over process may send
                self.end("the engine has sent what is no message of its own", error)
                break
            self.tell()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(10)
        if self.why:
            reason = self.why
        elif self.process.exitcode:
            reason += f" ({describe_exit(self.process.exitcode)})"
        with self.lock:
            self.dead = reason
            jobs, self.jobs = list(self.jobs.values()), {}
        self.tell()  # before its jobs: a client that has got a 500 may ask for /health at once
        for job in jobs:
            job.put(EngineFailed(public(reason)))
        self.gone.set()
        self.outbox.close()
        self.workshop.close()
        # What the writer is about to send would else go to another process, whose pipe has got the number of this one.
        self.writer.join(10)
        self.child.close()

    def be_ready(self, info: EngineInfo) -> None:
        self.info = info
        if info.recipe:
            self.workshop.setup = pickle.dumps(("template", *info.recipe), pickle.HIGHEST_PROTOCOL)
            self.workshop.warm()

    def watch(self) -> None:
        while not self.gone.wait(1):
            self.look_after()

    def look_after(self) -> None:
        now = time.monotonic()
        if self.info is None:
            if now - self.born > self.load_timeout:
                self.end(f"{self.spec.path}: not loaded within {self.load_timeout:g} s (--load-timeout)")
            return
        with self.lock:
            owes = any(job.posted for job in self.jobs.values())
        if not owes:
            self.heard = now  # it has nothing to say
        silent, still = now - self.heard, 0.0
        if not owes or silent < self.QUIET_S:
            self.pulse.rest()
        else:
            still = self.pulse.still()
        if (still > self.HANGS_S) != self.hangs:
            self.hangs = not self.hangs
            log.warning("the engine %s", "is silent and does not compute: it hangs" if self.hangs else "goes on")
        if still > self.ENDS_S:
            self.end(f"the engine hung: it did nothing for {still:.0f} s")
        elif owes and silent > self.patience + 1:
            self.end(f"the engine said nothing for {silent:.0f} s (--engine-silence)")

    def end(self, why: str, error: Exception | None = None) -> None:
        """Kill it; `why` is what its jobs are told."""
        self.why = self.why or why
        log.error("%s: killing it%s", why, f" ({type(error).__name__}: {public(str(error))})" if error else "")
        self.process.kill()

    def deliver(self, events: Iterable[tuple[int, Event]]) -> None:
        for number, event in events:
            job = self.jobs.get(number)
            if job is None:
                continue  # cancelled; the engine had not heard of it yet
            if isinstance(event, Delta):
                job.open -= event.finish is not None
            elif isinstance(event, Started):
                job.running = True
            elif not isinstance(event, Details):
                job.open = 0
            if not job.open:
                with self.lock:
                    self.jobs.pop(number, None)
            job.put(event)

    def kill(self) -> None:
        """For an engine that hangs. Its jobs fail as in a crash; when this returns no job can be submitted to it any more."""
        self.process.kill()
        if threading.get_ident() != self.reader.ident:
            self.reader.join(5)

    def close(self) -> None:
        """End the process: politely, then not. One that is still loading would not listen."""
        if self.info is None:
            self.process.kill()
        self.workshop.close()
        self.outbox.put(-1, pickle.dumps(("close",)), bounded=False)
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
