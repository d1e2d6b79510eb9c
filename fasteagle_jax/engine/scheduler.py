"""Continuous batching on the host: admission of requests to rows, resizing of the batch, rounds, results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fasteagle_jax.decoding.prefill import Scores, pad_prompts
from fasteagle_jax.decoding.rules import RowRules, make_rules
from fasteagle_jax.decoding.sampling import Sampling
from fasteagle_jax.decoding.sampling_fields import FIELDS
from fasteagle_jax.decoding.state import NO_STOP, Stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.decoding.tree_selection import TreeSelector
from fasteagle_jax.devices.sharding import process_values
from fasteagle_jax.engine.admission import Admission
from fasteagle_jax.engine.detokenizer import Detokenizer, TextStream
from fasteagle_jax.engine.grammar import Matcher, everything_allowed, unpacked
from fasteagle_jax.engine.model_runner import ModelRunner
from fasteagle_jax.engine.prefix_cache import PrefixCache
from fasteagle_jax.engine.requests import (
    MAX_STOP_TOKENS,
    Completion,
    Piece,
    RequestStatistics,
    SamplingParams,
    sample_seed,
)
from fasteagle_jax.engine.slots import DeviceRequest, Drafted, Slots
from fasteagle_jax.errors import UserError

ROUNDS_BETWEEN_TEXT = 4  # of a device call at most while the host checks stop strings or streams text

ROUNDS_BETWEEN_PREFILLS = 4  # of a device call while prompts are being prefilled and all other rows are in use

LOOKAHEAD = 4  # waiting requests read ahead, for each slot: common prefixes are looked for among them


# --- requests ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class PromptScores:
    """Log-probabilities of a prompt, which its samples share; of the first that is admitted on."""

    scores: Scores | None = None


@dataclasses.dataclass(eq=False)
class Request:
    """A request, waiting or in a row, with the tokens emitted so far."""

    prompt_index: int
    sample: int
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_tokens: tuple[int, ...]
    max_new: int
    text: TextStream | None  # if text is needed before the end
    streamed: bool
    rules: RowRules | None = None
    prompt_scores: PromptScores | None = None  # if they are asked for
    matcher: Matcher | None = None  # of its grammar, after `tokens`
    tokens: list[int] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    num_emitted: int = 1  # after prefill; `tokens` may lag behind if nobody reads text
    rounds: int = 0
    started: float = 0.0
    finished: float = 0.0
    failed: str = ""  # why there is no answer, in one line

    @property
    def needs_rules(self) -> bool:
        """Whether it has to be in slots with rules."""
        return self.rules is not None or self.params.top_logprobs > 0 or self.matcher is not None

    def append(self, tokens: np.ndarray, depths: np.ndarray, logprobs: np.ndarray) -> bool:
        """Appends the new ones of all emitted tokens; returns whether a stop string ends the answer with its token."""
        for i in range(len(self.tokens), self.num_emitted):
            token, depth = int(tokens[i]), int(depths[i])
            self.tokens.append(token)
            self.depths.append(depth)
            if self.matcher is not None and token not in self.stop_tokens:
                self.matcher.consume(token)
            if self.params.logprobs:
                self.logprobs.append(float(logprobs[i]))
            if self.text is not None and token in self.stop_tokens:
                self.pieces.append(Piece("", depth))  # what ends an answer is not in its text
            elif self.text is not None:
                self.pieces.append(Piece(self.text.push(token), depth))
                if self.text.stopped_by is not None:
                    self.depths[-1] = 0  # the path is cut here: as at a stop token, the last counts as the target's
                    return True
        return False

    def completion(self, detokenizer: Detokenizer, eos: Sequence[int], num_levels: int) -> Completion:
        """The finished answer."""
        by_token = self.tokens[-1] in self.stop_tokens
        if self.text is None:
            text, stopped_by = detokenizer.text(self.tokens[:-1] if by_token else self.tokens, self.prompt), None
        else:
            if rest := self.text.finish():  # which may complete a stop string
                self.pieces.append(Piece(rest, self.depths[-1]))
            text, stopped_by = self.text.text, self.text.stopped_by
        reason: int | str | None = stopped_by
        if stopped_by is None and by_token and (self.params.ignore_eos or self.tokens[-1] not in eos):
            reason = self.tokens[-1]
        accepted_at = tuple(self.depths.count(depth) for depth in range(1, num_levels + 1))
        return Completion(
            self.prompt_index,
            self.sample,
            len(self.prompt),
            text,
            tuple(self.tokens),
            tuple(self.depths),
            "stop" if stopped_by is not None or by_token else "length",
            reason,
            tuple(self.logprobs) if self.params.logprobs else None,
            RequestStatistics(self.depths.count(0) - 1, accepted_at, self.finished - self.started),
            tuple(self.top_logprobs) if self.params.top_logprobs else None,
            *self._prompt_logprobs(),
        )

    def _prompt_logprobs(self) -> tuple[Any, Any]:
        """The prompt's log-probabilities and alternatives, None where not asked for; its first token has neither."""
        if self.prompt_scores is None or self.prompt_scores.scores is None:
            return None, None
        logprobs, *top = (np.asarray(array[0, : len(self.prompt) - 1]) for array in self.prompt_scores.scores)
        num = self.params.prompt_logprobs
        return (None, *map(float, logprobs)), (None, *_best(top, num)) if num else None


