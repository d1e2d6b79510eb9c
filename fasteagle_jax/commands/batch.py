"""Answer a file of requests, sped up by a drafter if one is named: the tokens are the same with and without it.

The input has one JSON object a line, in OpenAI's batch form (/v1/chat/completions, /v1/completions) or a simple one:

  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 64}}
  {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "temperature": 0, "id": "sky"}
  {"prompt": "The sky is", "n": 2, "seed": 7}

A prompt is continued as it is, messages go through the target's chat template. They may have tool_calls, tool_call_id
and reasoning_content; beside them a line may have tools, chat_template_kwargs, add_generation_prompt and
continue_final_message. Sampling fields: temperature, top_p, top_k, min_p, max_tokens (max_completion_tokens,
max_new_tokens), n, seed, stop, stop_token_ids, ignore_eos, logprobs, top_logprobs, prompt_logprobs; rules: logit_bias,
allowed_token_ids, bad_words, min_tokens, repetition_penalty, presence_penalty, frequency_penalty, response_format,
structured_outputs. The options below hold if a line leaves them out, --seed included: equal requests then get equal
answers.

Each line gets one record in the form it came in, as soon as it is answered, so in another order: records carry the
line's number as "line". OpenAI's records have "custom_id", "response" and "error" (and token ids beside each choice's
text), simple ones "id", "text", "tokens", "finish_reason" and more (with n > 1 a list "answers" of these); both have
"statistics". A line that cannot be answered gets a record with an "error" that names the line.

The same command resumes after an interruption, by whatever means. OUTPUT.manifest.json beside the output says how it
was made; other settings need another output. --slots, --drafter, --tree, --lookup and --mesh change no token and may
change.

Several processes share the lines: process i of n answers those whose number modulo n is i, into a file of its own,
answers-00000-of-00002.jsonl. They meet once, to learn their numbers, and then do not wait for each other: each has an
engine of its own, and a --mesh is of its own devices.

examples:
  fasteagle batch --input requests.jsonl --output answers.jsonl --slots 16
  fasteagle batch --drafter runs/smollm2/drafter --input requests.jsonl --output answers.jsonl --temperature 0
  fasteagle batch --input requests.jsonl --output answers.jsonl --coordinator host:1234 --num-processes 2 --process-id 0
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

import jax.numpy as jnp
from tqdm import tqdm

from fasteagle_jax.commands.answers import (
    Took,
    add_engine_options,
    add_template_options,
    chat_options,
    mesh_named,
    sampling_params,
    tree_named,
)
from fasteagle_jax.commands.terminal import (
    INTERRUPTED,
    Parser,
    add_filter_options,
    add_rule_options,
    add_share_options,
    dtype_named,
    program,
    whole,
)
from fasteagle_jax.data.manifest import first_date, manifest_path, prompt_settings, read_manifest, saved_settings
from fasteagle_jax.data.shares import Share, join
from fasteagle_jax.decoding.sampling_fields import from_options, recorded
from fasteagle_jax.engine.batch_records import AnswerFile, answer_record, refusal_record
from fasteagle_jax.engine.batch_requests import BatchRequest, Refusal, numbered, read_requests
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import RULES, Completion, Refused, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import write_text, writing


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Answers a file as the command line says; returns the exit code."""
    return answer_file(_parser().parse_args(argv))


def _parser() -> Parser:
    parser = Parser(prog="fasteagle batch", description=__doc__)
    parser.add_argument("--input", required=True, type=Path, metavar="FILE", help="requests, a line each")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON lines, resumed if it exists")
    parser.add_argument(
        "--slots", type=whole(1), default=8, metavar="B", help="requests answered at once (default %(default)s)"
    )
    add_engine_options(parser, "auto")
    group = parser.add_argument_group("what a line may leave out")
    group.add_argument(
        "--max-new", type=whole(1), default=256, metavar="T", help="tokens an answer (default %(default)s)"
    )
    group.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 is greedy (default %(default)s)")
    add_filter_options(group)
    add_rule_options(parser)
    add_template_options(parser)
    add_share_options(parser, "the lines")
    return parser


def answer_file(args: argparse.Namespace) -> int:
    """Writes args.output, or what it still lacks; returns the exit code."""
    # --- what was asked for -----------------------------------------------------------------------------------
    tree = tree_named(args.tree or "auto")
    if not args.input.is_file():
        raise UserError(f"no file {args.input}: name a file of requests")
    share = join(args)
    defaults, chat = sampling_params(args), chat_options(args)
    output = share.of_file(args.output)
    if output.exists() and output.samefile(args.input):
        raise UserError(f"{output} is the input, too: name another --output")

    # --- the engine -------------------------------------------------------------------------------------------
    dtype = dtype_named(args.dtype)
    mesh = mesh_named(args.mesh)
    options = {"slots": args.slots, "max_len": args.max_len, "strict": args.strict, "adapter": args.adapter}
    options |= {"lookup": args.lookup, "cache_dtype": args.cache_dtype}
    engine = Engine.load(args.target, args.drafter, **options, tree=tree, mesh=mesh, dtype=dtype)
    date = first_date(saved_settings(output))
    with args.input.open("rb") as requests:
        digest, numbers = _survey(requests, share)
        settings = {
            "target": engine.fingerprint,
            **prompt_settings(engine.tokenizer, engine.eos_token_ids, chat, date),
            "dtype": jnp.dtype(dtype).name,
            **({"cache_dtype": args.cache_dtype} if args.cache_dtype else {}),
            "max_len": engine.max_len,
            "input": {"sha256": digest},
            "defaults": {
                **recorded(from_options(args), always=("temperature", "top_k", "top_p", "min_p", "seed")),
                "max_new": args.max_new,
                **_rules(defaults),
            },
            "share": share._asdict(),
        }
        is_new = read_manifest(output, settings) is None

        # --- answers ------------------------------------------------------------------------------------------
        with writing(output):
            if is_new:
                write_text(manifest_path(output), json.dumps({"settings": settings}, indent=2) + "\n")
            with AnswerFile(output, numbers) as answers, Interrupts() as interrupts:
                if answers.done:
                    print(f"{output}: {len(answers.done)} of {len(numbers)} requests are answered already")
                print(f"memory: {engine.memory}", file=sys.stderr)
                if len(engine.trees) > 1:
                    print("measuring which tree is the fastest comes first", file=sys.stderr)
                work = Work(engine, answers, interrupts, args.target, len(numbers))
                try:
                    work.answer(
                        read_requests(requests, defaults, lambda n: n in numbers and n not in answers.done, chat)
                    )
                except KeyboardInterrupt:
                    print(
                        f"interrupted: {len(answers.done)} of {len(numbers)} requests are answered; "
                        "the same command resumes with the others",
                        file=sys.stderr,
                    )
                    return INTERRUPTED
    print(f"{output}: {work.summary()}")
    return 0


