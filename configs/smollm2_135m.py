"""A FastEagle drafter for SmolLM2-135M-Instruct, small enough to train on a CPU.

    python -m train.prepare_data --dialogues sharegpt --max-length 1024 --output runs/data/sharegpt.jsonl
    python -m train.drafter --config configs/smollm2_135m.py --run runs/smollm2_135m

Any machine; 510 to 1,100 training tokens a second on two CPU cores (train/README.md).
"""

from fasteagle_jax.training.config import DrafterChoice, RunConfig
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig


def get_config() -> RunConfig:
    return RunConfig(
        target="smollm2-135m",
        data=("runs/data/sharegpt.jsonl",),
        steps=20_000,
        batch_size=2,
        length=512,
        drafter=DrafterChoice(
            num_levels=5, draft_vocab_size=8192, reinject=True, correction=576, window=512, from_target=True
        ),
        loss=LossConfig(level_decay=0.5, share=0.5, chunk=512),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=50, ema=0.998),
    )
