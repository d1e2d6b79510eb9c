"""Answers follow their grammars, and are those of plain decoding under the same masks, token for token.

The reference chooses token by token on the host, from logits of one pass over the text so far and llguidance's mask.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax import Engine, Refused, SamplingParams, UserError
from fasteagle_jax.commands.answers import sampling_params
from fasteagle_jax.commands.generate import _parser as generate_parser
from fasteagle_jax.decoding.sampling import choose, make_sampling
from fasteagle_jax.decoding.sampling_fields import FIELDS
from fasteagle_jax.drafters.files import load_drafter
from fasteagle_jax.engine.grammar import Matcher, unpacked
from fasteagle_jax.engine.requests import sample_seed
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.targets.tokenizer import load_tokenizer
from tests.tiny_folder import make_drafter, make_target

MAX_LEN, CHUNK, EOS = 176, 16, 258
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ann", "bob"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # else a random target writes spaces for ever
}
LIKE_IT = '{"name":"ann","age":7,"tags":[true,false]} {"name":"bob","age":12,"tags":[false]} '


@pytest.fixture(scope="module")
def llguidance():
    return pytest.importorskip("llguidance", reason="of the extra `grammar`")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("grammar") / "target", stop_rate=3.0)


@pytest.fixture(scope="module")
def loaded(folder):
    return load_target(str(folder))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def drafter(folder, loaded):
    made = make_drafter(folder.parent / "drafter", folder, num_levels=3)
    return load_drafter(made, loaded.model.config, loaded.fingerprint)


@pytest.fixture(scope="module")
def make_engine(loaded, drafter, tokenizer):
    """An engine whose trees also hold what is copied from the prompt: of JSON's keys the drafter knows nothing."""

    def make(tree: str | None = "best_first:8+lookup:4", slots: int = 4) -> Engine:
        sizes = dict(slots=slots, max_len=MAX_LEN, chunk=CHUNK)
        return Engine(loaded.model, drafter, tokenizer, (EOS,), tree=tree, **sizes)

    return make


def asks(i: int, **more) -> SamplingParams:
    settings = dict(seed=i, temperature=[0.0, 1.0, 0.7][i % 3], max_new_tokens=60)
    return SamplingParams(**(settings | more))


def is_valid(text: str) -> bool:
    """Whether a text follows SCHEMA, by hand."""
    made = json.loads(text)
    name, age, tags = made.pop("name"), made.pop("age"), made.pop("tags")
    in_range = isinstance(age, int) and 0 <= age <= 120 and 1 <= len(tags) <= 3
    return not made and name in ("ann", "bob") and in_range and all(isinstance(tag, bool) for tag in tags)


@pytest.fixture(scope="module")
def say(loaded, tokenizer, llguidance):
    """Plain decoding under masks, one token at a time."""
    from llguidance.hf import from_tokenizer

    target, vocab = loaded.model, loaded.model.config.vocab_size
    prepared = from_tokenizer(tokenizer, n_vocab=vocab, eos_token=EOS)

    @jax.jit
    def step(tokens, end, mask, sampling):
        num = tokens.shape[1]
        causal = jnp.tril(jnp.ones((1, num, num), bool))
        hidden = target(tokens, jnp.arange(num)[None], causal).hidden
        logits = target.logits(jnp.take_along_axis(hidden, (end - 1)[:, None, None], axis=1))
        return choose(jnp.where(mask, logits, -jnp.inf), end[:, None], sampling)[0, 0]

    def grammar_of(kind, value):
        matcher = llguidance.LLMatcher
        return matcher.grammar_from_regex(value) if kind == "regex" else matcher.grammar_from_json_schema(value)

    def say(prompt: list[int], params: SamplingParams, sample: int = 0) -> list[int]:
        matcher = None
        if params.structured_outputs:
            matcher = llguidance.LLMatcher(prepared, grammar_of(*next(iter(params.structured_outputs.items()))))
        fields = {name: getattr(params, name) for name in FIELDS} | {"seed": sample_seed(params.seed, sample)}
        answer, sampling = [], make_sampling(1, **fields)
        while len(answer) < params.max_new_tokens and EOS not in answer:
            mask = np.ones(vocab, bool)
            if matcher is not None:
                bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
                mask = np.unpackbits(bits, bitorder="little")[:vocab].astype(bool)
            tokens = np.zeros((1, MAX_LEN), np.int32)
            tokens[0, : len(prompt) + len(answer)] = prompt + answer
            end = np.asarray([len(prompt) + len(answer)])
            answer.append(int(step(tokens, end, mask, sampling)))
            if matcher is not None and answer[-1] != EOS:
                assert matcher.consume_token(answer[-1])
        return answer

    return say


