"""Records that answer the lines of a batch file, and the file that they are appended to.

A line is OpenAI's, {"custom_id", "method": "POST", "url", "body"}, or simple: {"prompt"} or {"messages"}, and an "id"
if wanted. The sampling fields, in the body or beside the prompt, are OpenAI's and vLLM's; a field that would change an
answer in a way that is not supported must have its neutral value. A text as the prompt is continued as it is.

The answer to line 17 is one record, an error or not, and nothing but `line` tells whose it is; of a folder of files
`line` and "file", which stands behind it:

    OpenAI's  {"id": "line-17", "custom_id", "line": 17, "response": {"status_code": 200, "request_id", "body"} or null,
               "error": null or {"code", "message"}, "statistics"}
    simple    {"id": the line's, else "line-17", "line": 17, "text", "tokens", "finish_reason", "stop_reason",
               "logprobs" and "top_logprobs" if asked for, "prompt_tokens", "prompt_logprobs" and
               "prompt_top_logprobs" if asked for, "statistics", "error": null}; for n > 1 "answers", a list of objects,
               holds text to top_logprobs; of an error {"id", "line": 17, "error": {"code", "message"}}

`statistics` adds the samples up: {"rounds", "accepted_at" (rounds in which the guess of depth 1, 2, ... was accepted),
"acceptance_length" (null without a round), "seconds" (of the slowest sample)}. Choices have vLLM's `stop_reason` and
`token_ids` besides OpenAI's keys. Tokens and logprobs end with the stop token; the text does not show it. Alternatives
are objects of log-probabilities by token id in simple records, and OpenAI's in the others. As in vLLM, which OpenAI's
form lacks, a prompt's are "prompt_logprobs", of a chat's body and of a text's choices: null for the first token, then
for each an object of {"logprob", "decoded_token"} by token id.
"""

from __future__ import annotations

import json
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.engine.batch_requests import CHAT, BatchRequest, Line, Refusal, is_whole
from fasteagle_jax.engine.detokenizer import Detokenizer, TextStream
from fasteagle_jax.engine.requests import Completion
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.lines import LineFile
from fasteagle_jax.io.text import parse_json

# --- records ----------------------------------------------------------------------------------------------------


def refusal_record(refusal: Refusal) -> dict[str, Any]:
    """The record of a line that cannot be answered."""
    line = refusal.line
    place = f"{line.file}, line {line.number}" if line.file else f"line {line.number}"
    error = {"code": refusal.code, "message": f"{place}: {refusal.message}"}
    if line.is_simple:
        return {"id": _id(line), **_place(line), "error": error}
    return _openai_record(line, None, error, None)


def answer_record(
    request: BatchRequest,
    prompt: Sequence[int],
    completions: Sequence[Completion],
    detokenizer: Detokenizer,
    target: str,
) -> dict[str, Any]:
    """The record of a line, its prompt's tokens and its n answers; `target` names the model if the line does not."""
    completions = sorted(completions, key=lambda completion: completion.sample)
    line = request.line
    statistics = _statistics(completions)
    if request.url is None:
        answers = [_simple_answer(completion) for completion in completions]
        return {
            "id": _id(line),
            **_place(line),
            **(answers[0] if request.params.n == 1 else {"answers": answers}),
            "prompt_tokens": completions[0].prompt_tokens,
            **_simple_prompt(completions[0]),
            "statistics": statistics,
            "error": None,
        }
    is_chat = request.url == CHAT
    num_new = sum(len(completion.tokens) for completion in completions)
    num_prompt = completions[0].prompt_tokens
    if is_chat:
        choices = [_chat_choice(completion, detokenizer) for completion in completions]
    else:
        choices = [_text_choice(completion, prompt, detokenizer) for completion in completions]
    body = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-line-{line.number}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": request.model or target,
        "choices": choices,
        "usage": {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new},
    }
    if (of_prompt := _prompt_logprobs(completions[0], prompt, detokenizer)) is not None:
        for part in (body,) if is_chat else choices:
            part["prompt_logprobs"] = of_prompt
    response = {"status_code": 200, "request_id": f"line-{line.number}", "body": body}
    return _openai_record(line, response, None, statistics)


def _id(line: Line) -> str | int:
    return f"line-{line.number}" if line.id is None else line.id


def _place(line: Line) -> dict[str, Any]:
    return {"line": line.number} | ({"file": line.file} if line.file else {})


def _openai_record(line: Line, response: Any, error: Any, statistics: Any) -> dict[str, Any]:
    return {
        "id": f"line-{line.number}",
        "custom_id": line.id,
        **_place(line),
        "response": response,
        "error": error,
        "statistics": statistics,
    }


def _statistics(completions: Sequence[Completion]) -> dict[str, Any]:
    statistics = [completion.statistics for completion in completions]
    counts = Acceptance.total(statistics)
    return {
        "rounds": counts.rounds,
        "accepted_at": list(counts.accepted_at),
        "acceptance_length": round(counts.length, 4) if counts.rounds else None,
        "seconds": round(max(sample.seconds for sample in statistics), 4),
    }


