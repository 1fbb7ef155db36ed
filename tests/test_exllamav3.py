"""The exllamav3 binding without a GPU: its calls against the wheel's source, its behaviour over tests/fake_exllamav3.py."""

import argparse
import ast
import importlib.machinery
import importlib.util
import json
import multiprocessing
import shutil
import socket
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ROOT, serve_one, sse, until

import backends
import openai_api_endpoint as endpoint
from backends import ExLlamaV3, lacks_cuda, lark_grammar, missing_library
from catalog import UsageError, choose_backend, find_model
from engine import Delta, EngineFailed, EngineLoop, EngineSpec, Prompt, Refused, Sampling, Started, Tokens, backend_class
from engine_handle import Engine

PINNED = ExLlamaV3.INSTALL.split()[-1]
LACK = missing_library("transformers")  # the fake needs torch and llguidance
needs_torch = pytest.mark.skipif(bool(LACK), reason=f"the stand-in for exllamav3: {LACK}")
EOS = 257
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}}
LONG = "echo " + "All work and no play makes Jack a dull boy. " * 20


# ── what the binding uses is in the wheel: read, not imported, since an import would compile CUDA ──


class Wheel:
    """The sources of exllamav3; `classes` and `functions` are those that we call."""

    def __init__(self, path):
        self.zip = zipfile.ZipFile(path)
        files = ["generator/generator", "generator/job", "generator/filter/llguidance", "generator/sampler/custom"]
        trees = {name: self.tree(f"{name}.py") for name in [*files, "model/config", "model/model", "model_init"]}
        nodes = [node for tree in trees.values() for node in tree.body]
        self.classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
        self.functions = {node.name: node for node in trees["model_init"].body if isinstance(node, ast.FunctionDef)}

    def text(self, name):
        return self.zip.read(f"exllamav3/{name}").decode()

    def tree(self, name):
        return ast.parse(self.text(name))

    def method(self, name):
        """Of "Class.method", or of a function of model_init."""
        owner, _, method = name.rpartition(".")
        return functions(self.classes[owner])[method] if owner else self.functions[name]

    def names(self):
        """What `exllamav3` itself has."""
        own = {name for name in imported(self.tree("__init__.py")) if name != "*"}
        return own | set(imported(self.tree("generator/sampler/__init__.py")))

    def flags(self):
        """model_init's, but for those of sampling: (option strings, keywords)."""
        body = self.functions["add_args"].body
        body = [node for node in body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "add_sampling_args")]
        calls = [c for node in body for c in ast.walk(node) if isinstance(c, ast.Call)]
        return [
            ([a.value for a in call.args], {k.arg: ast.unparse(k.value) for k in call.keywords})
            for call in calls
            if ast.unparse(call.func) == "parser.add_argument"
        ]


@pytest.fixture(scope="session")
def wheel(request):
    folder = request.config.cache.mkdir("exllamav3")
    name = f"{PINNED.replace('==', '-')}-*.whl"
    if not any(folder.glob(name)):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PINNED]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            pytest.skip(f"pip took too long to fetch {PINNED}")
        if done.returncode:
            pytest.skip(f"{PINNED} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    return Wheel(next(folder.glob(name)))


def imported(tree):
    return [alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]


def functions(node):
    return {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}


def signature(node):
    """Name of each argument but self → its default, as source; None: it has none."""
    args = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(args) - len(node.args.defaults)) + [ast.unparse(one) for one in node.args.defaults]
    own = dict(zip([arg.arg for arg in args], defaults, strict=True))
    own |= {arg.arg: one and ast.unparse(one) for arg, one in zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)}
    own.pop("self", None)
    return own


def members(node):
    """Methods of a class, and what is assigned to self anywhere in it."""
    found = {child.name for child in node.body if isinstance(child, ast.FunctionDef)}
    for child in ast.walk(node):
        if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store) and ast.unparse(child.value) == "self":
            found.add(child.attr)
    return found


def strings(node):
    return {child.value for child in ast.walk(node) if isinstance(child, ast.Constant) and isinstance(child.value, str)}


@pytest.fixture(scope="session")
def binding():
    """The class ExLlamaV3, as source."""
    tree = ast.parse((ROOT / "backends.py").read_text(encoding="utf-8"))
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ExLlamaV3")


def calls(binding):
    """Its calls into the library: (name in the library, how many positional arguments, keywords)."""
    for node in ast.walk(binding):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            if owner in ("self.lib", "lib", "model_init"):
                yield node.func.attr, len(node.args), {keyword.arg for keyword in node.keywords}


def attributes(binding, *owners):
    """What it reads of, or sets in, these expressions."""
    return {n.attr for n in ast.walk(binding) if isinstance(n, ast.Attribute) and ast.unparse(n.value) in owners}


def test_version(wheel):
    assert ast.literal_eval(wheel.tree("version.py").body[0].value) == PINNED.partition("==")[2] == "1.6.5"
    assert "PAGE_SIZE = 256" in wheel.text("constants.py") and ExLlamaV3.PAGE == 256


def test_every_argument_is_known_to_the_wheel(wheel, binding):
    used = set()
    for name, positional, keywords in calls(binding):
        made = wheel.functions.get(name)
        if made is None:
            assert name in wheel.names(), name
            own = functions(wheel.classes[name])
            made = own.get("__init__") or ast.parse("def __init__(self): pass").body[0]
        takes = signature(made)
        more = signature(wheel.method("Model.load_gen")) if name == "init" else {}  # init hands its **kwargs to Model.load
        assert keywords <= {*takes, *more}, name
        assert positional <= len(takes) and not keywords & set([*takes][:positional]), name
        assert {arg for arg, default in takes.items() if default is None} <= {*[*takes][:positional], *keywords}, name
        used.add(name)
    assert used >= {"Generator", "Job", "LLGuidanceFilter", "CustomSampler", "SS_PresFreqP", "SS_Argmax", "init", "add_args"}


