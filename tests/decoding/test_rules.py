"""Rules on logits are exact under trees: what is said is what plain decoding with the same rules says.

The reference chooses token by token on the host, from logits of one pass over the text so far, with a slow Python
version of every rule; `transformers` is another where its logits processors mean the same.
"""

from __future__ import annotations

import collections
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.rules import RowRules, apply_rules, make_rules
from fasteagle_jax.decoding.sampling import choose, make_sampling
from fasteagle_jax.decoding.speculative import generate, generate_jit
from fasteagle_jax.decoding.state import make_stop
from fasteagle_jax.decoding.tree import NO_PARENT, Draft, TreeSpec
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.drafters.text_only import TextOnly
from fasteagle_jax.errors import UserError
from tests.tiny_models import oracle_drafter, tiny_target

V, N, MAX_NEW, CHUNK, STOP = 24, 3, 24, 16, (5, 9)
TREES = ["chain", "backbone:4", "best_first:12"]

rng = random.Random(0)


def some_rules(i: int) -> RowRules:
    """A mixture of rules; every third row has none, and every kind is on many rows, alone and with others."""
    if i % 3 == 2:
        return RowRules()
    pick = rng.random
    words = [[rng.randrange(V) for _ in range(rng.choice([1, 2, 2, 3]))] for _ in range(rng.randrange(30))]
    return RowRules(
        logit_bias={rng.randrange(V): rng.uniform(-4, 4) for _ in range(6)} if pick() < 0.4 else {},
        allowed_token_ids=rng.sample(range(V), 12) if pick() < 0.3 else None,
        bad_words=[word for word in words if len(word) > 1 or word[0] < 3] if pick() < 0.6 else (),
        min_tokens=rng.choice([0, 0, 3, 11, MAX_NEW]),
        repetition_penalty=rng.choice([1.0, 1.3, 0.8, 3.0]),
        presence_penalty=rng.choice([0.0, 0.7, -0.5]),
        frequency_penalty=rng.choice([0.0, 0.4, 2.0, -0.3]),
    )


B = 12
PROMPTS = [[rng.randrange(V) for _ in range(n)] for n in (1, 5, 16, 17, 30, 3, 9, 32, 2, 4, 8, 12)]
ROWS = [some_rules(i) for i in range(B)]
TEMPERATURES = [0.0, 0.7, 1.0, 0.0, 1.5, 1.0, 0.0, 0.5, 0.0, 1.0, 1.0, 2.0]
FILTERS = dict(top_k=[0, 0, 5, 0, 8, 0, 0, 3, 0, 0, 0, 0], top_p=[1.0, 0.8, 1.0, 0.9] * 3, min_p=[0.0] * 10 + [0.1] * 2)
SAMPLINGS = {"greedy": make_sampling(B), "mixed": make_sampling(B, TEMPERATURES, seed=list(range(B)), **FILTERS)}


def ruled(logits: np.ndarray, rules: RowRules, prompt: list[int], answer: list[int]) -> np.ndarray:
    """The obvious version: logits float32 [V] of the token after prompt and answer."""
    logits = logits.astype(np.float32).copy()
    if rules.allowed_token_ids is not None:
        logits[[t for t in range(V) if t not in rules.allowed_token_ids]] = -np.inf
    for word in rules.bad_words:
        before = list(word[:-1])
        if len(before) <= len(answer) and answer[len(answer) - len(before) :] == before:
            logits[word[-1]] = -np.inf
    if len(answer) < rules.min_tokens:
        logits[list(STOP)] = -np.inf
    for token, bias in rules.logit_bias.items():
        logits[token] += np.float32(bias)
    counts = collections.Counter(answer)
    for token in {*prompt, *answer}:
        x, penalty = logits[token], np.float32(rules.repetition_penalty)
        logits[token] = x / penalty if x > 0 else x * penalty
    for token, count in counts.items():
        logits[token] -= np.float32(rules.frequency_penalty) * count
        logits[token] -= np.float32(rules.presence_penalty)
    return logits


@pytest.fixture(scope="module")
def target():
    return tiny_target(3, num_layers=3, vocab_size=V, sharpness=2.0)


