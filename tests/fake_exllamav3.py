"""A stand-in for exllamav3 1.6.5 where there is no CUDA: `install` puts it in its place, and `Fake` is the binding over it.

The last user message, or the whole prompt, says what the model is to say, a token being a byte:

`echo TEXT` TEXT and EOS; `half TEXT` the same without the last byte; `sharp TEXT` with a probability of 0 for all else;
`forever` x; `dice` whatever the sampler draws; `fail N` the job breaks after N tokens; `raise` iterate() raises after two;
`loop TEXT` the job ends after TEXT as one that runs in circles.

Signatures are the real ones without **kwargs, which would swallow a misspelt name; test_exllamav3.py compares them with the
wheel's. What it is given stands in each object's `given`, and in the model folder's file `log`, a line of JSON each.
"""

import importlib.machinery
import importlib.metadata
import json
import os
import random
import sys
import threading
import time
import types

import llguidance
import tokenizers
import torch

from backends import ExLlamaV3

PAGE_SIZE = 256
HERE = sys.modules[__name__]


class Fake(ExLlamaV3):
    def __init__(self, spec, progress):
        import pytest

        install(pytest.MonkeyPatch())  # for good: the process is the engine's own
        super().__init__(spec, progress)


def install(patch):
    """exllamav3 and a GPU, as far as anybody asks; `patch` is a MonkeyPatch."""
    patch.setitem(sys.modules, "exllamav3", HERE)
    patch.setitem(sys.modules, "exllamav3.model_init", model_init)
    compiled = types.ModuleType("exllamav3_ext")
    compiled.__spec__ = importlib.machinery.ModuleSpec("exllamav3_ext", None)
    patch.setitem(sys.modules, "exllamav3_ext", compiled)
    version = importlib.metadata.version
    patch.setattr(importlib.metadata, "version", lambda name: "1.6.5" if name == "exllamav3" else version(name))
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (8 << 30, 8 << 30))


def note(folder, **line):
    with open(os.path.join(folder, "log"), "a") as f:
        f.write(json.dumps(line, default=repr) + "\n")


def given(arguments):
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__")}


# ── what is loaded ──


class Config:
    def __init__(self, directory):
        with open(os.path.join(directory, "config.json")) as f:
            config = json.load(f)
        self.directory, self.vocab_size, self.eos_token_id_list = directory, config["vocab_size"], [config["eos_token_id"]]


class Model:
    def __init__(self, config):
        self.config, self.loaded = config, False

    def load(self, callback=None):
        if os.path.exists(os.path.join(self.config.directory, "fail")):
            raise RuntimeError("a page of context\nInsufficient VRAM in split for model and cache\n")
        for done in (0, 1, 2):
            callback(done, 2)
        self.loaded = True

    def unload(self):
        self.loaded = False
        note(self.config.directory, call="unload")


class Cache:
    def __init__(self, model, max_num_tokens):
        assert max_num_tokens % PAGE_SIZE == 0, "max_num_tokens must be a multiple of 256"
        self.max_num_tokens = max_num_tokens


class Tokenizer:
    def __init__(self, config):
        self.config = config
        self.tokenizer = tokenizers.Tokenizer.from_file(os.path.join(config.directory, "tokenizer.json"))
        self.actual_vocab_size = self.tokenizer.get_vocab_size()
        self.grammars = llguidance.LLTokenizer(self.tokenizer.to_str(), eos_token=config.eos_token_id_list)


# ── model_init ──

