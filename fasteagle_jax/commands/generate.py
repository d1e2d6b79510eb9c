"""Answer prompts with a target, sped up by a drafter if one is named: the tokens are the same with and without it.

Prompts come from the command line or from a file (JSON lines and the other formats of prepare-data); a prompt of
several turns is a conversation, answered turn by turn. A single one is printed as it is decoded. With --output the
conversations go to a new file of JSON lines, {"id", "messages", "tokens": [[...] an answer], "stopped": [...]};
without, they are printed. An answer that reaches --max-new or --max-len has not stopped.

examples:
  fasteagle generate --prompt "Why is the sky blue?"
  fasteagle generate --prompt "Why is the sky blue?" --drafter runs/smollm2/drafter --show-drafts
  fasteagle generate --prompt "Why is the sky blue?" --trace sky.html
  fasteagle generate --drafter runs/smollm2/drafter --slots 16 --input questions.jsonl --output answers.jsonl
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fasteagle_jax.bench.timing import Stopwatch
from fasteagle_jax.bench.trace import page, trace
from fasteagle_jax.commands.answers import (
    ONE_AT_A_TIME,
    Screen,
    Took,
    add_answer_options,
    add_engine_options,
    add_template_options,
    chat_options,
    load_engine,
    num_levels,
    sampling_params,
    tree_named,
)
from fasteagle_jax.commands.terminal import Parser, program, whole
from fasteagle_jax.data.sources import Message, Prompt, read_prompts
from fasteagle_jax.decoding.rules import make_rules
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.sampling_fields import from_options
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_new, write_new
from fasteagle_jax.targets.templates import ChatOptions

log = logging.getLogger(__name__)


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
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="decode the only prompt round by round, and write a new page (one HTML file) to look through them",
    )
    parser.add_argument("--no-chat", action="store_true", help="continue the prompts as plain text: no chat template")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print as it is decoded, an only answer without its question (default for one prompt without --output)",
    )
    parser.add_argument(
        "--slots", type=whole(1), metavar="B", help="prompts answered at once (default 8, for fewer prompts as many)"
    )
    add_template_options(parser)
    add_answer_options(parser, max_new=256)
    add_engine_options(parser, f"for one prompt {ONE_AT_A_TIME}, for more auto")
    return parser


def answer_prompts(args: argparse.Namespace) -> None:
    """Prints or writes the answers to the prompts of `args`, and statistics on stderr."""
    # --- what was asked for -----------------------------------------------------------------------------------
    params, options = sampling_params(args), chat_options(args)
    check_new(args.output)
    check_new(args.trace)
    prompts = [Prompt(f"prompt-{i}", [text]) for i, text in enumerate(args.prompt, 1)]
    if args.input:
        prompts += read_prompts(args.input, args.limit)
    if not prompts:
        what = f"{args.input} holds no question of a user" if args.input else "no prompt"
        raise UserError(f"{what}: give --prompt, or --input with questions")
    tree = tree_named(args.tree or (None if len(prompts) == 1 else "auto"))
    single = len(prompts) == 1 and args.output is None
    if args.stream and not single:
        raise UserError("--stream prints the answers to one prompt: leave --stream, or the others and --output, out")
    if args.show_drafts and args.output:
        raise UserError("--show-drafts with --output: leave one of them out")
    if args.no_chat and (many := [prompt.id for prompt in prompts if len(prompt.turns) > 1]):
        raise UserError(f"prompt {many[0]} has several turns, which plain text does not have: leave --no-chat out")

    if args.trace:
        _check_trace(args, prompts, tree)

    engine = load_engine(args, tree, args.slots or min(8, len(prompts)))
    talks = [Talk(prompt, chat=not args.no_chat, options=options) for prompt in prompts]
    for talk in talks:
        talk.ask(engine)  # all, before the first is answered

    if args.trace:
        _trace(engine, talks[0], params, args)
        return

    # --- answers ----------------------------------------------------------------------------------------------
    levels, watch = num_levels(engine), Stopwatch()
    screen = Screen(levels if args.show_drafts else 0)
    if single and args.stream is not False:
        _stream(engine, talks[0], params, screen, watch)
    else:
        _answer(engine, talks, params, None if args.output else screen, watch)
    if args.output:
        write_new(args.output, "".join(talk.line() for talk in talks))
    took = Took(levels, watch)
    for talk in talks:
        for answer in talk.answers:
            took.add(answer.depths)
    for line in took.lines():
        print(line, file=sys.stderr)


def _check_trace(args: argparse.Namespace, prompts: Sequence[Prompt], tree: TreeSpec | str | None) -> None:
    """Raises UserError for what cannot be traced."""
    if len(prompts) != 1 or len(prompts[0].turns) != 1:
        raise UserError("--trace is of one answer: give one --prompt")
    for name in ("output", "stop", "stream", "json_schema", "regex"):
        if getattr(args, name):
            raise UserError(f"--trace with --{name.replace('_', '-')}: leave one of them out")
    if tree == "auto":
        raise UserError("--trace with --tree auto: name the tree")


def _trace(engine: Engine, talk: Talk, params: SamplingParams, args: argparse.Namespace) -> None:
    """Writes the page of a traced answer, and prints the answer."""
    (request,) = engine.requests(0, talk.ask(engine), params)
    sampling, tree = make_sampling(1, **from_options(args)), engine.trees[0]
    limits: dict[str, Any] = {"max_new": request.max_new, "stop_tokens": request.stop_tokens}
    rules = None if request.rules is None else make_rules([request.rules], engine.target.config.vocab_size)
    first, rounds = trace(engine.target, engine.drafter, request.prompt, sampling, **limits, tree=tree, rules=rules)
    title = f"{args.target}, {tree or 'plain'}, temperature {args.temperature:g}: {talk.turns[0]}"
    write_new(args.trace, page(title, engine.tokenizer, request.prompt, first, rounds))
    tokens = [first, *(token for r in rounds for token in r.emitted)]
    said = tokens[:-1] if tokens[-1] in request.stop_tokens else tokens
    print(engine.detokenizer.text(said, request.prompt))
    tau = (len(tokens) - 1) / max(len(rounds), 1)
    print(f"{len(tokens)} tokens in {len(rounds)} rounds, {tau:.2f} a round: {args.trace}", file=sys.stderr)


def _stream(engine: Engine, talk: Talk, params: SamplingParams, screen: Screen, watch: Stopwatch) -> None:
    """Answers all turns of a conversation and shows them token by token."""
    while (asked := talk.asked_next(engine)) is not None:
        if len(talk.turns) > 1 or not talk.chat:
            screen.text(talk.opening(len(talk.answers)))
        with watch:
            for piece in engine.stream_pieces(asked, params):
                if isinstance(piece, Completion):
                    talk.answers.append(piece)
                else:
                    screen.piece(piece)
        screen.text("\n")


def _answer(
    engine: Engine, talks: Sequence[Talk], params: SamplingParams, screen: Screen | None, watch: Stopwatch
) -> None:
    """Answers all turns of all conversations: the first of each, then the second. Shows them in order if told to."""
    shown = 0

    def show() -> None:
        nonlocal shown
        while screen and shown < len(talks) and talks[shown].ended:
            for i, answer in enumerate(talks[shown].answers):
                screen.text(talks[shown].opening(i))
                screen.answer(answer, talks[shown].asked[i], engine.detokenizer, params)
                screen.text("\n")
            shown += 1

    with tqdm(total=sum(len(t.turns) for t in talks), unit="answer", disable=True if screen else None) as bar:
        while asked := [(talk, tokens) for talk in talks if (tokens := talk.asked_next(engine)) is not None]:
            with watch:
                for completion in engine.complete([tokens for _, tokens in asked], params):
                    asked[completion.prompt_index][0].answers.append(completion)
                    bar.update()
                    show()
        show()  # those that have just ended as their next turn does not fit


class Talk:
    """A conversation under way; without `chat` a text to be continued."""

    def __init__(self, prompt: Prompt, *, chat: bool, options: ChatOptions) -> None:
        self.id, self.turns, self.chat, self.options = prompt.id, prompt.turns, chat, options
        self.answers: list[Completion] = []
        self.asked: dict[int, tuple[int, ...]] = {}  # the tokens that each turn's answer goes on from

    @property
    def ended(self) -> bool:
        """Whether every turn is answered."""
        return len(self.answers) == len(self.turns)

    def messages(self) -> list[Message]:
        """The messages so far, and the next question if there is one."""
        messages = []
        for i, turn in enumerate(self.turns[: len(self.answers) + 1]):
            messages.append({"role": "user", "content": turn})
            if i < len(self.answers):
                messages.append({"role": "assistant", "content": self.answers[i].text})
        return messages

    def ask(self, engine: Engine) -> tuple[int, ...]:
        """The tokens to be answered next; UserError if they do not fit."""
        tokens = engine.encode(self.messages() if self.chat else self.turns[0], self.id, self.options)
        self.asked[len(self.answers)] = tokens
        return tokens

    def asked_next(self, engine: Engine) -> tuple[int, ...] | None:
        """As of `ask`; None where all turns are answered, and after a warning where the next one does not fit."""
        if self.ended:
            return None
        try:
            return self.ask(engine)
        except UserError as error:
            if not self.answers:
                raise
            log.warning("%s ends after %d of %d turns: %s", self.id, len(self.answers), len(self.turns), error)
            self.turns = self.turns[: len(self.answers)]
            return None

    def opening(self, turn: int) -> str:
        """What is printed before the answer."""
        return f"> {self.turns[turn]}\n< " if self.chat else self.turns[turn]

    def line(self) -> str:
        """The conversation as a line of JSON."""
        tokens = [answer.tokens for answer in self.answers]
        stopped = [answer.finish_reason == "stop" for answer in self.answers]
        record = {"id": self.id, "messages": self.messages(), "tokens": tokens, "stopped": stopped}
        return json.dumps(record, ensure_ascii=False) + "\n"
