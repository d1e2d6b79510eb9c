"""The engine: prompts in, answers out, through a fixed number of slots (continuous batching with static shapes).

The device runs rounds for all slots until one is done; the host then hands its answer out and prefills the next prompt
into it, while the others' state stays where it is. Tokens are those of plain decoding of each request alone: in
whatever slot, order and company, with whatever tree.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fasteagle_jax.decoding.tree import TreeSpec, check_lookup
from fasteagle_jax.decoding.tree_selection import Reads, TreeSelector, default_tree, tree_choices
from fasteagle_jax.devices.memory import Memory, bytes_of
from fasteagle_jax.devices.sharding import place_weights
from fasteagle_jax.drafters import table
from fasteagle_jax.drafters.files import load_drafter, read_config
from fasteagle_jax.drafters.text_only import TextOnly
from fasteagle_jax.engine.detokenizer import Detokenizer, TextStream
from fasteagle_jax.engine.grammar import Grammars, Matcher, everything_allowed
from fasteagle_jax.engine.model_runner import ModelRunner
from fasteagle_jax.engine.prefix_cache import PrefixCache
from fasteagle_jax.engine.request_rules import row_rules
from fasteagle_jax.engine.requests import (
    MAX_STOP_TOKENS,
    Completion,
    Piece,
    Progress,
    Prompt,
    Refused,
    SamplingParams,
    whole_number,
)
from fasteagle_jax.engine.scheduler import PromptScores, Request, Scheduler, to_device_request
from fasteagle_jax.engine.shipped import SHIPPED, drafter_folder
from fasteagle_jax.engine.sizes import (
    available_everywhere,
    check_mesh,
    check_prefill,
    checked_max_len,
    memory_needed,
    prefix_capacity,
    prompt_buckets,
    prompts_together,
    row_counts,
)
from fasteagle_jax.engine.slots import AXES
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import check_text
from fasteagle_jax.nn.linear import product_dtype
from fasteagle_jax.targets.experts import relative_reads
from fasteagle_jax.targets.loading import checked_cache_dtype, load_target, open_checkpoint, target_shapes
from fasteagle_jax.targets.messages import plain_messages, short
from fasteagle_jax.targets.templates import PLAIN, ChatOptions
from fasteagle_jax.targets.tokenizer import check_ids, encode_chat, encode_text, load_tokenizer, stop_token_ids

ROUNDS = 16  # of a device call at most, before the host reads results

MAX_REFUSED = 64  # prompts refused before the reading of others waits for these to be handed out

WARM_UP = ("The capital of France is", "def fibonacci(n):", "Once upon a time, there was", "Water boils when")

# What `Engine.serve` reads.
Item = tuple[Prompt, SamplingParams | None] | tuple[Prompt, SamplingParams | None, ChatOptions | None]

log = logging.getLogger(__name__)


class Engine:
    """A target with a drafter or without, and slots for requests.

    On a mesh the models are split over `tensor` and `fsdp`, the rows over `data`, their heads over `tensor`. If it has
    several processes' devices, each of them calls the engine with the same requests and gets the same answers.
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
        lookup: int | None = None,
        chunk: int | None = None,
        prefill_budget: int | None = None,
        prefix_cache_bytes: int | None = None,
        shared_noise: bool = True,
        fingerprint: str = "",
        mesh: Mesh | None = None,
    ) -> None:
        """An engine of loaded models; `load` makes one by names.

        Args:
          target, drafter: the models; without a drafter decoding is plain, or with `lookup` by that alone.
          tokenizer: of the target.
          eos_token_ids: end an answer.
          slots: B, requests under way at once.
          max_len: the most tokens of a request, prompt and answer together; None for what the target has positions
            for, but at most 2048.
          tree: what to draft: a TreeSpec, its name ("best_first:16"), "auto" for the fastest by measurement, "single"
            for that of a single request (see `tree_selection.default_tree`), or None for plain decoding.
          lookup: K, for trees that also hold what is copied from a request's own text after suffixes of up to K
            tokens (see decoding.lookup); None for trees of the drafter alone.
          chunk: C, prompt tokens a forward pass of the prefill takes; None for 64 on a CPU and 256 elsewhere.
          prefill_budget: the most tokens of prompts that are prefilled at a time: rows under way then get their next
            rounds, so that they never wait for a whole long prompt. None for 4 chunks.
          prefix_cache_bytes: the most memory of prompts' chunks that are kept for prompts that begin alike, 0 for
            none; None for the chunks of 4 prompts of `max_len`. `engine.memory` states it.
          shared_noise: let the drafter rank its guesses with the target's own noise at temperature > 0.
          fingerprint: of the target's weights.
          mesh: `sharding.make_mesh`'s, over all devices of all processes or over some of this one's; the models are
            put there if they are not. None for one device.

        Raises:
          UserError: sizes that are out of range, do not fit into memory, or that the mesh does not divide.
        """
        self.max_len = checked_max_len(max_len, slots, target.config.max_positions)
        chunk = (64 if jax.default_backend() == "cpu" else 256) if chunk is None else chunk
        check_lookup(lookup)
        if drafter is None and lookup is not None:
            drafter = TextOnly()
        self.mesh = mesh
        if mesh is not None:
            check_mesh(mesh, slots, target.config, getattr(drafter, "config", None))
            target = place_weights(mesh, target)
            drafter = place_weights(mesh, drafter)
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.detokenizer = Detokenizer(tokenizer)
        self.eos_token_ids = tuple(eos_token_ids)
        self.grammars = Grammars(tokenizer, target.config.vocab_size, self.eos_token_ids)
        self.fingerprint = fingerprint
        self.num_slots = slots
        self.row_counts = row_counts(slots, 1 if mesh is None else mesh.shape["data"])
        reads = functools.partial(relative_reads, target.config)
        self.trees = _trees(tree, drafter, lookup, reads, slots)
        self._tree_selector = TreeSelector(self.trees)
        self.prefill_budget = check_prefill(prefill_budget, chunk)
        buckets = prompts_together(prompt_buckets(self.max_len, chunk), chunk, self.prefill_budget, slots)
        sizes: dict[str, Any] = {"buckets": buckets, "max_len": self.max_len, "chunk": chunk}
        self.runner = ModelRunner(target, drafter, self.trees, **sizes, shared_noise=shared_noise, mesh=mesh)
        chunk_bytes = bytes_of(self.runner.chunk_shape(), mesh, AXES)
        capacity = prefix_capacity(prefix_cache_bytes, chunk_bytes, max(buckets) // chunk)
        self.prefix_cache = PrefixCache(capacity)
        self.memory = memory_needed(self.runner, self.row_counts, capacity)
        loaded = self.memory.target + self.memory.drafter  # weights that are there already
        free = available_everywhere(mesh)
        remedy = "lower slots or max_len, or use bfloat16 or an int8 cache"
        self.memory.check(None if free is None else free + loaded, remedy)
        self.runner.gather_vocab()
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
        lookup: int | None = None,
        mesh: Mesh | None = None,
        dtype: Any = None,
        strict: bool = False,
        adapter: str = "",
        cache_dtype: Any = None,
    ) -> Self:
        """An engine of a target by its name and a drafter by its folder.

        Args:
          target: a name ("smollm2-135m"), Hugging Face folder, hub name or GGUF file.
          drafter: the folder of a drafter trained for it; "shipped" is the one that comes with this package for the
            target, if one does; None decodes plainly. With tree=None none is loaded.
          slots, max_len, tree, lookup, mesh: as of `Engine`; the weights go straight into their shards.
          dtype: of weights and, but for `cache_dtype`, caches; None for float32 on a CPU and bfloat16 elsewhere. With
            int8 the target's layers are rounded (see `targets.loading.load_target`), and answers are exactly those of
            that target.
          strict: a drafter trained for other weights of the same sizes is an error, not a warning.
          adapter: folder of a LoRA adapter of PEFT's that is merged into the target; empty for none.
          cache_dtype: int8 for a cache of the target's keys and values that are rounded, each head's of a token with a
            scale of its own; answers are those of the target with that cache. None for the dtype of the weights.

        Raises:
          UserError: models that cannot be had or do not fit each other; sizes that do not fit into memory, found out
            from shapes before anything is loaded.
        """
        if dtype is None:
            dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        dtype, cache_dtype = jnp.dtype(dtype), checked_cache_dtype(cache_dtype)
        check_lookup(lookup)
        checkpoint = open_checkpoint(target, adapter)
        folder = None if tree is None else drafter_folder(drafter, checkpoint)
        config = checkpoint.config
        length = checked_max_len(max_len, slots, config.max_positions)
        products = product_dtype(dtype)
        sizes = target_shapes(config, products, int8=dtype == jnp.int8, in_blocks=checkpoint.in_blocks)
        drafter_config = drafter_sizes = None
        if folder is not None:
            drafter_config = read_config(folder)[0]
            kind = table.class_of(drafter_config)
            drafter_sizes = jax.eval_shape(lambda: kind(drafter_config, jax.random.key(0), products))
        if mesh is not None:
            check_mesh(mesh, slots, config, drafter_config)
        weights = bytes_of(sizes, mesh), bytes_of(drafter_sizes, mesh)
        Memory(*weights, 0, 0, 0, 0).check(available_everywhere(mesh), "use bfloat16 or a larger device")
        loaded = load_target(target, dtype, mesh=mesh, max_len=length, adapter=adapter, cache_dtype=cache_dtype)
        tokenizer = load_tokenizer(loaded.checkpoint.path)
        model = (
            None
            if folder is None
            else load_drafter(folder, loaded.model.config, loaded.fingerprint, products, mesh=mesh, strict=strict)
        )
        return cls(
            loaded.model,
            model,
            tokenizer,
            stop_token_ids(tokenizer, loaded.checkpoint.path),
            slots=slots,
            max_len=max_len,
            tree=tree,
            lookup=lookup,
            fingerprint=loaded.fingerprint,
            mesh=mesh,
        )

    @property
    def most_programs(self) -> int:
        """How many programs the engine compiles at most, whatever it is asked without rules."""
        # Two make the drafter's vocabulary weights. A shape of prompts has its empty caches, a prefill with and without
        # the drafter, `put_chunk`, and `last_chunk` or `take_prompt`.
        return 2 + 5 * len(self.runner.prefill_shapes) + self._programs_of_rows

    @property
    def most_programs_with_rules(self) -> int:
        """How many it compiles at most, whatever it is asked: rules, grammars, log-probabilities of any kind."""
        by_masks = 2 * len(self.row_counts) * len(self.trees)
        return self.most_programs + self._programs_of_rows + len(self.runner.buckets) + by_masks

    @property
    def _programs_of_rows(self) -> int:
        """Programs of slots: a number of rows has its empty ones, an admission a bucket, rounds a tree, and changes."""
        rows = len(self.row_counts)
        return rows * (1 + len(self.runner.buckets) + len(self.trees)) + rows * (rows - 1)

    # --- asking -------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        chat: ChatOptions | Sequence[ChatOptions] | None = None,
    ) -> list[Completion]:
        """The answers in the prompts' order, the samples of a prompt one after the other.

        Args:
          prompts: each a text (continued as it is), token ids, or a list of messages (the chat template is applied);
            or one of these.
          sampling: for all, or one for each prompt; None for SamplingParams().
          chat: what the chat template is given beside messages (tools, enable_thinking and more), for all or one for
            each prompt; it counts for lists of messages alone. None for ChatOptions().

        Raises:
          UserError: a prompt that is empty or does not fit, by its number, before anything is decoded.
        """
        return sorted(self.complete(prompts, sampling, chat), key=lambda c: (c.prompt_index, c.sample))

    def complete(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        chat: ChatOptions | Sequence[ChatOptions] | None = None,
    ) -> Iterator[Completion]:
        """The answers as they finish. Arguments and errors are those of `generate`."""
        listed = _prompts(prompts)
        params = _each(sampling, SamplingParams, len(listed), "sampling params")
        options = _each(chat, ChatOptions, len(listed), "chat options")
        items = enumerate(zip(listed, params, options, strict=True))
        requests = [request for i, item in items for request in self.requests(i, *item)]
        return itertools.chain.from_iterable(self._serve(iter(requests), rounds=ROUNDS))

    def serve(
        self,
        items: Iterable[Item],
        *,
        progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[Completion | Refused]:
        """The answers to prompts of an iterable of any length as they finish, and a Refused for each that has none.

        Args:
          items: (prompt, params) or (prompt, params, chat) each, None for SamplingParams() or ChatOptions();
            `prompt_index` is their number, from 0 on. They are read, and tokenised, as slots become free, a few a slot
            ahead, so that memory does not grow with them. An iterator that has nothing for now ends (StopIteration),
            and is asked again as long as anything is under way, so after every answer that it has been waiting for.
          progress: is called after every device call.

        Raises:
          What the iterable raises, and UserError for an item of another form; answers to the prompts before it come
          first.
        """
        started, source = time.perf_counter(), ItemReader(self, items)
        completions = new_tokens = 0

        def report() -> None:
            if progress is not None:
                seconds = time.perf_counter() - started
                progress(Progress(source.num_read, completions, source.num_refused, new_tokens, seconds))

        while True:
            try:
                for finished in self._serve(source, rounds=ROUNDS, refuse=source.refuse):
                    yield from source.take_refused()
                    for completion in finished:
                        if completion.prompt_index in source.failed:
                            continue  # another of the prompt's samples was refused
                        completions, new_tokens = completions + 1, new_tokens + len(completion.tokens)
                        yield completion
                    report()
            except Exception:
                yield from source.take_refused()
                raise
            refused = source.take_refused()
            yield from refused
            if not refused:
                return
            report()

    def stream(
        self, prompt: Prompt, sampling: SamplingParams | None = None, chat: ChatOptions | None = None
    ) -> Iterator[str]:
        """The answer's text piece by piece, in whole characters, as the rounds find it; `n` must be 1."""
        for piece in self.stream_pieces(prompt, sampling, chat):
            if isinstance(piece, Piece) and piece.text:
                yield piece.text

    def stream_pieces(
        self, prompt: Prompt, sampling: SamplingParams | None = None, chat: ChatOptions | None = None
    ) -> Iterator[Piece | Completion]:
        """The pieces of `stream`, a token each, with the depth at which it was accepted; at last the Completion."""
        (params,) = _each(sampling, SamplingParams, 1, "sampling params")
        if params.n != 1:
            raise UserError(f"n is {params.n}: one answer is streamed at a time")
        (options,) = _each(chat, ChatOptions, 1, "chat options")
        (request,) = self.requests(0, prompt, params, options, streamed=True)
        for completions in self._serve(iter([request]), rounds=1):
            yield from request.pieces
            request.pieces.clear()
            yield from completions

    def requests(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        chat: ChatOptions = PLAIN,
        *,
        streamed: bool = False,
        name: str = "",
    ) -> list[Request]:
        """A prompt's samples as requests; UserError, with its name, for a prompt that cannot be answered."""
        name = name or f"prompt {index}"
        tokens = self.encode(prompt, name, chat)
        strings, named = self._stops(params.stop, name)
        stop = (*params.stop_token_ids, *named, *(() if params.ignore_eos else self.eos_token_ids))
        stop = tuple(dict.fromkeys(stop))
        if len(stop) > MAX_STOP_TOKENS:
            raise UserError(f"{name} has {len(stop)} stop tokens: give at most {MAX_STOP_TOKENS}")
        max_new = min(int(params.max_new_tokens), self.max_len - len(tokens))
        needs_text = streamed or bool(strings)

        def text() -> TextStream | None:
            return TextStream(self.detokenizer, tokens, strings, params.min_tokens) if needs_text else None

        rules = row_rules(params, self.tokenizer, self.target.config.vocab_size, stop, name)
        scores = None if params.prompt_logprobs is None else PromptScores()
        grammar = self.grammars.compiled(params.structured_outputs, name)

        def matcher() -> Matcher | None:
            return None if grammar is None else self.grammars.matcher(grammar)

        parts = (tokens, params, stop, max_new)
        shared = (rules, scores)
        return [Request(index, sample, *parts, text(), streamed, *shared, matcher()) for sample in range(params.n)]

    def _stops(self, stop: Sequence[str], name: str) -> tuple[list[str], list[int]]:
        """Stop strings to look for in the text, and the ids of those that are special tokens, which no text shows."""
        strings, ids = [], []
        for text in stop:
            if text in self.detokenizer.special:
                ids.append(self.detokenizer.special[text])
                continue
            if within := [token for token in self.detokenizer.special if token in text]:
                raise UserError(
                    f"{name} has the stop string {text!r}, but text does not show the special token {within[0]}: "
                    f"give its id, {self.detokenizer.special[within[0]]}, as one of stop_token_ids"
                )
            strings.append(text)
        return strings, ids

    def encode(self, prompt: Prompt, name: str, chat: ChatOptions = PLAIN) -> tuple[int, ...]:
        """The tokens of a prompt; UserError with its name if they cannot be answered."""
        tokens = self.tokens(prompt, name, chat)
        if len(tokens) >= self.max_len:
            remedy = " or raise max_len" if self.max_len < self.target.config.max_positions else ""
            raise UserError(
                f"{name} has {len(tokens)} tokens, but a request has {self.max_len}, answer included: "
                f"shorten it{remedy}"
            )
        return tokens

    def tokens(self, prompt: Prompt, name: str, chat: ChatOptions = PLAIN) -> tuple[int, ...]:
        """The tokens of a prompt of any length; UserError with its name if there are none, or the target lacks one.

        Arrays are taken as lists.
        """
        vocab_size = self.target.config.vocab_size
        given: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if isinstance(given, str):
            tokens = encode_text(self.tokenizer, check_text(given, name))
        elif isinstance(given, bytes) or not isinstance(given, Sequence):
            raise UserError(f"{name} is {short(given)}: give a text, token ids or a list of messages")
        elif given and isinstance(given[0], Mapping):
            messages = plain_messages(given, name)
            try:
                tokens = encode_chat(self.tokenizer, messages, options=chat)
            except UserError as error:
                raise UserError(f"{name}: {error}") from error
        else:
            whole: Any = given if set(map(type, given)) == {int} else [whole_number(token) for token in given]
            for token, its in zip(given, whole, strict=True):
                if its is None or not 0 <= its < vocab_size:
                    raise UserError(f"{name} holds {short(token)}: give token ids below {vocab_size}")
            tokens = list(whole)
        if not tokens:
            raise UserError(f"{name} is empty: give it some text")
        check_ids(tokens, vocab_size, name)
        return tuple(tokens)

    def _serve(
        self, requests: Iterator[Request], *, rounds: int, refuse: Callable[[int, str], None] | None = None
    ) -> Iterator[list[Completion]]:
        """The answers that each device call, of up to `rounds` rounds, finishes.

        Requests are read as slots become free. Of those that wait, the one of the lowest prompt index is next. What
        cannot be answered to the end is given to `refuse`, with the reason, or raised as UserError.
        """
        parts = (requests, self.runner, self.prefix_cache, self._tree_selector, self.row_counts)
        context = (self.detokenizer, self.eos_token_ids, self.runner.num_levels)
        scheduler = Scheduler(*parts, rounds=rounds, prefill_budget=self.prefill_budget, measure=self._measure)
        for step in scheduler.steps():
            started = time.perf_counter()
            for request in step.finished:
                if request.failed and refuse is None:
                    raise UserError(request.failed)
                if request.failed and refuse is not None:
                    refuse(request.prompt_index, request.failed)
            completions = [request.completion(*context) for request in step.finished if not request.failed]
            self.seconds += step.seconds + time.perf_counter() - started
            self.device_seconds += step.device_seconds
            yield completions

    # --- before any request -------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Measures the trees of "auto" for every number of rows, instead of when such a number is first needed."""
        for rows in self.row_counts:
            self._measure(rows)

    def warm_up(self, rules: bool = False) -> None:
        """Compiles every program that requests may need, and measures the trees: minutes.

        With `rules` also those that requests with rules, grammars, `top_logprobs` or `prompt_logprobs` need: twice as
        many more, or so.
        """
        self.measure()
        runner, prompt = self.runner, (0,)
        for num_prompts, bucket in runner.prefill_shapes:
            prefilled = runner.empty_prefill(num_prompts, bucket)
            for drafts in {tree is not None for tree in self.trees}:
                prefilled = runner.prefill(prefilled, [prompt] * num_prompts, bucket, range(0), drafts)
            if num_prompts > 1:
                prefilled = runner.take_prompt(prefilled, 0)
                piece = runner.last_chunk(prefilled)
                runner.put_chunk(runner.empty_prefill(num_prompts, bucket), piece, 0)
                continue
            prefilled = runner.put_chunk(prefilled, runner.last_chunk(prefilled), 0)
            (plain,) = self.requests(0, prompt, SamplingParams())
            request = to_device_request(plain, bucket)
            for rows in self.row_counts:
                runner.admit(runner.empty_slots(rows), 0, prefilled, request)
                if rules:
                    with_rules = to_device_request(plain, bucket, self.target.config.vocab_size)
                    runner.admit(runner.with_rules(runner.empty_slots(rows)), 0, prefilled, with_rules)
            if rules:
                runner.score(prompt, bucket)
        forms = (runner.empty_slots, lambda rows: runner.with_rules(runner.empty_slots(rows)))[: 1 + rules]
        for rows, tree, slots in itertools.product(self.row_counts, self.trees, forms):
            runner.advance(slots(rows), [True] * rows, tree, rounds=0, until_one_is_done=False)
        for rows, tree in itertools.product(self.row_counts if rules else (), self.trees):
            some, ended = runner.with_rules(runner.empty_slots(rows)), [True] * rows
            drafted = runner.draft(some, ended, tree)
            masks = everything_allowed(drafted.draft.tokens.shape, self.target.config.vocab_size)
            runner.verify(some, drafted, ended, masks, tree)
        for (old, new), slots in itertools.product(itertools.permutations(self.row_counts, 2), forms):
            runner.take_rows(slots(old), [], new)

    def _measure(self, rows: int) -> None:
        """Measures the trees not yet measured for this number of rows, if there is a choice."""
        if len(self.trees) == 1:
            return
        prompts = [self.tokenizer.encode(text)[: self.max_len // 2] for text in WARM_UP[:rows]]
        for tree in self._tree_selector.unmeasured(rows):
            for max_new in (2, 24):  # the first compiles
                self._probe(prompts, rows, tree, max_new)
            log.info("%d rows, %s: %.1f tokens/s a row", rows, tree or "plain", self._tree_selector.speed(rows, tree))

    def _probe(self, prompts: Sequence[Sequence[int]], rows: int, tree: TreeSpec | None, max_new: int) -> None:
        """Answers prompts in a batch of `rows` with a given tree, whose speed is recorded."""
        params = SamplingParams(temperature=0, max_new_tokens=max_new, ignore_eos=True)
        requests = [self.requests(i, prompt, params)[0] for i, prompt in enumerate(prompts)]
        parts = (iter(requests), self.runner, self.prefix_cache, self._tree_selector, (rows,))
        for _ in Scheduler(*parts, rounds=ROUNDS, prefill_budget=self.prefill_budget, tree=tree).steps():
            pass


class ItemReader:
    """An iterator over the requests of `Engine.serve`, with the prompts that were refused on the way."""

    def __init__(self, engine: Engine, items: Iterable[Item]) -> None:
        self._engine, self._items = engine, iter(items)
        self._samples: collections.deque[Request] = collections.deque()  # of the prompt read last
        self._refused: list[Refused] = []
        self.failed: set[int] = set()  # prompts that were refused after an answer had begun
        self.num_read = self.num_refused = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Request:
        while not self._samples:
            if len(self._refused) == MAX_REFUSED:
                raise StopIteration  # until they are handed out
            item: Any = next(self._items)
            index = self.num_read
            prompt, params, chat = _parts(item, index)
            self.num_read += 1
            try:
                requests = self._engine.requests(index, prompt, params, chat, name="the prompt")
            except UserError as error:
                self._refuse(index, str(error))
            else:
                self._samples.extend(requests)
        return self._samples.popleft()

    def refuse(self, index: int, reason: str) -> None:
        """Refuses a prompt of which an answer had begun, once for all its samples."""
        if index not in self.failed:
            self.failed.add(index)
            self._refuse(index, reason)

    def _refuse(self, index: int, reason: str) -> None:
        self._refused.append(Refused(index, reason))
        self.num_refused += 1

    def take_refused(self) -> list[Refused]:
        """Those refused since the last call."""
        refused, self._refused = self._refused, []
        return refused


def _parts(item: Any, index: int) -> tuple[Prompt, SamplingParams, ChatOptions]:
    """The prompt, params and chat options of an item of `Engine.serve`."""
    if isinstance(item, tuple) and len(item) in (2, 3):
        prompt, params = item[:2]
        chat = item[2] if len(item) == 3 else None
        if isinstance(params, SamplingParams | None) and isinstance(chat, ChatOptions | None):
            return prompt, params or SamplingParams(), chat or PLAIN
    raise UserError(
        f"item {index} of the iterable is {short(item)}: give (prompt, SamplingParams), or ChatOptions as a third"
    )


def _trees(
    tree: TreeSpec | str | None, drafter: Any | None, lookup: int | None, reads: Reads, slots: int
) -> tuple[TreeSpec | None, ...]:
    """The trees to choose from, None for plain decoding (see Engine)."""
    if drafter is None or tree is None:
        return (None,)
    trees: tuple[TreeSpec | None, ...]
    if tree == "auto":
        trees = tree_choices(drafter.num_levels, reads, slots)
    elif tree == "single":
        trees = (default_tree(jax.default_backend(), reads),)
    else:
        trees = (TreeSpec.parse(tree) if isinstance(tree, str) else tree,)
    if lookup is None:
        return trees
    return tuple(None if tree is None else dataclasses.replace(tree, lookup=lookup) for tree in trees)


def _each(given: Any, kind: Any, num_prompts: int, name: str) -> list[Any]:
    """One of a kind for each prompt, from one for all, a sequence of them, or None for the kind's defaults."""
    if given is None or isinstance(given, kind):
        return [given or kind()] * num_prompts
    listed = list(given) if isinstance(given, Iterable) and not isinstance(given, (str, Mapping)) else [given]
    if wrong := [one for one in listed if not isinstance(one, kind | None)]:
        raise UserError(f"{name} has {short(wrong[0])}: give {kind.__name__}")
    if len(listed) != num_prompts:
        raise UserError(f"{len(listed)} {name} for {num_prompts} prompts: give one, or one a prompt")
    return [one or kind() for one in listed]


def _prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """A list of prompts from such a list or a single prompt."""
    given: Any = prompts.tolist() if hasattr(prompts, "tolist") else prompts
    is_one = isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable)
    listed: list[Any] = [given] if is_one else list(given)
    if not is_one and listed and (isinstance(listed[0], Mapping) or whole_number(listed[0]) is not None):
        return [listed]
    return listed
