"""The engine gives each request what plain decoding gives it alone: whatever the slots, the order, the tree.

Everything is float32 on a tiny target with a byte tokenizer. The reference is `decode.generate`, a request at a time,
and slow versions in Python of what the engine adds: stop strings and streamed text.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import random
import re
import weakref
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_folder import make_target
from tiny_tokenizer import metaspace_tokenizer

from fasteagle_jax import ChatOptions, Completion, Engine, Refused, SamplingParams, UserError
from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.packing import PackedData
from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.sampling_fields import FIELDS
from fasteagle_jax.decoding.speculative import generate_jit
from fasteagle_jax.decoding.state import make_stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.memory import bytes_of
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.engine import slots
from fasteagle_jax.engine.engine import _prompts
from fasteagle_jax.engine.model_runner import ModelRunner
from fasteagle_jax.engine.requests import Piece, sample_seed
from fasteagle_jax.engine.sizes import prompt_buckets, row_counts
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.targets.tokenizer import load_tokenizer
from fasteagle_jax.training.init import init_drafter
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig, make_optimizer
from fasteagle_jax.training.step import TrainState, make_train_step

MAX_LEN, MAX_NEW, CHUNK, N = 328, 48, 16, 3
FEW = (None, TreeSpec("best_first", nodes=4, levels=2))  # to choose from: each is a program for each number of rows
STOP_STRINGS = ("e", "qz", "\n", "ab")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("engine") / "target", stop_rate=4.5)


@pytest.fixture(scope="module")
def target(folder):
    return load_target(str(folder)).model


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def say(target):
    """Plain decoding of one request by the jitted `generate`: one program for all."""

    def say(prompt, params: SamplingParams, sample: int, stop_tokens: tuple[int, ...]) -> list[int]:
        tokens, lengths = pad_prompts([list(prompt) + [0] * (MAX_LEN - len(prompt))], CHUNK)
        fields = {name: getattr(params, name) for name in FIELDS}
        sampling = make_sampling(1, **fields | {"seed": sample_seed(params.seed, sample)})
        limit = min(params.max_new_tokens, MAX_LEN - len(prompt))
        stop = make_stop(1, limit, (*stop_tokens, *[-2] * (4 - len(stop_tokens))))
        made = generate_jit(
            target,
            None,
            tokens,
            lengths * 0 + len(prompt),
            sampling,
            stop,
            max_new=MAX_NEW,
            tree=TreeSpec(),
            chunk=CHUNK,
        )
        return np.asarray(made.tokens)[0, : int(made.lengths[0])].tolist()

    return say


@pytest.fixture(scope="module")
def drafter(target, say):
    """A FastEagle with a window shorter than the prompts, after some steps on what the target says."""
    config = default_config(target.config, num_levels=N, feature_layers=(0, 1), window=64)
    rng = np.random.default_rng(5)
    conversations = []
    for i in range(40):
        prompt = rng.integers(256, size=8).tolist()
        answer = say(prompt, SamplingParams(temperature=0.7, seed=i, max_new_tokens=MAX_NEW), 0, ())
        conversations.append(Conversation.of(str(i), prompt + answer, [[8, 8 + len(answer)]]))
    data = PackedData(conversations, T=64, B=8, seed=0)
    drafter = jax.jit(lambda: init_drafter(config, target, jax.random.key(0), from_target=False))()
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, warmup_steps=5), 80)
    step = make_train_step(graph, optimizer, LossConfig(chunk=512), jnp.float32, seed=0)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    for i in range(80):
        state, _ = step(state, constants, target, data.batch(i))
    return nnx.merge(graph, state.params, constants)


def make_engine(target, drafter, tokenizer, **changes) -> Engine:
    sizes = dict(slots=4, max_len=MAX_LEN, tree="best_first:8", chunk=CHUNK)
    return Engine(target, drafter, tokenizer, (tokenizer.eos_token_id,), **(sizes | changes))


def choices(tree, monkeypatch):
    """The engine's `tree` of a test's word for it: "auto: few" chooses from FEW."""
    if tree != "auto: few":
        return tree
    monkeypatch.setattr("fasteagle_jax.engine.engine.tree_choices", lambda *sizes: FEW)
    return "auto"


# --- equality ---------------------------------------------------------------------------------------------------


def mixed_requests(tokenizer) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 3 to 270 tokens, some with a common beginning; greedy and sampled, with stops, with n."""
    rng = random.Random(0)
    system = [rng.randrange(256) for _ in range(70)]
    requests = []
    for i in range(150):
        length = rng.choice([3, 4, 9, 15, 16, 17, 40, 64, 65, 130, 257, 270])
        prompt = [rng.randrange(256) for _ in range(length)]
        if i % 5 == 0:
            prompt = (system + prompt)[:270]
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.0, 0.7, 1.0]),
            top_k=rng.choice([0, 0, 20]),
            top_p=rng.choice([1.0, 1.0, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.02]),
            seed=rng.randrange(2**32),
            max_new_tokens=rng.choice([1, 2, 7, 20, MAX_NEW]),
            stop=rng.choice([(), (), STOP_STRINGS[:1], STOP_STRINGS]),
            stop_token_ids=rng.choice([(), (), (ord("x"), ord("y"))]),
            ignore_eos=rng.random() < 0.3,
            n=3 if i % 6 == 0 else 1,
        )
        requests.append((prompt, params))
    assert sum(params.n for _, params in requests) == 200
    return requests


@dataclasses.dataclass
class Expected:
    tokens: list[int]
    text: str
    finish_reason: str


def read(tokenizer, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """What the tokens add to the text of the whole prompt."""
    before, text = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in ([*prompt], [*prompt, *tokens]))
    return text[len(os.path.commonprefix([before, text])) :]


