"""Models that embed texts or score pairs of them, and generate none: how each pools, one small class for each library.

They stand on the same loading and tokenizing as the bindings (libraries.py) and have the same seam (engine.Backend), but for
`start`: nothing here runs on from step to step. One embed() is one batch; which inputs share it is engine.Pool's business.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from backends import Transformers
from chat_syntax import ChatTemplate
from engine import Backend, EngineSpec, Refused, Sampling, Step, Tokens, log
from libraries import HfModel, LlamaModel, OpenVinoModel, installed, padded
from machine import physical_cores, torch_device, torch_dtype
from model_files import GGUF_RANK, TASKS, labels, read_json, read_pooling

LONGEST = 8192  # tokens of one input where the model would take more: attention needs memory by the square of it; --cache-size


class Embedder:
    """What is common to them: the part of engine.Backend that generates is refused."""

    LACKS: ClassVar = frozenset[str]()
    SPECULATES: ClassVar = frozenset[str]()
    cache_tokens = 0  # nothing is kept
    task: str

    def start(self, ids: list[int], sampling: Sampling) -> tuple[int, int | None]:
        raise Refused(f"This model {TASKS[self.task][0]}.", "model")

    def step(self) -> list[Step]:
        return []

    def cancel(self, seq: int) -> None:
        pass


def pool(numpy: Any, mode: str, hidden: Any, lengths: Any) -> Any:
    """hidden: float32 (rows, tokens, width), padding behind; lengths: int (rows). sentence-transformers' own modes."""
    mask = numpy.arange(hidden.shape[1])[None, :, None] < lengths[:, None, None]
    if mode == "cls":
        return hidden[:, 0]
    if mode == "lasttoken":
        return hidden[numpy.arange(len(hidden)), lengths - 1]
    if mode == "max":
        return numpy.where(mask, hidden, -math.inf).max(1)
    weight = mask.astype(hidden.dtype)
    if mode == "weightedmean":
        weight *= numpy.arange(1, hidden.shape[1] + 1)[None, :, None]
    total = weight.sum(1)
    return (hidden * weight).sum(1) / (total**0.5 if mode == "mean_sqrt_len_tokens" else total)


def pooled(numpy: Any, modes: Sequence[str], hidden: Any, inputs: Sequence[Tokens]) -> Any:
    lengths = numpy.array([len(given.ids) for given in inputs])
    return numpy.concatenate([pool(numpy, mode, hidden, lengths) for mode in modes], -1)


def unit(numpy: Any, rows: Any) -> Any:
    return rows / numpy.linalg.norm(rows, axis=-1, keepdims=True).clip(1e-12)


# ───────────────────────────────────────────────────── llama.cpp ─────────────────────────────────────────────────


