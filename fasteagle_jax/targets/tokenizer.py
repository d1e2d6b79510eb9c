"""The target's tokenizer, its stop tokens and what its chat template marks as answers.

A folder's tokenizer is read by transformers; a GGUF file's is built here from its metadata, since transformers does so
only if torch is installed. All functions take the result of `load_tokenizer`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line, read_json
from fasteagle_jax.targets.gguf import read_gguf
from fasteagle_jax.targets.messages import Message
from fasteagle_jax.targets.templates import PLAIN, ChatOptions, marked_chats, marks_answers, render_chats

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer
    from transformers import PreTrainedTokenizerFast as Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types that are matched whole; the first alone is "special"
_SENTINEL = "fasteaglesentinel"
# Tokens that close a turn in the published families, whatever their files name as the end (llama.cpp knows them so).
TURN_ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|eot|>", "<|eom|>", "<end_of_turn>", "<turn|>", "<|end|>",
    "<|end_of_turn|>", "<|return|>", "<|call|>", "<|END_OF_TURN_TOKEN|>", "[|endofturn|]", "<EOT>", "_<EOT>",
    "<|role_end|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
_NAMED = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' names: GGUF's
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")  # GGUF names of its pre-tokenizer
_LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_PIECES = _LLAMA3_PIECES.replace(r"\p{N}{1,3}", r"\p{N}")  # digits one by one
_O200K_PIECES = (  # words end before a capital that follows a small letter, and keep their apostrophes
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a model folder or .gguf file (a path from `locate`); UserError if it is unusable."""
    path = Path(path)
    tokenizer = _folder_tokenizer(path) if path.is_dir() else _gguf_tokenizer(path)
    longest = tokenizer.model_max_length  # which encoding compares lengths with
    if not isinstance(longest, int | float):
        raise UserError(f"{path}: model_max_length is {longest!r}: give a number of tokens, or leave it out")
    return tokenizer


def _folder_tokenizer(folder: Path) -> Tokenizer:
    transformers = _transformers()
    try:
        # Not to trust code in the folder is said here: else transformers asks at the terminal whether to run it.
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds: of any key in config.json that it does not like, too
        if (folder / "tokenizer.json").is_file():
            with contextlib.suppress(Exception):  # the first error is the one to tell
                return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        raise UserError(
            f"{folder} has no usable tokenizer ({first_line(error)}): put the model's own tokenizer.json and "
            "tokenizer_config.json there"
        ) from error


def vocabulary_fingerprint(tokenizer: Tokenizer) -> str:
    """Sixteen hex digits of the tokens and their ids, the same for a model folder's tokenizer and its GGUF file's."""
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


_PROBE = (
    "Hello  world's\n\n\tend 12345 3.14,x=y na\u00efve \u4e2d\u6587 \U0001f642\u00bd "  # what cuts and merges differ on
)


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Sixteen hex digits of the vocabulary, and of what becomes of a text that many rules apply to."""
    ids = [tokenizer.encode(_PROBE), tokenizer.encode(_PROBE, add_special_tokens=False)]
    return hashlib.sha256(json.dumps([vocabulary_fingerprint(tokenizer), ids]).encode()).hexdigest()[:16]


def stop_token_ids(tokenizer: Tokenizer, checkpoint_path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The ids that end an answer, ascending: the tokenizer's and the checkpoint's, and what closes a turn.

    The checkpoint's are generation_config.json's, or config.json's if that one has none; a GGUF file's eos, eot and
    eom. A turn is closed by tokens that are known by their names, and by the one that the chat template writes behind
    an answer. UserError for an id that is no whole number.
    """
    path = Path(checkpoint_path)
    ends = _end_ids(tokenizer.eos_token_id, f"{path}: the tokenizer's eos_token_id")
    if path.is_file():
        metadata, _ = read_gguf(path)
        for name in ("eos", "eot", "eom"):
            key = f"tokenizer.ggml.{name}_token_id"
            ends |= _end_ids(metadata.get(key), f"{path}: {key}")
    else:
        for name in ("generation_config.json", "config.json"):
            config = read_json(path / name) if (path / name).is_file() else {}
            nested = config.get("text_config")
            named = config.get("eos_token_id", nested.get("eos_token_id") if isinstance(nested, dict) else None)
            if named is not None:
                ends |= _end_ids(named, f"{path / name}: eos_token_id")
                break
    return tuple(sorted(ends | _turn_ends(tokenizer)))


def _end_ids(value: Any, where: str) -> set[int]:
    """The ids that a file names; -1 and others that no token has stand for none."""
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int | None) for token in ids):
        raise UserError(f"{where} is {value!r}: give a token id, a whole number, or a list of them")
    return {token for token in ids if token is not None and 0 <= token < 2**31}