VALUES = {  # long name → short, type, default
    "model_dir": ("-m", str, None), "gpu_split": ("-gs", str, None), "override": ("-or", str, None),
    "moe_cpu_offload": ("-mcl", int, 0), "moe_cpu_split": ("-mcs", int, 0), "moe_cpu_threads": ("-mct", int, None),
    "tp_backend": ("-tpb", str, "native"), "tp_max_parallelism_attn": ("-tp_attn", int, None),
    "tp_max_parallelism_mlp": ("-tp_mlp", int, None), "tp_max_parallelism_moe": ("-tp_moe", int, None),
    "tp_max_parallelism_linear": ("-tp_linear", int, None), "tp_max_parallelism_linear_attn": ("-tp_linear_attn", int, None),
    "autosplit_max_batch_size": ("-ambs", int, "default_autosplit_max_batch_size"),
    "chunk_size": ("-chunk_size", int, "default_chunk_size"), "layer_map": ("-layer_map", str, None),
    "cache_size": ("-cs", int, "default_cache_size"), "cache_quant": ("-cq", str, None), "cache_compand_a": ("-cca", float, 0.0),
    "cpu_cache_size": ("-ccs", float, "default_cpu_cache_size"), "disk_cache_dir": ("-dcd", str, None),
    "disk_cache_size": ("-dcs", float, "default_disk_cache_size"),
    "recurrent_cache_size": ("-rcs", float, "default_recurrent_cache_size"),
    "draft_model_dir": ("-dm", str, None), "num_draft_tokens": ("-ndt", int, None), "ngram_match_min": ("-ngram", int, 0),
    "hybrid_draft_tokens": ("-hdt", int, 0), "ngram_corpus": ("-ngram_corpus", str, None), "sparse_draft_head": ("-sdh", int, 0),
    "draft_confidence": ("-dc", float, 0.4), "draft_moe_cpu_layers": ("-dmcl", int, 0),
}  # fmt: skip
SWITCHES = {
    "load_metrics": "-lm", "tensor_parallel": "-tp", "moe_cpu_pinned_arena": "-mcpa", "ngram_lock": "-ngl", "ngram_ram": "-ngr",
    "embed_disk": "-embd", "tp_moe_tensor_split": "-tp_moe_ts", "swa_full": "-swa_full", "load_verbose": "-lv",
    "autosplit_no_forward": "-asnf", "no_warmup": "-nw", "recurrent_state_fp32": "-rs32", "mtp": "-mtp", "dynamic_draft": "-dds",
}  # fmt: skip
model_init = types.ModuleType("exllamav3.model_init")


def add_args(
    parser, cache=True, default_cache_size=8192, default_recurrent_cache_size=4.0, default_cpu_cache_size=0.0,
    default_disk_cache_size=50.0, add_sampling_args=False, default_sampling_args=None, default_autosplit_max_batch_size=1,
    add_draft_model_args=False, default_chunk_size=4096,
):  # fmt: skip
    defaults = locals()
    assert cache and add_draft_model_args and not add_sampling_args, "not faked"
    for name, (short, kind, default) in VALUES.items():
        default = defaults.get(default, default)
        parser.add_argument(short, f"--{name}", type=kind, default=default, required=name == "model_dir")
    for name, short in SWITCHES.items():
        parser.add_argument(short, f"--{name}", action="store_true")


def init(
    args, load_tokenizer=True, quiet=False, progress=True, override_dynamic_seq_len=None, min_draft_len=None, **kwargs
):  # kwargs: Model.load's
    assert load_tokenizer and quiet and not progress, "the server's output is its own"
    config = Config(args.model_dir)
    note(config.directory, call="init", args=vars(args))
    model, cache = Model(config), Cache(None, args.cache_size)
    model.load(**kwargs)
    draft = Model(Config(args.draft_model_dir)) if args.draft_model_dir else None
    tokenizer = Tokenizer(config)
    return model, config, cache, tokenizer, draft, draft and draft.config, draft and Cache(None, args.cache_size)


model_init.add_args, model_init.init = add_args, init


# ── samplers: steps that change logits (vocabulary), given the sequence so far ──


class SS_LogitBias:
    def __init__(self, logit_bias):
        self.given = given(locals())
        self.logit_bias = logit_bias

    def run(self, logits, past, draw):
        for token, bias in self.logit_bias.items():
            logits[token] += bias


class SS_RepP:
    def __init__(self, rep_p=1.0, sustain_range=int(10e7), decay_range=0):
        self.given = given(locals())
        self.rep_p = rep_p

    def run(self, logits, past, draw):
        seen = past.unique()
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / self.rep_p, logits[seen] * self.rep_p)


class SS_PresFreqP:
    def __init__(self, pres_p=0.0, freq_p=0.0, sustain_range=int(10e7), decay_range=0):
        self.given = given(locals())
        self.sustain_range = sustain_range
        self.ranges = []  # what it was when it was used

    def run(self, logits, past, draw):
        self.ranges.append(self.sustain_range)
        tokens, counts = past[max(0, len(past) - self.sustain_range) :].unique(return_counts=True)
        logits[tokens] -= self.given["pres_p"] + self.given["freq_p"] * counts


