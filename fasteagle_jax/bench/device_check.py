"""What `fasteagle check-device` runs: is a device lossless, how long are its rounds and train steps, and as estimated?

B rows · N levels · M nodes · T tokens. Models have random weights, so that nothing is fetched: neither the time of a
round nor that of a train step depends on their values. Every part gives rows, dicts that JSON holds; one that fails
says so in "error" and the others go on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from fasteagle_jax.compiling.hlo_cost import cost
from fasteagle_jax.compiling.programs import roofline
from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.data.packing import Batch
from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import advance, generate, start
from fasteagle_jax.decoding.state import make_stop
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.chips import chip
from fasteagle_jax.devices.memory import bytes_of
from fasteagle_jax.drafters.simulated import Simulated
from fasteagle_jax.drafters.table import class_of, default_config
from fasteagle_jax.nn.linear import to_int8_weights, to_rows
from fasteagle_jax.nn.transformer import stacks_are_faster
from fasteagle_jax.targets.llama import Llama, LlamaConfig
from fasteagle_jax.training.config import drafter_config
from fasteagle_jax.training.flops import flops_per_token, peak_flops
from fasteagle_jax.training.init import init_drafter
from fasteagle_jax.training.optimizer import make_optimizer
from fasteagle_jax.training.step import first_state, train_step

Row = dict[str, Any]  # what JSON holds
Task = Callable[[], Row]

CASES = 24  # of the fuzz, in each dtype
NEAR = 0.15  # logits of a standard deviation of 6 that bfloat16 may turn round (see tests/decoding/test_bfloat16.py)
RATES = (0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)  # of a simulated drafter by depth: an assumption, not a measurement
ROUNDS, REPEATS = 8, 5  # timed together, and how often
LEAST_LAYERS = 4  # of a target that is cut to fit a device

DRAFTERS: dict[str, dict[str, Any]] = {  # a `correction` is times the target's width
    "fasteagle, the paper's": dict(num_levels=7),
    "fasteagle, as shipped": dict(num_levels=5, reinject=True, correction=1, window=512),
    "eagle3": dict(kind="eagle3", num_levels=7),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is timed: the sizes of a published target, or small ones that a CPU runs in moments."""

    target: LlamaConfig
    draft_vocab_size: int
    batches: tuple[int, ...]
    nodes: tuple[int, ...]
    prompt: int  # tokens
    chunk: int
    max_new: int  # of a whole decode
    train: tuple[int, int]  # rows and tokens of a train step
    dtype: str = "bfloat16"


FULL = Sizes(
    PUBLISHED["llama31_8b"].target_config,  # type: ignore[arg-type]  # it has one
    draft_vocab_size=32_000,
    batches=(1, 8, 32, 64),
    nodes=(60, 16, 8, 4, 2),  # 1 is a plain round
    prompt=512,
    chunk=256,
    max_new=128,
    train=(4, 2048),
)
SMALL = Sizes(
    LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8,
        max_positions=512,
    ),
    draft_vocab_size=128,
    batches=(1, 2),
    nodes=(4, 2),
    prompt=32,
    chunk=16,
    max_new=8,
    train=(2, 64),
)  # fmt: skip


# --- 1. losslessness --------------------------------------------------------------------------------------------


def lossless_tasks(small: bool) -> dict[str, Task]:
    """A fuzz of small models: in float32 every token must be plain decoding's, in bfloat16 but at near-ties."""
    return {
        f"lossless, {dtype}, case {case}": functools.partial(_lossless, dtype, case)
        for dtype in ("float32", "bfloat16")
        for case in range(1 if small else CASES)
    }


