"""The noise's statistics, the filters against a version with a sort, and the law of a draw.

Statistical tests use fixed seeds, so they pass or fail for ever; the thresholds are probabilities of a false alarm.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy  # whose parts are imported where they are used

from fasteagle_jax.decoding import sampling as library
from fasteagle_jax.decoding.sampling import Sampling, make_sampling
from fasteagle_jax.decoding.sampling_fields import FIELDS, MAX_SEED
from fasteagle_jax.errors import UserError

FALSE_ALARM = 1e-4  # of a statistical test; some twenty are made
EULER = 0.5772156649015329

choose = jax.jit(library.choose)  # one program a shape instead of one an operation
gumbel_noise = jax.jit(library.gumbel_noise)


@pytest.fixture(scope="module")
def noise() -> np.ndarray:
    """Noise of neighbouring seeds, positions and ids: float32 [64, 64, 64]."""
    seeds, positions = jnp.arange(64, dtype=jnp.uint32)[:, None], jnp.arange(64)[None]
    return np.asarray(gumbel_noise(*jnp.broadcast_arrays(seeds, positions), jnp.arange(64)), np.float64)


def test_noise_has_gumbels_mean_and_variance(noise):
    size, z = noise.size, scipy.stats.norm.isf(FALSE_ALARM / 2)
    variance = math.pi**2 / 6
    assert abs(noise.mean() - EULER) < z * math.sqrt(variance / size)
    # The fourth central moment of the Gumbel distribution is 5.4 variance^2, hence the variance's own error.
    assert abs(noise.var() - variance) < z * variance * math.sqrt(4.4 / size)


def test_noise_follows_gumbels_distribution(noise):
    assert scipy.stats.kstest(noise.ravel(), scipy.stats.gumbel_r.cdf).pvalue > FALSE_ALARM


def test_noise_follows_gumbels_distribution_in_the_tail_that_decides_an_argmax():
    """49152 tokens' largest noise, of which each draw is made, over 2000 positions."""
    ids = jnp.arange(49152)

    def largest(position: jax.Array) -> jax.Array:
        return library.gumbel_noise(jnp.uint32(7), position, ids).max()

    top = jax.jit(lambda: jax.lax.map(largest, jnp.arange(2000), batch_size=50))()
    assert scipy.stats.kstest(np.asarray(top) - math.log(49152), scipy.stats.gumbel_r.cdf).pvalue > FALSE_ALARM


# Neighbours in one coordinate, and where two change against or with each other.
SHIFTS = [
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (1, 1, 0),
    (1, -1, 0),
    (0, 1, -1),
    (1, 0, -1),
    (0, 2, 0),
    (16, 0, 0),
    (0, 0, 32),
]


@pytest.mark.parametrize("shift", SHIFTS)
def test_noise_of_neighbouring_seeds_positions_and_ids_is_independent(noise, shift):
    here = noise[tuple(slice(max(0, -s), 64 - max(0, s)) for s in shift)].ravel()
    there = noise[tuple(slice(max(0, s), 64 - max(0, -s)) for s in shift)].ravel()
    edges = scipy.stats.gumbel_r.ppf(np.linspace(0, 1, 9)[1:-1])
    table = np.histogram2d(np.digitize(here, edges), np.digitize(there, edges), bins=8)[0]
    assert scipy.stats.chi2_contingency(table).pvalue > FALSE_ALARM


def test_no_two_streams_of_seed_and_position_share_a_piece():
    """With 32 bits of (seed, position) alone, some 16 of these 32768 streams would be another's, moved by a few ids."""
    grid = jnp.meshgrid(jnp.arange(128, dtype=jnp.uint32), jnp.arange(256), indexing="ij")
    bits = np.asarray(gumbel_noise(*grid, jnp.arange(65))).view(np.uint32).astype(np.uint64)
    pairs = bits[..., :-1] << np.uint64(32) | bits[..., 1:]  # of neighbouring ids; 0.01 would coincide by chance
    assert len(np.unique(pairs)) == pairs.size


def test_noise_is_finite_for_every_seed_position_and_id():
    seeds = jnp.array([0, 1, MAX_SEED], jnp.uint32)[:, None]
    positions = jnp.array([0, 2**31 - 1])[None]
    values = np.asarray(gumbel_noise(*jnp.broadcast_arrays(seeds, positions), jnp.arange(100_000)))
    assert np.isfinite(values).all() and values.min() > -4 and values.max() < 23


