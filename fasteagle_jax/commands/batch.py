"""Answer a file of requests, sped up by a drafter if one is named: the tokens are the same with and without it.

The input has one JSON object a line, in OpenAI's batch form (/v1/chat/completions, /v1/completions) or a simple one:

  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...], "max_tokens": 64}}
  {"messages": [{"role": "user", "content": "Why is the sky blue?"}], "temperature": 0, "id": "sky"}
  {"prompt": "The sky is", "n": 2, "seed": 7}

A prompt is continued as it is, messages go through the target's chat template. They may have tool_calls, tool_call_id
and reasoning_content; beside them a line may have tools, chat_template, chat_template_kwargs, date,
add_generation_prompt and continue_final_message. Sampling fields: temperature, top_p, top_k, min_p, max_tokens
(max_completion_tokens, max_new_tokens), n, seed, stop, stop_token_ids, ignore_eos, logprobs, top_logprobs,
prompt_logprobs; rules: logit_bias, allowed_token_ids, bad_words, min_tokens, repetition_penalty, presence_penalty,
frequency_penalty, response_format, structured_outputs. The options below hold if a line leaves them out, --seed
included: equal requests then get equal answers.

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

With --ray the lines are shared by the workers of a Ray cluster (pip install 'fasteagle-jax[ray]'), each of which takes
more as it finishes: the input is a file, or a folder or bucket of .jsonl and .parquet files (a row's columns are a
line's fields), and the output a folder, or one in a bucket, of .jsonl files with the same records; those of several
input files have the "file" that their "line" is of. A worker that dies is started anew. All machines must see target,
input and output by the same names. OUTPUT.done holds the ids of the rows that are answered: file and line, or a
column's values.

examples:
  fasteagle batch --input requests.jsonl --output answers.jsonl --slots 16
  fasteagle batch --drafter runs/smollm2/drafter --input requests.jsonl --output answers.jsonl --temperature 0
  fasteagle batch --input requests.jsonl --output answers.jsonl --coordinator host:1234 --num-processes 2 --process-id 0
  fasteagle batch --ray auto --worker TPU=4 --mesh 1,1,4 --input gs://bucket/questions --output gs://bucket/answers
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
from etils import epath
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
from fasteagle_jax.commands.interrupts import Interrupts
from fasteagle_jax.commands.terminal import (
    INTERRUPTED,
    Parser,
    add_filter_options,
    add_ray_options,
    add_rule_options,
    add_share_options,
    check_ray_options,
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
from fasteagle_jax.engine.shipped import drafter_folder
from fasteagle_jax.engine.sizes import checked_max_len
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_writable, in_bucket, write_file, write_text, writing
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.loading import open_checkpoint
from fasteagle_jax.targets.tokenizer import load_tokenizer, stop_token_ids


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Answers a file as the command line says; returns the exit code."""
    return answer_file(_parser().parse_args(argv))


def _parser() -> Parser:
    parser = Parser(prog="fasteagle batch", description=__doc__)
    parser.add_argument("--input", required=True, metavar="FILE", help="requests, a line each")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON lines, resumed if it exists")
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
    add_ray_options(parser)
    parser.add_argument(
        "--id-column",
        metavar="NAME",
        help="with --ray, know rows by this field (of OpenAI's form: custom_id) instead of by file and line: the input "
        "may grow and be ordered anew, and the same command answers what is new",
    )
    return parser