def _best(top: Sequence[np.ndarray], num: int) -> list[dict[int, float]]:
    """At each place the `num` best of `top`, tokens [T, K] and their log-probabilities [T, K]."""
    tokens, logprobs = top
    pairs = zip(tokens[:, :num].tolist(), logprobs[:, :num].tolist(), strict=True)
    return [dict(zip(*pair, strict=True)) for pair in pairs]


def to_device_request(request: Request, prompt_slots: int, vocab_size: int | None = None) -> DeviceRequest:
    """A request as the device's programs take it, P = `prompt_slots`; numpy arrays, which compile nothing.

    For slots with rules give the size of the vocabulary.
    """
    params = request.params
    prompt: Any
    length: Any
    prompt, length = pad_prompts([request.prompt], prompt_slots)

    def row(value: Any, dtype: Any) -> Any:
        return np.asarray([value], dtype)

    sampling = {name: [getattr(params, name)] for name in FIELDS}
    sampling["seed"] = [sample_seed(params.seed, request.sample)]
    spare = MAX_STOP_TOKENS - len(request.stop_tokens)
    return DeviceRequest(
        prompt=prompt,
        length=length,
        sampling=Sampling.of(sampling),
        stop=Stop(row(request.max_new, np.int32), row([*request.stop_tokens, *[NO_STOP] * spare], np.int32)),
        wants_logprobs=row(params.logprobs, bool),
        rules=None if vocab_size is None else make_rules([request.rules or RowRules()], vocab_size),
        wants_top=None if vocab_size is None else row(params.top_logprobs > 0, bool),
        first_mask=None if vocab_size is None else _first_mask(request.matcher, vocab_size),
    )


def _first_mask(matcher: Matcher | None, vocab_size: int) -> Any:
    """bool [1, V], which tokens may begin the answer."""
    if matcher is None:
        return np.ones((1, vocab_size), bool)
    return unpacked(matcher.mask(), vocab_size)[None]


# --- the batch --------------------------------------------------------------------------------------------------


class Batch:
    """Slots and the requests in their rows."""

    def __init__(self, slots: Slots, requests: list[Request | None]) -> None:
        self.slots = slots
        self.requests = requests  # by row
        self.ended = [request is None for request in requests]  # by row: the host counts it as done
        self.drafted: tuple[TreeSpec | None, Drafted] | None = None  # of these slots and rows, if that is made already

    @property
    def active(self) -> list[int]:
        """Rows with a request."""
        return [row for row, request in enumerate(self.requests) if request is not None]

    @property
    def free(self) -> list[int]:
        """Rows without one."""
        return [row for row, request in enumerate(self.requests) if request is None]


class Step(NamedTuple):
    """Outcome of a step of a Scheduler."""

    finished: list[Request]
    seconds: float
    device_seconds: float  # of these, waiting for the device