def _rules(params: SamplingParams) -> dict[str, Any]:
    """The rules of params, without those that change nothing, as JSON has them."""
    given = {name: value for name in RULES if (value := getattr(params, name)) != getattr(SamplingParams(), name)}
    rules: dict[str, Any] = json.loads(json.dumps(given))
    return rules


def _survey(file: BinaryIO, share: Share) -> tuple[str, set[int]]:
    """The file's sha256, and the numbers of the share's lines that are not blank; the file is at its start again."""
    digest = hashlib.sha256()

    def hashed() -> Iterator[bytes]:
        for line in file:
            digest.update(line)
            yield line

    numbers = {number for number, _ in numbered(hashed()) if share.has(number)}
    file.seek(0)
    return digest.hexdigest(), numbers


# --- answering --------------------------------------------------------------------------------------------------


class Work:
    """The lines of a file becoming records, and what that takes."""

    def __init__(self, engine: Engine, answers: AnswerFile, interrupts: Interrupts, target: str, total: int) -> None:
        self._engine, self._answers, self._interrupts, self._target = engine, answers, interrupts, target
        self._total = total
        # By `prompt_index`, under way: the line with its prompt's tokens, and the answers that there are.
        self._asked: dict[int, tuple[BatchRequest, Sequence[int]]] = {}
        self._answered: dict[int, list[Completion]] = {}
        self._took = Took()
        self._bar: Any = None

    def answer(self, lines: Iterable[BatchRequest | Refusal]) -> None:
        """Appends a record for each of the lines."""
        pause = 0.5 if sys.stderr.isatty() else 60.0  # seconds: a log wants fewer lines than a terminal
        done = len(self._answers.done)
        with tqdm(total=self._total, initial=done, unit="request", mininterval=pause, dynamic_ncols=True) as self._bar:
            self._took = Took()
            for answer in self._engine.serve(self._pairs(lines)):
                if isinstance(answer, Refused):
                    (asked, _), _ = self._asked.pop(answer.prompt_index), self._answered.pop(answer.prompt_index)
                    self._write(refusal_record(Refusal(asked.line, "invalid_prompt", answer.reason)))
                else:
                    self._take(answer)

    def summary(self) -> str:
        """What came of it."""
        answers = self._answers
        return (
            f"{len(answers.done)} of {self._total} requests answered, {answers.num_errors} of them errors;"
            f" {self._took.summary()}"
        )

    def _pairs(self, lines: Iterable[BatchRequest | Refusal]) -> Iterator[tuple[Sequence[int], SamplingParams]]:
        """The prompts and params of lines; those without a prompt are settled on the way."""
        numbers = itertools.count()
        for asked in lines:
            if isinstance(asked, BatchRequest):
                try:
                    tokens = self._engine.encode(asked.prompt, "the prompt", asked.chat)
                except UserError as error:
                    asked = Refusal(asked.line, "invalid_prompt", str(error))
                else:
                    number = next(numbers)
                    self._asked[number], self._answered[number] = (asked, tokens), []
                    yield tokens, asked.params
                    continue
            self._write(refusal_record(asked))

    def _take(self, completion: Completion) -> None:
        """Takes an answer; the last one of its line makes the record."""
        number = completion.prompt_index
        (asked, prompt), answers = self._asked[number], self._answered[number]
        answers.append(completion)
        self._took.add(completion.depths)
        if len(answers) == asked.params.n:
            del self._asked[number], self._answered[number]
            self._write(answer_record(asked, prompt, answers, self._engine.detokenizer, self._target))

    def _write(self, record: dict[str, Any]) -> None:
        with self._interrupts.held():
            self._answers.append(record)
        self._bar.set_postfix_str(self._took.rate(), refresh=False)
        self._bar.update()


class Interrupts:
    """Ctrl-C inside `with` is a KeyboardInterrupt, but never in the middle of what is `held`."""

    def __init__(self) -> None:
        self._asked = self._is_held = False
        self._before: Any = None

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lets what is inside come to its end first."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._asked:  # meanwhile, or earlier where a destructor swallowed the exception
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # ignored under a shell's `&`
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, *_: object) -> None:
        self._asked = True
        if not self._is_held:
            raise KeyboardInterrupt
