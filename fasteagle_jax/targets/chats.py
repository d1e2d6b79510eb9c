"""Many conversations as tokens at once: each rendered and tokenised as a whole a single time, the tokenizer in batches.

`tokenizer.assistant_spans` tokenises every prefix of a conversation, to learn where an answer begins and ends. Here the
prefixes are only rendered, which is cheap, and found in the tokens of the whole by character offsets. Text is cut at
special tokens before anything else happens to it, so that tokens up to one do not depend on what comes after it: of a
prefix, only the few characters behind its last special token are tokenised again, and compared.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    |---------------- prefix of "Hello" -----------------|
                                    |------- tail -------|

Where offsets cannot decide, `assistant_spans` does.

Some templates rewrite what was said before: thoughts are left out of earlier turns. What the target saw when it said
an answer is then no beginning of the whole conversation, and `encode_rows` gives a row for each.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.messages import Message
from fasteagle_jax.targets.templates import (
    PLAIN,
    ChatOptions,
    chat_template,
    marked_chats,
    marks_answers,
    render_chats,
    writes_calls,
)
from fasteagle_jax.targets.tokenizer import (
    assistant_spans,
    check_answer,
    encode_chat,
    marked_spans,
    mask_spans,
    num_shared,
    spoken_text,
    tokens_before,
    turn_end,
    unstable,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer


_THINKING = re.compile(r"<think>\s*$")  # how a generation prompt ends that opens the answer's thoughts
_SENTINEL = "fasteaglesentinel"
_NO_CALLS = UserError("chat template that leaves out an assistant's calls of tools: use one that knows them")


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation as tokens, or one answer in it with what comes before (see `encode_rows`)."""

    ids: list[int]
    spans: list[tuple[int, int]]  # `assistant_spans`
    # Index of the message after an answer -> the number of tokens before it; without those that were not found.
    turns: dict[int, int] = dataclasses.field(default_factory=dict)


def encode_rows(
    tokenizer: Tokenizer, chats: Sequence[Sequence[Message]], options: Sequence[ChatOptions]
) -> list[list[Chat] | UserError]:
    """The rows of each conversation, under its own options, in which every prompt is exactly as it is at inference.

    One row, the conversation, if the template only appends. Else as few as that takes: a row ends with an answer, and
    the next one holds all of it, or begins anew.
    """
    rows: list[list[Chat] | UserError] = [[] for _ in chats]
    for _, group in itertools.groupby(sorted(range(len(chats)), key=_by(options)), key=_by(options)):
        numbers = list(group)
        own = options[numbers[0]]
        for i, chat in zip(numbers, encode_chats(tokenizer, [chats[i] for i in numbers], own), strict=True):
            made: list[Chat] | UserError
            if isinstance(chat, Chat) and _only_appends(tokenizer, chats[i], own):
                made = [chat]
            else:
                try:
                    made = _generations(tokenizer, chats[i], own)
                except UserError as error:
                    made = chat if isinstance(chat, UserError) else error
            leaves_out = isinstance(made, list) and not writes_calls(tokenizer, chats[i], own)
            rows[i] = _NO_CALLS if leaves_out else made
    return rows


def _by(options: Sequence[ChatOptions]) -> Callable[[int], str]:
    return lambda i: json.dumps(dataclasses.asdict(options[i]), sort_keys=True)


def _only_appends(tokenizer: Tokenizer, messages: Sequence[Message], options: ChatOptions) -> bool:
    """Whether each answer's prompt begins the conversation; without marks `prefix_spans` has seen to it."""
    if not marks_answers(tokenizer, options):
        return True
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompts = _rendered(tokenizer, [messages[:i] for i in answers], True, options)
    prefixes = _rendered(tokenizer, [messages[: i + 1] for i in answers], False, options)
    (text,) = render_chats(tokenizer, [messages], False, options)
    return prompts is not None and prefixes is not None and all(map(text.startswith, [*prompts, *prefixes]))


def _generations(tokenizer: Tokenizer, messages: Sequence[Message], options: ChatOptions) -> list[Chat]:
    """The rows of a conversation's answers, each with its own prompt; those that continue a row are in it."""
    rows: list[Chat] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            row = _generation(tokenizer, messages[: i + 1], options)
            if rows and row.ids[: len(rows[-1].ids)] == rows[-1].ids:
                rows[-1] = Chat(row.ids, rows[-1].spans + row.spans)
            else:
                rows.append(row)
    return rows


def _generation(tokenizer: Tokenizer, messages: Sequence[Message], options: ChatOptions) -> Chat:
    """The last message's tokens as the target says them, behind their prompt."""
    index = len(messages) - 1
    prompt, bare = (render_chats(tokenizer, [messages[:-1]], opens, options)[0] for opens in (True, False))
    (answered,) = render_chats(tokenizer, [messages], False, options)
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    if marks_answers(tokenizer, options):
        ids, marks = marked_spans(tokenizer, messages, options)
        before = num_shared(ids, tokenizer.encode(bare, add_special_tokens=False))
        spans = [span for span in marks if span[0] >= before]
        if not spans:
            raise UserError(f"the chat template marks no answer in message {index}: mend its {{% generation %}}")
        (start, _), (_, end) = spans[0], spans[-1]
        if answered.startswith(prompt):
            return Chat(ids[:end], spans)
        shift = len(prompt_ids) - start  # the prompt ends otherwise than what the answer stands behind afterwards
        return Chat(prompt_ids + ids[start:end], [(a + shift, b + shift) for a, b in spans])
    if answered.startswith(prompt):
        text = answered
        check_answer(tokenizer, messages, index, prompt, answered, options)
    else:
        said = _behind_its_question(tokenizer, messages, prompt, answered, options)
        text = prompt + (said or _thoughts_and_answer(tokenizer, messages, prompt, options))
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = tokens_before(tokenizer, ids, prompt, index)
    end = turn_end(tokenizer, ids, start, len(ids), index)
    return Chat(ids[:end], [(start, end)])


