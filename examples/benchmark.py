#!/usr/bin/env python3
"""How fast is the server, and how much does it cost over the bare engine?

    python openai_api_endpoint.py --max-parallel 32                      # in one terminal
    python examples/benchmark.py http://localhost:8000 --raw llamacpp    # in another
    python examples/benchmark.py --front                                 # the server alone, by itself

N streams at once, each a chat of its own; tokens/s, time to first token (TTFT), time between tokens (ITL), and how long
/health takes meanwhile. With --raw the same prompts run through the bare library, without HTTP, in turns with the server;
with --peer NAME=URL other servers take their turns too. Ratios are medians over the rounds, each within one round: on a
noisy machine a ratio holds where a speed does not. Standard library only; the client is a process of its own, and the
table says how much CPU it took.
"""

from __future__ import annotations

import argparse
import array
import base64
import contextlib
import http.client
import json
import multiprocessing
import os
import selectors
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import front

TOPICS = [
    "a lighthouse",
    "the sea",
    "two brothers",
    "a clockmaker",
    "a desert",
    "an old train",
    "winter",
    "a library",
    "a garden",
    "a storm",
]


def prompt(round_: int, stream: int) -> str:
    return f"Story {round_}-{stream}. Write a very long story about {TOPICS[(round_ * 7 + stream) % len(TOPICS)]}, in many chapters."


def percentile(values: list[float], p: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(p * len(ordered)))] if ordered else float("nan")


def summary(tokens: int, seconds: float, first: list[float], gaps: list[float], cpu: float = 0.0) -> dict[str, float]:
    row = {"tokens_per_s": tokens / seconds, "tokens": tokens, "seconds": seconds, "client_cpu": cpu / seconds}
    for name, values in (("ttft", first), ("itl", gaps)):
        row |= {f"{name}_p50_ms": percentile(values, 0.5) * 1000, f"{name}_p99_ms": percentile(values, 0.99) * 1000}
    return row


# ── over HTTP: one thread, one selector, N sockets ──


class Stream:
    def __init__(self, url: str, body: dict[str, Any]):
        parts = urlsplit(url)
        path = parts.path.rstrip("/") + "/v1/chat/completions"
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        )
        self.socket = socket.create_connection((parts.hostname or "localhost", parts.port or 80))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sent = self.last = time.perf_counter()
        self.socket.sendall((head + "Connection: close\r\n\r\n").encode() + data)
        self.first = 0.0
        self.gaps: list[float] = []
        self.chunks = 0
        self.tail = b""

    def receive(self) -> bool:
        """False at the end. Counts chunks without parsing them: JSON for every token would be what is measured."""
        data = self.socket.recv(1 << 16)
        now = time.perf_counter()
        count = (
            data.count(b'"content":"')
            + data.count(b'"content": "')
            - data.count(b'"content":""')
            - data.count(b'"content": ""')
        )
        if count > 0:
            if self.first:
                self.gaps.append(now - self.last)
            else:
                self.first = now - self.sent
            self.chunks += count
            self.last = now
        self.tail = (self.tail + data)[-1500:]
        return bool(data) and b"data: [DONE]" not in self.tail

    def tokens(self) -> int:
        """From the usage chunk; a server without one sends a chunk per token."""
        at = self.tail.rfind(b'"completion_tokens":')
        digits = self.tail[at + 20 :].lstrip()[:8] if at >= 0 else b""
        number = bytes(b for b in digits.split(b",")[0].split(b"}")[0] if 48 <= b <= 57)
        return int(number) if number else self.chunks


def http_round(url: str, streams: int, tokens: int, round_: int, extra: dict[str, Any]) -> dict[str, float]:
    cpu, start = time.process_time(), time.perf_counter()
    selector = selectors.DefaultSelector()
    running = []
    for i in range(streams):
        body = {"model": "benchmark", "messages": [{"role": "user", "content": prompt(round_, i)}], "max_tokens": tokens}
        stream = Stream(
            url, body | {"temperature": 0.8, "seed": i, "stream": True, "stream_options": {"include_usage": True}} | extra
        )
        selector.register(stream.socket, selectors.EVENT_READ, stream)
        running.append(stream)
    left = streams
    while left:
        for key, _ in selector.select():
            if not key.data.receive():
                selector.unregister(key.fileobj)
                left -= 1
    seconds = time.perf_counter() - start
    for stream in running:
        stream.socket.close()
        if not stream.chunks:
            raise SystemExit(f"{url}: a stream brought no tokens: {stream.tail[-300:]!r}")
    gaps = [gap for stream in running for gap in stream.gaps]
    cpu = time.process_time() - cpu
    return summary(sum(s.tokens() for s in running), seconds, [s.first for s in running], gaps, cpu)


