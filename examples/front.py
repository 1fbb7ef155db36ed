"""How much can the server in front carry? An engine that costs nothing gives every stream a token each step, as a GPU would.

    python examples/benchmark.py --front

The server runs in a process of its own, with this file's Fast for its engine, or behind this file's upstream server. Prints
what was delivered of what the engine made between the first connection and the last byte, the server's CPU, gaps between
chunks, /health meanwhile, and memory. Linux (it reads /proc), standard library only.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
WORD = b'"content":" word"'


class Fast:
    """A backend: every started sequence gets the token " word" each step."""

    SPECULATES = LACKS = frozenset[str]()
    LIBRARIES: tuple[str, ...] = ()
    INSTALL = ""

    def __init__(self, spec: Any, progress: Any):
        from engine import Step

        self.make, self.step_s = Step, float(os.environ["FRONT_STEP_S"])
        self.slots, self.threads, self.context, self.cache_tokens = spec.slots, 1, 100_000, 100_000
        self.eos, self.defaults, self.library = frozenset([0]), dict[str, float](), "fast 1"
        self.vocabulary, self.bos, self.template = 256, -1, self
        self.source, self.tokens = None, dict[str, str]()
        self.live: set[int] = set()
        self.count, self.next = 0, 0.0

    def render(self, prompt: Any) -> str:
        return str(prompt.messages[-1]["content"])

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        return list(text.encode())

    def piece(self, token: int, special: bool) -> bytes:
        return b" word"

    def start(self, ids: list[int], sampling: Any) -> tuple[int, int]:
        self.count += 1
        self.live.add(self.count)
        return self.count, 0

    def step(self) -> list[Any]:
        now = time.monotonic()
        self.next = max(self.next + self.step_s, now)
        time.sleep(self.next - now)
        return [self.make(seq, [65]) for seq in self.live]

    def cancel(self, seq: int) -> None:
        self.live.discard(seq)

    def close(self) -> None:
        pass


def serve(streams: int, backend: str, where: str) -> None:
    """The server's process: prints its port."""
    import catalog
    import model_init
    import openai_api_endpoint
    from engine import EngineSpec

    model = catalog.Model("fast", Path(where), "upstream" if backend == "openai" else "gguf", 1)
    models = model_init.Models(
        catalog.Catalog(fixed=[model]),
        lambda _: EngineSpec(backend, where, streams),
        model_init.Limits(max_jobs=streams + 50, patience=60, default=model.id),
    )
    server = openai_api_endpoint.Server(("127.0.0.1", 0), models)
    print(server.server_port, flush=True)
    models.preload([])
    server.serve_forever()


# ── an upstream by hand: one thread, one selector, all streams written each step ──


class Far:
    def __init__(self) -> None:
        self.step_s = float(os.environ["FRONT_STEP_S"])
        self.selector = selectors.DefaultSelector()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
        self.selector.register(self.listener, selectors.EVENT_READ, bytearray())
        self.left: dict[socket.socket, int] = {}  # tokens of each stream that are to come

    def run(self) -> None:
        print(self.listener.getsockname()[1], flush=True)
        due = time.monotonic()
        while True:
            for key, _ in self.selector.select(max(0.0, due - time.monotonic())):
                sock: Any = key.fileobj
                if sock is self.listener:
                    connection, _ = sock.accept()
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    self.selector.register(connection, selectors.EVENT_READ, bytearray())
                else:
                    self.receive(sock, key.data)
            if time.monotonic() >= due:
                due = max(due + self.step_s, time.monotonic())
                for sock in list(self.left):
                    self.say(sock)

    def receive(self, sock: socket.socket, held: bytearray) -> None:
        data = sock.recv(1 << 16)
        held += data
        head, end, body = held.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0)
        if not data:
            self.hang_up(sock)
        elif end and len(body) >= length:
            held.clear()
            if head.startswith(b"GET"):
                listing = json.dumps({"object": "list", "data": [{"id": "far", "object": "model"}]}).encode()
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(listing), listing))
            else:
                self.left[sock] = json.loads(body)["max_tokens"]
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def say(self, sock: socket.socket) -> None:
        self.left[sock] -= 1
        done = self.left[sock] == 0
        choice = {"index": 0, "delta": {"content": " word"}, "finish_reason": "length" if done else None}
        common = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "far"}
        data = b"data: %s\n\n" % json.dumps(common | {"choices": [choice]}).encode()
        data = b"%x\r\n%s\r\n" % (len(data), data) + (b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" if done else b"")
        try:
            sock.sendall(data)
            if done:
                del self.left[sock]
        except OSError:
            self.hang_up(sock)

    def hang_up(self, sock: socket.socket) -> None:
        self.left.pop(sock, None)
        self.selector.unregister(sock)
        sock.close()


# ── the client ──


class Child:
    """A process of this file's, that says its port."""

    def __init__(self, step_s: float, *arguments: object):
        environment = {**os.environ, "FRONT_STEP_S": str(step_s), "PYTHONPATH": os.pathsep.join(sys.path[:2])}
        command = [sys.executable, __file__, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())
        self.url = f"http://127.0.0.1:{self.port}"

    def ready(self) -> Child:
        while b" 200 " not in self.health():
            time.sleep(0.05)
        return self

    def health(self) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port)) as sock:
            sock.sendall(HEALTH)
            return b"".join(iter(lambda: sock.recv(1 << 16), b""))

    def cpu(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes in memory."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


class Client:
    def __init__(self) -> None:
        self.first = self.last = 0.0
        self.gaps: list[float] = []
        self.words = self.chunks = 0
        self.done = False

    def receive(self, data: bytes) -> None:
        now = time.perf_counter()
        if self.last:
            self.gaps.append(now - self.last)
        self.last = now
        self.words += data.count(b" word")
        self.chunks += data.count(WORD)
        self.done = self.done or b"[DONE]" in data


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(p * len(ordered)))] if ordered else float("nan")


