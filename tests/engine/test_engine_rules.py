"""Requests with rules, in company of others: each gets what plain decoding with its rules gives it alone.

The reference is the jitted `generate`, a request at a time; tests/decoding/test_rules.py compares that with a slow
version in Python.
"""

from __future__ import annotations

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax import Engine, SamplingParams, UserError
from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.rules import RowRules, make_rules
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.sampling_fields import FIELDS
from fasteagle_jax.decoding.speculative import generate_jit
from fasteagle_jax.decoding.state import make_stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.memory import bytes_of
from fasteagle_jax.drafters.files import load_drafter
from fasteagle_jax.engine import slots
from fasteagle_jax.engine.request_rules import row_rules
from fasteagle_jax.engine.requests import sample_seed
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.targets.tokenizer import load_tokenizer
from tests.tiny_folder import make_drafter, make_target
from tests.tiny_models import tiny_target
from tests.tiny_tokenizer import metaspace_tokenizer

MAX_LEN, MAX_NEW, CHUNK, EOS = 112, 24, 16, 258


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("rules") / "target", stop_rate=4.5)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_target(str(folder))


@pytest.fixture(scope="module")
def target(loaded):
    return loaded.model


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def drafter(folder, loaded):
    """Random: it guesses right where the noise decides, and where few tokens are allowed."""
    made = make_drafter(folder.parent / "drafter", folder, num_levels=3)
    return load_drafter(made, loaded.model.config, loaded.fingerprint)


def make_engine(target, drafter, tokenizer, **changes) -> Engine:
    sizes = dict(slots=4, max_len=MAX_LEN, tree="best_first:8", chunk=CHUNK)
    return Engine(target, drafter, tokenizer, (EOS,), **(sizes | changes))


@pytest.fixture(scope="module")
def engine(target, drafter, tokenizer):
    return make_engine(target, drafter, tokenizer)


@pytest.fixture(scope="module")
def say(target, tokenizer):
    """Plain decoding of one request with its rules by the jitted `generate`: one program for all."""

    def say(prompt, params: SamplingParams, sample: int) -> list[int]:
        tokens, lengths = pad_prompts([[*prompt, *[0] * (MAX_LEN - len(prompt))]], CHUNK)
        fields = {name: getattr(params, name) for name in FIELDS}
        sampling = make_sampling(1, **fields | {"seed": sample_seed(params.seed, sample)})
        stops = (*params.stop_token_ids, *(() if params.ignore_eos else (EOS,)))
        limit = min(params.max_new_tokens, MAX_LEN - len(prompt))
        stop = make_stop(1, limit, (*stops, *[-2] * (4 - len(stops))))
        rules = row_rules(params, tokenizer, target.config.vocab_size, stops, "p") or RowRules()
        arrays = jax.tree.map(jnp.asarray, make_rules([rules], target.config.vocab_size))
        sizes = dict(max_new=MAX_NEW, tree=TreeSpec(), chunk=CHUNK)
        made = generate_jit(target, None, tokens, lengths * 0 + len(prompt), sampling, stop, arrays, **sizes)
        return np.asarray(made.tokens)[0, : int(made.lengths[0])].tolist()

    return say