def test_positional_arguments_mean_what_we_take_them_for(wheel):
    first = {
        "SS_LogitBias": ["logit_bias"], "SS_RepP": ["rep_p"], "SS_PresFreqP": ["pres_p", "freq_p"], "SS_MinP": ["min_p"],
        "SS_Temperature": ["temperature"], "SS_TopK": ["top_k"], "SS_TopP": ["top_p"], "CustomSampler": ["steps"],
        "LLGuidanceFilter": ["tokenizer"],
    }  # fmt: skip
    for name, names in first.items():
        assert [*signature(wheel.method(f"{name}.__init__"))][: len(names)] == names
    assert [*signature(wheel.method("init"))][:1] == ["args"] and [*signature(wheel.method("add_args"))][:1] == ["parser"]


def test_every_attribute_is_known_to_the_wheel(wheel, binding):
    owners = {
        "Generator": ("generator", "self.generator"), "Job": ("job", "row.job"), "Config": ("config",),
        "Model": ("self.model",), "SS_PresFreqP": ("row.penalty",),
    }  # fmt: skip
    used = {name: attributes(binding, *expressions) for name, expressions in owners.items()}
    used["Job"] |= {"identifier"}  # result["job"].identifier
    for name, attrs in used.items():
        assert attrs and attrs <= members(wheel.classes[name]), name
    assert used["Generator"] >= {"max_draft_tokens", "enqueue", "iterate", "cancel", "clear_queue", "close"}
    assert used["Job"] >= {"new_tokens", "rq_new_tokens", "cached_pages", "cached_tokens", "identifier"}
    dests = {options[-1].lstrip("-") for options, _ in wheel.flags()}
    assert attributes(binding, "args") <= dests


def test_penalties_are_read_when_they_are_used(wheel):
    """We change sustain_range between two tokens."""
    run = ast.unparse(wheel.method("SS_PresFreqP.run"))
    assert run.count("self.sustain_range") == 2
    requeue = ast.unparse(wheel.method("Job.prepare_for_requeue"))
    assert "'rq_new_tokens': self.rq_new_tokens + self.new_tokens" in requeue and "rq_job = self" in requeue


def test_result_keys(wheel, binding):
    """Every key that we look up is one that job.py or the generator puts into a result."""
    read = {node for name in ("read", "scores_of") for node in ast.walk(functions(binding)[name])}
    looked = {n.slice.value for n in read if isinstance(n, ast.Subscript) and isinstance(n.slice, ast.Constant)} - {0}
    looked |= {n.left.value for n in read if isinstance(n, ast.Compare) and isinstance(n.left, ast.Constant)}
    looked |= {n.args[0].value for n in read if isinstance(n, ast.Call) and ast.unparse(n.func).endswith(".get") and strings(n)}
    job, failed = strings(wheel.method("Job.receive_sample")), strings(wheel.method("Generator.reap_failed_job"))
    assert looked >= {"stage", "eos", "eos_reason", "held", "token_ids", "token_probs", "top_k_tokens", "top_k_probs", "error"}
    assert looked - {"error"} <= job and {"job", "stage", "eos", "error"} <= failed
    assert "identifier" not in failed  # so it is read from the job


def test_how_a_job_ends(wheel):
    """reason → whether what was held is given back as if it had been streamed; else it is in `held`."""
    ends = {}
    for node in ast.walk(wheel.method("Job.receive_sample")):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "emit":
            keywords = {
                keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords if keyword.arg.startswith("e")
            }
            if keywords.get("emit_eos"):
                ends[keywords["eos_reason"]] = keywords.get("emit_held", False)
    given_back = ("max_new_tokens", "end_filter", "stop_string", "loop_detected")
    assert ends == {"stop_token": False} | dict.fromkeys(given_back, True)


def test_what_stands_in_for_it_has_the_same_signatures(wheel):
    fake = {
        node.name: node for node in ast.parse((ROOT / "tests" / "fake_exllamav3.py").read_text()).body if hasattr(node, "name")
    }
    for name in ("Generator", "Job", "LLGuidanceFilter", "CustomSampler", *(one for one in fake if one.startswith("SS_"))):
        assert name in wheel.names()
        own = functions(wheel.classes[name])
        real = signature(own["__init__"]) if "__init__" in own else {}
        assert signature(functions(fake[name])["__init__"]) == real, name
    for name in ("add_args", "init"):
        assert signature(fake[name]) == signature(wheel.method(name)), name
    for name in ("Generator.enqueue", "Generator.iterate", "Generator.cancel", "Generator.clear_queue", "Generator.close"):
        owner, _, method = name.partition(".")
        assert signature(functions(fake[owner])[method]) == signature(wheel.method(name)), name


@needs_torch
def test_what_stands_in_for_it_has_the_same_flags(wheel):
    import fake_exllamav3 as fake

    values = {name: (short, kind.__name__, repr(default)) for name, (short, kind, default) in fake.VALUES.items()}
    switches = dict(fake.SWITCHES)
    for options, keywords in wheel.flags():
        short, name = options[0], options[1].removeprefix("--")
        if keywords.get("action") == "'store_true'":
            assert switches.pop(name) == short
        else:
            assert values.pop(name) == (short, keywords["type"], repr(literal(keywords.get("default", "None"))))
    assert not values and not switches


def literal(source):
    """A name stands for itself."""
    try:
        return ast.literal_eval(source)
    except ValueError:
        return source


# ── the flags of its model_init, on our command line ──


def own_parser(wheel):
    """exllamav3's, rebuilt from its source."""
    parser, kinds = argparse.ArgumentParser(exit_on_error=False), {"str": str, "int": int, "float": float}
    for options, keywords in wheel.flags():
        more = {"action": "store_true"} if "action" in keywords else {"type": kinds[keywords["type"]]}
        parser.add_argument(*options, **more)
    return parser


OURS = {"cache_size": "4096", "draft_model_dir": "x", "num_draft_tokens": "3", "ngram_match_min": "3"}


