"""Opens a model folder in Hugging Face transformers, as proof that it is one.

    golden/python.sh golden/open_in_transformers.py FOLDER [--prompt TEXT]

Prints one JSON line: the parameters, the loss on the golden tokens where the vocabulary holds
them, and, where the folder has a tokenizer.json, a text that the model generates.
"""

import argparse
import json
import pathlib

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GOLDEN = pathlib.Path(__file__).parent / "tiny-llama" / "golden.safetensors"


def load(folder):
    """The model in fp32; a tensor that is missing, unexpected or misshapen is an error."""
    model, found = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    problems = {key: sorted(map(str, names)) for key, names in found.items() if names}
    if problems:
        raise SystemExit(f"{folder} does not match its config.json: {problems}")
    return model.eval()


def golden_loss(model):
    """Mean cross-entropy on the golden tokens."""
    tokens = load_file(GOLDEN)["tokens"].long()
    logits = model(input_ids=tokens[:, :-1]).logits
    targets = tokens[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).item()


def generate(model, folder, prompt):
    """The likeliest continuation of `prompt`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    words = model.generate(
        **inputs, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.eos_token_id or 0
    )
    return tokenizer.decode(words[0])


def main():
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("folder", type=pathlib.Path)
    arguments.add_argument("--prompt", default="fn main() {")
    arguments = arguments.parse_args()
    torch.set_grad_enabled(False)
    model = load(arguments.folder)
    result = {"parameters": sum(p.numel() for p in model.parameters())}
    if model.config.vocab_size >= 128:
        result["golden_loss"] = golden_loss(model)
    if (arguments.folder / "tokenizer.json").exists():
        result["text"] = generate(model, arguments.folder, arguments.prompt)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