def _lossless(dtype: str, case: int) -> Row:
    """Compares speculative with plain decoding of random prompts; "wrong" counts the answers that must not differ.

    With the products' highest precision, so that float32 is float32 on every device. In bfloat16 all is greedy: an
    answer may leave the other's where the logits of their two tokens are nearer than NEAR.
    """
    rng = np.random.default_rng(case)
    rows, max_new, levels, vocab = 6, 24, 3, 40
    temperature = 1.0 if dtype == "float32" and case % 2 else 0.0
    tree = TreeSpec.parse(["best_first:8", "chain", "backbone:3", "best_first:16"][case // 2 % 4])
    with jax.default_matmul_precision("highest"):
        target = _sharp_target(case, jnp.dtype(dtype), vocab)
        prompts = [rng.integers(vocab, size=rng.integers(3, 40)).tolist() for _ in range(rows)]
        sampling = make_sampling(rows, temperature=temperature, seed=[int(s) for s in rng.integers(2**31, size=rows)])
        settings: dict[str, Any] = {"max_new": max_new, "chunk": 16}
        plain = np.asarray(generate(target, None, prompts, sampling, **settings).tokens)
        texts = np.zeros((rows, 40 + max_new + levels + 1), np.int32)
        for text, prompt, answer in zip(texts, prompts, plain, strict=True):
            text[: len(prompt) + max_new] = [*prompt, *answer]
        rates = jnp.full((levels,), 0.7)
        drafter = Simulated(jnp.asarray(texts), rates, jnp.arange(rows, dtype=jnp.uint32), vocab)
        made = generate(target, drafter, prompts, sampling, tree=tree, **settings)
        tokens = np.asarray(made.tokens)
        gaps = gaps_where_parted(target, prompts, tokens.tolist(), plain.tolist())
    near = 0 if dtype == "float32" else sum(gap < NEAR for gap in gaps)
    return {
        "dtype": dtype,
        "temperature": temperature,
        "tree": str(tree),
        "answers": rows,
        "accepted": int(made.statistics.accepted_at.sum()),
        "near_ties": near,
        "largest_gap": max(gaps, default=0.0),
        "wrong": len(gaps) - near,
    }


def _sharp_target(seed: int, dtype: Any, vocab: int) -> Llama:
    """A small Llama whose logits have a standard deviation of about 6, so that few of its choices are near."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8,
        max_positions=512,
    )  # fmt: skip

    def make() -> Llama:
        target = Llama(config, jax.random.key(seed), dtype)
        target.norm.weight[...] = target.norm.weight[...] * 6.0
        return target

    return _in_decoding_form(jax.jit(make)())


def gaps_where_parted(
    target: Any, prompts: Sequence[list[int]], ours: Sequence[list[int]], theirs: Sequence[list[int]]
) -> list[float]:
    """How far apart the logits of the two first different tokens are, of answers that differ.

    inf where one answer ends before. What comes after that token follows another text, and is not compared.
    """
    gaps = []
    for prompt, one, other in zip(prompts, ours, theirs, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if at is not None:
            logits = _logits_after(target, [*prompt, *one[:at]])
            gaps.append(float(abs(logits[one[at]] - logits[other[at]])))
        elif one != other:
            gaps.append(math.inf)
    return gaps


def _logits_after(target: Any, tokens: Sequence[int]) -> np.ndarray:
    """The target's logits float32 [V] after tokens."""
    ids = jnp.asarray([tokens])
    causal = jnp.tril(jnp.ones((1, len(tokens), len(tokens)), bool))
    out = target(ids, jnp.arange(len(tokens))[None], causal)
    return np.asarray(target.logits(out.hidden[:, -1:])[0, 0])


def _in_decoding_form(target: Any) -> Any:
    """A target with its layers and weights laid out as this backend decodes fastest."""
    if stacks_are_faster(jax.default_backend()):
        return target
    target = target.unstacked()
    to_rows(target)
    return target


# --- 3. rounds --------------------------------------------------------------------------------------------------


def round_tasks(sizes: Sizes) -> dict[str, Task]:
    """Timed rounds, the most telling first, and whole decodes with simulated acceptance."""
    models = Models(sizes)
    tasks: dict[str, Task] = {}
    for some in (sizes.nodes[:2], sizes.nodes[2:]):
        for batch in sizes.batches:
            tasks[f"round, batch {batch}, plain"] = functools.partial(_round, models, batch, None, None)
            for name in DRAFTERS:
                for nodes in some:
                    key = f"round, batch {batch}, {name}, {nodes} nodes"
                    tasks[key] = functools.partial(_round, models, batch, name, nodes)
            tasks[f"decode, batch {batch}, simulated"] = functools.partial(_decode, models, batch)
    rounded = Models(sizes, int8=True, instead_of=models)
    for batch in sizes.batches:
        tasks[f"round, int8, batch {batch}, plain"] = functools.partial(_round, rounded, batch, None, None)
        for name in DRAFTERS:
            key = f"round, int8, batch {batch}, {name}, {sizes.nodes[1]} nodes"
            tasks[key] = functools.partial(_round, rounded, batch, name, sizes.nodes[1])
    return tasks


class Models:
    """The target and drafters that are timed, made when they are first needed, one drafter at a time."""

    def __init__(
        self, sizes: Sizes, *, training: bool = False, int8: bool = False, instead_of: Models | None = None
    ) -> None:
        """Of sizes, with their layers and weights laid out as decoding or as training is fastest.

        With `int8` the target's matrices and cache are int8. When they are made, those of `instead_of` are given up.
        """
        self.sizes, self._training, self._int8, self._instead_of = sizes, training, int8, instead_of
        self._stacked = stacks_are_faster(jax.default_backend(), training=training)
        self._drafter: tuple[str, Any] | None = None
        self._prefilled: tuple[tuple[int, str | None], Any] | None = None

    @functools.cached_property
    def target(self) -> Llama:
        """The target with random weights, of as many layers as half of the device's memory holds."""
        if self._instead_of is not None:
            self._instead_of.give_up()
        config = self.sizes.target
        dtype = jnp.dtype(self.sizes.dtype)
        limit = _memory_limit()
        while limit is not None and config.num_layers > LEAST_LAYERS:
            shapes = jax.eval_shape(functools.partial(Llama, config, jax.random.key(0), dtype))
            if bytes_of(shapes) < limit / 2:
                break
            config = dataclasses.replace(config, num_layers=config.num_layers // 2)

        def make() -> Llama:
            target = Llama(config, jax.random.key(0), dtype, stacked=self._stacked)
            if self._int8:
                to_int8_weights(target)
            return target

        target = jax.jit(make)()
        if not self._stacked and not self._training:
            to_rows(target)
        target.cache_dtype = jnp.dtype(jnp.int8) if self._int8 else None
        return target

    @property
    def dtype(self) -> str:
        """That of the target's weights, in words."""
        return "int8" if self._int8 else self.sizes.dtype

    def give_up(self) -> None:
        """Frees the memory of all models, which are made anew when they are needed again."""
        self.__dict__.pop("target", None)
        self._drafter = self._prefilled = None

    def choice(self, name: str) -> dict[str, Any]:
        """Fields of a DrafterChoice: those of DRAFTERS at the target's sizes."""
        changes = {"draft_vocab_size": self.sizes.draft_vocab_size} | DRAFTERS[name]
        if "correction" in changes:
            changes["correction"] *= self.target.config.hidden_size
        return changes

    def drafter(self, name: str) -> Any:
        """A drafter of DRAFTERS with random weights, for decoding."""
        if self._drafter is None or self._drafter[0] != name:
            self._drafter = self._prefilled = None  # frees their memory
            self._drafter = name, self._new_drafter(name)
        return self._drafter[1]

    def _new_drafter(self, name: str) -> Any:
        changes = self.choice(name)
        kind = changes.pop("kind", "fasteagle")
        config = default_config(self.target.config, kind, **changes)
        dtype = jnp.dtype(self.sizes.dtype)
        drafter = jax.jit(lambda: class_of(config)(config, jax.random.key(1), dtype, stacked=self._stacked))()
        if not self._stacked:
            to_rows(drafter)
        return drafter

    def prefilled(self, batch: int, name: str | None) -> tuple[Any, Any]:
        """The State after prompts, with room for the rounds, and the drafter's weights of the target."""
        drafter = None if name is None else self.drafter(name)
        if self._prefilled is None or self._prefilled[0] != (batch, name):
            self._prefilled = None
            self._prefilled = (batch, name), self._prefill(batch, drafter)
        return self._prefilled[1]

    def _prefill(self, batch: int, drafter: Any | None) -> tuple[Any, Any]:
        num_levels = 0 if drafter is None else drafter.num_levels
        rng = np.random.default_rng(0)
        tokens, lengths = pad_prompts(
            rng.integers(self.target.config.vocab_size, size=(batch, self.sizes.prompt)).tolist(), self.sizes.chunk
        )
        max_new = ROUNDS * (num_levels + 1) + 1
        more = {"max_new": max_new, "num_levels": num_levels, "chunk": self.sizes.chunk}
        sampling, stop = make_sampling(batch, temperature=0.0), make_stop(batch, max_new)
        return jax.block_until_ready(start(self.target, drafter, tokens, lengths, sampling, stop, **more))


def _round(models: Models, batch: int, name: str | None, nodes: int | None) -> Row:
    """The seconds of a round, the median over repeats, beside the estimate of its own compiled program."""
    drafter = None if name is None else models.drafter(name)
    tree = None if nodes is None else TreeSpec("best_first", nodes=nodes)
    state, vocab = models.prefilled(batch, name)
    sampling, stop = make_sampling(batch, temperature=0.0), make_stop(batch, 2**30)
    args = (models.target, drafter, vocab, state, sampling, stop, jnp.asarray(ROUNDS))
    compiled: Any = advance.lower(*args, tree=tree or TreeSpec()).compile()
    seconds = []
    for repeat in range(REPEATS + 1):
        fresh = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # `advance` consumes it
        started = time.perf_counter()
        after = jax.block_until_ready(compiled(*args[:3], fresh, *args[4:]))
        if repeat:  # the first touches memory
            seconds.append((time.perf_counter() - started) / ROUNDS)
    emitted = int((after.num_emitted - state.num_emitted).sum())
    parts = roofline(cost(compiled.as_text(), "least"), chip(jax.devices()[0].device_kind))
    estimate = max(parts["memory"], parts["products"]) if parts else None
    measured = statistics.median(seconds)
    return {
        "batch": batch,
        "drafter": name or "none",
        "nodes": nodes or 1,
        "layers": models.target.config.num_layers,
        "dtype": models.dtype,
        "milliseconds": 1e3 * measured,
        "milliseconds_min": 1e3 * min(seconds),
        "milliseconds_max": 1e3 * max(seconds),
        "estimate_milliseconds": None if estimate is None else 1e3 * estimate,
        "measured_over_estimated": None if estimate is None else measured / estimate,
        "tokens_a_round_and_row": emitted / ROUNDS / batch,
    }


def _decode(models: Models, batch: int) -> Row:
    """Whole answers, plain and with a simulated drafter of RATES, which costs nothing; compilation is not counted."""
    sizes, vocab = models.sizes, models.target.config.vocab_size
    rng = np.random.default_rng(1)
    prompts = rng.integers(vocab, size=(batch, sizes.prompt)).tolist()
    sampling = make_sampling(batch, temperature=0.0)
    settings: dict[str, Any] = {"max_new": sizes.max_new, "chunk": sizes.chunk}

    def timed(drafter: Any, tree: TreeSpec | None) -> tuple[Any, float]:
        for _ in range(2):  # the first compiles
            started = time.perf_counter()
            made = jax.block_until_ready(generate(models.target, drafter, prompts, sampling, tree=tree, **settings))
        return made, time.perf_counter() - started

    plain, plain_seconds = timed(None, None)
    texts = np.zeros((batch, sizes.prompt + sizes.max_new + len(RATES) + 1), np.int32)
    texts[:, : sizes.prompt] = prompts
    texts[:, sizes.prompt : sizes.prompt + sizes.max_new] = np.asarray(plain.tokens)
    rates, seeds = jnp.asarray(RATES, jnp.float32), jnp.arange(batch, dtype=jnp.uint32)
    made, seconds = timed(Simulated(jnp.asarray(texts), rates, seeds, vocab), TreeSpec("best_first", nodes=8))
    rounds = np.asarray(made.statistics.rounds).sum()
    return {
        "batch": batch,
        "new_tokens": sizes.max_new,
        "rates": list(RATES),
        "plain_tokens_per_second": batch * sizes.max_new / plain_seconds,
        "tokens_per_second": batch * sizes.max_new / seconds,
        "speedup": plain_seconds / seconds,
        "acceptance_length": float((np.asarray(made.lengths).sum() - batch) / max(rounds, 1)),
        "differing_answers": int((np.asarray(made.tokens) != np.asarray(plain.tokens)).any(axis=1).sum()),
    }


# --- 4. a train step --------------------------------------------------------------------------------------------


def train_tasks(sizes: Sizes) -> dict[str, Task]:
    """A train step of each drafter."""
    models = Models(sizes, training=True)
    return {f"train step, {name}": functools.partial(_train, models, name) for name in DRAFTERS}


def _train(models: Models, name: str) -> Row:
    """Tokens a second of a train step on one device, the median over repeats, and its share of the device's peak."""
    sizes, target = models.sizes, models.target
    rows, length = sizes.train
    run = PUBLISHED["llama31_8b"]
    config = dataclasses.replace(
        run,
        drafter=dataclasses.replace(run.drafter, **{"window": None} | models.choice(name)),
        batch_size=rows,
        length=length,
        mesh=None,
        dtype=sizes.dtype,
    )
    drafter_sizes = drafter_config(config.drafter, target.config)
    drafter = init_drafter(drafter_sizes, target, jax.random.key(0), from_target=False)
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)  # type: ignore[misc]  # `...`: all the rest
    state = first_state(params, make_optimizer(config.optimizer, config.steps), config.optimizer.ema)
    del drafter, params
    rng = np.random.default_rng(0)
    tokens = rng.integers(target.config.vocab_size, size=(rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = jax.tree.map(jnp.asarray, Batch(tokens, positions, np.ones_like(tokens), np.ones(tokens.shape, bool)))
    step = train_step(config, graph)
    seconds = []
    for repeat in range(REPEATS + 1):
        started = time.perf_counter()
        state, result = step(state, constants, target, batch)
        jax.block_until_ready(result.loss)
        if repeat:  # the first compiles
            seconds.append(time.perf_counter() - started)
    rate = rows * length / statistics.median(seconds)
    peak = peak_flops(jax.devices()[0].device_kind)
    flops = flops_per_token(target.config, drafter_sizes, length, config.loss.share)
    return {
        "drafter": name,
        "rows": rows,
        "length": length,
        "layers": target.config.num_layers,
        "tokens_per_second": rate,
        "share_of_peak": None if peak is None else flops * rate / peak,
        "loss": float(result.loss),
    }


def _memory_limit() -> int | None:
    """Bytes of the first device that programs may use; None if it does not say so, as a CPU."""
    statistics = jax.devices()[0].memory_stats()
    return int(statistics["bytes_limit"]) if statistics and "bytes_limit" in statistics else None


# --- 5. the report ----------------------------------------------------------------------------------------------

COLUMNS = {  # of the report's tables: a row's entry and its head
    "lossless": {"dtype": "dtype", "answers": "answers", "accepted": "guesses accepted", "near_ties": "near-ties",
                 "largest_gap": "largest gap", "wrong": "wrong"},
    "target": {"target": "target", "temperature": "temperature", "answers": "answers", "changed": "changed by drafting",
               "not_the_cpus": "not the CPU's", "largest_gap": "largest gap", "wrong": "wrong",
               "plain_tokens_per_second": "plain tok/s", "tokens_per_second": "tok/s"},
    "rounds": {"dtype": "weights", "batch": "batch", "drafter": "drafter", "nodes": "nodes", "milliseconds": "ms",
               "estimate_milliseconds": "estimated ms", "measured_over_estimated": "measured / estimated",
               "over_plain": "of a plain round"},
    "decodes": {"batch": "batch", "plain_tokens_per_second": "plain tok/s", "tokens_per_second": "tok/s",
                "speedup": "speed-up", "acceptance_length": "tau", "differing_answers": "differing answers"},
    "train": {"drafter": "drafter", "rows": "rows", "length": "tokens", "tokens_per_second": "tok/s",
              "share_of_peak": "of peak"},
}  # fmt: skip


def report(about: Row, parts: dict[str, dict[str, Row]]) -> str:
    """The rows of all parts in Markdown; `about` is what they were run on."""
    lines = ["# Device check", "", ", ".join(f"{name} {value}" for name, value in about.items()) + ".", ""]
    rows = [row for part in parts.values() for row in part.values()]
    if layers := sorted({row["layers"] for row in rows if "layers" in row}):
        lines += [f"Targets have {', '.join(map(str, layers))} layers.", ""]
    plain = {(row["dtype"], row["batch"]): row["milliseconds"] for row in rows if row.get("drafter") == "none"}
    for name, columns in COLUMNS.items():
        of_part = [*parts.get("rounds" if name == "decodes" else name, {}).values()]
        if name == "lossless":
            of_part = _summed(parts.get(name, {}))
        shown = [row for row in of_part if "error" not in row and ("speedup" in row) == (name == "decodes")]
        if not shown:
            continue
        lines += [f"## {name}", "", f"| {' | '.join(columns.values())} |", "|---" * len(columns) + "|"]
        for row in shown:
            if "milliseconds" in row and (row["dtype"], row["batch"]) in plain:
                row = row | {"over_plain": row["milliseconds"] / plain[row["dtype"], row["batch"]]}
            lines.append(f"| {' | '.join(_cell(row.get(column)) for column in columns)} |")
        lines.append("")
    failed = {name: row["error"] for part in parts.values() for name, row in part.items() if "error" in row}
    if failed:
        lines += ["## failed", "", *(f"- {name}: {reason}" for name, reason in failed.items()), ""]
    return "\n".join(lines)


def _summed(cases: dict[str, Row]) -> list[Row]:
    """The cases of each dtype as one row."""
    rows = []
    for dtype in dict.fromkeys(row["dtype"] for row in cases.values() if "dtype" in row):
        own = [row for row in cases.values() if row.get("dtype") == dtype]
        counts = {name: sum(row[name] for row in own) for name in ("answers", "accepted", "near_ties", "wrong")}
        rows.append({"dtype": dtype, "largest_gap": max(row["largest_gap"] for row in own)} | counts)
    return rows


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