def test_every_flag_of_its_model_init_is_ours_too(wheel):
    real, kinds = own_parser(wheel), {"str": "x,y", "int": "3", "float": "0.5"}
    assert len(wheel.flags()) > 40
    for options, keywords in wheel.flags():
        name = options[1].removeprefix("--")
        value = [] if "action" in keywords else [OURS.get(name) or kinds[keywords["type"]]]
        for option in [*options, f"--{name.replace('_', '-')}"]:
            if name == "model_dir":
                continue
            args = endpoint.parse_args(["-m", "a", option, *value, "--port", "7"])
            assert (args.model_dir, args.port) == ("a", 7)
            if name in OURS:
                assert str(getattr(args, name)) == value[0] and not args.exllamav3
                continue
            read = real.parse_args(["-m", "a", *args.exllamav3])
            found = getattr(read, name)
            assert found is True if not value else str(found) == value[0], option


def test_flags_are_kept_in_their_order(wheel):
    args = endpoint.parse_args(["-m", "a", "--tp-backend=nccl", "-tp", "--gpu_split", "10,20", "-nw", "-cca", "-0.5"])
    assert args.exllamav3 == ["--tp_backend", "nccl", "-tp", "--gpu_split", "10,20", "-nw", "-cca", "-0.5"]
    read = own_parser(wheel).parse_args(["-m", "a", *args.exllamav3])
    assert (read.tp_backend, read.tensor_parallel, read.gpu_split, read.no_warmup) == ("nccl", True, "10,20", True)
    assert read.cache_compand_a == -0.5


# ── the binding over a stand-in, in this process ──


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    if LACK:
        pytest.skip(LACK)
    import tiny_llama

    return tiny_llama.make(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture
def folder(tiny, tmp_path):
    """A model folder of a test's own."""
    return shutil.copytree(tiny, tmp_path / "tiny-llama")


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def log(folder, call):
    path = folder / "log"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["call"] == call]


class Loop:
    """The engine's loop over a backend of this process."""

    def __init__(self, backend):
        self.backend, self.generator = backend, backend.generator
        self.loop = EngineLoop(multiprocessing.Pipe()[0], backend)
        self.jobs = 0

    def submit(self, text, **sampling):
        self.jobs += 1
        sampling = {"temperature": 0.7, "max_tokens": 100} | sampling
        self.loop.submit(self.jobs, [Prompt(text=text)], Sampling(**sampling), "")
        return self.jobs

    def run(self, *jobs):
        """Until these have ended: what became of each."""
        for _ in range(6000):
            if all(self.events(job, Exception) or [e for e in self.events(job, Delta) if e.finish] for job in jobs):
                return [self.outcome(job) for job in jobs]
            self.loop.admit()
            self.loop.step()
        raise AssertionError("it never ended")

    def events(self, job, kind):
        return [event for number, event in self.loop.out if number == job and isinstance(event, kind)]

    def outcome(self, job):
        deltas, started = self.events(job, Delta), self.events(job, Started)
        return SimpleNamespace(
            text="".join(d.text for d in deltas),
            tokens=sum(d.tokens for d in deltas),
            finish=deltas[-1].finish if deltas else None,
            logprobs=[one for d in deltas for one in d.logprobs],
            cached=sum(s.cached_tokens or 0 for s in started),
            started=started,
            error=next(iter(self.events(job, Exception)), None),
        )

    def ask(self, text, **sampling):
        (done,) = self.run(self.submit(text, **sampling))
        if done.error:
            raise done.error
        return done

    def given(self, text="echo a", **sampling):
        """What the job of a completion was made with."""
        self.ask(text, **sampling)
        return self.generator.jobs[-1].given

    def steps(self, **sampling):
        """The steps of its sampler: (name, what it was made with)."""
        return [pair for step in self.given(**sampling)["sampler"].given for pair in step.items()]


@pytest.fixture
def load(folder, monkeypatch):
    """Loads the binding over the stand-in in this process."""
    import fake_exllamav3 as fake

    fake.install(monkeypatch)
    monkeypatch.setattr(fake.time, "sleep", lambda seconds: None)

    def load(slots=4, cache=4096, **spec):
        fractions = []
        backend = ExLlamaV3(EngineSpec("exllamav3", str(folder), slots, 1, cache, **spec), fractions.append)
        backend.fractions = fractions
        return Loop(backend)

    return load


@pytest.fixture
def loop(load):
    return load()


def test_loading(load, folder):
    loop = load(slots=3, cache=1000, options=("-cq", "4", "-chunk_size", "512", "-dcs", "1.5", "-mcl", "2"))
    backend = loop.backend
    assert backend.fractions == [0.0, 0.0, 0.5, 1.0]
    assert (backend.cache_tokens, backend.context, backend.slots) == (1024, 1023, 3)  # whole pages; it wants one token of room
    assert (backend.eos, backend.bos, backend.vocabulary) == (frozenset([EOS]), 256, 384)
    assert backend.library.startswith("exllamav3 1.6.5, torch ")
    (init,) = log(folder, "init")
    args = init["args"]
    assert (args["model_dir"], args["cache_quant"], args["chunk_size"], args["cache_size"]) == (str(folder), "4", 512, 1024)
    assert (args["moe_cpu_offload"], args["autosplit_max_batch_size"], args["draft_model_dir"]) == (2, 3, None)
    given = loop.generator.given
    assert (given["max_batch_size"], given["max_chunk_size"], given["disk_cache_size"]) == (3, 512, 3 << 29)
    assert (given["cpu_cache_size"], given["recurrent_cache_size"], given["draft_model"]) == (0, 4 << 30, None)
    assert given["tokenizer"] is backend.tokenizer and given["cache"].max_num_tokens == 1024


def test_the_model_may_have_less_context_than_the_cache(load, folder):
    configure(folder, max_position_embeddings=600)
    assert load(cache=4096).backend.context == 600


