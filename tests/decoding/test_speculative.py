"""Speculative decoding is lossless: token for token what plain decoding says, whatever drafts.

Everything is float32. One compiled prefill serves all trees, and one program all rows' settings: `speculate` goes
through `start` and `advance`; `generate` itself has tests of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy  # whose parts are imported where they are used
from flax import nnx

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.packing import PackedData
from fasteagle_jax.decoding.prefill import first_state, init_prefill, prefill
from fasteagle_jax.decoding.sampling import Sampling, make_sampling
from fasteagle_jax.decoding.speculative import advance, decode_rounds, generate, num_levels_of, start
from fasteagle_jax.decoding.state import NO_TOKEN, Statistics, Stop, make_stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.base import DrafterConfig
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.simulated import Simulated
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.kv_cache import MixedCache, Ring
from fasteagle_jax.training.init import init_drafter
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig, make_optimizer
from fasteagle_jax.training.step import TrainState, make_train_step
from tests.tiny_models import oracle_drafter, tiny_config, tiny_target
from tests.toy_family import tiny_toy

N, MAX_NEW, CHUNK, V = 3, 24, 16, 40
TREES = ["chain", "backbone:4", "best_first:12"]
CLOSE = dict(rtol=1e-4, atol=1e-4)  # float32 through three layers, with sums in another order
FEATURES = (1, 2)  # a layer more than needed would be a program longer to compile

rng = np.random.default_rng(0)
PROMPTS = [rng.integers(V, size=n).tolist() for n in (1, 5, 16, 17, 30, 3, 9, 32)]
B = len(PROMPTS)
SETTINGS = dict(
    temperature=[0.0, 0.5, 1.0, 1.5, 1.0, 1.5, 0.5, 1.0],
    top_k=[0, 0, 5, 0, 8, 12, 0, 0],
    top_p=[1.0, 0.8, 1.0, 0.9, 0.7, 1.0, 1.0, 1.0],
    seed=[0, 1, 2, 3, 4, 5, 6, 2**32 - 1],
)
SAMPLINGS = {"greedy": make_sampling(B), "mixed": make_sampling(B, **SETTINGS)}


def rows_of(sampling: Sampling, rows: list[int]) -> Sampling:
    return jax.tree.map(lambda x: x[jnp.asarray(rows)], sampling)


def stop_at(limits: int | list[int] = MAX_NEW, tokens: tuple[int, int] = (-2, -2), batch: int = B) -> Stop:
    return make_stop(batch, limits, tokens)


def speculate(
    target,
    drafter,
    sampling: Sampling,
    tree: str | TreeSpec = "chain",
    *,
    prompts: list[list[int]] = PROMPTS,
    stop: Stop | None = None,
    shared_noise: bool = True,
    chunk: int = CHUNK,
    step: int = 1000,
) -> tuple[list[list[int]], Statistics]:
    """Each row's new tokens and the statistics, by `start` and then `advance`, `step` rounds at a time."""
    tree = TreeSpec.parse(tree) if isinstance(tree, str) else tree
    batch = len(prompts)
    padded = np.zeros((batch, 32), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    stop = stop or stop_at(batch=batch)
    sizes = dict(max_new=MAX_NEW, num_levels=num_levels_of(drafter, tree), chunk=chunk)
    state, vocab = start(target, drafter, jnp.asarray(padded), lengths, sampling, stop, **sizes)
    while not state.done.all():
        rounds = jnp.asarray(step, jnp.int32)
        state = advance(target, drafter, vocab, state, sampling, stop, rounds, tree=tree, shared_noise=shared_noise)
    emitted, counts = np.asarray(state.emitted), np.asarray(state.num_emitted)
    for row, count in zip(emitted, counts, strict=True):
        assert (row[:count] != NO_TOKEN).all() and (row[count:] == NO_TOKEN).all()
    # A row's tokens are the one of the prefill, one of the target a round, and the accepted guesses.
    statistics = jax.tree.map(np.asarray, state.statistics)
    assert counts.tolist() == (1 + statistics.rounds + statistics.accepted_at.sum(axis=1)).tolist()
    return [row[:count].tolist() for row, count in zip(emitted, counts, strict=True)], statistics


# --- models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", pytest.param("toy", marks=pytest.mark.slow)])
def target(request):
    """A Llama, and a newcomer's family with windows, rotary tables, an embedding and logits of its own."""
    return tiny_target(num_layers=3) if request.param == "llama" else tiny_toy(num_layers=3)


@pytest.fixture(scope="module")
def plain(target) -> dict[str, list[list[int]]]:
    """What plain decoding says, for each of SAMPLINGS."""
    return {name: speculate(target, None, sampling)[0] for name, sampling in SAMPLINGS.items()}


def sequences(answers: list[list[int]]) -> jax.Array:
    """Prompts with their answers behind them, with room for guesses past the end."""
    whole = np.zeros((B, 32 + MAX_NEW + N + 1), np.int32)
    for row, prompt, answer in zip(whole, PROMPTS, answers, strict=True):
        row[: len(prompt) + len(answer)] = prompt + answer
    return jnp.asarray(whole)


def oracle(answers: list[list[int]], share_of_mistakes: float = 0.0) -> Simulated:
    return oracle_drafter(sequences(answers), V, N, 1 - share_of_mistakes)


def drafter_config(**changes) -> DrafterConfig:
    sizes = default_config(tiny_config(num_layers=3), num_levels=N, feature_layers=FEATURES)
    return dataclasses.replace(sizes, **changes)


def random_drafter(**changes) -> FastEagle:
    config = drafter_config(**changes)

    def make() -> FastEagle:
        drafter = FastEagle(config, jax.random.key(1))
        if drafter.token_ids is not None:  # no prefix of the vocabulary
            drafter.token_ids[...] = 2 + 3 * jnp.arange(config.draft_vocab_size)
        if config.reinject:
            drafter.levels.reinject.weight[...] += 0.1
        if config.correction:
            drafter.correction.to_state.weight[...] += 0.1
        return drafter

    return jax.jit(make)()


@pytest.fixture(scope="module")
def random_fasteagle() -> FastEagle:
    return random_drafter()


@pytest.fixture(scope="module")
def trained_fasteagle(target) -> FastEagle:
    """A FastEagle after sixty steps on what the target says."""
    conversations = []
    for seed in range(6):
        sampling = make_sampling(B, 0.5, seed=list(range(100 + B * seed, 100 + B * (seed + 1))))
        for row, answer in enumerate(speculate(target, None, sampling)[0]):
            prompt = PROMPTS[row]
            span = [len(prompt), len(prompt) + len(answer)]
            conversations.append(Conversation.of(f"{seed}/{row}", prompt + answer, [span]))
    data = PackedData(conversations, T=64, B=8, seed=0)
    drafter = jax.jit(lambda: init_drafter(drafter_config(), target, jax.random.key(0)))()
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=5), 60)
    step = make_train_step(graph, optimizer, LossConfig(chunk=512), jnp.float32, seed=0)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    for i in range(60):
        state, _ = step(state, constants, target, data.batch(i))
    return nnx.merge(graph, state.params, constants)


