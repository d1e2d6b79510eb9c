"""`fasteagle bench --acceptance`: tokens a target pass of many prompts at once, with intervals, and no time.

R resamples · C conversations of a task · X decoders · N levels.
All prompts go through the engine's slots. A *case* is a turn of a conversation; its context holds the answers of the
turns before, which are the target's own whatever decoder gives them. Errors are those of the prompts: conversations are
drawn anew with replacement, within each task, and all decoders are counted on the same draws, so that the difference
of two decoders is known better than either.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasteagle_jax.bench.decoders import DecoderSpec
from fasteagle_jax.bench.figures import intervals_figure, show
from fasteagle_jax.bench.progress import Parts, Progress
from fasteagle_jax.bench.prompts import Models
from fasteagle_jax.bench.runner import MEAN, number
from fasteagle_jax.bench.sweeps import Outcome, check_trained, machine
from fasteagle_jax.data.sources import Prompt
from fasteagle_jax.decoding.acceptance import Acceptance
from fasteagle_jax.decoding.sampling_fields import from_options
from fasteagle_jax.decoding.tree import MAX_LOOKUP
from fasteagle_jax.drafters.text_only import TextOnly
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion, SamplingParams
from fasteagle_jax.errors import UserError

RESAMPLES = 2000  # R
INTERVAL = (2.5, 97.5)  # percentiles


@dataclasses.dataclass(frozen=True)
class Case:
    """A turn of a conversation, ready to be answered."""

    task: str
    conversation: str  # its id
    tokens: list[int]
    seed: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to a case, and what it took."""

    tokens: list[int]
    rounds: int
    accepted_at: list[int]  # [N]

    @classmethod
    def of(cls, completion: Completion) -> Answer:
        """From an engine's Completion."""
        counts = completion.statistics
        return cls(list(completion.tokens), counts.rounds, list(counts.accepted_at))


# --- decoding ---------------------------------------------------------------------------------------------------


def acceptance(
    args: argparse.Namespace,
    models: Models,
    drafters: Mapping[Path, Any],
    decoders: Sequence[DecoderSpec],
    tasks: Mapping[str, Sequence[Prompt]],
    parts: Parts,
) -> Outcome:
    """Decodes the tasks by every drafter at every temperature, and prints the tables."""
    check_trained(decoders)
    decoders = decoders[1:]  # plain decoding's length is 1
    num_cases = sum(len(prompt.turns) for prompts in tasks.values() for prompt in prompts)
    progress = Progress(num_cases * len(decoders) * len(args.temperature), "answer")
    different: list[dict[DecoderSpec, int]] = []  # answers by temperature
    titles, records = [], []
    figures: dict[str, Callable[[], Any]] = {}

    def start(decoder: DecoderSpec) -> Engine:
        drafter = TextOnly() if decoder.folder is None else drafters[decoder.folder]
        sizes: dict[str, Any] = {"slots": max(args.slots), "max_len": args.max_len, "tree": decoder.tree}
        return Engine(models.target, drafter, models.tokenizer, models.stop_tokens, **sizes)

    known = {d: None if d.folder is None else draft_vocabulary(drafters[d.folder]) for d in decoders}

    for temperature in args.temperature:
        params = SamplingParams(**from_options(args) | {"temperature": temperature}, max_new_tokens=args.max_new)
        answers: dict[DecoderSpec, list[Answer]] = {}
        cases: list[Case] = []
        for decoder in decoders:
            name = f"temperature {temperature}, {decoder}"
            measured = name in parts
            if not answers:
                measure = functools.partial(_converse, start, decoder, params, tasks, args.seed, progress)
            else:
                measure = functools.partial(_answer, start, decoder, params, cases, progress)
            part = parts.get(name, measure)
            cases = cases or [Case(**case) for case in part["cases"]]
            if measured:
                progress.update(f"{name} is measured already", num_cases)
            answers[decoder] = [Answer(**answer) for answer in part["answers"]]
        first = answers[decoders[0]]
        different.append(
            {
                decoder: sum(a.tokens != b.tokens for a, b in zip(given, first, strict=True))
                for decoder, given in answers.items()
            }
        )
        counts = Counts.of(cases, answers)
        titles.append(f"temperature {temperature:g}, {args.max_new} new tokens at most, {models.dtype}, {machine()}")
        estimates = counts.estimates()
        for estimate, decoder in zip(estimates, itertools.cycle(decoders), strict=False):
            task = None if estimate["task"] == MEAN else estimate["task"]
            estimate["outside"] = number(outside(cases, answers[decoder], known[decoder], task))
        records.append({"temperature": temperature, "estimates": estimates, "differences": counts.differences()})
        records[-1]["repeats"] = repeats([(case.tokens, a.tokens) for case, a in zip(cases, first, strict=True)])
        records[-1]["cases"] = [
            {"task": case.task, "conversation": case.conversation, "prompt_tokens": len(case.tokens)}
            | {"counts": {str(d): [a[i].rounds, *a[i].accepted_at] for d, a in answers.items()}}
            for i, case in enumerate(cases)
        ]
        figures[f"acceptance_t{temperature:g}"] = functools.partial(intervals_figure, titles[-1], estimates)
    progress.close()
    for title, record, of_decoders in zip(titles, records, different, strict=True):
        _show(title, record, of_decoders)
    print(
        "tau: tokens a target pass, without the token that prefill makes, and its standard error; by depth: of those"
        f" whose predecessor held, all tasks together. Intervals hold 95% of {RESAMPLES} draws of the conversations."
    )
    return Outcome({"acceptance": records}, figures, sum(sum(of_decoders.values()) for of_decoders in different))


