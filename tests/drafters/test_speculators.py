"""EAGLE-3 in `speculators`: our export there, and its own drafter here, give the same hidden states and logits.

`make speculators` writes the values, in an environment of its own; speculators/make.py is its script.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fasteagle_jax.commands.import_drafter import _feature_layers, _tensors, eagle3_config
from fasteagle_jax.drafters.eagle3 import Eagle3
from fasteagle_jax.drafters.exports import export_drafter
from fasteagle_jax.drafters.files import fill
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.targets.llama import LlamaConfig

HERE = Path(__file__).parent / "speculators"
TARGET = LlamaConfig(259, 16, 32, 12, 4, 2, 8, max_positions=16384)
IDS = np.arange(0, 259, 3)


def ours() -> Eagle3:
    """The drafter that is exported, a random one with a draft vocabulary and a rotary embedding of its own."""
    rope = RopeConfig(theta=5e5, kind="llama3", factor=8.0)
    config = default_config(TARGET, kind="eagle3", draft_vocab_size=len(IDS), rope=rope, num_levels=3)
    drafter = jax.jit(lambda: Eagle3(config, jax.random.key(0), stacked=False))()
    drafter.token_ids[...] = jnp.asarray(IDS, jnp.int32)
    for name in ("norm", "hidden_norm", "embedding_norm", "mlp_norm"):
        weight = getattr(drafter, name).weight
        weight[...] = weight[...] + 0.25 * jnp.arange(len(weight[...])) / 16
    return drafter


def write(folder: Path) -> None:
    verifier = {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
    export_drafter(ours(), folder, "speculators", TARGET, verifier)


def imported(folder: Path) -> Eagle3:
    """The drafter in a folder of speculators', in float32, its target's embedding left out."""
    raw, tensors = json.loads((folder / "config.json").read_text()), _tensors(folder)
    layers, guess = _feature_layers(raw, TARGET.num_layers)
    assert not guess
    config = eagle3_config(raw, tensors, TARGET, 3, layers)
    drafter = Eagle3(config, jax.random.key(0), stacked=False)
    tensors.pop("t2d")
    fill(drafter, tensors, str(folder))
    return drafter


def states(drafter: Eagle3, values: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """The head's inputs and the logits of every run."""
    tokens = jnp.asarray(values["tokens"], jnp.int32)
    index = jnp.arange(tokens.shape[1])
    distance = index[:, None] - index
    window = drafter.config.window or len(index)
    visible = ((distance >= 0) & (distance < window))[None]
    following = jnp.concatenate([tokens, jnp.zeros((1, 3), tokens.dtype)], axis=1)[:, : len(index)]

    @jax.jit
    def run(drafter: Eagle3, features: jax.Array, embedding: jax.Array) -> tuple[Any, Any]:
        hidden, _ = drafter.hidden_states(embedding, features, following, index[None], visible)
        hidden = jnp.stack(hidden)[:, 0]
        return hidden, jnp.einsum("nth,vh->ntv", hidden, drafter.own_head())

    return run(drafter, jnp.asarray(values["features"]), jnp.asarray(values["embedding"]))


@pytest.mark.parametrize("name", ["ours", "theirs"])
def test_hidden_states_and_logits_are_those_of_speculators(name):
    values = load_file(HERE / "values.safetensors")
    hidden, logits = states(imported(HERE / name), values)
    for j in range(3):  # speculators pads what lies past the end by zeros, and we by the text's beginning
        real = values["tokens"].shape[1] - j
        np.testing.assert_allclose(hidden[j, :real], values[f"{name}.hidden"][j, :real], rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(logits[j, :real], values[f"{name}.logits"][j, :real], rtol=1e-4, atol=2e-5)


def test_the_drafter_of_speculators_has_every_change_that_is_known():
    config = imported(HERE / "theirs").config
    assert config.norm_before_residual and config.fc_norm and config.norm_output and config.window == 5
    assert config.feature_layers == (1, 5, 10) and config.num_heads == 2


def test_the_export_that_speculators_read_is_the_one_that_is_written_now(tmp_path):
    write(tmp_path / "ours")
    assert (tmp_path / "ours" / "config.json").read_text() == (HERE / "ours" / "config.json").read_text()
    now, then = (load_file(folder / "ours" / "model.safetensors") for folder in (tmp_path, HERE))
    assert now.keys() == then.keys()
    for name, value in now.items():
        np.testing.assert_array_equal(value, then[name])


if __name__ == "__main__":  # before `make speculators`
    shutil.rmtree(HERE / "ours", ignore_errors=True)
    write(HERE / "ours")