def cut(
    tokenizer, prompt: list[int], tokens: list[int], params: SamplingParams, stop_tokens: tuple[int, ...]
) -> Expected:
    """The answer up to the token with which the text, whole characters only, first holds a stop string."""
    by_token = tokens[-1] in stop_tokens
    said = tokens[:-1] if by_token else tokens
    for i in range(1, len(said) + 1):
        text = read(tokenizer, prompt, said[:i]).rstrip("\ufffd")
        found = [text.index(stop) for stop in params.stop if stop in text]
        if found:
            return Expected(tokens[:i], text[: min(found)], "stop")
    return Expected(tokens, read(tokenizer, prompt, said), "stop" if by_token else "length")


@pytest.fixture(scope="module")
def requests(tokenizer):
    return mixed_requests(tokenizer)


@pytest.fixture(scope="module")
def expected(say, requests, tokenizer) -> Callable[[Iterable[int]], dict[tuple[int, int], Expected]]:
    """The answers to the requests of these numbers by request and sample, each made once."""

    @functools.cache
    def answers(i: int) -> list[Expected]:
        prompt, params = requests[i]
        stop_tokens = (*params.stop_token_ids, *(() if params.ignore_eos else (tokenizer.eos_token_id,)))
        said = [say(prompt, params, sample, stop_tokens) for sample in range(params.n)]
        return [cut(tokenizer, prompt, tokens, params, stop_tokens) for tokens in said]

    def expected(numbers: Iterable[int]) -> dict[tuple[int, int], Expected]:
        return {(i, sample): answer for i in numbers for sample, answer in enumerate(answers(i))}

    return expected


def compare(made: list[Completion], expected: dict[tuple[int, int], Expected], order: list[int]) -> None:
    assert len(made) == len(expected)
    for completion in made:
        answer = expected[order[completion.prompt_index], completion.sample]
        assert list(completion.tokens) == answer.tokens
        assert (completion.text, completion.finish_reason) == (answer.text, answer.finish_reason)
        took = completion.statistics
        assert len(completion.tokens) == 1 + took.rounds + sum(took.accepted_at) == len(completion.depths)


@pytest.mark.parametrize(
    ("slots", "tree", "num", "orders"),
    [
        (4, "best_first:8", 40, 1),
        *[
            pytest.param(n, tree, 150, orders, marks=pytest.mark.slow)
            for n, tree, orders in (
                (4, "best_first:8", 2),
                (4, "auto: few", 1),
                (4, "best_first:8+lookup:4", 2),
                *((n, tree, 2) for n in (1, 16) for tree in ("best_first:8", "auto")),
            )
        ],
    ],
)
def test_mixed_requests_are_answered_as_plain_decoding_answers_each_alone(
    target, drafter, tokenizer, requests, expected, slots, tree, num, orders, compilations, monkeypatch
):
    tree = choices(tree, monkeypatch)
    as_they_are = list(range(num))
    answers = expected(as_they_are)
    reasons = [answer.finish_reason for answer in answers.values()]
    assert min(reasons.count("stop"), reasons.count("length")) > len(answers) / 5  # both are at stake
    compilations.clear()
    engine = make_engine(target, drafter, tokenizer, slots=slots, tree=tree)
    accepted = 0
    for order in (random.Random(slots).sample(as_they_are, num), as_they_are)[:orders]:
        made = engine.generate([requests[i][0] for i in order], [requests[i][1] for i in order])
        compare(made, answers, order)
        accepted += sum(sum(completion.statistics.accepted_at) for completion in made)
    if tree != "auto":
        assert accepted > len(answers)  # guesses are what is being tested
    assert 0 < len(compilations) <= engine.most_programs


def test_without_a_drafter_it_is_a_plain_decoder_through_the_same_code(target, tokenizer, requests, expected):
    engine, numbers = make_engine(target, None, tokenizer), list(range(40))
    made = engine.generate(*zip(*(requests[i] for i in numbers), strict=True))
    compare(made, expected(numbers), numbers)
    assert {completion.statistics.acceptance_length for completion in made if completion.statistics.rounds} == {1.0}


def test_lookup_alone_needs_no_drafter(target, tokenizer, requests, expected, compilations):
    numbers = list(range(40))
    answers = expected(numbers)
    compilations.clear()
    engine = make_engine(target, None, tokenizer, lookup=4)
    made = engine.generate(*zip(*(requests[i] for i in numbers), strict=True))
    compare(made, answers, numbers)
    assert sum(sum(completion.statistics.accepted_at[1:]) for completion in made) > 20
    assert 0 < len(compilations) <= engine.most_programs


def test_a_lookup_of_no_tokens_is_a_user_error_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="lookup is 0: give 1 to 8 tokens, or None for no lookup"):
        Engine.load(str(tmp_path / "no such target"), lookup=0)


def test_a_second_run_compiles_nothing(target, drafter, tokenizer, requests, compilations):
    engine = make_engine(target, drafter, tokenizer)
    prompts, params = zip(*requests[:30], strict=True)
    orders = (prompts, params), (prompts[::-1], params[::-1])
    for order in orders:  # which prompts are prefilled together depends on it
        engine.generate(*order)
    compilations.clear()
    for order in orders:
        engine.generate(*order)
    assert compilations == []


def test_completions_come_as_they_are_finished(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer)
    limits = [MAX_NEW, 2, 3, 4, 2]
    params = [SamplingParams(temperature=0, max_new_tokens=limit, ignore_eos=True) for limit in limits]
    order = [completion.prompt_index for completion in engine.complete([[1, 2]] * 5, params)]
    assert order[-1] == 0 and sorted(order) == list(range(5))


def test_an_answer_that_ends_with_its_first_token_is_handed_out_before_any_round(
    target, drafter, tokenizer, monkeypatch
):
    """The device call that followed went on for up to 16 rounds: rows that are done from the start did not end it."""
    engine = make_engine(target, drafter, tokenizer)
    advance, calls = engine.runner.advance, []
    monkeypatch.setattr(engine.runner, "advance", lambda *args, **more: calls.append(1) or advance(*args, **more))
    long = SamplingParams(temperature=0, max_new_tokens=MAX_NEW, ignore_eos=True)
    (reference,) = engine.generate([[1, 2]], long)
    short = dataclasses.replace(long, max_new_tokens=1)
    stopped = dataclasses.replace(long, stop_token_ids=[reference.tokens[0]])
    calls.clear()
    completions = engine.complete([[1, 2]] * 3, [long, short, stopped])
    first = [next(completions), next(completions)]
    assert [(c.prompt_index, c.finish_reason, len(c.tokens)) for c in first] == [(1, "length", 1), (2, "stop", 1)]
    assert not calls
    assert next(completions).tokens == reference.tokens