class LlamaEmbedder(Embedder, LlamaModel):
    """A GGUF file that says how it pools (<arch>.pooling_type: mean, cls, last, rank), which llama.cpp does itself.

    Vectors have length 1, as llama.cpp's users know them: a GGUF file does not say. Scores are 0 to 1.
    """

    pool_tokens, pool_rows = 2048, 64  # of one llama_batch
    LOGITS = 2 << 30  # bytes

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        super().__init__(spec, progress)
        lib, self.task = self.lib, spec.task
        # llama.cpp makes room for the logits of every token of a batch, also where none are wanted.
        longest, many = (max(512, size // (4 * self.vocabulary)) for size in (self.LOGITS, self.LOGITS // 4))
        self.context = min(self.trained, spec.cache_tokens or min(LONGEST, longest))
        self.pool_tokens = min(self.pool_tokens, many)
        if spec.task == "rerank":
            self.check_classes()
        params = lib.llama_context_default_params()
        room = max(self.context, self.pool_tokens)
        params.n_ctx = params.n_batch = params.n_ubatch = room  # an input is pooled in one piece
        params.n_seq_max, params.kv_unified = self.pool_rows, True
        params.n_threads = params.n_threads_batch = self.threads
        params.embeddings = True
        told = self.meta.get(f"{self.meta.get('general.architecture')}.pooling_type")
        params.pooling_type = GGUF_RANK if spec.task == "rerank" else told or lib.LLAMA_POOLING_TYPE_MEAN
        params.no_perf = True
        self.ctx = lib.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError(f"no memory for {room} tokens at once: lower --cache-size ({self.last_error})")
        self.memory = lib.llama_get_memory(self.ctx)  # NULL where the model has no causal attention
        self.batch = lib.llama_batch_init(room, 0, 1)
        if spec.task == "rerank":
            self.pair, self.width = self.make_pair, lib.llama_model_n_cls_out(self.model)
        else:
            self.width = lib.llama_model_n_embd_out(self.model)

    def check_classes(self) -> None:
        """Raises RuntimeError: more than one score, and not the yes and no of a Qwen3 reranker."""
        lib, count = self.lib, self.lib.llama_model_n_cls_out(self.model)
        self.yes = count == 2 and lib.llama_model_cls_label(self.model, 0) == b"yes"  # llama.cpp makes probabilities of them
        if count != 1 and not self.yes:
            raise RuntimeError(f"it gives {count} scores to a pair; a reranker gives one")
        if self.meta.get("general.architecture") == "bert" and self.meta.get("tokenizer.ggml.token_type_count", 1) > 1:
            log.warning(
                "this model tells query and document apart by token types, which llama.cpp does not have: its scores differ"
            )

    def make_pair(self, query: str, document: str, limit: int | None) -> Tokens:
        """As the model was trained: by its own template for pairs, or one text behind the other with its separators."""
        lib, vocab = self.lib, self.vocab
        template = self.meta.get("tokenizer.chat_template.rerank")
        if template:
            if limit is not None:
                spare = limit - len(self.tokenize(template.replace("{query}", query).replace("{document}", ""), False))
                plain = self.tokenize(document, False)[: max(0, spare)]
                document = b"".join(self.piece(token, True) for token in plain).decode("utf-8", "ignore")
            return Tokens(self.tokenize(template.replace("{query}", query).replace("{document}", document), False))
        first, second = self.tokenize(query, True), self.tokenize(document, True)
        between = (
            [lib.llama_vocab_sep(vocab)] if lib.llama_vocab_get_add_sep(vocab) and lib.llama_vocab_get_add_eos(vocab) else []
        )
        second = second[1:] if lib.llama_vocab_get_add_bos(vocab) else second
        if limit is not None and len(first) + len(between) + len(second) > limit:
            plain = self.tokenize(document, False)
            tail = second[len(plain) :]
            second = plain[: max(0, limit - len(first) - len(between) - len(tail))] + tail
        return Tokens([*first, *between, *second])

    def embed(self, inputs: Sequence[Tokens]) -> Iterator[list[bytes]]:
        lib, numpy = self.lib, self.numpy
        if self.memory:
            lib.llama_memory_clear(self.memory, False)
        self.fill(self.batch, ((seq, at, token) for seq, given in enumerate(inputs) for at, token in enumerate(given.ids)))
        if lib.llama_decode(self.ctx, self.batch):
            raise RuntimeError(f"llama_decode failed for embeddings: {self.last_error}")
        found = [lib.llama_get_embeddings_seq(self.ctx, seq) for seq in range(len(inputs))]
        rows = numpy.stack([numpy.ctypeslib.as_array(row, shape=(self.width,)) for row in found])
        if self.task == "embed":
            rows = unit(numpy, rows)
        elif self.yes:
            rows = rows[:, :1]
        else:
            rows = 1 / (1 + numpy.exp(-rows))
        yield [row.tobytes() for row in rows.astype("<f4")]

    def close(self) -> None:
        self.lib.llama_free(self.ctx)
        self.lib.llama_model_free(self.model)


# ─────────────────────────────────────────────────── transformers ────────────────────────────────────────────────

OFFSET_POSITIONS = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "mpnet",
    "xmod",
    "data2vec-text",
)  # count from the pad id


class TorchEmbedder(Embedder, HfModel):
    """A Hugging Face folder: sentence-transformers' files say how it pools; a classifier of one label scores pairs."""

    LIBRARIES: ClassVar = Transformers.LIBRARIES
    INSTALL: ClassVar = Transformers.INSTALL
    ACTIVATIONS: ClassVar = {"Identity": lambda x: x, "Sigmoid": lambda x: x.sigmoid(), "Tanh": lambda x: x.tanh(),
        "ReLU": lambda x: x.relu()}  # fmt: skip
    pool_tokens, pool_rows = 2048, 128

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        os.environ["HF_HUB_OFFLINE"] = "1"  # what is not in the folder is not fetched behind the user's back
        progress(0.0)
        self.torch: Any = importlib.import_module("torch")
        self.numpy: Any = importlib.import_module("numpy")
        transformers: Any = importlib.import_module(self.LIBRARIES[0])
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.library = f"{installed(self.LIBRARIES[0])}, {installed('torch')}"
        self.slots, self.threads, self.task = spec.slots, spec.threads or physical_cores(), spec.task
        self.torch.set_num_threads(self.threads)
        self.device = torch_device(self.torch, spec.device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(spec.path)
        super().__init__(spec, tokenizer.backend_tokenizer)
        whole = read_json(spec.path, "config.json")
        dtype = torch_dtype(self.torch, spec.dtype, self.config, self.device)
        kind = transformers.AutoModelForSequenceClassification if spec.task == "rerank" else transformers.AutoModel
        self.model = kind.from_pretrained(spec.path, dtype=dtype).to(self.device).eval()
        self.fit_vocabulary(int(self.model.get_input_embeddings().weight.shape[0]))
        self.pad = self.config.get("pad_token_id") or 0
        self.types = (self.config.get("type_vocab_size") or 0) > 1 and "token_type_ids" in tokenizer.model_input_names
        self.how = read_pooling(spec.path)
        self.prompts = self.how.prompts
        self.context = self.longest(spec, tokenizer.model_max_length)
        if spec.task == "rerank":
            self.pair, self.activation = self.make_pair, self.read_activation(whole)
        else:
            self.dense = [self.read_dense(spec.path, name) for name in self.how.dense]

    def longest(self, spec: EngineSpec, tokenizer_limit: int) -> int:
        positions = self.config.get("max_position_embeddings") or LONGEST
        if self.config.get("model_type") in OFFSET_POSITIONS:
            positions -= self.pad + 1
        return min(positions, self.how.longest or positions, tokenizer_limit, spec.cache_tokens or LONGEST)

    def read_activation(self, config: dict[str, Any]) -> Callable[[Any], Any]:
        """What sentence-transformers' CrossEncoder does with the one logit. Raises ValueError: nobody knows it."""
        if labels(config) != 1:
            raise ValueError(f"it gives {labels(config)} scores to a pair; a reranker gives one")
        own = config.get("sentence_transformers")
        named = own.get("activation_fn") if isinstance(own, dict) else config.get("sbert_ce_default_activation_function")
        return self.activation_named(named or "Sigmoid")

    def activation_named(self, path: str) -> Callable[[Any], Any]:
        name = str(path).rpartition(".")[2].removesuffix("()")
        if name not in self.ACTIVATIONS:
            raise ValueError(f"this server knows no activation {name}")
        return self.ACTIVATIONS[name]

    def read_dense(self, folder: str, name: str) -> tuple[Any, Any, Callable[[Any], Any]]:
        """(weight, bias or None, activation) of a layer behind the pooling."""
        config = read_json(folder, os.path.join(name, "config.json"))
        weights = importlib.import_module("safetensors.torch").load_file(os.path.join(folder, name, "model.safetensors"))
        weights = {name: weight.float() for name, weight in weights.items()}
        activation = self.activation_named(config.get("activation_function") or "Tanh")
        return weights["linear.weight"], weights.get("linear.bias"), activation

    def tokenize(self, text: str, add_special: bool) -> list[int]:
        return super().tokenize(text.lower() if self.how.lower else text, add_special)

    def make_pair(self, query: str, document: str, limit: int | None) -> Tokens:
        """The tokenizer knows how a pair is written. A document that is too long loses its end."""
        found = self.hf_tokenizer.encode(query, document)
        ids, types, of = list(found.ids), list(found.type_ids), list(found.sequence_ids)
        over = len(ids) - limit if limit is not None else 0
        drop = [i for i, which in enumerate(of) if which == 1][-over:] if over > 0 else []
        kept = sorted({*range(len(ids))} - {*drop})
        return Tokens([ids[i] for i in kept], [types[i] for i in kept] if self.types else ())

    def embed(self, inputs: Sequence[Tokens]) -> Iterator[list[bytes]]:
        torch = self.torch
        ids, mask = padded(torch, [given.ids for given in inputs], self.device, self.pad)
        more = {"token_type_ids": padded(torch, [given.types for given in inputs], self.device)[0]} if inputs[0].types else {}
        with torch.inference_mode():
            out = self.model(input_ids=ids, attention_mask=mask, **more)
            if self.task == "rerank":
                rows = self.activation(out.logits.float()).cpu().numpy()
            else:
                rows = pooled(self.numpy, self.how.modes, out.last_hidden_state.float().cpu().numpy(), inputs)
                for weight, bias, activation in self.dense:
                    rows = activation(torch.nn.functional.linear(torch.from_numpy(rows), weight, bias)).numpy()
        rows = unit(self.numpy, rows) if self.task == "embed" and self.how.normalize else rows
        yield [row.tobytes() for row in rows.astype("<f4")]

    def close(self) -> None:
        del self.model


# ───────────────────────────────────────────────────── OpenVINO ──────────────────────────────────────────────────


class OpenVinoEmbedder(Embedder, OpenVinoModel):
    """An IR folder of a model that embeds.

    OpenVINO GenAI's own TextEmbeddingPipeline takes text alone, cuts what is too long without a word, and pools in three
    ways; so its tokenizer and the compiled model are used as they are, and the pooling is what the folder says.
    """

    pool_tokens, pool_rows = 2048, 64

    def __init__(self, spec: EngineSpec, progress: Callable[[float], None]):
        super().__init__(spec)
        progress(0.0)
        core, self.task = self.openvino.Core(), spec.task
        model = core.read_model(os.path.join(spec.path, "openvino_model.xml"))
        self.names = {name for port in model.inputs for name in port.get_names()}
        if (
            not {"input_ids", "attention_mask"}
            <= self.names
            <= {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
        ):
            raise RuntimeError(f"its inputs are {', '.join(sorted(self.names))}: this is no model that embeds text")
        outputs = [name for port in model.outputs for name in port.get_names()]
        self.output = next((name for name in ("last_hidden_state", "token_embeddings") if name in outputs), None) or 0
        self.compiled = core.compile_model(model, self.device, {"PERFORMANCE_HINT": "LATENCY", **self.properties(spec)})
        self.how, config = read_pooling(spec.path), read_json(spec.path, "config.json")
        if self.how.dense:
            raise RuntimeError("it has layers behind the pooling, which this engine does not run; transformers does")
        self.prompts = self.how.prompts
        positions = config.get("max_position_embeddings") or LONGEST
        if config.get("model_type") in OFFSET_POSITIONS:
            positions -= (config.get("pad_token_id") or 0) + 1
        self.context = min(positions, self.how.longest or positions, spec.cache_tokens or LONGEST)
        self.pad = config.get("pad_token_id") or 0
        self.silent = not os.path.exists(os.path.join(spec.path, "openvino_detokenizer.xml"))
        self.read_tokenizer(self.genai.Tokenizer(spec.path), self.context)
        self.vocabulary = config.get("vocab_size") or self.vocabulary
        self.eos, self.defaults = frozenset[int](), dict[str, float]()
        self.template = ChatTemplate(spec.chat_template, "", "")

    def read_vocabulary(self) -> tuple[list[bytes], list[bytes]]:
        return ([], []) if self.silent else super().read_vocabulary()

    def piece(self, token: int, special: bool) -> bytes:
        if self.silent:
            raise Refused("This model's folder has no openvino_detokenizer.xml, which tells what text a token is.", "prompt")
        return super().piece(token, special)

    def embed(self, inputs: Sequence[Tokens]) -> Iterator[list[bytes]]:
        numpy, width = self.numpy, max(len(given.ids) for given in inputs)
        ids = numpy.full((len(inputs), width), self.pad, dtype=numpy.int64)
        for row, given in zip(ids, inputs, strict=True):
            row[: len(given.ids)] = given.ids
        mask = (numpy.arange(width)[None] < numpy.array([[len(given.ids)] for given in inputs])).astype(numpy.int64)
        feed = {"input_ids": ids, "attention_mask": mask}
        if "token_type_ids" in self.names:
            feed["token_type_ids"] = numpy.zeros_like(ids)
        if "position_ids" in self.names:
            feed["position_ids"] = numpy.broadcast_to(numpy.arange(width), ids.shape)
        rows = pooled(numpy, self.how.modes, self.compiled(feed)[self.output], inputs)
        rows = unit(numpy, rows) if self.how.normalize else rows
        yield [row.tobytes() for row in rows.astype("<f4")]

    def close(self) -> None:
        del self.compiled


EMBEDDERS: dict[str, type[Backend]] = {
    "llamacpp": LlamaEmbedder,
    "transformers": TorchEmbedder,
    "openvino": OpenVinoEmbedder,
}