# --- lossless ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_an_oracle_has_all_its_guesses_accepted_in_every_round(target, plain, tree, sampling):
    tokens, statistics = speculate(target, oracle(plain[sampling]), SAMPLINGS[sampling], tree)
    assert tokens == plain[sampling]
    full = (MAX_NEW - 1) // (N + 1)  # rounds of N + 1 tokens; 23 tokens end with one of 3
    assert statistics.rounds.tolist() == [full + 1] * B
    assert statistics.accepted_at.tolist() == [[full + 1, full + 1, full]] * B


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_drafter_that_is_always_wrong_costs_rounds_and_changes_nothing(target, plain, tree, sampling):
    drafter = oracle(plain[sampling], 1.0)
    tokens, statistics = speculate(target, drafter, SAMPLINGS[sampling], tree)
    assert tokens == plain[sampling]
    assert statistics.rounds.tolist() == [MAX_NEW - 1] * B and not statistics.accepted_at.any()


@pytest.mark.parametrize("tree", TREES)
def test_a_drafter_with_mistakes_is_lossless_at_every_accepted_length(target, plain, tree):
    tokens, statistics = speculate(target, oracle(plain["mixed"], 0.3), SAMPLINGS["mixed"], tree)
    assert tokens == plain["mixed"]
    at = statistics.accepted_at.sum(axis=0)
    assert statistics.rounds.sum() > at[0] > at[1] > at[2] > 0  # paths of 0, 1, 2 and 3 guesses all occur