# --- serve ------------------------------------------------------------------------------------------------------

SHORT = SamplingParams(temperature=0, max_new_tokens=4, ignore_eos=True)


@pytest.mark.parametrize("num", [150, pytest.param(20_000, marks=pytest.mark.slow)])
def test_prompts_of_a_generator_are_served_in_constant_memory(target, tokenizer, num):
    """Few are read ahead, and nothing stays of those answered."""
    engine, in_memory, reports = make_engine(target, None, tokenizer, slots=8), weakref.WeakSet(), []
    make = engine.requests

    def requests(*args, **more):
        made = make(*args, **more)
        in_memory.update(made)
        return made

    engine.requests = requests
    read = answered = most_ahead = most_in_memory = 0

    def pairs():
        nonlocal read
        for i in range(num):
            read += 1
            yield [1 + i % 200, 2], dataclasses.replace(SHORT, max_new_tokens=1 + i % 3)

    tokens = {}
    for completion in engine.serve(pairs(), progress=reports.append):
        answered += 1
        most_ahead, most_in_memory = max(most_ahead, read - answered), max(most_in_memory, len(in_memory))
        i = completion.prompt_index
        assert tokens.setdefault((i % 600), completion.tokens) == completion.tokens
    assert answered == read == num
    assert most_ahead <= 5 * 8 and most_in_memory <= 7 * 8
    last = reports[-1]
    assert (last.prompts, last.completions, last.refused) == (num, num, 0)
    assert last.new_tokens == sum(1 + i % 3 for i in range(num))
    assert [report.completions for report in reports] == sorted(report.completions for report in reports)
    assert tokens[7] == engine.generate([[8, 2]], dataclasses.replace(SHORT, max_new_tokens=2))[0].tokens


def test_prompts_that_cannot_be_answered_are_refused_one_by_one(target, tokenizer):
    engine = make_engine(target, None, tokenizer)
    pairs = [([1, 2], SHORT), ([1] * MAX_LEN, SHORT), ([3], None), ("", SHORT)]
    pairs += [([4], dataclasses.replace(SHORT, stop="<|im_end|>\n"))] + [("", None)] * 200 + [([5], SHORT)]
    answers = {answer.prompt_index: answer for answer in engine.serve(iter(pairs))}
    assert sorted(answers) == list(range(len(pairs)))
    good = [0, 2, len(pairs) - 1]
    assert [i for i in sorted(answers) if isinstance(answers[i], Completion)] == good
    for i in good:
        assert answers[i].tokens == engine.generate([pairs[i][0]], pairs[i][1])[0].tokens
    assert answers[1] == Refused(
        1, f"the prompt has {MAX_LEN} tokens, but a request has {MAX_LEN}, answer included: shorten it or raise max_len"
    )
    assert answers[3].reason == "the prompt is empty: give it some text"
    assert "the prompt has the stop string" in answers[4].reason
    assert list(engine.serve([])) == [] and len(list(engine.serve([("", None)] * 70))) == 70


@pytest.mark.parametrize("item", ["raise", "no pair", ([1], {"n": 2}), ([1],), ([1], None, {})], ids=str)
def test_what_an_iterable_raises_comes_through_after_the_answers_before_it(target, tokenizer, item):
    engine = make_engine(target, None, tokenizer)

    def pairs():
        yield from [([1, 2], SHORT), ("", SHORT), ([3], SHORT)]
        if item == "raise":
            raise KeyError("the database is gone")
        yield item

    answers = []
    with pytest.raises(KeyError if item == "raise" else UserError) as caught:
        for answer in engine.serve(pairs()):
            answers.append(answer)
    assert sorted(answer.prompt_index for answer in answers) == [0, 1, 2]
    assert "database" in str(caught.value) or "item 3 of the iterable is" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(engine.generate([[1, 2]], SHORT)) == 1  # and the engine is as good as new


def test_an_iterator_that_has_nothing_for_now_may_give_more_after_an_answer(target, tokenizer):
    """A dialogue: each question follows the answer before."""
    engine, said, turns = make_engine(target, None, tokenizer), [1, 2], 0

    class Dialogue:
        ready = True

        def __iter__(self):
            return self

        def __next__(self):
            if not self.ready:
                raise StopIteration
            self.ready = False
            return list(said), SHORT

    dialogue = Dialogue()
    for turns, completion in enumerate(engine.serve(dialogue), 1):
        assert completion.tokens == engine.generate([said], SHORT)[0].tokens
        said += [*completion.tokens, 7]
        dialogue.ready = turns < 4
    assert turns == 4


# --- text -------------------------------------------------------------------------------------------------------


def test_of_waiting_requests_the_lowest_number_is_next(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer, slots=1)
    params = SamplingParams(temperature=0, max_new_tokens=2)
    asked = [request for number in (3, 1, 2) for request in engine.requests(number, [5, 6, 7], params)]
    answers = itertools.chain.from_iterable(engine._serve(iter(asked), rounds=4))
    assert [completion.prompt_index for completion in answers] == [1, 2, 3]


@pytest.mark.parametrize("seed", range(6))
def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(target, drafter, tokenizer, seed):
    engine = make_engine(target, drafter, tokenizer)
    params = SamplingParams(seed=seed, max_new_tokens=MAX_NEW, ignore_eos=True, stop="zq")
    pieces = list(engine.stream_pieces("häß", params))
    completion = pieces.pop()
    assert isinstance(completion, Completion) and all(isinstance(piece, Piece) for piece in pieces)
    (alone,) = engine.generate("häß", params)
    assert completion.tokens == alone.tokens
    assert "".join(piece.text for piece in pieces) == completion.text == alone.text
    assert list(engine.stream("häß", params)) == [piece.text for piece in pieces if piece.text]


