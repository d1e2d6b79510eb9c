"""Requests on their way to a row: read ahead, then prefilled, several together, a budget of tokens at a time.

C tokens of a chunk.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax

from fasteagle_jax.decoding.prefill import Prefilled
from fasteagle_jax.engine.model_runner import ModelRunner
from fasteagle_jax.engine.prefix_cache import PrefixCache, chunk_digests

if TYPE_CHECKING:
    from fasteagle_jax.engine.scheduler import Request


class Waiting(NamedTuple):
    """A request that waits for a row."""

    request: Request
    digests: list[bytes]  # of its whole chunks that leave at least one token of the prompt over

    def num_chunks(self, chunk: int) -> int:
        """Chunks of its prompt, the last one included."""
        return -(-len(self.request.prompt) // chunk)


class Group:
    """Requests whose prompts are prefilled together: of one bucket, with equally many chunks, from the same one on."""

    def __init__(
        self, members: Sequence[Waiting], caches: Prefilled, bucket: int, chunks: range, kept: int, drafts: bool
    ) -> None:
        self.members = members
        self.caches = caches
        self.bucket = bucket
        self.chunks = chunks  # still to be computed
        self.kept = kept  # the prefix cache gets those before this one
        self.drafts = drafts


class Admission:
    """The requests that wait and the groups under way, at most one a bucket."""

    def __init__(
        self,
        requests: Iterator[Request],
        runner: ModelRunner,
        prefix_cache: PrefixCache,
        *,
        lookahead: int,
        prefill_budget: int,
    ) -> None:
        """Requests to prefill.

        Args:
          requests: of those that wait, the one of the lowest prompt index is next.
          runner, prefix_cache: the engine's.
          lookahead: the most requests that wait: common beginnings are looked for among them.
          prefill_budget: the most tokens of prompts that `advance` prefills, chunks counted as whole.
        """
        self._requests, self._runner, self._prefix_cache = requests, runner, prefix_cache
        self._lookahead, self._budget = lookahead, prefill_budget // runner.chunk
        self._waiting: list[Waiting] = []  # by prompt index
        self._num_waiting: collections.Counter[bytes] = collections.Counter()  # requests by the chunks they begin with
        self._groups: collections.deque[Group] = collections.deque()
        self._error: Exception | None = None

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self._waiting)

    @property
    def num_under_way(self) -> int:
        """Requests that are being prefilled."""
        return sum(len(group.members) for group in self._groups)

    def read_ahead(self) -> None:
        """Reads requests until `lookahead` of them wait, or there are none for now.

        An error of the iterator is raised once all requests before it are answered, by `raise_error`.
        """
        known = len(self._waiting)
        while len(self._waiting) < self._lookahead and self._error is None:
            try:
                request = next(self._requests)
            except StopIteration:
                break
            except Exception as error:  # whatever the caller's iterator raises
                self._error = error
                break
            waiting = Waiting(request, chunk_digests(request.prompt[:-1], self._runner.chunk))
            self._num_waiting.update(waiting.digests)
            self._waiting.append(waiting)
        if len(self._waiting) > known:
            self._waiting.sort(key=lambda waiting: waiting.request.prompt_index)

    def raise_error(self) -> None:
        """Raises what the iterator of requests raised, if it did."""
        if self._error is not None:
            raise self._error

    # --- prefill ------------------------------------------------------------------------------------------------

    def advance(self, num_free: int, *, drafts: bool) -> Iterator[tuple[Request, Prefilled]]:
        """Prefills up to the budget, for `num_free` rows; yields the requests that are done, each in caches of one row.

        Groups take turns, so that a long prompt does not hold up short ones.
        """
        left = self._budget
        while left > 0:
            num_rows = num_free - self.num_under_way
            if num_rows > 0 and (group := self._next_group(num_rows, drafts)) is not None:
                self._groups.append(group)
            if not self._groups or len(self._groups[0].members) > left:
                return
            group = self._groups.popleft()
            left -= self._run(group, left)
            if group.chunks:
                self._groups.append(group)
                continue
            num_free -= len(group.members)
            for row, member in enumerate(group.members):
                several = len(group.members) > 1
                yield member.request, self._runner.take_prompt(group.caches, row) if several else group.caches

    def _run(self, group: Group, budget: int) -> int:
        """Computes a group's next chunks, at most `budget` of all members'; returns how many.

        Those for the prefix cache are computed one a call: later ones may overwrite a drafter's window.
        """
        num_members = len(group.members)
        prompts, start = [member.request.prompt for member in group.members], group.chunks.start
        num_chunks = min(budget // num_members, len(group.chunks))
        steps = [range(i, i + 1) for i in range(start, min(group.kept, start + num_chunks))]
        if (done := start + len(steps)) < start + num_chunks:
            steps.append(range(done, start + num_chunks))
        for chunks in steps:
            group.caches = self._runner.prefill(group.caches, prompts, group.bucket, chunks, group.drafts)
            if chunks.stop <= group.kept:
                digests = group.members[0].digests[: chunks.stop]
                self._prefix_cache.insert(digests, group.drafts, self._runner.last_chunk(group.caches))
        jax.block_until_ready(group.caches)  # or the next rounds, whose time is measured, would wait for it
        group.chunks = group.chunks[num_chunks:]
        return num_chunks * num_members

    # --- groups -------------------------------------------------------------------------------------------------

    def _next_group(self, num_rows: int, drafts: bool) -> Group | None:
        """The next request that waits, of a bucket without a group, with others alike if a whole group of them waits.

        A beginning that others wait with, too, is computed by one request alone, and kept for them. So are all whole
        chunks of a streamed one: the conversation's next prompt begins with them.
        """
        busy = {group.bucket for group in self._groups}
        bucket_of = self._runner.bucket
        head = next((w for w in self._waiting if bucket_of(len(w.request.prompt)) not in busy), None)
        if head is None:
            return None
        bucket = bucket_of(len(head.request.prompt))
        num_known, most = self._prefix_cache.depth(head.digests, drafts), self._runner.buckets[bucket]
        kept, members = self._num_shared(head), [head]
        if kept <= num_known and most > 1 and num_rows >= most:
            alike = (w for w in self._waiting if self._are_alike(w, head, num_known, bucket, drafts))
            members = [w for w, _ in zip(alike, range(most), strict=False)]
            members = members if len(members) == most else [head]
        caches = self._runner.empty_prefill(len(members), bucket)
        for row, member in enumerate(members):
            self._waiting.remove(member)
            self._num_waiting.subtract(member.digests)
            member.request.started = time.perf_counter()
            for piece in self._prefix_cache.path(member.digests[:num_known], drafts):
                caches = self._runner.put_chunk(caches, piece, row)
        self._num_waiting = +self._num_waiting  # without those that are 0 now
        chunks = range(num_known, head.num_chunks(self._runner.chunk))
        return Group(members, caches, bucket, chunks, kept, drafts)

    def _num_shared(self, waiting: Waiting) -> int:
        """How many of a request's chunks, from the first on, are wanted again and can be kept."""
        kept = waiting.digests[: self._prefix_cache.capacity]
        if waiting.request.streamed:
            return len(kept)
        return next((n for n, digest in enumerate(kept) if self._num_waiting[digest] < 2), len(kept))

    def _are_alike(self, waiting: Waiting, head: Waiting, num_known: int, bucket: int, drafts: bool) -> bool:
        """Whether a request can be prefilled together with `head`, which has `num_known` chunks in the prefix cache."""
        chunk = self._runner.chunk
        return (
            waiting.num_chunks(chunk) == head.num_chunks(chunk)
            and self._runner.bucket(len(waiting.request.prompt)) == bucket
            and self._prefix_cache.depth(waiting.digests, drafts) == num_known
            and self._num_shared(waiting) <= num_known
        )