def _turn_ends(tokenizer: Tokenizer) -> set[int]:
    """The ids of the tokens that close a turn."""
    ids: dict[str, Any] = {name: tokenizer.convert_tokens_to_ids(name) for name in TURN_ENDS}
    there = {name: id for name, id in ids.items() if id is not None and tokenizer.convert_ids_to_tokens(id) == name}
    try:
        text = _render(tokenizer, [_said("user", "Hi"), _said("assistant", _SENTINEL)], False)
    except UserError:
        text = ""
    behind = text.rpartition(_SENTINEL)[2].lstrip() if _SENTINEL in text else ""
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    if found := max((content for content in special if behind.startswith(content)), key=len, default=""):
        there[found] = special[found]
    if "<|return|>" in there:
        there.pop("<|end|>", None)  # closes a message there, of which an answer has several
    return set(there.values())


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a plain text, with one BOS where the tokenizer adds it, also if the text brings its own."""
    ids = tokenizer.encode(text)
    if tokenizer.bos_token_id is not None and ids[:2] == [tokenizer.bos_token_id] * 2:
        own = tokenizer.encode(text, add_special_tokens=False)
        if len(own) < len(ids) and own[0] == tokenizer.bos_token_id:
            return ids[1:]
    return ids


def check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    """Raises UserError with `name` for a token that the embedding lacks, e.g. one added to the tokenizer alone."""
    if ids and (largest := max(ids)) >= vocab_size:
        raise UserError(
            f"{name} holds token {largest}, but the target has {vocab_size}: leave its text out, or take the tokenizer "
            "that the target was trained with"
        )


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool | None = None,
    options: ChatOptions = PLAIN,
) -> list[int]:
    """Token ids of a conversation under the chat template, by default up to the start of the next answer."""
    opens = options.opens_answer if add_generation_prompt is None else add_generation_prompt
    return tokenizer.encode(_render(tokenizer, messages, opens, options), add_special_tokens=False)


def user_header_ids(tokenizer: Tokenizer, options: ChatOptions = PLAIN) -> list[int]:
    """The ids that open a conversation, up to the user's first word: a target continues them as the user.

    They include the template's default system prompt, without which prompts that the target generates are poor.
    """
    text = _render(tokenizer, [_said("user", _SENTINEL)], False, options)
    header, found, _ = text.partition(_SENTINEL)
    if not found:
        raise UserError("chat template without the user's text: use a template that keeps messages as they are")
    # A space at the end ("USER: ") belongs to the first token of the word to come.
    return tokenizer.encode(header.rstrip(" "), add_special_tokens=False)


Spans = list[tuple[int, int]]


def assistant_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], options: ChatOptions = PLAIN
) -> tuple[list[int], Spans]:
    """Ids of a whole conversation, and the [start, end) of each answer in it, its end-of-turn token included.

    Answers are what the template marks by {% generation %}; without such marks, they are found by rendering the
    conversation up to each answer and past it (`prefix_spans`).
    """
    return (marked_spans if marks_answers(tokenizer, options) else prefix_spans)(tokenizer, messages, options)


def prefix_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], options: ChatOptions = PLAIN
) -> tuple[list[int], Spans]:
    """`assistant_spans` by rendering prefixes of the conversation; UserError if that is impossible.

    The conversation starts with the user's (or system's) message. A span has the tokens that the target would have
    generated: neither the header before the answer nor what the template adds after the end of the turn. A token that
    begins in the header and ends in the answer, of newlines on both sides, counts as the answer's.
    """
    text = _render(tokenizer, messages, False, options)
    ids = tokenizer.encode(text, add_special_tokens=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _render(tokenizer, messages[:i], True, options)
        answered = _render(tokenizer, messages[: i + 1], False, options)
        if not answered.startswith(prompt) or not text.startswith(answered):
            raise unstable(i)
        check_answer(tokenizer, messages, i, prompt, answered, options)
        start, end = (tokens_before(tokenizer, ids, prefix, i) for prefix in (prompt, answered))
        spans.append((start, turn_end(tokenizer, ids, start, end, i)))
    return ids, spans


def unstable(index: int) -> UserError:
    """The error for a template by which a conversation's beginning depends on message `index` after it."""
    return UserError(
        f"chat template without stable prefixes (message {index} changes what stands before it): "
        "use a template that only appends, or one that marks answers by {% generation %}"
    )


def tokens_before(tokenizer: Tokenizer, ids: Sequence[int], prefix: str, index: int) -> int:
    """The number of a text's tokens `ids` that end in its prefix; UserError if more than the one after them differs."""
    prefix_ids = tokenizer.encode(prefix, add_special_tokens=False)
    shared = num_shared(ids, prefix_ids)
    if shared < len(prefix_ids):  # the last ones merge with what follows them, into one
        merged, rest = (tokenizer.decode(list(some)) for some in (ids[shared : shared + 1], prefix_ids[shared:]))
        if not str(merged).startswith(str(rest)):
            raise unstable(index)
    return shared


