"""Responses that are made while nobody waits: a thread takes an answer in, keeps its events, and tells whoever follows.

The client may leave, come back and follow again from where it was. What is under way dies with the server: the state then says so.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from api_errors import ApiError, as_api_error
from api_reply import Completion, merge
from engine import Delta, Event, Started, log
from engine_handle import Job
from responses_api import Answer, split_events

KEPT_S, MOST_KEPT = 600, 256  # for how long, and of how many finished responses, the events are kept to be followed


class Background:
    """One response under way. `events[i]` has the sequence number i; they only grow, and end when `done` is set."""

    def __init__(self, job: Job, completion: Completion, answer: Answer, patience: float, ended: Callable[..., None]):
        self.job, self.completion, self.answer, self.patience = job, completion, answer, patience
        self.ended = ended  # called at the end with the seconds that the metrics count
        self.began, self.first = time.monotonic(), 0.0  # when it was asked for, and when its first delta came
        self.events: list[bytes] = []
        self.changed = threading.Condition()
        self.done = 0.0  # when it ended
        self.cancelled = False

    def start(self) -> None:
        threading.Thread(target=self.run, name=f"background-{self.completion.id}", daemon=True).start()

    def run(self) -> None:
        try:
            self.take()
            self.tell(self.answer.cancelled() if self.cancelled else self.answer.end({}))
        except Exception as error:
            told = as_api_error(error)
            log.info("%s: %s", self.completion.id, told.message)
            self.begin()
            self.tell(self.answer.failed(told))
        finally:
            self.job.cancel()
            now, queued = time.monotonic(), self.completion.started_at - self.began
            self.ended(queued=max(0.0, queued), first=max(0.0, self.first - self.began), whole=now - self.began)
            with self.changed:
                self.done = now
                self.changed.notify_all()
            log.info(
                "%s in the background: prompt=%d completion=%d",
                self.completion.id,
                self.completion.prompt_tokens,
                self.completion.tokens,
            )

    def take(self) -> None:
        """The job's events, until the choice has finished. Raises its errors, and 504."""
        clock = 0.0  # when the engine last said anything of it; 0: it waits for its turn, which nobody is blamed for
        while not self.cancelled and not self.completion.choices[0].finish:
            events = self.job.take(1.0)
            now = time.monotonic()
            if events:
                clock = now
            elif clock and now - clock > self.patience:
                raise ApiError(504, f"No answer within {self.patience:g} s (--request-timeout).", code="timeout")
            for event in merge(events):
                self.handle(event)

    def handle(self, event: Event | Exception) -> None:
        if isinstance(event, Exception):
            raise event
        if isinstance(event, Started):
            self.completion.start(event)
            self.begin()
        elif isinstance(event, Delta):
            self.first = self.first or time.monotonic()
            self.begin()
            self.tell(self.answer.delta(self.completion.add(event)))

    def begin(self) -> None:
        if not self.events:
            self.answer.begun_in_background()
            self.tell(self.answer.opening())

    def tell(self, data: bytes) -> None:
        with self.changed:
            self.events += split_events(data)
            self.changed.notify_all()

    def cancel(self) -> None:
        """Returns when it has ended."""
        self.cancelled = True
        self.job.cancel()
        self.job.wake()
        with self.changed:
            self.changed.wait_for(lambda: self.done, timeout=5)

    def after(self, number: int, timeout: float) -> tuple[list[bytes], bool]:
        """The events from this number on, waiting for some; and whether there will be no more."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.events) > number or self.done, timeout)
            return self.events[number:], bool(self.done)


class Running:
    """The responses that are made in the background, and those that were a while ago."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.all: dict[str, Background] = {}

    def add(self, id: str, one: Background) -> None:
        with self.lock:
            self.all[id] = one
            old = [id for id, one in self.all.items() if one.done]
            keep = set(old[-MOST_KEPT:])
            for id in old:
                if id not in keep or self.all[id].done < time.monotonic() - KEPT_S:
                    del self.all[id]

    def get(self, id: str) -> Background | None:
        return self.all.get(id)

    def under_way(self, id: str) -> bool:
        one = self.all.get(id)
        return one is not None and not one.done

    def forget(self, id: str) -> None:
        with self.lock:
            one = self.all.pop(id, None)
        if one and not one.done:
            one.answer.keep = lambda response: None
            one.cancel()