@pytest.mark.parametrize(
    ("tree", "shared_noise"),
    [
        *[pytest.param(tree, True, id=f"{tree}-shared noise") for tree in TREES],
        *[pytest.param(tree, False, id=f"{tree}-own ranking", marks=pytest.mark.slow) for tree in TREES[:2]],
        pytest.param(TREES[2], False, id=f"{TREES[2]}-own ranking"),
    ],
)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("drafter", ["random_fasteagle", "trained_fasteagle"])
def test_fasteagle_is_lossless(target, plain, drafter, sampling, tree, shared_noise, request):
    model = request.getfixturevalue(drafter)
    tokens, statistics = speculate(target, model, SAMPLINGS[sampling], tree, shared_noise=shared_noise)
    assert tokens == plain[sampling]
    assert statistics.accepted_at.sum() > 0  # something was at stake


@pytest.mark.parametrize("tree", [pytest.param("backbone:4", marks=pytest.mark.slow), "best_first:12"])
def test_fasteagle_with_a_reduced_vocabulary_and_its_options_is_lossless(target, plain, tree):
    model = random_drafter(draft_vocab_size=11, reinject=True, correction=8)
    for sampling, expected in plain.items():
        tokens, statistics = speculate(target, model, SAMPLINGS[sampling], tree)
        assert tokens == expected
        assert statistics.accepted_at.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize(("tree", "rounds"), [("chain:2", 8), ("backbone:4", 6)])
def test_where_the_noise_decides_a_random_drafters_best_guesses_are_all_right(target, tree, rounds):
    """23 tokens by 3 or 4 a round: guesses that know the token before them are ranked by their own position's noise."""
    sampling = make_sampling(B, 1e6, seed=list(range(B)))
    _, statistics = speculate(target, random_drafter(correction=8), sampling, tree)
    assert statistics.rounds.tolist() == [rounds] * B


@pytest.mark.slow  # engines load lists, and test_bfloat16.py has one
def test_lists_of_layers_and_levels_are_lossless(target, plain, trained_fasteagle):
    tokens, statistics = speculate(
        target.unstacked(), trained_fasteagle.unstacked(), SAMPLINGS["mixed"], "best_first:12"
    )
    assert tokens == plain["mixed"]
    assert statistics.accepted_at.sum() > 0


def test_training_makes_rounds_fewer(target, random_fasteagle, trained_fasteagle):
    before, after = (
        speculate(target, drafter, SAMPLINGS["greedy"], "chain")[1].rounds.mean()
        for drafter in (random_fasteagle, trained_fasteagle)
    )
    assert after < before - 2


@pytest.mark.slow
def test_sharing_the_targets_noise_makes_rounds_fewer(target, trained_fasteagle):
    sampling = make_sampling(B, 1.0, seed=list(range(B)))
    shared, own = (
        speculate(target, trained_fasteagle, sampling, "chain", shared_noise=shared)[1].rounds.mean()
        for shared in (True, False)
    )
    assert shared < own - 1


# --- batches, chunks, steps -------------------------------------------------------------------------------------


@pytest.mark.slow  # so do the tests of the engine, of rows that come and go
@pytest.mark.parametrize("size", [1, 3])
def test_a_row_says_the_same_alone_as_in_any_batch(target, plain, random_fasteagle, size):
    """The plain answers are those of a batch of 8 with mixed lengths and settings."""
    groups = [[b] for b in range(B)] if size == 1 else [[7, 0, 3], [2, 1, 4], [6, 5, 6]]
    for rows in groups:
        prompts = [PROMPTS[b] for b in rows]
        sampling = rows_of(SAMPLINGS["mixed"], rows)
        tokens, _ = speculate(target, random_fasteagle, sampling, "best_first:12", prompts=prompts)
        assert tokens == [plain["mixed"][b] for b in rows]


def test_prompts_may_be_prefilled_in_any_number_of_chunks(target, plain, random_fasteagle):
    """Of 4 chunks, prompts end in the first, the second, at its end, and in the last."""
    tokens, _ = speculate(target, random_fasteagle, SAMPLINGS["mixed"], "chain", chunk=8)
    assert tokens == plain["mixed"]


