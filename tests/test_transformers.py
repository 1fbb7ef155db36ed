"""The transformers binding by itself, on random weights: what a real model and a quiet server do not bring about."""

import json
import math
import random
import re
import shutil
from collections import defaultdict

import pytest
import tiny_llama
from conftest import serve_one

import model_init
from backends import ChatTemplate, Transformers, missing_library, own_sampling
from constraints import own_grammar, schema_grammar
from engine import EngineFailed, EngineSpec, Prompt, Refused, Sampling, Tokens, encode

if lack := missing_library("transformers"):
    pytest.skip(lack, allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama.make(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def backend(folder):
    return load(folder)


def load(folder, slots=4, cache=512, **spec):
    return Transformers(
        EngineSpec("transformers", str(folder), slots, 2, cache, dtype="float32", **spec), lambda fraction: None
    )


def sampling(max_tokens, **fields):
    return Sampling(**{"max_tokens": max_tokens, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "seed": 1, **fields})


def run(backend, *requests, steps=3000):
    """The tokens of each request, or what it was told; as many as it asked for, since nothing here looks for the end."""
    left, tokens, order = {}, defaultdict(list), []
    for ids, how in requests:
        seq, _ = backend.start(list(ids), how)
        order.append(seq)
        left[seq] = how.max_tokens
    for _ in range(steps):
        for step in backend.step():
            tokens[step.seq] += step.tokens
            if step.error or len(tokens[step.seq]) >= left[step.seq]:
                tokens[step.seq] = step.error or tokens[step.seq]
                backend.cancel(step.seq)
                del left[step.seq]
        if not left:
            return [tokens[seq] for seq in order]
    raise AssertionError(f"these do not end: {left}")


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "frequency_penalty": 0.5}])
def test_a_full_cache_holds_nobody_up(backend, how):
    """Four that need more than there is: the library preempts, and begins those again; the text is as if alone."""
    chance = random.Random(1)
    prompts = [[chance.randrange(33, 127) for _ in range(40)] for _ in range(4)]
    alone = [run(backend, (prompt, sampling(300, **how)))[0] for prompt in prompts]
    assert run(backend, *[(prompt, sampling(300, **how)) for prompt in prompts]) == alone
    assert len(run(backend, (prompts[0], sampling(5)))[0]) == 5
    scheduler = backend.processor.scheduler
    assert not (backend.rows or scheduler.active_requests or scheduler.waiting_requests)


