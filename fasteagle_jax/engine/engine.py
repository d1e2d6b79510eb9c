"""The engine: prompts in, answers out, through a fixed number of slots (continuous batching with static shapes).

The device runs rounds for all slots until one is done; the host then hands its answer out and prefills the next prompt
into it, while the others' state stays where it is. Tokens are those of plain decoding of each request alone: in
whatever slot, order and company, with whatever tree.

Compiled programs: one prefill for each bucket of prompt lengths, and for each number of rows computed (the slots, a
quarter of them while no more are in use, and so on) one `advance` a tree shape, one `admit` a bucket and one
`take_rows` a change; `Engine.most_programs` adds them up.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fasteagle_jax.decoding.prefill import Prefilled
from fasteagle_jax.decoding.sampling import Sampling
from fasteagle_jax.decoding.state import NO_STOP, State, Stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.decoding.tree_selection import TreeSelector, shapes
from fasteagle_jax.devices.memory import Memory, bytes_of
from fasteagle_jax.devices.sharding import place_weights, process_values, shardings
from fasteagle_jax.drafters import table
from fasteagle_jax.drafters.files import load_drafter, read_config
from fasteagle_jax.engine import slots as device
from fasteagle_jax.engine.detokenizer import TextStream, decode
from fasteagle_jax.engine.requests import (
    MAX_STOP_TOKENS,
    Completion,
    Prompt,
    RequestStatistics,
    SamplingParams,
    sample_seed,
)
from fasteagle_jax.engine.shipped import SHIPPED, drafter_folder
from fasteagle_jax.engine.sizes import available_everywhere, check_mesh, check_sizes, prompt_buckets, row_counts
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from fasteagle_jax.targets.table import family_of
from fasteagle_jax.targets.tokenizer import encode_chat, load_tokenizer, stop_token_ids

ROUNDS = 16  # that the device runs at most before the host looks

ROUNDS_BETWEEN_TEXT = 4  # the same while the host has to look for stop strings

LOGITS_BUFFERS_PER_ROUND = 8  # float32 arrays of the logits' size that a round takes, by the compiler's account

SHARED_BEGINNINGS = 4  # prefilled once and kept for the prompts to come

LOOKAHEAD = 4  # waiting requests read ahead, for each slot: where common beginnings are looked for

WARM_UP = ("The capital of France is", "def fibonacci(n):", "Once upon a time, there was", "Water boils when")

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text of an answer under way."""

    text: str
    depth: int  # at which the last token in it was accepted as a guess, 0 for the target's own


@dataclasses.dataclass(eq=False)
class _Request:
    """A request on its way through the engine."""

    prompt_index: int
    sample: int
    prompt: tuple[int, ...]
    params: SamplingParams
    stop_tokens: tuple[int, ...]
    max_new: int
    text: TextStream | None  # where text is needed before the end
    streamed: bool
    tokens: list[int] = dataclasses.field(default_factory=list)
    depths: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    num_emitted: int = 1  # after prefill; `tokens` may lag behind where nobody looks
    rounds: int = 0
    started: float = 0.0

    def take(self, emitted: _Emitted, row: int) -> bool:
        """Takes the new tokens over; whether a stop string ends the answer, which then ends with its token."""
        for i in range(len(self.tokens), self.num_emitted):
            token, depth = int(emitted.tokens[row, i]), int(emitted.depths[row, i])
            self.tokens.append(token)
            self.depths.append(depth)
            if self.params.logprobs:
                self.logprobs.append(float(emitted.logprobs[row, i]))
            if self.text is not None:
                self.pieces.append(Piece(self.text.push(token), depth))
                if self.text.stopped_by is not None:
                    self.depths[-1] = (
                        0  # the path was cut here: as at a stop token, the last one counts as the target's
                    )
                    return True
        return False

    def completion(self, tokenizer: Any, eos: Sequence[int], num_levels: int, now: float) -> Completion:
        """The finished answer."""
        stopped_by = None if self.text is None else self.text.stopped_by
        by_token = self.tokens[-1] in self.stop_tokens
        reason = stopped_by if stopped_by is not None else self.tokens[-1] if by_token else None
        if self.text is not None and (rest := self.text.finish()):
            self.pieces.append(Piece(rest, self.depths[-1]))
        accepted_at = tuple(self.depths.count(depth) for depth in range(1, num_levels + 1))
        return Completion(
            self.prompt_index,
            self.sample,
            len(self.prompt),
            decode(tokenizer, self.tokens) if self.text is None else self.text.text,
            tuple(self.tokens),
            tuple(self.depths),
            "stop" if stopped_by is not None or by_token else "length",
            None if reason in eos else reason,
            tuple(self.logprobs) if self.params.logprobs else None,
            RequestStatistics(self.depths.count(0) - 1, accepted_at, now - self.started),
        )


