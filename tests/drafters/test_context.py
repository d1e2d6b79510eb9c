"""A drafter that reads the target's own keys and values, through `context_layers`, in decoding and in training."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.data.packing import Batch
from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import Draft, TreeSpec, build
from fasteagle_jax.drafters.base import DrafterConfig, DrafterModule, draft_ids, pending, rank
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.nn.attention import Past
from fasteagle_jax.nn.kv_cache import Cache
from fasteagle_jax.nn.linear import Linear
from fasteagle_jax.training import step
from fasteagle_jax.training.losses import LossConfig
from tests.tiny_models import tiny_target

N, LAYER, MAX_NEW, CHUNK = 2, 3, 12, 8


class ReadsContext(DrafterModule):
    """Guesses from the newest committed position's keys and values in one layer of the target; has no cache."""

    context_layers = (LAYER,)
    Config = DrafterConfig

    def __init__(self, config: DrafterConfig, key: jax.Array, dtype: Any = jnp.float32):
        super().__init__(config, key, dtype)
        width = 2 * config.num_kv_heads * config.head_dim
        keys = jax.random.split(key, N)
        self.maps = nnx.List([Linear(width, config.hidden_size, ("embed", "fused"), k) for k in keys])

    def states(self, k: jax.Array, v: jax.Array) -> list[jax.Array]:
        """The head's input [..., H] of each level, from keys and values [..., K, D]."""
        both = jnp.concatenate([k, v], axis=-1)
        return [level(both.reshape(*both.shape[:-2], -1)) for level in self.maps]

    def vocab_weights(self, target: Any) -> VocabWeights:
        return VocabWeights(target.embedding[...], target.head_rows(), None, target.logit_map)

    def empty_cache(self, batch: int, num_slots: int, most_written: int) -> Cache:
        return Cache([], [], jnp.zeros((batch,), jnp.int32))

    def extend(self, vocab, new: Accepted, cache: Cache, num_levels: int, context: tuple[Past, ...] = ()) -> Cache:
        return cache._replace(length=cache.length + new.count)

    def skip(self, new: Accepted, cache: Cache) -> Cache:
        return cache._replace(length=cache.length + new.count)

    def draft(
        self, vocab, new: Accepted, cache: Cache, tree: TreeSpec, ranking: Ranking, context: tuple[Past, ...] = ()
    ) -> tuple[Draft, Cache]:
        (past,), cache = context, self.skip(new, cache)
        newest = past.seen[:, 0].sum(axis=-1) - 1  # position n - 1, of n that are committed
        k, v = (jnp.take_along_axis(x, newest[:, None, None, None], axis=2)[:, :, 0] for x in (past.k, past.v))
        logits = vocab.logits(jnp.stack(self.states(k, v), axis=1))  # [B, N, V]
        positions = cache.length[:, None] + 1 + jnp.arange(N)
        return build(tree, pending(new), rank(logits, positions, draft_ids(vocab), ranking)), cache

    def hidden_states(self, embedding, features, next_tokens, positions, visible, *, context=(), remat=None):
        ((k, v),) = context
        return self.states(k.swapaxes(1, 2), v.swapaxes(1, 2)), None

    def own_head(self) -> None:
        return None


@pytest.fixture(scope="module", params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["stacked", "list"])
def target(request):
    return tiny_target(stacked=request.param)


@pytest.fixture(scope="module")
def drafter(target):
    config = default_config(target.config, num_levels=N, feature_layers=(1,))
    sizes = {field.name: getattr(config, field.name) for field in dataclasses.fields(DrafterConfig)}
    return jax.jit(lambda: ReadsContext(DrafterConfig(**sizes), jax.random.key(1)))()


def test_decoding_with_it_is_plain_decoding(target, drafter):
    prompts, sampling = [[1, 2, 3], [4] * 11], make_sampling(2, temperature=[0.0, 1.0], seed=[0, 7])
    sizes = dict(max_new=MAX_NEW, chunk=CHUNK)
    plain = generate(target, None, prompts, sampling, **sizes)
    drafted = generate(target, drafter, prompts, sampling, tree=TreeSpec("best_first", 5), **sizes)
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)


def test_training_gives_it_the_keys_and_values_that_decoding_does(target, drafter, monkeypatch):
    """The states of a text's every position: those of training, and those a draft makes after each prefix."""
    text = np.random.default_rng(2).integers(target.config.vocab_size, size=10)
    arrays = text, np.arange(10), np.ones(10, int), np.ones(10, bool)
    batch = Batch(*(x[None] for x in arrays))

    @jax.jit
    def trained_states(drafter, target):
        hidden = []
        with monkeypatch.context() as patch:
            patch.setattr(step, "level_loss", lambda states, *rest: hidden.append(states) or (0.0, None))
            step.drafter_loss(drafter, target, batch, jax.random.key(0), LossConfig())
        return hidden[0]

    drafts, n = [], 9  # in two chunks

    def noted(self, k, v):
        jax.debug.callback(lambda *both: drafts.append(both), k, v)
        return STATES(self, k, v)

    monkeypatch.setattr(ReadsContext, "states", noted)
    generate(target, drafter, [text[:n].tolist()], make_sampling(1), max_new=2, chunk=CHUNK, tree=TreeSpec())
    jax.effects_barrier()
    monkeypatch.undo()
    ((k, v),) = drafts
    for trained, drafted in zip(trained_states(drafter, target), STATES(drafter, k, v), strict=True):
        np.testing.assert_allclose(drafted[0], trained[0, n - 1], rtol=1e-4, atol=1e-5)


STATES = ReadsContext.states