def test_what_ends_an_answer_is_in_its_tokens_and_not_in_its_text(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer)
    prompt = tokenizer.encode("sky")
    going_on = SamplingParams(seed=2, max_new_tokens=MAX_NEW, ignore_eos=True)
    (whole,) = engine.generate([prompt], going_on)
    at = next(i for i, token in enumerate(whole.tokens) if i > 4 and token not in whole.tokens[:i])
    end = whole.tokens[at]
    ending = dataclasses.replace(going_on, stop_token_ids=[end])
    for params in (ending, dataclasses.replace(ending, stop="zq")):  # with and without a stream's text
        (made,) = engine.generate([prompt], params)
        assert (made.tokens, made.finish_reason, made.stop_reason) == (whole.tokens[: at + 1], "stop", end)
        assert made.text_tokens == made.tokens[:-1]
        assert made.text == read(tokenizer, prompt, made.tokens[:-1])
    pieces = list(engine.stream_pieces(prompt, ending))
    assert "".join(piece.text for piece in pieces[:-1]) == pieces[-1].text == made.text
    # The target's own end has no reason, unless it was asked for although those are ignored.
    own = Engine(target, drafter, tokenizer, (end,), slots=4, max_len=MAX_LEN, tree="best_first:8", chunk=CHUNK)
    for ignore_eos, reason in ((False, None), (True, end)):
        (made,) = own.generate([prompt], dataclasses.replace(ending, ignore_eos=ignore_eos))
        assert (made.tokens, made.stop_reason) == (whole.tokens[: at + 1], reason)


def test_a_stop_string_that_the_last_flush_completes_is_the_reason(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer)
    params = SamplingParams(seed=2, max_new_tokens=MAX_NEW, ignore_eos=True)
    (whole,) = engine.generate([[1, 2]], params)
    text = [read(tokenizer, [1, 2], whole.tokens[:n]) for n in range(1, len(whole.tokens) + 1)]
    num = next(n for n, so_far in enumerate(text, 1) if so_far.count("\ufffd") == 1 and so_far.endswith("\ufffd"))
    (made,) = engine.generate([[1, 2]], dataclasses.replace(params, max_new_tokens=num, stop="\ufffd"))
    assert (made.text, made.finish_reason, made.stop_reason) == (text[num - 1][:-1], "stop", "\ufffd")


def test_a_special_token_as_a_stop_string_ends_the_answer(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer)
    params = SamplingParams(seed=3, max_new_tokens=MAX_NEW, ignore_eos=True, stop=["<|im_end|>", "zq"])
    (request,) = engine.requests(0, [1, 2], params)
    assert (request.stop_tokens, request.text._stop) == ((258,), ["zq"])
    (request,) = engine.requests(0, [1, 2], dataclasses.replace(params, stop="<|endoftext|>", ignore_eos=False))
    assert (request.stop_tokens, request.text) == ((256, 258), None)
    with pytest.raises(UserError, match=r"prompt 7 has the stop string .*<\|im_end\|>: give its id, 258,") as caught:
        engine.requests(7, [1, 2], dataclasses.replace(params, stop="<|im_end|>\n"))
    assert "stop_token_ids" in str(caught.value) and "\n" not in str(caught.value)


def test_with_a_sentencepiece_tokenizer_prompt_and_text_are_the_text_of_all_tokens(target, drafter):
    tokenizer = metaspace_tokenizer()
    engine = make_engine(target, drafter, tokenizer)
    params = SamplingParams(seed=5, max_new_tokens=MAX_NEW, ignore_eos=True)
    prompt = tokenizer.encode("sky", add_special_tokens=False)
    (whole,) = engine.generate([prompt], params)
    at = next(i for i, token in enumerate(whole.tokens) if engine.detokenizer.token_text(token).startswith(" "))
    for so_far in (prompt, [*prompt, *whole.tokens[:at]]):  # the second answer begins with a space
        (made,) = engine.generate([so_far], dataclasses.replace(params, max_new_tokens=24))
        (streamed,) = engine.generate([so_far], dataclasses.replace(params, max_new_tokens=24, stop="zq"))
        before, both = engine.detokenizer.decode(so_far), engine.detokenizer.decode([*so_far, *made.tokens])
        assert made.text == streamed.text == both.removeprefix(before)
    assert made.text.startswith(" ") and made.tokens == whole.tokens[at : at + 24]


# --- arguments --------------------------------------------------------------------------------------------------


