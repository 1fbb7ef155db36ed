"""The command, as a user types it."""

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, until

from backends import missing_library
from catalog import COMPLETE

SCRIPT = str(ROOT / "openai_api_endpoint.py")
NATIVE = ("numpy", "openvino", "openvino_genai", "llama_cpp", "torch", "jinja2")


def run(*args, timeout=60, **env):
    return subprocess.run(
        [sys.executable, SCRIPT, *args], capture_output=True, text=True, timeout=timeout, env=os.environ | env
    )


def one_line(text):
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--port", "high"], "whole number from 0 to 65535"),
        (["--nonsense"], "--nonsense"),
        (["--modle-dir", "x"], "did you mean --model-dir"),
        (["--max_parralel=2"], "did you mean --max-parallel"),
        (["--models-dir", "/no/such/folder"], "no such folder"),
        (["--request-timeout", "0"], "nothing could be answered"),
        (["--record", "/no/such/folder/file"], "--record /no/such/folder/file: No such file or directory"),
        (["--models-dir", "@empty", "--default-model", "x"], "no model 'x'"),
        (["--models-dir", "@empty", "--preload", "x"], "no model 'x'"),
        (["--profile", "none"], "invalid choice"),
        (["--roles", "user,boss"], "user,boss"),
        (["--default-temperature", "nan"], "from 0 to 2"),
        (["--max-parallel", "0"], "from 1 to 256"),
        (["--request-timeout", "nan"], "number of seconds"),
        (["--backend", "magic"], "magic"),
        (["-m", "/no/such/folder"], "no such file or folder"),
        (["--model_dir", "/no/such/folder"], "no such file or folder"),
        (["--chat-template", "/no/such/file", "-m", "@demo"], "--chat-template"),
        (["-m", "@empty"], "no model in this folder"),
        (["-m", "@two"], "more than one model"),
        (["-m", "@junk"], "not a usable GGUF file"),
        (["-m", "@short"], "cut off"),
        (["-m", "@ir"], "openvino_tokenizer.xml"),
        (["-m", "@ir_full", "--backend", "llamacpp"], "openvino can"),
        (["-m", "@demo", "-H", "256.1.1.1"], "cannot listen"),
        (
            ["--models-dir", "@empty", "--backend", "llamacpp", "--device", "cuda"],
            "--device needs --backend openvino or transformers",
        ),
        (["-m", "@demo", "--backend", "openvino", "-ngl", "3"], "--gpu-layers needs --backend llamacpp"),
        (["-m", "@demo", "--tensor-split", "a,1"], "number from 0"),
        (["-m", "@demo", "--alias", "x=y"], "no model 'x'"),
        (["-m", "@demo", "--alias", ""], "1 to 256 characters"),
        (["--models-dir", "@empty", "--alias", "y"], "there are 0 models"),
        (["-m", "@demo", "-dm", "@demo"], "--draft-model-dir needs --backend exllamav3"),
        (["-m", "@demo", "-ndt", "3"], "--num-draft-tokens needs"),
        (["--models-dir", "@empty", "--backend", "transformers", "-ngram", "2"], "--ngram-match-min needs"),
        (["--models-dir", "@empty", "--embeddings", "--backend", "openvino"], "--embeddings needs"),
        (["--models-dir", "@empty", "--backend", "exllamav3", "-dm", "@empty", "-ngram", "2"], "exclude each other"),
        (
            ["--models-dir", "@empty", "--backend", "exllamav3", "--deterministic"],
            "--deterministic needs --backend openvino or",
        ),
        (["--upstream", "http://localhost:1", "--deterministic"], "--deterministic has no meaning with --upstream"),
        (["-m", "@demo", "--deterministic", "-ngram", "2"], "--deterministic and --ngram-match-min 2 exclude each other"),
        (["-m", "@demo", "--backend", "llamacpp", "--deterministic", "--cache-type-v", "q8_0"], "exclude each other"),
        (["-m", "@demo", "--deterministic", "--backend", "openvino", "--dtype", "bfloat16"], "exclude each other"),
    ],
)
def test_wrong_command_lines(args, words, tmp_path, demo):
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    (tmp_path / "junk").write_bytes(b"no model at all")
    (tmp_path / "short").write_bytes(demo.path.read_bytes()[:200])
    for name, missing in (("ir", "openvino_tokenizer.xml"), ("ir_full", "")):
        (tmp_path / name).mkdir()
        for file in [name for (name,) in COMPLETE["openvino"]]:
            if file != missing:
                (tmp_path / name / file).touch()
    args = [str(demo.path) if a == "@demo" else str(tmp_path / a[1:]) if a.startswith("@") else a for a in args]
    done = run(*args)
    assert done.returncode == 2
    assert words in one_line(done.stderr)