def _converse(
    start: Callable[[DecoderSpec], Engine],
    decoder: DecoderSpec,
    params: SamplingParams,
    tasks: Mapping[str, Sequence[Prompt]],
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """All cases with their answers, for JSON, turn by turn: first the first turns of all conversations."""
    engine = start(decoder)
    prompts = [(task, prompt) for task, of_task in tasks.items() for prompt in of_task]
    first_seed = list(itertools.accumulate((len(prompt.turns) for _, prompt in prompts), initial=seed))  # as in `bench`
    messages: list[list[dict[str, str]]] = [[] for _ in prompts]
    cases: list[Case] = []
    answers: list[dict[str, Any]] = []
    for turn in range(max(len(prompt.turns) for _, prompt in prompts)):
        asked = [i for i, (_, prompt) in enumerate(prompts) if turn < len(prompt.turns)]
        new: list[Case] = []
        for i in asked:
            task, prompt = prompts[i]
            messages[i].append({"role": "user", "content": prompt.turns[turn]})
            tokens = list(engine.tokens(messages[i], f"prompt {prompt.id}"))
            if len(tokens) + params.max_new_tokens > engine.max_len:
                raise UserError(
                    f"prompt {prompt.id} has {len(tokens)} tokens, which with {params.max_new_tokens} new ones exceed"
                    f" --max-len {engine.max_len}: raise it"
                )
            new.append(Case(task, prompt.id, tokens, (first_seed[i] + turn) % 2**32))
        completions = _generate(engine, params, new, progress)
        for i, completion in zip(asked, completions, strict=True):
            messages[i].append({"role": "assistant", "content": completion.text})
        cases += new
        answers += [dataclasses.asdict(Answer.of(completion)) for completion in completions]
    return {"cases": [dataclasses.asdict(case) for case in cases], "answers": answers}


def _answer(
    start: Callable[[DecoderSpec], Engine],
    decoder: DecoderSpec,
    params: SamplingParams,
    cases: Sequence[Case],
    progress: Progress,
) -> dict[str, Any]:
    """The answers to cases, for JSON."""
    completions = _generate(start(decoder), params, cases, progress)
    return {"answers": [dataclasses.asdict(Answer.of(completion)) for completion in completions]}


def _generate(engine: Engine, params: SamplingParams, cases: Sequence[Case], progress: Progress) -> list[Completion]:
    """The answers to cases, in their order."""
    seeded = [dataclasses.replace(params, seed=case.seed) for case in cases]
    completions: list[Completion] = []
    counts: Acceptance | None = None
    for completion in engine.complete([case.tokens for case in cases], seeded):
        completions.append(completion)
        counts = completion.statistics if counts is None else counts + completion.statistics
        progress.update(f"{engine.trees[0]}: tau {counts.length:.2f}")
    return sorted(completions, key=lambda completion: completion.prompt_index)


def draft_vocabulary(drafter: Any) -> frozenset[int] | None:
    """The target's ids of the tokens that a drafter can guess; None for all."""
    ids = drafter.token_ids
    return None if ids is None else frozenset(np.asarray(ids[...]).tolist())


def outside(
    cases: Sequence[Case], answers: Sequence[Answer], known: frozenset[int] | None, task: str | None = None
) -> float:
    """The share of a task's answers' tokens that are not `known`, without the first, which no drafter guesses.

    Without a task it is the mean of all tasks' shares, each counting alike. nan of no token.
    """
    if task is None:
        tasks = dict.fromkeys(case.task for case in cases)
        return float(np.mean([outside(cases, answers, known, one) for one in tasks]))
    pairs = zip(cases, answers, strict=True)
    tokens = [token for case, answer in pairs if case.task == task for token in answer.tokens[1:]]
    missing = 0 if known is None else sum(token not in known for token in tokens)
    return missing / len(tokens) if tokens else float("nan")


def repeats(texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[int, int]]:
    """For JSON: what lookup finds in the text before each token of the answers, of (prompt, answer) pairs.

    By the number of tokens that match, 0 to MAX_LOOKUP: how many tokens there are, and how many of them are the one
    that followed the last time. The token that prefill makes is not counted.
    """
    counts = [[0, 0] for _ in range(MAX_LOOKUP + 1)]
    for prompt, answer in texts:
        text, followed = [*prompt, *answer], dict[tuple[int, ...], int]()
        for i in range(1, len(text)):
            suffixes = [tuple(text[i - size : i]) for size in range(1, min(i, MAX_LOOKUP) + 1)]
            if i > len(prompt):
                known = [followed[suffix] for suffix in suffixes if suffix in followed]  # all up to the longest one
                counts[len(known)][0] += 1
                counts[len(known)][1] += bool(known) and known[-1] == text[i]
            followed |= dict.fromkeys(suffixes, text[i])
    return [(num, right) for num, right in counts]


# --- statistics -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Counts:
    """The counts of decoders on the same conversations, and of the same draws of these."""

    decoders: list[DecoderSpec]
    by_task: dict[str, np.ndarray]  # float64 [C, X, 1 + N] of a task: target passes, and those that accepted each depth
    draws: dict[str, np.ndarray]  # [R, X, 1 + N] of a task: sums over each draw of C conversations

    @classmethod
    def of(cls, cases: Sequence[Case], answers: Mapping[DecoderSpec, Sequence[Answer]]) -> Counts:
        """From the decoders' answers to all cases."""
        depths = max((len(a.accepted_at) for given in answers.values() for a in given), default=0)
        by_task, draws = {}, {}
        rng = np.random.default_rng(0)
        for task in dict.fromkeys(case.task for case in cases):
            chosen = [i for i, case in enumerate(cases) if case.task == task]
            names = dict.fromkeys(cases[i].conversation for i in chosen)
            conversations = {conversation: c for c, conversation in enumerate(names)}
            counts = np.zeros((len(conversations), len(answers), 1 + depths))
            for x, given in enumerate(answers.values()):
                for i in chosen:
                    row = [given[i].rounds, *given[i].accepted_at]
                    counts[conversations[cases[i].conversation], x, : len(row)] += row
            num = len(conversations)
            drawn = rng.multinomial(num, np.full(num, 1 / num), RESAMPLES)  # [R, C], how often each is drawn
            by_task[task], draws[task] = counts, np.einsum("rc,cxn->rxn", drawn, counts)
        return cls(list(answers), by_task, draws)

    @property
    def tasks(self) -> list[str]:
        """The tasks, and their mean if they are several."""
        return [*self.by_task, MEAN] if len(self.by_task) > 1 else list(self.by_task)

    def lengths(self, task: str) -> tuple[np.ndarray, np.ndarray]:
        """tau [X] on a task, or the mean of all tasks' (each counting alike), and tau [R, X] of the draws."""
        if task == MEAN:
            each, drawn = zip(*(self.lengths(one) for one in self.by_task), strict=True)
            return np.mean(each, axis=0), np.mean(drawn, axis=0)
        return _length(self.by_task[task].sum(axis=0)), _length(self.draws[task])

    def total(self, task: str) -> list[Acceptance]:
        """Each decoder's counts on a task, or on all."""
        chosen = list(self.by_task) if task == MEAN else [task]
        sums = np.sum([self.by_task[one].sum(axis=0) for one in chosen], axis=0)  # [X, 1 + N]
        return [Acceptance(int(row[0]), tuple(int(n) for n in row[1:])) for row in sums]

    def estimates(self) -> list[dict[str, Any]]:
        """For JSON: each decoder's tau on each task with its standard error and interval, and acceptance by depth."""
        found = []
        for task in self.tasks:
            lengths, drawn = self.lengths(task)
            for x, (decoder, counts) in enumerate(zip(self.decoders, self.total(task), strict=True)):
                found.append(
                    {
                        "task": task,
                        "drafter": decoder.name,
                        "tree": decoder.tree,
                        "target_passes": counts.rounds,
                        "tau": number(float(lengths[x])),
                        "standard_error": number(float(drawn[:, x].std(ddof=1))),
                        "interval": [number(float(bound)) for bound in np.percentile(drawn[:, x], INTERVAL)],
                        "accepted_at": list(counts.accepted_at),
                        "by_depth": [number(share) for share in counts.by_depth],
                    }
                )
        return found

    def differences(self) -> list[dict[str, Any]]:
        """For JSON: of each pair of decoders the ratio of their taus on each task, with its interval."""
        found = []
        for task in self.tasks:
            lengths, drawn = self.lengths(task)
            for a, b in itertools.combinations(range(len(self.decoders)), 2):
                ratios = drawn[:, b] / drawn[:, a]
                found.append(
                    {
                        "task": task,
                        "over": str(self.decoders[a]),
                        "decoder": str(self.decoders[b]),
                        "ratio": number(float(lengths[b] / lengths[a])),
                        "difference": number(float(lengths[b] - lengths[a])),
                        "ratio_interval": [number(float(bound)) for bound in np.percentile(ratios, INTERVAL)],
                        "difference_interval": [
                            number(float(bound)) for bound in np.percentile(drawn[:, b] - drawn[:, a], INTERVAL)
                        ],
                    }
                )
        return found


def _length(counts: np.ndarray) -> np.ndarray:
    """tau [...] of counts [..., 1 + N]: one token of the target's own a pass, and the accepted ones; nan of no pass."""
    passes = np.where(counts[..., 0] > 0, counts[..., 0], np.nan)
    return 1 + counts[..., 1:].sum(axis=-1) / passes


# --- tables -----------------------------------------------------------------------------------------------------


def _show(title: str, record: Mapping[str, Any], different: Mapping[DecoderSpec, int]) -> None:
    """Prints the tables of a temperature's record; `different` are a decoder's answers that are not the first one's."""
    rows = []
    last_task = record["estimates"][-1]["task"]
    for estimate, decoder in zip(record["estimates"], itertools.cycle(different), strict=False):
        low, high = estimate["interval"]
        last = estimate["task"] == last_task
        rows.append(
            (
                estimate["task"],
                str(decoder),
                str(estimate["target_passes"]),
                "-" if estimate["tau"] is None else f"{estimate['tau']:.3f} ± {estimate['standard_error']:.3f}",
                "-" if low is None else f"{low:.3f} to {high:.3f}",
                " ".join("-" if share is None else f"{share:.2f}" for share in estimate["by_depth"]),
                "-" if estimate["outside"] is None else f"{estimate['outside']:.1%}",
                str(different[decoder]) if last else "",
            )
        )
    show(title, ("task", "drafter", "passes", "tau", "95%", "by depth", "outside", "differ"), rows)
    total = sum(num for num, _ in record["repeats"])
    found = [(size, num, right) for size, (num, right) in enumerate(record["repeats"]) if num and size]
    words = (f"{size}: {num / total:.0%}, {right / num:.2f}" for size, num, right in found)
    print(f"{total} tokens; by how many before them stood before, their share and that of what followed then again:")
    print("; ".join(words))
    if len(different) < 2:
        return
    pairs = []
    for pair in record["differences"]:
        if pair["ratio"] is not None and (pair["task"] == last_task or len(different) == 2):
            low, high = pair["ratio_interval"]
            by = f"{pair['difference']:+.3f} ({pair['difference_interval'][0]:+.3f} to"
            by += f" {pair['difference_interval'][1]:+.3f})"
            pairs.append(
                (pair["task"], pair["decoder"], pair["over"], f"{pair['ratio']:.3f} ({low:.3f} to {high:.3f})", by)
            )
    show(
        "tau over another's, same conversations",
        ("task", "drafter", "over", "ratio (95%)", "difference (95%)"),
        pairs,
        3,
    )