def mixed_requests(num: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts with all mixtures of rules, a quarter with none."""
    rng = random.Random(1)

    def some(value, share=0.35):
        return value if rng.random() < share else None

    requests = []
    for i in range(num):
        prompt = [rng.randrange(256) for _ in range(rng.choice([1, 3, 15, 16, 17, 40, 80]))]
        rules: dict = {}
        if i % 4:
            rules = dict(
                logit_bias=some({rng.randrange(259): rng.uniform(-9, 9) for _ in range(20)}),
                allowed_token_ids=some([*rng.sample(range(256), rng.choice([2, 40, 200])), EOS]),
                bad_words=some([rng.choice("abcdefgh") * rng.choice([1, 1, 2]) for _ in range(12)] + ["né", " q"]),
                min_tokens=rng.choice([0, 0, 1, 9]),
                repetition_penalty=rng.choice([1, 1, 1.4, 0.7]),
                presence_penalty=rng.choice([0, 0, 1.5, -1]),
                frequency_penalty=rng.choice([0, 0, 0.8, -0.4]),
            )
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.7, 1.0, 8.0]),
            top_k=rng.choice([0, 0, 20]),
            top_p=rng.choice([1.0, 1.0, 0.9]),
            seed=rng.randrange(2**32),
            max_new_tokens=rng.choice([9, 16, MAX_NEW]),
            stop_token_ids=rng.choice([(), (), (ord("x"), ord("y"))]),
            ignore_eos=rng.random() < 0.4,
            n=3 if i % 9 == 8 else 1,
            logprobs=rng.choice([None, None, True, 3]),
            prompt_logprobs=2 if i % 7 == 6 else None,
            **rules,
        )
        requests.append((prompt, params))
    return requests


@pytest.mark.parametrize(
    ("num", "tree"),
    [
        (20, "best_first:8"),
        *[pytest.param(100, x, marks=pytest.mark.slow) for x in ("best_first:8", "auto", "chain+lookup:4", "plain")],
    ],
)
def test_requests_that_mix_every_rule_are_answered_as_plain_decoding_answers_each_alone(
    target, drafter, tokenizer, say, num, tree, compilations, monkeypatch
):
    """Served from an iterator, and prefilled several together."""
    requests = mixed_requests(num)
    expected = {(i, k): say(*requests[i], k) for i in range(num) for k in range(requests[i][1].n)}
    compilations.clear()
    tree_of = {"tree": None if tree == "plain" else tree}
    engine = make_engine(target, drafter, tokenizer, slots=8, max_len=16 * CHUNK, **tree_of)
    together, prefill = [], engine.runner.prefill
    monkeypatch.setattr(engine.runner, "prefill", lambda x, ps, *a: together.append(len(ps)) or prefill(x, ps, *a))
    order = random.Random(2).sample(range(num), num)
    made = list(engine.serve(requests[i] for i in order))
    assert max(together) > 1
    assert len(compilations) <= engine.most_programs_with_rules
    assert len(made) == len(expected)
    accepted = 0
    for completion in made:
        prompt, params = requests[order[completion.prompt_index]]
        assert list(completion.tokens) == expected[order[completion.prompt_index], completion.sample], params
        accepted += sum(completion.statistics.accepted_at)
        assert (completion.logprobs is not None, completion.prompt_logprobs is not None) == (
            params.logprobs,
            params.prompt_logprobs is not None,
        )
        if params.top_logprobs:
            assert [len(best) for best in completion.top_logprobs] == [3] * len(completion.tokens)
    assert accepted > num or tree in ("plain", "auto")  # guesses are at stake, unless plain decoding is faster


# --- what is said of tokens -------------------------------------------------------------------------------------


def test_alternatives_and_the_prompts_log_probabilities_are_those_of_the_targets_softmax(target, engine):
    """Before rules and temperature, whatever the company."""
    prompt = list(range(40, 61))
    asked = SamplingParams(seed=1, max_new_tokens=12, logprobs=5, prompt_logprobs=2, min_tokens=12, logit_bias={7: 3.0})
    quiet = dataclasses.replace(asked, logprobs=False, top_logprobs=0, prompt_logprobs=None)
    only = dataclasses.replace(asked, logprobs=0, top_logprobs=0, prompt_logprobs=0)
    first, second, third = engine.generate([prompt] * 3, [asked, quiet, only])
    assert first.tokens == second.tokens == third.tokens
    assert second.logprobs is second.top_logprobs is second.prompt_logprobs is second.prompt_top_logprobs is None
    assert third.logprobs == first.logprobs and third.prompt_logprobs == first.prompt_logprobs
    assert third.top_logprobs is third.prompt_top_logprobs is None

    tokens = jnp.asarray([[*prompt, *first.tokens]])
    num = tokens.shape[1]

    @jax.jit
    def log_softmax(target, tokens):
        out = target(tokens, jnp.arange(num)[None], jnp.tril(jnp.ones((1, num, num), bool)))
        return jax.nn.log_softmax(target.logits(out.hidden), axis=-1)[0]

    law = np.asarray(log_softmax(target, tokens))
    for said, best, which, at in (
        (first.prompt_logprobs[1:], first.prompt_top_logprobs[1:], prompt[1:], 0),
        (first.logprobs, first.top_logprobs, first.tokens, len(prompt) - 1),
    ):
        own = [law[at + i, token] for i, token in enumerate(which)]
        np.testing.assert_allclose(said, own, rtol=1e-4, atol=1e-4)
        for i, others in enumerate(best):
            order = np.argsort(-law[at + i])[: len(others)]
            assert list(others) == order.tolist()
            np.testing.assert_allclose(list(others.values()), law[at + i, order], rtol=1e-4, atol=1e-4)
    assert (first.prompt_logprobs[0], first.prompt_top_logprobs[0]) == (None, None)
    assert {len(others) for others in first.prompt_top_logprobs[1:]} == {2}
    assert {len(others) for others in first.top_logprobs} == {5}


def test_no_end_counts_before_min_tokens(engine, tokenizer):
    """Neither the target's own, nor a token, nor a string."""
    params = SamplingParams(seed=5, max_new_tokens=MAX_NEW, min_tokens=MAX_NEW)
    (whole,) = engine.generate([[1, 2]], params)
    assert len(whole.tokens) == MAX_NEW and EOS not in whole.tokens
    pieces = list(engine.stream_pieces([1, 2], params))
    assert pieces[-1].tokens == whole.tokens
    going_on = dataclasses.replace(params, min_tokens=0, ignore_eos=True)
    (whole,) = engine.generate([[1, 2]], going_on)
    letter = next(c for c in whole.text if c.isascii())
    at = 1 + next(i for i, token in enumerate(whole.tokens) if engine.detokenizer.text([token]) == letter)
    for min_tokens, ends in ((at - 1, True), (at, False)):
        (made,) = engine.generate([[1, 2]], dataclasses.replace(going_on, min_tokens=min_tokens, stop=[letter]))
        assert (len(made.tokens) == at) == ends and made.tokens == whole.tokens[: len(made.tokens)]


def test_bad_words_are_not_in_the_text(engine):
    """Of one token and of several, and after a space."""
    params = SamplingParams(seed=2, temperature=8.0, max_new_tokens=MAX_NEW, ignore_eos=True, n=8)
    allowed = dataclasses.replace(params, allowed_token_ids=[64, 65, 66, 220])  # a, b, c and the space
    texts = [made.text for made in engine.generate([[1]], allowed)]
    assert set("".join(texts)) == set("abc ") and any(" ab" in text for text in texts)
    assert any("cab" in text for text in texts)
    banned = dataclasses.replace(allowed, bad_words=["cab", " ab", "bb"])
    texts = [made.text for made in engine.generate([[1]], banned)]
    assert not any(word in text for text in texts for word in ("cab", " ab", "bb")) and any("ab" in x for x in texts)


def test_words_are_banned_with_and_without_a_space_before_them(tokenizer):
    vocab = len(tokenizer)
    bytes_of_cab = tuple(tokenizer.encode("cab"))
    rules = row_rules(SamplingParams(bad_words=["cab", " a"]), tokenizer, vocab, (), "p")
    assert rules.bad_words == (bytes_of_cab, tuple(tokenizer.encode(" cab")), tuple(tokenizer.encode(" a")))
    metaspace = metaspace_tokenizer()  # "sky" is the token of the word after a space
    rules = row_rules(SamplingParams(bad_words="sky"), metaspace, vocab, (), "p")
    assert rules.bad_words[0] == tuple(metaspace.convert_tokens_to_ids(["▁sky"]))
    assert row_rules(SamplingParams(logit_bias={3: 0}, min_tokens=0), tokenizer, vocab, (), "p") is None


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(logit_bias={259: 1}), "prompt 0: logit_bias is for token 259: give token ids below 259"),
        (dict(logit_bias={259: 0}), "prompt 0: logit_bias is for token 259: give token ids below 259"),
        (dict(allowed_token_ids=[300]), "prompt 0: allowed_token_ids has token 300: give token ids below 259"),
        (dict(allowed_token_ids=[EOS], min_tokens=1), "prompt 0: .* that does not end the answer, and min_tokens is 1"),
        (dict(allowed_token_ids=[65], bad_words=["b"]), "prompt 0: allowed_token_ids and bad_words leave no token"),
        (dict(bad_words=["a" * 16]), "prompt 0: bad_words has one of 17 tokens: give words of at most 16"),
        (dict(bad_words=[f"a{i}" for i in range(65)]), "prompt 0: bad_words are 130 of several tokens: give at most"),
    ],
)
def test_rules_that_a_target_cannot_follow_are_user_errors(engine, bad, message):
    with pytest.raises(UserError, match=message) as caught:
        engine.generate([[1]], SamplingParams(**bad))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(logit_bias={5: 101}), "logit_bias of token 5 is 101: give a number from -100 to 100"),
        (dict(logit_bias={5: float("-inf")}), "logit_bias of token 5 is -inf: give a number"),
        (dict(logit_bias={5: float("nan")}), "logit_bias of token 5 is nan: give a number"),
        (dict(logit_bias={"a": 1}), "logit_bias is for 'a': give token ids"),
        (dict(logit_bias={-1: 1}), "logit_bias is for -1: give token ids"),
        (dict(logit_bias={1.5: 1}), "logit_bias is for 1.5: give token ids"),
        (dict(logit_bias={5: "x"}), "logit_bias of token 5 is 'x': give a number"),
        (dict(logit_bias=[5]), r"logit_bias is \[5\]: give numbers by token id"),
        (dict(allowed_token_ids=[]), "allowed_token_ids is empty, which allows no token: give some"),
        (dict(allowed_token_ids=["a"]), "allowed_token_ids is .'a'.: give token ids"),
        (dict(bad_words=[" "]), "bad_words is .' '.: give texts that are not empty"),
        (dict(bad_words=[7]), "bad_words is .7.: give texts"),
        (dict(bad_words=["half \ud83d"]), "bad word .* is no text"),
        (dict(min_tokens=-1), "min_tokens is -1: it must be a whole number"),
        (dict(min_tokens=9, max_new_tokens=8), "min_tokens is 9, but max_new_tokens 8: lower it"),
        (dict(repetition_penalty=0), "repetition_penalty is 0: it must be 0.01 to 100"),
        (dict(presence_penalty=2.5), "presence_penalty is 2.5: it must be -2 to 2"),
        (dict(frequency_penalty="x"), "frequency_penalty is 'x': give a number"),
        (dict(logprobs=21), "logprobs is 21: give True, False or a whole number up to 20"),
        (dict(logprobs=-1), "logprobs is -1: give True, False or a whole number up to 20"),
        (dict(logprobs="x"), "logprobs is 'x': give True, False or a whole number up to 20"),
        (dict(prompt_logprobs=1.5), "prompt_logprobs is 1.5: give a whole number up to 20"),
        (dict(top_logprobs=3), "top_logprobs is 3 without logprobs: give logprobs=True, too"),
        (dict(top_logprobs=3, logprobs=2), "logprobs is 2, but top_logprobs 3: leave one of them out"),
        (dict(top_logprobs=99, logprobs=True), "top_logprobs is 99: give a whole number up to 20"),
    ],
)
def test_bad_rules_are_user_errors_that_name_the_value(bad, message):
    with pytest.raises(UserError, match=message) as caught:
        SamplingParams(**bad)
    assert "\n" not in str(caught.value)