def test_help_is_there_and_imports_no_engine():
    code = f"import sys; sys.argv = ['x', '--help']; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "import openai_api_endpoint as e\ntry: e.main()\nexcept SystemExit: pass\n"
    code += f"print([n for n in {NATIVE!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("[]")
    for flag in ("--model-dir", "--max-parallel", "--grace", "--backend"):
        assert flag in done.stdout


def test_missing_library(demo, tmp_path):
    """As on a machine without it: one line with the pip install that brings it."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('llama_cpp', 'openvino_genai') else f(name, *a)\n"
    )
    for backend, package in (
        ("llamacpp", "llama-cpp-python=="),
        ("openvino", "openvino-genai=="),
        ("auto", "llama-cpp-python=="),
    ):
        done = run("-m", str(demo.path), "--backend", backend, PYTHONPATH=str(tmp_path))
        assert done.returncode == 2
        assert f"pip install {package}" in one_line(done.stderr)


def test_demo_without_network_or_cache(tmp_path):
    done = run(XDG_CACHE_HOME=str(tmp_path), PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == 2
    *_, last = done.stderr.strip().splitlines()
    assert "--model-dir" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("backend", ["openvino", "llamacpp"])
def test_a_gguf_that_is_found_to_be_broken_during_load(backend, demo, tmp_path):
    if lack := missing_library(backend):
        pytest.skip(lack)
    (tmp_path / "broken.gguf").write_bytes(demo.path.read_bytes()[:40_000_000])
    done = run("-m", str(tmp_path), "--backend", backend, "-p", "0")
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "broken" in done.stderr.strip().splitlines()[-1]


class Command:
    """The server as a process, up and ready."""

    def __init__(self, *args, cwd=None):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill up, and stop the server)
        self.process = subprocess.Popen(
            [sys.executable, SCRIPT, "-p", "0", *args],
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
            cwd=cwd,
        )
        self.banner = ""
        while "-d '" not in self.banner:
            line = self.process.stdout.readline()
            assert line, self.log()
            self.banner += line
        self.url = re.search(r"listening on (\S+)", self.banner)[1]

    def engines(self):
        """Process ids of the engine processes."""
        found = []
        for children in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                found += [
                    pid for pid in children.read_text().split() if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
                ]
        return [int(pid) for pid in found]

    def log(self):
        """Without moving where the server writes on: it has the same file."""
        return os.pread(self.errors.fileno(), 1 << 26, 0).decode("utf-8", "replace")

    def end(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def command(demo):
    made = []

    def start(*args):
        made.append(Command("-m", str(demo.path), *args))
        return made[-1]

    yield start
    for one in made:
        one.end()


def alive(pid):
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def ask(url, **fields):
    body = json.dumps({"messages": [{"role": "user", "content": "Tell a long story."}], **fields}).encode()
    return urllib.request.urlopen(f"{url}/v1/chat/completions", body, timeout=60)


def test_banner_and_its_curl(command):
    server = command()
    for word in ("SmolLM2-135M-Instruct.Q4_1", "threads", "slots", "context", "curl"):
        assert word in server.banner
    curl = server.banner[server.banner.index("curl ") :].replace("France?", "France? In one word.")
    done = subprocess.run(
        ["sh", "-c", curl.replace("-d '{", '-s -d \'{"max_tokens":8,')], capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_sigterm_lets_a_stream_finish(command):
    server = command("--grace", "60")
    engines = server.engines()
    assert engines
    reply = ask(server.url, stream=True, max_tokens=100, temperature=0.1)
    reply.readline()
    server.process.send_signal(signal.SIGTERM)
    assert reply.read().rstrip().endswith(b"data: [DONE]")
    assert server.process.wait(60) == 0
    until(lambda: not any(map(alive, engines)))


def test_a_signal_to_the_whole_group_lets_a_stream_finish(command):
    """As a service manager or a terminal sends it: the engine waits for the server's word."""
    server = command("--grace", "60")
    reply = ask(server.url, stream=True, max_tokens=100, temperature=0.1)
    reply.readline()
    os.killpg(server.process.pid, signal.SIGTERM)
    assert reply.read().rstrip().endswith(b"data: [DONE]")
    assert server.process.wait(60) == 0


