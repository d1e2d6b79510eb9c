"""The order in which samples are asked for their turns."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fasteagle_jax.data.answering import Dialogue, answer_all

TURNS = [1, 3, 1, 2, 1, 1, 4, 1]  # of each sample


class CountedTurns:
    """Rules by which a sample's dialogue has TURNS turns, and its outcome is its index."""

    def start_all(self, samples):
        return (Dialogue(index, str(index), ["?"], [index]) for index in samples)

    def add_answer(self, dialogue, tokens, finished):
        dialogue.said.append(str(tokens))
        return dialogue if len(dialogue.said) < TURNS[dialogue.index] else dialogue.index


class FakeEngine:
    """An engine that holds all prompts there are and answers them in the order they came."""

    def __init__(self) -> None:
        self.most, self.asked = 0, []

    def serve(self, source):
        waiting, read = [], 0
        while True:
            for tokens, _ in source:
                waiting.append((read, tokens[0]))
                read += 1
            if not waiting:
                return
            self.most = max(self.most, len(waiting))
            index, sample = waiting.pop(0)
            self.asked.append(sample)
            yield SimpleNamespace(prompt_index=index, tokens=[7], finish_reason="stop")


@pytest.mark.parametrize(("ahead", "at_once"), [(8, None), (8, 2), (3, 2), (1, 1)])
def test_a_dialogues_next_turn_waits_for_as_many_others_as_are_asked_at_once(ahead, at_once):
    engine = FakeEngine()
    settled = answer_all(iter(range(len(TURNS))), CountedTurns(), engine, lambda dialogue: None, ahead, at_once)
    assert [index for outcomes, _ in settled for index in outcomes] == list(range(len(TURNS)))
    assert sorted(engine.asked) == [index for index, turns in enumerate(TURNS) for _ in range(turns)]
    limit = min(ahead, at_once or ahead)
    assert engine.most == limit
    for index, turns in enumerate(TURNS):
        at = [place for place, sample in enumerate(engine.asked) if sample == index]
        assert len(at) == turns and all(b - a <= limit for a, b in zip(at, at[1:], strict=False))