def answer_file(args: argparse.Namespace) -> int:
    """Writes args.output, or what it still lacks; returns the exit code."""
    # --- what was asked for -----------------------------------------------------------------------------------
    tree = tree_named(args.tree or "auto")
    check_ray_options(args)
    if args.ray is not None:
        return _answer_on_ray(args)
    if args.id_column is not None:
        raise UserError("--id-column is of --ray: leave it out; lines are known by their numbers")
    source = Path(args.input)
    if in_bucket(args.input) or not source.is_file():
        raise UserError(f"no file {args.input}: name a file of requests, or a folder or bucket with --ray")
    share = join(args)
    defaults, chat = sampling_params(args), chat_options(args)
    output = share.of_file(Path(args.output))
    if output.exists() and output.samefile(source):
        raise UserError(f"{output} is the input, too: name another --output")

    # --- the engine -------------------------------------------------------------------------------------------
    dtype = dtype_named(args.dtype)
    mesh = mesh_named(args.mesh)
    options = {"slots": args.slots, "max_len": args.max_len, "strict": args.strict, "adapter": args.adapter}
    options |= {"lookup": args.lookup, "cache_dtype": args.cache_dtype}
    engine = Engine.load(args.target, args.drafter, **options, tree=tree, mesh=mesh, dtype=dtype)
    chat = dataclasses.replace(chat, date=first_date(saved_settings(output)))
    with source.open("rb") as requests:
        digest, numbers = _survey(requests, share)
        settings = {
            "target": engine.fingerprint,
            **prompt_settings(engine.tokenizer, engine.eos_token_ids, chat),
            **_answer_settings(args, defaults, dtype, engine.max_len),
            "input": {"sha256": digest},
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


def _answer_settings(args: argparse.Namespace, defaults: SamplingParams, dtype: Any, max_len: int) -> dict[str, Any]:
    """What decides answers beside target, prompts and input, for the manifest."""
    given = recorded(from_options(args), always=("temperature", "top_k", "top_p", "min_p", "seed"))
    return {
        "dtype": jnp.dtype(dtype).name,
        **({"cache_dtype": args.cache_dtype} if args.cache_dtype else {}),
        "max_len": max_len,
        "defaults": {**given, "max_new": args.max_new, **_rules(defaults)},
    }


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


def _answer_on_ray(args: argparse.Namespace) -> int:
    """Writes what the folder args.output still lacks, by the workers of a Ray cluster; returns the exit code."""
    from fasteagle_jax.integrations import ray as cluster  # nobody else needs Ray

    # --- what was asked for -----------------------------------------------------------------------------------
    defaults, chat = sampling_params(args), chat_options(args)
    source, output = cluster.absolute(args.input), args.output.rstrip("/")
    output = output if in_bucket(output) else str(Path(output).absolute())
    files = cluster.request_files(source)
    checkpoint = open_checkpoint(args.target, args.adapter)
    max_len = checked_max_len(args.max_len, args.slots, checkpoint.config.max_positions)
    drafter = drafter_folder(args.drafter, checkpoint)
    # --- the cluster, and what it will read -------------------------------------------------------------------
    with cluster.connected(args.ray):
        their = cluster.workers_for(args.workers, args.worker, args.mesh)
        dtype = their.dtype(args.dtype)
        found = cluster.survey(files, args.id_column)
        place: Any = epath.Path(output) if in_bucket(output) else Path(output)
        chat = dataclasses.replace(chat, date=first_date(saved_settings(place)))
        tokenizer = load_tokenizer(checkpoint.path)
        settings = {
            "target": fingerprint(checkpoint, dtype),
            **prompt_settings(tokenizer, stop_token_ids(tokenizer, checkpoint.path), chat),
            **_answer_settings(args, defaults, dtype, max_len),
        }
        if args.id_column is None:
            owners = cluster.first_owners(files, found)
            settings["input"] = {file.name: its.sha256 for file, its in zip(files, found, strict=True)}
        else:
            cluster.check_ids(files, found, args.id_column)
            owners = {}
            settings["id_column"] = args.id_column
        is_new = read_manifest(place, settings) is None

        # --- answers ------------------------------------------------------------------------------------------
        check_writable(place)
        if is_new:
            write_file(epath.Path(manifest_path(place)), json.dumps({"settings": settings}, indent=2) + "\n")
        total = sum(its.num_rows for its in found)
        print(f"{total} requests of {len(files)} files, {their}", file=sys.stderr)
        arguments = {
            "target": cluster.absolute(args.target),
            "drafter": drafter and cluster.absolute(str(drafter)),
            "adapter": args.adapter and cluster.absolute(args.adapter),
            "slots": args.slots,
            "max_len": max_len,
            "tree": tree_named(args.tree or "auto"),
            "lookup": args.lookup,
            "cache_dtype": args.cache_dtype,
            "strict": args.strict,
            "dtype": dtype,
            "mesh": args.mesh,
            "params": defaults,
            "chat": chat,
            "name": args.target,
        }
        started = time.perf_counter()
        ids: dict[str, Any] = {"id_column": args.id_column, "owners": owners}
        done = cluster.answer_files(files, output, their, args.slots, arguments, **ids)
    seconds = time.perf_counter() - started
    print(
        f"{output}: {total} of {total} requests answered, {done.num_rows} by this run, {done.num_errors} of these "
        f"errors; {seconds:.1f} s"
    )
    return 0


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