def test_decoding_in_steps_is_decoding_at_once(target, plain, random_fasteagle):
    tokens, statistics = speculate(target, random_fasteagle, SAMPLINGS["mixed"], "chain", step=5)
    assert tokens == plain["mixed"]
    at_once = speculate(target, random_fasteagle, SAMPLINGS["mixed"], "chain")[1]
    np.testing.assert_array_equal(statistics.rounds, at_once.rounds)
    np.testing.assert_array_equal(statistics.accepted_at, at_once.accepted_at)


def test_advance_runs_no_more_rounds_than_asked_for(target, plain):
    sizes = dict(max_new=MAX_NEW, num_levels=N, chunk=CHUNK)
    lengths = jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32)
    prompts = sequences(plain["mixed"])[:, :32]
    drafter, sampling, stop = oracle(plain["mixed"]), SAMPLINGS["mixed"], stop_at()
    state, vocab = start(target, drafter, prompts, lengths, sampling, stop, **sizes)
    chain, rounds = TreeSpec.parse("chain"), jnp.asarray(2, jnp.int32)
    state = advance(target, drafter, vocab, state, sampling, stop, rounds, tree=chain, shared_noise=True)
    assert state.statistics.rounds.tolist() == [2] * B
    assert state.num_emitted.tolist() == [1 + 2 * (N + 1)] * B


def test_a_tree_of_fewer_levels_guesses_no_deeper(target, plain):
    tokens, statistics = speculate(target, oracle(plain["mixed"]), SAMPLINGS["mixed"], TreeSpec("chain", levels=2))
    assert tokens == plain["mixed"]
    assert statistics.accepted_at.tolist() == [[8, 7]] * B  # 7 rounds of 3 tokens, one of 2


def test_plain_rounds_in_between_leave_a_drafter_able_to_go_on(target, plain, trained_fasteagle):
    """And trees of different depths in turn: none of it shows in the tokens."""
    stop, sampling = stop_at(), SAMPLINGS["mixed"]
    lengths = jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32)
    models, sizes = (target, trained_fasteagle), dict(max_new=MAX_NEW, num_levels=N, chunk=CHUNK)
    state, vocab = start(*models, sequences(plain["mixed"])[:, :32], lengths, sampling, stop, **sizes)
    drafted = []
    for tree, rounds in [
        ("chain", 2),
        (None, 3),
        (TreeSpec("chain", levels=1), 2),
        ("best_first:12", 2),
        (None, 1),
        ("chain", 99),
    ]:
        shape = TreeSpec.parse(tree) if isinstance(tree, str) else tree
        before = np.asarray(state.statistics.accepted_at).sum()
        state = advance(*models, vocab, state, sampling, stop, jnp.asarray(rounds, jnp.int32), tree=shape)
        drafted.append(np.asarray(state.statistics.accepted_at).sum() - before)
    emitted, counts = np.asarray(state.emitted), np.asarray(state.num_emitted)
    assert [row[:count].tolist() for row, count in zip(emitted, counts, strict=True)] == plain["mixed"]
    assert [n > 0 for n in drafted] == [True, False, True, True, False, True]


def test_a_prompt_prefilled_from_a_shared_beginning_is_bitwise_the_prompt_prefilled_alone(target, trained_fasteagle):
    beginning, rest = list(range(32)), [[5, 6, 7], [8] * 16, [9] * 17]
    vocab = trained_fasteagle.vocab_weights(target)

    @jax.jit
    def run(prefix, tokens, lengths, first):
        return prefill(target, trained_fasteagle, vocab, prefix, tokens, lengths, first, chunk=CHUNK)

    nothing = init_prefill(target, trained_fasteagle, 1, 64, CHUNK)
    shared = run(nothing, jnp.asarray([beginning + [0] * 32]), jnp.asarray([32]), 0)
    for own in rest:
        tokens = jnp.asarray([beginning + own + [0] * (32 - len(own))])
        lengths = jnp.asarray([32 + len(own)])
        alone, prefix = run(nothing, tokens, lengths, 0), run(shared, tokens, lengths, 2)
        jax.tree.map(np.testing.assert_array_equal, alone, prefix)