def test_default_cache(load, folder):
    assert load(slots=2, cache=None).backend.cache_tokens == 2 * 4096
    configure(folder, num_hidden_layers=1 << 12)  # 2 MB of KV cache per token, 8 GB free: half of them
    tokens = load(slots=2, cache=None).backend.cache_tokens
    assert tokens % 256 == 0 and 0.49 * (8 << 30) <= tokens * (1 << 21) <= 0.52 * (8 << 30)


@pytest.mark.parametrize(
    ("spec", "given", "most"),
    [
        ({"draft": "self", "draft_tokens": 2}, {"num_draft_tokens": 2, "ngram_match_min": 0}, 2),
        ({"draft": "self"}, {"num_draft_tokens": None}, 4),
        ({"ngram": 3, "draft_tokens": 5}, {"ngram_match_min": 3, "num_draft_tokens": 5, "draft_model": None}, 5),
        ({"options": ("-hdt", "6", "-dds", "-dc", "0.5")}, {"hybrid_draft_tokens": 6, "dynamic_draft_tokens": True, "draft_confidence": 0.5}, 6),
    ],
)  # fmt: skip
def test_drafts(load, folder, spec, given, most):
    """They arrive, and several tokens of a step are taken in their order, up to the end and not past it."""
    spec = {name: str(folder) if value == "self" else value for name, value in spec.items()}
    loop = load(**spec)
    assert {name: loop.generator.given[name] for name in given} == given
    assert (loop.generator.given["draft_model"] is not None) == ("draft" in spec)
    assert loop.backend.context == 4096 - 1 - most
    assert loop.ask("echo Hello, wörld").text == "Hello, wörld"
    done = loop.ask("forever", max_tokens=11)
    assert (done.text, done.tokens, done.finish) == ("x" * 11, 11, "length")
    room = loop.backend.context - len("forever")
    assert loop.ask("forever", max_tokens=room).tokens == room


def test_an_answer(loop, folder):
    done = loop.ask("echo héllo")
    assert (done.text, done.tokens, done.finish) == ("héllo", 7, "stop")  # EOS counts, and is not shown
    assert len(done.started) == 2 and done.cached == 0
    done = loop.ask("echo héllo", max_tokens=3)
    assert (done.text, done.tokens, done.finish) == ("hé", 3, "length")
    assert not loop.backend.rows and not any(line["live"] for line in log(folder, "cancel"))


def test_what_a_job_is_given(loop):
    given = loop.given("echo abc", seed=7, max_tokens=50, min_tokens=2)
    assert given["input_ids"].tolist() == [loop.backend.tokenize("echo abc", False)]
    own = {name: given[name] for name in ("seed", "max_new_tokens", "min_new_tokens", "stop_conditions", "max_rq_tokens")}
    assert own == {"seed": 7, "max_new_tokens": 50, "min_new_tokens": 2, "stop_conditions": [EOS], "max_rq_tokens": 2048}
    assert (given["return_probs"], given["return_top_tokens"], given["filters"]) == (False, 0, None)
    assert given["decode_special_tokens"] is True
    given = loop.given(logprobs=3)
    assert (given["return_probs"], given["return_top_tokens"]) == (True, 3)
    assert isinstance(loop.given()["seed"], int)  # drawn by the loop, so that a record of it runs again


def test_min_tokens(loop):
    assert loop.ask("echo ab", min_tokens=0).tokens == 3
    done = loop.ask("echo ab", min_tokens=9)
    assert (done.tokens, done.finish) == (10, "stop") and done.text.startswith("ab")


def test_ignore_eos(loop):
    done = loop.ask("echo ab", ignore_eos=True, max_tokens=9)
    assert (done.text, done.tokens, done.finish) == ("ab", 9, "length")
    assert loop.generator.jobs[-1].given["stop_conditions"] == []


def test_stop_token_id_and_stop_string_end_the_job(loop, folder):
    done = loop.ask("echo one two three", stop=("two",))
    assert (done.text, done.finish) == ("one ", "cut")
    done = loop.ask("forever", stop_token_ids=(loop.backend.tokenize("x", False)[0],))
    assert (done.text, done.tokens) == ("", 1)
    assert [line["live"] for line in log(folder, "cancel")] == [True, True] and not loop.generator.active_jobs


def test_a_stop_token_brings_what_was_held(loop):
    """Half a character is held; what ends the job comes with it, in `held` alone."""
    done = loop.ask("half né", logprobs=0)
    assert (done.text, done.tokens, done.finish) == ("n\ufffd", 3, "stop")
    assert [one.data for one in done.logprobs] == [b"n", b"\xc3", b"<|eos|>"] and not done.logprobs[-1].shown
    done = loop.ask("half né", max_tokens=2)
    assert (done.text, done.tokens, done.finish) == ("n\ufffd", 2, "length")


def test_logprobs(loop):
    done = loop.ask("echo ab", logprobs=2)
    assert [one.data for one in done.logprobs] == [b"a", b"b", b"<|eos|>"]
    assert all(-0.001 < one.logprob <= 0 and len(one.top) == 2 and one.top[0][0] == one.data for one in done.logprobs)
    assert all(-25 < one.top[1][1] < -15 for one in done.logprobs)
    assert not loop.ask("echo ab").logprobs
    assert [one.top for one in loop.ask("echo ab", logprobs=0).logprobs] == [()] * 3


def test_a_probability_of_zero_has_a_logarithm(loop):
    a = loop.backend.tokenize("a", False)[0]
    done = loop.ask("sharp ab", logprobs=3, max_tokens=1, temperature=0, logit_bias=((a, -100),))
    (one,) = done.logprobs
    assert one.data != b"a" and one.logprob < -80  # of the raw logits, which knew of no ban
    assert one.top[0][:1] == (b"a",) and all(-100 < logprob < -80 for _, logprob in one.top[1:])


def test_greedy(loop):
    assert loop.steps(temperature=0) == [("SS_Argmax", {})]


