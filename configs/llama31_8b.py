"""A FastEagle drafter for Llama-3.1-8B-Instruct.

    python -m train.prepare_data --target meta-llama/Llama-3.1-8B-Instruct --prompts PROMPTS \
        --output runs/data/llama31_8b.jsonl
    python -m train.drafter --config configs/llama31_8b.py --run runs/llama31_8b

Needs an accelerator that holds the target in bfloat16 (16 GB), the drafter and its optimiser in float32.
Sizes, optimiser, draft vocabulary and length: fasteagle_jax/compiling/published.py.
"""

from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.training.config import RunConfig


def get_config() -> RunConfig:
    return PUBLISHED["llama31_8b"]
