"""The demo model as a Hugging Face folder: python tests/hf_folder.py MODEL.gguf FOLDER

A model that transformers has read from a GGUF file cannot be saved as it is; its weights can, in a model made anew.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

source, folder = Path(sys.argv[1]), sys.argv[2]
tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
if hasattr(read.config, "quantization_config"):
    del read.config.quantization_config
model = LlamaForCausalLM(read.config).to(torch.bfloat16)
model.load_state_dict(read.state_dict())
model.save_pretrained(folder)
tokenizer.save_pretrained(folder)
