"""The calls of five other servers' documents, against this one in the matching profile: real processes, the real model."""

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, until
from test_cli import Command

from backends import missing_library
from catalog import OSAURUS_NAMES
from model_init import PROFILES

OPENAI_JS = "openai@7.55.0"
CHAT_KEYS = {"id", "object", "created", "model", "choices", "usage"}
pytestmark = pytest.mark.skipif(bool(missing_library("openvino")), reason=str(missing_library("openvino")))


@pytest.fixture(scope="module")
def start(demo, tmp_path_factory):
    """A server in a profile over models that are the demo model under other names."""
    running = []

    def serve(profile, names, *flags):
        root = tmp_path_factory.mktemp(profile)
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(demo.path, root / name)
            except OSError:  # another file system
                shutil.copy(demo.path, root / name)
        where = ["--models-dir", root] if len(names) > 1 else ["-m", root / names[0].partition("/")[0]]
        command = Command("--profile", profile, "--backend", "openvino", *map(str, where), *flags)
        running.append(command)
        until(lambda: get(command.url + "/healthz")["status"] == "ok", 120)
        return command

    yield serve
    for command in running:
        command.end()


def get(url, headers=None):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}), timeout=120) as reply:
        return json.load(reply)


def post(url, headers=None, **body):
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), headers or {})
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, json.load(reply), reply.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), error.headers