def test_a_prefill_for_drafts_of_few_levels_fills_the_cache_of_these_alone(target, trained_fasteagle):
    vocab = trained_fasteagle.vocab_weights(target)
    tokens, lengths = jnp.asarray([list(range(32))]), jnp.asarray([29])

    @functools.partial(jax.jit, static_argnums=0)
    def cache(num_levels):
        prefix = init_prefill(target, trained_fasteagle, 1, 64, CHUNK)
        sizes = dict(chunk=CHUNK, num_levels=num_levels)
        return prefill(target, trained_fasteagle, vocab, prefix, tokens, lengths, **sizes).drafter_cache

    whole = jax.device_get(cache(None))
    for num_levels in range(N):
        few = jax.device_get(cache(num_levels))
        for i in range(N):
            own, held = few.positions[i], whole.positions[i]
            assert (held >= 0).sum() == 28
            if i < num_levels:
                np.testing.assert_array_equal(own, held)
                np.testing.assert_array_equal(few.k[i], whole.k[i])
            else:
                assert (own < 0).all()  # nothing there, and so seen by nobody
        np.testing.assert_array_equal(few.length, whole.length)


@pytest.mark.slow  # tests/engine/test_engine_rules.py has them
def test_log_probabilities_are_those_of_the_targets_softmax_where_asked_for(target, plain, trained_fasteagle):
    lengths = jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32)
    prompts, sampling, stop = sequences(plain["mixed"])[:, :32], SAMPLINGS["mixed"], stop_at()
    tree, wants_logprobs = TreeSpec.parse("best_first:12"), jnp.arange(B) % 2 == 0

    @jax.jit
    def run(target, drafter):
        vocab = drafter.vocab_weights(target)
        prefix = init_prefill(target, drafter, B, 32 + MAX_NEW + N + 1, CHUNK)
        prefix = prefill(target, drafter, vocab, prefix, prompts, lengths, chunk=CHUNK)
        sizes = dict(num_slots=32 + MAX_NEW + N + 1, num_levels=N)
        state = first_state(target, prefix, prompts, lengths, sampling, stop, wants_logprobs=wants_logprobs, **sizes)
        return decode_rounds(target, drafter, vocab, state, sampling, stop, tree=tree)[0]

    @jax.jit
    def logits_of(tokens):
        num = tokens.shape[1]
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((num, num), bool)), (B, num, num))
        return target.logits(target(tokens, jnp.broadcast_to(jnp.arange(num), tokens.shape), causal).hidden)

    state = run(target, trained_fasteagle)
    law = jax.nn.log_softmax(logits_of(sequences(plain["mixed"])), axis=-1)
    for b in np.flatnonzero(wants_logprobs):
        answer, start = plain["mixed"][b], len(PROMPTS[b])
        expected = [float(law[b, start + i - 1, token]) for i, token in enumerate(answer)]
        np.testing.assert_allclose(state.logprobs[b, start : start + len(answer)], expected, **CLOSE)


def held_slots(cache, layer: int, b: int) -> tuple:
    """Keys and values [K, P, D] that a row's cache holds of a layer, and their positions [P]."""
    if isinstance(cache, MixedCache):
        part = cache.local if cache.is_local[layer] else cache.full
        return held_slots(part, cache.place(layer), b)
    k, v = cache.k[layer][b], cache.v[layer][b]
    positions = np.arange(k.shape[1])
    if isinstance(cache, Ring):
        positions = np.asarray(cache.positions[layer][b])
    used = np.flatnonzero((positions >= 0) & (positions < int(cache.length[b])))
    return k[:, used], v[:, used], positions[used]