class Engine:
    """A target with a drafter or without, and slots for requests.

    On a mesh the models are split over `tensor` and `fsdp`, the rows over `data`, their heads over `tensor`. Where it
    has several processes' devices, each of them calls the engine with the same requests and gets the same answers.
    """

    def __init__(
        self,
        target: Any,
        drafter: Any | None,
        tokenizer: Any,
        eos_token_ids: Sequence[int],
        *,
        slots: int = 8,
        max_len: int | None = None,
        tree: TreeSpec | str | None = "auto",
        chunk: int | None = None,
        shared_noise: bool = True,
        fingerprint: str = "",
        mesh: Mesh | None = None,
    ) -> None:
        """An engine of models at hand; `load` makes one by names.

        Args:
          target, drafter: the models; without a drafter decoding is plain.
          tokenizer: of the target.
          eos_token_ids: end an answer.
          slots: B, requests under way at once.
          max_len: the most tokens of a request, prompt and answer together; None for what the target has positions
            for, but at most 2048.
          tree: what to draft: a TreeSpec, its name ("best_first:16"), "auto" for the fastest by measurement, or None
            for plain decoding.
          chunk: C, prompt tokens a forward pass of the prefill takes; None for 64 on a CPU and 256 elsewhere.
          shared_noise: let the drafter rank its guesses with the target's own noise at temperature > 0.
          fingerprint: of the target's weights.
          mesh: `sharding.make_mesh`'s, over all devices of all processes or over some of this one's; the models are
            put there if they are not. None for one device.

        Raises:
          UserError: sizes that cannot be, do not fit into memory, or that the mesh does not divide.
        """
        positions = target.config.max_positions
        self.max_len = min(positions, 2048) if max_len is None else max_len
        self.chunk = (64 if jax.default_backend() == "cpu" else 256) if chunk is None else chunk
        check_sizes(slots, self.max_len, positions)
        self.mesh = mesh
        if mesh is not None:
            check_mesh(mesh, slots, target.config, getattr(drafter, "config", None))
            target = place_weights(mesh, target)
            drafter = place_weights(mesh, drafter)
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.eos_token_ids = tuple(eos_token_ids)
        self.fingerprint = fingerprint
        self.num_slots = slots
        self.shared_noise = shared_noise
        self.buckets = prompt_buckets(self.max_len, self.chunk)
        self.row_counts = row_counts(slots, 1 if mesh is None else mesh.shape["data"])
        self.trees: tuple[TreeSpec | None, ...] = (None,)
        if drafter is not None and tree == "auto":
            self.trees = shapes(drafter.num_levels)
        elif drafter is not None and tree is not None:
            self.trees = (TreeSpec.parse(tree) if isinstance(tree, str) else tree,)
        self._tree_selector = TreeSelector(self.trees)
        num_levels = 0 if drafter is None else drafter.num_levels
        self._most_levels = max((tree.num_levels(num_levels) for tree in self.trees if tree), default=0)
        self._ran: set[tuple[int, TreeSpec | None]] = set()  # programs of rounds that are compiled
        self._most_written = max(self.chunk, 1 + num_levels)
        self._cache_slots = self.max_len + self._most_written
        self.memory = self._needed()
        taken = self.memory.target + self.memory.drafter  # weights that are there already
        free = available_everywhere(mesh)
        self.memory.check(None if free is None else free + taken, "lower slots or max_len, or use bfloat16")

        self._vocab = (
            None if drafter is None else drafter.vocab_weights(target)
        )  # the embedding is the target's own array
        if mesh is not None:
            self._vocab = jax.device_put(self._vocab, shardings(mesh, self._vocab, device.AXES))
        self._nothing: dict[int, Prefilled] = {}  # of each bucket
        self._beginnings: collections.OrderedDict[tuple[int, bool, tuple[int, ...]], Prefilled] = (
            collections.OrderedDict()
        )
        self.seconds = self.device_seconds = 0.0  # spent on requests so far, and of these waiting for the device

    @classmethod
    def load(
        cls,
        target: str,
        drafter: str | Path | None = SHIPPED,
        *,
        slots: int = 8,
        max_len: int | None = None,
        tree: TreeSpec | str | None = "auto",
        mesh: Mesh | None = None,
        dtype: Any = None,
    ) -> Self:
        """An engine of a target by its name and a drafter by its folder.

        Args:
          target: a name ("smollm2-135m"), Hugging Face folder, hub name or GGUF file.
          drafter: the folder of a drafter trained for it; "shipped" is the one that comes with this package for the
            target, if one does; None decodes plainly.
          slots, max_len, tree, mesh: as of `Engine`; the weights go straight into their shards.
          dtype: of weights and caches; None for float32 on a CPU and bfloat16 elsewhere.

        Raises:
          UserError: models that cannot be had or do not fit each other; sizes that do not fit into memory, found out
            from shapes before anything is loaded.
        """
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        dtype = jnp.dtype(dtype)
        checkpoint = open_checkpoint(target)
        folder = drafter_folder(drafter, checkpoint)
        config = checkpoint.config
        check_sizes(slots, max_len or 1, config.max_positions)
        model = family_of(config).model
        sizes = jax.eval_shape(lambda: model(config, jax.random.key(0), dtype))
        drafter_config = drafter_sizes = None
        if folder is not None:
            drafter_config = read_config(folder)[0]
            kind = table.class_of(drafter_config)
            drafter_sizes = jax.eval_shape(lambda: kind(drafter_config, jax.random.key(0), dtype))
        if mesh is not None:
            check_mesh(mesh, slots, config, drafter_config)
        weights = bytes_of(sizes, mesh), bytes_of(drafter_sizes, mesh)
        Memory(*weights, 0, 0, 0, 0).check(available_everywhere(mesh), "use bfloat16 or a larger device")
        loaded = load_target(target, dtype, mesh=mesh)
        tokenizer = load_tokenizer(loaded.checkpoint.path)
        model = None if folder is None else load_drafter(folder, config, loaded.fingerprint, dtype, mesh=mesh)
        return cls(
            loaded.model,
            model,
            tokenizer,
            stop_token_ids(tokenizer, loaded.checkpoint.path),
            slots=slots,
            max_len=max_len,
            tree=tree,
            fingerprint=loaded.fingerprint,
            mesh=mesh,
        )

    @property
    def most_programs(self) -> int:
        """How many programs the engine compiles at most, whatever it is asked."""
        rows, buckets = len(self.row_counts), len(self.buckets)
        changes = rows * (rows - 1)
        # Two tie the drafter to the target. A bucket has its empty caches and a prefill with and without the drafter,
        # rows their empty slots.
        return 2 + 3 * buckets + rows * (1 + buckets + len(self.trees)) + changes

    # --- asking -------------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """The answers in the prompts' order, the samples of a prompt one after the other.

        Args:
          prompts: each a text (continued as it is), token ids, or a list of messages (the chat template is applied);
            or one of these.
          sampling: for all, or one for each prompt; None for SamplingParams().

        Raises:
          UserError: a prompt that is empty or does not fit, by its number, before anything is decoded.
        """
        return sorted(self.complete(prompts, sampling), key=lambda c: (c.prompt_index, c.sample))

    def complete(
        self, prompts: Prompt | Iterable[Prompt], sampling: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[Completion]:
        """The answers as they are finished. Arguments and errors are those of `generate`."""
        listed = _prompts(prompts)
        if sampling is None or isinstance(sampling, SamplingParams):
            params = [sampling or SamplingParams()] * len(listed)
        else:
            params = list(sampling)
            if len(params) != len(listed):
                raise UserError(f"{len(params)} sampling params for {len(listed)} prompts: give one, or one a prompt")
        requests = []
        for i, (prompt, its) in enumerate(zip(listed, params, strict=True)):
            requests += self.requests(i, prompt, its)
        return self.serve(requests)

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[str]:
        """The answer's text piece by piece, in whole characters, as the rounds find it; `n` must be 1."""
        for piece in self.stream_pieces(prompt, sampling):
            if isinstance(piece, Piece) and piece.text:
                yield piece.text

    def stream_pieces(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[Piece | Completion]:
        """As `stream`, token by token with the depth at which each was accepted; at last the Completion."""
        params = sampling or SamplingParams()
        if params.n != 1:
            raise UserError(f"n is {params.n}: one answer is streamed at a time")
        (request,) = self.requests(0, prompt, params, streamed=True)
        for finished in self._serve(iter([request]), rounds=1):
            yield from request.pieces
            request.pieces.clear()
            yield from finished

    def requests(self, index: int, prompt: Prompt, params: SamplingParams, *, streamed: bool = False) -> list[_Request]:
        """A prompt's samples as requests for `serve`; UserError for a prompt that cannot be answered."""
        tokens = self.encode(prompt, f"prompt {index}")
        stop = tuple(params.stop_token_ids) + (() if params.ignore_eos else self.eos_token_ids)
        stop = tuple(dict.fromkeys(stop))
        if len(stop) > MAX_STOP_TOKENS:
            raise UserError(f"prompt {index} has {len(stop)} stop tokens: give at most {MAX_STOP_TOKENS}")
        max_new = min(int(params.max_new_tokens), self.max_len - len(tokens))
        needs_text = streamed or bool(params.stop)
        return [
            _Request(
                index,
                sample,
                tokens,
                params,
                stop,
                max_new,
                TextStream(self.tokenizer, tuple(params.stop)) if needs_text else None,
                streamed,
            )
            for sample in range(params.n)
        ]

    def encode(self, prompt: Prompt, name: str) -> tuple[int, ...]:
        """The tokens of a prompt; UserError with its name where they cannot be answered."""
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(prompt)
        elif len(prompt) and isinstance(prompt[0], dict):
            try:
                tokens = encode_chat(self.tokenizer, prompt)  # type: ignore[arg-type]
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        else:
            tokens = list(prompt)
            bad = [
                t for t in tokens if not isinstance(t, (int, np.integer)) or not 0 <= t < self.target.config.vocab_size
            ]
            if bad:
                raise UserError(f"{name} holds {bad[0]!r}: give token ids below {self.target.config.vocab_size}")
        if not tokens:
            raise UserError(f"{name} is empty: give it some text")
        if len(tokens) >= self.max_len:
            remedy = " or raise max_len" if self.max_len < self.target.config.max_positions else ""
            raise UserError(
                f"{name} has {len(tokens)} tokens, but a request has {self.max_len}, answer included: "
                f"shorten it{remedy}"
            )
        return tuple(int(t) for t in tokens)

    def serve(self, requests: Iterable[_Request]) -> Iterator[Completion]:
        """The answers to requests as they are finished; requests are read as slots become free.

        Of those that wait, the one of the lowest number is next: a conversation that goes on overtakes new ones.
        """
        for finished in self._serve(iter(requests), rounds=ROUNDS):
            yield from finished

    def measure(self) -> None:
        """Measures the trees of "auto" for every number of rows, which else waits until such a number is needed."""
        for rows in self.row_counts:
            self._measure(rows)

    def warm_up(self) -> None:
        """Compiles ahead of time what requests of any kind will need, and measures the trees: minutes."""
        self.measure()
        for bucket in self.buckets:
            prompt = (1,) * min(bucket, self.max_len - 2)
            for rows in self.row_counts:
                self._probe([prompt], rows, self.trees[0], max_new=2)
        for a, b in itertools.permutations(self.row_counts, 2):
            with self._on_mesh():
                _Batch(self._empty(a), [None] * a).resized(b)

    # --- scheduling ---------------------------------------------------------------------------------------------

    def _serve(
        self, requests: Iterator[_Request], *, rounds: int, fixed: tuple[int, TreeSpec | None] | None = None
    ) -> Iterator[list[Completion]]:
        """After each call of the device, the answers that are finished.

        `rounds` is how many a call may run; `fixed` the rows and the tree, None where they are chosen call by call.
        """
        waiting: collections.deque[_Request] = collections.deque()
        batch: _Batch | None = None
        while True:
            started = time.perf_counter()
            waiting.extend(itertools.islice(requests, LOOKAHEAD * self.num_slots - len(waiting)))
            waiting = collections.deque(sorted(waiting, key=lambda request: request.prompt_index))
            num_active = 0 if batch is None else batch.num_active
            if not waiting and not num_active:
                return
            # --- as many rows as are needed: none are given up while a request waits for one ----------------------
            needed = min(num_active + len(waiting), self.num_slots)
            wanted = min(n for n in self.row_counts if n >= needed) if fixed is None else fixed[0]
            if batch is None or wanted > batch.rows or (wanted < batch.rows and not waiting):
                if fixed is None:
                    self._measure(wanted)
                    started = time.perf_counter()
                with self._on_mesh():
                    batch = _Batch(self._empty(wanted), [None] * wanted) if batch is None else batch.resized(wanted)
            tree = self._choose(batch.rows) if fixed is None else fixed[1]
            # --- prompts into free rows ---------------------------------------------------------------------------
            for row in batch.free():
                if waiting:
                    request = waiting.popleft()
                    request.started = time.perf_counter()
                    others = [other.prompt for other in waiting]
                    drafts = tree is not None
                    prefilled = self._prefill(request.prompt, others, drafts=drafts, keep=request.streamed)
                    described = to_device_request(request)
                    with self._on_mesh():
                        batch.slots = device.admit(self.target, batch.slots, np.int32(row), prefilled, described)
                    batch.active[row], batch.ended[row] = request, False
                    called = time.perf_counter()
                    jax.block_until_ready(batch.slots)  # prefill is neither the host's time nor a tree's
                    self.device_seconds += time.perf_counter() - called
            # --- rounds -------------------------------------------------------------------------------------------
            text_is_read = any(request is not None and request.text is not None for request in batch.active)
            called = time.perf_counter()
            with self._on_mesh():
                batch.slots, ran = device.advance(
                    self.target,
                    self.drafter,
                    self._vocab,
                    batch.slots,
                    np.asarray(batch.ended),
                    np.int32(min(rounds, ROUNDS_BETWEEN_TEXT) if text_is_read else rounds),
                    np.asarray(bool(waiting)),
                    tree=tree,
                    shared_noise=self.shared_noise,
                )
            num_rounds = int(ran)  # waits for the device
            now = time.perf_counter()
            compiled = (batch.rows, tree) in self._ran
            self._ran.add((batch.rows, tree))
            new_tokens, row_rounds, finished = self._read(batch, num_rounds, now)
            self._tree_selector.record(
                batch.rows,
                tree,
                rounds=num_rounds,
                row_rounds=row_rounds,
                tokens=new_tokens,
                seconds=now - called if compiled else None,
            )
            self.device_seconds += now - called
            self.seconds += time.perf_counter() - started
            yield finished

    def _read(self, batch: _Batch, rounds: int, now: float) -> tuple[int, int, list[Completion]]:
        """After a call of so many rounds: the new tokens, the rounds they took (rows added up), finished answers."""
        state = batch.slots.state
        num_emitted, done = jax.device_get((state.num_emitted, state.done))
        arrays: _Emitted | None = None
        new_tokens, row_rounds, finished = 0, 0, []
        for row, request in enumerate(batch.active):
            if request is None:
                continue
            before = request.num_emitted, request.rounds
            request.num_emitted, request.rounds = int(num_emitted[row]), request.rounds + rounds
            ended = False
            if request.text is not None or done[row]:
                arrays = arrays or _Emitted(state)
                ended = request.take(arrays, row)
            if done[row]:
                request.rounds = request.depths.count(0) - 1  # it may have ended before the last round
            new_tokens += request.num_emitted - before[0]
            row_rounds += request.rounds - before[1]
            if done[row] or ended:
                finished.append(request.completion(self.tokenizer, self.eos_token_ids, self._num_levels, now))
                batch.active[row], batch.ended[row] = None, True
        return new_tokens, row_rounds, finished

    # --- trees --------------------------------------------------------------------------------------------------

    def _choose(self, rows: int) -> TreeSpec | None:
        if len(self.trees) == 1:
            return self.trees[0]
        fastest = self.trees.index(self._tree_selector.choose(rows))
        return self.trees[int(process_values(self.mesh, fastest)[0])]  # all by the first one's clock

    def _measure(self, rows: int) -> None:
        """Sees to it that the speed of every tree is known for so many rows, where there is a choice."""
        if len(self.trees) == 1:
            return
        prompts = [self.tokenizer.encode(text)[: self.max_len // 2] for text in WARM_UP[:rows]]
        for tree in self._tree_selector.unmeasured(rows):
            for max_new in (2, 24):  # the first compiles
                self._probe(prompts, rows, tree, max_new)
            log.info("%d rows, %s: %.1f tokens/s a row", rows, tree or "plain", self._tree_selector.speed(rows, tree))

    def _probe(self, prompts: Sequence[Sequence[int]], rows: int, tree: TreeSpec | None, max_new: int) -> None:
        """Answers prompts with a given tree, for the time it takes."""
        spent = self.seconds, self.device_seconds
        params = SamplingParams(temperature=0, max_new_tokens=max_new, ignore_eos=True)
        requests = [self.requests(i, prompt, params)[0] for i, prompt in enumerate(prompts)]
        for _ in self._serve(iter(requests), rounds=ROUNDS, fixed=(rows, tree)):
            pass
        self.seconds, self.device_seconds = spent

    # --- arrays -------------------------------------------------------------------------------------------------

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Where programs are run: they find the mesh, if there is one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def _num_levels(self) -> int:
        return 0 if self.drafter is None else self.drafter.num_levels

    def _empty(self, rows: int) -> device.Slots:
        return device.empty_slots(
            self.target,
            self.drafter,
            batch=rows,
            num_slots=self._cache_slots,
            most_written=self._most_written,
            num_stop_tokens=MAX_STOP_TOKENS,
        )

    def _prefill(
        self, prompt: tuple[int, ...], others: Sequence[tuple[int, ...]], *, drafts: bool = True, keep: bool = False
    ) -> Prefilled:
        """The prompt in caches of its bucket; what it begins with like some of the others is kept for them.

        Where `keep`, all of it is, but for its last chunk: a conversation goes on with what was said. Where nothing is
        drafted now, it does not go into the drafter's cache: should drafts pay later, they do without it.
        """
        bucket = next(size for size in self.buckets if size >= len(prompt))
        prefix, first = self._empty_prefix(bucket), 0
        chunks = (len(prompt) - 1) // self.chunk  # whole ones, at least a token being left
        for n in range(chunks, 0, -1):
            if (key := (bucket, drafts, prompt[: n * self.chunk])) in self._beginnings:
                self._beginnings.move_to_end(key)
                prefix, first = self._beginnings[key], n
                break
        alike = [_chunks_alike(prompt, other, self.chunk) for other in others if len(other) <= bucket]
        shared = chunks if keep else min(max(alike, default=0), chunks)
        if shared > first:
            prefix = self._run_prefill(prefix, prompt[: shared * self.chunk], bucket, first, drafts)
            self._beginnings[bucket, drafts, prompt[: shared * self.chunk]] = prefix
            if len(self._beginnings) > SHARED_BEGINNINGS:
                self._beginnings.popitem(last=False)
            first = shared
        return self._run_prefill(prefix, prompt, bucket, first, drafts)

    def _run_prefill(
        self, prefix: Prefilled, prompt: tuple[int, ...], bucket: int, first: int, drafts: bool
    ) -> Prefilled:
        padded = np.zeros((1, bucket), np.int32)
        padded[0, : len(prompt)] = prompt
        length = np.asarray([len(prompt)], np.int32)
        args = (self.target, self.drafter, self._vocab, prefix, padded, length, np.int32(first))
        with self._on_mesh():
            return device.prefill(*args, chunk=self.chunk, num_levels=self._most_levels if drafts else 0)

    def _empty_prefix(self, bucket: int) -> Prefilled:
        if bucket not in self._nothing:
            with self._on_mesh():
                self._nothing[bucket] = self._new_caches(bucket)
        return self._nothing[bucket]

    def _new_caches(self, bucket: int) -> Prefilled:
        return device.init_prefill(
            self.target,
            self.drafter,
            num_slots=bucket,
            drafter_slots=self._cache_slots,
            most_written=self._most_written,
        )

    def _needed(self) -> Memory:
        """What the engine will take, from shapes alone."""

        def size(tree: Any, axes: Any) -> int:
            return bytes_of(tree, self.mesh, axes)

        state = jax.eval_shape(lambda: self._empty(self.num_slots)).state
        empty = [jax.eval_shape(functools.partial(self._new_caches, bucket)) for bucket in self.buckets]
        prefilled = [size(caches, device.AXES) for caches in empty]
        embedding = {"embedding": self.target.embedding[...]}
        vocab = embedding if self.drafter is None else jax.eval_shape(self.drafter.vocab_weights, self.target)
        nodes = max(1 if tree is None else tree.num_nodes(self._num_levels) for tree in self.trees)
        logits = {"logits": jax.ShapeDtypeStruct((self.num_slots, nodes, self.target.config.vocab_size), jnp.float32)}
        return Memory(
            target=size(self.target, device.AXES),
            drafter=sum(size(part, device.AXES) for part in (self.drafter, vocab)) - size(embedding, device.AXES),
            target_cache=size(state.target_cache, device.AXES),
            drafter_cache=size(state.drafter_cache, device.AXES),
            prefill=sum(prefilled) + SHARED_BEGINNINGS * prefilled[-1],
            work=LOGITS_BUFFERS_PER_ROUND * size(logits, {"logits": ("rows", None, "vocab")}),
        )


# --- a batch under way ------------------------------------------------------------------------------------------


class _Emitted:
    """The emitted tokens of all rows, copied from the device."""

    def __init__(self, state: State) -> None:
        parts = (state.emitted, state.depths, state.logprobs)
        self.tokens, self.depths, self.logprobs = (np.array(part) for part in jax.device_get(parts))


class _Batch:
    """Slots and the requests in them."""

    def __init__(self, slots: device.Slots, active: list[_Request | None]) -> None:
        self.slots = slots
        self.active = active  # by row
        self.ended = [request is None for request in active]  # by row: done, whatever the device thinks

    @property
    def rows(self) -> int:
        """B."""
        return len(self.active)

    @property
    def num_active(self) -> int:
        """Rows with a request."""
        return sum(request is not None for request in self.active)

    def free(self) -> list[int]:
        """Rows without one."""
        return [row for row, request in enumerate(self.active) if request is None]

    def resized(self, rows: int) -> _Batch:
        """The requests in a batch of another number of rows."""
        kept = [row for row, request in enumerate(self.active) if request is not None]
        spare = rows - len(kept)
        taken = np.asarray([True] * len(kept) + [False] * spare)
        slots = device.take_rows(self.slots, np.asarray(kept + [0] * spare, np.int32), taken)
        return _Batch(slots, [self.active[row] for row in kept] + [None] * spare)


def to_device_request(request: _Request) -> device.Request:
    """A request as the device wants it; numpy arrays, which compile nothing."""
    params = request.params

    def row(value: Any, dtype: Any) -> Any:
        return np.asarray([value], dtype)

    spare = MAX_STOP_TOKENS - len(request.stop_tokens)
    return device.Request(
        length=row(len(request.prompt), np.int32),
        sampling=Sampling(
            temperature=row(params.temperature, np.float32),
            top_k=row(params.top_k, np.int32),
            top_p=row(params.top_p, np.float32),
            min_p=row(params.min_p, np.float32),
            seed=row(sample_seed(params.seed, request.sample), np.uint32),
        ),
        stop=Stop(row(request.max_new, np.int32), row([*request.stop_tokens, *[NO_STOP] * spare], np.int32)),
        wants_logprobs=row(params.logprobs, bool),
    )


def _chunks_alike(a: tuple[int, ...], b: tuple[int, ...], chunk: int) -> int:
    """The whole chunks that two prompts begin with alike, a token of the second being left over."""
    n = 0
    while (n + 1) * chunk < len(b) and a[n * chunk : (n + 1) * chunk] == b[n * chunk : (n + 1) * chunk]:
        n += 1
    return n


def _prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """A list of prompts from such a list or a single prompt."""
    if isinstance(prompts, str):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and isinstance(listed[0], (int, np.integer, dict)):
        return [listed]
    return listed
