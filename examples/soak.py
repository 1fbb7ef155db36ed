#!/usr/bin/env python3
"""Leave a server under mixed traffic, kill its engine every minute, and see what is left of it:

    python examples/soak.py [minutes=10] [flags of the server, such as -m model.gguf --backend llamacpp]

Streams and replies, clients that leave in the middle, requests that must be refused, constraints and prompts of all kinds.
Prints memory, threads and open files of the server and its processes, and what became of the requests, at the start, every
minute and at the end. Exit status 1 where a request got an answer that it should not have got. Linux, standard library only.
"""

import collections
import contextlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "openai_api_endpoint.py"
CLIENTS = 6
WHILE_IT_STARTS_AGAIN = {500, 503}  # the engine was killed under the request, or is not back yet: told, and expected
BUSY = {429}


class Soak:
    """The server, and what its clients have seen."""

    def __init__(self, flags: list[str]):
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "-p", "0", *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout
        for line in self.process.stdout:
            if found := re.search(r"listening on http://[^:]+:(\d+)", line):
                self.port = int(found[1])
            if "-d '" in line:
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=self.process.stdout.read, daemon=True).start()
        self.seen: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.over = threading.Event()

    # ── what clients do ──

    def ask(self, path: str, body: Any, leave_after: int | None = None) -> tuple[int, bytes]:
        """The reply; `leave_after` so many bytes the client hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            return reply.status, reply.read(leave_after)

    def reply(self, rng: random.Random) -> tuple[str, bool]:
        status, data = self.ask("/v1/chat/completions", chat(rng))
        return f"reply {status}", status == 200 and json.loads(data)["usage"]["completion_tokens"] > 0

    def stream(self, rng: random.Random) -> tuple[str, bool]:
        status, data = self.ask("/v1/chat/completions", chat(rng, stream=True))
        whole = data.endswith(b"data: [DONE]\n\n")
        if status == 200 and b'"error"' in data:
            return "stream broken off, and told", whole
        return f"stream {status}", status == 200 and whole

    def leave(self, rng: random.Random) -> tuple[str, bool]:
        status, _ = self.ask("/v1/chat/completions", chat(rng, stream=True, max_tokens=400), rng.choice([0, 1, 500, 5000]))
        return f"left {status}", status == 200

    def constrained(self, rng: random.Random) -> tuple[str, bool]:
        words = [f"{rng.choice(WORDS)} {rng.randrange(5)}" for _ in range(3)]
        status, data = self.ask("/v1/chat/completions", chat(rng, structured_outputs={"choice": words}))
        text = json.loads(data)["choices"][0]["message"]["content"] if status == 200 else ""
        return f"constrained {status}", status == 200 and any(word.startswith(text) for word in words)  # max_tokens may cut it

    def tokens(self, rng: random.Random) -> tuple[str, bool]:
        status, data = self.ask("/tokenize", {"content": " ".join(rng.choices(WORDS, k=200))})
        return f"tokenize {status}", status == 200 and json.loads(data)["count"] > 0

    def bad(self, rng: random.Random) -> tuple[str, bool]:
        path, body = rng.choice(BAD)
        status, _ = self.ask(path, body)
        return f"bad {status}", status in (400, 404)

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        kinds: list[Callable[[random.Random], tuple[str, bool]]] = [self.reply, self.stream, self.leave, self.constrained]
        kinds += [self.tokens, self.bad, self.bad]
        while not self.over.is_set():
            kind = rng.choice(kinds)
            try:
                what, well = kind(rng)
            except Exception as error:
                what, well = f"{kind.__name__}: {type(error).__name__} {error}", False
            self.seen[what] += 1
            told = what.rpartition(" ")[2]
            if not well and not (told.isdigit() and int(told) in WHILE_IT_STARTS_AGAIN | BUSY):
                self.wrong.append(what)

    # ── what is seen of it ──

    def engine(self) -> int | None:
        """The process that has used the most CPU time is the engine."""
        found = {pid: cpu_ticks(pid) for pid in children(self.process.pid)}
        return max(found, key=lambda pid: found[pid], default=None)

    def kill_engine(self) -> None:
        if pid := self.engine():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def tell(self, when: str) -> None:
        pids = [self.process.pid, *children(self.process.pid)]
        figures = ", ".join(f"{resident_mb(pid):.0f} MB {threads(pid)} threads {files(pid)} files" for pid in pids)
        print(f"{when:>8}  server and its processes: {figures}", flush=True)

    def run(self, minutes: float) -> int:
        self.tell("start")
        clients = [threading.Thread(target=self.client, args=(seed,), daemon=True) for seed in range(CLIENTS)]
        for client in clients:
            client.start()
        end, minute = time.monotonic() + minutes * 60, 0
        while time.monotonic() < end:
            time.sleep(min(60, max(0, end - time.monotonic())))
            minute += 1
            self.tell(f"{minute} min")
            if time.monotonic() < end:
                self.kill_engine()
        self.over.set()
        for client in clients:
            client.join(120)
        status = self.ask("/v1/chat/completions", chat(random.Random(0)))[0]
        time.sleep(20)
        self.tell("end")
        for what, count in sorted(self.seen.items()):
            print(f"{count:8}  {what}")
        print(
            f"{len(self.wrong)} answers were wrong{': ' if self.wrong else ''}{'; '.join(self.wrong[:10])}; the last request: {status}"
        )
        pids = children(self.process.pid)
        self.process.kill()
        time.sleep(5)
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists() and state(pid) != "Z"]
        print(f"5 s after kill -9 of the server {len(left)} of its {len(pids)} processes were left")
        return int(bool(self.wrong or left or status != 200))


WORDS = ["river", "stone", "paper", "cloud", "number", "seven", "lantern", "green", "under", "slowly", "bridge", "winter"]


def chat(rng: random.Random, **fields: Any) -> dict[str, Any]:
    text = "Say something about: " + " ".join(rng.choices(WORDS, k=rng.choice([3, 30, 300])))
    return {"messages": [{"role": "user", "content": text}], "max_tokens": rng.choice([1, 20, 60]), **fields}


HELLO = [{"role": "user", "content": "Hello"}]
DEEP: Any = "x"
for _ in range(150):
    DEEP = {"items": DEEP}
BAD: list[tuple[str, Any]] = [
    ("/v1/chat/completions", {}),
    ("/v1/chat/completions", {"messages": HELLO, "temperature": "hot"}),
    ("/v1/chat/completions", {"messages": HELLO, "stop_token_ids": list(range(100_000))}),
    ("/v1/chat/completions", {"messages": HELLO, "max_tokens": 10**12}),
    ("/v1/chat/completions", {"messages": HELLO * 60_000}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": " " * 6_000_000}]}),
    ("/v1/chat/completions", {"messages": HELLO, "structured_outputs": {"choice": ["x" * 1_000_000]}}),
    ("/v1/chat/completions", {"messages": HELLO, "structured_outputs": {"choice": [str(i) for i in range(100_000)]}}),
    ("/v1/chat/completions", {"messages": HELLO, "structured_outputs": {"regex": "(a|aa)*" * 100 + r"\1"}}),
    ("/v1/chat/completions", {"messages": HELLO, "structured_outputs": {"json": DEEP}}),
    ("/v1/completions", {"prompt": ["x"] * 256, "n": 8}),
    ("/v1/completions", {"prompt": [" " * 40_000] * 300}),
    ("/apply-template", {"messages": HELLO * 60_000}),
    ("/tokenize", {"content": "x" * 9_000_000}),
    ("/nonsense", {}),
]


def children(pid: int) -> list[int]:
    found = " ".join(read(task) for task in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return sorted(int(one) for one in found if "spawn_main" in read(Path(f"/proc/{one}/cmdline")))


def read(path: Path) -> str:
    """Empty for a process or thread that has just ended."""
    try:
        return path.read_text()
    except OSError:
        return ""


def stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ["Z"] + ["0"] * 30


def state(pid: int) -> str:
    return stat(pid)[0]


def cpu_ticks(pid: int) -> int:
    return int(stat(pid)[11]) + int(stat(pid)[12])


def threads(pid: int) -> int:
    return int(stat(pid)[17])


def resident_mb(pid: int) -> float:
    return int(stat(pid)[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


if __name__ == "__main__":
    given = sys.argv[1:]
    minutes = float(given.pop(0).removeprefix("minutes=")) if given and not given[0].startswith("-") else 10.0
    soak = Soak(given)
    try:
        sys.exit(soak.run(minutes))
    finally:
        soak.process.kill()
