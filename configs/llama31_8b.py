"""A FastEagle drafter for Llama-3.1-8B-Instruct.

    python -m train.prepare_data --target meta-llama/Llama-3.1-8B-Instruct --prompts PROMPTS \
        --output runs/data/llama31_8b.jsonl
    python -m train.drafter --config configs/llama31_8b.py --run runs/llama31_8b

Needs an accelerator that holds the target in bfloat16 (16 GB), the drafter and its optimiser in float32.
Sizes: the published config.json of meta-llama/Llama-3.1-8B-Instruct. Optimiser, draft vocabulary and length:
EAGLE-3's (arXiv 2503.01840).
"""

from fasteagle_jax.devices.sharding import MeshShape
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.targets.llama import LlamaConfig
from fasteagle_jax.training.config import DrafterChoice, RunConfig
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig


def get_config() -> RunConfig:
    return RunConfig(
        target="meta-llama/Llama-3.1-8B-Instruct",
        target_config=LlamaConfig(
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_layers=32,
            num_heads=32,
            num_kv_heads=8,
            head_dim=128,
            rms_norm_eps=1e-05,
            max_positions=131_072,
            rope=RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_positions=8192),
        ),
        data=("runs/data/llama31_8b.jsonl",),
        steps=100_000,
        batch_size=8,
        mesh=MeshShape(fsdp=8),  # v5e-8 (one host)
        remat="full",
        length=2048,
        drafter=DrafterChoice(num_levels=7, draft_vocab_size=32_000, window=2048),
        loss=LossConfig(chunk=2048),  # 256 rows a chip: each chunk reads the head anew
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=2_000),
    )