def test_texts_tokens_and_conversations_are_prompts(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer)
    params = SamplingParams(temperature=0, max_new_tokens=8)
    talk = [{"role": "user", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    made = engine.generate([rendered, tokenizer.encode(rendered), talk], params)
    assert len({completion.tokens for completion in made}) == 1
    for alone in (rendered, tokenizer.encode(rendered), talk):
        assert engine.generate(alone, params)[0].tokens == made[0].tokens


def test_the_template_is_given_tools_and_variables_in_every_way_of_asking(target, drafter, folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = (
        "{{ mood }}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
        "{{ m.content or m.tool_calls[0].function.arguments.a }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    engine = make_engine(target, drafter, tokenizer)
    params = SamplingParams(temperature=0, max_new_tokens=8)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 7}'}}]}
    talk = [{"role": "user", "content": "Hello"}, call, {"role": "tool", "content": "8"}]
    chat = ChatOptions(tools=[{"type": "function", "function": {"name": "f"}}], chat_template_kwargs={"mood": "Calm "})
    text = "Calm fHello78>"
    assert engine.encode(talk, "x", chat) == tuple(tokenizer.encode(text))
    expected = engine.generate(text, params)[0]
    assert engine.generate([talk, text], params, chat)[0].tokens == expected.tokens
    made = engine.generate([talk, talk], params, [chat, ChatOptions(continue_final_message=True)])
    assert made[0].tokens == expected.tokens and made[1].prompt_tokens == len("Hello78")
    assert "".join(engine.stream(talk, params, chat)) == expected.text
    unknown = ChatOptions(chat_template_kwargs={"thinking": True})
    served = {
        x.prompt_index: x for x in engine.serve([(talk, params, chat), (text, params, None), (talk, None, unknown)])
    }
    assert served[0].tokens == served[1].tokens == expected.tokens
    assert served[2].reason.startswith("the prompt: the chat template has no variable 'thinking'")
    with pytest.raises(UserError, match="prompt 0: the chat template has no variable 'thinking'"):
        engine.generate(talk, params, unknown)
    with pytest.raises(UserError, match="1 chat options for 2 prompts: give one, or one a prompt"):
        engine.generate([talk, talk], params, [chat])
    with pytest.raises(UserError, match=r"message 1: its tool_calls\[0\] is 5"):
        engine.generate([talk[0], {"role": "assistant", "tool_calls": [5]}], params)


def test_log_probabilities_come_where_asked_for(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer)
    asked = SamplingParams(seed=1, max_new_tokens=12, logprobs=True, ignore_eos=True)
    first, second = engine.generate([[1, 2, 3]] * 2, [asked, dataclasses.replace(asked, logprobs=False)])
    assert second.logprobs is None and first.tokens == second.tokens
    plain = make_engine(target, None, tokenizer).generate([[1, 2, 3]], asked)[0]
    np.testing.assert_allclose(first.logprobs, plain.logprobs, rtol=1e-4, atol=1e-4)
    assert len(first.logprobs) == 12 and max(first.logprobs) < 0


def test_the_samples_of_a_prompt_differ_and_the_first_is_that_of_n_1(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer)
    params = SamplingParams(seed=7, n=3, max_new_tokens=12, ignore_eos=True)
    made = engine.generate([[5, 6], [7, 8]], params)
    assert [(c.prompt_index, c.sample) for c in made] == list(itertools.product(range(2), range(3)))
    for prompt in range(2):
        assert len({completion.tokens for completion in made if completion.prompt_index == prompt}) == 3
    assert made[0].tokens == engine.generate([[5, 6]], dataclasses.replace(params, n=1))[0].tokens


def test_an_answer_ends_at_max_len(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer)
    (made,) = engine.generate([[1] * (MAX_LEN - 10)], SamplingParams(max_new_tokens=100, ignore_eos=True))
    assert (len(made.tokens), made.finish_reason) == (10, "length")


@pytest.mark.parametrize(
    ("prompts", "sampling", "message"),
    [
        ([[1], []], None, "prompt 1 is empty"),
        (["ok", ""], None, "prompt 1 is empty"),
        ([[1], [1] * MAX_LEN], None, f"prompt 1 has {MAX_LEN} tokens, but a request has {MAX_LEN}"),
        ([[1], [2, 70_000]], None, "prompt 1 holds 70000: give token ids below"),
        ([[1], [2]], [SamplingParams()], "1 sampling params for 2 prompts"),
        ([[{"role": "tool", "content": "x"}]], None, "prompt 0: the chat template refuses"),
        ([[1]], SamplingParams(stop_token_ids=tuple(range(16))), "prompt 0 has 17 stop tokens: give at most 16"),
        (["ok", "half \ud83d"], None, r"prompt 1 is no text \(character 6 is half of one, '.ud83d'\)"),
        ([[{"role": "user", "content": "half \ud83d"}]], None, "prompt 0: message 0: its content is no text"),
        ([[{"role": "user \ud83d", "content": "a"}]], None, "prompt 0: the conversation is no text"),
        ([{"role": "user", "content": None}], None, "prompt 0: message 0: its content is None: give a text"),
        ([[{"role": "user", "content": 7}]], None, "prompt 0: message 0: its content is 7: give a text"),
        ([[{"role": "user", "content": [{"type": "image_url"}]}]], None, "message 0: its content.0. is {'type'"),
        ([[{"role": "user", "content": "a"}, "b"]], None, "prompt 0: message 1 is 'b': give an object"),
        ([[{"content": "a"}]], None, "prompt 0: message 0 has the role None"),
        ({"role": "user", "content": "a"}, None, "prompt 0 is {'role': 'user', 'content': 'a'}: give a text, token"),
        ([[1], 7], None, "prompt 1 is 7: give a text"),
        (["a", 7], None, "prompt 1 is 7: give a text, token ids or a list of messages"),
        (None, None, "prompt 0 is None: give a text"),
        (b"a", None, "prompt 0 is b'a': give a text"),
        ("a", {"temperature": 0}, "sampling params has {'temperature': 0}: give SamplingParams"),
        (["a", "b"], [SamplingParams(), 3], "sampling params has 3: give SamplingParams"),
        ([[1, True]], None, "prompt 0 holds True: give token ids below"),
        ([[1, 1.5]], None, "prompt 0 holds 1.5: give token ids below"),
    ],
)
def test_prompts_that_cannot_be_answered_are_user_errors(target, tokenizer, prompts, sampling, message):
    with pytest.raises(UserError, match=message) as caught:
        make_engine(target, None, tokenizer).generate(prompts, sampling)
    assert "\n" not in str(caught.value)


def test_a_token_that_the_embedding_lacks_is_refused_in_every_kind_of_prompt(target, folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["[PAD]"])  # 259
    engine = make_engine(target, None, tokenizer)
    talk = [{"role": "user", "content": "a [PAD] b"}]
    for prompt in ("a [PAD] b", talk, tokenizer.encode("a [PAD] b")):
        for ask in (engine.generate, lambda prompt: next(engine.stream(prompt))):
            with pytest.raises(UserError, match="^prompt 0 holds (token )?259"):
                ask(prompt)


def test_prompts_come_in_every_shape_that_means_the_same(target, tokenizer):
    engine = make_engine(target, None, tokenizer)
    text = engine.tokens("Hello", "p")
    for same in (list(text), np.array(text), jnp.array(text), [np.int64(token) for token in text], tuple(text)):
        assert engine.tokens(same, "p") == text and all(type(token) is int for token in engine.tokens(same, "p"))
    said = engine.tokens([{"role": "user", "content": "Hello"}], "p")
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert engine.tokens([{"role": "user", "content": parts}], "p") == said
    for prompts, num in ((np.array([text, text]), 2), (np.array(text), 1), (jnp.array(text), 1), ([np.array(text)], 1)):
        listed = _prompts(prompts)
        assert [engine.tokens(prompt, "p") for prompt in listed] == [text] * num


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(temperature=-1), "temperature is -1"),
        (dict(top_p=0), "top_p is 0"),
        (dict(min_p=2), "min_p is 2"),
        (dict(n=0), "n is 0"),
        (dict(max_new_tokens=1.5), "max_new_tokens is 1.5"),
        (dict(max_new_tokens=float("inf")), "max_new_tokens is inf"),
        (dict(n=float("nan")), "n is nan"),
        (dict(stop_token_ids=[2**31]), "stop_token_ids is"),
        (dict(seed="x"), "seed is 'x': give a number"),
        (dict(stop=[""]), "stop is"),
        (dict(stop_token_ids=["a"]), "stop_token_ids is"),
        (dict(stop_token_ids=[True]), "stop_token_ids is"),
        (dict(stop_token_ids=7), "stop_token_ids is 7"),
        (dict(stop=7), "stop is 7"),
        (dict(stop=["half \ud83d"]), "stop string .* is no text"),
        (dict(seed=np.bool_(True)), "seed is True: give a number"),
        (dict(seed=7.5), "seed is 7.5: it must be"),
        (dict(top_p=np.float32(2)), "top_p is 2.0: it must be"),
        (dict(temperature=10**400), "temperature is 1000"),
        (dict(temperature=np.array([1.0, 2.0])), "temperature is array"),
        (dict(temperature=None), "temperature is None: give a number"),
        (dict(ignore_eos=1), "ignore_eos is 1: give True or False"),
        (dict(logprobs=-5), "logprobs is -5: give True, False or a whole number up to 20"),
    ],
)
def test_bad_sampling_params_are_user_errors_that_name_the_value(bad, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(slots=0), "slots is 0"),
        (dict(max_len=4000), "max_len is 4000: give a whole number up to the target's 1024"),
        (dict(slots=600_000, max_len=1024), "memory needed is .* the device has .* free: lower slots"),
        (dict(tree="bush"), "tree 'bush' is not known"),
    ],
)
def test_sizes_that_cannot_be_are_user_errors(target, drafter, tokenizer, bad, message):
    with pytest.raises(UserError, match=message):
        make_engine(target, drafter, tokenizer, **bad)