@pytest.fixture(scope="module")
def expected(target) -> dict[str, list[list[int]]]:
    """By the obvious version, a token at a time."""

    @jax.jit
    def logits_of(tokens, ends):
        num = tokens.shape[1]
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((num, num), bool)), (B, num, num))
        hidden = target(tokens, jnp.broadcast_to(jnp.arange(num), tokens.shape), causal).hidden
        return target.logits(jnp.take_along_axis(hidden, ends[:, None, None], axis=1))[:, 0]

    choosing = jax.jit(choose)
    answers = {}
    for name, sampling in SAMPLINGS.items():
        answers[name] = [[] for _ in range(B)]
        for _ in range(MAX_NEW):
            texts = [prompt + answer for prompt, answer in zip(PROMPTS, answers[name], strict=True)]
            tokens = np.zeros((B, 64), np.int32)
            for row, text in zip(tokens, texts, strict=True):
                row[: len(text)] = text
            ends = np.asarray([len(text) for text in texts])
            logits = np.asarray(logits_of(tokens, ends - 1))
            parts = zip(logits, ROWS, PROMPTS, answers[name], strict=True)
            chosen = choosing(np.stack([ruled(*part) for part in parts])[:, None], ends[:, None], sampling)
            for answer, token in zip(answers[name], np.asarray(chosen)[:, 0].tolist(), strict=True):
                if not answer or answer[-1] not in STOP:
                    answer.append(token)
    ends = [len(answer) for answer in answers["mixed"]]
    assert min(ends) < 12 and max(ends) == MAX_NEW  # stop tokens are at stake
    return answers


def say(target, drafter, sampling, tree: str | TreeSpec = "chain", rules=ROWS, prompts=PROMPTS) -> tuple:
    tree = TreeSpec.parse(tree) if isinstance(tree, str) else tree
    padded = [prompt + [0] * (32 - len(prompt)) for prompt in prompts]
    tokens, lengths = pad_prompts(padded, CHUNK)[0], jnp.asarray([len(prompt) for prompt in prompts])
    stop = make_stop(len(prompts), MAX_NEW, STOP)
    arrays = None if rules is None else jax.tree.map(jnp.asarray, make_rules(rules, V))
    made = generate_jit(
        target, drafter, tokens, lengths, sampling, stop, arrays, max_new=MAX_NEW, tree=tree, chunk=CHUNK
    )
    parts = zip(np.asarray(made.tokens), np.asarray(made.lengths), strict=True)
    return [row[:n].tolist() for row, n in parts], np.asarray(made.statistics.accepted_at)


# --- lossless ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_plain_decoding_follows_the_rules(target, expected, sampling):
    assert say(target, None, SAMPLINGS[sampling])[0] == expected[sampling]


def drafters(target, answers):
    whole = np.zeros((B, 32 + MAX_NEW + N + 1), np.int32)
    for row, prompt, answer in zip(whole, PROMPTS, answers, strict=True):
        row[: len(prompt) + len(answer)] = prompt + answer
    config = default_config(target.config, num_levels=N, feature_layers=(1, 2))
    return {
        "oracle": lambda: oracle_drafter(jnp.asarray(whole), V, N, 0.7),
        "random": lambda: jax.jit(lambda: FastEagle(config, jax.random.key(1)))(),
        "lookup": TextOnly,
    }


@pytest.mark.parametrize("tree", [*[pytest.param(tree, marks=pytest.mark.slow) for tree in TREES[:2]], TREES[2]])
@pytest.mark.parametrize(
    "drafter",
    [pytest.param("oracle", marks=pytest.mark.slow), "random", pytest.param("lookup", marks=pytest.mark.slow)],
)
def test_trees_follow_the_rules_token_for_token(target, expected, drafter, tree):
    """Rows of no rules, of one and of many, greedy and sampled, in one batch."""
    tree = TreeSpec.parse(tree + "+lookup:3" * (drafter == "lookup"))
    for name, sampling in SAMPLINGS.items():
        model = drafters(target, expected[name])[drafter]()
        tokens, accepted = say(target, model, sampling, tree)
        assert tokens == expected[name]
        assert accepted.sum() > 0  # guesses are at stake
        if drafter == "oracle":
            assert accepted[:, 2].sum() > 10  # and whole paths


def test_a_row_without_rules_says_what_it_says_in_a_batch_without_any(target, expected):
    free = [b for b in range(B) if ROWS[b] == RowRules()]
    tokens, _ = say(target, None, SAMPLINGS["mixed"], rules=None)
    assert [tokens[b] for b in free] == [expected["mixed"][b] for b in free]
    changed = [b for b in range(B) if tokens[b] != expected["mixed"][b]]
    assert len(free) == 4 and not set(free) & set(changed) and len(changed) > 4  # the rules show


def test_generate_takes_rules(target, expected):
    options = dict(max_new=MAX_NEW, stop_tokens=STOP, tree=TreeSpec.parse("chain"), chunk=CHUNK)
    made = generate(target, None, PROMPTS, SAMPLINGS["mixed"], rules=make_rules(ROWS, V), **options)
    for row, length, answer in zip(np.asarray(made.tokens), np.asarray(made.lengths), expected["mixed"], strict=True):
        assert row[:length].tolist() == answer


def test_what_a_request_bans_is_not_drafted_first(target):
    """A random drafter of 24 tokens guesses right where two are allowed, if it knows which."""
    rules = [RowRules(allowed_token_ids=(3, 4), min_tokens=MAX_NEW)] * B
    sampling = make_sampling(B, 1.0, seed=list(range(B)))
    config = default_config(target.config, num_levels=N, feature_layers=(1, 2))
    drafter = jax.jit(lambda: FastEagle(config, jax.random.key(1)))()
    tokens, accepted = say(target, drafter, sampling, "best_first:12", rules)
    assert tokens == say(target, None, sampling, rules=rules)[0]
    assert accepted.sum() > 0.6 * B * MAX_NEW