def test_constrained_answers_are_those_of_plain_constrained_decoding_in_any_company(make_engine, say, compilations):
    """JSON, expressions and free text, greedy and sampled, with rules and samples beside them."""
    engine = make_engine()
    like_it, free = list(engine.tokens(LIKE_IT, "p")), [1, 2, 3]
    requests = [
        (like_it, asks(0, structured_outputs={"json": SCHEMA})),
        (like_it, asks(1, structured_outputs={"json": SCHEMA}, n=2, logprobs=2)),
        (free, asks(2)),
        (free, asks(3, structured_outputs={"regex": "(true|false)(,(true|false)){2,4};"})),
        (list(engine.tokens("ab ab ab ab", "p")), asks(4, structured_outputs={"regex": "( ab){3,6}[cd]"})),
        (free, asks(5, structured_outputs={"json": {"type": "string", "maxLength": 5}}, stop=["zq"])),
        (free, asks(6, max_new_tokens=4, structured_outputs={"json": SCHEMA})),  # is cut
        (like_it, asks(7)),
    ]
    expected = {(i, k): say(*request, k) for i, request in enumerate(requests) for k in range(request[1].n)}
    compilations.clear()
    made = engine.generate(*zip(*requests, strict=True))
    assert 0 < len(compilations) <= engine.most_programs_with_rules
    assert {(c.prompt_index, c.sample): list(c.tokens) for c in made} == expected
    texts = {(c.prompt_index, c.sample): c.text for c in made}
    assert all(is_valid(texts[key]) for key in ((0, 0), (1, 0), (1, 1)))
    assert re.fullmatch("(true|false)(,(true|false)){2,4};", texts[3, 0])
    assert re.fullmatch("( ab){3,6}[cd]", texts[4, 0]) and len(json.loads(texts[5, 0])) <= 5
    assert [c.finish_reason for c in made if c.prompt_index == 6] == ["length"]
    accepted = [sum(c.statistics.accepted_at) for c in made]
    assert sum(accepted) > 20  # guesses are at stake
    assert list(engine.stream_pieces(*requests[0]))[-1].tokens == made[0].tokens


@pytest.mark.slow
@pytest.mark.parametrize("tree", [None, "best_first:8+lookup:4", "chain", "auto"])
def test_fifty_answers_to_a_json_schema_are_all_valid(make_engine, say, tree):
    """Prompts, settings and company at random; penalties and biases beside a grammar, other rules in the other rows."""
    rng = random.Random(0)
    engine = make_engine(tree, slots=8)
    requests = []
    for i in range(60):
        prompt = list(engine.tokens(LIKE_IT, "p")) if i % 2 else [rng.randrange(256) for _ in range(9)]
        rules = dict(frequency_penalty=0.5, logit_bias={EOS: 2.0}) if i % 5 == 4 else {}
        grammar = dict(structured_outputs={"json": SCHEMA})
        if i % 6 == 5:
            grammar = dict(min_tokens=9, bad_words=["a", "true"], allowed_token_ids=[*range(9, 200), EOS])
            grammar |= dict(repetition_penalty=1.4, presence_penalty=0.7) if i % 4 == 1 else {}
        requests.append((prompt, asks(i, **rules, **grammar)))
    made = engine.generate(*zip(*requests, strict=True))
    constrained = [c for c in made if requests[c.prompt_index][1].structured_outputs]
    assert len(constrained) == 50
    for c in constrained:
        assert c.finish_reason == "stop" and is_valid(c.text)
    for c in made:
        prompt, params = requests[c.prompt_index]
        if params.structured_outputs and params.frequency_penalty == 0:
            assert list(c.tokens) == say(prompt, params)
    plain = make_engine(None, slots=1)
    for i in {*range(4, 60, 5), *range(5, 60, 6)}:
        assert plain.generate([requests[i][0]], requests[i][1])[0].tokens == made[i].tokens


