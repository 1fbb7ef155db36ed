"""How far something long is: on a terminal one line that is drawn over and over, in a log a line for every 10 %."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

log = logging.getLogger("openai_api_endpoint")
DRAW_S = 0.2  # between two looks of a bar, so that its seconds go on where its fraction does not
CLEAR = "\r\033[K"


class Progress:
    """`size`: bytes in all, for the rate; 0: not told. `lasts`: is it still going on? A bar ends by itself when it is not."""

    def __init__(self, what: str, size: int = 0, lasts: Callable[[], bool] = lambda: True, out: TextIO | None = None):
        self.what, self.size, self.lasts, self.out = what, size, lasts, out or sys.stderr
        self.fraction, self.told = 0.0, 0
        self.began = self.moved = time.monotonic()  # moved: when the fraction was last another
        self.ended = threading.Event()
        self.lock = threading.Lock()  # whoever draws
        self.is_bar = self.out.isatty()
        if self.is_bar:
            threading.Thread(target=self.draw_on, name="progress", daemon=True).start()

    def show(self, fraction: float) -> None:
        """0..1"""
        with self.lock:
            if fraction > self.fraction:
                self.fraction, self.moved = min(1.0, fraction), time.monotonic()
            tenths = int(self.fraction * 10 + 1e-9)
            if not self.is_bar and tenths > self.told:
                self.told = tenths
                log.info("%s", self.line())

    def close(self) -> None:
        """Take the bar away. Harmless when it has gone."""
        with self.lock:
            if self.is_bar and not self.ended.is_set():
                print(CLEAR, end="", file=self.out, flush=True)
            self.ended.set()

    def draw_on(self) -> None:
        while self.lasts() and not self.ended.is_set():
            with self.lock:
                if not self.ended.is_set():
                    columns = shutil.get_terminal_size().columns
                    print(f"{CLEAR}{self.line(20)[: columns - 1]}", end="", file=self.out, flush=True)
            self.ended.wait(DRAW_S)
        self.close()

    def line(self, width: int = 0) -> str:
        """`width`: characters of the bar."""
        spent, done = self.moved - self.began, self.fraction
        if not done:  # not every library tells how far it is
            return f"{self.what}: {time.monotonic() - self.began:.0f} s"
        bar = ("█" * round(done * width)).ljust(width, "░") + " " if width else ""
        parts = [f"{self.what}: {bar}{done:.0%}"]
        if spent > 0.5:
            if self.size:
                parts.append(f"{done * self.size / spent / 1e6:.0f} MB/s")
            if done < 1:
                parts.append(f"{spent / done - spent:.0f} s left")
        return ", ".join(parts)


class LogHandler(logging.StreamHandler[TextIO]):
    """A log on a terminal, whose lines do not begin behind a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream.isatty():
            self.stream.write(CLEAR)
        super().emit(record)
