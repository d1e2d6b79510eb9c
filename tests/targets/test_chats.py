"""Many conversations at once: the tokens and spans that `assistant_spans` gives one by one."""

from __future__ import annotations

import numpy as np
import pytest

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets import chats as chats_module
from fasteagle_jax.targets import tokenizer as tok
from fasteagle_jax.targets.chats import Chat, encode_chats, turn_opening
from tests.targets.test_tokenizer import CHATML, MARKED, TEXTS, load_with
from tests.tiny_folder import CHAT_TEMPLATE, make_target

THINKING = (  # leaves thoughts out of all turns but the last one
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ ('hm ' if loop.last else '') + m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "marked": MARKED,
    "thinking, marked": THINKING,
    "thinking": THINKING.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
    "no tokens around turns": (
        "A chat. {% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ASSISTANT: ' + m['content'] }}<|im_end|>"
        "{% else %}{{ 'USER: ' + m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    ),
    "stripped": CHATML.replace("message['content']", "message['content'] | trim"),
    # Of the newlines before a word the last one is a piece of its own: both alone are another token than here.
    "two newlines": CHATML.replace("assistant\n'", "assistant\n\n'").replace(
        "message['role'] + '\n'", "message['role'] + ('\n\n' if message['role'] == 'assistant' else '\n')"
    ),
    "content rewritten": CHATML.replace("message['content']", "message['content'] | replace('hello', 'hi')"),
    "system inside of the question": (
        "{% set system = messages[0]['content'] if messages[0]['role'] == 'system' else 'Be kind' %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>[{% if loop.index <= 2 and (loop.first or "
        "messages[0]['role'] == 'system') %}({{ system }}){% endif %}{{ m['content'] }}]"
        "{% elif m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    ),
    "refusing": (
        "{% if messages | length > 3 %}{{ raise_exception('too many') }}{% endif %}" + CHATML  # some of them
    ),
    "none": None,
}


def said(seed: int = 0, num: int = 60) -> list[list[tok.Message]]:
    """Conversations of what can go wrong: empty, in newlines, special tokens, answers that stand elsewhere too."""
    rng = np.random.default_rng(seed)
    words = [*TEXTS, "<|im_end|>", "<|im_start|>user\n", "<|im", "hello", "hello", "\n", "\n\nhi", " a", "assistant\n"]
    made: list[list[tok.Message]] = []
    for i in range(num):
        messages = [
            {"role": role, "content": " ".join(rng.choice(words, rng.integers(1, 4)))}
            for _ in range(rng.integers(1, 5))
            for role in ("user", "assistant")
        ]
        if i % 3 == 0:
            messages.insert(0, {"role": "system", "content": str(rng.choice(words))})
        if i % 4 == 0:
            messages = messages[:-1]
        if i % 5 == 0:
            messages.insert(1, {"role": "user", "content": "And?"})
        made.append(messages)
    return made


def one_by_one(tokenizer, made):
    found = []
    for messages in made:
        try:
            found.append(tok.assistant_spans(tokenizer, messages))
        except UserError as error:
            found.append(str(error))
    return found


def plain(chats):
    return [(chat.ids, chat.spans) if isinstance(chat, Chat) else str(chat) for chat in chats]


@pytest.mark.parametrize("name", TEMPLATES)
def test_many_at_once_are_what_each_is_by_itself(tmp_path, name):
    tokenizer = load_with(tmp_path, TEMPLATES[name])
    made = said()
    assert plain(encode_chats(tokenizer, made)) == one_by_one(tokenizer, made)
    assert encode_chats(tokenizer, []) == []


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_a_byte_tokenizer_agrees(tmp_path, template):
    tokenizer = tok.load_tokenizer(make_target(tmp_path / "target", chat_template=template))
    made = [*said(1), [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "7"}]]
    assert plain(encode_chats(tokenizer, made)) == one_by_one(tokenizer, made)


@pytest.mark.parametrize("name", ["chatml", "marked", "no tokens around turns", "stripped"])
def test_a_tokenizer_that_normalises_text_agrees(name):
    """As Llama 2's does: a space before every stretch between special tokens; what it does not know is one token."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz!?:\n", "\n\n", "he", "\u2581a", ":\u2581"]
    merges = [("\n", "\n"), ("h", "e"), ("\u2581", "a"), (":", "\u2581")]
    model = models.BPE(
        vocab={text: i for i, text in enumerate(letters)}, merges=merges, unk_token="<unk>", fuse_unk=True
    )
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.add_tokens([AddedToken("<|im_start|>", special=True, normalized=False)])
    backend.add_tokens([AddedToken("<|im_end|>", special=True, normalized=name == "stripped")])  # cut after normalising
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", chat_template=TEMPLATES[name])
    made = said(2)
    expected = one_by_one(tokenizer, made)
    assert plain(encode_chats(tokenizer, made)) == expected
    assert sum(not isinstance(one, str) for one in expected) > 5


def test_a_tokenizer_without_offsets_goes_the_long_way(tmp_path, monkeypatch):
    tokenizer, made = load_with(tmp_path, CHATML), said()
    expected = one_by_one(tokenizer, made)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert plain(encode_chats(tokenizer, made)) == expected


@pytest.mark.parametrize("name", ["chatml", "marked", "no tokens around turns", "system inside of the question"])
def test_usual_conversations_are_tokenised_as_wholes_alone(tmp_path, monkeypatch, name):
    tokenizer = load_with(tmp_path, TEMPLATES[name])
    monkeypatch.setattr(chats_module, "_one_chat", None)
    turns = [("well", "hello there"), ("and then?", "hello there"), ("hello there", "hi!\n\nhow are you?")]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    made = [messages[:end] for end in range(1, 7)] + [[{"role": "system", "content": "Be rude"}, *messages]]
    calls, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda *args, **options: calls.append(args) or encode(*args, **options))
    found = encode_chats(tokenizer, made)
    assert [len(chat.spans) for chat in found] == [0, 1, 1, 2, 2, 3, 3]
    if name == "chatml":
        assert [args[0] for args in calls] == ["<|im_start|>assistant\n", "<|im_end|>\n"]
    for chat, message_list in zip(found, made, strict=True):
        assert all(
            chat.ids[:num] == tok.encode_chat(tokenizer, message_list[:i], add_generation_prompt=False)
            for i, num in chat.turns.items()
        )
        assert len(chat.turns) == max(sum(m["role"] == "user" for m in message_list) - 1, 0)


def test_a_later_turn_opens_as_a_conversation_that_begins_with_it(tmp_path):
    messages = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    for name in TEMPLATES:
        if name in ("none", "thinking", "two newlines", "refusing"):
            continue
        tokenizer = load_with(tmp_path, TEMPLATES[name])
        for system in ([], [{"role": "system", "content": "Be rude"}]):
            whole = [*system, *messages]
            (chat,) = encode_chats(tokenizer, [whole])
            assert isinstance(chat, Chat)
            for i, start in chat.turns.items():
                opening = turn_opening(tokenizer, whole, chat, i)
                alone = tok.encode_chat(tokenizer, [*system, *whole[i:]], add_generation_prompt=False)
                if name == "system inside of the question":
                    assert opening is None  # what comes before the question stands inside of it
                else:
                    assert opening is not None and opening + chat.ids[start:] == alone
                    assert opening == chat.ids[: len(opening)]
            assert len(chat.turns) == (0 if name == "thinking, marked" else 2)
