"""The reader of FastEagle's folders in plain torch, in examples/, gives the logits that we give."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.drafters import files
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.files import load_drafter, save_drafter
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.rope import RopeConfig
from tests.tiny_models import tiny_config, tiny_target

T, N, V = 11, 3, 40
IDS = np.arange(1, V, 2)
READER = Path(__file__).parents[2] / "examples" / "fasteagle_torch.py"
LLAMA3 = RopeConfig(theta=1e4, kind="llama3", factor=4.0, original_max_positions=64)
VARIANTS = {
    "the paper's": {},
    "corrected": {"reinject": True, "correction": 12, "window": 4, "rope": LLAMA3, "draft_vocab_size": len(IDS)},
    "cheap": {
        "context": "target",
        "levels": "shared",
        "side_by_side": True,
        "edges": 6,
        "edges_reach": 2,
        "edges_gated": True,
        "head": "own",
        "draft_vocab_size": len(IDS),
        "sinks": True,
    },
    "the first level's keys": {
        "context": "shared",
        "norm_inputs": True,
        "reinject": True,
        "window": 4,
        "edges": 6,
        "levels": "first",
    },
}


def random_drafter(changes) -> FastEagle:
    """A drafter in which no weight is at a special value."""
    config = default_config(tiny_config(), num_levels=N, feature_layers=(1, 3), **changes)

    def make() -> FastEagle:
        made = FastEagle(config, jax.random.key(1), stacked=False)
        graph, params, rest = nnx.split(made, nnx.Param, ...)
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(2), len(leaves))
        leaves = [p + 0.1 * jax.random.normal(key, p.shape) for p, key in zip(leaves, keys, strict=True)]
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves), rest)

    made = jax.jit(make)()
    if made.token_ids is not None:
        made.token_ids[...] = jnp.asarray(IDS, jnp.int32)
    return made


@pytest.mark.torch
@pytest.mark.parametrize("storage", ["float32", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name != "cheap"), "cheap"]
)
def test_the_reader_in_torch_gives_our_logits(tmp_path, name, storage):
    import torch

    spec = importlib.util.spec_from_file_location("fasteagle_torch", READER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    target = tiny_target()
    save_drafter(random_drafter(VARIANTS[name]), tmp_path / "drafter", "x", {}, storage)
    drafter = load_drafter(tmp_path / "drafter", target.config, "x", stacked=False)
    tokens = jax.random.randint(jax.random.key(5), (1, T + 1), 0, V)
    positions = jnp.arange(T)[None]
    causal = jnp.tril(jnp.ones((T, T), bool))[None]
    layers = drafter.context_layers

    @jax.jit
    def ours(drafter):
        inputs = target(tokens[:, :-1], positions, causal, None, drafter.config.input_layers).features
        features = inputs[..., : 2 * target.config.hidden_size]
        context = tuple(
            target.keys_values(layer, inputs[..., -target.config.hidden_size :], positions) for layer in layers
        )
        visible = causal
        if drafter.config.window is not None:
            visible &= positions[:, :, None] - positions[:, None] < drafter.config.window
        embedding = target.embedding[...]
        hidden, _ = drafter.hidden_states(embedding, features, tokens[:, 1:], positions, visible, context=context)
        vocab = drafter.vocab_weights(target)
        hidden = jnp.stack(list(hidden))[:, 0]
        size = target.config.hidden_size
        logits = hidden[..., :size] @ vocab.head.T
        if drafter.edges is not None:
            logits += hidden[..., size:] @ drafter.edges.table[...].T
        return logits, features, context

    logits, features, context = jax.tree.map(np.asarray, ours(drafter))
    reader = module.FastEagle(tmp_path / "drafter")
    tensor = lambda x: torch.from_numpy(np.array(x))  # noqa: E731
    own = tuple(tensor(part[0]) for part in context[0]) if layers else None
    head = tensor(target.head_rows())
    found = reader.logits(tensor(features[0]), tensor(tokens[0, 1:]).long(), tensor(target.embedding[...]), head, own)
    for i in range(N):
        np.testing.assert_allclose(found[i, : T - i], logits[i, : T - i], rtol=1e-4, atol=1e-4)
    assert reader.token_ids.tolist() == (IDS.tolist() if "draft_vocab_size" in VARIANTS[name] else list(range(V)))


def test_a_folder_of_a_later_format_is_refused_with_the_remedy(tmp_path):
    save_drafter(random_drafter({}), tmp_path / "drafter", "x", {})
    config = tmp_path / "drafter" / "config.json"
    raw = json.loads(config.read_text())
    assert raw["format"] == 1 and files.FORMAT == 2  # which is int8's
    config.write_text(json.dumps(raw | {"format": 3}))
    with pytest.raises(UserError, match="of format 3, this version reads up to 2: update fasteagle-jax"):
        load_drafter(tmp_path / "drafter", tiny_config(), "x")
    del raw["format"]  # written before there were numbers
    config.write_text(json.dumps(raw))
    assert load_drafter(tmp_path / "drafter", tiny_config(), "x").num_levels == N
