"""Windows of a conversation that is too long: each a text of its own, from which a target recomputes its features.

A window begins where a turn begins, behind what the chat template puts before a conversation, and ends with a turn.
Only what is too long for that is cut elsewhere: a window then begins in a message, and repeats some tokens as context.
Of max_length 10, with a template's beginning b, questions q and answers a, supervised ones in capitals:

    conversation   b q q A A A q q A A q A A A A A A A A A A A
    windows        b q q A A A q q A A
                                     b q A A A A A A A A
                                                     a a A A A
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

CONTEXT_SHARE = 4  # 1 / this of a window's length are tokens of the window before, where it begins in an answer
_LATER_WINDOW = re.compile(r"(.+)#w([2-9]|[1-9][0-9]+)", re.DOTALL)


def cut_windows(
    ids: Sequence[int],
    spans: Sequence[tuple[int, int]],
    starts: Sequence[int],
    opening: Callable[[int], list[int] | None],
    max_length: int,
) -> list[tuple[list[int], list[list[int]]]]:
    """The tokens and supervised spans of windows of at most `max_length` tokens; at least one token of each counts.

    Every token of `spans` is supervised in exactly one window, in order. `starts` are the tokens, but for the first, at
    which a user's turn begins. `opening` gives the tokens that go before one of them in a conversation that begins
    there; None if none can.
    """
    context = max_length // CONTEXT_SHARE
    windows: list[tuple[list[int], list[list[int]]]] = []
    at, last_end = spans[0][0], 0  # the first token that is not supervised yet, the end of the last window
    while True:
        answer, answer_end = next(span for span in spans if span[1] > at)
        turn = max((start for start in starts if start <= answer), default=0)
        before = None
        if at == answer and at - turn + min(answer_end - at, context) <= max_length:
            before = opening(turn) if turn else []
        if before is not None and len(before) + at - turn + min(answer_end - at, context) <= max_length:
            start = turn
        else:  # in a message: of what no window has yet, as much as leaves room for the answer
            before = []
            start = max(0, min(at - context, max(last_end, answer_end - max_length)))
        limit = start + max_length - len(before)
        end = max((end for end in (*starts, len(ids)) if at < end <= limit), default=limit)
        kept = [(max(a, at), min(b, end)) for a, b in spans if a < end and b > at]
        last_end = kept[-1][1]
        shift = len(before) - start
        windows.append(([*before, *ids[start:last_end]], [[a + shift, b + shift] for a, b in kept]))
        rest = [max(a, last_end) for a, b in spans if b > last_end]
        if not rest:
            return windows
        at = rest[0]


def window_id(id: str, number: int) -> str:
    """The id of a conversation's window, numbered from 1: the conversation's own for the first, else id#w2, ..."""
    return id if number == 1 else f"{id}#w{number}"


def conversation_id(id: str) -> str:
    """The id of the conversation whose window has this id."""
    match = _LATER_WINDOW.fullmatch(id)
    return match[1] if match else id


def later_windows(ids: Iterable[str]) -> dict[str, list[str]]:
    """Of ids, those that are windows after the first, by the conversation's id."""
    found: dict[str, list[str]] = {}
    for id in ids:
        if match := _LATER_WINDOW.fullmatch(id):
            found.setdefault(match[1], []).append(id)
    return found
