"""Rules on logits are exact under trees: what is said is what plain decoding with the same rules says.

The reference chooses token by token on the host, from logits of one pass over the text so far, with a slow Python
version of every rule; `transformers` is another where its logits processors mean the same.
"""

from __future__ import annotations

import collections
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.rules import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, RowRules, apply_rules, make_rules
from fasteagle_jax.decoding.sampling import choose, make_sampling
from fasteagle_jax.decoding.speculative import generate_jit, root_only
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


@pytest.mark.parametrize("tree", [pytest.param(TREES[0], marks=pytest.mark.slow), *TREES[1:]])
@pytest.mark.parametrize("drafter", ["oracle", "random", "lookup"])
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
