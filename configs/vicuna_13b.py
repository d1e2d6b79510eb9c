"""A FastEagle drafter for Vicuna-13B v1.3.

    python -m train.prepare_data --target lmsys/vicuna-13b-v1.3 --prompts PROMPTS --output runs/data/vicuna_13b.jsonl
    python -m train.drafter --config configs/vicuna_13b.py --run runs/vicuna_13b

Needs an accelerator that holds the target in bfloat16 (26 GB), the drafter and its optimiser in float32.
Sizes: the published config.json of lmsys/vicuna-13b-v1.3. Optimiser, draft vocabulary and length: EAGLE-3's (arXiv
2503.01840).
"""

from fasteagle_jax.devices.sharding import MeshShape
from fasteagle_jax.targets.llama import LlamaConfig
from fasteagle_jax.training.config import DrafterChoice, RunConfig
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig


def get_config() -> RunConfig:
    return RunConfig(
        target="lmsys/vicuna-13b-v1.3",
        target_config=LlamaConfig(
            vocab_size=32_000,
            hidden_size=5120,
            intermediate_size=13_824,
            num_layers=40,
            num_heads=40,
            num_kv_heads=40,
            head_dim=128,
            rms_norm_eps=1e-06,
            max_positions=2048,
        ),
        data=("runs/data/vicuna_13b.jsonl",),
        steps=100_000,
        batch_size=8,
        mesh=MeshShape(fsdp=8),  # v5e-8 (one host)
        remat="full",
        length=2048,
        drafter=DrafterChoice(num_levels=7),
        loss=LossConfig(chunk=2048),  # 256 rows a chip: each chunk reads the head anew
        optimizer=OptimizerConfig(learning_rate=5e-5, warmup_steps=2_000),
    )