def probe_health(url: str, conn: Connection) -> None:
    """GET /health on a new connection every 50 ms until told to stop; sends back the times in seconds."""
    parts, times = urlsplit(url), []
    conn.send("ready")
    while not conn.poll(0.05):
        start = time.perf_counter()
        client = http.client.HTTPConnection(parts.hostname or "localhost", parts.port, timeout=30)
        client.request("GET", "/health")
        client.getresponse().read()
        client.close()
        times.append(time.perf_counter() - start)
    conn.send(times)


# ── the bare libraries: the same prompts, the same batching, no HTTP ──


class RawOpenVino:
    """ContinuousBatchingPipeline: add_request, step, read."""

    def __init__(self, path: str, slots: int, threads: int):
        import numpy
        import openvino
        import openvino_genai

        genai: Any = openvino_genai
        tensor: Any = openvino.Tensor
        self.genai = genai
        self.tensor: Callable[[list[int]], Any] = lambda ids: tensor(numpy.array([ids], dtype=numpy.int64))
        config = genai.SchedulerConfig()
        config.max_num_batched_tokens, config.max_num_seqs, config.num_kv_blocks = 256, slots, slots * 32
        config.enable_prefix_caching = True
        self.pipe = genai.ContinuousBatchingPipeline(path, config, "CPU", {"INFERENCE_NUM_THREADS": threads}, {})
        self.tokenizer = self.pipe.get_tokenizer()

    def run(self, prompts: list[str], tokens: int, ignore_eos: bool, token: Callable[[int], None]) -> None:
        handles = []
        for i, text in enumerate(prompts):
            chat = self.tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
            ids = self.tokenizer.encode(chat, add_special_tokens=False).input_ids.data[0].tolist()
            config = self.genai.GenerationConfig()
            config.apply_chat_template, config.max_new_tokens, config.ignore_eos = False, tokens, ignore_eos
            config.eos_token_id = self.tokenizer.get_eos_token_id()
            config.do_sample, config.temperature, config.rng_seed = True, 0.8, i
            handles.append(self.pipe.add_request(i, self.tensor(ids), config))
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
            for i, handle in enumerate(handles):
                if handle.can_read():
                    for output in handle.read().values():
                        for _ in output.generated_ids:
                            token(i)


class RawLlamaCpp:
    """One llama_batch per step over all sequences, a sampler chain each; prompts in pieces of what a batch has left."""

    def __init__(self, path: str, slots: int, threads: int):
        import ctypes

        import llama_cpp as lib

        self.lib = lib
        self.silence = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.silence, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = slots * 1024, slots, 512, 512
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified, params.flash_attn_type = False, lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.ctx = lib.llama_init_from_model(self.model, params)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.batch = lib.llama_batch_init(512, 0, 1)
        self.held: list[list[int]] = [[] for _ in range(slots)]  # tokens in each sequence's KV cache

    def encode(self, text: str) -> list[int]:
        chat = f"<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        data = chat.encode()
        ids = (self.lib.llama_token * len(data))()
        return list(ids[: self.lib.llama_tokenize(self.vocab, data, len(data), ids, len(data), False, True)])

    def run(self, prompts: list[str], tokens: int, ignore_eos: bool, token: Callable[[int], None]) -> None:
        lib, batch = self.lib, self.batch
        memory = lib.llama_get_memory(self.ctx)
        todo = [self.encode(text) for text in prompts]
        position, made = [0] * len(prompts), [0] * len(prompts)
        chains = []
        for i, ids in enumerate(todo):
            same = next((k for k, (a, b) in enumerate(zip(self.held[i], ids[:-1], strict=False)) if a != b), 0)
            lib.llama_memory_seq_rm(memory, i, same, -1)
            self.held[i], position[i], todo[i] = list(ids), same, ids[same:]
            chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_temp(0.8))
            lib.llama_sampler_chain_add(chain, lib.llama_sampler_init_dist(i))
            chains.append(chain)
        live = set(range(len(prompts)))
        while live:
            at, outputs, room = 0, [], 512 if not any(made) else 256
            for i in sorted(live, key=lambda i: len(todo[i])):
                piece, todo[i] = todo[i][: room - at], todo[i][room - at :]
                for id_ in piece:
                    batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = id_, position[i], 1, 0
                    batch.seq_id[at][0] = i
                    position[i] += 1
                    at += 1
                if piece and not todo[i]:
                    batch.logits[at - 1] = 1
                    outputs.append((i, at - 1))
            batch.n_tokens = at
            if lib.llama_decode(self.ctx, batch):
                raise RuntimeError("llama_decode failed")
            for i, index in outputs:
                id_ = lib.llama_sampler_sample(chains[i], self.ctx, index)
                made[i] += 1
                todo[i] = [id_]
                token(i)
                if made[i] >= tokens or (not ignore_eos and lib.llama_vocab_is_eog(self.vocab, id_)):
                    live.discard(i)
        for chain in chains:
            lib.llama_sampler_free(chain)


