"""A FastEagle drafter for Llama-3.3-70B-Instruct.

    python -m train.prepare_data --target meta-llama/Llama-3.3-70B-Instruct --prompts PROMPTS \
        --output runs/data/llama33_70b.jsonl
    python -m train.drafter --config configs/llama33_70b.py --run runs/llama33_70b

Needs accelerators that hold the target in bfloat16 (141 GB), the drafter and its optimiser in float32.
Sizes: the published config.json of meta-llama/Llama-3.3-70B-Instruct. Optimiser, draft vocabulary and length:
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
        target="meta-llama/Llama-3.3-70B-Instruct",
        target_config=LlamaConfig(
            vocab_size=128_256,
            hidden_size=8192,
            intermediate_size=28_672,
            num_layers=80,
            num_heads=64,
            num_kv_heads=8,
            head_dim=128,
            rms_norm_eps=1e-05,
            max_positions=131_072,
            rope=RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_max_positions=8192),
        ),
        data=("runs/data/llama33_70b.jsonl",),
        steps=100_000,
        batch_size=16,
        mesh=MeshShape(fsdp=4, tensor=4),  # v5p-32 (16 chips, 4 hosts)
        remat="full",
        length=2048,
        drafter=DrafterChoice(num_levels=7, draft_vocab_size=32_000, window=2048),
        loss=LossConfig(chunk=2048),  # 512 rows a chip: each chunk reads the head anew
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=2_000),
    )