def test_sampling(loop):
    steps = loop.steps(temperature=0.5, top_k=7, top_p=0.8, min_p=0.1)
    made = {
        "SS_Temperature": {"temperature": 0.5},
        "SS_MinP": {"min_p": 0.1},
        "SS_TopK": {"top_k": 7},
        "SS_TopP": {"top_p": 0.8},
    }
    assert steps == [*made.items(), ("SS_Sample", {})]
    made = {
        "SS_Temperature": {"temperature": 0.5},
        "SS_MinP": {"min_p": 0.0},
        "SS_TopK": {"top_k": 0},
        "SS_TopP": {"top_p": 1.0},
    }
    assert loop.steps(temperature=0.5) == [*made.items(), ("SS_Sample", {})]


def test_a_seed_decides(loop):
    texts = [loop.ask("dice", seed=seed, temperature=1, max_tokens=20, ignore_eos=True).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_repetition_penalty(loop):
    steps = loop.steps(temperature=0, repetition_penalty=1.5)
    assert [name for name, _ in steps] == ["SS_RepP", "SS_Argmax"] and steps[0][1]["rep_p"] == 1.5


@pytest.mark.parametrize("penalties", [{"presence_penalty": 0.5}, {"frequency_penalty": 0.25, "presence_penalty": -1.0}])
def test_penalties_count_the_completion_alone(loop, penalties):
    steps = loop.steps(text="echo aaaa", temperature=0, **penalties)
    assert [name for name, _ in steps] == ["SS_PresFreqP", "SS_Argmax"]
    assert steps[0][1]["pres_p"] == penalties["presence_penalty"]
    assert steps[0][1]["freq_p"] == penalties.get("frequency_penalty", 0)
    assert loop.generator.jobs[-1].sampler.steps[0].ranges == [0, 1, 2, 3, 4]


def test_penalties_have_their_effect(loop):
    """Each x lowers the next one by 2: it is overtaken when its 20 are gone, whatever the prompt has of them."""
    plain = loop.ask("forever xxxxxxxxxxxxxxxxxxxx", temperature=0, max_tokens=14).text
    assert plain == "x" * 14
    text = loop.ask("forever xxxxxxxxxxxxxxxxxxxx", temperature=0, max_tokens=14, frequency_penalty=2).text
    assert text.startswith("x" * 10) and text != plain


def test_logit_bias(loop):
    a, b = loop.backend.tokenize("ab", False)
    steps = loop.steps(temperature=0, logit_bias=((a, -100), (b, 2.5)))
    assert steps[0] == ("SS_LogitBias", {"logit_bias": {a: -float("inf"), b: 2.5}})
    assert loop.ask("echo ccc", temperature=0, logit_bias=((EOS, 100),)).tokens == 1


def test_a_ban_beside_a_grammar_is_refused(loop):
    grammar = 'root ::= "a"\n'
    with pytest.raises(Refused) as refusal:
        loop.ask("echo a", grammar=grammar, logit_bias=((5, -100.0),))
    assert refusal.value.param == "logit_bias"
    assert loop.ask("echo a", grammar=grammar, logit_bias=((5, -99.0),)).text == "a"  # a dead end needs a ban


def test_a_grammar_that_leaves_nothing_but_the_end(loop):
    done = loop.ask("echo ab!", grammar='root ::= "ab"\n', logprobs=1)
    assert (done.text, done.tokens, done.finish) == ("ab", 3, "stop")  # the end counts, as where the model samples it
    assert [one.data for one in done.logprobs] == [b"a", b"b", b"<|eos|>"]
    (one,) = loop.generator.jobs[-1].given["filters"]
    assert one.given["lark_grammar"] == lark_grammar('root ::= "ab"') and one.given["tokenizer"] is loop.backend.tokenizer


def test_a_grammar_that_may_end_ends_where_the_model_does(loop):
    done = loop.ask("echo 123", grammar="root ::= [0-9]+\n")
    assert (done.text, done.tokens, done.finish) == ("123", 4, "stop")
    done = loop.ask("echo 12345", grammar="root ::= [0-9]+\n", max_tokens=5)
    assert (done.text, done.tokens, done.finish) == ("12345", 5, "length")


def test_a_grammar_that_is_complete_at_the_limit(loop):
    """The last token that may come completes it: cut by max_tokens first, as with other engines."""
    done = loop.ask("echo ab", grammar='root ::= "ab"\n', max_tokens=2)
    assert (done.text, done.tokens, done.finish) == ("ab", 2, "length")


def test_a_grammar_that_llguidance_refuses(loop):
    with pytest.raises(Refused) as refusal:
        loop.ask("echo a", grammar="root ::= [b-a]\n")
    assert refusal.value.param == "structured_outputs" and "\n" not in refusal.value.message
    assert loop.ask("echo a").text == "a"


def test_a_grammar_that_can_be_followed_no_further_fails_alone(loop):
    """llguidance has limits; the filter would raise in the middle of everyone's step."""
    broken = loop.submit("echo abcdef", grammar="root ::= [a-z]{6}\n")
    loop.loop.admit()
    (row,) = loop.backend.rows.values()
    row.filters[0]._matcher.consume_token(*loop.backend.tokenize("7", False))
    broken, fine = loop.run(broken, loop.submit("echo fine"))
    assert isinstance(broken.error, Refused) and broken.error.param == "structured_outputs"
    assert fine.text == "fine"


def test_min_tokens_beside_ignore_eos_is_refused(loop):
    with pytest.raises(Refused) as refusal:
        loop.ask("echo a", min_tokens=3, ignore_eos=True)
    assert refusal.value.param == "min_tokens"


def test_a_long_completion_is_queued_again(loop):
    """It reserves pages for 16 tokens ahead, ends there and goes on as the same job; nobody notices."""
    loop.backend.RESERVE = 16
    for verb, sampling in (("forever", {}), ("dice", {"temperature": 1.0, "seed": 5, "ignore_eos": True})):
        loop.backend.RESERVE = 2048
        whole = loop.ask(verb, max_tokens=1000, **sampling)
        assert loop.generator.jobs[-1].rq_new_tokens == 0
        loop.backend.RESERVE = 16
        done = loop.ask(verb, max_tokens=1000, logprobs=1, **sampling)
        job = loop.generator.jobs[-1]
        assert job.rq_new_tokens > 700 and job.given["max_rq_tokens"] == 16
        assert (done.text, done.tokens, done.finish) == (whole.text, 1000, "length")
        assert len(done.logprobs) == 1000 and len(done.started) == 2  # the second is what its prompt had in the cache


def test_a_penalty_sees_past_a_requeue(loop):
    loop.backend.RESERVE = 16
    loop.ask("forever", max_tokens=600, temperature=0, frequency_penalty=0.001)
    assert loop.generator.jobs[-1].rq_new_tokens > 256
    assert loop.generator.jobs[-1].sampler.steps[0].ranges == [*range(600)]


def test_characters_across_a_requeue(loop):
    loop.backend.RESERVE = 16
    text = "é" * 300
    for pad in ("", "-"):  # one of the two cuts a character
        done = loop.ask(f"echo {pad}{text}", max_tokens=1000)
        assert (done.text, done.finish) == (pad + text, "stop")


def test_a_grammar_across_a_requeue(loop):
    loop.backend.RESERVE = 16
    digits = "0123456789" * 60
    assert loop.ask(f"echo {digits}", max_tokens=1000, grammar="root ::= [0-9]+\n").text == digits


def test_cached_tokens(loop):
    first, second = (loop.ask(LONG, max_tokens=4) for _ in range(2))
    size = len(LONG)
    assert first.cached == 0 and second.cached == size - 1 > 768  # whole pages, and what fits of the last
    changed = loop.ask(LONG[:600] + "?" + LONG[601:], max_tokens=4)
    assert changed.cached == 600
    assert sum(e.prompt_tokens for e in second.started) == size


def test_a_broken_job_fails_alone(loop):
    jobs = [loop.submit("echo fine"), loop.submit("fail 3"), loop.submit("echo also fine")]
    fine, broken, also = loop.run(*jobs)
    assert (fine.text, also.text) == ("fine", "also fine")
    assert isinstance(broken.error, EngineFailed) and "the script fails" in str(broken.error) and "\n" not in str(broken.error)
    assert loop.ask("echo next").text == "next" and not loop.backend.rows


def test_a_job_that_ends_early_is_an_error(loop):
    (done,) = loop.run(loop.submit("loop abc"))
    assert isinstance(done.error, EngineFailed) and "after 3 tokens: loop_detected" in str(done.error)


def test_an_error_of_iterate_is_the_engines(loop):
    loop.submit("raise")
    with pytest.raises(RuntimeError, match="the script raises"):
        loop.run(1)


def test_cancel(loop, folder):
    keep, drop = loop.submit("forever", max_tokens=500), loop.submit("forever", max_tokens=500)
    for _ in range(5):
        loop.loop.admit()
        loop.loop.step()
    loop.loop.cancel(drop)
    assert [line["live"] for line in log(folder, "cancel")] == [True] and len(loop.generator.active_jobs) == 1
    assert loop.run(keep)[0].tokens == 500


def test_more_than_fits_is_refused(loop):
    """The loop knows the context and refuses first; this is the library's own word."""
    with pytest.raises(Refused) as refusal:
        loop.backend.start([1] * 5000, Sampling(max_tokens=1, temperature=0))
    assert refusal.value.code == "context_length_exceeded" and not loop.backend.rows
    room = loop.backend.context - 5
    assert loop.ask("echo ", ignore_eos=True, max_tokens=room).tokens == room
    with pytest.raises(Refused):
        loop.ask("echo ", max_tokens=room + 1)


def test_padding_of_the_vocabulary_has_no_text(loop):
    assert loop.backend.piece(300, False) == loop.backend.piece(383, True) == b""
    assert loop.backend.piece(258, True) == b"<|user|>" and loop.backend.piece(258, False) == b""


def test_a_tokenizer_that_cuts_and_pads_does_neither(load, folder):
    path = folder / "tokenizer.json"
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }  # fmt: skip
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": cut, "padding": pad}))
    backend = load().backend
    assert [len(backend.tokenize(text, True)) for text in ("a long text", "ab")] == [11, 2]


