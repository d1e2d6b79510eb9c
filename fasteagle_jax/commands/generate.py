"""Answer prompts with a target, sped up by a drafter if one is named: the tokens are the same with and without it.

Prompts come from the command line or from a file (JSON lines and the other formats of prepare-data); a prompt of
several turns is a conversation, answered turn by turn. With --output the conversations go to a new file of JSON lines,
{"id", "messages", "tokens": [[...] an answer], "stopped": [...]}; without, they are printed.

examples:
  fasteagle generate --prompt "Why is the sky blue?" --stream
  fasteagle generate --drafter runs/smollm2/drafter --tree best_first:16 --input questions.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from fasteagle_jax import decode as decoding
from fasteagle_jax.commands.models import CHUNK, Models, add_target_options, check_fits, decode, load_models, pad
from fasteagle_jax.commands.terminal import Parser, add_sampling_options, check_new, program, whole, write_new
from fasteagle_jax.commands.timing import Compilations
from fasteagle_jax.data import Message, Prompt, read_prompts
from fasteagle_jax.errors import UserError
from fasteagle_jax.metrics import Acceptance
from fasteagle_jax.sampling import Sampling, make_sampling
from fasteagle_jax.tokenizer import encode_chat
from fasteagle_jax.tree import Tree

UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character whose last ones are to come


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Answers prompts as the command line says; returns the exit code."""
    answer_prompts(_parser().parse_args(argv))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="fasteagle generate", description=__doc__)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a user's message; repeatable")
    parser.add_argument("--input", metavar="SOURCE", help="a file of prompts")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="read N prompts of --input")
    parser.add_argument("--output", type=Path, metavar="FILE", help="a new file for the conversations")
    parser.add_argument("--no-chat", action="store_true", help="continue the prompts as plain text: no chat template")
    parser.add_argument("--stream", action="store_true", help="print as it is decoded; for one prompt")
    parser.add_argument("--max-new", type=whole(1), default=256, metavar="T", help="tokens an answer (default 256)")
    parser.add_argument(
        "--batch-size", type=whole(1), default=1, metavar="B", help="prompts decoded at once (default 1)"
    )
    models = parser.add_argument_group("models")
    add_target_options(models)
    models.add_argument("--drafter", type=Path, metavar="FOLDER", help="without one, decoding is plain")
    models.add_argument(
        "--tree", default="best_first:16", metavar="T", help="chain, backbone:WIDTH or best_first:NODES (default)"
    )
    add_sampling_options(parser, temperature=0.0)
    return parser


def answer_prompts(args: argparse.Namespace) -> None:
    """Prints or writes the answers to the prompts of `args`, and statistics on stderr."""
    # --- what was asked for -----------------------------------------------------------------------------------
    tree = Tree.parse(args.tree)
    check_new(args.output)
    make_sampling(1, args.temperature, args.top_k, args.top_p, args.seed)  # checks them before anything is loaded
    prompts = [Prompt(f"prompt-{i}", [text]) for i, text in enumerate(args.prompt, 1)]
    if args.input:
        prompts += read_prompts(args.input, args.limit)
    if not prompts:
        raise UserError("no prompt: give --prompt or --input")
    if args.stream and (len(prompts) > 1 or len(prompts[0].turns) > 1 or args.output):
        raise UserError("--stream prints the answer to one prompt of one turn: leave --stream or --output out")
    if args.no_chat and (many := [prompt.id for prompt in prompts if len(prompt.turns) > 1]):
        raise UserError(f"prompt {many[0]} has several turns, which plain text has not: leave --no-chat out")

    models = load_models(args, args.drafter)
    talks = [Talk(prompt.id, list(prompt.turns)) for prompt in prompts]
    for talk in talks:
        check_fits(models, talk.id, talk.ask(models.tokenizer, chat=not args.no_chat), args.max_new)

    # --- answers ----------------------------------------------------------------------------------------------
    counts = Counts()
    if args.stream:
        for text in _stream(models, talks[0].tokens, tree, args, counts):
            print(text, end="", flush=True)
        print()
    else:
        batches = [talks[i : i + args.batch_size] for i in range(0, len(talks), args.batch_size)]
        for batch in tqdm(batches, unit="batch", disable=None if args.output else True):
            _answer_turns(models, batch, tree, args, counts)
            if not args.output:
                for talk in batch:
                    print(talk.text(chat=not args.no_chat), flush=True)
    if args.output:
        write_new(args.output, "".join(talk.line() for talk in talks))
    for line in counts.lines(models.drafter is not None):
        print(line, file=sys.stderr)


# --- conversations ----------------------------------------------------------------------------------------------


class Said(NamedTuple):
    """An answer."""

    text: str
    tokens: list[int]
    stopped: bool  # by a stop token; False where it reached --max-new