class SS_Temperature:
    def __init__(self, temperature):
        self.given = given(locals())
        assert temperature > 0

    def run(self, logits, past, draw):
        logits /= self.given["temperature"]


class SS_MinP:
    def __init__(self, min_p):
        self.given = given(locals())
        assert 0.0 <= min_p <= 1.0

    def run(self, logits, past, draw):
        probs = logits.softmax(-1)
        logits[probs < self.given["min_p"] * probs.max()] = -torch.inf


class SS_TopK:
    def __init__(self, top_k):
        self.given = given(locals())
        assert isinstance(top_k, int)

    def run(self, logits, past, draw):
        if self.given["top_k"]:
            logits[logits < logits.topk(self.given["top_k"]).values[-1]] = -torch.inf


class SS_TopP:
    def __init__(self, top_p):
        self.given = given(locals())
        assert 0.0 <= top_p <= 1.0

    def run(self, logits, past, draw):
        probs, order = logits.softmax(-1).sort(descending=True)
        logits[order[probs.cumsum(-1) - probs >= self.given["top_p"]]] = -torch.inf


class SS_Sample:
    def __init__(self):
        self.given = {}

    def run(self, logits, past, draw):
        return torch.multinomial(logits.softmax(-1), 1, generator=torch.Generator().manual_seed(draw))


class SS_Argmax:
    def __init__(self):
        self.given = {}

    def run(self, logits, past, draw):
        return logits.argmax(-1, keepdim=True)


class CustomSampler:
    def __init__(self, steps):
        kinds = [type(step) for step in steps]
        first = [kind for kind in kinds if kind in (SS_LogitBias, SS_RepP, SS_PresFreqP)]
        assert kinds[: len(first)] == first and kinds[-1] in (SS_Sample, SS_Argmax)
        self.steps, self.given = steps, [{type(step).__name__: step.given} for step in steps]

    def forward(self, logits, sequence_ids=None, rand_u32=None, tokenizer=None, logit_mask=None, return_state=False):
        logits[..., tokenizer.actual_vocab_size :] = -torch.inf  # in place, as there: the probabilities are taken after it
        logits = logits[0, 0] + (0 if logit_mask is None else logit_mask)
        for step in self.steps:
            token = step.run(logits, sequence_ids[0], rand_u32)
        return token.reshape(1, 1)


class LLGuidanceFilter:
    def __init__(
        self, tokenizer, trigger_token=None, prefix_str=None, eos_after_completed=False, json_schema=None, regex=None,
        lark_grammar=None, gbnf_grammar=None, llg_grammar=None, consume_prefix=False,
    ):  # fmt: skip
        self.given = given(locals())
        assert eos_after_completed and lark_grammar is not None, "not faked"
        grammar = llguidance.grammar_from("lark", lark_grammar)
        if err := llguidance.LLMatcher.validate_grammar(grammar, tokenizer.grammars) or "refuse me" in lark_grammar:
            raise ValueError(f"Invalid grammar: {err}")
        self._matcher, self.size = llguidance.LLMatcher(tokenizer.grammars, grammar), tokenizer.config.vocab_size

    def mask(self):
        packed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        self._check_error()
        bits = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
        mask = torch.full((self.size,), -torch.inf)
        mask[: len(bits)][bits[: self.size]] = 0
        return mask

    def _check_error(self):
        if self._matcher.is_error():
            raise RuntimeError(f"llguidance matcher error: {self._matcher.get_error()}")

    def feed(self, token):
        self._matcher.consume_token(token)
        self._check_error()
        return self._matcher.is_stopped()


# ── jobs ──


