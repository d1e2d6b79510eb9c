"""An engine that several threads ask at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from fasteagle_jax import Engine, SamplingParams, UserError
from fasteagle_jax.engine.shared import SharedEngine
from tests.tiny_folder import make_target

PROMPTS = ["so " * (i % 7) + "why?" for i in range(24)]
PARAMS = [SamplingParams(seed=i, max_new_tokens=3 + i % 9, n=1 + i % 2) for i in range(24)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_target(tmp_path_factory.mktemp("models") / "target"))


def load(folder):
    return Engine.load(folder, None, slots=4, max_len=64)


def test_every_thread_gets_the_answers_to_its_own_prompts(folder):
    expected = load(folder).generate(PROMPTS, PARAMS)
    shared = SharedEngine(load(folder))

    def ask(thread):
        mine = range(thread, len(PROMPTS), 3)
        return [(i, future.result()) for i, future in [(i, shared.ask(PROMPTS[i], PARAMS[i])) for i in mine]]

    with ThreadPoolExecutor(3) as pool:
        got = dict(answer for answers in pool.map(ask, range(3)) for answer in answers)
    for i in range(len(PROMPTS)):
        its = [completion for completion in expected if completion.prompt_index == i]
        assert [(c.sample, c.tokens, c.text) for c in got[i]] == [(c.sample, c.tokens, c.text) for c in its]


def test_a_prompt_that_cannot_be_answered_fails_alone(folder):
    shared = SharedEngine(load(folder))
    good, bad, later = (shared.ask(prompt, PARAMS[0]) for prompt in ("Why?", "so " * 99, "Why?"))
    with pytest.raises(UserError, match="shorten it"):
        bad.result()
    assert good.result()[0].tokens == later.result()[0].tokens


def test_an_engine_that_fails_fails_all_who_wait_and_all_who_ask_later(folder):
    engine = load(folder)
    shared = SharedEngine(engine)
    first = shared.ask(PROMPTS[0], PARAMS[0]).result()
    assert first[0].tokens

    def out_of_memory(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    engine.runner.advance = out_of_memory
    asked = [shared.ask(prompt, SamplingParams(max_new_tokens=8, ignore_eos=True)) for prompt in PROMPTS]
    for answers in [*asked, shared.ask("Why?", PARAMS[0])]:
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            answers.result(timeout=60)