def test_between_rounds_the_caches_hold_what_one_pass_over_the_text_gives(target, plain, trained_fasteagle):
    """Wrong features or keys in the drafter's cache would make guesses worse and nothing else would tell."""
    lengths = jnp.asarray([len(prompt) for prompt in PROMPTS], jnp.int32)
    whole, stop, best_first = sequences(plain["mixed"]), stop_at(), TreeSpec.parse("best_first:12")
    models, sizes = (target, trained_fasteagle), dict(max_new=MAX_NEW, num_levels=N, chunk=CHUNK)
    state, vocab = start(*models, whole[:, :32], lengths, SAMPLINGS["mixed"], stop, **sizes)
    rounds = jnp.asarray(7, jnp.int32)
    state = advance(*models, vocab, state, SAMPLINGS["mixed"], stop, rounds, tree=best_first, shared_noise=True)
    assert not state.done.any() and len(set(state.num_emitted.tolist())) > 2

    @jax.jit
    def one_pass(target, drafter, tokens):
        num = tokens.shape[1] - 1
        positions = jnp.broadcast_to(jnp.arange(num), (B, num))
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((num, num), bool)), (B, num, num))
        out = target(tokens[:, :-1], positions, causal, None, FEATURES)
        _, fresh = drafter.hidden_states(target.embedding[...], out.features, tokens[:, 1:], positions, causal)
        return out.fresh, fresh, out.features

    # On the host, where a slice is no program of its own.
    of_target, of_drafter, features = jax.device_get(one_pass(*models, whole))
    state, whole, lengths = jax.device_get((state, whole, lengths))
    committed = lengths + state.num_emitted - 1  # all but the pending token
    assert state.target_cache.length.tolist() == committed.tolist()
    assert (state.drafter_cache.length + state.new.count).tolist() == committed.tolist()
    for cache, fresh in ((state.target_cache, of_target), (state.drafter_cache, of_drafter)):
        for layer, b in itertools.product(range(len(fresh[0])), range(B)):
            held, end = held_slots(cache, layer, b), int(cache.length[b])
            window = target.config.layer_kinds[layer].window if isinstance(cache, MixedCache) else None
            assert set(held[2].tolist()) >= set(range(0 if window is None else max(0, end - window + 1), end))
            for slots, expected in zip(held, fresh, strict=False):
                np.testing.assert_allclose(slots, expected[layer][b][:, held[2]], **CLOSE)
    for b in range(B):
        end, count = int(committed[b]), int(state.new.count[b])
        np.testing.assert_allclose(state.new.features[b, :count], features[b, end - count : end], **CLOSE)
        assert state.new.tokens[b, :count].tolist() == whole[b, end - count + 1 : end + 1].tolist()


# --- where rows end ---------------------------------------------------------------------------------------------


def cut(answer: list[int], limit: int, stop_tokens: tuple[int, ...]) -> list[int]:
    """The answer up to its limit or its first stop token, which is kept."""
    for i, token in enumerate(answer[:limit]):
        if token in stop_tokens:
            return answer[: i + 1]
    return answer[:limit]


LIMITS = [1, 2, 3, 4, 5, 6, 23, 24]


@pytest.mark.parametrize("tree", ["chain", "best_first:12"])
def test_rows_end_at_their_own_limits_also_inside_an_accepted_path(target, plain, tree):
    for drafter in (oracle(plain["mixed"]), oracle(plain["mixed"], 0.3)):
        tokens, _ = speculate(target, drafter, SAMPLINGS["mixed"], tree, stop=stop_at(LIMITS))
        assert tokens == [cut(answer, limit, ()) for answer, limit in zip(plain["mixed"], LIMITS, strict=True)]


@pytest.mark.parametrize("place", range(8))
def test_a_stop_token_ends_a_row_where_it_ends_plain_decoding(target, plain, place):
    """The oracle has four tokens a round accepted: places 1 to 4 and 5 to 8 are all those of a path."""
    answers = plain["mixed"]
    stop_tokens = (answers[0][place], answers[3][place])
    stop = stop_at(tokens=stop_tokens)
    expected = [cut(answer, MAX_NEW, stop_tokens) for answer in answers]
    assert any(len(answer) <= place + 1 for answer in expected)
    for drafter in (None, oracle(answers), oracle(answers, 0.3)):
        assert speculate(target, drafter, SAMPLINGS["mixed"], "chain", stop=stop)[0] == expected


# --- generate ---------------------------------------------------------------------------------------------------


