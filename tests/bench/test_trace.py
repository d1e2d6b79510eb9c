"""A traced answer: the tokens of generate, its rounds, and the page that shows them."""

from __future__ import annotations

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.bench.trace import page, trace
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from tests.tiny_models import oracle_drafter, tiny_target

PROMPT, NEW = [3, 1, 4, 1, 5], 17
TREE = TreeSpec("best_first", nodes=6)


class Letters:
    """A tokenizer of single characters."""

    def decode(self, ids: list[int], **options: bool) -> str:
        return "".join("</script>" if i == 7 else chr(65 + i) for i in ids)


@pytest.fixture(scope="module")
def traced():
    target, sampling = tiny_target(num_layers=2, stacked=False, sharpness=4.0), make_sampling(1, 1.0, seed=3)
    plain = generate(target, None, [PROMPT], sampling, max_new=NEW)
    answer = np.asarray(plain.tokens)[0].tolist()
    drafter = oracle_drafter(jnp.asarray([[*PROMPT, *answer, *[0] * 8]]), 40, 3, rate=0.7)
    return answer, trace(target, drafter, PROMPT, sampling, max_new=NEW, tree=TREE)


def test_its_tokens_are_those_of_generate_and_its_rounds_add_up_to_them(traced) -> None:
    answer, (first, rounds) = traced
    assert [first, *(token for r in rounds for token in r.emitted)] == answer
    assert any(len(r.emitted) > 1 for r in rounds) and len(rounds) < NEW - 1
    pending = first
    for r in rounds:
        assert r.tokens[0] == pending and len(r.tokens) == len(r.parents) == len(r.probabilities) == 6
        assert r.path[0] == 0 and [r.parents[node] for node in r.path[1:]] == r.path[:-1]
        assert [r.tokens[node] for node in r.path[1:]] == r.emitted[:-1]
        assert len(r.milliseconds) == 3 and min(r.milliseconds) > 0
        pending = r.emitted[-1]


def test_plain_decoding_has_a_round_a_token() -> None:
    target = tiny_target(num_layers=2, stacked=False)
    first, rounds = trace(target, None, PROMPT, make_sampling(1), max_new=4, tree=None)
    expected = np.asarray(generate(target, None, [PROMPT], make_sampling(1), max_new=4).tokens)[0].tolist()
    assert [first, *(r.emitted[0] for r in rounds)] == expected and all(r.path == [0] for r in rounds)


def test_the_page_holds_every_round_and_no_token_ends_its_script(traced) -> None:
    _, (first, rounds) = traced
    text = page("a <title>", Letters(), [7, *PROMPT], first, rounds)
    (held,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    data = json.loads(held)
    assert len(data["rounds"]) == len(rounds) and data["title"] == "a <title>"
    assert data["prompt"] == "</script>DBEBF" and text.count("</script>") == 2
    assert {str(t) for r in rounds for t in r.tokens} <= set(data["texts"])
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)", text)  # it needs no other file