def test_masks_of_a_tree_are_those_of_its_paths(make_engine, llguidance):
    """0 - 1 - 3, 0 - 2; a node that its parent bans and what is below it has none."""
    engine = make_engine(None)
    grammar = engine.grammars.compiled({"regex": "a(bc|d)"}, "p")
    matcher = engine.grammars.matcher(grammar)
    a, b, c, d, z = engine.tokens("abcdz", "p")
    assert np.flatnonzero(unpacked(matcher.mask(), 259)).tolist() == [a]
    matcher.consume(a)
    masks = matcher.masks(np.array([a, b, z, c, d, b, EOS]), np.array([-1, 0, 0, 1, 0, 2, 4]))
    allowed = [set(np.flatnonzero(unpacked(mask, 259)).tolist()) for mask in masks]
    assert allowed == [{b, d}, {c}, set(), {EOS}, {EOS}, set(), set()]
    assert isinstance(matcher, Matcher) and np.flatnonzero(unpacked(matcher.mask(), 259)).tolist() == [b, d]


@pytest.mark.parametrize("place", ["first", "masks", "consume"])
def test_a_grammar_that_cannot_be_followed_further_refuses_its_prompt_alone(make_engine, monkeypatch, place):
    """Of an answer's first mask, of a tree's, and of a token that was chosen."""
    engine = make_engine()
    like_it = list(engine.tokens(LIKE_IT, "p"))
    good, bad = {"json": SCHEMA}, {"regex": "(true|false)(,(true|false)){9};"}
    items = [
        (like_it, asks(0, structured_outputs=good)),
        (like_it, asks(1, structured_outputs=bad, n=2)),
        ([1, 2, 3], asks(2)),
        (like_it, asks(3, structured_outputs=good)),
    ]
    expected = engine.generate(*zip(*(items[:1] + items[2:]), strict=True))
    of_bad, make = set(), engine.grammars.matcher
    too_complex = engine.grammars.compiled(bad, "p")

    def matcher(grammar):
        made = make(grammar)
        if grammar == too_complex:
            of_bad.add(made)
        return made

    def failing(real, calls):
        def call(self, *args):
            if self in of_bad and next(calls) >= (0 if place == "first" else 3):
                raise UserError("structured_outputs cannot be followed further (too complex): simplify them")
            return real(self, *args)

        return call

    name = "mask" if place == "first" else place
    monkeypatch.setattr(engine.grammars, "matcher", matcher)
    monkeypatch.setattr(Matcher, name, failing(getattr(Matcher, name), itertools.count()))
    answers = sorted(engine.serve(items), key=lambda answer: answer.prompt_index)
    assert [answer.prompt_index for answer in answers] == [0, 1, 2, 3]
    assert answers.pop(1) == Refused(1, "structured_outputs cannot be followed further (too complex): simplify them")
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    with pytest.raises(UserError, match="simplify them"):
        engine.generate(*zip(*items, strict=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json": {"type": "frog"}}, "prompt 0: structured_outputs.json is no JSON schema .*frog.*: mend it"),
        ({"json": "{"}, "prompt 0: structured_outputs.json is no JSON schema .*: mend it"),
        ({"regex": "a(b"}, "prompt 0: structured_outputs.regex is no regular expression .*unclosed group.*: mend it"),
    ],
)
def test_what_is_no_grammar_is_a_user_error_of_one_line(make_engine, llguidance, given, message):
    with pytest.raises(UserError, match=message) as caught:
        make_engine(None).generate([[1]], SamplingParams(structured_outputs=given))
    assert "\n" not in str(caught.value)