def test_generate_is_start_and_advance_and_compiles_once_for_a_shape(target, plain, compilations):
    drafter, chain = oracle(plain["mixed"], 0.3), TreeSpec.parse("chain")
    sizes = dict(tree=chain, chunk=CHUNK)
    sampling, limits = SAMPLINGS["mixed"], [MAX_NEW, *LIMITS[1:]]
    stop_tokens = (plain["mixed"][0][5], plain["mixed"][6][5])
    made = generate(target, drafter, PROMPTS, sampling, max_new=limits, stop_tokens=stop_tokens, **sizes)
    expected = [cut(answer, limit, stop_tokens) for answer, limit in zip(plain["mixed"], limits, strict=True)]
    assert made.lengths.tolist() == [len(answer) for answer in expected]
    assert made.tokens.shape == (B, MAX_NEW)
    for row, answer in zip(np.asarray(made.tokens), expected, strict=True):
        assert row.tolist() == answer + [NO_TOKEN] * (MAX_NEW - len(answer))
    assert made.stopped.tolist() == [answer[-1] in stop_tokens for answer in expected]
    assert len(set(made.stopped.tolist())) == 2
    assert len(compilations) > 0  # the listener does hear

    compilations.clear()
    greedy = oracle(plain["greedy"], 0.5)
    other = [prompt[: 1 + len(prompt) // 2] for prompt in PROMPTS[::-1]]
    other[3] = [7] * 32  # other prompts in as many slots
    generate(target, greedy, other, SAMPLINGS["greedy"], max_new=MAX_NEW, stop_tokens=(1, 2), **sizes)
    assert compilations == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(prompts=[[1], []]), "prompt 1 is empty"),
        (dict(prompts=[[1], [2, 40]]), "prompt 1 holds token 40, outside the vocabulary of 40"),
        (dict(prompts=[[1] * 500, [2]]), "prompt 0 has 500 tokens, which with 13 new ones exceed the target's 512"),
        (dict(max_new=[13, 0]), "max_new is .13, 0.: give a whole number of at least 1"),
        (dict(max_new=[13]), "one a row"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_arguments_that_cannot_be_decoded_are_user_errors(target, changes, message):
    arguments = dict(prompts=[[1], [2]], max_new=13) | changes
    with pytest.raises(UserError, match=message):
        generate(target, None, arguments["prompts"], make_sampling(2), max_new=arguments["max_new"])


# --- the law of what is said ------------------------------------------------------------------------------------


def filtered_softmax(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    p = np.exp((logits - logits.max()) / temperature)
    if top_k:
        p[p < np.sort(p)[-top_k]] = 0
    p /= p.sum()
    kept = [p[p > p[t]].sum() < top_p for t in range(len(p))]
    p = np.where(kept, p, 0)
    return p / p.sum()


def test_sampled_text_has_the_law_of_the_target_whatever_the_coupling():
    """The law of the first three tokens is enumerated over a vocabulary of 5; nothing here knows of the noise."""
    vocab, num_seeds, prompt = 5, 4096, [3, 1]
    target = tiny_target(2, vocab_size=vocab, num_layers=2)
    config = default_config(target.config, num_levels=2, feature_layers=(1,))
    drafter = jax.jit(lambda: FastEagle(config, jax.random.key(3)))()
    prefixes = [list(p) for n in range(3) for p in itertools.product(range(vocab), repeat=n)]

    @jax.jit
    def next_logits(tokens, at):
        num = tokens.shape[1]
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((num, num), bool)), (len(tokens), num, num))
        out = target(tokens, jnp.broadcast_to(jnp.arange(num), tokens.shape), causal)
        return target.logits(jnp.take_along_axis(out.hidden, at[:, None, None], axis=1)[:, 0])

    rows = jnp.asarray([prompt + p + [0] * (2 - len(p)) for p in prefixes])
    ends = jnp.asarray([len(prompt) + len(p) - 1 for p in prefixes])
    logits = dict(zip(map(tuple, prefixes), np.asarray(next_logits(rows, ends), np.float64), strict=True))

    for temperature, top_k, top_p in ((1.0, 0, 1.0), (1.3, 4, 0.85)):
        law = np.ones([vocab] * 3)
        for prefix, row in logits.items():
            law[prefix] *= filtered_softmax(row, temperature, top_k, top_p).reshape(-1, *[1] * (2 - len(prefix)))
        assert abs(law.sum() - 1) < 1e-9
        sampling = make_sampling(num_seeds, temperature, top_k=top_k, top_p=top_p, seed=list(range(num_seeds)))
        made = generate(
            target, drafter, [prompt] * num_seeds, sampling, max_new=3, tree=TreeSpec("best_first", 6), chunk=2
        )
        assert made.statistics.accepted_at.sum() > num_seeds / 2  # guesses are what is being tested
        counts = np.zeros([vocab] * 3)
        np.add.at(counts, tuple(np.asarray(made.tokens).T), 1)
        assert counts[law == 0].sum() == 0
        expected = law * num_seeds
        # Cells where less than 5 are expected count as one, the usual rule for chi-square.
        rare = (expected < 5) & (law > 0)
        observed, predicted = counts[expected >= 5].tolist(), expected[expected >= 5].tolist()
        if rare.any():
            observed, predicted = [*observed, counts[rare].sum()], [*predicted, expected[rare].sum()]
        assert len(observed) > 15
        assert scipy.stats.chisquare(observed, predicted).pvalue > 1e-4