class Talk:
    """A conversation under way."""

    def __init__(self, id: str, turns: list[str]) -> None:
        self.id = id
        self.turns = turns
        self.answers: list[Said] = []
        self.tokens: list[int] = []  # the prompt to be answered next

    @property
    def ended(self) -> bool:
        """Whether every turn is answered."""
        return len(self.answers) == len(self.turns)

    def messages(self) -> list[Message]:
        """What was said, and the next question if there is one."""
        messages = []
        for i, turn in enumerate(self.turns[: len(self.answers) + 1]):
            messages.append({"role": "user", "content": turn})
            if i < len(self.answers):
                messages.append({"role": "assistant", "content": self.answers[i].text})
        return messages

    def ask(self, tokenizer: Any, *, chat: bool) -> list[int]:
        """The tokens of the prompt to be answered next, which it remembers."""
        self.tokens = encode_chat(tokenizer, self.messages()) if chat else tokenizer.encode(self.turns[0])
        return self.tokens

    def text(self, *, chat: bool) -> str:
        """The conversation to be read."""
        if not chat:
            return self.turns[0] + self.answers[0].text
        return "\n".join(
            f"{'>' if message['role'] == 'user' else '<'} {message['content']}" for message in self.messages()
        )

    def line(self) -> str:
        """The conversation as a line of JSON."""
        answers = {"tokens": [a.tokens for a in self.answers], "stopped": [a.stopped for a in self.answers]}
        return json.dumps({"id": self.id, "messages": self.messages(), **answers}, ensure_ascii=False) + "\n"


def _answer_turns(models: Models, talks: list[Talk], tree: Tree, args: argparse.Namespace, counts: Counts) -> None:
    """Answers all turns of a batch of conversations; rows without a question fill it up to --batch-size."""
    while asked := [talk for talk in talks if not talk.ended]:
        for talk in asked:
            check_fits(models, talk.id, talk.ask(models.tokenizer, chat=not args.no_chat), args.max_new)
        filling = args.batch_size - len(asked)
        sampling = _sampling(args, args.batch_size)
        with counts.measured():
            out = decode(
                models.target,
                models.drafter,
                [talk.tokens for talk in asked] + [[0]] * filling,
                sampling,
                max_new=args.max_new,
                limits=[args.max_new] * len(asked) + [1] * filling,
                stop_tokens=models.stop_tokens,
                tree=tree,
            )
            tokens, lengths, stopped = jax.device_get((out.tokens, out.lengths, out.stopped))
        for talk, row, length, its_end in zip(asked, tokens, lengths, stopped, strict=False):
            said = row[:length].tolist()
            talk.answers.append(Said(_text(models.tokenizer, said), said, bool(its_end)))
        counts.add(lengths[: len(asked)].tolist(), out.statistics)


def _stream(models: Models, prompt: list[int], tree: Tree, args: argparse.Namespace, counts: Counts) -> Iterator[str]:
    """The answer piece by piece, in whole characters, as the rounds find it."""
    tokens, lengths = pad([prompt])
    sampling = _sampling(args, 1)
    stop = decoding.make_stop(1, args.max_new, models.stop_tokens)
    with counts.measured():
        state, tied = decoding.start(
            models.target,
            models.drafter,
            tokens,
            lengths,
            sampling,
            stop,
            max_new=args.max_new,
            tree=tree,
            chunk=CHUNK,
        )
    printed = 0
    while True:
        num_emitted, done, emitted = jax.device_get((state.num_emitted[0], state.done[0], state.emitted[0]))
        text = _text(models.tokenizer, emitted[:num_emitted].tolist())
        whole_text = text if done else text.rstrip(UNFINISHED)
        if len(whole_text) > printed:
            yield whole_text[printed:]
            printed = len(whole_text)
        if done:
            counts.add([int(num_emitted)], state.statistics)
            return
        with counts.measured():
            state = decoding.advance(
                models.target, models.drafter, tied, state, sampling, stop, jnp.int32(1), tree=tree
            )
            jax.block_until_ready(state.done)


def _sampling(args: argparse.Namespace, batch: int) -> Sampling:
    return make_sampling(batch, args.temperature, args.top_k, args.top_p, args.seed)


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


# --- statistics -------------------------------------------------------------------------------------------------


class Counts:
    """New tokens, target passes and time of a run."""

    def __init__(self) -> None:
        self.seconds = 0.0  # without compilation
        self.compiling = 0.0
        self.answers = 0
        self.new_tokens = 0
        self.acceptance: Acceptance | None = None

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Counts the time inside `with`, compilation apart."""
        started = time.perf_counter()
        with Compilations() as compilations:
            yield
        self.seconds += max(time.perf_counter() - started - compilations.seconds, 0.0)
        self.compiling += compilations.seconds

    def add(self, lengths: list[int], statistics: decoding.Statistics) -> None:
        """Counts a batch: its answers' lengths; rows that fill it up have no rounds."""
        self.answers += len(lengths)
        self.new_tokens += sum(lengths)
        acceptance = Acceptance.of(statistics)
        self.acceptance = acceptance if self.acceptance is None else self.acceptance + acceptance

    def lines(self, speculative: bool) -> list[str]:
        """What to say of the run."""
        rate = self.new_tokens / max(self.seconds, 1e-9)
        lines = [
            f"{self.new_tokens} new tokens in {self.seconds:.1f} s: {rate:.1f} tokens/s"
            f" (and {self.compiling:.1f} s of compilation)"
        ]
        if self.acceptance is not None and speculative:
            by_depth = " ".join(f"{share:.2f}" for share in self.acceptance.by_depth)
            lines.append(
                f"acceptance length {self.acceptance.length:.2f} tokens a target pass:"
                f" {self.acceptance.rounds} passes for {self.new_tokens - self.answers} tokens,"
                f" the {self.answers} made by prefill not counted; accepted by depth {by_depth}"
            )
        return lines
