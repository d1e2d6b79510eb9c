"""Windows of long conversations: every supervised token once, in a text that begins where a turn does if it can."""

from __future__ import annotations

import numpy as np
import pytest

from fasteagle_jax.data.windows import CONTEXT_SHARE, cut_windows, later_windows, window_id

OPENING = [-1, -2]


def test_the_drawn_example():
    ids = list(range(22))
    spans = [(3, 6), (8, 10), (11, 22)]
    assert cut_windows(ids, spans, [6, 10], lambda start: ids[:1], 10) == [
        (ids[:10], [[3, 6], [8, 10]]),
        ([0, *range(10, 19)], [[2, 10]]),
        (list(range(17, 22)), [[2, 5]]),
    ]


def made(seed: int):
    """Tokens that tell their place, spans, and starts of turns: answers and questions of all lengths."""
    rng = np.random.default_rng(seed)
    spans, starts, at = [], [], 0
    for _ in range(rng.integers(1, 9)):
        starts.append(at)
        for _ in range(rng.integers(1, 3)):
            at += int(rng.choice([1, 3, 10, 40, 200]))
            end = at + int(rng.choice([1, 2, 10, 40, 200]))
            spans.append((at, end))
            at = end + int(rng.integers(0, 2))
    return list(range(at)), spans, starts[1:]


@pytest.mark.parametrize("max_length", [32, 64, 100])
@pytest.mark.parametrize("has", ["openings", "no openings", "no starts"])
def test_every_supervised_token_is_supervised_in_one_window(max_length, has):
    for seed in range(60):
        ids, spans, starts = made(seed)
        if has == "no starts":
            starts = []
        windows = cut_windows(ids, spans, starts, lambda start: OPENING if has == "openings" else None, max_length)
        found = [tokens[t] for tokens, kept in windows for start, end in kept for t in range(start, end)]
        assert found == [t for start, end in spans for t in range(start, end)]
        last = -1
        for tokens, kept in windows:
            assert len(tokens) <= max_length and kept and kept[-1][1] == len(tokens)
            assert all(end <= start for (_, end), (start, _) in zip(kept, kept[1:], strict=False))
            text = tokens[2:] if tokens[:2] == OPENING else tokens
            assert text == list(range(text[0], text[-1] + 1)), "a text without a hole"
            first = tokens[kept[0][0]]
            if tokens[:2] == OPENING:
                assert text[0] in starts
            elif text[0] > 0:
                # Context is repeated as far as it is needed, and then only, unless it was in no window.
                context = max_length // CONTEXT_SHARE
                assert first - text[0] == context or text[0] > last
                assert first - text[0] >= context
            last = text[-1]


def test_a_turn_that_fits_is_not_cut_and_begins_its_window():
    for seed in range(60):
        ids, spans, starts = made(seed)
        windows = cut_windows(ids, spans, starts, lambda start: OPENING, 128)
        ends = [*starts, len(ids)][1:]
        for start, end in zip(starts, ends, strict=True):
            answers = [t for a, b in spans for t in range(max(a, start), min(b, end))]
            if end - start <= 128 - len(OPENING):
                holding = [tokens for tokens, kept in windows for a, b in kept if tokens[a] in answers]
                assert len({tuple(tokens) for tokens in holding}) == 1
                assert start in holding[0] or holding[0][0] > start - 128


def test_a_long_question_leaves_room_for_its_answer():
    """A window that begins in the question has as much of it as fits with the answer."""
    ids = list(range(300))
    ((tokens, kept),) = cut_windows(ids, [(280, 300)], [], lambda start: None, 64)
    assert tokens == ids[300 - 64 :] and kept == [[44, 64]]
    windows = cut_windows(ids, [(10, 20), (200, 300)], [20], lambda start: OPENING, 64)
    assert [(tokens[0], tokens[-1], kept) for tokens, kept in windows] == [
        (0, 19, [[10, 20]]),
        (184, 247, [[16, 64]]),
        (232, 295, [[16, 64]]),
        (280, 299, [[16, 20]]),
    ]


def test_ids_of_windows_are_told_from_others():
    ids = ["a/dialogue-1", *(window_id("a/dialogue-1", n) for n in (1, 2, 11)), "a/b#2", "a/b#w1", "a/b#w02", "#w2"]
    assert window_id("a", 1) == "a"
    assert later_windows(ids) == {"a/dialogue-1": ["a/dialogue-1#w2", "a/dialogue-1#w11"]}
