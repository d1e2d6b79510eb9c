"""A run of seconds, for the tests: a few levels on whatever small target and data are named.

python -m train.drafter --config configs/tiny.py --run runs/tiny target=FOLDER data=FILE
"""

from fasteagle_jax.training.config import DrafterChoice, RunConfig
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig


def get_config() -> RunConfig:
    return RunConfig(
        target="tiny",
        data=("tiny.jsonl",),
        steps=12,
        batch_size=2,
        length=48,
        dtype="float32",
        drafter=DrafterChoice(num_levels=3, reinject=True, correction=24),
        loss=LossConfig(share=0.5, chunk=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=2),
        save_every=4,
    )
