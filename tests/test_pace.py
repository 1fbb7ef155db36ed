"""How large a prompt's pieces are while others decode: by what steps take, on each engine."""

import random

import pytest
import tiny_llama

from backends import BACKENDS, missing_library
from engine import EngineSpec, Sampling
from pace import Pace


def test_as_much_as_fits():
    pace = Pace(0, 32, 256)
    assert pace.piece() == 256  # nothing is known
    for _ in range(50):
        pace.learn(0.05, 0)
        pace.learn(0.05 + 64 * 0.001, 64)
    assert pace.piece() in (99, 100)  # two decode steps would be less than the least time
    for _ in range(50):
        pace.learn(0.2, 0)
        pace.learn(0.2 + 64 * 0.001, 64)
    assert pace.piece() in (199, 200)
    pace.target_s = 0.21
    assert pace.piece() == 32  # it goes on, however slow
    pace.target_s = 9.0
    assert pace.piece() == 256
    before = pace.decode_s, pace.token_s
    pace.learn(9.0, 5)  # too few to say anything
    assert (pace.decode_s, pace.token_s) == before
    assert Pace(40, 32, 256).target_s == 0.04


class Steady(Pace):
    """Always the same piece; keeps what it was told."""

    def __init__(self, tokens):
        self.tokens, self.told = tokens, []

    def learn(self, took, more, few=0):
        self.told.append(more)

    def piece(self):
        return self.tokens


@pytest.fixture(params=["openvino", "llamacpp", "transformers"])
def backend(request, demo, tmp_path):
    if lack := missing_library(request.param):
        pytest.skip(lack)
    path = tiny_llama.make(tmp_path / "llama") if request.param == "transformers" else demo.path
    made = BACKENDS[request.param](EngineSpec(request.param, str(path), 3, 2, 3 * 1024, dtype="float32"), lambda fraction: None)
    yield made
    made.close()


def test_a_prompt_that_arrives_while_others_decode_comes_in_pieces(backend):
    """Nobody decodes: at once. Somebody does: so much a step as the pace says, and the other gets a token in each."""
    chance = random.Random(1)
    sampling = Sampling(max_tokens=900, temperature=0.0, top_p=1.0, top_k=0, seed=1, ignore_eos=True)
    prompts = [[chance.randrange(33, 127) for _ in range(length)] for length in (30, 300, 500)]
    backend.pace = Steady(64)

    def steps(until):
        """What each sequence gets, step by step, up to the first token of one."""
        made = []
        while not made or until not in made[-1]:
            made.append({step.seq: list(step.tokens) for step in backend.step()})
        return made

    alone, _ = backend.start(prompts[1], sampling)
    assert len(steps(alone)) <= 2
    first = steps(alone)[-1][alone]
    backend.cancel(alone)
    decodes, _ = backend.start(prompts[0], sampling)
    steps(decodes)
    backend.step()  # llamacpp: one that has but its first token still waits for prompts that came with its own
    backend.pace.told.clear()
    arrives, _ = backend.start(prompts[2], sampling)
    made = steps(arrives)
    assert len(made) in (8, 9) and all(made[i].get(decodes) for i in range(len(made)))
    assert max(backend.pace.told) <= 64 and sum(backend.pace.told) in range(480, 501)
    backend.cancel(arrives)
    arrives, _ = backend.start([*prompts[2][:100], *prompts[1]], sampling)
    backend.step()
    backend.cancel(arrives)  # in the middle
    for _ in range(3):
        assert [step.seq for step in backend.step()] == [decodes]
    both = [backend.start(prompts[2][at : at + 20], sampling)[0] for at in (50, 90)]
    assert {*both, decodes} == {step.seq for step in backend.step()}  # short ones share a step
    for seq in both:
        backend.cancel(seq)
    backend.cancel(decodes)
    again, _ = backend.start(prompts[1], sampling)
    steps(again)
    assert steps(again)[-1][again] == first
    backend.cancel(again)
