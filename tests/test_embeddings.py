"""Models that embed or rerank: vectors against a reference by hand, on every engine; batches, refusals, another server behind."""

import base64
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import embedding_models
import pytest
from conftest import ROOT, serve_one, serve_upstream, until
from test_upstream import Far, reply

from backends import missing_library
from catalog import Incomplete, UsageError, choose_backend, find_model, models_in
from engine import Answer, EngineFailed, EngineSpec, Pool, Pooling, Tokens, backend_class
from model_files import folder_task, gguf_task, read_pooling
from openai_api_endpoint import listening

WORDS = [word for word in embedding_models.WORDS if not word.startswith("##")]
TEXTS = [" ".join(WORDS[: 1 + 3 * i % 20]) for i in range(7)] + ["Birds, birds! Where?"]


def make(kind, folder, *arguments):
    """tests/embedding_models.py in a process of its own."""
    given = [a if isinstance(a, str) else json.dumps(a) for a in arguments]
    command = [sys.executable, ROOT / "tests" / "embedding_models.py", kind, folder, *given]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def reference(folder, **given):
    return json.loads(make("reference", folder, given).splitlines()[-1])


def need(*backends):
    for backend in backends:
        if lack := missing_library(backend):
            pytest.skip(lack)


def serve_path(path, asked="auto", **spec):
    """A server of the model that `path` names, as the command line would find and load it."""
    model = find_model(Path(path))
    return serve_one(model, EngineSpec(choose_backend(model, asked), str(path), 4, task=model.task, **spec))


def post(served, path, body, wanted=200):
    status, told, _ = served.request("POST", path, body)
    assert status == wanted, told
    return told


def refused(served, path, body, param):
    error = post(served, path, body, 400)["error"]
    assert error["param"] == param, error
    return error


def vectors(served, texts, **fields):
    told = post(served, "/v1/embeddings", {"input": texts, **fields})
    assert [row["index"] for row in told["data"]] == list(range(len(told["data"])))
    return [row["embedding"] for row in told["data"]]