def test_noise_of_a_token_is_the_same_in_any_subset_of_the_vocabulary_and_any_batch():
    ids = np.random.default_rng(0).permutation(500)[:60]
    seeds, positions = jnp.array([3, 4, 5], jnp.uint32), jnp.array([10, 9, 8])
    whole = gumbel_noise(seeds, positions, jnp.arange(500))
    np.testing.assert_array_equal(gumbel_noise(seeds, positions, jnp.asarray(ids)), whole[:, ids])
    np.testing.assert_array_equal(gumbel_noise(seeds[1], positions[1], jnp.arange(500)), whole[1])


# --- filters ----------------------------------------------------------------------------------------------------


def slow_kept(scaled: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> set[int]:
    """Tokens that top-k, then top-p, then min-p leave, by sorting; equals of the last one kept stay with it."""
    order = sorted(range(len(scaled)), key=lambda t: -scaled[t])
    if top_k:
        order = [t for t in order if scaled[t] >= scaled[order[min(top_k, len(order)) - 1]]]
    mass = {t: math.exp(scaled[t] - scaled[order[0]]) for t in order}
    total, kept = sum(mass.values()), set()
    for t in order:
        larger = sum(mass[other] for other in order if scaled[other] > scaled[t])
        if top_p == 1 or larger < top_p * total:
            kept.add(t)
    return {t for t in kept if mass[t] >= min_p}


def slow_choose(logits: np.ndarray, positions: np.ndarray, sampling: Sampling) -> np.ndarray:
    chosen = np.empty(logits.shape[:2], np.int32)
    for b, m in np.ndindex(*chosen.shape):
        temperature, top_k, top_p, min_p, seed = (np.asarray(part)[b] for part in sampling)
        if temperature == 0:
            chosen[b, m] = logits[b, m].argmax()
            continue
        scaled = logits[b, m] / temperature
        noisy = scaled + np.asarray(gumbel_noise(seed, positions[b, m], jnp.arange(len(scaled))))
        kept = slow_kept(scaled.astype(np.float64), int(top_k), float(top_p), float(min_p))
        chosen[b, m] = max(sorted(kept), key=lambda t: noisy[t])
    return chosen


BATCH = 24
MIXED = dict(
    temperature=[0.0, 0.5, 1.0, 1.7] * 6,
    top_k=[0, 0, 1, 3, 0, 20, 7, 0, 31, 0, 2, 5] * 2,
    top_p=[1.0, 0.9, 0.3, 0.05, 1.0, 0.7] * 4,
    min_p=[0.0] * 12 + [0.0, 0.2, 0.01, 1.0] * 3,
    seed=list(range(BATCH)),
)


def some_logits(ties: bool) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(int(ties))
    logits = 2 * rng.standard_normal((BATCH, 16, 20), dtype=np.float32)
    return np.round(logits) if ties else logits, rng.integers(1000, size=(BATCH, 16)).astype(np.int32)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct logits", "ties"])
def test_the_choice_is_the_best_noisy_logit_of_those_that_a_sort_leaves(ties):
    """Rounded logits tie at the edges of top-k and top-p; the mixed batch has a top-k above the vocabulary too."""
    logits, positions = some_logits(ties)
    sampling = make_sampling(BATCH, **MIXED)
    chosen = choose(jnp.asarray(logits), jnp.asarray(positions), sampling)
    np.testing.assert_array_equal(chosen, slow_choose(logits, positions, sampling))


def test_tokens_that_tie_at_the_edge_of_a_filter_are_all_drawn():
    logits = jnp.broadcast_to(jnp.array([2.0, 1.0, 1.0, 1.0, 0.0]), (2, 400, 5))
    positions = jnp.broadcast_to(jnp.arange(400), (2, 400))
    drawn = np.asarray(choose(logits, positions, make_sampling(2, 1.0, top_k=[2, 0], top_p=[1.0, 0.6])))
    assert set(drawn[0]) == set(drawn[1]) == {0, 1, 2, 3}


def test_a_row_of_a_mixed_batch_is_chosen_as_if_it_were_alone():
    logits, positions = some_logits(ties=False)
    chosen = choose(jnp.asarray(logits), jnp.asarray(positions), make_sampling(BATCH, **MIXED))
    for b in range(BATCH):
        alone = make_sampling(1, **{name: values[b] for name, values in MIXED.items()})
        row = choose(jnp.asarray(logits[b : b + 1]), jnp.asarray(positions[b : b + 1]), alone)
        np.testing.assert_array_equal(row[0], chosen[b])


@pytest.mark.parametrize("changes", [dict(top_k=[2, 9]), dict(top_p=1e-50), dict(top_p=1e-40), dict(top_k=2**31 - 1)])
def test_extreme_filters_end_and_leave_at_least_the_best_token(changes):
    """These looped for ever, no token being inside: a top-k above the vocabulary, beside a smaller one, had NaN for its
    k-th largest logit, and a top-p below the smallest float32 was no mass at all."""
    logits = jax.random.normal(jax.random.key(0), (2, 1, 8))
    sampling = make_sampling(2, 1.0, **({"top_p": 0.01} | changes))
    chosen = choose(logits, jnp.zeros((2, 1), jnp.int32), sampling)
    np.testing.assert_array_equal(chosen, logits.argmax(axis=-1))


def test_logits_that_are_not_numbers_do_not_hang_the_choice():
    logits = jnp.full((2, 1, 8), jnp.nan)
    chosen = choose(logits, jnp.zeros((2, 1), jnp.int32), make_sampling(2, 1.0, top_p=0.5))
    assert ((chosen >= 0) & (chosen < 8)).all()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [(1.0, 0, 1.0, 0.0), (0.6, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (1.5, 6, 0.8, 0.0), (1.2, 7, 0.95, 0.15)],
)
def test_a_draw_has_the_law_of_the_filtered_softmax(temperature, top_k, top_p, min_p):
    num_draws = 20_000
    logits = np.random.default_rng(1).standard_normal(9).astype(np.float32)
    kept = sorted(slow_kept(logits / temperature, top_k, top_p, min_p))
    law = np.exp(logits[kept].astype(np.float64) / temperature)
    law /= law.sum()
    shape = (8, num_draws // 8)  # eight seeds, many positions
    positions = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    sampling = make_sampling(8, temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=list(range(8)))
    drawn = np.asarray(choose(jnp.broadcast_to(jnp.asarray(logits), (*shape, 9)), positions, sampling)).ravel()
    counts = np.bincount(drawn, minlength=9)
    assert counts[kept].sum() == num_draws  # none from outside
    assert scipy.stats.chisquare(counts[kept], num_draws * law).pvalue > FALSE_ALARM


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-0.1),
        dict(temperature=math.inf),
        dict(temperature=math.nan),
        dict(top_k=-2),
        dict(top_k=2.5),
        dict(top_k=2**31),
        dict(top_k=math.nan),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(top_p=math.nan),
        dict(min_p=-0.1),
        dict(min_p=1.5),
        dict(seed=-1),
        dict(seed=2**32),
        dict(seed=math.nan),
        dict(temperature=[1.0, 1.0, 1.0]),
        dict(top_k=[1]),
    ],
    ids=str,
)
def test_a_bad_value_is_a_user_error_that_names_it(bad):
    ((name, value),) = bad.items()
    with pytest.raises(UserError, match=f"{name} (is {value}: it must|has . values for 2 rows)"):
        make_sampling(2, **bad)


