"""The log: one escaped line per event, cut at a length, as text or as JSON. What a client sends can neither forge a line nor end one."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from typing import Any

from progress import LogHandler

TEXT_FORMAT = "%(asctime)s %(levelname)s %(message)s"
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
URL_USER = re.compile(r"(?<=://)[^/@\s]+@")


def one_line(text: str, most: int) -> str:
    """Control characters escaped, users and passwords of URLs left out, cut."""
    text = URL_USER.sub("", text if len(text) <= 4 * most else text[: 4 * most])
    text = UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return text if len(text) <= most else f"{text[: most - 1]}…"


class TextLines(logging.Formatter):
    """A traceback follows in lines of its own, each indented: none looks like an event."""

    def __init__(self, most: int):
        super().__init__(TEXT_FORMAT)
        self.most = most

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = one_line(record.message, self.most)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"    {one_line(line, self.most)}" for line in super().formatException(ei).split("\n"))


class JsonLines(logging.Formatter):
    """One object a line: time, level, message; of a request also what `extra={"request": …}` says; `exception` where there is one."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        event: dict[str, Any] = {"time": stamp, "level": record.levelname, "message": one_line(record.getMessage(), self.most)}
        for name, value in getattr(record, "request", {}).items():
            event[name] = one_line(value, self.most) if isinstance(value, str) else value
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)[-8000:]
        return json.dumps(event)


FORMS = (TextLines, JsonLines)


logging.logThreads = False  # nobody reads a thread's name, and a thread that http11 started has none to be looked up


def start_like(level: int, form: logging.Formatter | None) -> None:
    """In a process of ours: as the server does."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(form or TextLines(2000))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def start(level: str, form: str = "text", most: int = 2000) -> None:
    """Log to stderr. `form`: text or json; `most`: characters of a message."""
    handler = LogHandler(sys.stderr)
    handler.setFormatter(JsonLines(most) if form == "json" else TextLines(most))
    logging.basicConfig(level=level, handlers=[handler], force=True)