def apart(a, b):
    """The largest difference of any two numbers."""
    return max(abs(x - y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


# ─────────────────────────────────────────── the real model, on each engine ──────────────────────────────────────

SENTENCES = [
    "The capital of France is Paris.",
    "Paris is where France is governed from.",
    "Bananas are yellow, and naïve ☃ snowmen are not.",
    "A much longer sentence that goes on and on about the rain in Spain, which falls mainly in the plain, as they say. " * 4,
]


@pytest.fixture(scope="session")
def minilm():
    need("transformers")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "openai_api_endpoint" / "all-MiniLM-L6-v2"
    make("minilm", folder)
    return folder


@pytest.fixture(scope="session", params=["transformers", "llamacpp", "openvino"])
def real(request, minilm, tmp_path_factory):
    need(request.param)
    path, spec = minilm, {}
    if request.param == "llamacpp":
        path = tmp_path_factory.mktemp("gguf") / "all-MiniLM-L6-v2.F16.gguf"
        make("gguf", minilm, str(path))
    if request.param == "openvino":
        path, spec = tmp_path_factory.mktemp("ir") / "all-MiniLM-L6-v2", {"dtype": "float32"}
        make("ir", minilm, str(path))
    with serve_path(path, **spec) as served:
        served.engine = request.param
        yield served


@pytest.fixture(scope="session")
def expected(minilm):
    return reference(minilm, texts=SENTENCES, modes=["mean"])


def test_vectors_are_the_references(real, expected):
    found = vectors(real, SENTENCES)
    assert apart(found, expected) < {"transformers": 1e-4, "llamacpp": 1e-3, "openvino": 1e-4}[real.engine]
    assert all(math.isclose(math.hypot(*vector), 1, rel_tol=1e-5) for vector in found)


def test_many_inputs_at_once_are_each_as_if_alone(real, expected):
    """More than a batch, of every length; also as token ids, and as base64, which is what the numbers are."""
    many = [text[: 5 + 11 * i % 300] for i, text in enumerate(SENTENCES * 60)]
    found = vectors(real, many)
    for i in (0, 7, 100, 239):
        assert apart([found[i]], vectors(real, many[i])) < 1e-3
    ids = post(real, "/tokenize", {"content": SENTENCES[0]})["tokens"]
    assert apart(vectors(real, [ids, ids]), expected[:1] * 2) < 1e-3
    told = post(real, "/v1/embeddings", {"input": SENTENCES[0], "encoding_format": "base64"})
    packed = base64.b64decode(told["data"][0]["embedding"])
    assert list(struct.unpack("<384f", packed)) == pytest.approx(vectors(real, SENTENCES[0])[0], abs=1e-7)
    assert told["usage"] == {"prompt_tokens": len(ids), "total_tokens": len(ids)}


def test_it_is_listed_as_what_it_is_and_refuses_to_chat(real):
    (card,) = real.request("GET", "/v1/models")[1]["data"]
    assert card["task"] == "embed" and card["loaded"]
    for path, body in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/completions", {"prompt": "Hi"}),
    ):
        error = refused(real, path, body, "model")
        assert error["code"] == "unsupported_task" and card["id"] in error["message"] and "/v1/embeddings" in error["message"]
    assert "/v1/embeddings -H" in listening(real.server)  # the banner's example
    assert refused(real, "/apply-template", {"messages": [{"role": "user", "content": "Hi"}]}, "messages")


def test_too_long_is_refused_unless_it_may_be_cut(real):
    text = "rain " * 600
    error = refused(real, "/v1/embeddings", {"input": ["x", text]}, "input")
    assert error["code"] == "context_length_exceeded"
    refused(real, "/v1/embeddings", {"input": "x" * 100_000}, "input")
    short = vectors(real, "rain " * 8)
    if real.engine != "openvino":  # its tokenizer cuts at a limit of its own, so such a text stays refused
        assert apart(vectors(real, text, truncate_prompt_tokens=10), short) < 1e-3
        assert apart(vectors(real, text, truncate_prompt_tokens=-1), short) > 1e-3
    assert apart(vectors(real, "rain " * 50, truncate_prompt_tokens=10), short) < 1e-3


def test_dimensions(real, expected):
    (vector,) = vectors(real, SENTENCES[0], dimensions=32)
    length = math.hypot(*expected[0][:32])
    assert apart([vector], [[x / length for x in expected[0][:32]]]) < 5e-3
    refused(real, "/v1/embeddings", {"input": "x", "dimensions": 385}, "dimensions")


def test_rerank_and_score_by_the_cosine_of_an_embedding_model(real, expected):
    body = {"query": SENTENCES[0], "documents": SENTENCES[1:], "return_documents": True}
    results = post(real, "/v1/rerank", body)["results"]
    assert [r["index"] for r in results][0] == 0 and results[0]["document"] == {"text": SENTENCES[1]}
    scores = [row["score"] for row in post(real, "/v1/score", {"text_1": SENTENCES[0], "text_2": SENTENCES[1:]})["data"]]
    cosines = [sum(x * y for x, y in zip(expected[0], other, strict=True)) for other in expected[1:]]
    assert scores == pytest.approx(cosines, abs=2e-3)
    assert {r["index"]: r["relevance_score"] for r in results} == pytest.approx(dict(enumerate(cosines)), abs=2e-3)


def test_the_official_client(real, expected):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=real.url + "/v1", api_key="none")
    data = client.embeddings.create(model="any", input=SENTENCES).data
    assert apart([row.embedding for row in data], expected) < 1e-3
    with pytest.raises(openai.BadRequestError, match="embeds texts"):
        client.chat.completions.create(model="any", messages=[{"role": "user", "content": "Hi"}])


