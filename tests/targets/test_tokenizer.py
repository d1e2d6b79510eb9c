"""Tokenizers out of GGUF files and folders, and what drafting reads off their chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
from tiny_folder import make_target

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets import tokenizer as tok
from fasteagle_jax.targets.chats import encode_chats
from fasteagle_jax.targets.loading import locate

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are kind<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONVERSATION = [
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "hi!\n\nhow are you?"},
    {"role": "user", "content": "well"},
    {"role": "assistant", "content": ""},
]
TEXTS = [
    "Hello  world's\n\n end ",
    "don't WE'LL 12345 and 3.14,x=y",
    "\tdef f(x):\n\treturn x  # naïve 中文 🙂½",
    " leading, trailing \r\n ",
    "a , b . c ! it 's",
    "helloWorld/\n/IT'S inIN 12345",
    "",
]
# The rules for cutting text, as llama.cpp and the models' own files have them.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself if printable, else the next from 256 on."""
    letters, spare = [], 256
    for byte in range(256):
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or byte >= 174
        letters.append(chr(byte if printable else spare))
        spare += not printable
    return letters


BYTES = byte_letters()
MERGES = [
    "h e",
    "l l",
    "he ll",
    "hell o",
    "Ġ w",
    "o r",
    "Ġw or",
    "1 2",
    "12 3",
    "Ġ 1",
    "' s",
    "Ċ Ċ",
    "Ġ Ġ",
]
VOCAB = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]


