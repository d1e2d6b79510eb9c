"""The models with the compiled programs that an engine runs, and the sizes that they are compiled for.

Programs: for each bucket of prompt lengths, and for each number of prompts prefilled together in it, the empty caches,
a prefill with and without the drafter, and `put_chunk`; `last_chunk` for each bucket, and `take_prompt` where there are
several prompts. For each number of rows computed (the slots, a quarter of them while no more are in use, and so on) one
`advance` a tree, one `admit` a bucket, and one `take_rows` for each change to another number of rows. The latter three
are compiled once more if requests have rules, and each bucket has a program that scores prompts, if any ask for it.
With grammars a round is two programs, `draft` and `verify`, between which the host makes masks.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from fasteagle_jax.decoding.interfaces import VocabWeights
from fasteagle_jax.decoding.prefill import Prefilled, Scores, pad_prompts
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.sharding import shardings
from fasteagle_jax.engine import slots as device
from fasteagle_jax.engine.requests import MAX_STOP_TOKENS


class ModelRunner:
    """The models on their devices, and calls of their compiled programs."""

    def __init__(
        self,
        target: Any,
        drafter: Any | None,
        trees: tuple[TreeSpec | None, ...],
        *,
        buckets: dict[int, int],
        max_len: int,
        chunk: int,
        shared_noise: bool,
        mesh: Mesh | None,
    ) -> None:
        """A runner; `buckets` are the sizes of prompts' caches, ascending, with the most prompts together in each."""
        self.target, self.drafter, self.trees, self.mesh = target, drafter, trees, mesh
        self.buckets, self.chunk, self.shared_noise = buckets, chunk, shared_noise
        self.num_levels = 0 if drafter is None else drafter.num_levels
        self._most_levels = max((tree.num_levels(self.num_levels) for tree in trees if tree), default=0)
        self.vocab: VocabWeights | None = None
        self._compiled_rounds: set[tuple[int, TreeSpec | None, bool]] = set()
        most_written = max(chunk, 1 + self.num_levels)  # tokens of a row at a time
        sizes = {"most_written": most_written, "drafter_slots": max_len + most_written}
        self._init_prefill = functools.partial(device.init_prefill, target, drafter, **sizes)
        sizes = {"most_written": most_written, "num_slots": max_len + most_written}
        self._empty_slots = functools.partial(
            device.empty_slots, target, drafter, num_stop_tokens=MAX_STOP_TOKENS, **sizes
        )
        sizes = {"num_slots": max_len + most_written, "vocab_size": target.config.vocab_size}
        self._empty_rules = functools.partial(device.empty_rules, **sizes)

    def gather_vocab(self) -> None:
        """Sets `vocab`, the weights that the drafter shares with the target; the embedding is the target's own array.

        Before the first request, which would wait for its programs, and after the memory is known to suffice.
        """
        vocab = None if self.drafter is None else self.drafter.vocab_weights(self.target)
        self.vocab = vocab if self.mesh is None else jax.device_put(vocab, shardings(self.mesh, vocab, device.AXES))

    def bucket(self, length: int) -> int:
        """The smallest bucket for a prompt of `length` tokens."""
        return next(size for size in self.buckets if size >= length)

    # --- programs -----------------------------------------------------------------------------------------------

    def empty_slots(self, rows: int) -> device.Slots:
        """Free slots, B = `rows`."""
        with self._on_mesh():
            return self._empty_slots(batch=rows)

    def with_rules(self, slots: device.Slots) -> device.Slots:
        """The slots with rules, as requests that have some need them; all others' change nothing."""
        with self._on_mesh():
            rules, top = self._empty_rules(batch=slots.state.done.shape[0])
        return slots._replace(rules=rules, state=slots.state._replace(top=top))

    @property
    def prefill_shapes(self) -> list[tuple[int, int]]:
        """The number of prompts and the bucket of every shape that prompts are prefilled in."""
        return [(rows, bucket) for bucket, most in self.buckets.items() for rows in sorted({1, most})]

    def empty_prefill(self, rows: int, bucket: int) -> Prefilled:
        """Empty caches for prompts of a bucket, of a shape of `prefill_shapes`."""
        with self._on_mesh():
            return self._init_prefill(rows=rows, num_slots=bucket)

    def prefill_shape(self, rows: int, bucket: int) -> Prefilled:
        """The shape of `empty_prefill`; nothing is compiled."""
        return jax.eval_shape(functools.partial(self._init_prefill, rows=rows, num_slots=bucket))

    def slots_shape(self, rows: int) -> device.Slots:
        """The shape of `empty_slots`; nothing is compiled."""
        return jax.eval_shape(functools.partial(self._empty_slots, batch=rows))

    def chunk_shape(self) -> Prefilled:
        """The shape of a `last_chunk`; nothing is compiled."""
        bucket = next(iter(self.buckets))
        return jax.eval_shape(functools.partial(device.last_chunk, chunk=self.chunk), self.prefill_shape(1, bucket))

    def prefill(
        self, prefix: Prefilled, prompts: list[tuple[int, ...]], bucket: int, chunks: range, drafts: bool
    ) -> Prefilled:
        """The prompts with some more chunks in caches of their bucket; `prefix`, with those before, is donated.

        Without `drafts` they are left out of the drafter's cache, which is cheaper; later drafts then do without them.
        """
        args = (self.target, self.drafter, self.vocab, prefix, *pad_prompts(prompts, bucket))
        ends = np.int32(chunks.start), np.int32(chunks.stop)
        with self._on_mesh():
            return device.prefill(*args, *ends, chunk=self.chunk, num_levels=self._most_levels if drafts else 0)

    def score(self, prompt: tuple[int, ...], bucket: int) -> Scores:
        """Log-probabilities of a prompt's tokens, on the host."""
        args = (self.target, *pad_prompts([prompt], bucket))
        with self._on_mesh():
            return jax.device_get(device.score_prompt(*args, chunk=self.chunk))

    def take_prompt(self, prefilled: Prefilled, row: int) -> Prefilled:
        """One prompt of several."""
        with self._on_mesh():
            return device.take_prompt(prefilled, np.int32(row))

    def last_chunk(self, prefilled: Prefilled) -> Prefilled:
        """The newest chunk of a single prompt."""
        with self._on_mesh():
            return device.last_chunk(prefilled, chunk=self.chunk)

    def put_chunk(self, prefilled: Prefilled, piece: Prefilled, row: int) -> Prefilled:
        """The caches, which are donated, with a chunk added to a row."""
        with self._on_mesh():
            return device.put_chunk(prefilled, piece, np.int32(row))

    def admit(self, slots: device.Slots, row: int, prefilled: Prefilled, request: device.DeviceRequest) -> device.Slots:
        """The slots with a prefilled request in a row, its first token chosen; waits for the device."""
        with self._on_mesh():
            slots = device.admit(self.target, slots, np.int32(row), prefilled, request)
        return jax.block_until_ready(slots)

    def advance(
        self, slots: device.Slots, ended: list[bool], tree: TreeSpec | None, *, rounds: int, until_one_is_done: bool
    ) -> tuple[device.Slots, int, bool]:
        """The slots after up to `rounds` rounds, how many there were, and whether they had to be compiled first."""
        key = (len(ended), tree, slots.rules is not None)
        compiles = key not in self._compiled_rounds
        self._compiled_rounds.add(key)
        args = (self.target, self.drafter, self.vocab, slots, np.asarray(ended), np.int32(rounds))
        with self._on_mesh():
            slots, num_rounds = device.advance(
                *args, np.asarray(until_one_is_done), tree=tree, shared_noise=self.shared_noise
            )
        return slots, int(num_rounds), compiles

    def draft(self, slots: device.Slots, ended: list[bool], tree: TreeSpec | None) -> device.Drafted:
        """The draft of the next round, for `verify`; the slots stay."""
        args = (self.drafter, self.vocab, slots, np.asarray(ended))
        with self._on_mesh():
            return device.draft_round(*args, tree=tree, shared_noise=self.shared_noise)

    def verify(
        self,
        slots: device.Slots,
        drafted: device.Drafted,
        ended: list[bool],
        masks: np.ndarray,
        tree: TreeSpec | None,
    ) -> tuple[device.Slots, device.Drafted]:
        """The slots after the round of a draft, whose nodes have masks, and the next draft; waits for the device."""
        args = (self.target, self.drafter, self.vocab, slots, drafted, np.asarray(ended), masks)
        with self._on_mesh():
            return jax.block_until_ready(device.verify_round(*args, tree=tree, shared_noise=self.shared_noise))

    def take_rows(self, slots: device.Slots, rows: list[int], num_rows: int) -> device.Slots:
        """New slots of `num_rows` rows, the first ones copied from `rows`, the others free."""
        spare = num_rows - len(rows)
        in_use = np.asarray([True] * len(rows) + [False] * spare)
        with self._on_mesh():
            return device.take_rows(slots, np.asarray(rows + [0] * spare, np.int32), in_use)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which programs find the mesh, if there is one."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)