def test_rules_come_in_every_shape_that_means_the_same():
    given = SamplingParams(
        logit_bias={"5": np.float32(1.5), np.int64(6): 2},
        allowed_token_ids=np.array([5, 6]),
        bad_words="ab",
        min_tokens=3.0,
        logprobs=np.int64(4),
        prompt_logprobs=True,
    )
    assert given == SamplingParams(
        logit_bias={5: 1.5, 6: 2.0}, allowed_token_ids=(5, 6), bad_words=("ab",), min_tokens=3, logprobs=True,
        top_logprobs=4, prompt_logprobs=0,
    )  # fmt: skip
    assert dataclasses.replace(given, n=2) == dataclasses.replace(given, n=2.0)
    none = SamplingParams(logit_bias=None, bad_words=None, logprobs=None, prompt_logprobs=None, allowed_token_ids=None)
    assert none == SamplingParams()
    assert [SamplingParams(logprobs=x).logprobs for x in (0, 1, True, False)] == [True, True, True, False]
    assert [SamplingParams(logprobs=x).top_logprobs for x in (0, 1, True, False)] == [0, 1, 0, 0]


# --- programs, those of the tests above forgotten ---------------------------------------------------------------


@pytest.mark.slow
def test_a_batch_without_rules_runs_the_programs_that_it_ran_before_there_were_any(
    target, drafter, tokenizer, compilations, monkeypatch
):
    """While a request with rules is in a row, all are in slots with rules; afterwards and before, none is."""
    jax.clear_caches()
    engine = make_engine(target, drafter, tokenizer, slots=8)
    plain = SamplingParams(max_new_tokens=64, seed=1, logprobs=True, ignore_eos=True)
    alone = engine.generate([[1, 2, 3]] * 2, plain)
    assert 0 < len(compilations) <= engine.most_programs
    leaves = len(jax.tree.leaves(engine.runner.empty_slots(2)))

    with_rules, advance = [], engine.runner.advance

    def spying(given, *args, **more):
        with_rules.append((given.rules is not None, given.state.top is not None, len(jax.tree.leaves(given)) > leaves))
        return advance(given, *args, **more)

    monkeypatch.setattr(engine.runner, "advance", spying)
    short = SamplingParams(max_new_tokens=3, min_tokens=3, seed=1)
    mixed = engine.generate([[1, 2, 3], [5]], [plain, short])
    assert mixed[0].tokens == alone[0].tokens
    assert with_rules[0] == (True, True, True) and with_rules[-1] == (False, False, False)
    compilations.clear()
    with_rules.clear()
    assert engine.generate([[1, 2, 3]] * 2, plain)[1].tokens == alone[0].tokens
    assert compilations == [] and not any(map(any, with_rules))