def carry(server: Child, streams: int, step_s: float, tokens: int, probe: Any) -> dict[str, float]:
    """So many streams at once, until all have ended."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
    selector, clients = selectors.DefaultSelector(), []
    memory, peak, cpu, start = server.memory(), 0, server.cpu(), time.perf_counter()
    for _ in range(streams):
        sock = socket.create_connection(("127.0.0.1", server.port))
        sock.sendall(request)
        clients.append(Client())
        selector.register(sock, selectors.EVENT_READ, clients[-1])
    prober = probe(server.url)
    while selector.get_map():
        for key, _ in selector.select(60):
            sock = key.fileobj  # type: ignore[assignment]
            if data := sock.recv(1 << 16):
                key.data.receive(data)
            else:
                selector.unregister(sock)
                sock.close()
        if not peak and time.perf_counter() - start > tokens * step_s / 2:
            peak = server.memory()
    seconds, cpu = time.perf_counter() - start, server.cpu() - cpu
    if not all(client.done for client in clients):
        raise SystemExit("a stream broke off")
    health, words = prober.ask("stop"), sum(client.words for client in clients)
    gaps = [gap for client in clients for gap in client.gaps]
    return {
        "delivered": words / seconds * step_s / streams, "chunks": sum(c.chunks for c in clients) / words,
        "cpu": 1000 * cpu / words, "gap_p50": percentile(gaps, 0.5) * 1000, "gap_p99": percentile(gaps, 0.99) * 1000,
        "health_p50": percentile(health, 0.5) * 1000, "health_p99": percentile(health, 0.99) * 1000,
        "memory": (peak - memory) / streams / 1024,
    }  # fmt: skip


def burst(server: Child, connections: int) -> float:
    """Connections opened at once, a GET /health each: how many are answered in a second."""
    selector, start = selectors.DefaultSelector(), time.perf_counter()
    for _ in range(connections):
        sock = socket.socket()
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", server.port))
        selector.register(sock, selectors.EVENT_WRITE)
    while selector.get_map():
        for key, mask in selector.select(60):
            sock = key.fileobj  # type: ignore[assignment]
            if mask & selectors.EVENT_WRITE:
                sock.sendall(HEALTH)
                selector.modify(sock, selectors.EVENT_READ)
            elif not sock.recv(1 << 16):
                selector.unregister(sock)
                sock.close()
    return connections / (time.perf_counter() - start)


LOADS = [(64, 0.02), (256, 0.02), (1000, 0.1)]  # streams, seconds between two tokens


def rows(tokens: int, probe: Any) -> str:
    """All of it, as a table. `probe(url)` starts a process that asks for /health until it is told to stop."""
    names = [
        "delivered",
        "chunks per token",
        "server CPU s per 1,000 tokens",
        "gap p50 / p99 ms",
        "/health p50 / p99 ms",
        "kB a stream",
    ]
    lines = ["| load | " + " | ".join(names) + " |", "|" + "---|" * 7]

    def measure(name: str, server: Child, streams: int, step_s: float) -> None:
        try:
            carry(server.ready(), min(streams, 50), step_s, 5, probe)  # warm
            row = carry(server, streams, step_s, tokens, probe)
        finally:
            server.close()
        lines.append(
            f"| {name} | {row['delivered']:.2f} | {row['chunks']:.2f} | {row['cpu']:.3f} | {row['gap_p50']:.0f} / {row['gap_p99']:.0f} "
            f"| {row['health_p50']:.1f} / {row['health_p99']:.1f} | {row['memory']:.0f} |"
        )

    for streams, step_s in LOADS:
        measure(f"{streams} × {1 / step_s:g} tokens/s", Child(step_s, "serve", streams, "front:Fast", ROOT), streams, step_s)
    streams, step_s = LOADS[1]
    far = Child(step_s, "upstream")
    try:
        through = Child(step_s, "serve", streams, "openai", far.url)
        measure(f"{streams} × {1 / step_s:g}, through an upstream", through, streams, step_s)
    finally:
        far.close()
    server = Child(step_s, "serve", streams, "front:Fast", ROOT)
    try:
        burst(server.ready(), 50)
        rate = burst(server, 2000)
    finally:
        server.close()
    return "\n".join(lines) + f"\n\n2,000 connections opened at once: {rate:.0f} answered in a second"


if __name__ == "__main__":
    if sys.argv[1] == "upstream":
        Far().run()
    else:
        serve(int(sys.argv[2]), sys.argv[3], sys.argv[4])
