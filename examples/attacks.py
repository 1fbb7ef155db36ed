#!/usr/bin/env python3
"""Attack a server of one's own, and see what an honest client notices:

    python examples/attacks.py [only=NAME,…] [seconds=20] [flags of the server, such as -m model.gguf --backend llamacpp]

For each attack a fresh server: one stream alone, the same while the attack runs, and 20 s after it. Prints how much of its rate
the stream kept, its longest gap, the longest wait for the next one, /health's p99, and the memory of all the server's processes before, at
most and afterwards.
Linux, standard library only.
"""

import contextlib
import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from soak import Soak, children, resident_mb

# The honest stream comes from another address than the attack.
HONEST = {"Content-Type": "application/json", "X-Forwarded-For": "10.0.0.7"}
HELLO = [{"role": "user", "content": "Hello"}]
MB = 1 << 20


class Siege:
    """A server, one honest stream, a watch over /health, and an attack."""

    def __init__(self, flags: list[str]):
        self.soak = Soak([*flags, "--trusted-proxy", "127.0.0.1"])
        self.port = self.soak.port
        self.over, self.under_attack = threading.Event(), threading.Event()
        self.times: list[float] = []  # when the honest stream got something
        self.begun: list[float] = []  # when one was asked for
        self.health: list[float] = []

    def memory(self) -> list[float]:
        """MB of the server, and of its processes together."""
        pid = self.soak.process.pid
        return [resident_mb(pid), sum(resident_mb(one) for one in children(pid))]

    def honest(self) -> None:
        """One long stream after the other; a refusal is a wait for the next."""
        body = {"messages": HELLO, "max_tokens": 2000, "ignore_eos": True, "stream": True, "temperature": 0}
        while not self.over.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
                with contextlib.closing(connection):
                    self.begun.append(time.monotonic())
                    connection.request("POST", "/v1/chat/completions", json.dumps(body), HONEST)
                    reply = connection.getresponse()
                    while not self.over.is_set() and (line := reply.readline()):
                        if b'"content"' in line:
                            self.times.append(time.monotonic())
            time.sleep(0.01)

    def watch(self) -> None:
        while not self.over.is_set():
            start = time.monotonic()
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
                with contextlib.closing(connection):
                    connection.request("GET", "/health")
                    connection.getresponse().read()
            if self.under_attack.is_set():
                self.health.append(time.monotonic() - start)
            time.sleep(0.05)

    def rate(self, since: float, until: float) -> float:
        return sum(since < at < until for at in self.times) / (until - since)

    def run(self, name: str, seconds: float) -> str:
        threading.Thread(target=self.honest, daemon=True).start()
        threading.Thread(target=self.watch, daemon=True).start()
        time.sleep(3)
        alone = time.monotonic()
        time.sleep(6)
        start, before = time.monotonic(), self.memory()
        self.under_attack.set()
        attackers = subprocess.Popen([sys.executable, __file__, f"attack={name}", str(self.port)], stdout=subprocess.PIPE)
        most = before
        try:
            while time.monotonic() < start + seconds:
                time.sleep(0.5)
                most = [max(pair) for pair in zip(most, self.memory(), strict=True)]
        finally:
            attackers.terminate()
        self.under_attack.clear()
        end = time.monotonic()
        told = json.loads(attackers.communicate()[0] or "{}")
        time.sleep(20)
        after = self.memory()
        self.over.set()
        kept = self.rate(start, end) / self.rate(alone, start)
        during = [start, *(at for at in self.times if start < at < end), end]
        gap = wait = 0.0
        for a, b in zip(during, during[1:], strict=False):
            if any(a < begun < b for begun in self.begun):
                wait = max(wait, b - a)
            else:
                gap = max(gap, b - a)
        health = sorted(self.health)[int(len(self.health) * 0.99)] if self.health else float("nan")
        memory = ", ".join(" → ".join(f"{mb:.0f}" for mb in mbs) for mbs in zip(before, most, after, strict=True))
        said = ", ".join(f"{count} × {what}" for what, count in sorted(told.items(), key=lambda one: -one[1])[:4])
        return f"| {name} | {kept:.2f} | {gap:.2f} | {wait:.2f} | {health:.2f} | {memory} | {said} |"