def _simple_answer(completion: Completion) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "text": completion.text,
        "tokens": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        answer["logprobs"] = _rounded(completion.logprobs)
    if completion.top_logprobs is not None:
        answer["top_logprobs"] = [_by_id(best) for best in completion.top_logprobs]
    return answer


def _simple_prompt(completion: Completion) -> dict[str, Any]:
    """What a simple record says of the prompt's tokens."""
    said: dict[str, Any] = {}
    if completion.prompt_logprobs is not None:
        said["prompt_logprobs"] = [None if x is None else round(x, 6) for x in completion.prompt_logprobs]
    if completion.prompt_top_logprobs is not None:
        said["prompt_top_logprobs"] = [best and _by_id(best) for best in completion.prompt_top_logprobs]
    return said


def _by_id(best: Mapping[int, float]) -> dict[str, float]:
    return {str(token): round(logprob, 6) for token, logprob in best.items()}


def _prompt_logprobs(completion: Completion, prompt: Sequence[int], detokenizer: Detokenizer) -> list[Any] | None:
    """The log-probabilities of a prompt's tokens, and the best ones in their places, as vLLM's server writes them."""
    if completion.prompt_logprobs is None:
        return None
    best = completion.prompt_top_logprobs or [None] * len(prompt)
    places: list[Any] = []
    for token, logprob, others in zip(prompt, completion.prompt_logprobs, best, strict=True):
        values = None if logprob is None else {token: logprob} | (others or {})
        places.append(
            values
            and {
                str(id): {"logprob": round(value, 6), "decoded_token": detokenizer.token_text(id)}
                for id, value in values.items()
            }
        )
    return places


def _chat_choice(completion: Completion, detokenizer: Detokenizer) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        best: Sequence[dict[int, float]] = completion.top_logprobs or [{}] * len(completion.tokens)
        content = [
            _chat_token(token, logprob, detokenizer)
            | {"top_logprobs": [_chat_token(*other, detokenizer) for other in others.items()]}
            for token, logprob, others in zip(completion.tokens, completion.logprobs, best, strict=True)
        ]
        logprobs = {"content": content, "refusal": None}
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    return {"index": completion.sample, "message": message, "logprobs": logprobs, **_ending(completion)}


def _chat_token(token: int, logprob: float, detokenizer: Detokenizer) -> dict[str, Any]:
    piece = detokenizer.token_text(token)
    is_whole = "\ufffd" not in piece  # else the token is part of a character, of which the text shows no bytes
    return {"token": piece, "logprob": round(logprob, 6), "bytes": list(piece.encode()) if is_whole else None}


def _text_choice(completion: Completion, prompt: Sequence[int], detokenizer: Detokenizer) -> dict[str, Any]:
    def by_text(best: Mapping[int, float]) -> dict[str, float]:
        """Of tokens that look alike, parts of characters, the best one."""
        shown: dict[str, float] = {}
        for token, logprob in best.items():
            shown.setdefault(detokenizer.token_text(token), round(logprob, 6))
        return shown

    logprobs = None
    if completion.logprobs is not None:
        stream, offsets = TextStream(detokenizer, prompt), []
        for token in completion.tokens:
            offsets.append(len(stream.text))
            stream.push(token)
        logprobs = {
            "tokens": [detokenizer.token_text(token) for token in completion.tokens],
            "token_logprobs": _rounded(completion.logprobs),
            "top_logprobs": None if completion.top_logprobs is None else [*map(by_text, completion.top_logprobs)],
            "text_offset": offsets,
        }
    return {"index": completion.sample, "text": completion.text, "logprobs": logprobs, **_ending(completion)}


def _ending(completion: Completion) -> dict[str, Any]:
    return {
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "token_ids": list(completion.tokens),
    }


def _rounded(logprobs: Sequence[float]) -> list[float]:
    return [round(logprob, 6) for logprob in logprobs]


def record_text(record: Mapping[str, Any]) -> str:
    """A record as the line of a file, without its end."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


# --- the file of answers ----------------------------------------------------------------------------------------


class _Written(NamedTuple):
    line: int
    is_error: bool


class AnswerFile(LineFile):
    """Appends records to a file of JSON lines; resumes a killed run.

    `done` holds the lines that are answered. On opening, a torn last line is cut off; a whole line that is no answer to
    one of the lines `numbers` raises UserError with file and line. For one process at a time, which is enforced.
    """

    def __init__(self, path: Path, numbers: Container[int]) -> None:
        self.done: set[int] = set()
        self.num_errors = 0

        def read(line: bytes, n: int) -> None:
            try:
                written = _written(line)
                if written.line not in numbers or written.line in self.done:
                    raise ValueError(f"line {written.line} is not to be answered here")
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}:{n}: no answer of this batch ({error}): delete the line") from error
            self._add(written)

        super().__init__(path, read)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record and waits until it is on the disk."""
        written = _Written(record["line"], record["error"] is not None)
        assert written.line not in self.done
        self.append_lines(record_text(record).encode() + b"\n")
        self._add(written)

    def _add(self, written: _Written) -> None:
        self.done.add(written.line)
        self.num_errors += written.is_error


def _written(line: bytes) -> _Written:
    record = parse_json(line)
    if not is_whole(record["line"]):
        raise ValueError("its line is no number")
    return _Written(record["line"], record["error"] is not None)
