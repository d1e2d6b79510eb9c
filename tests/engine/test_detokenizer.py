"""Text of tokens: the same at once and token by token, nothing lost where an answer begins or a character is cut."""

from __future__ import annotations

import random

import pytest
from tiny_folder import make_target
from tiny_tokenizer import metaspace_tokenizer

from fasteagle_jax.engine.detokenizer import CONTEXT, UNFINISHED, Detokenizer, TextStream
from fasteagle_jax.targets.tokenizer import load_tokenizer


@pytest.fixture(scope="module", params=["byte level", "sentencepiece"])
def tokenizer(request, tmp_path_factory):
    if request.param == "sentencepiece":
        return metaspace_tokenizer()
    return load_tokenizer(make_target(tmp_path_factory.mktemp("detokenizer") / "target"))


@pytest.fixture(scope="module")
def metaspace():
    return metaspace_tokenizer()


def byte_ids(tokenizer, data: bytes) -> list[int]:
    return tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in data])


def streamed(detokenizer, tokens, prompt=(), stop=()) -> tuple[list[str], TextStream]:
    stream = TextStream(detokenizer, prompt, stop)
    pieces = [stream.push(token) for token in tokens]
    return [*pieces, stream.finish()], stream


def test_an_answer_keeps_its_first_space(metaspace):
    detokenizer = Detokenizer(metaspace)
    prompt = metaspace.encode("sky")
    answer = metaspace.convert_tokens_to_ids(["▁blue", "▁is"])
    assert metaspace.decode(answer) == "blue is"  # by itself
    assert detokenizer.text(answer, prompt) == " blue is"
    assert streamed(detokenizer, answer, prompt)[0] == [" blue", " is", ""]
    assert streamed(detokenizer, answer, prompt, stop=[" is"])[1].text == " blue"
    assert [detokenizer.token_text(token) for token in (*answer, 258)] == [" blue", " is", "</s>"]
    # Behind special tokens alone it is the first text of all, whose first space is none.
    assert detokenizer.text(answer, [256]) == "blue is" == "".join(streamed(detokenizer, answer, [256])[0])


def test_characters_beside_a_cut_one_are_not_lost(metaspace):
    detokenizer = Detokenizer(metaspace)
    cut = byte_ids(metaspace, "é".encode() + "🙂".encode()[:1])
    assert metaspace.decode(cut) == UNFINISHED * 3
    assert detokenizer.text(cut) == "é" + UNFINISHED
    assert streamed(detokenizer, cut)[0] == ["", "é", "", UNFINISHED]
    smile = byte_ids(metaspace, "🙂".encode())
    for at in range(1, 4):  # a stray end, a stray beginning, and both around a whole one
        assert detokenizer.text([*smile[at:], *cut[:2]]).strip(UNFINISHED) == "é"
        assert detokenizer.text([*cut[:2], *smile[:at], *metaspace.convert_tokens_to_ids(["!"])]) == f"é{UNFINISHED}!"
        # A character that the prompt begins is the answer's if the answer ends it.
        assert (
            detokenizer.text(smile[at:], smile[:at])
            == "🙂"
            == "".join(streamed(detokenizer, smile[at:], smile[:at])[0])
        )


def test_at_once_and_token_by_token_it_is_what_the_answer_adds_to_the_prompt(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    rng = random.Random(0)
    bytes_alone = [token for token in range(256) if UNFINISHED in detokenizer.token_text(token)]
    for trial in range(300):
        tokens = [
            rng.choice(bytes_alone) if rng.random() < (trial % 3) / 2 else rng.randrange(259)
            for _ in range(rng.randrange(1, 3 * CONTEXT))
        ]
        at = rng.randrange(len(tokens))
        prompt, answer = tokens[:at], tokens[at:]
        text = detokenizer.text(answer, prompt)
        pieces, stream = streamed(detokenizer, answer, prompt)
        assert "".join(pieces) == stream.text == text
        whole, before = detokenizer.decode(tokens), detokenizer.decode(prompt)
        assert whole in (before + text, before.removesuffix(UNFINISHED) + text)
        stop = text[len(text) // 2 :][:2]
        if stop:
            assert streamed(detokenizer, answer, prompt, [stop])[1].text == text[: text.index(stop)]


def test_what_the_tokenizer_reads_without_loss_is_its_own_text(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    for text in ("sky is blue!", "é 🙂  x\n", " first", "中"):
        ids = tokenizer.encode(text)
        assert detokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