# --- against transformers ---------------------------------------------------------------------------------------


@pytest.mark.torch
def test_where_they_mean_the_same_transformers_processors_give_the_same_logits():
    """At every node of a tree: 0 - 1 - 3 - 4, 0 - 2, with the path's tokens behind prompt and answer."""
    import torch
    from transformers import generation

    prompt, answer, guesses = [1, 2, 3, 3], [7, 8, 7], [7, 2, 8, 3]
    parents, depths = [NO_PARENT, 0, 0, 1, 3], [0, 1, 1, 2, 3]
    paths = [[], [7], [2], [7, 8], [7, 8, 3]]
    draft = Draft(*(jnp.asarray([x]) for x in ([answer[-1], *guesses], parents, depths)), jnp.zeros((1, 5)))
    logits = np.random.default_rng(0).normal(size=(1, 5, V)).astype(np.float32) * 3
    text = jnp.asarray([prompt + answer + [-1] * 5])
    stop, allowed, words = [9, 5], [t for t in range(V) if t not in (0, 11)], [[6], [7, 8], [8, 7, 7], [7, 8, 3, 1]]

    def ours(rules: RowRules) -> np.ndarray:
        rows = jax.tree.map(jnp.asarray, make_rules([rules], V))
        at, num = jnp.asarray([len(prompt) + len(answer) - 1]), jnp.asarray([len(answer)])
        return np.asarray(jax.jit(apply_rules)(rows, jnp.asarray([stop]), logits, draft, text, at, num))[0]

    def theirs(processor, *, with_prompt: bool = True) -> np.ndarray:
        rows = []
        for node, path in enumerate(paths):
            so_far = torch.tensor([prompt * with_prompt + answer + path])
            rows.append(processor(so_far, torch.tensor(logits[:, node]))[0].numpy())
        return np.stack(rows)

    Shift, Repeat = generation.SequenceBiasLogitsProcessor, generation.RepetitionPenaltyLogitsProcessor
    pairs = {
        "bias": (RowRules(logit_bias={3: 1.5, 4: -2.0}), theirs(Shift({(3,): 1.5, (4,): -2.0}))),
        "repetition": (RowRules(repetition_penalty=1.3), theirs(Repeat(1.3))),
        "allowed": (
            RowRules(allowed_token_ids=allowed),
            theirs(generation.SuppressTokensLogitsProcessor([0, 11], device="cpu")),
        ),
        "bad words": (  # those of the answer alone, as vLLM has them: transformers counts the prompt's too
            RowRules(bad_words=words),
            theirs(generation.NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([V])), with_prompt=False),
        ),
        "min tokens": (
            RowRules(min_tokens=5),
            theirs(generation.MinNewTokensLengthLogitsProcessor(len(prompt), 5, torch.tensor(stop), device="cpu")),
        ),
    }
    for name, (rules, expected) in pairs.items():
        np.testing.assert_allclose(ours(rules), expected, rtol=1e-6, err_msg=name)
        assert not np.array_equal(ours(rules), logits[0])
    assert [np.isneginf(row).sum() for row in ours(pairs["bad words"][0])] == [3, 2, 1, 1, 2]
    both = RowRules(logit_bias={7: -1.0}, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3)
    slow = [ruled(logits[0, node], both, prompt, answer + path) for node, path in enumerate(paths)]
    np.testing.assert_allclose(ours(both), slow, rtol=1e-6)


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (dict(logit_bias={V: 1.0}), "logit_bias is for token 24: give token ids below 24"),
        (dict(allowed_token_ids=[1, 99]), "allowed_token_ids has token 99: give token ids below 24"),
        (dict(bad_words=[[1, 2]] * 129), "bad_words are 129 of several tokens: give at most 128"),
        (dict(bad_words=[[1] * 17]), "bad_words has one of 17 tokens: give words of at most 16"),
        (dict(bad_words=[[V]]), r"bad_words has tokens \[24\]: give token ids below 24"),
        (dict(allowed_token_ids=[1, 2], bad_words=[[1], [2]]), "allowed_token_ids and bad_words leave no token: allow"),
        (dict(bad_words=[[t] for t in range(V)]), "leave no token: allow more"),
        (dict(allowed_token_ids=[5, 9], min_tokens=3), "no token that does not end the answer, and min_tokens is 3"),
    ],
)
def test_impossible_rules_are_user_errors_of_one_line(rules, message):
    with pytest.raises(UserError, match=message) as caught:
        RowRules(**rules).check(V, STOP)
    assert "\n" not in str(caught.value)
    RowRules(allowed_token_ids=STOP).check(V, STOP)  # without min_tokens it may end at once