def test_no_embeddings(loop):
    with pytest.raises(Refused, match="llamacpp and transformers have"):
        loop.backend.embed([Tokens([1])])


def test_close(loop, folder):
    loop.backend.close()
    assert loop.generator.closed and not loop.backend.model.loaded and log(folder, "unload")


# ── what cannot be loaded says so in a line ──


@needs_torch
def test_torch_for_the_cpu_alone(folder, monkeypatch):
    import torch

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(RuntimeError, match="needs a torch that is built for CUDA"):
        ExLlamaV3(EngineSpec("exllamav3", str(folder)), lambda fraction: None)
    assert "exllamav3" not in sys.modules  # to import it would begin to compile


def machine(monkeypatch, tmp_path, *there):
    """A torch, and a machine on which only these things are there."""
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name in there or None if name == "exllamav3_ext" else real(name)
    )
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(backends.os.path, "exists", lambda path: path in there)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
        if name in there:
            monkeypatch.setenv(name, "/opt/cuda")
    version = SimpleNamespace(cuda="13.0" if "cuda" in there else None, hip="7.0" if "hip" in there else None)
    cuda = SimpleNamespace(is_available=lambda: "gpu" in there)
    return SimpleNamespace(__version__="2.13.0", version=version, cuda=cuda)


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ("", "for CPU alone"), ("cuda", "sees none"), ("hip", "sees none"), ("cuda gpu", "pip install ninja"),
        ("cuda gpu ninja", "needs nvcc"), ("hip gpu ninja", None), ("cuda gpu ninja nvcc", None), ("cuda gpu ninja CUDA_HOME", None),
        ("cuda gpu ninja CUDA_PATH", None), ("cuda gpu ninja /usr/local/cuda", None), ("cuda gpu exllamav3_ext", None),
    ],
)  # fmt: skip
def test_what_a_machine_lacks(there, says, monkeypatch, tmp_path):
    torch = machine(monkeypatch, tmp_path, *there.split())
    lack = lacks_cuda(torch)
    assert lack is None if says is None else says in lack and "\n" not in lack


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("-chunk_size", "abc"), "invalid int value: 'abc'"), (("-cq",), "expected one argument"),
        (("--no_such_flag",), "unrecognized arguments"), (("-dcd", "x"), "disk_cache_dir needs a CPU page cache"),
    ],
)  # fmt: skip
def test_a_bad_flag_is_an_error_and_no_exit(load, options, says):
    with pytest.raises(ValueError, match=says):
        load(options=options)


