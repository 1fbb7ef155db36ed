"""--deterministic: a request's text, and every score of its tokens, are the same whatever else runs."""

import random
import subprocess
import sys
import threading

import pytest
from conftest import serve_one

from backends import missing_library
from engine import EngineSpec, Sampling, backend_class
from exact import ExactLlamaCpp, ExactOpenVino

LENGTHS = (3, 20, 60, 61, 130, 200, 300, 420)  # words of the eight prompts
WORDS = [
    "the",
    "sea",
    "was",
    "calm",
    "and",
    "old",
    "lamp",
    "of",
    "a",
    "far",
    "lighthouse",
    "turned",
    "over",
    "dark",
    "cold",
    "water",
    "while",
    "men",
    "slept",
]


def prompt(number, part):
    """The first five begin alike, so that one's beginning may be found in another's cache."""
    chance = random.Random(number >= 5)
    words = [chance.choice(WORDS) for _ in range(LENGTHS[number] // part)]
    return f"{' '.join(words)} {number} ends here. Say what you have read."


def answer(served, number, part):
    """What it says, with its scores; half of them are sampled."""
    fields = {"temperature": number % 2, "seed": number, "max_tokens": 24, "logprobs": True}
    status, reply, _ = served.chat(prompt(number, part), **fields)
    assert status == 200, reply
    choice = reply["choices"][0]
    return choice["message"]["content"], [one["logprob"] for one in choice["logprobs"]["content"]]


@pytest.mark.parametrize("backend", ["openvino", "llamacpp", "transformers"])
def test_eighty_of_eighty(backend, request, demo):
    """Eight at once, ten times, in other orders and begun at other times: each as when it was alone."""
    if lack := missing_library(backend):
        pytest.skip(lack)
    path = request.getfixturevalue("hf_folder") if backend == "transformers" else demo.path
    part = 4 if backend == "transformers" else 1  # of the lengths: it takes its time
    spec = EngineSpec(backend, str(path), 8, 0, 8 * 1024, deterministic=True)
    with serve_one(demo, spec) as served:
        alone = [answer(served, number, part) for number in range(8)]
        assert served.chat("Hi.", max_tokens=1)[1]["system_fingerprint"].endswith("_deterministic")
        chance, same, told = random.Random(1), [], []
        for _ in range(10):
            order, pauses = chance.sample(range(8), 8), [chance.choice((0, 0, 0.05, 0.3)) for _ in range(8)]

            def ask(number, wait):
                threading.Event().wait(wait)
                got = answer(served, number, part)
                same.append(got == alone[number])
                told.append((number, got, alone[number]))

            threads = [threading.Thread(target=ask, args=pair) for pair in zip(order, pauses, strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert (sum(same), len(same)) == (80, 80), [number for number, got, own in told if got != own]


def test_llamacpp_decodes_files_in_float_one_by_one(tmp_path, demo):
    """A row of such a file's weights is computed in another order alone: it is tried out, and the text is the same."""
    if lack := missing_library("llamacpp"):
        pytest.skip(lack)
    code = (
        "import ctypes, sys, llama_cpp as lib; params = lib.llama_model_quantize_default_params()\n"
        "params.ftype, params.allow_requantize = lib.LLAMA_FTYPE_MOSTLY_F16, True\n"
        "sys.exit(lib.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))"
    )
    path = tmp_path / "demo-f16.gguf"
    subprocess.run([sys.executable, "-c", code, demo.path, path], check=True, capture_output=True)
    for file, together in ((demo.path, True), (path, False)):
        backend = ExactLlamaCpp(EngineSpec("llamacpp", str(file), 4, 0, 4 * 512, deterministic=True), lambda fraction: None)
        assert backend.together == together
        sampling = Sampling(max_tokens=12, temperature=0.0, logprobs=0, seed=1)
        prompts = [[number + 5] * (60 + 3 * number) for number in range(4)]
        alone = [tokens_of(backend, [(prompt, sampling)])[0] for prompt in prompts]
        assert tokens_of(backend, [(prompt, sampling) for prompt in reversed(prompts)]) == alone[::-1]
        backend.close()


def tokens_of(backend, requests):
    """The tokens of each with their scores, all begun at once."""
    found = {backend.start(prompt, sampling)[0]: [] for prompt, sampling in requests}
    while any(len(tokens) < 12 for tokens in found.values()):
        for step in backend.step():
            found[step.seq] += zip(step.tokens, [score.logprob for score in step.logprobs], strict=True)
            if len(found[step.seq]) == 12:
                backend.cancel(step.seq)
    return [*found.values()]


def test_llamacpp_refuses_what_slots_would_have_to_share(demo):
    if lack := missing_library("llamacpp"):
        pytest.skip(lack)
    with pytest.raises(RuntimeError, match="--length 4000 needs --cache-size 32000"):
        ExactLlamaCpp(
            EngineSpec("llamacpp", str(demo.path), 8, 0, 8192, length=4000, deterministic=True), lambda fraction: None
        )


def test_exllamav3_in_a_folder_of_models_refuses():
    with pytest.raises(RuntimeError, match="exllamav3 does not honour --deterministic"):
        backend_class("exllamav3", "generate", True)


def test_openvino_never_computes_one_row_alone(demo):
    if lack := missing_library("openvino"):
        pytest.skip(lack)
    backend = ExactOpenVino(EngineSpec("openvino", str(demo.path), 4, 0, 4 * 512, deterministic=True), lambda fraction: None)
    sampling = Sampling(max_tokens=12, temperature=0.0, top_p=1.0, top_k=0, logprobs=0, seed=1, ignore_eos=True)
    prompts = [[number + 500] * (20 + 3 * number) for number in range(4)]
    alone = [tokens_of(backend, [(prompt, sampling)])[0] for prompt in prompts]
    assert len(backend.rows) == 2
    assert tokens_of(backend, [(prompt, sampling) for prompt in reversed(prompts)]) == alone[::-1]
    backend.close()
