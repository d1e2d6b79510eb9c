"""Cases of drafting drawn freely: each is token for token what plain decoding gives."""

from __future__ import annotations

import collections
import itertools

import lossless_fuzz
import pytest

from fasteagle_jax.targets.table import FAMILIES


@pytest.mark.parametrize(
    ("families", "count", "drafters"),
    [
        (["qwen3"], 4, ("told the answer",)),
        pytest.param(list(FAMILIES), 300, tuple(lossless_fuzz.DRAFTERS), marks=pytest.mark.slow),
    ],
    ids=["short", "long"],
)
def test_drafting_is_lossless_in_cases_drawn_freely(families, count, drafters):
    found = list(lossless_fuzz.cases(families, 1, count, drafters))
    assert not [case.message for case in found if case.kind == lossless_fuzz.FAILED]
    kinds = collections.Counter(case.kind for case in found)
    assert kinds[lossless_fuzz.TIED] <= count // 100
    assert sum(case.accepted for case in found) > count  # something was at stake


def test_cases_come_from_sixty_programs_and_every_drafter_meets_most_families():
    drafted = collections.Counter(name for family in FAMILIES for name in lossless_fuzz.drafters_of(family))
    assert len(FAMILIES) + drafted.total() <= 60
    assert set(drafted) == set(lossless_fuzz.DRAFTERS) and min(drafted.values()) > len(FAMILIES) // 2
    met = {(name, lossless_fuzz.mode_of(family)) for family in FAMILIES for name in lossless_fuzz.drafters_of(family)}
    assert met == set(itertools.product(lossless_fuzz.DRAFTERS, lossless_fuzz.MODES))