def test_an_unknown_field_is_a_user_error_that_lists_what_there_is():
    with pytest.raises(UserError, match=f"top_a is no sampling field: give {', '.join(FIELDS)}"):
        make_sampling(2, top_a=0.5)


def test_every_temperature_that_is_let_in_gives_a_number_and_the_smallest_the_greedy_token():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(0, 30, (1, 64, 50)), jnp.float32)
    # Two largest that differ in their last bit, the larger one behind: what overflow, or a quotient, would confuse.
    largest = np.asarray(logits).max(axis=-1)
    logits = logits.at[..., 30].set(largest + 1).at[..., 40].set(np.nextafter(largest + 1, np.float32(np.inf)))
    positions = jnp.arange(64)[None]
    temperatures = [0, 5e-324, 1e-45, 2e-38, 1e-30, 1e-20, 1e-10, 9.9e-6]
    choose = jax.jit(library.choose)
    for top_p in (1.0, 0.5):
        for temperature in temperatures:
            chosen = choose(logits, positions, make_sampling(1, temperature, top_p=top_p, seed=3))
            assert (np.asarray(chosen) == 40).all(), temperature
    assert len(set(np.asarray(choose(logits, positions, make_sampling(1, 1e30, seed=3))).ravel().tolist())) > 20
    for bad in (1e31, math.inf, math.nan, -1e-45):
        with pytest.raises(UserError, match="it must be 0 or more, at most 1e30"):
            make_sampling(1, bad)


def test_one_value_serves_all_rows_and_a_list_each_its_own():
    seeds = np.array([1, MAX_SEED])
    sampling = make_sampling(2, 0.5, top_k=[-1, 3], top_p=0.9, seed=seeds, min_p=0.25)  # -1 as vLLM's, for all
    expected = ([0.5, 0.5], [0, 3], [0.9, 0.9], [0.25, 0.25], [1, MAX_SEED])
    dtypes = (jnp.float32, jnp.int32, jnp.float32, jnp.float32, jnp.uint32)
    for array, values, dtype in zip(sampling, expected, dtypes, strict=True):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, np.asarray(values, dtype))
