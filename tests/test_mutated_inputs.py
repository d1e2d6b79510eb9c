"""Inputs that are damaged, hostile or merely odd: an answer, or one line that says what is wrong with them."""

from __future__ import annotations

import collections
import logging
from pathlib import Path

import mutated_inputs
import pytest
from mutated_inputs import FAILED, REFUSED


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[mutated_inputs.Input]:
    return mutated_inputs.make_inputs(tmp_path_factory.mktemp("mutated"))


def run(inputs: list[mutated_inputs.Input], seed: int, count: int, work: Path) -> None:
    logging.disable(logging.CRITICAL)
    try:
        outcomes = list(mutated_inputs.outcomes(inputs, seed, count, work))
    finally:
        logging.disable(logging.NOTSET)
    failures = [f"{outcome.what}\n{outcome.message}" for outcome in outcomes if outcome.kind == FAILED]
    assert not failures, "\n".join(failures[:5])
    kinds = collections.Counter(outcome.kind for outcome in outcomes)
    assert kinds[REFUSED] > count / 2 and len(kinds) == 3
    assert sum(outcome.is_metadata for outcome in outcomes) >= 0.7 * count


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # a scale of 1e308 overflows
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's reads that came too late
def test_a_mutated_file_is_refused_in_one_line_or_read(inputs, tmp_path):
    run(inputs, 1, 120, tmp_path)