def test_numbers_are_numbers_and_arrays_are_lists():
    given = SamplingParams(
        temperature=np.float32(0.5),
        top_k=np.array(3),
        top_p=jnp.float32(0.5),
        min_p=0,
        seed=np.int64(7),
        max_new_tokens=12.0,
        n=np.uint8(2),
        stop=np.array(["a", "b"]),
        stop_token_ids=np.array([5, 6]),
        ignore_eos=np.bool_(True),
        logprobs=None,
    )
    assert given == SamplingParams(
        temperature=0.5, top_k=3, top_p=0.5, seed=7, max_new_tokens=12, n=2, stop=("a", "b"), stop_token_ids=(5, 6),
        ignore_eos=True,
    )  # fmt: skip
    types = {name: type(value) for name, value in vars(given).items()}
    assert types == {name: type(value) for name, value in vars(SamplingParams()).items()}
    assert SamplingParams(stop="ab").stop == ("ab",) and SamplingParams(stop=None, stop_token_ids=None).stop == ()
    seeds = {sample_seed(SamplingParams(seed=seed, n=3).seed, 2) for seed in (7, 7.0, np.uint32(7), jnp.int32(7))}
    assert len(seeds) == 1


# --- sizes ------------------------------------------------------------------------------------------------------


def test_with_a_window_the_drafters_cache_does_not_grow_with_the_length(target, drafter, tokenizer):
    sizes = [make_engine(target, drafter, tokenizer, max_len=n).memory for n in (256, 512, 1024)]
    assert sizes[0].drafter_cache == sizes[1].drafter_cache == sizes[2].drafter_cache
    assert sizes[2].target_cache > 1.9 * sizes[1].target_cache
    whole = jax.jit(lambda: FastEagle(dataclasses.replace(drafter.config, window=None), jax.random.key(0)))()
    sizes = [make_engine(target, whole, tokenizer, max_len=n).memory.drafter_cache for n in (256, 1024)]
    assert sizes[1] > 3 * sizes[0]


def test_the_stated_memory_of_the_caches_is_what_is_taken(target, drafter, tokenizer):
    engine = make_engine(target, drafter, tokenizer)
    state = engine.runner.empty_slots(engine.num_slots).state
    for name in ("target_cache", "drafter_cache"):
        taken = sum(x.nbytes for x in jax.tree.leaves(getattr(state, name)))
        assert getattr(engine.memory, name) == taken


def test_the_stated_memory_holds_two_batches_while_rows_are_resized(target, drafter, tokenizer):
    """By the compiler's account; only the batch of all slots was stated."""
    engine = make_engine(target, drafter, tokenizer, slots=16)
    batches = {rows: engine.runner.slots_shape(rows) for rows in engine.row_counts}
    memory, caches = engine.memory, {}
    for rows, batch in batches.items():
        caches[rows] = bytes_of((batch.state.target_cache, batch.state.drafter_cache))
    stated = memory.target_cache + memory.drafter_cache + memory.resizing
    for old, new in itertools.permutations(engine.row_counts, 2):
        rows, in_use = np.zeros(new, np.int32), np.zeros(new, bool)
        account = slots.take_rows.lower(batches[old], rows, in_use).compile().memory_analysis()
        other_arrays = bytes_of(batches[old]) - caches[old] + bytes_of(batches[new]) - caches[new]
        alive = account.argument_size_in_bytes + account.output_size_in_bytes + account.temp_size_in_bytes
        assert 0.95 * alive < stated + other_arrays
        assert stated < 1.05 * alive
    assert "resizing" in str(memory)
    assert make_engine(target, drafter, tokenizer, slots=4).memory.resizing == 0  # always 4 rows


