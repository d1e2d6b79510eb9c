"""A FastEagle drafter for Llama-3.3-70B-Instruct.

    python -m train.prepare_data --target meta-llama/Llama-3.3-70B-Instruct --prompts PROMPTS \
        --output runs/data/llama33_70b.jsonl
    python -m train.drafter --config configs/llama33_70b.py --run runs/llama33_70b

Needs accelerators that hold the target in bfloat16 (141 GB), the drafter and its optimiser in float32.
Sizes, optimiser, draft vocabulary and length: fasteagle_jax/compiling/published.py.
"""

from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.training.config import RunConfig


def get_config() -> RunConfig:
    return PUBLISHED["llama33_70b"]
