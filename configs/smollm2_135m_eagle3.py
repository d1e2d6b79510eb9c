"""EAGLE-3 for SmolLM2-135M-Instruct: the baseline of configs/smollm2_135m.py, on the same data.

    python -m train.prepare_data --dialogues sharegpt --max-length 1024 --output runs/data/sharegpt.jsonl
    python -m train.drafter --config configs/smollm2_135m_eagle3.py --run runs/smollm2_135m_eagle3

Any machine with 8 GB. Its level weights: docs/results.md, "EAGLE-3's level weights".
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
        drafter=DrafterChoice(kind="eagle3", num_levels=7, draft_vocab_size=8192, from_target=True),
        loss=LossConfig(level_decay=0.5, share=0.5, within_draft=True, chunk=512),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=50, ema=0.998),
    )
