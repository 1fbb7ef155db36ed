"""A Llama of 2.8 MB with random weights and a byte-level tokenizer, as a Hugging Face folder: python tests/tiny_llama.py FOLDER

A token is a byte; 256 to 259 are <|bos|>, <|eos|>, <|user|> and <|assistant|>, and the rest up to 384 is padding.
"""

import json
import sys
from pathlib import Path

BOS, EOS, VOCABULARY = 256, 257, 384
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 256,
    "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "bos_token_id": BOS, "eos_token_id": EOS, "torch_dtype": "float16",
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make(folder):
    """Returns the folder."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
    tokenizer.add_special_tokens([AddedToken(s, special=True) for s in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    own = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    save_weights(folder / "model.safetensors", [tokenizer.token_to_id(chr(c)) for c in range(33, 127)])
    return folder


def save_weights(path, printable):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    hidden, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 2 * CONFIG["head_dim"]

    def random(*shape):
        return (torch.randn(*shape) * 0.05).half()

    head = torch.zeros(VOCABULARY, hidden).half()  # what cannot be printed stays at a logit of 0, and is hardly ever sampled
    head[printable] = random(len(printable), hidden)
    weights = {
        "model.embed_tokens.weight": random(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden).half(),
        "lm_head.weight": head,
    }
    for n in range(CONFIG["num_hidden_layers"]):
        shapes = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }  # fmt: skip
        weights |= {f"model.layers.{n}.{name}.weight": random(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{n}.{name}.weight"] = torch.ones(hidden).half()
    save_file(weights, path)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