def test_log_probabilities_cost_nothing_if_nobody_wants_them(target, drafter, tokenizer):
    """The logits of the accepted path were gathered every round: they are made in a branch of the program alone."""
    engine = make_engine(target, drafter, tokenizer)
    runner, batch = engine.runner, engine.runner.slots_shape(4)
    args = (runner.target, runner.drafter, runner.vocab, batch, np.zeros(4, bool), np.int32(1), np.asarray(False))
    text = slots.advance.lower(*args, tree=engine.trees[0], shared_noise=True).compile().as_text()
    path_logits = f"= f32[4,{N + 1},{target.config.vocab_size}]"
    computations = {lines[0].split()[0]: lines for lines in computations_of(text)}
    branches = [
        name
        for lines in computations.values()
        for line in lines
        if "conditional(" in line and "/commit/cond" in line
        for name in re.findall(r"%[\w.\-]+", line.split("branch_computations=")[1].split("}")[0])
    ]
    inside = set()
    while branches:
        inside.add(name := branches.pop())
        called = re.findall(r"%[\w.\-]+", " ".join(line.split("), ", 1)[-1] for line in computations[name][1:]))
        branches += [name for name in called if name in computations and name not in inside]
    making = [name for name, lines in computations.items() if any(path_logits in line for line in lines)]
    assert making and set(making) <= inside


def computations_of(text: str) -> list[list[str]]:
    """The lines of each computation of a compiled program, its name first."""
    found: list[list[str]] = []
    for line in text.splitlines():
        if line.endswith("{") and line.startswith(("%", "ENTRY")):
            found.append([line.removeprefix("ENTRY ")])
        elif line.startswith(" ") and found:
            found[-1].append(line)
    return found


def test_numbers_of_buckets_and_rows_are_few():
    assert prompt_buckets(2048, 64) == (256, 1024, 2048)
    assert prompt_buckets(100, 64) == (128,)
    assert [row_counts(n) for n in (1, 4, 8, 16, 64)] == [(1,), (4,), (8, 2), (16, 4), (64, 16, 4)]


# --- prefill ----------------------------------------------------------------------------------------------------


@pytest.fixture
def prefills(monkeypatch):
    """(number of prompts, first chunk, number of chunks) of every prefill call."""
    calls, run = [], ModelRunner.prefill

    def counting(self, prefix, prompts, bucket, chunks, drafts):
        calls.append((len(prompts), chunks.start, len(chunks)))
        return run(self, prefix, prompts, bucket, chunks, drafts)

    monkeypatch.setattr(ModelRunner, "prefill", counting)
    return calls


def test_a_conversation_goes_on_without_prefilling_what_was_said_before(target, drafter, tokenizer, prefills):
    engine = make_engine(target, drafter, tokenizer)
    said = list(range(5 * CHUNK + 3))
    params = SamplingParams(temperature=0, max_new_tokens=4)
    list(engine.stream(said, params))
    assert prefills == [(1, i, 1) for i in range(6)]  # one a call, each kept
    prefills.clear()
    longer = list(engine.stream_pieces(said + [1] * 20, params))[-1]
    assert prefills == [(1, 5, 1), (1, 6, 1)]
    assert longer.tokens == make_engine(target, drafter, tokenizer).generate([said + [1] * 20], params)[0].tokens


def test_a_common_beginning_is_prefilled_once(target, drafter, tokenizer, prefills):
    engine = make_engine(target, drafter, tokenizer)
    system = list(range(10 * CHUNK + 3))
    params = SamplingParams(temperature=0, max_new_tokens=4)
    together = engine.generate([system + [200 + i] * 5 for i in range(6)], params)
    assert sum(num * chunks for num, _, chunks in prefills) == 10 + 6  # the beginning's, and one of each prompt
    for i, completion in enumerate(together):
        alone = make_engine(target, drafter, tokenizer).generate([system + [200 + i] * 5], params)
        assert alone[0].tokens == completion.tokens


def test_prompts_that_begin_alike_share_chunks_as_a_tree(target, drafter, tokenizer, prefills):
    """In another bucket, too, and with no memory for them not at all."""
    root, params = [3] * (2 * CHUNK), SamplingParams(temperature=0, max_new_tokens=2)
    left, right = root + [4] * CHUNK, root + [5] * CHUNK
    prompts = [left + [1], left + [2], right + [1], right + [2] * 5 * CHUNK]
    engine = make_engine(target, drafter, tokenizer)
    together = engine.generate(prompts, params)
    assert sum(num * chunks for num, _, chunks in prefills) == 2 + 1 + 1 + 1 + 1 + 1 + 5
    prefills.clear()
    none = make_engine(target, drafter, tokenizer, prefix_cache_bytes=0)
    assert [c.tokens for c in none.generate(prompts, params)] == [c.tokens for c in together]
    assert none.memory.prefix_cache == 0 < engine.memory.prefix_cache
    assert sum(num * chunks for num, _, chunks in prefills) == 4 + 4 + 4 + 8


