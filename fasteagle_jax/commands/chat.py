"""Talk with a target at the terminal, sped up by a drafter if one is named.

A line is a message; the answer is printed as it is decoded. /reset begins a new conversation; /exit or the end of the
input (Ctrl-D) ends the chat; Ctrl-C stops an answer, whose beginning stays in the
conversation. Lines may also come out of a pipe.

examples:
  fasteagle chat
  fasteagle chat --drafter runs/smollm2/drafter --show-drafts --system "You answer in one sentence."
  printf 'Who are you?\\nSince when?\\n' | fasteagle chat --max-new 64
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

from fasteagle_jax.bench.timing import Stopwatch
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
from fasteagle_jax.commands.terminal import Parser, program
from fasteagle_jax.data.sources import Message
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion, Piece, SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import check_text


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Talks as the command line says; returns the exit code."""
    chat(_parser().parse_args(argv))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="fasteagle chat", description=__doc__)
    parser.add_argument("--system", metavar="TEXT", help="a system message, which opens every conversation")
    add_template_options(parser)
    add_answer_options(parser, max_new=512)
    add_engine_options(parser, ONE_AT_A_TIME)
    return parser


def chat(args: argparse.Namespace) -> None:
    """Answers stdin's lines until it ends; all but the answers goes to stderr."""
    params, tree, options = sampling_params(args), tree_named(args.tree), chat_options(args)
    check_text(args.system or "", "--system")
    engine = load_engine(args, tree, slots=1)
    levels = num_levels(engine)
    full = f"the conversation has reached --max-len {engine.max_len}: /reset begins a new one"
    opening: list[Message] = [] if args.system is None else [{"role": "system", "content": args.system}]
    hi: Message = {"role": "user", "content": "Hi"}
    engine.tokens([*opening, hi], "a conversation", options)  # UserError if it cannot chat at all
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets `input` edit lines and remember them
        _note("/reset begins a new conversation, /exit ends the chat, Ctrl-C stops an answer")

    screen = Screen(levels if args.show_drafts else 0)
    total_watch = Stopwatch()
    messages, total = list(opening), Took(levels, total_watch)
    while True:
        # --- a line -------------------------------------------------------------------------------------------
        try:
            line = _read_line("> " if interactive else "")
        except KeyboardInterrupt:
            if not interactive:
                raise
            _note("\n/exit ends the chat")
            continue
        if line is None and interactive:
            _note("")  # Ctrl-D leaves the cursor behind the prompt
        if line is None or line == "/exit":
            break
        if line == "/reset":
            messages = list(opening)
            _note("a new conversation")
            continue
        if line.startswith("/") and " " not in line:
            _note(f"no command {line}: give /reset or /exit, or a message of several words")
            continue
        if not line:
            continue
        question: Message = {"role": "user", "content": line}
        try:
            tokens = engine.tokens([*messages, question], "the conversation", options)
        except UserError as error:  # what this line brings is no reason to end the chat
            _note(f"{error}")
            continue
        if len(tokens) >= engine.max_len:
            _note(f"{full}, or say something shorter")
            continue

        # --- its answer ---------------------------------------------------------------------------------------
        watch = Stopwatch()
        with watch, total_watch:
            text_so_far, depths, completion = _answer(engine, tokens, params, screen)
        if completion is None and not text_so_far:
            continue  # stopped before it began: as if not asked
        messages += [question, {"role": "assistant", "content": text_so_far}]
        total.add(depths)
        if args.show_drafts:
            took = Took(levels, watch)
            took.add(depths)
            for text in took.lines():
                _note(text)
        if completion is not None and completion.finish_reason == "length":
            at_max_len = len(tokens) + len(depths) >= engine.max_len
            _note(full if at_max_len else f"the answer was cut at --max-new {args.max_new} tokens")
    if total.answers:
        for text in total.lines():
            _note(text)


def _answer(
    engine: Engine, tokens: Sequence[int], params: SamplingParams, screen: Screen
) -> tuple[str, Sequence[int], Completion | None]:
    """Shows an answer: its text, the depths of its tokens, and the whole of it unless it was interrupted."""
    pieces: list[Piece] = []
    completion: Completion | None = None
    try:
        for piece in engine.stream_pieces(tokens, params):
            if isinstance(piece, Completion):
                completion = piece
            else:
                pieces.append(piece)
                screen.piece(piece)
    except KeyboardInterrupt:
        pass
    screen.text("\n")
    if completion is not None:
        return completion.text, completion.depths, completion
    return "".join(piece.text for piece in pieces), [piece.depth for piece in pieces], None


def _read_line(prompt: str) -> str | None:
    """stdin's next line without the spaces around it, None at the end."""
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise UserError(f"the input is not {error.encoding} text: convert it") from error


def _note(text: str) -> None:
    print(text, file=sys.stderr)