def test_a_closed_stdout_is_no_harm(demo):
    """The banner goes nowhere, and the server serves."""
    pipe = subprocess.Popen(
        [sys.executable, SCRIPT, "-p", "0", "-m", str(demo.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    pipe.stdout.close()
    try:
        port = next(re.search(r"port (\d+)", line)[1] for line in pipe.stderr if "listening" in line)
        threading.Thread(target=pipe.stderr.read, daemon=True).start()  # a full pipe would hold the server up
        until(lambda: health(port) == 200)
        time.sleep(2)
        assert health(port) == 200
        assert ask(f"http://localhost:{port}", max_tokens=2).status == 200
    finally:
        pipe.terminate()
        pipe.wait(20)


def health(port):
    try:
        return urllib.request.urlopen(f"http://localhost:{port}/health").status
    except OSError:
        return 0


def test_grace_is_limited_and_a_second_signal_is_at_once(command):
    server = command("--grace", "60")
    reply = ask(server.url, stream=True, max_tokens=3000, temperature=1.5, ignore_eos=True)
    reply.readline()
    engines = server.engines()
    assert engines
    server.process.send_signal(signal.SIGINT)
    until(lambda: "stopping" in server.log())
    time.sleep(0.5)
    assert server.process.poll() is None
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(10) == 130
    until(lambda: not any(map(alive, engines)))


def test_the_engine_ends_with_a_killed_server(command):
    server = command()
    engines = server.engines()
    assert engines
    server.process.kill()
    until(lambda: not any(map(alive, engines)))


def test_port_in_use(command, demo):
    server = command()
    done = run("-m", str(demo.path), "-p", server.url.rsplit(":", 1)[1])
    assert done.returncode == 2
    assert "cannot listen" in one_line(done.stderr)


def test_server_process_has_no_native_library(command):
    server = command()
    assert ask(server.url, max_tokens=4).status == 200
    with open(f"/proc/{server.process.pid}/maps") as f:
        maps = f.read()
    assert not re.search(r"openvino|llama|numpy|ggml|torch", maps)


def test_one_log_line_per_request(command):
    server = command()
    ask(server.url, max_tokens=4).read()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(20)
    (line,) = [line for line in server.log().splitlines() if "POST" in line]
    assert re.search(
        r"200 chatcmpl-\w+ model='\S+' prompt=\d+ completion=4 cached=\S+ ttft=\d+ms tokens/s=[\d.]+ finish=length", line
    )


def test_a_folder_without_a_model_yet(tmp_path, demo):
    """It starts, says so, and serves what is put there."""
    (tmp_path / "models").mkdir()
    server = Command("--profile", "osaurus", "--backend", "openvino", cwd=tmp_path)
    try:
        assert "no model yet" in server.banner
        assert health(server.url.rsplit(":", 1)[1]) == 0
        shutil.copy(demo.path, tmp_path / "models" / "new.gguf")
        until(lambda: b'"new"' in urllib.request.urlopen(server.url + "/models").read())
        reply = ask(server.url, model="new", max_tokens=3)
        assert reply.status == 200 and json.load(reply)["model"] == "new"
    finally:
        server.end()