class Scheduler:
    """The waiting requests and the batch, for one call of the engine."""

    def __init__(
        self,
        requests: Iterator[Request],
        runner: ModelRunner,
        prefix_cache: PrefixCache,
        tree_selector: TreeSelector,
        row_counts: Sequence[int],
        *,
        rounds: int,
        prefill_budget: int,
        measure: Callable[[int], None] | None = None,
        tree: TreeSpec | None = None,
    ) -> None:
        """A scheduler of requests, which are read as rows become free.

        Args:
          requests: of those that wait, the one of the lowest prompt index is next.
          runner, prefix_cache, tree_selector: the engine's.
          row_counts: the numbers of rows that may be computed, the largest first.
          rounds: the most of a device call.
          prefill_budget: the most tokens of prompts that are prefilled before rows under way get their next rounds.
          measure: is called with a number of rows before these are first used; then tree_selector chooses the tree.
          tree: of all rounds, without `measure`.
        """
        sizes = {"lookahead": LOOKAHEAD * row_counts[0], "prefill_budget": prefill_budget}
        self.admission = Admission(requests, runner, prefix_cache, **sizes)
        self.runner, self.tree_selector = runner, tree_selector
        self.row_counts, self.rounds, self.measure, self.tree = row_counts, rounds, measure, tree
        self.batch: Batch | None = None

    def steps(self) -> Iterator[Step]:
        """Prefill, and rounds unless it ended an answer, until all requests are answered."""
        admission = self.admission
        while True:
            started = time.perf_counter()
            admission.read_ahead()
            num_needed = admission.num_waiting + admission.num_under_way
            num_needed += 0 if self.batch is None else len(self.batch.active)
            if not num_needed:
                admission.raise_error()
                return
            # Rows are given up only while no request waits for one.
            num_needed = min(num_needed, self.row_counts[0])
            num_rows = min(n for n in self.row_counts if n >= num_needed)
            self._drop_rules()
            current = 0 if self.batch is None else len(self.batch.requests)
            if num_rows > current or (num_rows < current and not admission.num_waiting):
                if self.measure is not None:
                    self.measure(num_rows)
                    started = time.perf_counter()
                self._resize(num_rows)
            assert self.batch is not None
            tree = self._choose_tree(self.batch)
            finished, device_seconds = self._admit(self.batch, tree)
            if not finished and self.batch.active:
                finished, round_seconds = self._advance(self.batch, tree)
                device_seconds += round_seconds
            yield Step(finished, time.perf_counter() - started, device_seconds)

    def _resize(self, num_rows: int) -> None:
        requests: list[Request | None] = [None] * num_rows
        if self.batch is None:
            slots = self.runner.empty_slots(num_rows)
        else:
            active = self.batch.active
            requests[: len(active)] = [self.batch.requests[row] for row in active]
            slots = self.runner.take_rows(self.batch.slots, active, num_rows)
        self.batch = Batch(slots, requests)

    def _drop_rules(self) -> None:
        """Takes the rules out of the slots if no request needs them any more."""
        if self.batch is not None and not any(r is not None and r.needs_rules for r in self.batch.requests):
            slots = self.batch.slots
            self.batch.slots = slots._replace(rules=None, state=slots.state._replace(top=None))
            self.batch.drafted = None

    def _choose_tree(self, batch: Batch) -> TreeSpec | None:
        if self.measure is None:
            return self.tree
        trees = self.tree_selector.trees
        if len(trees) == 1:
            return trees[0]
        fastest = trees.index(self.tree_selector.choose(len(batch.requests)))
        return trees[int(process_values(self.runner.mesh, fastest)[0])]  # all processes by the first one's clock

    # --- admission ----------------------------------------------------------------------------------------------

    def _admit(self, batch: Batch, tree: TreeSpec | None) -> tuple[list[Request], float]:
        """Prefills waiting requests into free rows, up to the budget.

        Returns those that end with their first token or before it, and the seconds spent waiting for the device.
        """
        called, admitted, failed = time.perf_counter(), False, list[Request]()
        for request, prefilled in self.admission.advance(len(batch.free), drafts=tree is not None):
            bucket = self.runner.bucket(len(request.prompt))
            if request.prompt_scores is not None and request.prompt_scores.scores is None:
                request.prompt_scores.scores = self.runner.score(request.prompt, bucket)
            if request.needs_rules and batch.slots.rules is None:
                batch.slots = self.runner.with_rules(batch.slots)
            vocab_size = None if batch.slots.rules is None else self.runner.target.config.vocab_size
            try:
                device_request = to_device_request(request, bucket, vocab_size)
            except UserError as error:  # of its grammar
                request.failed = str(error)
                failed.append(request)
                continue
            row, admitted = batch.free[0], True
            batch.slots = self.runner.admit(batch.slots, row, prefilled, device_request)
            batch.requests[row], batch.ended[row], batch.drafted = request, False, None
        now = time.perf_counter()  # prefill is neither the host's time nor a tree's
        return failed + (self._read_results(batch, 0, now)[2] if admitted else []), now - called

    # --- rounds -------------------------------------------------------------------------------------------------

    def _advance(self, batch: Batch, tree: TreeSpec | None) -> tuple[list[Request], float]:
        """Runs rounds; returns the requests that are finished and the seconds spent waiting for the device."""
        if any(request is not None and request.matcher is not None for request in batch.requests):
            return self._advance_by_masks(batch, tree)
        batch.drafted = None
        rounds, num_active = self.rounds, len(batch.active)
        if any(request is not None and request.text is not None for request in batch.requests):
            rounds = min(rounds, ROUNDS_BETWEEN_TEXT)
        if self.admission.num_under_way or (self.admission.num_waiting and batch.free):
            # The fewer rows gain by them, the fewer rounds come before the other rows' prompts.
            rounds = min(rounds, max(1, ROUNDS_BETWEEN_PREFILLS * num_active // len(batch.requests)))
        called = time.perf_counter()
        batch.slots, num_rounds, compiled = self.runner.advance(
            batch.slots,
            batch.ended,
            tree,
            rounds=rounds,
            until_one_is_done=self.admission.num_waiting > 0,
        )
        now = time.perf_counter()
        new_tokens, row_rounds, finished = self._read_results(batch, num_rounds, now)
        self.tree_selector.record(
            len(batch.requests),
            tree,
            rounds=num_rounds,
            row_rounds=row_rounds,
            tokens=new_tokens,
            seconds=None if compiled else now - called,
        )
        return finished, now - called

    def _advance_by_masks(self, batch: Batch, tree: TreeSpec | None) -> tuple[list[Request], float]:
        """Runs a round of which the host makes the masks of requests with grammars; returns as `_advance`.

        The device's call verifies a draft and makes the next one, of which the masks are made before the next call.
        """
        called = time.perf_counter()
        if batch.drafted is None or batch.drafted[0] != tree:
            batch.drafted = tree, self.runner.draft(batch.slots, batch.ended, tree)
        _, drafted = batch.drafted
        tokens, parents = jax.device_get((drafted.draft.tokens, drafted.draft.parents))
        drafted_at, failed = time.perf_counter(), list[Request]()
        masks = everything_allowed(tokens.shape, self.runner.target.config.vocab_size)
        for row, request in enumerate(batch.requests):
            if request is None or request.matcher is None:
                continue
            try:
                masks[row] = request.matcher.masks(tokens[row], parents[row])
            except UserError as error:
                request.failed = str(error)
                failed.append(request)
                batch.requests[row], batch.ended[row] = None, True
        masked = time.perf_counter()
        batch.slots, drafted = self.runner.verify(batch.slots, drafted, batch.ended, masks, tree)
        batch.drafted = tree, drafted
        now = time.perf_counter()
        new_tokens, row_rounds, finished = self._read_results(batch, 1, now)
        rounds = {"rounds": 1, "row_rounds": row_rounds, "tokens": new_tokens}
        self.tree_selector.record(len(batch.requests), tree, **rounds, seconds=None)  # the masks' time is no tree's
        return failed + finished, time.perf_counter() - called - (masked - drafted_at)

    def _read_results(self, batch: Batch, num_rounds: int, now: float) -> tuple[int, int, list[Request]]:
        """Frees the rows that are done after `num_rounds` rounds.

        Returns the number of new tokens, the rounds that they took (rows added up), and the finished requests.
        """
        state = batch.slots.state
        num_emitted, done = jax.device_get((state.num_emitted, state.done))
        results: Any = None  # fetched if a row needs them
        top: Any = None  # the same
        new_tokens, row_rounds, finished = 0, 0, []
        for row, request in enumerate(batch.requests):
            if request is None:
                continue
            before = request.num_emitted, request.rounds
            request.num_emitted, request.rounds = int(num_emitted[row]), request.rounds + num_rounds
            ended = False
            if request.text is not None or request.matcher is not None or done[row]:
                results = results or jax.device_get((state.text, state.depths, state.logprobs))
                try:
                    ended = request.append(*(array[row, len(request.prompt) :] for array in results))
                except UserError as error:  # of its grammar
                    request.failed, ended = str(error), True
            if done[row]:
                request.rounds = request.depths.count(0) - 1  # it may have ended before the last round
            new_tokens += request.num_emitted - before[0]
            row_rounds += request.rounds - before[1]
            if done[row] or ended:
                if state.top is not None and (num := request.params.top_logprobs):
                    top = top or jax.device_get(state.top[:2])
                    first, end = len(request.prompt), len(request.prompt) + len(request.tokens)
                    request.top_logprobs = _best([array[row, first:end] for array in top], num)
                request.finished = now
                finished.append(request)
                batch.requests[row], batch.ended[row] = None, True
        return new_tokens, row_rounds, finished