def test_without_the_package_its_extra_is_named(make_engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        UserError, match=r"prompt 0: structured_outputs need llguidance: pip install 'fasteagle-jax.gramm"
    ):
        make_engine(None).generate([[1]], SamplingParams(structured_outputs={"regex": "a"}))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(structured_outputs={}), "structured_outputs is {}: give one of json, regex, json_object"),
        (dict(structured_outputs={"json": {}, "regex": "a"}), "structured_outputs is .*: give one of json, regex"),
        (dict(structured_outputs={"choice": ["a"]}), "structured_outputs is {'choice': .'a'.}: give one of"),
        (dict(structured_outputs="a"), "structured_outputs is 'a': give one of"),
        (dict(structured_outputs={"json": 7}), "structured_outputs.json is 7: give a JSON schema"),
        (dict(structured_outputs={"regex": ""}), "structured_outputs.regex is '': give a regular expression"),
        (dict(structured_outputs={"json_object": 1}), "structured_outputs.json_object is 1: give True"),
        (dict(structured_outputs={"regex": "a"}, min_tokens=3), "min_tokens with structured_outputs, which say"),
        (dict(structured_outputs={"regex": "a"}, ignore_eos=True), "ignore_eos with structured_outputs, which say"),
        (dict(structured_outputs={"regex": "a"}, bad_words=["b"]), "bad_words with structured_outputs, which say"),
    ],
)
def test_bad_structured_outputs_are_user_errors_that_name_the_value(bad, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**bad)


def test_options_become_structured_outputs(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')

    def asked(*words) -> SamplingParams:
        return sampling_params(generate_parser().parse_args(["--prompt", "a", *map(str, words)]))

    assert asked("--json-schema", schema).structured_outputs == {"json": {"type": "object"}}
    assert asked("--regex", "a+").structured_outputs == {"regex": "a+"}
    assert asked().structured_outputs is None
    with pytest.raises(UserError, match="--json-schema with --regex: leave one of them out"):
        asked("--json-schema", schema, "--regex", "a")
    for text, message in (("{", "is no JSON"), ("[]", "is no JSON schema: give an object")):
        schema.write_text(text)
        with pytest.raises(UserError, match=message):
            asked("--json-schema", schema)


class Limited:
    """What a Matcher needs of llguidance's: a grammar of any tokens below 32, which goes beyond its limits with 7."""

    def __init__(self, consumed=()):
        self.consumed = list(consumed)

    def deep_copy(self):
        return Limited(self.consumed)

    def consume_token(self, token):
        assert not self.is_error()
        self.consumed.append(token)

    def consume_tokens(self, tokens):
        self.consumed += tokens

    def rollback(self, number):
        assert not self.is_error() and number == 1
        self.consumed.pop()

    def compute_bitmask(self):
        return np.array([2 ** len(self.consumed) + 0xFF00FF80], np.uint32).tobytes()

    def is_error(self):
        return 7 in self.consumed

    def get_error(self):
        return "too\nmuch"


def test_a_guess_beyond_the_grammars_limits_fails_if_the_target_chooses_it():
    matcher = Matcher(Limited(), [31])
    #                 root
    tokens = np.array([0, 7, 8, 9, 7, 10, 11])
    parents = np.array([-1, 0, 0, 2, 2, 2, 1])
    found = matcher.masks(tokens, parents)[:, 0]
    depths = [0, None, 1, 2, None, 2, None]
    expected = [0 if depth is None else 2**depth + 0xFF00FF80 for depth in depths]
    assert found.tolist() == expected
    matcher.consume(8)  # where it was before
    with pytest.raises(UserError, match="cannot be followed further .too much."):
        matcher.consume(7)