def shell(script):
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl(url, path, body=None, options=""):
    """As the documents write it: curl, a header, a body in single quotes."""
    data = f" -H 'Content-Type: application/json' -d '{json.dumps(body, indent=2)}'" if body else ""
    return shell(f"curl -s {options} {url}{path}{data}")


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def node(tmp_path_factory):
    """Runs a JavaScript module with the official package at hand."""
    if not shutil.which("npm"):
        pytest.skip("needs Node.js and npm")
    folder = tmp_path_factory.mktemp("js")
    command = ["npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", "--prefix", str(folder), OPENAI_JS]
    try:
        subprocess.run(command, capture_output=True, timeout=60, check=True)
    except subprocess.SubprocessError:  # no network, say
        pytest.skip(f"npm could not install {OPENAI_JS}")

    def run(code, *args):
        (folder / "main.mjs").write_text(code)
        done = subprocess.run(["node", "main.mjs", *args], cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def is_completion(reply, model=None):
    assert set(reply) >= CHAT_KEYS and reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-") and (model is None or reply["model"] == model)
    (choice,) = reply["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] in ("stop", "length")
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"]
    usage = reply["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 0
    return usage["completion_tokens"]


def is_stream(raw):
    *events, done, end = raw.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] in ("stop", "length")
    return chunks


def user(content):
    return [{"role": "user", "content": content}]


# ── exllamav3 ──


def test_exllamav3(start):
    server = start("exllamav3", ["model_name/x.gguf"], "--log-level", "DEBUG", "--cache_size", "16384", "--cache_quant", "4")
    listing = json.loads(curl(server.url, "/v1/models"))
    (card,) = listing["data"]
    assert listing["object"] == "list"
    assert {key: card[key] for key in ("id", "object", "owned_by", "permission", "root", "parent")} == {
        "id": "model_name", "object": "model", "owned_by": "user", "permission": [], "root": "model_name", "parent": None
    }  # fmt: skip
    assert isinstance(card["created"], int)
    body = {"messages": user("Write a short poem about code."), "stream": False, "max_tokens": 50}
    assert is_completion(json.loads(curl(server.url, "/v1/chat/completions", body)), "model_name") <= 50
    body = {"messages": user("Explain quantum entanglement simply."), "stream": True, "max_tokens": 100}
    is_stream(curl(server.url, "/v1/chat/completions", body))
    is_stream(curl(server.url, "/v1/chat/completions", {"messages": user("Tell a story.")}))  # streams when not told
    body = {"messages": user("Tell a story."), "ignore_eos": True, "stream_options": {"include_usage": True}}
    *_, last = curl(server.url, "/v1/chat/completions", body).removesuffix("data: [DONE]\n\n").strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"] == 200
    whole = {
        "messages": [{"role": "system", "content": "You are a helpful assistant."}, *user("Hello!")],
        "model": "another", "stream": False, "max_tokens": 20, "temperature": 0.8, "top_p": 0.8, "top_k": 50, "stop": [],
    }  # fmt: skip
    is_completion(json.loads(curl(server.url, "/v1/chat/completions", whole)), "another")
    assert "--cache_quant: for exllamav3 alone" in server.log()


# ── Osaurus ──


def test_osaurus(start):
    server = start("osaurus", [f"{name}/model.gguf" for name in OSAURUS_NAMES])
    listing = json.loads(curl(server.url, "/models"))
    assert {card["id"] for card in listing["data"]} == set(OSAURUS_NAMES.values())
    assert {(card["object"], card["owned_by"]) for card in listing["data"]} == {("model", "osaurus")}
    body = {
        "model": "llama-3.2-3b-instruct",
        "messages": [{"role": "system", "content": "You are a helpful assistant."}, *user("Hello, how are you?")],
        "temperature": 0.7,
        "max_tokens": 150,
    }
    is_completion(json.loads(curl(server.url, "/chat/completions", body)), "llama-3.2-3b-instruct")
    body = {"model": "llama-3.2-3b-instruct", "messages": user("Tell me a short story"), "stream": True}
    is_stream(curl(server.url, "/chat/completions", body | {"temperature": 0.8, "max_tokens": 200}))
    said = python(f"""
from openai import OpenAI
client = OpenAI(base_url="{server.url}", api_key="not-needed")
models = client.models.list()
for model in models.data:
    print(model.id)
response = client.chat.completions.create(
    model="llama-3.2-3b-instruct",
    messages=[
        {{"role": "system", "content": "You are a helpful assistant."}},
        {{"role": "user", "content": "What is the capital of France?"}}
    ],
    temperature=0.7,
    max_tokens=100
)
print(response.choices[0].message.content)
stream = client.chat.completions.create(
    model="llama-3.2-3b-instruct",
    messages=[{{"role": "user", "content": "Write a haiku about coding"}}],
    stream=True
)
for chunk in stream:
    if chunk.choices[0].delta.content is not None:
        print(chunk.choices[0].delta.content, end="")
""")
    assert set(OSAURUS_NAMES.values()) <= set(said.splitlines()) and len(said.splitlines()) > 9
    assert post(server.url, messages=user("Hi"))[:1] == (400,)
    status, body, _ = post(server.url, messages=user("Hi"), model="foundation")
    assert (status, body["error"]["param"]) == (404, "model")


# ── the OpenVINO server ──


def test_openvino(start, demo, tmp_path):
    folder = tmp_path / "models" / "smollm"
    folder.mkdir(parents=True)
    shutil.copy(demo.path, folder / "m.gguf")
    code = "import sys, openvino_genai as g; g.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
    subprocess.run([sys.executable, "-c", code, str(folder / "m.gguf")], check=True)
    (folder / "m.gguf").unlink()
    (folder / "tokenizer_config.json").write_text("{}")
    command = Command("--profile", "openvino", cwd=tmp_path)
    try:
        until(lambda: get(command.url + "/healthz")["status"] == "ok", 120)
        assert get(command.url + "/health")["status"] == "ok"
        assert [card["id"] for card in get(command.url + "/v1/models")["data"]] == ["smollm"]
        body = {
            "model": "smollm", "messages": user("What is the capital of France?"), "temperature": 0.7, "top_p": 1.0, "n": 2,
            "stream": False, "max_tokens": 30, "presence_penalty": 0.0, "frequency_penalty": 0.0, "stop": ["\n\n", "###"],
        }  # fmt: skip
        status, reply, _ = post(command.url, **body)
        assert status == 200 and len(reply["choices"]) == 2
        is_stream(curl(command.url, "/v1/chat/completions", {"messages": user("Hi"), "stream": True, "max_tokens": 20}))
        status, reply, _ = post(command.url, model="gpt", messages=user("Hi"))
        assert (status, reply["error"]["param"]) == (400, "model")
        (folder / "openvino_tokenizer.bin").unlink()  # one file less
        until(lambda: get(command.url + "/v1/models")["data"] == [])
    finally:
        command.end()


# ── llm-serve ──

QWEN, LLAMA, THIRD, BROKEN = "Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.1-8B-Instruct", "org/third", "org/broken"


@pytest.fixture(scope="module")
def llm_serve(start):
    names = [f"{name}/model.gguf" for name in (QWEN, LLAMA, THIRD, BROKEN)]
    server = start(
        "llm-serve", names, "--default-model", QWEN, "--max-parallel", "1", "--max-queue", "1", "--request-timeout", "120"
    )
    return server


def test_llm_serve_examples(llm_serve):
    url = llm_serve.url
    body = {"messages": user("Explain cataract surgery in one sentence."), "stream": False}
    is_completion(json.loads(curl(url, "/v1/chat/completions", body)), QWEN)
    is_stream(curl(url, "/v1/chat/completions", {"messages": user("Count from one to five."), "stream": True}, "-N"))
    said = python(f"""
from openai import OpenAI
client = OpenAI(
    base_url="{url}/v1",
    api_key="not-required",
)
resp = client.chat.completions.create(
    model="Qwen/Qwen2.5-7B-Instruct",
    messages=[{{"role": "user", "content": "Say hello"}}],
    stream=False,
)
print(resp.choices[0].message.content)
stream = client.chat.completions.create(
    model="Qwen/Qwen2.5-7B-Instruct",
    messages=[{{"role": "user", "content": "Write three short bullet points about eye surgery."}}],
    stream=True,
)
for chunk in stream:
    delta = chunk.choices[0].delta.content
    if delta:
        print(delta, end="", flush=True)
print()
""")
    assert len(said.strip()) > 20
    assert {card["id"]: card["status"] for card in get(url + "/v1/models")["data"]} == {
        QWEN: "loaded", LLAMA: "unloaded", THIRD: "unloaded", BROKEN: "unloaded",
    }  # fmt: skip
    health = json.loads(curl(url, "/healthz"))
    assert health == {
        "status": "ok", "loaded": True, "model_id": QWEN, "inference_backend": "openvino", "queue_depth": 0,
        "switch_in_progress": False, "switch_target_model": None,
    }  # fmt: skip


def test_llm_serve_400(llm_serve):
    url = llm_serve.url
    for body, param in (
        ({"messages": [{"role": "developer", "content": "x"}]}, "messages[0].role"),
        ({"messages": user("x"), "max_tokens": 8193}, "max_tokens"),
        ({"messages": user("x"), "max_completion_tokens": 8193}, "max_completion_tokens"),
        ({"messages": user("x"), "temperature": 2.1}, "temperature"),
        ({"messages": user("x"), "top_p": 0}, "top_p"),
        ({"messages": user("x"), "model": "unknown"}, "model"),
        ({"messages": user("x " * 9000)}, "messages"),
    ):
        status, reply, _ = post(url, **body)
        assert (status, reply["error"]["param"]) == (400, param), reply


def test_llm_serve_queue(llm_serve):
    """One slot, one place in the queue: the third gets 429 before any header of a stream."""
    url = llm_serve.url
    long = {
        "messages": user("Tell a very long story."), "max_tokens": 3000, "stream": True, "temperature": 1.5, "ignore_eos": True,
    }  # fmt: skip
    request = urllib.request.Request(url + "/v1/chat/completions", json.dumps(long).encode())
    first = urllib.request.urlopen(request, timeout=60)
    first.readline()
    waiting = subprocess.Popen(["curl", "-sN", url + "/v1/chat/completions", "-d", json.dumps(long)], stdout=subprocess.DEVNULL)
    until(lambda: get(url + "/healthz")["queue_depth"] == 1)
    status, reply, headers = post(url, messages=user("Hi"), stream=True)
    assert (status, headers["Retry-After"], reply["error"]["code"]) == (429, "1", "queue_full")
    waiting.terminate()
    waiting.wait()
    until(lambda: get(url + "/healthz")["queue_depth"] == 0)  # who leaves the queue frees the place
    first.close()


def test_llm_serve_202_409_503(llm_serve):
    url = llm_serve.url
    status, body, headers = post(url, model=LLAMA, messages=user("Say hello"), max_tokens=5)
    assert (status, headers["Retry-After"]) == (202, "2")
    assert body == {
        "object": "model.load", "status": "spinning_up", "model": LLAMA, "current_model": QWEN,
        "retry_after_seconds": 2, "eta_seconds": None,
    }  # fmt: skip
    status, body, headers = post(url, model=THIRD, messages=user("Say hello"))
    assert status == 409 and headers["Retry-After"] and set(body["error"]) >= {"current_model", "message"}
    assert get(url + "/healthz")["switch_target_model"] in (LLAMA, None)
    until(lambda: post(url, model=LLAMA, messages=user("Say hello"), max_tokens=5)[0] == 200)
    assert get(url + "/healthz")["model_id"] == LLAMA
    status, body, _ = post(url, {"Prefer": "wait=60"}, model=QWEN, messages=user("Say hello"), max_tokens=5)
    assert status == 200 and body["model"] == QWEN


def test_llm_serve_broken_model(llm_serve, demo):
    """A model that cannot be loaded: 503 with the reason, `degraded`, and the old model is back."""
    url = llm_serve.url
    path = next(p for p in get_root(llm_serve).glob("org/broken/*.gguf"))
    path.unlink()
    path.write_bytes(demo.path.read_bytes()[:30_000_000])
    until(lambda: post(url, model=BROKEN, messages=user("x"), max_tokens=5)[0] == 503)
    until(lambda: get(url + "/healthz")["loaded"])
    health = get(url + "/healthz")
    assert (health["status"], health["model_id"]) == ("degraded", QWEN) and "model.gguf" in health["last_error"]
    assert post(url, model=QWEN, messages=user("x"), max_tokens=5)[0] == 200


def get_root(command):
    args = command.process.args
    return Path(args[args.index("--models-dir") + 1])


# ── METALlama ──

METALLAMA = "Llama-3.2-1B-Instruct.Q4_K_M"


@pytest.fixture(scope="module")
def metallama(start):
    return start("metallama", [f"{METALLAMA}.gguf"])


def test_metallama(metallama):
    url = metallama.url
    assert "ok" in curl(url, "/health") and shell(f"curl -s {url}/health | grep -q ok && echo yes") == "yes\n"
    body = {"model": METALLAMA, "messages": user("What is the capital of France?"), "temperature": 0.7}
    raw = curl(url, "/v1/chat/completions", body, "-X POST")
    is_completion(json.loads(raw), METALLAMA)
    data = json.dumps(body)
    found = shell(f'curl -s -X POST {url}/v1/chat/completions -d \'{data}\' | grep -o \'"content":"[^"]*"\'')
    assert re.match(r'"content":"[^"]+"', found)
    body = {"model": METALLAMA, "messages": user("Write a short poem about AI."), "stream": True}
    is_stream(curl(url, "/v1/chat/completions", body, "-X POST"))
    for name in (METALLAMA, f"{METALLAMA}.gguf", "Llama-3.2-1B-Instruct"):
        assert get(f"{url}/v1/models/{name}")["id"] == METALLAMA  # nothing stands in here for a name that is unknown
        for key in ("dummy", "sk-1"):
            status, reply, _ = post(url, {"Authorization": f"Bearer {key}"}, model=name, messages=user("Hi"), max_tokens=3)
            assert status == 200 and is_completion(reply, name)
    said = python(f"""
from openai import OpenAI
client = OpenAI(
    base_url="{url}/v1",
    api_key="dummy"
)
response = client.chat.completions.create(
    model="Llama-3.2-1B-Instruct.Q4_K_M",
    messages=[
        {{"role": "user", "content": "How does a transformer model work?"}}
    ]
)
print(response.choices[0].message.content)
""")
    assert said.strip()


def test_metallama_javascript(metallama, node):
    said = node(f"""
import OpenAI from 'openai';

const openai = new OpenAI({{
    apiKey: 'dummy',
    baseURL: '{metallama.url}/v1',
}});

async function main() {{
    const response = await openai.chat.completions.create({{
        model: 'Llama-3.2-1B-Instruct.Q4_K_M',
        messages: [
            {{ role: 'user', content: 'Explain quantum computing in simple terms.' }}
        ],
    }});

    console.log(response.choices[0].message.content);
}}

main();
""")
    assert said.strip()


def test_the_javascript_example(metallama, node):
    said = node((ROOT / "examples" / "openai_client.mjs").read_text(), metallama.url)
    assert said.startswith(f"{METALLAMA} says: ") and "refused: top_p - " in said


def test_every_profile_is_here():
    assert set(PROFILES) == {"neutral", "exllamav3", "osaurus", "openvino", "llm-serve", "metallama"}
