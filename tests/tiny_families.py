"""Tiny random targets of every family, as their config.json describes them, and transformers' models of these."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

from fasteagle_jax.targets.table import family_of, family_of_files

if TYPE_CHECKING:  # torch takes seconds to import
    from transformers import PreTrainedModel

V = 61
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_config(name: str, seed: int = 0) -> dict[str, Any]:
    """The config.json of a tiny target of a family by its name in the table; another one for each seed."""
    rng = random.Random(f"{name} {seed}")
    kv_heads = rng.choice([1, 2])
    hf: dict[str, Any] = dict(
        model_type=name,
        vocab_size=V,
        hidden_size=rng.choice([24, 32]),
        intermediate_size=rng.choice([40, 48]),
        num_hidden_layers=rng.choice([4, 5, 6]) if seed else 4,
        num_attention_heads=kv_heads * rng.choice([1, 2]),
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        rope_theta=rng.choice([300.0, 1000.0]),
        tie_word_embeddings=rng.choice([True, False]),
    )
    window = rng.randint(4, 12)
    head_dim = {"head_dim": rng.choice([8, 16])}
    own: dict[str, dict[str, Any]] = {
        "llama": head_dim | {"attention_bias": rng.random() < 0.5, "rope_scaling": rng.choice([None, LLAMA3])},
        "qwen2": {
            "use_sliding_window": rng.random() < 0.5,
            "sliding_window": window,
            "max_window_layers": rng.randint(0, 3),
            "rope_scaling": rng.choice([None, YARN]),
        },
        "qwen3": head_dim
        | {
            "use_sliding_window": False,
            "attention_bias": rng.random() < 0.5,
            "rope_scaling": YARN if seed < 3 else None,
        },
        "mistral": head_dim | {"sliding_window": window if seed < 4 else None},
        "gemma2": head_dim
        | {
            "sliding_window": window,
            "query_pre_attn_scalar": rng.choice([12, 24]),
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": rng.choice([3.0, 5.0]) if seed < 4 else None,
            "tie_word_embeddings": True,
        },
        "gemma3": head_dim
        | {
            "model_type": "gemma3_text",
            "sliding_window": window,
            "sliding_window_pattern": rng.choice([2, 3]),
            "query_pre_attn_scalar": rng.choice([12, 24]),
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0} if seed % 2 == 0 else None,
            "tie_word_embeddings": True,
        },
        "phi3": {
            "sliding_window": window if seed % 2 else None,
            "original_max_position_embeddings": 256,
            "partial_rotary_factor": rng.choice([0.5, 0.75]),
            "pad_token_id": 0,
        },
        "smollm3": {"no_rope_layer_interval": rng.choice([2, 3]), "pad_token_id": 0}
        | ({"use_sliding_window": True, "sliding_window": window} if seed % 3 == 1 else {}),
        "granite": {
            "attention_bias": rng.random() < 0.5,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.22,
            "logits_scaling": 4.0,
        },
        "mixtral": head_dim
        | {
            "sliding_window": window if seed % 2 else None,
            "num_local_experts": rng.choice([4, 5, 8]) if seed else 4,
            "num_experts_per_tok": rng.choice([1, 2, 3]) if seed else 2,
        },
        "qwen2_moe": {
            "use_sliding_window": seed % 2 == 1,
            "sliding_window": window,
            "max_window_layers": rng.randint(0, 3),
            "shared_expert_intermediate_size": rng.choice([24, 40]),
            "qkv_bias": seed < 4,
        },
        "qwen3_moe": head_dim
        | {
            "use_sliding_window": seed == 6,
            "sliding_window": window,
            "attention_bias": rng.random() < 0.5,
            "rope_scaling": YARN if seed < 3 else None,
        },
        "gpt_oss": head_dim
        | {
            "sliding_window": window,
            "layer_types": ["sliding_attention", *["full_attention"] * 3, "sliding_attention"] if seed == 5 else None,
            "num_local_experts": rng.choice([4, 5, 8]) if seed else 4,
            "num_experts_per_tok": rng.choice([1, 2, 4]) if seed else 2,
            "rope_scaling": YARN | {"truncate": seed == 3, "beta_fast": 4.0},
        },
    }
    if name == "gpt_oss" and seed == 5:
        hf["num_hidden_layers"] = 5
    if name in ("qwen2_moe", "qwen3_moe"):  # dense layers between for some
        own[name] |= {
            "num_experts": rng.choice([4, 8, 12]) if seed else 8,
            "num_experts_per_tok": rng.choice([1, 2, 4]) if seed else 2,
            "moe_intermediate_size": rng.choice([16, 24]),
            "norm_topk_prob": bool(seed % 2),
            "decoder_sparse_step": 2 if seed in (2, 5) else 1,
            "mlp_only_layers": [1] if seed in (3, 5) else [],
        }
    hf |= own[name]
    if "head_dim" not in hf:
        hf["hidden_size"] = hf["num_attention_heads"] * 16
    special = {"llama": "Llama", "smollm3": "SmolLM3", "phi3": "Phi3"}
    architecture = special.get(name, "".join(word.capitalize() for word in name.split("_")))
    return hf | {"architectures": [f"{architecture}ForCausalLM"]}


def tiny_family(hf: dict[str, Any], seed: int = 0) -> Any:
    """A random target of a config.json, its norms, biases and logits not at rest."""
    config = family_of_files(hf).config.from_hf(hf)

    def make() -> Any:
        target = family_of(config).model(config, jax.random.key(seed))
        for i, (path, node) in enumerate(nnx.iter_graph(target)):
            if isinstance(node, nnx.Param) and (len(node.axes) == 1 or path[-1] == "bias"):  # a norm, a bias or sinks
                node[...] += 0.3 * jax.random.normal(jax.random.key(i), node.shape)
        return target

    return jax.jit(make)()


def torch_family(hf: dict[str, Any], folder: Path, seed: int = 0) -> PreTrainedModel:
    """A random transformers model of a config.json, saved to a folder; its logits are of size 1, nothing is at rest."""
    import torch
    import transformers

    torch.set_num_threads(1)  # see test_llama.py
    torch.manual_seed(seed)
    config = transformers.CONFIG_MAPPING[hf["model_type"]](**{k: v for k, v in hf.items() if k != "model_type"})
    config.initializer_range = 0.15
    model = getattr(transformers, hf["architectures"][0])._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("bias", "sinks")):
                value.normal_(std=4.0 if "gate_up" in name else 1.0)  # beyond the limits of the clamped SwiGLU
            elif "norm" in name:
                value += torch.empty_like(value).uniform_(-0.5, 0.5)
    model.save_pretrained(folder)
    return model
