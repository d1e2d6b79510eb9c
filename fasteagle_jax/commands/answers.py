"""What commands that answer share: the engine by its options, answers shown token by token, counts of answers."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from fasteagle_jax.bench.timing import Stopwatch
from fasteagle_jax.commands.models import add_target_options
from fasteagle_jax.commands.terminal import add_rule_options, add_sampling_options, rules_from_options, whole
from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.sampling_fields import from_options
from fasteagle_jax.decoding.tree import MAX_LOOKUP, TreeSpec
from fasteagle_jax.devices.sharding import MeshShape, make_mesh
from fasteagle_jax.engine.detokenizer import Detokenizer, TextStream
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion, Piece, SamplingParams
from fasteagle_jax.engine.shipped import SHIPPED, drafter_folder
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import json_value
from fasteagle_jax.targets.loading import open_checkpoint
from fasteagle_jax.targets.templates import ChatOptions

ONE_AT_A_TIME = (
    "best_first:4 on a CPU, best_first:16 elsewhere"  # for a dense target what `tree_named(None)` is, in words
)
COLOURS = ("green", "cyan", "blue", "magenta", "yellow", "red", "bright_black")  # of depths 1, 2, ...; the last: deeper
MARKS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def depth_colour(depth: int) -> str:
    """The colour of a token that was guessed at this depth, from 1 on."""
    return COLOURS[min(depth, len(COLOURS)) - 1]


# --- options ----------------------------------------------------------------------------------------------------


def add_answer_options(parser: Any, max_new: int) -> None:
    """Adds --max-new, --stop, --stop-token-ids, the options of sampling and of rules, and --show-drafts."""
    parser.add_argument(
        "--max-new", type=whole(1), default=max_new, metavar="T", help="tokens an answer (default %(default)s)"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text; repeatable"
    )
    parser.add_argument(
        "--stop-token-ids",
        nargs="+",
        type=whole(0),
        default=[],
        metavar="ID",
        help="end an answer at these tokens, besides the target's own; the text does not show them",
    )
    parser.add_argument(
        "--show-drafts",
        action="store_true",
        help="colour each token by the depth at which the drafter guessed it; if there are no colours (a pipe, "
        "NO_COLOR) the depth stands behind the token: sky¹",
    )
    add_sampling_options(parser, temperature=0.0)
    add_rule_options(parser)


def add_engine_options(parser: Any, default_tree: str) -> None:
    """Adds the options of target, drafter, tree and lookup, --max-len and --mesh, for `load_engine`."""
    group = parser.add_argument_group("models")
    add_target_options(group)
    add_draft_options(group, default_tree)
    group.add_argument(
        "--max-len",
        type=whole(2),
        metavar="T",
        help="the most tokens of a conversation, answers included (default the target's positions, at most 2048)",
    )
    group.add_argument(
        "--mesh",
        metavar="D,F,T",
        help="use this process's devices together: rows (slots) split over D, weights over F x T, heads over T; "
        "-1 for what is left (default one device)",
    )


def add_draft_options(parser: Any, default_tree: str) -> None:
    """Adds --drafter, --strict, --tree, to be read with `tree_named`, and --lookup."""
    parser.add_argument(
        "--drafter",
        default=SHIPPED,
        metavar="FOLDER",
        help="default: the one that comes with this program for the target, if one does; else decoding is plain",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse a drafter that was trained for other weights of the same sizes"
    )
    parser.add_argument(
        "--tree",
        metavar="T",
        help="plain, chain, backbone:WIDTH, best_first:NODES, or auto: the fastest, measured at the start, which takes "
        f"a minute or more (default {default_tree})",
    )
    parser.add_argument(
        "--lookup",
        type=int,
        metavar="K",
        help="share the tree's nodes with what stood before in the text after the last tokens, up to K "
        f"(1 to {MAX_LOOKUP}, default no lookup)",
    )


def add_template_options(parser: Any) -> None:
    """Adds the options that `chat_options` reads."""
    group = parser.add_argument_group("chat template")
    group.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        help="""variables of the template, e.g. '{"enable_thinking": false}'""",
    )
    group.add_argument("--chat-template", metavar="NAME", help="one of the tokenizer's templates, by its name")
    group.add_argument("--tools", type=Path, metavar="FILE", help="tools to offer: a JSON list, as OpenAI's")


def chat_options(args: argparse.Namespace) -> ChatOptions:
    """The options of `add_template_options`; UserError for what is not JSON or not of the right kind."""
    kwargs: Any = {}
    tools = None
    if args.chat_template_kwargs is not None:
        try:
            kwargs = json_value(args.chat_template_kwargs.encode())
        except ValueError as error:
            raise UserError(f"--chat-template-kwargs is not JSON ({error}): give an object in quotes") from None
    if args.tools is not None:
        try:
            tools = json_value(args.tools.read_bytes())
        except OSError as error:
            raise UserError(f"cannot read {args.tools}: {error.strerror}; give a file of tools") from None
        except ValueError as error:
            raise UserError(f"{args.tools} is not JSON ({error}): give a list of tools") from None
    return ChatOptions(tools=tools, chat_template=args.chat_template, chat_template_kwargs=kwargs)


def tree_named(text: str | None) -> TreeSpec | str | None:
    """The `tree` of `Engine` for the value of --tree: a TreeSpec, "auto", or None for `plain`.

    Without a value "single", for a conversation that is over before "auto" would have measured.
    """
    if text is None:
        return "single"
    if text in ("auto", "plain"):
        return "auto" if text == "auto" else None
    return TreeSpec.parse(text)


def mesh_named(text: str | None) -> Mesh | None:
    """The `mesh` of `Engine` for the value of --mesh: this process's devices."""
    return None if text is None else make_mesh(MeshShape.parse(text), jax.local_devices())


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options of `add_answer_options`, or those of them that there are; UserError for values out of range."""
    stops = {name: getattr(args, name) for name in ("stop", "stop_token_ids") if hasattr(args, name)}
    return SamplingParams(**from_options(args), max_new_tokens=args.max_new, **stops, **rules_from_options(args))


def load_engine(args: argparse.Namespace, tree: TreeSpec | str | None, slots: int) -> Engine:
    """The engine that the options name, its trees measured if there is a choice."""
    if (
        args.show_drafts
        and args.lookup is None
        and drafter_folder(args.drafter, open_checkpoint(args.target, args.adapter)) is None
    ):
        raise UserError("--show-drafts without a drafter: name its folder with --drafter")
    engine = Engine.load(
        args.target,
        args.drafter,
        slots=slots,
        max_len=args.max_len,
        tree=tree,
        lookup=args.lookup,
        mesh=mesh_named(args.mesh),
        dtype=args.dtype,
        strict=args.strict,
        adapter=args.adapter,
        cache_dtype=args.cache_dtype,
    )
    if len(engine.trees) > 1:
        print("measuring which tree is the fastest", file=sys.stderr)
        logging.getLogger(Engine.__module__).setLevel(logging.INFO)  # it says what it measured
        engine.measure()
    return engine


# --- answers shown ----------------------------------------------------------------------------------------------


class Screen:
    """stdout, written piece by piece; with `num_levels`, tokens show the depth at which they were guessed."""

    def __init__(self, num_levels: int = 0) -> None:
        self._shows_depths = num_levels > 0
        self._console = Console()
        self._has_colours = self._console.color_system is not None and not self._console.no_color
        if num_levels:
            self.text("tokens: the target's own; accepted as the drafter's guess at depth")
            for depth in range(1, num_levels + 1):
                self.text(" ")
                self.piece(Piece(str(depth), depth))
            self.text("\n\n")

    def text(self, text: str) -> None:
        """Writes it at once."""
        print(text, end="", flush=True)

    def piece(self, piece: Piece) -> None:
        """Writes some text of an answer."""
        if not (self._shows_depths and piece.depth):
            self.text(piece.text)
        elif self._has_colours:
            style = Style.parse(depth_colour(piece.depth))
            self._console.print(Segments([Segment(piece.text, style)]), soft_wrap=True, end="")
        else:  # also where a token has no text: a character's first bytes
            words = piece.text.rstrip("\n")
            self.text(words + str(piece.depth).translate(MARKS) + piece.text[len(words) :])

    def answer(
        self, completion: Completion, prompt: Sequence[int], detokenizer: Detokenizer, params: SamplingParams
    ) -> None:
        """Writes a whole answer to a prompt."""
        if not self._shows_depths:
            self.text(completion.text)
            return
        text = TextStream(detokenizer, prompt, params.stop, params.min_tokens)
        for i, (token, depth) in enumerate(zip(completion.tokens, completion.depths, strict=True)):
            self.piece(Piece(text.push(token) if i < len(completion.text_tokens) else "", depth))
        if rest := text.finish():
            self.piece(Piece(rest, completion.depths[-1]))


# --- statistics -------------------------------------------------------------------------------------------------


def num_levels(engine: Engine) -> int:
    """N, the depth to which the engine drafts; 0 for plain decoding."""
    return 0 if engine.drafter is None or engine.trees == (None,) else engine.drafter.num_levels


class Took:
    """Counts of answers, and the time they took: the stopwatch's if one is given, else all since the start."""

    def __init__(self, num_levels: int = 0, watch: Stopwatch | None = None) -> None:
        self._num_levels, self._watch, self._started = num_levels, watch, time.perf_counter()
        self._at_depth: Counter[int] = Counter()
        self.answers = 0

    def add(self, depths: Iterable[int]) -> None:
        """Counts an answer, given by the depths of its tokens (`Completion.depths`)."""
        self._at_depth.update(depths)
        self.answers += 1

    @property
    def new_tokens(self) -> int:
        """Tokens of all answers."""
        return self._at_depth.total()

    @property
    def seconds(self) -> float:
        """The time they took."""
        return self._watch.seconds if self._watch else time.perf_counter() - self._started

    @property
    def acceptance(self) -> Acceptance:
        """Counts of accepted guesses; a round ends with a token of the target's own, and prefill makes one more."""
        deepest = max(self._num_levels, *self._at_depth, 0)
        accepted_at = tuple(self._at_depth[depth] for depth in range(1, deepest + 1))
        return Acceptance(self._at_depth[0] - self.answers, accepted_at)

    def rate(self) -> str:
        """Tokens a second, with the acceptance length if there was a round."""
        rate = f"{self.new_tokens / max(self.seconds, 1e-9):.1f} tokens/s"
        return rate + (f", acceptance length {self.acceptance.length:.2f}" if self.acceptance.rounds else "")

    def summary(self) -> str:
        """Tokens, time and rate in one line."""
        return f"{self.new_tokens} tokens in {self.seconds:.1f} s, {self.rate()}"

    def lines(self) -> Iterator[str]:
        """What generate and chat print; the time is a stopwatch's."""
        assert self._watch is not None
        rate = self.new_tokens / max(self.seconds, 1e-9)
        yield (
            f"{self.new_tokens} new tokens in {self.seconds:.1f} s: {rate:.1f} tokens/s"
            f" (and {self._watch.compiling:.1f} s of compilation)"
        )
        acceptance = self.acceptance
        if acceptance.accepted_at and acceptance.rounds:
            by_depth = " ".join("-" if math.isnan(share) else f"{share:.2f}" for share in acceptance.by_depth)
            yield (
                f"acceptance length {acceptance.length:.2f} tokens a round:"
                f" {acceptance.rounds} rounds for {self.new_tokens - self.answers} tokens,"
                f" the {self.answers} made by prefill not counted; accepted by depth {by_depth}"
            )