@pytest.mark.slow
def test_after_warming_up_for_rules_no_request_compiles_anything(target, drafter, tokenizer, compilations):
    jax.clear_caches()
    engine = make_engine(target, drafter, tokenizer, slots=8)
    engine.warm_up(rules=True)
    assert engine.most_programs < len(compilations) <= engine.most_programs_with_rules
    compilations.clear()
    for num in (20, 1, 3):
        engine.generate(*zip(*mixed_requests(num), strict=True))
    assert compilations == []


@pytest.mark.slow
def test_rounds_with_rules_take_little_more_memory():
    """By the compiler's account: about one array of the logits' size, of a vocabulary that is most of what there is."""
    target = tiny_target(vocab_size=49152, hidden_size=64)
    engine = Engine(target, None, metaspace_tokenizer(), (1,), slots=8, max_len=512, lookup=4, tree="best_first:8")
    runner, batch = engine.runner, engine.runner.slots_shape(8)
    rules, top = jax.eval_shape(lambda: runner._empty_rules(batch=8))
    temporaries = []
    for given in (batch, batch._replace(rules=rules, state=batch.state._replace(top=top))):
        args = (runner.target, runner.drafter, runner.vocab, given, np.zeros(8, bool), np.int32(1), np.asarray(False))
        compiled = slots.advance.lower(*args, tree=engine.trees[0], shared_noise=True).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    logits = 8 * 8 * 49152 * 4
    assert temporaries[0] < temporaries[1] < temporaries[0] + 1.5 * logits
    assert bytes_of(rules.bias) == logits / 8
