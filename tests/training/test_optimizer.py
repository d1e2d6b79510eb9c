"""The rates of a drafter's parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.training.deepkd import DeepKD, Parts
from fasteagle_jax.training.init import init_drafter
from fasteagle_jax.training.optimizer import OptimizerConfig, make_optimizer
from tests.tiny_models import tiny_target

CASES = [("adamw", None), ("muon", None), ("adamw", DeepKD())]


@pytest.mark.parametrize("kind", ["fasteagle", "eagle3"])
@pytest.mark.parametrize("name, deepkd", CASES, ids=["adamw", "muon", "deepkd"])
def test_the_maps_that_write_the_stream_have_a_rate_of_their_own(name, deepkd, kind):
    target = tiny_target()
    switches = {"reinject": True, "edges": 4} if kind == "fasteagle" else {}
    drafter = init_drafter(default_config(target.config, kind, **switches), target, jax.random.key(0))
    params = nnx.state(drafter, nnx.Param)
    gradient = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)

    def first_step(input_rate):
        rule = make_optimizer(OptimizerConfig(name, warmup_steps=0, input_rate=input_rate), 100, deepkd)
        given = gradient if deepkd is None else Parts(gradient, gradient, gradient)
        updates, state = rule.update(given, rule.init(params), params)
        assert deepkd is None or state.signal_to_noise.shape == (3,)  # which a step records
        return updates

    plain, changed = (jax.tree.leaves_with_path(first_step(rate)) for rate in (1.0, 4.0))
    quicker = set()
    for (path, a), (_, b) in zip(plain, changed, strict=True):
        assert jnp.abs(a).max() > 0
        factor = float(jnp.abs(b).max() / jnp.abs(a).max())
        np.testing.assert_allclose(b, factor * a, rtol=1e-5, atol=1e-12)
        if factor > 2:
            assert factor == pytest.approx(4)
            found = {part for part in ("fc", "fuse", "reinject") if f"['{part}']" in jax.tree_util.keystr(path)}
            assert len(found) == 1, path
            quicker |= found
        else:
            assert factor == pytest.approx(1)
    assert quicker == ({"fc", "fuse", "reinject"} if kind == "fasteagle" else {"fc"})


def test_a_rate_of_zero_is_refused():
    with pytest.raises(UserError, match="input_rate is 0"):
        OptimizerConfig(input_rate=0)