def check_answer(
    tokenizer: Tokenizer, messages: Sequence[Message], index: int, prompt: str, answered: str, options: ChatOptions
) -> None:
    """Raises UserError unless what follows the prompt in `answered` is message `index`, thoughts before it or not."""
    answer = answered[len(prompt) :]
    text = spoken_text(messages[index])
    if answer.lstrip().startswith(text):
        return
    if text not in answer or prompt == _render(tokenizer, messages[:index], False, options):
        raise UserError(
            f"chat template without a generation prompt that ends where message {index} begins: "
            "use a template that knows add_generation_prompt"
        )


def spoken_text(message: Message) -> str:
    """What an assistant says after its thoughts, without the spaces around it."""
    return str(message.get("content") or "").rpartition("</think>")[2].strip()


def turn_end(tokenizer: Tokenizer, ids: Sequence[int], start: int, end: int, index: int) -> int:
    """The index after the last special token of ids[start:end], which closes message `index`; UserError without one."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    while end > start and ids[end - 1] not in special:
        end -= 1
    if end == start:
        raise UserError(
            f"chat template without an end-of-turn token after message {index}: use one that closes answers"
        )
    return end


def num_shared(ids: Sequence[int], prefix: Sequence[int]) -> int:
    """The number of leading tokens that two texts share."""
    return next((i for i, (a, b) in enumerate(zip(ids, prefix, strict=False)) if a != b), min(len(ids), len(prefix)))


def marked_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], options: ChatOptions = PLAIN
) -> tuple[list[int], Spans]:
    """`assistant_spans` by the template's own marks."""
    encoded, masks = marked_chats(tokenizer, [messages], options)
    return list(encoded["input_ids"][0]), mask_spans(masks[0])


def mask_spans(mask: Sequence[int]) -> list[tuple[int, int]]:
    """The [start, end) of each run of ones in a mask of zeros and ones."""
    edges = np.diff(np.asarray([0, *mask, 0]))
    return list(zip(np.flatnonzero(edges > 0).tolist(), np.flatnonzero(edges < 0).tolist(), strict=True))


def _render(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool, options: ChatOptions = PLAIN
) -> str:
    return render_chats(tokenizer, [messages], add_generation_prompt, options)[0]


def _transformers() -> Any:
    """The transformers module, imported late since that is slow, its advice on torch silenced."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers


def _gguf_tokenizer(path: Path) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file describes, special tokens and chat template included."""
    metadata, _ = read_gguf(path)
    try:
        return _byte_level_bpe(path, metadata)
    except UserError:
        raise
    except Exception as error:  # of what the fields may hold instead; tokenizers raises no other kind
        raise UserError(f"{path} has a damaged tokenizer ({first_line(error)}): download it again") from error


def _byte_level_bpe(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, processors

    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    if fields.get("model") != "gpt2" or "tokens" not in fields or "merges" not in fields:
        raise UserError(
            f"{path} has a tokenizer of kind {fields.get('model')!r}, not byte-level BPE (gpt2): "
            "use the model's Hugging Face folder"
        )
    tokens: list[str] = fields["tokens"]
    pre = fields.get("pre", "default")
    # Llama 3 does not apply merges to a word that is in the vocabulary.
    bpe = models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(merge.split(" ", 1)) for merge in fields["merges"]],
        ignore_merges=pre in _LLAMA3_NAMES,
    )
    backend = tokenizers.Tokenizer(bpe)
    backend.pre_tokenizer = _pre_tokenizer(path, pre)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    kinds = fields.get("token_type") or [1] * len(tokens)
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, token_kind in zip(tokens, kinds, strict=True)
                if token_kind == kind
            ]
        )
    # A number that no token has (often -1, read as unsigned) stands for none.
    named = {name: fields.get(f"{key}_token_id") for name, key in _NAMED.items()}
    names = {f"{name}_token": tokens[id] for name, id in named.items() if isinstance(id, int) and 0 <= id < len(tokens)}
    # llama.cpp's default: of its byte-level tokenizers, Llama 3's alone adds it.
    if fields.get("add_bos_token", pre in _LLAMA3_NAMES) and "bos_token" in names:
        bos = names["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, fields["bos_token_id"])]
        )
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_gguf_templates(metadata),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _gguf_templates(metadata: Mapping[str, Any]) -> Any:
    """The chat template of a GGUF file; all by name if there are others beside the default."""
    key = "tokenizer.chat_template"
    named = {k.removeprefix(f"{key}."): v for k, v in metadata.items() if k.startswith(f"{key}.")}
    default = metadata.get(key)
    return ({"default": default} if default else {}) | named if named else default


def _pre_tokenizer(path: Path, name: str) -> PreTokenizer:
    """The pre-tokenizer, which splits text before merges, by its name in the GGUF file."""
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt2", "gpt-2"):
        return byte_level
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in (*_LLAMA3_NAMES, "qwen2", "gpt-4o"):
        pieces = {"qwen2": _QWEN2_PIECES, "gpt-4o": _O200K_PIECES}.get(name, _LLAMA3_PIECES)
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    raise UserError(
        f"{path} cuts text by the unknown rule {name!r} (known: gpt2, smollm, llama-bpe, qwen2, gpt-4o): "
        "use the model's Hugging Face folder"
    )
