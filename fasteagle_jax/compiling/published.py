"""Training runs for published targets, whose sizes alone are needed to compile their programs.

Sizes are those of the targets' config.json at the hub; optimizer, draft vocabulary and length are EAGLE-3's
(arXiv 2503.01840). configs/ starts some of these runs.
"""

from __future__ import annotations

from typing import Any

from fasteagle_jax.devices.sharding import MeshShape
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.targets.config import DecoderConfig
from fasteagle_jax.targets.gemma import Gemma3Config
from fasteagle_jax.targets.gpt_oss import GptOssConfig
from fasteagle_jax.targets.llama import LlamaConfig
from fasteagle_jax.targets.mistral import MistralConfig
from fasteagle_jax.targets.qwen import Qwen3Config
from fasteagle_jax.targets.qwen_moe import Qwen3MoeConfig
from fasteagle_jax.training.config import DrafterChoice, RunConfig
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig

_LLAMA3_ROPE = RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_positions=8192)
_LLAMA3: dict[str, Any] = dict(
    vocab_size=128_256,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-05,
    max_positions=131_072,
    rope=_LLAMA3_ROPE,
)
# The other tokens of a large vocabulary are drafted too rarely to be worth their rows; long rows see a window.
_LLAMA3_DRAFTER = DrafterChoice(num_levels=7, draft_vocab_size=32_000, window=2048)


def _run(name: str, target: str, sizes: DecoderConfig, **changes: Any) -> RunConfig:
    recipe: dict[str, Any] = dict(
        data=(f"runs/data/{name}.jsonl",),
        steps=100_000,
        batch_size=8,
        mesh=MeshShape(fsdp=8),  # v5e-8 (one host)
        remat="full",
        length=2048,
        drafter=_LLAMA3_DRAFTER,
        loss=LossConfig(chunk=2048),  # 256 rows a chip (512 of 70B): each chunk reads the head anew
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=2_000),
    )
    return RunConfig(target=target, target_config=sizes, **recipe | changes)


_LLAMA_8B = LlamaConfig(hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32, **_LLAMA3)
_LLAMA_70B = LlamaConfig(hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64, **_LLAMA3)
_VICUNA_13B = LlamaConfig(
    vocab_size=32_000,
    hidden_size=5120,
    intermediate_size=13_824,
    num_layers=40,
    num_heads=40,
    num_kv_heads=40,
    head_dim=128,
    rms_norm_eps=1e-06,
    max_positions=2048,
)

_QWEN3: dict[str, Any] = dict(
    vocab_size=151_936,
    head_dim=128,
    num_attention_heads=32,
    rms_norm_eps=1e-06,
    rope_theta=1_000_000.0,
    max_position_embeddings=40_960,
)
_QWEN3_8B = Qwen3Config.from_hf(
    _QWEN3 | dict(hidden_size=4096, intermediate_size=12_288, num_hidden_layers=36, num_key_value_heads=8)
)
_QWEN3_30B_A3B = Qwen3MoeConfig.from_hf(
    _QWEN3
    | dict(
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=48,
        num_key_value_heads=4,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
)
_GPT_OSS_20B = GptOssConfig.from_hf(
    dict(
        vocab_size=201_088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_local_experts=32,
        swiglu_limit=7.0,
    )
)
_MISTRAL_7B = MistralConfig.from_hf(
    dict(
        vocab_size=32_768,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-05,
        rope_theta=1_000_000.0,
        max_position_embeddings=32_768,
        sliding_window=None,
    )
)
_GEMMA3_12B = Gemma3Config.from_hf(
    dict(
        hidden_size=3840,
        intermediate_size=15_360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        sliding_window=1024,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
    )
)

PUBLISHED = {
    "llama31_8b": _run("llama31_8b", "meta-llama/Llama-3.1-8B-Instruct", _LLAMA_8B),
    "deepseek_r1_distill_llama_8b": _run(
        "deepseek_r1_distill_llama_8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", _LLAMA_8B
    ),
    "vicuna_13b": _run("vicuna_13b", "lmsys/vicuna-13b-v1.3", _VICUNA_13B, drafter=DrafterChoice(num_levels=7)),
    "llama33_70b": _run(
        "llama33_70b",
        "meta-llama/Llama-3.3-70B-Instruct",
        _LLAMA_70B,
        batch_size=16,
        mesh=MeshShape(fsdp=4, tensor=4),  # v5p-32 (16 chips, 4 hosts)
    ),
    "qwen3_8b": _run("qwen3_8b", "Qwen/Qwen3-8B", _QWEN3_8B),
    "qwen3_30b_a3b": _run("qwen3_30b_a3b", "Qwen/Qwen3-30B-A3B", _QWEN3_30B_A3B, mesh=MeshShape(fsdp=2, tensor=4)),
    "gpt_oss_20b": _run("gpt_oss_20b", "openai/gpt-oss-20b", _GPT_OSS_20B, mesh=MeshShape(fsdp=2, tensor=4)),
    "mistral_7b": _run(
        "mistral_7b",
        "mistralai/Mistral-7B-Instruct-v0.3",
        _MISTRAL_7B,
        drafter=DrafterChoice(num_levels=7, window=2048),
    ),
    "gemma3_12b": _run("gemma3_12b", "google/gemma-3-12b-it", _GEMMA3_12B),
}
