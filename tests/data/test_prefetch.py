"""The thread that makes batches ahead: their order, how far ahead it is, and how it ends."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.packing import PackedData
from fasteagle_jax.data.prefetch import AHEAD, Prefetcher


def settled(made: list[int]) -> int:
    """The number made once it does not grow any more."""
    number = -1
    while number != len(made):
        number = len(made)
        time.sleep(0.2)
    return number


def test_results_come_in_order_and_few_are_made_ahead():
    made: list[int] = []
    with Prefetcher(lambda i: made.append(i) or i * i, range(3, 50)) as results:
        assert settled(made) == AHEAD + 1  # one waits for room
        for taken, i in enumerate(range(3, 50), 1):
            assert results.take() == i * i
            assert len(made) <= taken + AHEAD + 1
    assert made == list(range(3, 50))


def test_an_error_comes_with_the_result_that_it_stopped():
    def make(i: int) -> int:
        if i == 2:
            raise OSError("the disk is gone")
        return i

    with Prefetcher(make, range(9)) as results:
        assert [results.take(), results.take()] == [0, 1]
        with pytest.raises(OSError, match="the disk is gone"):
            results.take()


def test_it_ends_with_its_block_whatever_was_taken():
    before = threading.active_count()
    with pytest.raises(KeyError), Prefetcher(lambda i: i, range(1000)) as results:
        results.take()
        raise KeyError
    assert threading.active_count() == before


def test_a_thread_ahead_by_whole_epochs_changes_no_batch():
    """Plans of two epochs are kept: with one batch an epoch the thread is further ahead than that."""
    samples = [Conversation.of(str(i), list(range(i, i + 30)), [[4, 30]]) for i in range(4)]
    expected = [PackedData(samples, T=64, B=2, seed=1).batch(step) for step in range(30)]
    data = PackedData(samples, T=64, B=2, seed=1)
    with Prefetcher(data.batch, range(30)) as batches:
        for step in range(30):
            np.testing.assert_array_equal(batches.take().tokens, expected[step].tokens)
            assert data.epochs(step) == step
            assert sum(map(len, data.pieces(step))) == 4
