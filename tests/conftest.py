"""What the tests share: a served model, scripted or real, on a free port."""

import contextlib
import dataclasses
import http.client
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

os.environ["XDG_STATE_HOME"] = os.environ["LOCALAPPDATA"] = (
    tempfile.mkdtemp()
)  # a server started here keeps nothing of the user's

import access  # noqa: E402
import model_init  # noqa: E402
import openai_api_endpoint as endpoint  # noqa: E402
from backends import BACKENDS, WITH_EMBEDDINGS, missing_library  # noqa: E402
from engine import EngineSpec  # noqa: E402

FORWARDED = access.Access(proxies=(access.network("127.0.0.0/8"),))  # a test is many clients: X-Forwarded-For says which


def from_client(number):
    """The headers of one client out of many."""
    return {"X-Forwarded-For": f"10.0.0.{number}"}


class Served:
    """A running server: `request` is one request on a connection of its own."""

    def __init__(self, server, models, folder=None):
        self.server, self.models, self.folder = server, models, folder
        self.host, self.port = "127.0.0.1", server.server_port
        self.url = f"http://{self.host}:{self.port}"
        self.behind = self  # the server that has the engine

    def request(self, method, path, body=None, headers=None, timeout=120):
        conn = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        conn.request(method, path, data, headers or {})
        reply = conn.getresponse()
        raw = reply.read()
        conn.close()
        is_json = reply.headers.get("Content-Type") == "application/json"
        return reply.status, json.loads(raw) if is_json and raw else raw, reply.headers

    def chat(self, content, **fields):
        headers = fields.pop("headers", None)
        return self.request(
            "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": content}], **fields}, headers
        )

    def stream(self, content, **fields):
        """The parsed events of a stream, without the [DONE] that must end it."""
        status, raw, _ = self.chat(content, stream=True, **fields)
        assert status == 200, raw
        return sse(raw)

    def wait_ready(self, ready=True):
        until(lambda: self.models.ready == ready)

    def script(self, name, on=True):
        """Put a file into the scripted backend's folder, or take it away."""
        path = Path(self.folder) / name
        path.touch() if on else path.unlink(missing_ok=True)

    def calls(self):
        log = Path(self.folder) / "log"
        return log.read_text().splitlines() if log.exists() else []


def sse(raw):
    events = raw.decode().split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]", events[-3:]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def cancelled_at(calls, seq):
    """After how many steps the scripted backend was told to drop a sequence; `forever` ends by itself near 2,000."""
    return next((int(line.split()[-1]) for line in calls if line.startswith(f"cancel {seq} ")), 0)


def threads_alive():
    """Of this process, also those that threading does not know."""
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else threading.active_count()


def download_sdist(requirement, folder):
    """Its archive, by pip; a reason where it cannot be had."""
    name = requirement.partition("==")[0]  # what builds it may come as wheels
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", name, requirement, "-d", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"{requirement} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}"
    (archive,) = Path(folder).glob("*.tar.gz")
    return archive


def until(condition, timeout=180):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.005)


@contextlib.contextmanager
def serve(models, ready=True, folder=None, **options):
    options.setdefault("access", FORWARDED if {"api_key", "admin"}.isdisjoint(options) else None)
    server = endpoint.Server(("127.0.0.1", 0), models, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    served = Served(server, models, folder)
    try:
        models.preload([])
        if ready:
            served.wait_ready()
        yield served
    finally:
        server.shutdown()
        server.drain(5)
        models.close()


def serve_one(model, spec, max_jobs=40, lives=None, **options):
    """`lives`: what of model_init.Limits is another; `options` are the server's."""
    limits = model_init.Limits(**{"max_jobs": max_jobs, "patience": 60, "default": model.id} | (lives or {}))
    return serve(model_init.Models(model_init.Catalog(fixed=[model]), lambda model: spec, limits), **options)


def serve_scripted(folder, slots=2, queue=2, kind="Scripted", **options):
    model = model_init.Model("scripted", Path(folder), "gguf", 1234)
    spec = EngineSpec(f"scripted:{kind}", str(folder), slots)
    return serve_one(model, spec, slots + queue, folder=folder, **options)


@contextlib.contextmanager
def serve_many(folder, names, slots=2, queue=2, profile=None, **limits):
    """Several scripted models; `.at[name]` is a model's folder of switches."""
    models = [model_init.Model(name, Path(folder) / name, "gguf", 1234) for name in names]
    for model in models:
        model.path.mkdir(parents=True)
    lives = model_init.Models(
        model_init.Catalog(fixed=models),
        lambda model: EngineSpec("scripted:Scripted", str(model.path), slots),
        model_init.Limits(max_jobs=slots + queue, patience=60, **limits),
    )
    with serve(
        lives, ready=False, folder=models[0].path, profile=profile, access=dataclasses.replace(FORWARDED, admin=access.Keys())
    ) as served:
        served.at = {model.id: model.path for model in models}
        yield served


@pytest.fixture
def scripted(tmp_path):
    with serve_scripted(tmp_path) as served:
        yield served


@pytest.fixture(scope="session")
def demo():
    return model_init.demo_model()


@pytest.fixture(scope="session")
def hf_folder(demo, tmp_path_factory):
    """The demo model for transformers, made once; in a process of its own, since this one has no use for torch."""
    if lack := missing_library("transformers"):
        pytest.skip(lack)
    folder = tmp_path_factory.mktemp("hf") / "SmolLM2-135M-Instruct"
    subprocess.run([sys.executable, ROOT / "tests" / "hf_folder.py", demo.path, folder], check=True, capture_output=True)
    return folder


@contextlib.contextmanager
def serve_upstream(url, backend="vllm", max_jobs=40, slots=8, **options):
    """A server that has another one for its engine."""
    model = model_init.Model("upstream", Path("upstream"), "upstream", 1)
    with serve_one(model, EngineSpec(backend, url, slots), max_jobs, **options) as served:
        yield served


@pytest.fixture(scope="session", params=["openvino", "llamacpp", "transformers", "vllm"])
def served(request, demo):
    """The demo model on each engine that is installed; vllm: behind another server, which is this one again."""
    if request.param == "vllm":
        if lack := missing_library("llamacpp"):
            pytest.skip(lack)
        with (
            serve_one(demo, EngineSpec("llamacpp", str(demo.path), 8, 0, 16384, embeddings=True)) as behind,
            serve_upstream(behind.url) as front,
        ):
            front.behind = behind
            yield front
        return
    if lack := missing_library(request.param):
        pytest.skip(lack)
    path = request.getfixturevalue("hf_folder") if request.param == "transformers" else demo.path
    spec = EngineSpec(request.param, str(path), 8, 0, 16384, embeddings=request.param in WITH_EMBEDDINGS)
    with serve_one(demo, spec) as served:
        yield served


def pytest_terminal_summary(terminalreporter):
    """Which engines were tested, and for the others the one line that brings them."""
    lacks = {name: missing_library(name) for name in BACKENDS}
    tested = [name for name, lack in lacks.items() if lack is None]
    terminalreporter.write_line(f"engines tested: {', '.join(tested) or 'none'}")
    for lack in filter(None, lacks.values()):
        terminalreporter.write_line(f"  not tested: {lack}")