class RawTransformers:
    """The library's own continuous batching with its own thread and sampler: add_request, get_result."""

    def __init__(self, path: str, slots: int, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        lib: Any = transformers
        lib.logging.set_verbosity_error()
        lib.logging.disable_progress_bar()
        model = lib.AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = lib.AutoTokenizer.from_pretrained(path)
        page = 256 if torch.cuda.is_available() else 32
        self.manager = model.init_continuous_batching(
            generation_config=lib.GenerationConfig(do_sample=True, temperature=0.8),
            continuous_batching_config=lib.ContinuousBatchingConfig(
                page_size=page, num_blocks=slots * 1024 // page, max_batch_tokens=256, max_requests_per_batch=slots
            ),
        )
        self.manager.start()
        self.numbers = iter(range(1 << 30))

    def run(self, prompts: list[str], tokens: int, ignore_eos: bool, token: Callable[[int], None]) -> None:
        stop = -1 if ignore_eos else self.tokenizer.eos_token_id
        streams: dict[str, list[int]] = {}  # request → which prompt, and how many of its tokens have come
        for i, text in enumerate(prompts):
            chat = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            ids = self.tokenizer.encode(chat, add_special_tokens=False)
            name = str(next(self.numbers))
            streams[name] = [i, 0]
            self.manager.add_request(ids, name, max_new_tokens=tokens, streaming=True, eos_token_id=stop)
        while streams:
            result = self.manager.get_result(timeout=60)
            if result is None or result.error:
                raise RuntimeError(f"transformers' batching has stopped: {result and result.error}")
            stream = streams[result.request_id]
            for _ in result.generated_tokens[stream[1] :]:
                token(stream[0])
            stream[1] = len(result.generated_tokens)
            if result.is_finished():
                del streams[result.request_id]


class RawExLlamaV3:
    """Generator: enqueue, iterate."""

    def __init__(self, path: str, slots: int, threads: int):
        import exllamav3 as lib

        self.lib: Any = lib
        config = self.lib.Config.from_directory(path)
        model = self.lib.Model.from_config(config)
        cache = self.lib.Cache(model, max_num_tokens=slots * 1024)
        model.load()
        model.warmup(cache=cache)
        self.tokenizer = self.lib.Tokenizer.from_config(config)
        self.eos = config.eos_token_id_list
        self.generator = self.lib.Generator(model=model, cache=cache, tokenizer=self.tokenizer, max_batch_size=slots)

    def run(self, prompts: list[str], tokens: int, ignore_eos: bool, token: Callable[[int], None]) -> None:
        for i, text in enumerate(prompts):
            job = self.lib.Job(
                input_ids=self.tokenizer.encode(text, encode_special_tokens=True),
                max_new_tokens=tokens,
                sampler=self.lib.ComboSampler(temperature=0.8),
                seed=i,
                stop_conditions=[] if ignore_eos else self.eos,
                max_rq_tokens=2048,
                identifier=i,
            )
            self.generator.enqueue(job)
        while self.generator.num_remaining_jobs():
            for result in self.generator.iterate():
                if "token_ids" in result:
                    for _ in range(result["token_ids"].shape[-1]):
                        token(result["identifier"])


def bare_transformers(path: str, threads: int) -> Callable[[list[str]], Any]:
    """Texts of like length in batches of 32, the mean of the last hidden states: what sentence-transformers does."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(path), transformers.AutoModel.from_pretrained(path).eval()

    def embed(texts: list[str]) -> Any:
        vectors: dict[int, Any] = {}
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for start in range(0, len(order), 32):
            batch = order[start : start + 32]
            given = tokenizer([texts[i] for i in batch], padding=True, return_tensors="pt")
            with torch.inference_mode():
                hidden, mask = model(**given).last_hidden_state, given["attention_mask"][..., None]
                rows = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
            vectors.update(zip(batch, rows.numpy(), strict=True))
        return [vectors[i] for i in range(len(texts))]

    return embed


def bare_llamacpp(path: str, threads: int) -> Callable[[list[str]], Any]:
    """llama-cpp-python's own way for many texts: as many in one llama_batch as it has room for."""
    import llama_cpp

    model = llama_cpp.Llama(
        path, embedding=True, n_ctx=2048, n_batch=2048, n_ubatch=2048, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    return lambda texts: model.embed(texts, normalize=True)


BARE = {"transformers": bare_transformers, "llamacpp": bare_llamacpp}


def bare_worker(name: str, path: str, threads: int, conn: Connection) -> None:
    embed = BARE[name](path, threads)
    conn.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            (texts,) = conn.recv()
            start = time.perf_counter()
            vectors = embed(texts)
            conn.send((time.perf_counter() - start, [float(x) for x in vectors[0]]))


def embeddings(args: argparse.Namespace) -> str:
    """Short texts in one request, as the OpenAI SDK asks (base64), against the bare library's own batches, in turns."""
    worker, ratios, words = Worker(bare_worker, args.embed, args.model, args.threads), [], Path(__file__).read_text().split()
    worker.conn.recv()
    for round_ in range(args.rounds + 1):
        texts = [" ".join(words[(i * 7 + round_) % len(words) :][: 4 + i % 13]) for i in range(256)]
        start = time.perf_counter()
        connection = http.client.HTTPConnection(urlsplit(args.url).netloc, timeout=600)
        body = json.dumps({"input": texts, "encoding_format": "base64"})
        connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        data = json.loads(connection.getresponse().read())["data"]
        first = array.array("f", [base64.b64decode(one["embedding"]) for one in data][0])
        served = time.perf_counter() - start
        bare, vector = worker.ask(texts)
        alike = sum(a * b for a, b in zip(first, vector, strict=True))
        if round_:  # the first warms up
            ratios.append(bare / served)
    return f"256 short texts: server ÷ bare {args.embed} = {statistics.median(ratios):.2f}; cosine of the two {alike:.5f}"


RAW: dict[str, Any] = {
    "openvino": RawOpenVino,
    "llamacpp": RawLlamaCpp,
    "transformers": RawTransformers,
    "exllamav3": RawExLlamaV3,
}


def raw_worker(name: str, path: str, slots: int, threads: int, conn: Connection) -> None:
    engine = RAW[name](path, slots, threads)
    conn.send("ready")
    while True:
        try:
            job = conn.recv()
        except EOFError:
            return
        prompts, tokens, ignore_eos = job
        first, last, count = [0.0] * len(prompts), [0.0] * len(prompts), 0
        gaps: list[float] = []
        start = time.perf_counter()

        def token(
            i: int, start: float = start, first: list[float] = first, last: list[float] = last, gaps: list[float] = gaps
        ) -> None:
            nonlocal count
            now = time.perf_counter()
            if last[i]:
                gaps.append(now - last[i])
            else:
                first[i] = now - start
            last[i] = now
            count += 1

        engine.run(prompts, tokens, ignore_eos, token)
        conn.send(summary(count, time.perf_counter() - start, first, gaps))


class Worker:
    """A process and a pipe to it."""

    def __init__(self, target: Callable[..., None], *args: Any):
        context = multiprocessing.get_context("spawn")
        self.conn, child = context.Pipe()
        self.process = context.Process(target=target, args=(*args, child), daemon=True)
        self.process.start()
        child.close()

    def ask(self, *message: Any) -> Any:
        self.conn.send(message)
        return self.conn.recv()


def http_worker(url: str, extra: dict[str, Any], conn: Connection) -> None:
    while True:
        try:
            streams, tokens, round_ = conn.recv()
        except EOFError:  # the run is over
            return
        try:
            conn.send(http_round(url, streams, tokens, round_, extra))
        except (OSError, SystemExit) as error:
            conn.send(str(error))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    servers = {"server": args.url} | dict(peer.split("=", 1) for peer in args.peer)
    extra = {"ignore_eos": True} if args.ignore_eos else {}
    workers = {name: Worker(http_worker, url, extra) for name, url in servers.items()}
    if args.raw:
        workers["raw"] = Worker(raw_worker, args.raw, args.model or demo_path(), max(args.streams), args.threads)
        progress(f"loading {args.raw}")
        workers["raw"].conn.recv()
    results: dict[str, Any] = {}
    for streams in args.streams:
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
        for round_ in range(args.rounds + 1):  # the first warms up and is not counted
            for name, worker in workers.items():
                progress(f"{streams} streams, round {round_}/{args.rounds}: {name}")
                number = round_ + 100 * streams
                if name == "raw":
                    row = worker.ask([prompt(number, i) for i in range(streams)], args.tokens, args.ignore_eos)
                else:
                    row = worker.ask(streams, args.tokens, number)
                    if isinstance(row, str):
                        raise SystemExit(f"{name}: {row}")
                if round_:
                    rows[name].append(row)
        health = [] if args.no_health else health_under_load(args, workers["server"], streams)
        results[str(streams)] = {
            "rows": {name: {key: statistics.median(r[key] for r in rs) for key in rs[0]} for name, rs in rows.items()},
            "ratios": {
                name: statistics.median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(rows["server"], rs, strict=True))
                for name, rs in rows.items()
                if name != "server"
            },
            "health_p50_ms": percentile(health, 0.5) * 1000,
            "health_p99_ms": percentile(health, 0.99) * 1000,
        }
    progress("")
    return results


def start_probe(url: str) -> Worker:
    prober = Worker(probe_health, url)
    prober.conn.recv()
    return prober


def health_under_load(args: argparse.Namespace, worker: Worker, streams: int) -> list[float]:
    """In rounds of their own: on a small machine twenty probes a second cost tokens."""
    times: list[float] = []
    for round_ in range(2):
        progress(f"{streams} streams, /health")
        prober = start_probe(args.url)
        worker.ask(streams, args.tokens, 100 * streams + 90 + round_)
        times += prober.ask("stop")
    return times


def second_turn(url: str) -> float:
    """TTFT of a conversation's second turn ÷ the first turn's: how much of 1,000 tokens is not computed again."""
    ratios = []
    for i in range(3):
        talk = [
            {
                "role": "user",
                "content": f"Note {time.time_ns()} {i}. "
                + "The quick brown fox jumps over the lazy dog near the river bank. " * 70,
            }
        ]
        times = []
        for _ in range(2):
            stream = Stream(url, {"model": "benchmark", "messages": talk, "max_tokens": 16, "temperature": 0, "stream": True})
            while stream.receive():
                pass
            stream.socket.close()
            times.append(stream.first)
            talk += [{"role": "assistant", "content": "I see."}, {"role": "user", "content": "And then?"}]
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def demo_path() -> str:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "openai_api_endpoint", "SmolLM2-135M-Instruct.Q4_1.gguf")


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def table(results: dict[str, Any]) -> str:
    lines = [
        "| streams | who | tokens/s | ÷ | TTFT p50 / p99 ms | ITL p50 / p99 ms | /health p50 / p99 ms | client CPU |",
        "|" + "---|" * 8,
    ]
    for streams, result in results.items():
        for name, row in result["rows"].items():
            ratio = f"server ÷ {name} = {result['ratios'][name]:.2f}" if name in result["ratios"] else ""
            health = f"{result['health_p50_ms']:.1f} / {result['health_p99_ms']:.1f}" if name == "server" else ""
            lines.append(
                f"| {streams} | {name} | {row['tokens_per_s']:.0f} | {ratio} | {row['ttft_p50_ms']:.0f} / {row['ttft_p99_ms']:.0f} "
                f"| {row['itl_p50_ms']:.1f} / {row['itl_p99_ms']:.1f} | {health} | {row['client_cpu']:.0%} |"
            )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("--plot needs matplotlib: pip install matplotlib", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for name in next(iter(results.values()))["rows"]:
        for axis, key in zip(axes, ("tokens_per_s", "itl_p50_ms"), strict=True):
            axis.plot(list(results), [result["rows"][name][key] for result in results.values()], marker="o", label=name)
    axes[0].set(title="tokens/s", xlabel="streams", ylim=(0, None))
    axes[1].set(title="ITL p50, ms", xlabel="streams", ylim=(0, None))
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", nargs="?", default="http://localhost:8000")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="per stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--raw", choices=list(RAW), help="the bare library, in the same run")
    parser.add_argument("--model", help="what --raw loads; default: the demo model")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of --raw; give the server the same")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="another server, in the same run")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="every stream brings all its tokens; the servers must know the field"
    )
    parser.add_argument("--no-health", action="store_true", help="for a server without /health")
    parser.add_argument("--json", metavar="FILE", help="write all figures")
    parser.add_argument("--plot", metavar="FILE.png")
    parser.add_argument(
        "--front", action="store_true", help="what the server carries without an engine's cost (see front.py); nothing else"
    )
    parser.add_argument(
        "--embed", choices=list(BARE), help="256 texts to embed, against the bare library over --model; nothing else"
    )
    args = parser.parse_args()
    if args.embed:
        print(embeddings(args))
        return
    if args.front:
        print(front.rows(args.tokens, start_probe))
        return
    results = measure(args)
    print(table(results))
    print(f"\nTTFT of the second turn of a conversation of 1,000 tokens ÷ the first's: {second_turn(args.url):.2f}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results, f, indent=1)
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
