"""A FastEagle drafter for Vicuna-13B v1.3.

    python -m train.prepare_data --target lmsys/vicuna-13b-v1.3 --prompts PROMPTS --output runs/data/vicuna_13b.jsonl
    python -m train.drafter --config configs/vicuna_13b.py --run runs/vicuna_13b

Needs an accelerator that holds the target in bfloat16 (26 GB), the drafter and its optimiser in float32.
Sizes, optimiser, draft vocabulary and length: fasteagle_jax/compiling/published.py.
"""

from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.training.config import RunConfig


def get_config() -> RunConfig:
    return PUBLISHED["vicuna_13b"]