@needs_torch
def test_an_engine_that_cannot_load_tells_why_in_a_line(folder):
    for switch, options, says in (
        ("fail", (), "Insufficient VRAM in split for model and cache"),
        ("", ("-ndt", "x"), "invalid int"),
    ):
        if switch:
            (folder / switch).touch()
        spec = EngineSpec("fake_exllamav3:Fake", str(folder), options=options)
        engine = Engine(spec, 4, 60, lambda engine: None)
        until(lambda engine=engine: engine.dead)
        assert engine.dead.startswith(str(folder)) and says in engine.dead and "\n" not in engine.dead
        assert engine.process.exitcode == 0
        (folder / "fail").unlink(missing_ok=True)


# ── which engine loads what ──


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A machine with a GPU and an installed exllamav3; both can be taken away."""
    real, there = importlib.util.find_spec, SimpleNamespace(gpu=True, library=True)
    source = tmp_path / "site" / "architecture" / "llama.py"
    source.parent.mkdir(parents=True)
    source.write_text('class LlamaConfig:\n    arch_string = "LlamaForCausalLM"\n')
    spec = importlib.machinery.ModuleSpec("exllamav3", None, is_package=True)
    spec.submodule_search_locations.append(str(tmp_path / "site"))

    def find_spec(name, *rest):
        if name == "exllamav3":
            return spec if there.library else None
        return spec if name in ("torch", "transformers", "llguidance") else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(backends, "has_gpu", lambda: there.gpu)
    there.folder = tmp_path / "site"
    return there


def model_folder(path, **config):
    path.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 256} | config
    (path / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (path / name).write_text("{}")
    return find_model(path)


def test_an_exl3_folder_is_exllamav3s_alone(package, tmp_path):
    model = model_folder(tmp_path / "m", quantization_config={"quant_method": "exl3", "bits": 4.0}, hidden_size=250)
    assert model.kind == "exl3" and choose_backend(model, "auto") == choose_backend(model, "exllamav3") == "exllamav3"
    with pytest.raises(UsageError, match="backend transformers cannot load an EXL3 folder .*; exllamav3 can"):
        choose_backend(model, "transformers")
    package.gpu = False
    with pytest.raises(UsageError, match="needs a CUDA GPU, and this machine shows none"):
        choose_backend(model, "auto")
    package.gpu, package.library = True, False
    with pytest.raises(UsageError, match=f"backend exllamav3 needs exllamav3: pip install .*{PINNED}"):
        choose_backend(model, "auto")


def test_a_hugging_face_folder(package, tmp_path):
    model = model_folder(tmp_path / "m")
    assert model.kind == "hf" and choose_backend(model, "auto") == "exllamav3"
    assert choose_backend(model, "transformers") == "transformers"
    package.gpu = False
    assert choose_backend(model, "auto") == "transformers"
    with pytest.raises(UsageError, match="shows none"):
        choose_backend(model, "exllamav3")
    package.gpu, package.library = True, False
    assert choose_backend(model, "auto") == "transformers"


@pytest.mark.parametrize("config", [{"hidden_size": 576}, {"architectures": ["NobodysForCausalLM"]}, {"architectures": None}])
def test_a_folder_that_exllamav3_cannot_load(package, tmp_path, config):
    model = model_folder(tmp_path / "m", **config)
    assert choose_backend(model, "auto") == "transformers"
    assert choose_backend(model, "exllamav3") == "exllamav3"  # who asks for it may know better


def test_other_quantisations_are_no_exl3(package, tmp_path):
    assert model_folder(tmp_path / "m", quantization_config={"quant_method": "fp8"}).kind == "hf"


def test_architectures_are_found_in_the_wheel(wheel, package, tmp_path):
    shutil.rmtree(package.folder)
    for name in wheel.zip.namelist():
        if name.startswith("exllamav3/architecture/"):
            wheel.zip.extract(name, tmp_path)
    (tmp_path / "exllamav3").rename(package.folder)
    model_folder(tmp_path / "m")
    for name in ("LlamaForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "Gemma3ForCausalLM"):
        assert backends.fits_exllamav3(str(tmp_path / "m"), name), name
    assert not backends.fits_exllamav3(str(tmp_path / "m"), "NobodysForCausalLM")


def test_a_missing_library(monkeypatch):
    monkeypatch.setattr(backends, "has_gpu", lambda: False)
    assert missing_library("exllamav3") == "backend exllamav3 needs a CUDA GPU, and this machine shows none"
    monkeypatch.setattr(backends, "has_gpu", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert missing_library("exllamav3") == f"backend exllamav3 needs exllamav3 and torch: pip install {ExLlamaV3.INSTALL}"


def test_its_name():
    assert backend_class("exllamav3") is ExLlamaV3


# ── over HTTP: the stand-in in a real engine process ──


@pytest.fixture(scope="module")
def http(tiny, tmp_path_factory):
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("http") / "tiny-llama")
    configure(folder, max_position_embeddings=1 << 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.LACKS, "fake_exllamav3:Fake", ExLlamaV3.LACKS)  # else a binding of the user's own may have all
        model = find_model(folder)
        with serve_one(model, EngineSpec("fake_exllamav3:Fake", str(folder), 4, 1, 1 << 16), folder=folder) as served:
            yield served


def ask(served, content, **fields):
    status, reply, _ = served.chat(content, **fields)
    assert status == 200, reply
    return reply


def said(reply):
    choice = reply["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], reply["usage"]["completion_tokens"]


def test_http_answer(http):
    reply = ask(http, "echo Héllo")
    assert said(reply) == ("Héllo", "stop", 7)
    assert reply["usage"]["prompt_tokens"] == len("<|user|>echo Héllo<|assistant|>".encode()) - 8 - 13 + 2
    assert said(ask(http, "echo Hello", max_tokens=2)) == ("He", "length", 2)
    assert said(ask(http, "echo one two", stop=" two"))[:2] == ("one", "stop")


def test_http_stream(http):
    events = http.stream("echo Hé, you", stream_options={"include_usage": True})
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]) == "Hé, you"
    assert [e["choices"][0]["finish_reason"] for e in events if e["choices"]][-1] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == 9


def test_http_cached_tokens(http):
    usages = [ask(http, LONG, max_tokens=2)["usage"] for _ in range(2)]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cached == [cached[0], usages[1]["prompt_tokens"] - 1] and cached[0] < 16


def test_http_logprobs_are_json(http):
    body = {"messages": [{"role": "user", "content": "sharp ab"}], "logprobs": True, "top_logprobs": 5}
    status, reply, _ = http.request("POST", "/v1/chat/completions", body)
    assert status == 200
    json.loads(json.dumps(reply, allow_nan=False))  # no Infinity, which json reads and JSON has not
    tokens = reply["choices"][0]["logprobs"]["content"]
    assert [one["token"] for one in tokens] == ["a", "b"]
    assert all(-100 < other["logprob"] < -80 for one in tokens for other in one["top_logprobs"][1:])


def test_http_many_at_once(http):
    words = [f"echo {'word ' * i}{i}" for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda text: ask(http, text), words))
    assert [said(reply)[0] for reply in replies] == [text.removeprefix("echo ") for text in words]


def test_http_n_choices_have_seeds_of_their_own(http):
    reply = ask(http, "dice", n=3, seed=5, temperature=1, max_tokens=12)
    assert len({choice["message"]["content"] for choice in reply["choices"]}) == 3
    assert [line["seed"] for line in log(http.folder, "enqueue")[-3:]] == [5, 6, 7]


def test_http_a_client_that_leaves(http):
    before = len(log(http.folder, "cancel"))
    body = json.dumps({"messages": [{"role": "user", "content": "forever"}], "stream": True, "max_tokens": 60000}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection((http.host, http.port)) as client:
        client.sendall(head + body)
        assert b"200 OK" in client.recv(4096)
        while b'"content":"x' not in client.recv(4096):
            pass
    until(lambda: len(log(http.folder, "cancel")) > before)
    line = log(http.folder, "cancel")[-1]
    assert line["live"] and 0 < line["tokens"] < 60000


@pytest.mark.parametrize("stream", [False, True])
def test_http_a_broken_job_fails_alone(http, stream):
    pid = http.models.engine.process.pid
    with ThreadPoolExecutor(3) as pool:
        fine = [pool.submit(ask, http, f"echo {'fine ' * 20}") for _ in range(2)]
        status, reply, _ = http.chat("fail 3", stream=stream)
    if stream:
        assert status == 200 and b"the script fails" in reply and reply.endswith(b"data: [DONE]\n\n")
        assert "error" in sse(reply)[-1]
    else:
        assert (status, reply["error"]["type"]) == (500, "server_error") and "the script fails" in reply["error"]["message"]
    assert all(said(one.result())[0] == "fine " * 20 for one in fine)
    assert http.models.engine.process.pid == pid


def test_http_iterate_raises_and_the_engine_is_made_anew(http):
    pid = http.models.engine.process.pid
    status, reply, _ = http.chat("raise")
    assert (status, reply["error"]["type"]) == (500, "server_error")
    http.wait_ready()
    assert said(ask(http, "echo again"))[0] == "again" and http.models.engine.process.pid != pid


def test_http_json_schema(http):
    assert said(ask(http, 'echo {"a":17}', **JSON)) == ('{"a":17}', "stop", 9)
    text, finish, _ = said(ask(http, "echo what the schema does not allow", max_tokens=200, temperature=0, **JSON))
    assert finish == "length" or json.loads(text)
    events = http.stream('echo {"a":1}', **JSON)
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == '{"a":1}'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {"grammar": 'root ::= "refuse me"'}}, "structured_outputs"),
        (JSON | {"logit_bias": {"97": -100}}, "logit_bias"),
        ({"logit_bias": {"384": 1}}, "logit_bias"),
        ({"max_tokens": 1 << 17}, "messages"),
    ],
)
def test_http_what_it_cannot_do_is_a_400(http, fields, param):
    status, reply, _ = http.chat("echo a", **fields)
    assert (status, reply["error"]["param"]) == (400, param), reply
    assert said(ask(http, "echo a"))[0] == "a"


def test_http_no_scores_and_no_embeddings(http):
    status, reply, _ = http.request("POST", "/v1/completions", {"prompt": "echo a", "echo": True, "logprobs": 1})
    assert (status, reply["error"]["param"]) == (400, "echo")
    assert http.request("POST", "/v1/embeddings", {"input": "a"})[0] == 400


def test_http_token_ids(http):
    """A prompt may have ids of the padding, and a bias may end an answer at once."""
    ids = [*range(97, 100), 300, 383]
    status, reply, _ = http.request("POST", "/v1/completions", {"prompt": ids, "max_tokens": 1})
    assert status == 200 and reply["usage"]["prompt_tokens"] == 5, reply
    assert said(ask(http, "echo abc", logit_bias={"257": 100}, temperature=0)) == ("", "stop", 1)
    assert http.request("POST", "/v1/completions", {"prompt": [384], "max_tokens": 1})[0] == 400
