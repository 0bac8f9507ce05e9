"""Records what Hugging Face transformers computes for tiny models, for the parity tests.

Writes, beside this file, `tiny-llama/`, `tiny-llama-tied/`, `tiny-mixtral/`, `tiny-glm4-moe/`,
`tiny-deepseek-v3/` (README.md says what is in them) and `rotary.json`; given names of folders, those
alone. The same versions on the same kind of processor write the same files.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

HERE = pathlib.Path(__file__).parent
# The first AdamW step moves an element by the sign of its gradient alone. With this seed no gradient
# is so near zero that rounding decides its sign: the same run in fp64 ends within 3e-6 (norm-wise).
SEED = 10
STEPS = 10
# How far the bias of an expert moves in a step (DeepSeek-V3, arXiv:2412.19437, section 2.1.2).
BALANCE_RATE = 1e-3

# What the tiny models have in common.
COMMON = dict(
    num_hidden_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=128,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=None,
    attn_implementation="eager",
)


def tiny_llama(tied):
    """Grouped queries, and an original context of 16 so that the rotary scaling matters."""
    config = LlamaConfig(
        **COMMON,
        intermediate_size=96,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    )
    return filled(LlamaForCausalLM(config), SEED)


def tiny_mixtral():
    """Two of five experts for each token."""
    config = MixtralConfig(
        **COMMON,
        intermediate_size=48,
        num_local_experts=5,
        num_experts_per_tok=2,
        sliding_window=None,
        experts_implementation="eager",
    )
    return filled(MixtralForCausalLM(config), SEED)


# DeepSeek-V3's experts: three of eight, out of two of four groups, and a shared one; the first layer
# is dense.
DEEPSEEK_EXPERTS = dict(
    intermediate_size=96,
    moe_intermediate_size=32,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    n_shared_experts=1,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
    attention_bias=False,
    tie_word_embeddings=False,
    experts_implementation="eager",
)


def tiny_glm4_moe():
    """A Llama's attention and DeepSeek-V3's experts."""
    config = Glm4MoeConfig(
        **COMMON,
        **DEEPSEEK_EXPERTS,
        use_qk_norm=False,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 1.0,
        },
    )
    return biased(filled(Glm4MoeForCausalLM(config), SEED))


def tiny_deepseek_v3():
    """Latent attention whose widths all differ, and DeepSeek-V3's experts."""
    common = {key: value for key, value in COMMON.items() if key != "head_dim"}
    config = DeepseekV3Config(
        **{**common, "num_key_value_heads": 4},
        **DEEPSEEK_EXPERTS,
        q_lora_rank=24,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=16,
        num_mtp_layers=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return biased(filled(DeepseekV3ForCausalLM(config), SEED))


def filled(model, seed):
    """Matrices of deviation 0.1, norm scales around 1 but not at it, so every gradient counts."""
    model = model.float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.dim() > 1 else 1.0 + noise)
    return model


def tiny_deepseek_v2():
    """Latent attention with queries projected at once, and softmax over all experts: three of eight,
    out of two of four groups, and two shared ones."""
    common = {key: value for key, value in COMMON.items() if key != "head_dim"}
    config = DeepseekV2Config(
        **{**common, "num_key_value_heads": 4},
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        n_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.0,
        norm_topk_prob=False,
        q_lora_rank=None,
        kv_lora_rank=20,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=16,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        experts_implementation="eager",
    )
    return filled(DeepseekV2ForCausalLM(config), SEED)


def tiny_mistral():
    """A window of five tokens."""
    config = MistralConfig(
        **COMMON,
        intermediate_size=96,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return filled(MistralForCausalLM(config), SEED)


def tiny_qwen3():
    """Normed queries and keys, and a window of five tokens in every other layer."""
    config = Qwen3Config(
        **COMMON,
        intermediate_size=96,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return filled(Qwen3ForCausalLM(config), SEED)


def tiny_qwen3_moe():
    """Normed queries and keys, and two of five experts in every other layer."""
    config = Qwen3MoeConfig(
        **COMMON,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_experts=5,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        experts_implementation="eager",
    )
    return filled(Qwen3MoeForCausalLM(config), SEED)


def biased(model):
    """Experts' biases that count in the choice."""
    generator = torch.Generator().manual_seed(SEED + 2)
    for bias in biases(model).values():
        bias.copy_(0.05 * torch.randn(bias.shape, generator=generator))
    return model


def biases(model):
    """What is added to the scores of experts before the choice, by name."""
    return {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}


def balance(model, loads):
    """Moves biases down where an expert's load is above the mean, up where it is below."""
    for name, bias in biases(model).items():
        load = loads[name.removesuffix(".e_score_correction_bias")]
        bias.add_(BALANCE_RATE * torch.sign(load.mean() - load))


def watch_loads(model):
    """The tokens that each expert gets in a forward pass, by the name of the gate; kept current."""
    loads = {}
    for name, gate in model.named_modules():
        if hasattr(gate, "e_score_correction_bias"):

            def note(gate, _, output, name=name):
                counts = torch.bincount(output[2].flatten(), minlength=gate.num_experts)
                loads[name] = counts.to(gate.weight.dtype)

            gate.register_forward_hook(note)
    return loads


def stored(model, named):
    """Tensors by their names in a checkpoint, where each expert's matrices have one of their own."""
    mixtral = model.config.model_type == "mixtral"
    parts = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    for name, tensor in named:
        if mixtral:
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor):
                yield f"{prefix}{expert}.{parts[0]}.weight", gate
                yield f"{prefix}{expert}.{parts[1]}.weight", up
        elif name.endswith("experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, down in enumerate(tensor):
                yield f"{prefix}{expert}.{parts[2]}.weight", down
        else:
            yield name, tensor


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


def snapshot(prefix, model, tensors):
    """Copies that later steps cannot change, named `prefix.<Hugging Face name>`."""
    named = stored(model, tensors)
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in named}


def record(folder, model):
    """Writes one model with its logits, loss, gradients and parameters after AdamW steps."""
    loads = watch_loads(model)
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
            gradients = ((n, p.grad) for n, p in model.named_parameters())
            golden |= snapshot("gradient", model, gradients)
        optimizer.step()
        balance(model, loads)
        if step + 1 in (1, STEPS):
            state = [*model.named_parameters(), *biases(model).items()]
            golden |= snapshot(f"after{step + 1}", model, state)
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


MODELS = {
    "tiny-llama": lambda: tiny_llama(tied=False),
    "tiny-llama-tied": lambda: tiny_llama(tied=True),
    "tiny-mixtral": tiny_mixtral,
    "tiny-glm4-moe": tiny_glm4_moe,
    "tiny-deepseek-v3": tiny_deepseek_v3,
    "tiny-deepseek-v2": tiny_deepseek_v2,
    "tiny-mistral": tiny_mistral,
    "tiny-qwen3": tiny_qwen3,
    "tiny-qwen3-moe": tiny_qwen3_moe,
}


def main():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    for name in sys.argv[1:] or MODELS:
        record(HERE / name, MODELS[name]())
    record_rotary(HERE / "rotary.json")


if __name__ == "__main__":
    main()
