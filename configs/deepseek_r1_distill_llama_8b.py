"""A FastEagle drafter for DeepSeek-R1-Distill-Llama-8B.

    python -m train.prepare_data --target deepseek-ai/DeepSeek-R1-Distill-Llama-8B --prompts PROMPTS \
        --output runs/data/deepseek_r1_distill_llama_8b.jsonl
    python -m train.drafter --config configs/deepseek_r1_distill_llama_8b.py --run runs/deepseek_r1_distill_llama_8b

Needs an accelerator that holds the target in bfloat16 (16 GB), the drafter and its optimiser in float32.
Sizes, optimiser, draft vocabulary and length: fasteagle_jax/compiling/published.py.
"""

from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.training.config import RunConfig


def get_config() -> RunConfig:
    return PUBLISHED["deepseek_r1_distill_llama_8b"]