@pytest.mark.parametrize("kind", ["windowed", "whole"])
def test_chunks_put_together_again_are_bitwise_the_caches_they_were_taken_from(target, drafter, tokenizer, kind):
    """The chunks of a ring that writing has gone round, too: its window is of 64 positions, the prompt of 150."""
    if kind == "whole":
        config = dataclasses.replace(drafter.config, window=None)
        drafter = jax.jit(lambda: FastEagle(config, jax.random.key(0)))()
    runner = make_engine(target, drafter, tokenizer).runner
    bucket = runner.bucket(150)
    prompt = tuple(random.Random(1).randrange(256) for _ in range(150))
    caches, again = runner.empty_prefill(1, bucket), runner.empty_prefill(1, bucket)
    for i in range(len(prompt) // CHUNK):
        caches = runner.prefill(caches, [prompt], bucket, range(i, i + 1), True)
        again = runner.put_chunk(again, runner.last_chunk(caches), 0)
    jax.tree.map(np.testing.assert_array_equal, caches, again)


def test_prompts_prefilled_together_have_the_caches_of_each_alone(target, drafter, tokenizer):
    """To float32 rounding, and not bitwise: products of other numbers of rows may add in another order.

    A prompt alone has bitwise the same caches in however many calls.
    """
    runner = make_engine(target, drafter, tokenizer).runner
    bucket, rng = next(iter(runner.buckets)), random.Random(2)
    prompts = [tuple(rng.randrange(256) for _ in range(length)) for length in (33, 40, 47, 48)]
    assert runner.buckets[bucket] == len(prompts)
    together = runner.prefill(runner.empty_prefill(4, bucket), prompts, bucket, range(3), True)
    for row, prompt in enumerate(prompts):
        alone = runner.prefill(runner.empty_prefill(1, bucket), [prompt], bucket, range(3), True)
        in_calls = runner.empty_prefill(1, bucket)
        for i in range(3):
            in_calls = runner.prefill(in_calls, [prompt], bucket, range(i, i + 1), True)
        jax.tree.map(np.testing.assert_array_equal, in_calls, alone)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # values are of order 1
        jax.tree.map(close, runner.take_prompt(together, row), alone)


@pytest.mark.parametrize("num", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_mixed_requests_prefilled_together_are_answered_as_each_alone(
    target, drafter, tokenizer, requests, expected, prefills, num
):
    engine = make_engine(target, drafter, tokenizer, slots=16)
    order = sorted(range(len(requests)), key=lambda i: len(requests[i][0]))  # so that many are of like length
    order = order[:num] if num < len(order) else order
    made = engine.generate([requests[i][0] for i in order], [requests[i][1] for i in order])
    compare(made, expected(order), order)
    assert sum(together for together, _, _ in prefills if together > 1) >= num // 4


def test_rows_under_way_get_rounds_while_a_long_prompt_is_prefilled(target, drafter, tokenizer, monkeypatch):
    """And short prompts do not wait for it either."""
    engine, events = make_engine(target, drafter, tokenizer, prefill_budget=2 * CHUNK), []
    run, advance = engine.runner.prefill, engine.runner.advance

    def prefill(prefix, prompts, bucket, chunks, drafts):
        events.append(len(chunks))
        return run(prefix, prompts, bucket, chunks, drafts)

    monkeypatch.setattr(engine.runner, "prefill", prefill)
    monkeypatch.setattr(engine.runner, "advance", lambda *a, **kw: events.append("rounds") or advance(*a, **kw))
    params = SamplingParams(temperature=0, max_new_tokens=MAX_NEW, ignore_eos=True)
    prompts = [[1, 2], [3] * 270, [4] * 20]
    made = engine.generate(prompts, params)
    first = events[: events.index("rounds", events.index("rounds") + 1)]
    assert first == [1, 1, "rounds", 2]  # of the short prompt and of the long one, rounds, the other short one
    assert events.count("rounds") > 8
    between = "".join("r" if event == "rounds" else str(event) for event in events)
    assert not re.search(r"[1-9]{3}", between)  # 2 chunks a call
    for prompt, completion in zip(prompts, made, strict=True):
        assert make_engine(target, drafter, tokenizer).generate([prompt], params)[0].tokens == completion.tokens


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (dict(prefill_budget=CHUNK - 1), f"prefill_budget is {CHUNK - 1}: give at least {CHUNK} tokens"),
        (dict(prefix_cache_bytes=100), "prefix_cache_bytes is 100, and a chunk of a prompt takes .*: give at least"),
        (dict(prefix_cache_bytes=-1), "prefix_cache_bytes is -1"),
    ],
)
def test_a_budget_that_cannot_hold_a_chunk_of_a_prompt_is_a_user_error(target, drafter, tokenizer, bad, message):
    with pytest.raises(UserError, match=message):
        make_engine(target, drafter, tokenizer, **bad)


# --- warming up, which forgets the programs that the tests above share ------------------------------------------


@pytest.mark.parametrize(
    "tree", [None, *[pytest.param(x, marks=pytest.mark.slow) for x in ("auto: few", "auto", "best_first:8")]], ids=str
)
def test_after_warm_up_no_request_compiles_anything(target, drafter, tokenizer, compilations, monkeypatch, tree):
    """Under "auto" the drafting prefill of all buckets but the first was left to the first request of that size."""
    jax.clear_caches()  # of the programs that other tests compiled
    max_len = 144 if tree in (None, "auto: few") else MAX_LEN  # of two buckets or three
    engine = make_engine(target, drafter, tokenizer, slots=8, max_len=max_len, tree=choices(tree, monkeypatch))
    engine.warm_up()
    assert 0 < len(compilations) <= engine.most_programs
    trees = itertools.cycle(engine.trees)
    monkeypatch.setattr(engine._tree_selector, "choose", lambda rows: next(trees))
    compilations.clear()
    lengths = [1, CHUNK, *[size + more for size in [*engine.runner.buckets][:-1] for more in (0, 1)], max_len - 1]
    for num_requests in (1, 2, 3, 8):
        for length in lengths:
            params = SamplingParams(max_new_tokens=3, logprobs=length == 1, min_p=0.1 * (length == CHUNK))
            engine.generate([list(range(7, 7 + length % 200)) + [7] * (length - length % 200)] * num_requests, params)
    params = [SamplingParams(max_new_tokens=limit, ignore_eos=True) for limit in (40, 1, 1, 1, 1, 1, 1, 1)]
    engine.generate([[1, 2]] * 8, params)  # 8 rows, then 2
    list(engine.stream_pieces([5] * 100, params[0]))
    list(engine.serve(Later([([1, 2], params[0])] * 8)))  # 2 rows, then 8
    assert compilations == []


class Later:
    """An iterator over prompts of which all but the first come when that is under way."""

    def __init__(self, pairs: list) -> None:
        self.pairs, self.calls = pairs, 0

    def __iter__(self):
        return self

    def __next__(self):
        self.calls += 1
        if self.calls == 2 or not self.pairs:
            raise StopIteration
        return self.pairs.pop(0)
