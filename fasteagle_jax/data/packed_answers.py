"""Answers of prepare-data without the questions, compressed, from which the same command makes the same file again.

    {"settings": ..., "counts": ...}            the manifest of the file that was packed
    {"id": sample, "answers": [[id, ...], ...]}  one line a conversation, in order; token ids
    {"id": "self/0", "prompt": [id, ...], ...}   of a question that the target wrote, its tokens too

The lines are compressed together (.xz). Questions come from their sources again, so that nothing is published that is
somebody else's.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fasteagle_jax.data.answering import Dialogue, Rules, Sample
from fasteagle_jax.data.conversations import Conversation, read_conversations
from fasteagle_jax.data.manifest import differences, manifest_path
from fasteagle_jax.data.windows import later_windows
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line, read_json, replacing
from fasteagle_jax.io.text import parse_json


def pack(output: Path, packed: Path) -> tuple[int, int]:
    """Packs the answers in `output`, written by prepare-data, into the file `packed`.

    Returns the number of conversations and of answer tokens. UserError if the file has no manifest, or holds ready
    dialogues, whose answers are not the target's.
    """
    path = manifest_path(output)
    if not path.is_file():
        raise UserError(f"{output} has no {path.name}: name a file that prepare-data wrote")
    manifest = read_json(path)
    if ready := [s["name"] for s in manifest["settings"]["sources"] if s["kind"] == "dialogues"]:
        raise UserError(f"{output} holds ready dialogues of {ready[0]}: pack answers of the target alone")
    # Those that the manifest counts: a run that is under way may have written more.
    conversations = read_conversations(output)[: manifest["counts"]["conversations"]]
    if later_windows(c.id for c in conversations):
        raise UserError(f"{output} has several rows of a conversation, whose template rewrites it: they are not packed")
    num_tokens = 0
    with replacing(packed) as aside, lzma.open(aside, "wt", preset=9, encoding="utf-8") as file:
        file.write(json.dumps({"settings": manifest["settings"], "counts": manifest["counts"]}) + "\n")
        for c in conversations:
            answers = [c.tokens[start:end].tolist() for start, end in c.assistant]
            num_tokens += sum(map(len, answers))
            record: dict[str, Any] = {"id": c.id}
            if _is_own(c.id):
                record["prompt"] = c.tokens[: c.assistant[0][0]].tolist()
            file.write(json.dumps(record | {"answers": answers}, separators=(",", ":")) + "\n")
    return len(conversations), num_tokens


def packed_settings(packed: Path) -> dict[str, Any] | None:
    """The settings of the file that was packed; None if it is damaged, which `unpack` tells."""
    try:
        head = next(_lines(packed), None)
    except UserError:
        return None
    return head.get("settings") if isinstance(head, dict) else None


def unpack(
    packed: Path, settings: dict[str, Any], samples: Iterator[Sample], rules: Rules
) -> tuple[list[Conversation], dict[str, Any]]:
    """The conversations in the file `packed` and the counts of its manifest.

    `samples` are those of the command, in order; the ones that the file was made of are consumed. UserError if it is
    damaged, or of other settings.
    """
    lines = _lines(packed)
    head = next(lines, None)
    if not isinstance(head, dict) or not {"settings", "counts"} <= head.keys():
        raise _damaged(packed, "its first line is no manifest")
    if changed := differences(head["settings"], json.loads(json.dumps(settings))):
        raise UserError(f"{packed} was made with {'; '.join(changed)}: give the options that it was made with")
    tried = {sample.id: sample for sample, _ in zip(samples, range(head["counts"]["samples"]), strict=False)}
    conversations = []
    for record in lines:
        try:
            sample = tried[record["id"]]
            conversations.append(_conversation(sample, record.get("prompt"), record["answers"], rules))
        except (KeyError, TypeError, UserError) as error:
            raise _damaged(packed, first_line(error)) from error
    if len(conversations) != head["counts"]["conversations"]:
        raise _damaged(packed, f"{len(conversations)} of {head['counts']['conversations']} conversations are there")
    return conversations, head["counts"]


def _conversation(sample: Sample, prompt: list[int] | None, answers: list[list[int]], rules: Rules) -> Conversation:
    """A sample's conversation with given answers."""
    if prompt is None:
        dialogue: Any = rules.start(0, sample)
    else:
        dialogue = Dialogue(0, sample.id, [""], prompt)
    if not isinstance(dialogue, Dialogue):
        raise UserError(f"sample {sample.id} is dropped now")
    for i, answer in enumerate(answers):
        if i:
            between = rules.between(dialogue.turns, i, answers[i - 1][-1])
            if between is None:
                raise UserError(f"answer {i} of sample {sample.id} does not end its turn")
            dialogue.tokens = dialogue.tokens + between
        start = len(dialogue.tokens)
        dialogue.tokens = dialogue.tokens + answer
        dialogue.spans.append([start, start + len(answer)])
    (conversation,) = dialogue.conversations()
    return conversation


def _is_own(id: str) -> bool:
    """Whether the target wrote a sample's question (prepare-data's source `self`)."""
    return id.startswith("self/")


def _lines(packed: Path) -> Iterator[Any]:
    try:
        with lzma.open(packed, "rt", encoding="utf-8") as file:
            for line in file:
                yield parse_json(line)
    except OSError as error:
        raise UserError(f"cannot read {packed}: {error.strerror or error}; name a file of packed answers") from error
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise _damaged(packed, first_line(error)) from error


def _damaged(packed: Path, reason: str) -> UserError:
    return UserError(f"{packed} is damaged ({reason}): take a whole copy")