class Job:
    def __init__(
        self, input_ids, max_new_tokens=None, min_new_tokens=0, max_skips=4, sampler=None, seed=None, stop_conditions=None,
        decode_special_tokens=False, return_top_tokens=0, return_logits=False, return_probs=False, filters=None,
        token_healing=False, identifier=None, banned_strings=None, embeddings=None, max_rq_tokens=None, stop_on_loop=None,
        rq_state=None,
    ):  # fmt: skip
        if rq_state is None:
            self.given = given(locals())
        unused = (return_logits, token_healing, banned_strings, embeddings, stop_on_loop)
        assert not any(unused) and sampler and decode_special_tokens, "not faked"
        assert input_ids.device.type == "cpu" and input_ids.dtype == torch.long
        assert input_ids.shape[0] == 1 and input_ids.shape[-1] > 0, "Input IDs cannot be empty."
        assert max_new_tokens is None or max_new_tokens >= 1, "max_new_tokens must be >= 1, or None for no limit"
        state = rq_state or {}
        self.rq_new_tokens = state.get("rq_new_tokens", 0)
        self.held = state.get("held") or empty(return_top_tokens)
        self.rng = state.get("rng") or random.Random(seed)
        self.stop_tokens = state.get("stop_tokens") or set(stop_conditions or ())
        assert all(type(token) is int for token in self.stop_tokens), "Unsupported type in stop_conditions"
        self.input_ids = self.sequence_ids = input_ids
        self.max_new_tokens, self.min_new_tokens, self.new_tokens = max_new_tokens, min_new_tokens, 0
        self.sampler, self.filters, self.identifier = sampler, filters or [], identifier
        self.return_probs, self.return_top_tokens = return_probs, return_top_tokens
        self.orig_max_rq_tokens = self.max_rq_tokens = max_rq_tokens
        self.cached_pages = self.cached_tokens = self.kv_position = 0

    def prepare_for_queue(self, generator, serial_number, rq=False):
        self.generator, self.serial_number = generator, serial_number
        total, ahead, size = generator.max_total_tokens, generator.max_draft_tokens, self.input_ids.shape[-1]
        room = total - size - 1 - ahead
        self.max_new_tokens = max(1, room) if self.max_new_tokens is None else self.max_new_tokens
        self.max_new_tokens = min(self.max_new_tokens, room) if room >= 1 else self.max_new_tokens
        assert self.max_rq_tokens, "not faked"
        aligned = -(-(size - 1 + self.max_rq_tokens) // PAGE_SIZE) * PAGE_SIZE
        self.max_rq_tokens = max(1, min(aligned, total - ahead) - size)
        pages, most = -(-(size + self.max_rq_tokens + ahead) // PAGE_SIZE), total // PAGE_SIZE
        assert pages <= most, (
            f"Job requires {pages} pages (only {most} available) and cannot be enqueued. "
            f"Total cache allocated is {most} * {PAGE_SIZE} = {total} tokens"
        )
        if not rq:
            text = generator.tokenizer.tokenizer.decode(self.input_ids[0].tolist(), skip_special_tokens=False)
            self.verb, _, words = text.rpartition("<|user|>")[2].partition("<|assistant|>")[0].partition(" ")
            ids = generator.tokenizer.tokenizer.encode(words).ids
            self.words, self.script = words, ids[:-1] if self.verb == "half" else ids

    def result(self, stage, **more):
        own = {"job": self, "stage": stage, "eos": False, "serial": self.serial_number, "identifier": self.identifier}
        return own | more

    def is_prefill_done(self):
        return self.kv_position == self.sequence_ids.shape[-1] - 1

    def prefill(self, results):
        if self.is_prefill_done():
            return
        last = self.sequence_ids.shape[-1] - 1
        if not self.kv_position:
            ids = self.sequence_ids[0].tolist()
            common = max((same(ids[:last], other) for other in self.generator.known), default=0)
            self.cached_pages, rest = divmod(common, PAGE_SIZE)
            self.cached_tokens = rest if rest > 1 else 0
            self.kv_position = self.cached_pages * PAGE_SIZE + self.cached_tokens
        chunk = (self.kv_position + self.generator.max_chunk_size) // PAGE_SIZE * PAGE_SIZE
        self.kv_position = min(chunk, last)
        results.append(self.result("prefill", curr_progress=self.kv_position, max_progress=last))

    def next_logits(self):
        """(1, 1, vocabulary)"""
        at = self.rq_new_tokens + self.new_tokens
        token = self.script[at] if at < len(self.script) else self.generator.eos
        if self.verb in ("forever", "fail", "raise"):
            token = self.generator.tokenizer.tokenizer.token_to_id("x")
        size = self.generator.tokenizer.config.vocab_size
        logits = -torch.arange(size) / 100 - (200 if self.verb == "sharp" else 0)
        if self.verb == "dice":
            logits = torch.zeros(size)
        else:
            logits[token] = 20
        if self.new_tokens < self.min_new_tokens:
            logits[list(self.stop_tokens)] = -torch.inf
        return logits.reshape(1, 1, size)

    def receive_logits(self, logits):
        mask = sum(one.mask() for one in self.filters) if self.filters else None
        draw = self.rng.randint(0, (1 << 32) - 1)
        token = self.sampler.forward(logits, self.sequence_ids, draw, self.generator.tokenizer, logit_mask=mask)
        probs = torch.softmax(logits.float(), dim=-1)
        best = probs.sort(dim=-1, descending=True)
        k = self.return_top_tokens
        prob = torch.gather(probs.squeeze(0), dim=1, index=token)
        return {
            "token_ids": token,
            "token_probs": prob,
            "top_k_tokens": best.indices[:, :, :k],
            "top_k_probs": best.values[:, :, :k],
        }

    def receive_sample(self, sampled, results):
        """Returns (whether it has ended, whether it is to be queued again)."""
        token = int(sampled["token_ids"])
        complete = [one.feed(token) for one in self.filters]
        self.new_tokens += 1
        self.kv_position += 1
        self.sequence_ids = torch.cat((self.sequence_ids, sampled["token_ids"]), dim=1)
        requeue = self.new_tokens > self.max_rq_tokens
        self.held = {name: torch.cat((self.held[name], sampled[name]), dim=1) for name in self.held}
        total, held_ids = self.rq_new_tokens + self.new_tokens, self.held["token_ids"][0].tolist()

        def emit(reason=None, held=False, **more):
            result = self.result("streaming", eos=reason is not None)
            if reason:
                result |= {"eos_reason": reason, "new_tokens": total, "full_completion": "…"} | more
            elif requeue:
                result["requeue"] = True
            shown = {name: value for name, value in self.held.items() if self.wanted(name)}
            if held:
                result |= shown | {"text": "…"}
                self.held = empty(self.return_top_tokens)
            elif reason:
                result["held"] = shown | {"text": "…"}
            results.append(result)
            return reason is not None, requeue and not reason

        if token in self.stop_tokens:
            return emit("stop_token", eos_triggering_token_id=token, eos_triggering_token_str="<|eos|>")
        if self.new_tokens >= self.max_new_tokens:
            return emit("max_new_tokens", held=True)
        if any(complete):
            return emit("end_filter", held=True)
        if self.generator.tokenizer.tokenizer.decode(held_ids).endswith("\ufffd") and len(held_ids) < 20:
            return emit()
        if self.verb == "loop" and total == len(self.script):
            return emit("loop_detected", held=True)
        return emit(held=True)

    def wanted(self, name):
        return name == "token_ids" or (self.return_probs if name == "token_probs" else self.return_top_tokens > 0)

    def prepare_for_requeue(self):
        done = self.sequence_ids.shape[-1] - self.input_ids.shape[-1]
        state = {
            "rng": self.rng, "held": self.held, "stop_tokens": self.stop_tokens,
            "rq_new_tokens": self.rq_new_tokens + self.new_tokens,
        }  # fmt: skip
        self.__init__(
            self.sequence_ids, max_new_tokens=self.max_new_tokens - done, min_new_tokens=max(self.min_new_tokens - done, 0),
            sampler=self.sampler, decode_special_tokens=True, return_top_tokens=self.return_top_tokens,
            return_probs=self.return_probs, filters=self.filters, identifier=self.identifier,
            max_rq_tokens=self.orig_max_rq_tokens, rq_state=state,
        )  # fmt: skip
        self.prepare_for_queue(self.generator, self.serial_number, rq=True)


def empty(k):
    """What is held: ids and probabilities (1, n), alternatives (1, n, k)."""
    ids, probs = torch.empty((1, 0), dtype=torch.long), torch.empty((1, 0))
    return {
        "token_ids": ids, "token_probs": probs,
        "top_k_tokens": ids.reshape(1, 0, 1).expand(1, 0, k), "top_k_probs": probs.reshape(1, 0, 1).expand(1, 0, k),
    }  # fmt: skip


def same(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Generator:
    def __init__(
        self, model, cache, tokenizer, max_batch_size=256, max_chunk_size=2048, shared_chunk_size=None, prefill_cooldown=4,
        max_q_size=8, draft_model=None, draft_cache=None, num_draft_tokens=None, show_visualizer=False, enable_defrag=True,
        cpu_cache_size=0, disk_cache_dir=None, disk_cache_size=50 * 1024**3, disk_cache_flush_on_idle=True,
        disk_cache_checkpoint_interval=4096, disk_cache_write_interval=2.0, recurrent_cache_size=4 * 1024**3,
        recurrent_checkpoint_interval=None, recurrent_checkpoint_interval_pp=32768, ngram_match_min=0,
        dynamic_draft_tokens=False, draft_confidence=0.4, record_draft_stats=False, ngram_corpus=None, hybrid_draft_tokens=0,
        draft_max_rows=0, sparse_draft_head=0,
    ):  # fmt: skip
        self.given = given(locals())
        assert model.loaded and isinstance(max_batch_size, int) and isinstance(cpu_cache_size, int)
        if disk_cache_dir and not cpu_cache_size:
            raise ValueError("disk_cache_dir needs a CPU page cache tier to write through from (cpu_cache_size > 0)")
        assert (draft_model is None) == (draft_cache is None)
        drafts = (num_draft_tokens or 4) if draft_model or ngram_match_min else 0
        self.max_draft_tokens = max(drafts, hybrid_draft_tokens)
        self.tokenizer, self.max_batch_size, self.max_chunk_size = tokenizer, max_batch_size, max_chunk_size
        self.max_total_tokens, self.eos = cache.max_num_tokens, tokenizer.config.eos_token_id_list[0]
        self.folder, self.serial, self.closed, self.thread = model.config.directory, 0, False, threading.get_ident()
        self.pending_jobs, self.active_jobs, self.jobs = [], [], []
        self.known = []  # sequences whose pages are in the cache
        note(self.folder, call="generator", max_batch_size=max_batch_size, max_draft_tokens=self.max_draft_tokens)

    def check(self):
        assert not self.closed and threading.get_ident() == self.thread, "one thread, until close()"

    def enqueue(self, job):
        self.check()
        job.prepare_for_queue(self, self.serial)
        self.serial += 1
        self.pending_jobs.append(job)
        self.jobs.append(job)
        filters = [one.given["lark_grammar"] for one in job.filters]
        note(self.folder, call="enqueue", **job.given | {"input_ids": None, "filters": filters, "sampler": job.sampler.given})
        return job.serial_number

    def cancel(self, job):
        self.check()
        live = job in self.pending_jobs or job in self.active_jobs
        note(self.folder, call="cancel", identifier=job.identifier, live=live, tokens=job.rq_new_tokens + job.new_tokens)
        for queue in (self.pending_jobs, self.active_jobs):
            if job in queue:
                queue.remove(job)
        self.keep(job)

    def keep(self, job):
        self.known = [*self.known[-20:], job.sequence_ids[0, : job.kv_position].tolist()]

    def iterate(self):
        self.check()
        results = []
        while self.pending_jobs and len(self.active_jobs) < self.max_batch_size:
            self.active_jobs.append(self.pending_jobs.pop(0))
            results.append(self.active_jobs[-1].result("started"))
        for job in list(self.active_jobs):
            try:
                job.prefill(results)
                if job.verb == "fail" and job.rq_new_tokens + job.new_tokens >= int(job.words):
                    raise RuntimeError("a page of context\nthe script fails")
            except RuntimeError as error:
                self.active_jobs.remove(job)
                results.append({"job": job, "serial": job.serial_number, "stage": "error", "eos": True, "error": error})
        for job in [job for job in self.active_jobs if job.is_prefill_done()]:
            self.decode(job, results)
        return results

    def decode(self, job, results):
        """A token and those that were drafted behind it, each with a result of its own."""
        for _ in range(1 + self.max_draft_tokens):
            if job.verb == "raise" and job.new_tokens == 2:
                raise RuntimeError("CUDA error: the script raises")
            if job.verb == "forever":
                time.sleep(0.001)
            ended, requeue = job.receive_sample(job.receive_logits(job.next_logits()), results)
            if ended or requeue:
                self.active_jobs.remove(job)
                self.keep(job)
                break
        if requeue:
            job.prepare_for_requeue()
            self.pending_jobs.insert(0, job)

    def clear_queue(self):
        self.check()
        self.pending_jobs, self.active_jobs = [], []

    def close(self):
        self.closed = True
        note(self.folder, call="close")
