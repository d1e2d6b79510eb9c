"""Many conversations as tokens at once: each rendered and tokenised as a whole a single time, the tokenizer in batches.

`tokenizer.assistant_spans` tokenises every prefix of a conversation, to learn where an answer begins and ends. Here the
prefixes are only rendered, which is cheap, and found in the tokens of the whole by character offsets. Text is cut at
special tokens before anything else happens to it, so that tokens up to one do not depend on what comes after it: of a
prefix, only the few characters behind its last special token are tokenised again, and compared.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    |---------------- prefix of "Hello" -----------------|
                                    |------- tail -------|

Where offsets cannot decide, `assistant_spans` does.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.messages import Message
from fasteagle_jax.targets.tokenizer import (
    assistant_spans,
    encode_chat,
    marks_answers,
    mask_spans,
    render_chats,
    template_errors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation as tokens."""

    ids: list[int]
    spans: list[tuple[int, int]]  # `assistant_spans`
    # Index of the message after an answer -> the number of tokens before it; without those that were not found.
    turns: dict[int, int] = dataclasses.field(default_factory=dict)


def encode_chats(tokenizer: Tokenizer, chats: Sequence[Sequence[Message]]) -> list[Chat | UserError]:
    """The conversations as `assistant_spans` gives them one by one, or the error that it raises."""
    if not (tokenizer.is_fast and isinstance(tokenizer.chat_template, str)):
        return [_one_chat(tokenizer, messages) for messages in chats]
    rendered = [_rendered(tokenizer, [messages]) for messages in chats]
    good = [i for i, texts in enumerate(rendered) if texts is not None]
    if not good:
        return [_one_chat(tokenizer, messages) for messages in chats]
    good_texts = [text for texts in rendered for text in texts or ()]
    marked = marks_answers(tokenizer)
    encoded: Any
    if marked:
        with template_errors():  # none: all of them were rendered before
            encoded = tokenizer.apply_chat_template(
                [[dict(message) for message in chats[i]] for i in good],
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=True,
            )
    else:
        encoded = tokenizer(good_texts, add_special_tokens=False, return_attention_mask=False)
    find = _Prefixes(tokenizer)
    found: list[Chat | UserError | None] = [None] * len(chats)
    for n, i in enumerate(good):
        ids = encoded["input_ids"][n]
        find.look_at(good_texts[n], ids, encoded.encodings[n].token_to_chars)
        if marked:
            found[i] = Chat(ids, mask_spans(encoded["assistant_masks"][n]), find.turns(chats[i]))
        else:
            found[i] = find.chat(chats[i])
    return [chat or _one_chat(tokenizer, messages) for chat, messages in zip(found, chats, strict=True)]


def turn_opening(tokenizer: Tokenizer, messages: Sequence[Message], chat: Chat, index: int) -> list[int] | None:
    """The tokens that open a conversation which begins with message `index` of a chat, a key of its `turns`.

    Such as a default system prompt; the conversation's own system message, if it begins with one. What follows them are
    the chat's tokens from the message on. None if the template does not give the same tokens for both.
    """
    system = messages[:1] if messages[0]["role"] == "system" else []
    start = chat.turns[index]
    answer = next((i for i in range(index, len(messages)) if messages[i]["role"] == "assistant"), None)
    span = next((span for span in chat.spans if span[0] >= start), None)
    if answer is None or span is None:
        return None
    try:
        prompt = encode_chat(tokenizer, [*system, *messages[index:answer]])
    except UserError:
        return None
    num = len(prompt) - (span[0] - start)
    if num < 0 or prompt != chat.ids[:num] + chat.ids[start : span[0]]:
        return None
    return prompt[:num]


class _Prefixes:
    """Prefixes of a rendered conversation in its tokens; one conversation after another."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {token_id for token_id, token in added if token.special}
        # Those that the text is cut at before it is normalised.
        self._anchors = np.array([id for id, token in added if token.special and not token.normalized], np.int64)
        self._contents = {token_id: token.content for token_id, token in added}
        self._tails: dict[str, list[int]] = {}  # tokens of tails, which are nearly always the same few

    def look_at(self, text: str, ids: list[int], place: Callable[[int], tuple[int, int]]) -> None:
        """Takes the next conversation: its text, its tokens and, by index, their [start, end) in the text."""
        self._text, self._ids = text, ids
        # Of the special tokens, the index, start and end.
        found = [(i, *place(i)) for i in np.flatnonzero(np.isin(ids, self._anchors)).tolist()]
        self._at = [one for one in found if text[one[1] : one[2]] == self._contents[ids[one[0]]]]
        self._starts = [start for _, start, _ in self._at]

    def num_tokens(self, prefix: str) -> int | None:
        """The number of tokens of a text if these are the first ones of the conversation's, else None."""
        if not self._text.startswith(prefix):
            return None
        before = bisect.bisect_left(self._starts, len(prefix))
        num, start, end = self._at[before - 1] if before else (0, 0, 0)
        if end > len(prefix):
            return None  # the prefix ends within a special token
        tail = prefix[start:]
        if tail not in self._tails:
            self._tails[tail] = self._tokenizer.encode(tail, add_special_tokens=False)
        tail_ids = self._tails[tail]
        return num + len(tail_ids) if self._ids[num : num + len(tail_ids)] == tail_ids else None

    def chat(self, messages: Sequence[Message]) -> Chat | None:
        """The conversation by `prefix_spans`'s rules; None for one that breaks a rule, or may do so."""
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = _rendered(self._tokenizer, [messages[:i] for i in answers], add_generation_prompt=True)
        prefixes = _rendered(self._tokenizer, [messages[: i + 1] for i in answers if i + 1 < len(messages)])
        if prompts is None or prefixes is None:
            return None
        if answers and answers[-1] + 1 == len(messages):
            prefixes.append(self._text)
        spans, turns = [], {}
        for i, prompt, answered in zip(answers, prompts, prefixes, strict=True):
            if not answered.startswith(prompt):
                return None
            if not answered[len(prompt) :].lstrip().startswith(messages[i]["content"].strip()):
                return None
            start, end = self.num_tokens(prompt), self.num_tokens(answered)
            if start is None or end is None:
                return None
            turns[i + 1] = end
            while end > start and self._ids[end - 1] not in self._special:
                end -= 1
            if end == start:
                return None
            spans.append((start, end))
        turns.pop(len(messages), None)
        return Chat(self._ids, spans, turns)

    def turns(self, messages: Sequence[Message]) -> dict[int, int]:
        """`Chat.turns` alone, which is all that a template that marks answers leaves to find."""
        after = [i for i in range(1, len(messages)) if messages[i - 1]["role"] == "assistant"]
        nums = map(self.num_tokens, _rendered(self._tokenizer, [messages[:i] for i in after]) or [])
        return {i: num for i, num in zip(after, nums, strict=False) if num is not None}


def _rendered(
    tokenizer: Tokenizer, chats: Sequence[Sequence[Message]], add_generation_prompt: bool = False
) -> list[str] | None:
    """The texts of conversations, None if the template refuses one."""
    try:
        return render_chats(tokenizer, chats, add_generation_prompt)
    except UserError:
        return None


def _one_chat(tokenizer: Tokenizer, messages: Sequence[Message]) -> Chat | UserError:
    try:
        return Chat(*assistant_spans(tokenizer, messages))
    except UserError as error:
        return error
