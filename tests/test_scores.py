"""Log probabilities against the bare libraries, over the same tokens: llama_get_logits_ith, and OpenVINO's model without pages."""

import json
import subprocess
import sys

import pytest
from conftest import serve_one

from backends import missing_library
from engine import EngineSpec

# In a process of its own: the library's logits for every position of a list of token ids.
BARE = """
import ctypes, json, sys, numpy as np, llama_cpp as lib
quiet = lib.llama_log_callback(lambda *_: None)
lib.llama_log_set(quiet, ctypes.c_void_p(0))
lib.llama_backend_init()
model = lib.llama_model_load_from_file(sys.argv[1].encode(), lib.llama_model_default_params())
params = lib.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = 512
params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
ctx = lib.llama_init_from_model(model, params)
n = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
out = []
batch = lib.llama_batch_init(64, 0, 1)
for ids in json.loads(sys.argv[2]):
    lib.llama_memory_clear(lib.llama_get_memory(ctx), True)
    rows = []
    for at in range(0, len(ids), 64):  # as the server does: with flash attention the arithmetic depends on the pieces
        piece = ids[at : at + 64]
        for i, token in enumerate(piece):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, at + i, 1, 1
            batch.seq_id[i][0] = 0
        batch.n_tokens = len(piece)
        assert lib.llama_decode(ctx, batch) == 0
        rows += [np.ctypeslib.as_array(lib.llama_get_logits_ith(ctx, i), shape=(n,)).astype("f8") for i in range(len(piece))]
    rows = np.stack(rows)
    rows -= rows.max(1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    out.append([[float(rows[i - 1, ids[i]]), float(rows[i - 1].max())] for i in range(1, len(ids))])
print(json.dumps(out))
"""
BARE_OPENVINO = """
import json, os, sys, numpy as np, openvino, openvino_genai
os.chdir(sys.argv[3])
os.symlink(sys.argv[1], "model.gguf")
openvino_genai.LLMPipeline("model.gguf", "CPU", enable_save_ov_model=True)
exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
model = openvino.Core().compile_model("openvino_model.xml", "CPU", exact)
out = []
for ids in json.loads(sys.argv[2]):
    request, row = model.create_infer_request(), np.array([ids])
    given = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None], "beam_idx": np.zeros(1, "i4")}
    rows = request.infer(given)["logits"][0].astype("f8")
    rows -= rows.max(1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    out.append([[float(rows[i - 1, ids[i]]), float(rows[i - 1].max())] for i in range(1, len(ids))])
print(json.dumps(out))
"""
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Les élèves ☃ 世界 🎉.", "def f(x):\n    return x + 1\n" * 12]


@pytest.mark.parametrize(("backend", "bos"), [("llamacpp", False), ("llamacpp", True), ("openvino", False)])
def test_prompt_scores_are_the_librarys(demo, tmp_path, backend, bos):
    if lack := missing_library(backend):
        pytest.skip(lack)
    dtype = "float32" if backend == "openvino" else "auto"
    with serve_one(demo, EngineSpec(backend, str(demo.path), 4, 0, 4096, dtype=dtype)) as served:
        prompts = [served.request("POST", "/tokenize", {"content": t, "add_special": False})[1]["tokens"] for t in TEXTS]
        prompts = [[1, *ids] if bos else ids for ids in prompts]
        body = {"echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        replies = [served.request("POST", "/v1/completions", body | {"prompt": ids})[1] for ids in prompts]
    bare = [
        sys.executable,
        "-c",
        BARE_OPENVINO if backend == "openvino" else BARE,
        str(demo.path),
        json.dumps(prompts),
        str(tmp_path),
    ]
    done = subprocess.run(bare, capture_output=True, text=True, check=True)
    for ids, reply, bare in zip(prompts, replies, json.loads(done.stdout), strict=True):
        scores = reply["choices"][0]["logprobs"]
        assert len(scores["tokens"]) == len(ids) + 1
        assert scores["token_logprobs"][0] is None
        for i, (own, best) in enumerate(bare, start=1):
            assert scores["token_logprobs"][i] == pytest.approx(own, abs=1e-3)
            assert max(scores["top_logprobs"][i].values()) == pytest.approx(best, abs=1e-3)
