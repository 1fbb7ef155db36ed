#!/usr/bin/env python3
"""Score a multiple-choice task with lm-eval through the server, and check it against the bare library.

    pip install "lm-eval[api]"
    python openai_api_endpoint.py --backend llamacpp              # in another terminal; scoring a prompt needs llamacpp
    python examples/lm_eval_task.py make task                     # 200 questions and a YAML, no download
    lm_eval --model local-completions --tasks sums --include_path task --log_samples --output_path task/out \\
        --model_args model=any,base_url=http://localhost:8000/v1/completions,num_concurrent=8
    python examples/lm_eval_task.py check task model.gguf         # the same choices by llama-cpp-python alone
"""

import ctypes
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

YAML = """task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/sums.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


def make(folder: Path) -> None:
    """Sums, opposites and sequences with four answers each."""
    rng = random.Random(7)
    pairs = [
        "hot cold",
        "big small",
        "up down",
        "day night",
        "left right",
        "old new",
        "wet dry",
        "fast slow",
        "high low",
        "open closed",
    ]
    opposites = [pair.split() for pair in pairs]
    rows = []
    for i in range(200):
        if i % 4 == 0:
            word, right = rng.choice(opposites)
            question, wrong = f"The opposite of {word} is", rng.sample([o for _, o in opposites if o != right], 3)
        elif i % 4 == 1:
            first, step = rng.randint(1, 9), rng.randint(1, 5)
            question = "Continue: " + ", ".join(str(first + k * step) for k in range(4)) + ","
            right = str(first + 4 * step)
            wrong = [str(first + 4 * step + d) for d in (1, -1, 7)]
        else:
            a, b = rng.randint(1, 20), rng.randint(1, 20)
            question, right = f"Question: What is {a} + {b}?\nAnswer:", str(a + b)
            wrong = [str(a + b + d) for d in (1, -2, 10)]
        choices = [right, *wrong]
        rng.shuffle(choices)
        rows.append({"question": question, "choices": choices, "answer": choices.index(right)})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "sums.yaml").write_text(YAML.format(folder=folder.resolve()))
    print(f"{len(rows)} questions in {folder / 'sums.jsonl'}")


class Bare:
    """The sum of a continuation's log probabilities, by the library alone."""

    def __init__(self, path: str):
        import llama_cpp
        import numpy

        self.lib: Any = llama_cpp
        self.numpy: Any = numpy
        lib = self.lib
        self.quiet = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.quiet, ctypes.c_void_p(0))
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        params = lib.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.ctx = lib.llama_init_from_model(self.model, params)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.batch = lib.llama_batch_init(512, 0, 1)

    def encode(self, text: str) -> list[int]:
        data = text.encode()
        ids = (self.lib.llama_token * (len(data) + 8))()
        return list(ids[: self.lib.llama_tokenize(self.vocab, data, len(data), ids, len(data) + 8, False, True)])

    def score(self, context: str, continuation: str) -> float:
        lib, np = self.lib, self.numpy
        ids, start = self.encode(context + continuation), len(self.encode(context))
        lib.llama_memory_clear(lib.llama_get_memory(self.ctx), True)
        for i, token in enumerate(ids):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i], self.batch.logits[i] = token, i, 1, 1
            self.batch.seq_id[i][0] = 0
        self.batch.n_tokens = len(ids)
        if lib.llama_decode(self.ctx, self.batch):
            raise RuntimeError("llama_decode failed")
        total = 0.0
        for i in range(start, len(ids)):
            logits = np.ctypeslib.as_array(
                lib.llama_get_logits_ith(self.ctx, i - 1), shape=(lib.llama_vocab_n_tokens(self.vocab),)
            )
            best = float(logits.max())
            total += float(logits[ids[i]]) - best - math.log(float(np.exp(logits.astype("f8") - best).sum()))
        return total


def check(folder: Path, model: str) -> None:
    samples = sorted(folder.glob("out/**/samples_sums_*.jsonl"))[-1]
    bare, same, worst, right = Bare(model), 0, 0.0, 0
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    for row in rows:
        through = [float(answer[0][0]) if isinstance(answer[0], list) else float(answer[0]) for answer in row["resps"]]
        direct = [bare.score(row["doc"]["question"], " " + choice) for choice in row["doc"]["choices"]]
        worst = max(worst, *(abs(a - b) for a, b in zip(through, direct, strict=True)))
        same += through.index(max(through)) == direct.index(max(direct))
        right += direct.index(max(direct)) == row["doc"]["answer"]
    print(f"{same} of {len(rows)} choices are the same; largest difference of a score {worst:.4f}; {right} right")


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"] and len(sys.argv) == 3:
        make(Path(sys.argv[2]))
    elif sys.argv[1:2] == ["check"] and len(sys.argv) == 4:
        check(Path(sys.argv[2]), sys.argv[3])
    else:
        raise SystemExit(__doc__)
