"""Records what Hugging Face transformers computes for a tiny Llama, for the parity tests.

Writes, beside this file, `tiny-llama/`, `tiny-llama-tied/` (README.md says what is in them) and
`rotary.json`. The same versions on the same kind of processor write the same files.
"""

import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = pathlib.Path(__file__).parent
# The first AdamW step moves an element by the sign of its gradient alone. With this seed no gradient
# is so near zero that rounding decides its sign: the same run in fp64 ends within 3e-6 (norm-wise).
SEED = 10
STEPS = 10


def tiny_config(tied):
    """Grouped queries, and an original context of 16 so that the rotary scaling matters."""
    return LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=128,
        rms_norm_eps=1e-5,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )


def tiny_model(tied):
    """Matrices of deviation 0.1, norm scales around 1 but not at it, so every gradient counts."""
    model = LlamaForCausalLM(tiny_config(tied)).float()
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.dim() > 1 else 1.0 + noise)
    return model


def adamw(model):
    """Decay on matrices only, no clipping: what README.md says of the update."""
    parameters = list(model.parameters())
    matrices = [p for p in parameters if p.dim() > 1]
    scales = [p for p in parameters if p.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": scales, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)


def forward(model, tokens):
    """The logits, and the mean cross-entropy of each next token."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    targets = tokens[:, 1:].flatten()
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets)


def snapshot(prefix, tensors):
    """Copies that later steps cannot change, named `prefix.<Hugging Face name>`."""
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in tensors}


def record(folder, tied):
    """Writes one model with its logits, loss, gradients and parameters after AdamW steps."""
    model = tiny_model(tied)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()  # how to sample text, which no test does
    tokens = torch.randint(0, 128, (3, 25), generator=torch.Generator().manual_seed(SEED + 1))
    golden = {"tokens": tokens.to(torch.int32)}
    losses = []
    optimizer = adamw(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        logits, loss = forward(model, tokens)
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            golden |= {"logits": logits.detach().clone(), "loss": loss.detach().reshape(1)}
            golden |= snapshot("gradient", ((n, p.grad) for n, p in model.named_parameters()))
        optimizer.step()
        if step + 1 in (1, STEPS):
            golden |= snapshot(f"after{step + 1}", model.named_parameters())
    losses.append(forward(model, tokens)[1].detach())
    golden["losses"] = torch.stack(losses)
    save_file(golden, folder / "golden.safetensors")


def record_rotary(path):
    """Writes the angle per position of each pair of components in Llama 3.1 8B."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=4096,
        num_attention_heads=32,
        max_position_embeddings=131072,
        rope_parameters=dict(scaling),
    )
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    contents = {"head_dim": config.head_dim, **scaling, "inv_freq": frequencies.tolist()}
    path.write_text(json.dumps(contents, indent=1) + "\n")


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    record(HERE / "tiny-llama", tied=False)
    record(HERE / "tiny-llama-tied", tied=True)
    record_rotary(HERE / "rotary.json")


if __name__ == "__main__":
    main()
