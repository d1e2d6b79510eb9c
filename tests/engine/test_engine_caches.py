"""An engine whose target's cache is int8 or has rings answers each request as plain decoding of it alone does.

More prompts than slots, shared beginnings that the prefix cache keeps, prompts prefilled together, rows that come and
go: all of it moves caches.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_folder import make_drafter, make_target

from fasteagle_jax import Engine, SamplingParams, UserError
from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate_jit
from fasteagle_jax.decoding.state import make_stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.engine.requests import sample_seed
from fasteagle_jax.targets.tokenizer import load_tokenizer
from tests.decoding.test_families import random_drafter
from tests.tiny_families import hf_config, tiny_family

MAX_LEN, MAX_NEW, CHUNK = 160, 24, 16
CONTEXT = dict(context="target", levels="shared", side_by_side=True, reinject=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(make_target(tmp_path_factory.mktemp("caches") / "target"))


def target_of(tokenizer, name: str, *, stacked: bool, cache_dtype):
    """Of a window that all texts exceed."""
    sizes = {"vocab_size": len(tokenizer), "sliding_window": 12, "hidden_size": 32, "num_hidden_layers": 4}
    target = tiny_family(hf_config(name, 1) | sizes)
    target = target if stacked else target.unstacked()
    target.cache_dtype = cache_dtype
    return target


def alone(target, prompt, params) -> list[int]:
    tokens, _ = pad_prompts([prompt + [0] * (MAX_LEN - len(prompt))], CHUNK)
    sampling = make_sampling(1, temperature=params.temperature, seed=sample_seed(params.seed, 0))
    sizes = dict(max_new=MAX_NEW, tree=TreeSpec(), chunk=CHUNK)
    made = generate_jit(target, None, tokens, jnp.asarray([len(prompt)]), sampling, make_stop(1, MAX_NEW), **sizes)
    return np.asarray(made.tokens)[0].tolist()


# A list of local and global layers, all layers local, and both with a drafter that reads the target's cache.
CASES = {
    "gemma3, int8": ("gemma3", False, jnp.int8, {}),
    "gemma3": ("gemma3", False, None, CONTEXT),
    "mistral": ("mistral", False, None, {}),
    "gemma3, int8, stacked": ("gemma3", True, jnp.int8, CONTEXT),
    "gemma3, stacked": ("gemma3", True, None, {}),
    "mistral, int8, stacked": ("mistral", True, jnp.int8, CONTEXT),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_each_request_alone(tokenizer, case):
    name, stacked, cache_dtype, changes = CASES[case]
    target = target_of(tokenizer, name, stacked=stacked, cache_dtype=cache_dtype)
    sizes = dict(slots=5, max_len=MAX_LEN, tree="best_first:8", chunk=CHUNK)
    engine = Engine(target, random_drafter(target, **changes), tokenizer, (), **sizes)
    assert engine.row_counts == (5, 2)
    rng = np.random.default_rng(2)
    beginning = rng.integers(256, size=3 * CHUNK).tolist()
    own = [rng.integers(256, size=n).tolist() for n in (3, 30, 100, 7, 70, 21, 40, 90)]
    prompts = own[:4] + [beginning + tail for tail in own[:4]] + own[4:]
    params = [
        SamplingParams(temperature=[0.0, 0.8, 30.0][i % 3], seed=i, max_new_tokens=4 + 20 * (i % 2), ignore_eos=True)
        for i in range(len(prompts))
    ]
    plain = [alone(target, *one)[: one[1].max_new_tokens] for one in zip(prompts, params, strict=True)]
    for _ in range(2):  # the second time beginnings are in the prefix cache
        answers = engine.generate(prompts, params)
        for answer, expected in zip(answers, plain, strict=True):
            assert list(answer.tokens) == expected
    assert any(depth > 0 for answer in answers for depth in answer.depths)  # something was at stake


def test_a_loaded_engine_states_what_an_int8_cache_takes_and_answers_by_it(tmp_path):
    folder = make_target(tmp_path / "target")
    drafter = make_drafter(tmp_path / "drafter", folder)
    load = functools.partial(Engine.load, str(folder), slots=2, max_len=128)
    exact, rounded = load(None), load(None, cache_dtype="int8")
    # Heads of 8 entries in float32: 32 bytes, and 8 of integers with 4 of a scale.
    assert rounded.memory.target_cache / exact.memory.target_cache == pytest.approx(12 / 32, abs=1e-3)
    assert rounded.fingerprint == exact.fingerprint  # the weights are the same, so is what a drafter is trained for
    params = SamplingParams(temperature=0.8, seed=3, max_new_tokens=24, ignore_eos=True)
    prompts = ["Once upon a time", "a b c d e f g h i j k l m"]
    expected = [c.tokens for c in rounded.generate(prompts, params)]
    drafted = load(drafter, tree="best_first:6", cache_dtype="int8")
    assert [c.tokens for c in drafted.generate(prompts, params)] == expected
    with pytest.raises(UserError, match="cache_dtype is 'int4': use int8, or None for the dtype of the weights"):
        load(None, cache_dtype="int4")