def write_gguf(
    path: Path, pre: str = "smollm", template: str | None = CHATML, special: tuple[str, ...] = SPECIAL, **changes
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    fields = {"model": "gpt2", "eos_token_id": 2, "bos_token_id": 1, "add_bos_token": False} | changes
    for key, value in ((key, value) for key, value in fields.items() if value is not None):
        kind = {str: gguf.GGUFValueType.STRING, bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32}
        writer.add_key_value(f"tokenizer.ggml.{key}", value, kind[type(value)])
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_array("tokenizer.ggml.tokens", [*special, *VOCAB[len(SPECIAL) :]])
    writer.add_array("tokenizer.ggml.token_type", [3] * len(SPECIAL) + [1] * (len(VOCAB) - len(SPECIAL)))
    writer.add_array("tokenizer.ggml.merges", MERGES)
    if template is not None:
        writer.add_string("tokenizer.chat_template", template)
    writer.add_tensor("output_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def gguf_path(tmp_path) -> Path:
    return write_gguf(tmp_path / "model.gguf")


def slow_encode(text: str, pre: str) -> list[int]:
    """Byte-level BPE as one would write it first: cut, then merge the best pair until there is none."""
    if pre == "smollm":
        pieces = [piece for part in regex.split(r"(\p{N})", text) for piece in regex.findall(GPT2, part)]
    else:
        pieces = regex.findall({"llama-bpe": LLAMA3, "qwen2": QWEN2, "gpt-4o": O200K}.get(pre, GPT2), text)
    ids = []
    for piece in pieces:
        symbols = [BYTES[byte] for byte in piece.encode()]
        while True:
            pairs = [f"{a} {b}" for a, b in zip(symbols, symbols[1:], strict=False)]
            ranks = [MERGES.index(pair) for pair in pairs if pair in MERGES]
            if not ranks:
                break
            at = pairs.index(MERGES[min(ranks)])
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        ids += [VOCAB.index(symbol) for symbol in symbols]
    return ids


@pytest.mark.parametrize("pre", ["smollm", "gpt2", "llama-bpe", "qwen2", "gpt-4o"])
def test_a_gguf_tokenizer_encodes_as_slow_bpe_does_and_decodes_back(tmp_path, pre):
    tokenizer = tok.load_tokenizer(write_gguf(tmp_path / "model.gguf", pre=pre))
    rng = np.random.default_rng(0)
    letters = list("hello worinld 123'sS  \n\t.é中½")
    texts = [*TEXTS, *("".join(rng.choice(letters, 30)) for _ in range(50))]
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == slow_encode(text, pre), text
        assert tokenizer.decode(ids) == text
    assert ("123" in tokenizer.convert_ids_to_tokens(tokenizer.encode("123"))) == (pre not in ("smollm", "qwen2"))


def test_special_tokens_are_single_ids_and_vanish_on_request(gguf_path):
    tokenizer = tok.load_tokenizer(gguf_path)
    ids = tokenizer.encode("<|im_start|>hello<|im_end|>")
    assert ids == [1, VOCAB.index("hello"), 2]
    assert tokenizer.decode(ids) == "<|im_start|>hello<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, len(VOCAB))


def test_a_bos_token_is_added_only_where_the_file_says_so_and_never_to_chats(tmp_path, gguf_path):
    with_bos = tok.load_tokenizer(write_gguf(tmp_path / "bos.gguf", add_bos_token=True))
    without = tok.load_tokenizer(gguf_path)
    assert with_bos.encode("hello") == [1, *without.encode("hello")]
    assert tok.encode_chat(with_bos, CONVERSATION) == tok.encode_chat(without, CONVERSATION)


def test_without_a_word_on_it_bos_is_added_where_llama_cpp_adds_it(tmp_path):
    for pre, adds in (("llama-bpe", True), ("smollm", False), ("gpt2", False)):
        tokenizer = tok.load_tokenizer(write_gguf(tmp_path / "model.gguf", pre=pre, add_bos_token=None))
        assert (tokenizer.encode("hello")[0] == 1) == adds


def test_a_text_that_brings_its_own_bos_has_one(tmp_path, gguf_path):
    with_bos = tok.load_tokenizer(write_gguf(tmp_path / "bos.gguf", add_bos_token=True))
    without = tok.load_tokenizer(gguf_path)
    hello = VOCAB.index("hello")
    assert with_bos.encode("<|im_start|>hello") == [1, 1, hello]
    for tokenizer in (with_bos, without):
        assert tok.encode_text(tokenizer, "<|im_start|>hello") == [1, hello]
        assert tok.encode_text(tokenizer, "hello") == tokenizer.encode("hello")
        assert tok.encode_text(tokenizer, "") == tokenizer.encode("")
    assert tok.encode_text(without, "<|im_start|><|im_start|>hello") == [1, 1, hello]  # it is added to nothing


def test_a_folder_gives_the_tokenizer_that_was_saved_there(tmp_path, gguf_path):
    tokenizer = tok.load_tokenizer(gguf_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    again = tok.load_tokenizer(tmp_path)
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
    assert tok.encode_chat(again, CONVERSATION) == tok.encode_chat(tokenizer, CONVERSATION)


@pytest.mark.parametrize(
    ("changes", "expected"), [({"model": "llama"}, "byte-level BPE"), ({"pre": "tekken"}, "tekken")]
)
def test_a_gguf_tokenizer_of_another_kind_is_refused(tmp_path, changes, expected):
    with pytest.raises(UserError, match=expected):
        tok.load_tokenizer(write_gguf(tmp_path / "model.gguf", **changes))


def test_a_folder_without_a_tokenizer_is_a_user_error(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    with pytest.raises(UserError, match="tokenizer") as caught:
        tok.load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_target(tmp_path / "target")


@pytest.mark.parametrize(
    "changes",
    [{"num_attention_heads": 3, "num_key_value_heads": 3}, {"torch_dtype": "floatx"}, {"layer_types": ["a"]}],
    ids=str,
)
def test_keys_of_the_configuration_that_are_not_the_tokenizers_do_not_stop_it(folder, changes):
    expected = tok.load_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    tokenizer = tok.load_tokenizer(folder)
    for text in (*TEXTS, "<|im_start|>a<|im_end|>"):
        assert tokenizer.encode(text) == expected.encode(text)
    assert tok.encode_chat(tokenizer, CONVERSATION) == tok.encode_chat(expected, CONVERSATION)
    assert tokenizer.eos_token_id == expected.eos_token_id


def test_code_in_a_tokenizers_folder_is_not_run_and_nobody_is_asked(folder, monkeypatch):
    """transformers asked at the terminal whether to run it, and ran it after a y."""
    (folder / "evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w')\nclass Evil: pass\n")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "Evil"}
    path.write_text(json.dumps(settings | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question"))
    assert tok.load_tokenizer(folder).encode("a") and not (folder / "canary").exists()


def test_a_longest_text_that_is_no_number_is_refused(folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": "long"}))
    with pytest.raises(UserError, match="model_max_length is 'long': give a number of tokens"):
        tok.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", '{"version": "1.'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "null"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": ["a", "b"]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 5}}'),
    ],
)
def test_a_broken_tokenizer_file_is_one_line(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=f"{folder} has no usable tokenizer") as caught:
        tok.load_tokenizer(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": ["a"]},
        {"tokens": 5},
        {"merges": ["no such"]},
        {"merges": [7]},
        {"token_type": [3]},
        {"tokens": [1, 2]},
    ],
    ids=str,
)
def test_a_broken_tokenizer_in_a_gguf_file_is_one_line(gguf_path, monkeypatch, changes):
    metadata, tensors = tok.read_gguf(gguf_path)
    metadata |= {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    monkeypatch.setattr(tok, "read_gguf", lambda path: (metadata, tensors))
    with pytest.raises(UserError, match="model.gguf has a damaged tokenizer") as caught:
        tok.load_tokenizer(gguf_path)
    assert "\n" not in str(caught.value)


def test_of_named_chat_templates_the_default_is_used_and_without_one_the_names_are_told(folder):
    expected = tok.load_tokenizer(folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())

    def named(*templates: tuple[str, str]) -> None:
        listed = [{"name": name, "template": template} for name, template in templates]
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": listed}))

    named(("default", expected.chat_template), ("tool_use", "tools"))
    tokenizer = tok.load_tokenizer(folder)
    assert tokenizer.chat_template["default"] == expected.chat_template
    assert tok.encode_chat(tokenizer, CONVERSATION) == tok.encode_chat(expected, CONVERSATION)
    assert tok.assistant_spans(tokenizer, CONVERSATION) == tok.assistant_spans(expected, CONVERSATION)
    named(("rag", "a"), ("tool_use", "b"))
    tokenizer = tok.load_tokenizer(folder)
    assert tok.stop_token_ids(tokenizer, folder) == (258,)
    for use in (tok.encode_chat, tok.assistant_spans, tok.prefix_spans):
        with pytest.raises(UserError, match="chat templates are named rag, tool_use, none of them default"):
            use(tokenizer, CONVERSATION)
    assert "named rag, tool_use" in str(encode_chats(tokenizer, [CONVERSATION])[0])
    tokenizer.chat_template = 5
    with pytest.raises(UserError, match="chat template is a int"):
        tok.encode_chat(tokenizer, CONVERSATION)


def test_a_token_that_the_embedding_lacks_is_named():
    tok.check_ids([], 259, "prompt 1")
    tok.check_ids([0, 258], 259, "prompt 1")
    with pytest.raises(UserError, match="^prompt 1 holds token 259, but the target has 259: "):
        tok.check_ids([3, 259, 4], 259, "prompt 1")


# Stop tokens


def test_stop_tokens_come_from_the_tokenizer_and_from_beside_the_weights(tmp_path, gguf_path):
    tokenizer = tok.load_tokenizer(gguf_path)
    assert tok.stop_token_ids(tokenizer, gguf_path) == (2,)
    assert tok.stop_token_ids(tokenizer, write_gguf(tmp_path / "eot.gguf", eot_token_id=0)) == (0, 2)
    assert tok.stop_token_ids(tokenizer, tmp_path) == (2,)
    for eos, expected in {"7": (2, 7), "[9, 2, 8]": (2, 8, 9), "null": (2,)}.items():
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
        assert tok.stop_token_ids(tokenizer, tmp_path) == expected


def test_stop_tokens_of_a_folder_are_those_that_transformers_and_vllm_read(tmp_path, gguf_path):
    tokenizer = tok.load_tokenizer(gguf_path)  # whose own are (2,)

    def ends(config: object, generation: object = None) -> tuple[int, ...]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tok.stop_token_ids(tokenizer, tmp_path)

    assert ends({"eos_token_id": [258, 113]}) == (2, 113, 258)
    assert ends({"text_config": {"eos_token_id": 9}}) == (2, 9)
    assert ends({"eos_token_id": 7}, {"eos_token_id": [8]}) == (2, 8)
    assert ends({"eos_token_id": 7}, {"temperature": 1}) == ends({"eos_token_id": 7}, {"eos_token_id": None}) == (2, 7)
    assert ends({"eos_token_id": [-1, None, 2**31, 5]}) == (2, 5)
    assert ends({"eos_token_id": 7}, {"eos_token_id": -1}) == (2,)
    for wrong in ("</s>", [2, "7"], 7.0, True, {"a": 1}, [[7]]):
        for files in (({"eos_token_id": wrong},), ({}, {"eos_token_id": wrong})):
            with pytest.raises(UserError, match="config.json: eos_token_id is .*: give a token id") as caught:
                ends(*files)
            assert repr(wrong) in str(caught.value) and "\n" not in str(caught.value)


def test_control_tokens_that_close_a_turn_are_known_by_name_and_by_the_template(tmp_path):
    def ends(template: str | None, special: tuple[str, ...] = SPECIAL, **changes: object) -> tuple[int, ...]:
        path = write_gguf(tmp_path / "ends.gguf", template=template, special=special, **changes)
        return tok.stop_token_ids(tok.load_tokenizer(path), path)

    assert ends(None, eos_token_id=0) == ends(CHATML, eos_token_id=0) == (0, 2)
    assert ends(None, ("</s>", "<|eot_id|>", "<|eom_id|>"), eos_token_id=0) == (0, 1, 2)
    assert ends(None, ("<a>", "<|end|>", "<b>"), eos_token_id=0) == (0, 1)
    # Where a token closes the whole answer, <|end|> closes but one of its messages.
    assert ends(None, ("<|return|>", "<|end|>", "<|call|>"), eos_token_id=0) == (0, 2)
    for end in ("", "{{ '\n' }}"):
        own = "{% for m in messages %}<|user|>{{ m['content'] }}" + end + "<|mine|>{% endfor %}"
        assert ends(own, ("</s>", "<|user|>", "<|mine|>"), eos_token_id=0) == (0, 2)
    between = "{% for m in messages %}{{ m['content'] }} END <|mine|>{% endfor %}"
    assert ends(between, ("</s>", "<a>", "<|mine|>"), eos_token_id=0) == (0,)
    assert ends("{{ raise_exception('no') }}", eos_token_id=0) == (0, 2)
    # What stands for none in a file of unsigned numbers; a text is no id.
    assert ends(None, eos_token_id=2**32 - 1) == (2,)
    with pytest.raises(UserError, match="eot_token_id is '<.eot_id.>': give a token id"):
        ends(None, eot_token_id="<|eot_id|>")


# Chat templates


def load_with(tmp_path: Path, template: str | None):
    return tok.load_tokenizer(write_gguf(tmp_path / "template.gguf", template=template))


def test_encode_chat_is_the_rendered_template(gguf_path):
    tokenizer = tok.load_tokenizer(gguf_path)
    text = (
        "<|im_start|>system\nYou are kind<|im_end|>\n<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tok.encode_chat(tokenizer, CONVERSATION[:1]) == tokenizer.encode(text)
    reference = tokenizer.apply_chat_template(CONVERSATION, return_dict=False)
    assert tok.encode_chat(tokenizer, CONVERSATION, add_generation_prompt=False) == reference


def test_the_user_header_is_where_a_user_message_would_continue(tmp_path, gguf_path):
    tokenizer = tok.load_tokenizer(gguf_path)
    header = tok.user_header_ids(tokenizer)
    assert tokenizer.decode(header) == "<|im_start|>system\nYou are kind<|im_end|>\n<|im_start|>user\n"
    conversation = tok.encode_chat(tokenizer, CONVERSATION)
    assert conversation[: len(header)] == header
    vicuna = load_with(tmp_path, "A chat.{% for m in messages %} USER: {{ m['content'] }}{% endfor %}")
    header = tok.user_header_ids(vicuna)
    assert vicuna.decode(header) == "A chat. USER:"  # the space goes with the word
    assert tok.encode_chat(vicuna, [{"role": "user", "content": "world"}])[: len(header)] == header
    with pytest.raises(UserError, match="without the user's text"):
        tok.user_header_ids(load_with(tmp_path, "{{ 'always the same' }}"))


def test_assistant_spans_hold_each_answer_and_its_end_of_turn(gguf_path):
    tokenizer = tok.load_tokenizer(gguf_path)
    ids, spans = tok.assistant_spans(tokenizer, CONVERSATION)
    assert ids == tok.encode_chat(tokenizer, CONVERSATION, add_generation_prompt=False)
    assert [tokenizer.decode(ids[start:end]) for start, end in spans] == [
        "hi!\n\nhow are you?<|im_end|>",
        "<|im_end|>",
    ]
    for start, _ in spans:
        assert str(tokenizer.decode(ids[:start])).endswith("<|im_start|>assistant\n")
    assert tok.assistant_spans(tokenizer, CONVERSATION[:1])[1] == []


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, "no chat template"),
        ("{{ messages | length }}", "without stable prefixes"),
        ("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}", "without a generation prompt"),
        (
            "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "without an end-of-turn token",
        ),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ messages[0]['content'] + 5 }}", "refuses this conversation: "),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "needs too much memory"),
    ],
)
def test_a_chat_template_that_cannot_give_spans_is_refused(tmp_path, template, expected):
    with pytest.raises(UserError, match=expected):
        tok.assistant_spans(load_with(tmp_path, template), CONVERSATION)


MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
)


def test_a_templates_own_markers_and_prefix_rendering_agree(tmp_path):
    marked, plain = load_with(tmp_path, MARKED), load_with(tmp_path, CHATML)
    assert "{% generation %}" in MARKED and "{% generation %}" not in CHATML
    rng = np.random.default_rng(0)
    words = [*TEXTS, "<|im_end|>", "hello", "\n"]
    for turns in range(1, 6):
        said = [  # from a word on: what merges with the end of the header is no answer's alone
            {"role": role, "content": "a" + " ".join(rng.choice(words, rng.integers(1, 4)))}
            for _ in range(turns)
            for role in ("user", "assistant")
        ]
        for messages in (said, [{"role": "system", "content": "Be kind"}, *said], said[:-1]):
            ids, spans = tok.assistant_spans(marked, messages)
            assert (ids, spans) == tok.assistant_spans(plain, messages)
            assert (ids, spans) == tok.prefix_spans(marked, messages)
            assert len(spans) == len([m for m in messages if m["role"] == "assistant"])


def test_markers_count_where_prefix_rendering_is_impossible(tmp_path):
    """A template that leaves thoughts out of all turns but the last one, as reasoning models' templates do."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ ('hm ' if loop.last else '') + m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = load_with(tmp_path, template)
    ids, spans = tok.assistant_spans(tokenizer, CONVERSATION)
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == ["hi!\n\nhow are you?<|im_end|>", "hm <|im_end|>"]
    unmarked = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(UserError, match="without stable prefixes") as caught:
        tok.assistant_spans(load_with(tmp_path, unmarked), CONVERSATION)
    assert "\n" not in str(caught.value)


def test_a_marked_template_that_refuses_a_conversation_is_a_user_error(tmp_path):
    refusing = "{{ raise_exception('roles must alternate') }}{% generation %}{% endgeneration %}"
    with pytest.raises(UserError, match="refuses this conversation: roles must alternate"):
        tok.assistant_spans(load_with(tmp_path, refusing), CONVERSATION)


# The real thing


@pytest.mark.real
def test_the_default_targets_tokenizer_behaves_as_smollm2s():
    path = locate("smollm2-135m")
    tokenizer = tok.load_tokenizer(path)
    assert len(tokenizer) == 49152
    assert tokenizer.encode("<|im_start|>user\n<|im_end|>") == [1, 4093, 198, 2]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("in 2024")) == ["in", "Ġ", "2", "0", "2", "4"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tok.stop_token_ids(tokenizer, path) == (2,)
    header = str(tokenizer.decode(tok.user_header_ids(tokenizer)))
    assert header.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert header.endswith("<|im_end|>\n<|im_start|>user\n")
    ids, spans = tok.assistant_spans(tokenizer, CONVERSATION)
    assert [tokenizer.decode(ids[a:b]) for a, b in spans] == ["hi!\n\nhow are you?<|im_end|>", "<|im_end|>"]


@pytest.mark.torch
@pytest.mark.real
@pytest.mark.slow  # torch reads the whole file for it; the test above knows the tokenizer by its ids
def test_the_default_targets_tokenizer_agrees_with_transformers_own_reading():
    """Only with torch does transformers read a tokenizer out of a GGUF file."""
    from transformers import AutoTokenizer

    path = locate("smollm2-135m")
    ours, theirs = tok.load_tokenizer(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