class Attackers:
    """A process of their own: what they cost the machine, they cost it there."""

    def __init__(self, port: int):
        self.port, self.said = port, dict[str, int]()

    def send(self, path: str, body: Any, timeout: float = 30) -> None:
        """One request of the attacker's; the first line of what it gets is counted."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        what = "no answer"
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
            with contextlib.closing(connection):
                connection.request("POST", path, data, {"Content-Type": "application/json"})
                reply = connection.getresponse()
                what = (
                    f"{reply.status} {reply.read(300)[:60].decode(errors='replace')}"
                    if reply.status >= 500
                    else str(reply.status)
                )
        self.said[what] = self.said.get(what, 0) + 1

    def crowd(self, count: int, act: Callable[[int], None]) -> None:
        """`count` attackers, each doing `act(its number)` over and over."""

        def one(number: int) -> None:
            while True:
                act(number)
                time.sleep(0.01)

        for number in range(count):
            threading.Thread(target=one, args=(number,), daemon=True).start()

    def over(self, *_: object) -> None:
        print(json.dumps(self.said), flush=True)
        os._exit(0)


# ── the attacks ──


def stop_ids(hostile: Attackers) -> None:
    body = json.dumps({"prompt": ["x"] * 12, "n": 8, "stop_token_ids": list(range(950_000))}).encode()
    hostile.crowd(4, lambda _: hostile.send("/v1/completions", body))


def choices(hostile: Attackers) -> None:
    body = json.dumps({"messages": HELLO, "structured_outputs": {"choice": [f"{i:x}" * 3 for i in range(400_000)]}}).encode()
    hostile.crowd(8, lambda _: hostile.send("/v1/chat/completions", body))


def grammars(hostile: Attackers) -> None:
    """A schema never seen before in each request, and one as large as is allowed."""
    numbers = iter(range(10**9))

    def act(_: int) -> None:
        n = next(numbers)
        enum = [f"{n}-{i}-{'x' * 40}" for i in range(random.choice([5, 50, 2000]))]
        schema = {"type": "object", "properties": {f"p{n}": {"enum": enum}, "q": {"pattern": f"^a{{{n % 90}}}[b-z]*$"}}}
        schema["required"] = [*schema["properties"]]
        hostile.send("/v1/chat/completions", {"messages": HELLO, "max_tokens": 5, "structured_outputs": {"json": schema}})

    hostile.crowd(8, act)


def spaces(hostile: Attackers) -> None:
    body = json.dumps({"prompt": [" " * 262_000] * 7, "max_tokens": 1}).encode()
    hostile.crowd(36, lambda _: hostile.send("/v1/completions", body))


def long_prompts(hostile: Attackers) -> None:
    """As long as is allowed, never twice the same."""
    hostile.crowd(
        12,
        lambda _: hostile.send("/v1/completions", {"prompt": [f"{random.random()} " * 300] * 7, "max_tokens": 1}, timeout=60),
    )


def templates(hostile: Attackers) -> None:
    body = json.dumps({"messages": HELLO * 90_000}).encode()
    hostile.crowd(8, lambda _: hostile.send("/apply-template", body))


def bodies(hostile: Attackers) -> None:
    body = b"{" + b" " * 15 * MB
    hostile.crowd(100, lambda number: hostile.send("/nonsense" if number % 2 else "/v1/chat/completions", body))


def slow_bodies(hostile: Attackers) -> None:
    """Bodies announced whole and sent byte by byte, headers that never end."""

    def act(number: int) -> None:
        start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        if number % 2:
            start += b"Content-Length: 15000000\r\n\r\n"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", hostile.port), 5) as s:
            s.sendall(start)
            while True:
                s.sendall(b"x")
                time.sleep(1)

    hostile.crowd(300, act)


def idle(hostile: Attackers) -> None:
    """More connections than the server may have files, and none says a word."""

    def act(_: int) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", hostile.port), 5) as s:
            s.settimeout(60)
            s.recv(1)

    hostile.crowd(1100, act)


def hang_ups(hostile: Attackers) -> None:
    """Requests as large as is allowed, left before they are answered."""
    body = json.dumps({"messages": [{"role": "user", "content": "y " * 7 * MB}]}).encode()
    hostile.crowd(16, lambda _: hostile.send("/v1/chat/completions", body, timeout=0.3))


def unread(hostile: Attackers) -> None:
    """Streams of many choices that nobody reads."""
    body = json.dumps({"prompt": "x", "n": 8, "max_tokens": 2000, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    def act(_: int) -> None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", hostile.port), 5) as s:
            s.sendall(head + body)
            while True:
                time.sleep(0.2)

    hostile.crowd(60, act)


def many(hostile: Attackers) -> None:
    """Small honest requests, as many as will go."""
    hostile.crowd(48, lambda _: hostile.send("/v1/completions", {"prompt": "x", "max_tokens": 20, "n": 4}))


ATTACKS = {
    attack.__name__: attack
    for attack in [
        stop_ids,
        choices,
        grammars,
        spaces,
        long_prompts,
        templates,
        bodies,
        slow_bodies,
        idle,
        hang_ups,
        unread,
        many,
    ]
}


def main() -> None:
    given, named = sys.argv[1:], {}
    if given and given[0].startswith("attack="):
        attackers = Attackers(int(given[1]))
        signal.signal(signal.SIGTERM, attackers.over)
        ATTACKS[given[0].removeprefix("attack=")](attackers)
        signal.pause()
    while given and given[0].partition("=")[0] in ("only", "seconds"):
        name, _, named[name] = given.pop(0).partition("=")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    print(
        "| attack | rate kept | longest gap in a stream, s | longest wait for the next, s | /health p99, s | MB before → most → 20 s after: server, engine and workshop | answers |\n|---|---|---|---|---|---|---|"
    )
    for name in named.get("only", ",".join(ATTACKS)).split(","):
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))  # the server is as small as most are
        siege = Siege(given)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        try:
            print(siege.run(name, float(named.get("seconds", 20))), flush=True)
        finally:
            siege.soak.process.kill()
            siege.soak.process.wait()


if __name__ == "__main__":
    main()