# ────────────────────────────────────────────── each way of pooling ──────────────────────────────────────────────

QUERY, DOCUMENTS = "where birds sing", ["a big red dog sat on my mat.", "birds sing in spring", "rain " * 20]
IDENTITY = {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
ALL = ["cls", "mean_sqrt_len_tokens", "max"]
ZOO = {  # name → how the folder is made, what the reference is asked for, its pooling as GGUF
    "cls": ({"pooling": "cls"}, {"modes": ["cls"]}, "cls"),
    "mean": ({"pooling": "mean"}, {"modes": ["mean"]}, "mean"),
    "last": ({"pooling": "lasttoken"}, {"modes": ["lasttoken"]}, "lasttoken"),
    "any length": ({"pooling": "mean", "normalize": False}, {"modes": ["mean"], "normalize": False}, ""),
    "max": ({"pooling": "max"}, {"modes": ["max"]}, ""),
    "weighted": ({"pooling": ["weightedmean"]}, {"modes": ["weightedmean"]}, ""),
    "several": ({"pooling": ALL, "normalize": False}, {"modes": ALL, "normalize": False}, ""),
    "dense": ({"pooling": "mean", "dense": True}, {"modes": ["mean"], "dense": True}, ""),
    "reranker": ({"classes": 1, "types": 1}, {}, "rank"),
    "reranker of types": ({"classes": 1, **IDENTITY}, {}, ""),
}


class Zoo(type(Path())):
    says: dict


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """The folder of all small models, made in one process; `.says[name]`: what each should answer."""
    need("transformers")
    given = {}
    for name, (made, asked, gguf) in ZOO.items():
        asks = {"query": QUERY, "documents": DOCUMENTS} if "classes" in made else {"texts": TEXTS, **asked}
        given[name] = {"made": made, "asked": asks, "gguf": gguf}
    folder = Zoo(tmp_path_factory.mktemp("zoo"))
    folder.says = json.loads(make("zoo", folder, given).splitlines()[-1])
    return folder


@pytest.mark.parametrize("name", [name for name, (made, _, _) in ZOO.items() if "classes" not in made])
def test_poolings_on_transformers(zoo, name):
    with serve_path(zoo / name) as served:
        assert apart(vectors(served, TEXTS), zoo.says[name]) < 1e-4


@pytest.mark.parametrize("name", ["mean", "cls", "last"])
def test_poolings_on_llamacpp(zoo, name):
    need("llamacpp")
    with serve_path(zoo / f"{name}.gguf") as served:
        assert apart(vectors(served, TEXTS), zoo.says[name]) < 5e-3


def test_the_models_own_prompts(zoo, tmp_path):
    folder = shutil.copytree(zoo / "mean", tmp_path / "tiny")
    prompts = {"prompts": {"query": "where of: ", "document": ""}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with serve_path(folder) as served:
        assert vectors(served, "rain", prompt_name="query") == vectors(served, "where of: rain") != vectors(served, "rain")
        assert vectors(served, "rain", prompt_name="document") == vectors(served, "rain")
        error = refused(served, "/v1/embeddings", {"input": "x", "prompt_name": "title"}, "prompt_name")
        assert "query, document" in error["message"]
        found = post(served, "/v1/rerank", {"query": "rain", "documents": ["spring"]})["results"][0]["relevance_score"]
        asked = post(served, "/v1/score", {"text_1": "where of: rain", "text_2": "spring"})["data"][0]["score"]
        assert found == pytest.approx(asked, abs=1e-6)
    prompts["default_prompt_name"] = "query"
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with serve_path(folder) as served:
        assert vectors(served, "rain") == vectors(served, "where of: rain", prompt_name="document")


# ─────────────────────────────────────────────────── rerankers ───────────────────────────────────────────────────


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("backend", ["transformers", "llamacpp"])
def test_a_reranker(zoo, backend):
    need(backend)
    path = zoo / ("reranker" if backend == "transformers" else "reranker.gguf")
    wanted = [sigmoid(x) for x in zoo.says["reranker"]]
    with serve_path(path) as served:
        assert served.request("GET", "/v1/models")[1]["data"][0]["task"] == "rerank"
        body = {"query": QUERY, "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}, DOCUMENTS[2]], "return_documents": True}
        told = post(served, "/v1/rerank", body)
        order = sorted(range(3), key=lambda i: -wanted[i])
        assert [r["index"] for r in told["results"]] == order
        assert [r["relevance_score"] for r in told["results"]] == pytest.approx([wanted[i] for i in order], abs=5e-3)
        assert [r["document"]["text"] for r in told["results"]] == [DOCUMENTS[i] for i in order]
        assert told["usage"]["total_tokens"] > 30 and told["id"].startswith("rerank-")
        best = post(served, "/v2/rerank", body | {"top_n": 1, "return_documents": False})["results"]
        assert [set(result) for result in best] == [{"index", "relevance_score"}] and best[0]["index"] == order[0]
        told = post(served, "/v1/score", {"text_1": QUERY, "text_2": DOCUMENTS})
        assert [row["score"] for row in told["data"]] == pytest.approx(wanted, abs=5e-3)
        pairs = post(served, "/score", {"text_1": [QUERY] * 3, "text_2": DOCUMENTS})
        assert [row["score"] for row in pairs["data"]] == [row["score"] for row in told["data"]]
        long = {"query": QUERY, "documents": ["rain " * 500]}
        assert refused(served, "/v1/rerank", long, "documents")["code"] == "context_length_exceeded"
        cut = post(served, "/v1/rerank", long | {"truncate_prompt_tokens": 25})
        assert cut["usage"]["total_tokens"] == 25
        refused(served, "/v1/embeddings", {"input": "x"}, "model")
        refused(served, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, "model")


def test_a_reranker_that_knows_token_types_and_wants_no_sigmoid(zoo):
    with serve_path(zoo / "reranker of types") as served:
        found = [row["score"] for row in post(served, "/score", {"text_1": QUERY, "text_2": DOCUMENTS})["data"]]
    assert found == pytest.approx(zoo.says["reranker of types"], abs=1e-4)


def test_what_is_no_reranker_is_told_so(tmp_path, scripted):
    error = refused(scripted, "/v1/rerank", {"query": "a", "documents": ["b"]}, "model")
    assert "generates text" in error["message"]
    config = {"architectures": ["BertForSequenceClassification"], "id2label": {str(i): f"mood {i}" for i in range(3)}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(Incomplete, match="classifier of 3 labels"):
        models_in(tmp_path, os.listdir(tmp_path), "moods")


# ─────────────────────────────────────────── which model is what, from files ──────────────────────────────────────


@pytest.mark.parametrize(
    ("meta", "task"),
    [
        ({"general.architecture": "llama"}, "generate"),
        ({"general.architecture": "bert"}, "embed"),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 3}, "embed"),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 0}, "generate"),
        ({"general.architecture": "qwen3", "qwen3.pooling_type": 4}, "rerank"),
        ({"general.architecture": "bert", "bert.classifier.output_labels": 1}, "rerank"),
    ],
)
def test_what_a_gguf_is_for(meta, task):
    assert gguf_task(meta) == task


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("LlamaForCausalLM", "generate"), ("GPT2LMHeadModel", "generate"), ("BertModel", "embed"), ("BertForMaskedLM", "embed"),
        ("XLMRobertaForSequenceClassification", "classify"),
    ],
)  # fmt: skip
def test_what_a_folder_is_for(tmp_path, architecture, task):
    assert folder_task(str(tmp_path), {"architectures": [architecture]}) == task
    one = {"architectures": ["XLMRobertaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    assert folder_task(str(tmp_path), one) == "rerank"
    (tmp_path / "modules.json").write_text("[]")
    assert folder_task(str(tmp_path), {"architectures": ["Qwen3ForCausalLM"]}) == "embed"


@pytest.mark.parametrize(
    ("modules", "pooling", "says"),
    [
        ([("a.Transformer", ""), ("a.SpladePooling", "1")], {}, "SpladePooling"),
        ([("a.Transformer", ""), ("a.Pooling", "../1")], {}, "leads out"),
        ([("a.Transformer", ""), ("a.Pooling", "/etc")], {}, "leads out"),
        ([("a.Transformer", ""), ("a.Pooling", "1")], {"pooling_mode": "median"}, "no pooling median"),
        ([("a.Transformer", ""), ("a.Pooling", "1")], {"include_prompt": False}, "leaves the prompt out"),
    ],
)
def test_what_nobody_here_can_pool_is_refused_by_name(tmp_path, modules, pooling, says):
    (tmp_path / "modules.json").write_text(json.dumps([{"type": kind, "path": path} for kind, path in modules]))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "config.json").write_text(json.dumps(pooling))
    with pytest.raises(ValueError, match=says):
        read_pooling(str(tmp_path))


def test_engines_that_cannot_load_it_are_refused_by_name(minilm):
    with pytest.raises(UsageError, match="exllamav3 cannot load .* that embeds texts"):
        choose_backend(find_model(minilm), "exllamav3")


# ──────────────────────────────────────────── batches, by a fake backend ─────────────────────────────────────────


class Fake:
    """A vector is its input's length; what begins with 13 is bad luck."""

    pool_tokens, pool_rows = 40, 4

    def __init__(self):
        self.batches = []

    def embed(self, inputs):
        self.batches.append([len(given.ids) for given in inputs])
        if any(given.ids[0] == 13 for given in inputs):
            raise RuntimeError("bad luck")
        yield []  # a piece
        yield [struct.pack("<f", len(given.ids)) for given in inputs]


def pooling(*lengths, first=1):
    return Pooling([Tokens([first] * n) for n in lengths], lambda vectors: [struct.unpack("<f", v)[0] for v in vectors])


def drain(pool):
    events = []
    while pool.jobs:
        events += pool.advance()
    return events


def test_batches_are_of_like_length_and_bounded():
    pool = Pool(Fake())
    pool.jobs[1] = pooling(3, 20, 5, 60, 9, 10, 10, 10, 1)
    assert drain(pool) == [(1, Answer([3, 20, 5, 60, 9, 10, 10, 10, 1]))]
    assert pool.backend.batches == [[60], [20, 10], [10, 10, 9, 5], [3, 1]]


def test_calls_take_turns_and_fill_each_others_batches():
    pool = Pool(Fake())
    pool.jobs[1], pool.jobs[2] = pooling(*[10] * 12), pooling(9)
    assert drain(pool) == [(2, Answer([9])), (1, Answer([10] * 12))]
    assert pool.backend.batches == [[10] * 4, [9, 10, 10, 10], [10] * 4, [10]]


def test_a_batch_that_fails_fails_only_those_in_it():
    pool = Pool(Fake())
    pool.jobs[1], pool.jobs[2] = pooling(30, 30, first=13), pooling(40)
    events = dict(drain(pool))
    assert isinstance(events[1], EngineFailed) and "bad luck" in str(events[1]) and events[2] == Answer([40])


def test_a_call_that_was_cancelled_in_mid_batch_is_forgotten():
    pool = Pool(Fake())
    pool.jobs[1], pool.jobs[2] = pooling(10, 10), pooling(10)
    assert pool.advance() == []
    del pool.jobs[1]
    assert drain(pool) == [(2, Answer([10]))]


def test_generation_goes_on_between_batches(tmp_path):
    """Real engine process, scripted backend: between any two batches of a long call there is a step for the others."""
    model = find_model_stub(tmp_path)
    with serve_one(model, EngineSpec("scripted:Embedding", str(tmp_path), 2, embeddings=True), folder=tmp_path) as served:
        answer = threading.Thread(target=served.chat, args=("forever",), kwargs={"max_tokens": 1900})
        answer.start()
        until(lambda: "step" in served.calls())
        assert len(vectors(served, ["x"] * 100)) == 100
        answer.join()
        calls = [line for line in served.calls() if line in ("step", "embed")]
        first, last = calls.index("embed"), len(calls) - calls[::-1].index("embed")
        assert calls[first:last].count("embed") == 25 and "embed,embed" not in ",".join(calls[first:last])


def find_model_stub(folder):
    import model_init

    return model_init.Model("scripted", Path(folder), "gguf", 1234)


# ─────────────────────────────────────────────── what a body may say ─────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a"}, "documents"),
        ("/v1/rerank", {"query": ["a"], "documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": "a"}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a", 1]}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": [{"text": "a", "title": "b"}]}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 2049}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": 0}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "rank_fields": ["title"]}, "rank_fields"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "max_tokens_per_doc": 5}, "max_tokens_per_doc"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": "a"}, "text_1"),
        ("/v1/embeddings", {"input": ["a"] * 2049}, "input"),
        ("/v1/embeddings", {"input": ["a", 5]}, "input"),
        ("/v1/embeddings", {"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ],
)
def test_bad_bodies_name_their_field(scripted, path, body, param):
    refused(scripted, path, body, param)


# ─────────────────────────────────────────────── through another server ──────────────────────────────────────────


def test_passed_on_to_a_server_behind(real):
    """--backend vllm before this server itself: the same answers, errors too."""
    with serve_upstream(real.url) as front:
        assert vectors(front, SENTENCES) == vectors(real, SENTENCES)
        for path, body in (
            ("/v1/rerank", {"query": "a", "documents": SENTENCES, "top_n": 2, "return_documents": True}),
            ("/v1/score", {"text_1": SENTENCES, "text_2": SENTENCES}),
            ("/tokenize", {"content": SENTENCES[2]}),
            ("/detokenize", {"tokens": [1996, 3007]}),
        ):
            one, other = post(front, path, body), post(real, path, body)
            for told in (one, other):
                for name in ("id", "created", "model", "max_model_len"):
                    told.pop(name, None)
            assert one == other
        assert refused(front, "/v1/embeddings", {"input": "rain " * 600}, "input")["code"] == "context_length_exceeded"
        refused(front, "/v1/embeddings", {"input": "x", "prompt_name": "query"}, "prompt_name")
        refused(front, "/tokenize", {"content": "x", "with_pieces": True}, "with_pieces")
        refused(front, "/apply-template", {"messages": [{"role": "user", "content": "Hi"}]}, "messages")
        assert "embeds texts" in refused(front, "/v1/completions", {"prompt": "x"}, "model")["message"]


@pytest.fixture
def far():
    made = Far()
    yield made
    made.close()


def says(body):
    return Far.answer(reply(200, body, "Content-Type: application/json\r\n"))


def test_what_an_upstream_is_asked(far):
    with serve_upstream(far.url) as front:
        row = {"index": 0, "embedding": [0.5, -0.25]}
        far.script = says({"data": [row], "usage": {"prompt_tokens": 3}})
        assert vectors(front, [[5, 6]], truncate_prompt_tokens=7) == [[0.5, -0.25]]
        assert far.bodies[-1] == {
            "model": "far/model",
            "input": [[5, 6]],
            "encoding_format": "base64",
            "truncate_prompt_tokens": 7,
        }
        far.script = says(
            {
                "results": [{"index": 1, "relevance_score": 0.9}, {"index": 0, "relevance_score": 0.1}],
                "usage": {"total_tokens": 9},
            }
        )
        told = post(front, "/v1/rerank", {"query": "a", "documents": ["b", "c"], "top_n": 1})
        assert told["results"] == [{"index": 1, "relevance_score": 0.9}] and told["usage"]["total_tokens"] == 9
        assert far.bodies[-1] == {"model": "far/model", "query": "a", "documents": ["b", "c"]}
        far.script = says({"data": [{"index": 0, "score": 0.5}], "usage": {"prompt_tokens": 4}})
        assert post(front, "/v1/score", {"text_1": "a", "text_2": "b"})["data"][0]["score"] == 0.5
        assert far.bodies[-1] == {"model": "far/model", "text_1": "a", "text_2": ["b"]}
        far.script = says({"tokens": [1, 2], "count": 2, "max_model_len": 500, "token_strs": ["a", "b"]})
        told = post(front, "/tokenize", {"messages": [{"role": "user", "content": "x"}], "return_token_strs": True})
        assert told == {"tokens": [1, 2], "count": 2, "max_model_len": 500, "token_strs": ["a", "b"]}
        assert (
            far.bodies[-1]["messages"] == [{"role": "user", "content": "x"}] and far.bodies[-1]["add_special_tokens"] is False
        )
        far.script = says({"prompt": "ab"})
        assert post(front, "/detokenize", {"tokens": [1, 2]})["content"] == "ab"


@pytest.mark.parametrize(
    ("body", "says_so"),
    [
        ({"data": []}, "0 embeddings of 1"),
        ({"data": [{"index": 0, "embedding": "AAA="}]}, "float32"),
        ({"data": [{"index": 0, "embedding": "!"}]}, "broke off"),
        ({"what": 1}, "broke off"),
        ([], "broke off"),
    ],
)
def test_an_upstream_that_answers_nonsense(far, body, says_so):
    with serve_upstream(far.url) as front:
        far.script = says(body)
        error = post(front, "/v1/embeddings", {"input": "x"}, 502)["error"]
        assert error["type"] == "upstream_error" and says_so in error["message"], error
        far.script = says({"data": [{"index": 0, "embedding": [1.0]}]})
        assert vectors(front, "x") == [[1]]


@pytest.mark.parametrize("backend", ["openai", "tensorrt_llm"])
def test_other_upstreams_are_not_asked(far, backend):
    with serve_upstream(far.url, backend) as front:
        for path, body in (
            ("/v1/embeddings", {"input": "x"}), ("/v1/rerank", {"query": "x", "documents": ["y"]}),
            ("/v1/score", {"text_1": "x", "text_2": "y"}), ("/tokenize", {"content": "x"}), ("/detokenize", {"tokens": [1]}),
        ):  # fmt: skip
            refused(front, path, body, next(iter(body)))
        assert not far.bodies


# ─────────────────────────────────────────── the demo, as what it is not ─────────────────────────────────────────


def test_a_causal_model_that_embeds(demo):
    """Its pooling is llama.cpp's, over a KV cache that all inputs of a batch share: the same as what --embeddings gives."""
    need("llamacpp")
    given = [Tokens([*range(50, 50 + n)]) for n in (3, 90, 40)]
    made = {task: backend_class("llamacpp", task) for task in ("generate", "embed")}
    found = []
    for task, kind in made.items():
        backend = kind(EngineSpec("llamacpp", str(demo.path), 2, 0, 512, embeddings=True, task=task), lambda fraction: None)
        for _ in range(2):  # the second time over what the first has left
            *_, together = backend.embed(given)
        found.append([memoryview(vector).cast("f").tolist() for vector in together])
        backend.close()
    assert apart(*found) < 2e-3 and apart(found[0][:1], found[0][1:2]) > 1e-2


def test_a_gguf_that_generates_embeds_nothing_on_openvino(demo):
    need("openvino")
    with serve_path(demo.path, "openvino") as served:
        assert "llamacpp and transformers can" in refused(served, "/v1/embeddings", {"input": "x"}, "input")["message"]