def test_a_model_without_sdpa_scores_prompts_too(tmp_path, folder):
    """Its attention works inside the batch alone: a plain forward pass must take another."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        vocab_size=384, max_position_embeddings=4096, sliding_window=64, eos_token_id=257, bos_token_id=256, pad_token_id=0,
    )  # fmt: skip
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    backend = load(tmp_path, embeddings=True)
    seq, _ = backend.start([*range(40, 140)], sampling(3, echo=True, logprobs=2))
    steps = [step for _ in range(8) for step in backend.step()]
    backend.cancel(seq)
    assert len(steps[0].scores) == 100 and all(-20 < score.logprob < 0 for score in steps[0].scores[1:])
    long, short = Tokens([*range(40, 140)]), Tokens([*range(50, 90)])
    (*_, together), (*_, alone) = backend.embed([long, short]), backend.embed([short])
    vectors = [memoryview(vector).cast("f").tolist() for vector in (*together, *alone)]
    assert math.isclose(sum(x * x for x in vectors[0]), 1, rel_tol=1e-5)
    assert vectors[1] == pytest.approx(vectors[2], abs=1e-5) and vectors[1] != pytest.approx(vectors[0], abs=1e-2)
    assert len(run(backend, ([50] * 70, sampling(9)))[0]) == 9


def test_a_prompt_that_cannot_be_scored_fails_alone(backend, monkeypatch):
    def broken(row):
        raise RuntimeError("it hurts")

    monkeypatch.setattr(backend, "score_piece", broken)
    failed, fine = run(backend, ([65, 66], sampling(4, echo=True, logprobs=0)), ([65, 66], sampling(4)))
    assert isinstance(failed, EngineFailed) and "it hurts" in str(failed) and len(fine) == 4
    assert not backend.scoring


def test_words_that_the_weights_do_not_know(tmp_path, folder):
    """A tokenizer that has got more words than the model was trained with: no prompt, bias or grammar may reach them."""
    from tokenizers import AddedToken, Tokenizer

    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(f"<|new{i}|>", special=True) for i in range(200)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [257, 400]}')
    backend = load(tmp_path)
    assert (backend.vocabulary, backend.eos) == (384, {257})
    for prompt in (Prompt(text="a <|new199|>"), Prompt(tokens=(65, 384))):
        with pytest.raises(Refused, match="over 383"):
            encode(backend, prompt)
    grammar = own_grammar('root ::= "yes" | "no"')
    (answer,) = run(backend, ([65], sampling(3, grammar=grammar, min_tokens=1)))
    assert b"".join(backend.piece(token, False) for token in answer) in (b"yes", b"no")
    assert backend.piece(500, True) == b"" and len(run(backend, ([383], sampling(2, logit_bias=((383, 100.0),))))[0]) == 2


def test_no_word_for_the_end(tmp_path, folder):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name, without in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        values = json.loads((tmp_path / name).read_text())
        del values[without]
        (tmp_path / name).write_text(json.dumps(values))
    backend = load(tmp_path)
    assert not backend.eos and len(run(backend, ([65], sampling(4, min_tokens=4)))[0]) == 4
    with pytest.raises(Refused, match="no token that ends"):
        backend.start([65], sampling(4, grammar=own_grammar('root ::= "x"')))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|eos|>"}}')
    assert load(tmp_path).eos == {257}


def test_a_grammar_that_can_be_followed_no_further_is_not_called_finished(backend):
    """llguidance has limits; its matcher then fails, and would let the text end in the middle."""
    seq, _ = backend.start([65, 66], sampling(90, grammar=own_grammar("root ::= [a-z]{50}")))
    backend.step()
    matcher = backend.rows[seq].guidance.matcher
    matcher.consume_token(*backend.tokenize("7", False))
    assert matcher.is_error()
    (step,) = backend.step()
    backend.cancel(seq)
    assert isinstance(step.error, Refused) and step.error.param == "structured_outputs" and not step.tokens
    assert len(run(backend, ([65, 66], sampling(9)))[0]) == 9


def test_bans_that_leave_no_token(backend):
    bans = tuple((token, -100.0) for token in backend.tokenize("xy", False))
    (refused,) = run(backend, ([65], sampling(4, grammar=own_grammar('root ::= "x" | "y"'), logit_bias=bans)))
    assert isinstance(refused, Refused) and refused.param == "logit_bias"


def test_a_recursive_schema_is_followed(folder):
    node = {
        "type": "object", "required": ["v", "next"], "additionalProperties": False,
        "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
    }  # fmt: skip
    schema = {"$defs": {"n": node}, "$ref": "#/$defs/n"}
    assert re.search(r"^(r\d+) ::= .*\n(.*\n)*r\d+ ::= .*", schema_grammar(schema), re.M)  # more than one token
    model = model_init.find_model(folder)
    with serve_one(model, EngineSpec("transformers", str(folder), 4, 2, 4096)) as served:
        ended = 0
        for seed in range(12):
            fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
            status, reply, _ = served.chat("x", seed=seed, temperature=1, max_tokens=300, **fields)
            assert status == 200
            choice = reply["choices"][0]
            if choice["finish_reason"] == "stop":
                ended += 1
                assert json.loads(choice["message"]["content"])["v"] in (1, 2)
        assert ended


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "hi"),
        (
            "{{ messages | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}",
            '[{"content":"hi","role":"user"}]',
        ),
        ("{% if tools is not none %}tools{% endif %}{% if documents is none %}none{% endif %}", "none"),
        ("{{ pad_token }}{{ bos_token }}", "<pad><s>"),
    ],
)
def test_templates_that_hugging_face_renders(source, text):
    template = ChatTemplate(source, "<s>", "</s>", {"pad_token": "<pad>"})
    assert template.render(Prompt(messages=({"role": "user", "content": "hi"},))) == text


def test_a_template_that_cannot_be_read_refuses_chats_alone():
    template = ChatTemplate("{% nonsense %}", "", "")
    with pytest.raises(Refused, match="cannot be read"):
        template.render(Prompt(messages=({"role": "user", "content": "hi"},)))


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20.0}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}),
        ({"temperature": 1e-9, "top_p": 0, "top_k": -1}, {"temperature": 0.0}),
        ({"temperature": math.nan, "top_p": 1.5, "top_k": "5"}, {}),
        ({"do_sample": False, "temperature": 0.6}, {}),
        ({"general.sampling.temp": 0.5, "general.sampling.top_k": 3}, {"temperature": 0.5, "top_k": 3}),
    ],
)
def test_what_is_taken_of_the_makers_sampling(given, taken):
    assert own_sampling(given) == taken