def _behind_its_question(
    tokenizer: Tokenizer, messages: Sequence[Message], prompt: str, answered: str, options: ChatOptions
) -> str:
    """What follows the question in `answered` if the prompt ends with the same question and header, else "".

    Mistral's template puts the system message into the last question as long as that is the last message.
    """
    closed = [*messages[:-1], {"role": "assistant", "content": _SENTINEL}]
    before, found, _ = render_chats(tokenizer, [closed], False, options)[0].partition(_SENTINEL)
    question = str(messages[-2].get("content") or "").strip() if len(messages) > 1 else ""
    start = before.rfind(question)
    alike = bool(found and question) and start >= 0 and prompt.endswith(before[start:])
    return answered[len(before) :] if alike and answered.startswith(before) else ""


def _thoughts_and_answer(tokenizer: Tokenizer, messages: Sequence[Message], prompt: str, options: ChatOptions) -> str:
    """What the target says after a prompt that opens its thoughts, if the template leaves these out of the message."""
    message = messages[-1]
    thoughts, content = message.get("reasoning_content"), str(message.get("content") or "")
    if not _THINKING.search(prompt) or (thoughts is None and "</think>" not in content):
        raise unstable(len(messages) - 1)
    if thoughts is not None:
        said = f"{thoughts.strip()}\n</think>\n\n{content}"
    else:
        said = content.lstrip().removeprefix("<think>").lstrip("\n")
    closed = [*messages[:-1], {"role": "assistant", "content": _SENTINEL}]
    behind = render_chats(tokenizer, [closed], False, options)[0].rpartition(_SENTINEL)[2]
    assert spoken_text(message) in said
    return said + behind


def encode_chats(
    tokenizer: Tokenizer, chats: Sequence[Sequence[Message]], options: ChatOptions = PLAIN
) -> list[Chat | UserError]:
    """The conversations as `assistant_spans` gives them one by one, or the error that it raises."""
    try:
        chat_template(tokenizer, options)
        usable = tokenizer.is_fast
    except UserError:
        usable = False
    if not usable:
        return [_one_chat(tokenizer, messages, options) for messages in chats]
    rendered = [_rendered(tokenizer, [messages], False, options) for messages in chats]
    good = [i for i, texts in enumerate(rendered) if texts is not None]
    if not good:
        return [_one_chat(tokenizer, messages, options) for messages in chats]
    good_texts = [text for texts in rendered for text in texts or ()]
    marked = marks_answers(tokenizer, options)
    encoded: Any
    masks: list[list[int]] = []
    if marked:
        encoded, masks = marked_chats(tokenizer, [chats[i] for i in good], options)
    else:
        encoded = tokenizer(good_texts, add_special_tokens=False, return_attention_mask=False)
    find = _Prefixes(tokenizer, options)
    found: list[Chat | UserError | None] = [None] * len(chats)
    for n, i in enumerate(good):
        ids = encoded["input_ids"][n]
        find.look_at(good_texts[n], ids, encoded.encodings[n].token_to_chars)
        if marked:
            found[i] = Chat(ids, mask_spans(masks[n]), find.turns(chats[i]))
        else:
            found[i] = find.chat(chats[i])
    return [chat or _one_chat(tokenizer, messages, options) for chat, messages in zip(found, chats, strict=True)]


def turn_opening(
    tokenizer: Tokenizer, messages: Sequence[Message], chat: Chat, index: int, options: ChatOptions = PLAIN
) -> list[int] | None:
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
        prompt = encode_chat(tokenizer, [*system, *messages[index:answer]], True, options)
    except UserError:
        return None
    num = len(prompt) - (span[0] - start)
    if num < 0 or prompt != chat.ids[:num] + chat.ids[start : span[0]]:
        return None
    return prompt[:num]


class _Prefixes:
    """Prefixes of a rendered conversation in its tokens; one conversation after another."""

    def __init__(self, tokenizer: Tokenizer, options: ChatOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
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
        prompts = self._rendered([messages[:i] for i in answers], add_generation_prompt=True)
        prefixes = self._rendered([messages[: i + 1] for i in answers if i + 1 < len(messages)])
        if prompts is None or prefixes is None:
            return None
        if answers and answers[-1] + 1 == len(messages):
            prefixes.append(self._text)
        spans, turns = [], {}
        for i, prompt, answered in zip(answers, prompts, prefixes, strict=True):
            if not answered.startswith(prompt):
                return None
            try:
                check_answer(self._tokenizer, messages, i, prompt, answered, self._options)
            except UserError:
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
        nums = map(self.num_tokens, self._rendered([messages[:i] for i in after]) or [])
        return {i: num for i, num in zip(after, nums, strict=False) if num is not None}

    def _rendered(self, chats: Sequence[Sequence[Message]], add_generation_prompt: bool = False) -> list[str] | None:
        return _rendered(self._tokenizer, chats, add_generation_prompt, self._options)


def _rendered(
    tokenizer: Tokenizer, chats: Sequence[Sequence[Message]], add_generation_prompt: bool, options: ChatOptions
) -> list[str] | None:
    """The texts of conversations, None if the template refuses one."""
    try:
        return render_chats(tokenizer, chats, add_generation_prompt, options)
    except UserError:
        return None


def _one_chat(tokenizer: Tokenizer, messages: Sequence[Message], options: ChatOptions) -> Chat | UserError:
    try:
        return Chat(*assistant_spans(tokenizer, messages, options))
    except UserError as error:
        return error
