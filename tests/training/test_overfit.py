"""A drafter that sees the same few conversations again and again knows them by heart, and decodes so."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.packing import PackedData
from fasteagle_jax.decoding.acceptance import measure_acceptance
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.training.config import apply_changes, drafter_config, load_config
from fasteagle_jax.training.init import feature_rms, init_drafter
from fasteagle_jax.training.optimizer import make_optimizer
from fasteagle_jax.training.step import first_state, make_train_step
from tests.tiny_models import tiny_target

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.py"
CHANGES = (
    "length=64",
    "optimizer.learning_rate=1.5e-2",
    "drafter.intermediate_size=256",  # memory
    "loss.share=1.0",
    "loss.chunk=1024",
    "loss.level_decay=1.0",  # all levels alike
)
PROMPT, ANSWER = 6, 25


@pytest.mark.slow  # in short, tests/decoding/test_speculative.py: training makes rounds fewer
@pytest.mark.parametrize(("num", "steps"), [(8, 120), (32, 300)])
def test_conversations_are_learnt_by_heart_by_every_level_and_then_drafted_almost_whole(num: int, steps: int) -> None:
    # Two fit into a row: all conversations in every batch.
    config = apply_changes(load_config(str(CONFIG)), (*CHANGES, f"batch_size={num // 2}", f"steps={steps}"))
    target = tiny_target(stacked=False, num_layers=2, sharpness=6.0)  # whose second choices are far behind
    rng = np.random.default_rng(0)
    prompts = [rng.integers(40, size=PROMPT).tolist() for _ in range(num)]
    said = generate(target, None, prompts, make_sampling(num), max_new=ANSWER, tree=TreeSpec.parse("chain"), chunk=8)
    texts = [prompt + np.asarray(answer)[:ANSWER].tolist() for prompt, answer in zip(prompts, said.tokens, strict=True)]
    samples = [Conversation.of(f"{i}", text, [[PROMPT, len(text)]]) for i, text in enumerate(texts)]
    data = PackedData(samples, config.length, config.batch_size, config.seed)
    assert data.num_batches_per_epoch(0) == 1

    sizes = drafter_config(config.drafter, target.config)

    @jax.jit
    def first_drafter(target, batch):
        rms = feature_rms(target, batch, sizes.feature_layers)
        return init_drafter(sizes, target, jax.random.key(0), feature_rms=rms, from_target=False)

    drafter = first_drafter(target, data.batch(0))
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step = make_train_step(graph, optimizer, config.loss, jnp.float32, config.seed)
    state = first_state(params, optimizer)
    for i in range(config.steps):
        state, result = step(state, constants, target, jax.tree.map(jnp.asarray, data.batch(i)))
    assert result.metrics.accuracy.min() > 0.95, result.metrics.accuracy

    drafter = nnx.merge(graph, state.params, constants)
    found = measure_acceptance(target, drafter, prompts, TreeSpec.parse("chain"), max_new=ANSWER, batch_size=num)
    assert found.length > 0.9 * (drafter.num_levels + 1), found
