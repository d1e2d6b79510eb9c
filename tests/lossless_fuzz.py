"""Random cases of drafting, each of which must give token for token what plain decoding gives.

    XLA_FLAGS=--xla_backend_optimization_level=0 python tests/lossless_fuzz.py --seed 0 --count 10000

A case draws freely: the weights of target and drafter, prompts, sampling settings and seeds of each row, lengths, stop
tokens, how often a drafter that knows the answer is right; and for two of three families rules on logits, all of
`decoding.rules`, for one of them grammars, too (MODES): which tokens may come next is drawn anew after every beginning
of an answer. What compiles into a program is drawn from few: for each family of targets one plain program, of ROWS
rows, and one for each of four or three of DRAFTERS, of one to ROWS rows.

Two tokens whose scores differ by less than TIE may be told apart by how many rows a product has (see docs, exactness):
such a case counts as a tie, not as equal.
"""

from __future__ import annotations

import argparse
import collections
import functools
import random
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tiny_families import V, hf_config

from fasteagle_jax.decoding.rules import BANNED, RowRules, apply_rules, keep_allowed, make_rules
from fasteagle_jax.decoding.sampling import choose, make_sampling
from fasteagle_jax.decoding.speculative import (
    commit_path,
    draft_tree,
    generate_jit,
    num_levels_of,
    root_only,
    start,
    verify,
)
from fasteagle_jax.decoding.state import NO_STOP, Accepted, Stop, is_stop, slots_needed
from fasteagle_jax.decoding.tree import NO_PARENT, TreeSpec
from fasteagle_jax.drafters.simulated import Simulated
from fasteagle_jax.drafters.table import class_of, default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.targets.table import FAMILIES, family_of, family_of_files

ROWS, SLOTS, MAX_NEW, CHUNK, LEVELS, STOPS = 3, 32, 24, 16, 3, 3
TIE = 1e-4  # of a score: float32 rounds scores of this size by less than a tenth of that
SIZES = dict(max_new=MAX_NEW, chunk=CHUNK)
CONTEXT = dict(context="target", levels="shared", side_by_side=True, reinject=True)
DRAFTERS: dict[str, tuple[str, dict[str, Any], str]] = {  # name: kind, changes of its configuration, tree
    "own cache": ("fasteagle", {}, "best_first:12"),
    "target's cache": ("fasteagle", CONTEXT | {"edges": 4, "head": "own"}, "backbone:4"),
    "first level's keys": ("fasteagle", dict(context="shared", levels="first", reinject=True, edges=4), "best_first:6"),
    "eagle3": ("eagle3", {}, "best_first:8"),
    "told the answer": ("simulated", {}, "chain"),
    "and a lookup": ("simulated", {}, "best_first:8+lookup:4"),
}
MODES = ("free", "rules", "grammars")  # with grammars there are rules, too
EQUAL, TIED, FAILED = "equal", "tie", "failed"


class Constraints(NamedTuple):
    """What each row may say; empty for programs without."""

    rules: tuple[RowRules, ...] = ()
    grammars: tuple[int | None, ...] = ()  # seeds; None for a row without one

    def of(self, rows: Any) -> Constraints:
        """Those of some rows."""
        return Constraints(*(tuple(each[i] for i in rows) if each else () for each in self))


class Case(NamedTuple):
    """What came of a case, in which program, and how many guesses were accepted."""

    kind: str
    program: str
    accepted: int
    message: str = ""


def cases(
    families: list[str], seed: int, count: int, drafters: tuple[str, ...] = tuple(DRAFTERS), first: int = 0
) -> Iterator[Case]:
    """What comes of cases `first` to `count` - 1; a longer run begins with a shorter one."""
    for number in range(first, count):
        rng = random.Random(f"{seed} {number}")
        family = rng.choice(families)
        name = rng.choice([name for name in drafters_of(family) if name in drafters] or drafters)
        yield _case(family, name, rng, f"{number}: {family}, {name}")


def drafters_of(family: str) -> list[str]:
    """The drafters that a family meets: four of them for the first eight families, three for the others."""
    index, names = list(FAMILIES).index(family), list(DRAFTERS)
    left_out = [names[(index + i) % len(names)] for i in ((0, 3, 1) if index >= 8 else (0, 3))]
    return [name for name in names if name not in left_out]


def _case(family: str, name: str, rng: random.Random, label: str) -> Case:
    kind, _, tree = DRAFTERS[name]
    draw = np.random.default_rng(rng.getrandbits(32))
    target = _drawn(_target(family), draw)
    lengths = draw.integers(1, SLOTS + 1, ROWS)
    few = int(draw.choice((2, 5, V)))  # tokens of the prompts: repetition is what a lookup finds
    prompts = draw.integers(0, few, (ROWS, SLOTS)).astype(np.int32)
    sampling = make_sampling(
        ROWS,
        temperature=draw.choice((0.0, 0.0, 0.3, 1.0, 3.0, 40.0), ROWS).tolist(),
        top_k=draw.choice((0, 0, 1, 5, 30), ROWS).tolist(),
        top_p=draw.choice((1.0, 1.0, 0.9, 0.4), ROWS).tolist(),
        min_p=draw.choice((0.0, 0.0, 0.1), ROWS).tolist(),
        seed=draw.integers(0, 2**31, ROWS).tolist(),
    )
    stops = np.where(draw.random((ROWS, STOPS)) < 0.3, draw.integers(0, V, (ROWS, STOPS)), NO_STOP)
    stop = Stop(jnp.asarray(draw.integers(1, MAX_NEW + 1, ROWS), jnp.int32), jnp.asarray(stops, jnp.int32))
    full = jnp.asarray(prompts), jnp.asarray(lengths, jnp.int32), sampling, stop
    mode = mode_of(family)
    constraints = _constraints(mode, draw, stops)
    expected, *ends, _ = _said(target, None, full, constraints, TreeSpec("chain"))

    rows = draw.permutation(ROWS)[: _num_rows(family, name)]
    spec = TreeSpec.parse(tree)
    if kind == "simulated":
        known = np.zeros((ROWS, slots_needed(SLOTS, CHUNK, MAX_NEW, LEVELS)), np.int32)
        for row, prompt, length, answer in zip(known, prompts, lengths, expected, strict=True):
            row[:length] = prompt[:length]
            row[length : length + MAX_NEW] = np.maximum(answer, 0)
        rates = jnp.asarray(draw.choice((0.3, 0.7, 0.95), LEVELS), jnp.float32)
        drafter: Any = Simulated(jnp.asarray(known[rows]), rates, jnp.asarray(rows, jnp.uint32), V)
    else:
        drafter = _drawn(_drafter(family, name), draw)
    some = jax.tree.map(lambda x: x[rows], full)
    found, *ended, accepted = _said(target, drafter, some, constraints.of(rows), spec, kind != "eagle3")
    program, expected_ends = f"{family}, {name}", [end[rows] for end in ends]
    if np.array_equal(found, expected[rows]):
        if all(map(np.array_equal, ended, expected_ends)):
            return Case(EQUAL, program, accepted)
        message = f"{label}: the same tokens, but lengths and stops are {ended}, not {expected_ends}"
        return Case(FAILED, program, accepted, message)
    for i, row in enumerate(rows):
        if (differ := np.flatnonzero(found[i] != expected[row])).size:
            at, length = int(differ[0]), int(lengths[row])
            answer = expected[row, :at].tolist()
            one = jax.tree.map(lambda x, row=row: x[row : row + 1], (sampling, stop))
            places = prompts[row, :length].tolist(), answer, *one, constraints.of([row])
            if not _is_tie(target, *places, int(expected[row, at]), int(found[i, at])):
                message = f"{label}: row {row} from token {at}: {found[i].tolist()}, not {expected[row].tolist()}"
                return Case(FAILED, program, accepted, message)
    return Case(TIED, program, accepted)


def _constraints(mode: str, draw: np.random.Generator, stops: np.ndarray) -> Constraints:
    """Rules of each row, and grammars of about two thirds, which have no rules beside them that the engine refuses."""
    if mode == "free":
        return Constraints()
    with_grammar = (draw.random(ROWS) < (2 / 3 if mode == "grammars" else 0)).tolist()
    grammars = tuple(int(draw.integers(2**32)) if there else None for there in with_grammar)
    rules = tuple(_rules(draw, stops[i], with_grammar[i]) for i in range(ROWS))
    return Constraints(rules, grammars if mode == "grammars" else ())


def _rules(draw: np.random.Generator, stops: np.ndarray, beside_grammar: bool) -> RowRules:
    """A mixture of rules that leaves a token."""
    while True:
        words = [draw.integers(0, V, draw.choice((1, 2, 2, 3))).tolist() for _ in range(draw.integers(0, 40))]
        rules = RowRules(
            logit_bias={int(t): float(draw.uniform(-4, 4)) for t in draw.integers(0, V, draw.choice((0, 6)))},
            repetition_penalty=float(draw.choice((1.0, 1.0, 1.3, 0.8, 3.0))),
            presence_penalty=float(draw.choice((0.0, 0.0, 0.7, -0.5))),
            frequency_penalty=float(draw.choice((0.0, 0.0, 0.4, -0.3))),
            **{}
            if beside_grammar
            else dict(
                allowed_token_ids=draw.permutation(V)[: draw.choice((3, 20))].tolist() if draw.random() < 0.4 else None,
                bad_words=words if draw.random() < 0.6 else (),
                min_tokens=int(draw.choice((0, 0, 3, MAX_NEW))),
            ),
        )
        try:
            rules.check(V, [int(t) for t in stops if t != NO_STOP])
        except UserError:
            continue
        return rules


def _said(
    target: Any, drafter: Any, asked: Any, constraints: Constraints, tree: TreeSpec, shared_noise: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The tokens, their number, whether a stop token ended them, of each row; and how many guesses were accepted."""
    sampling, stop = asked[2:]
    options: dict[str, Any] = dict(tree=tree, shared_noise=shared_noise)
    rules = jax.tree.map(jnp.asarray, make_rules(constraints.rules, V)) if constraints.rules else None
    if not constraints.grammars:
        made = generate_jit(target, drafter, *asked, rules, **SIZES, **options)
        values = made.tokens, made.lengths, made.stopped
        return *map(np.asarray, values), int(made.statistics.accepted_at.sum())
    first = np.stack([_allowed(seed, []) for seed in constraints.grammars])
    of_first = rules._replace(bias=jnp.where(first, rules.bias, BANNED))
    state, vocab = start(target, drafter, *asked, of_first, num_levels=num_levels_of(drafter, tree), **SIZES)
    while not np.asarray(state.done).all():
        drafted = _draft(drafter, vocab, state, sampling, rules, **options)
        answers = [
            row[:n].tolist() for row, n in zip(np.asarray(state.emitted), np.asarray(state.num_emitted), strict=True)
        ]
        masks = _masks(constraints.grammars, answers, *map(np.asarray, drafted[0][:2]))
        state = _verify(target, drafter, state, drafted, sampling, stop, rules, jnp.asarray(masks), tree=tree)
    tokens = state.emitted[:, :MAX_NEW]
    last = jnp.take_along_axis(tokens, state.num_emitted[:, None] - 1, axis=1)
    values = tokens, state.num_emitted, is_stop(last, stop)[:, 0]
    return *map(np.asarray, values), int(state.statistics.accepted_at.sum())


@functools.partial(jax.jit, static_argnames=("tree", "shared_noise"))
def _draft(drafter: Any, vocab: Any, state: Any, sampling: Any, rules: Any, *, tree: Any, shared_noise: bool) -> Any:
    return draft_tree(drafter, vocab, state, sampling, rules, tree=tree, shared_noise=shared_noise)


@functools.partial(jax.jit, static_argnames="tree")
def _verify(
    target: Any, drafter: Any, state: Any, drafted: Any, sampling: Any, stop: Any, rules: Any, masks: Any, *, tree: Any
) -> Any:
    verified = verify(target, drafter, state, drafted[0], sampling, stop, rules, masks, tree=tree)
    return commit_path(drafter, state, drafted[1], verified, stop, tree=tree)


def _allowed(seed: int | None, answer: list[int]) -> np.ndarray:
    """Which tokens a grammar lets come after the beginning of an answer, bool [V]: a few, half, or nearly all."""
    if seed is None:
        return np.ones(V, bool)
    draw = np.random.default_rng([seed, *answer])
    allowed = draw.random(V) < draw.choice((0.05, 0.5, 0.95))
    allowed[draw.integers(V)] = True
    return allowed


def _masks(grammars: Any, answers: list[list[int]], tokens: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """The masks uint32 [B, M, V / 32] of trees int32 [B, M] whose roots end the answers; a parent stands before it."""
    masks = np.zeros((*tokens.shape, -(-V // 32)), np.uint32)
    for row, (seed, answer) in enumerate(zip(grammars, answers, strict=True)):
        paths: list[list[int]] = []
        for node, (token, parent) in enumerate(zip(tokens[row].tolist(), parents[row].tolist(), strict=True)):
            paths.append(answer if parent == NO_PARENT else [*paths[parent], max(token, 0)])
            masks[row, node] = _packed(_allowed(seed, paths[-1]))
    return masks


def _packed(allowed: np.ndarray) -> np.ndarray:
    """bool [V] as bits, uint32 [V / 32]."""
    return np.packbits(np.pad(allowed, (0, -V % 32)), bitorder="little").view(np.uint32)


def _is_tie(
    target: Any,
    prompt: list[int],
    answer: list[int],
    sampling: Any,
    stop: Any,
    constraints: Constraints,
    plain: int,
    drafted: int,
) -> bool:
    """Whether the drafted token would be chosen after prompt and answer, were its logit larger and the plain one's
    smaller by TIE."""
    prefix = prompt + answer
    tokens, positions = jnp.asarray(prefix, jnp.int32)[None], jnp.arange(len(prefix))[None]
    out = target(tokens, positions, Packed(jnp.ones_like(tokens), None))
    logits = target.logits(out.hidden[:, -1:]).astype(jnp.float32)
    masks = jnp.asarray(_packed(_allowed(*(constraints.grammars or (None,)), answer))[None, None])
    root = root_only(Accepted(None, tokens[:, -1:], jnp.ones(1, jnp.int32)))
    so_far = tokens, jnp.full(1, len(prefix) - 1), jnp.full(1, len(answer))
    for near in (logits.at[..., drafted].add(TIE).at[..., plain].add(-TIE), logits * (1 + TIE), logits * (1 - TIE)):
        ruled = keep_allowed(near, masks)
        if constraints.rules:
            rules = jax.tree.map(jnp.asarray, make_rules(constraints.rules, V))
            ruled = apply_rules(rules, stop.tokens, ruled, root, *so_far)
        if int(choose(ruled, jnp.full((1, 1), len(prefix)), sampling)[0, 0]) == drafted:
            return True
    return False


def mode_of(family: str) -> str:
    """What the rows of a family's programs may have."""
    return MODES[list(FAMILIES).index(family) // 2 % len(MODES)]  # in pairs: no drafter is left out of a mode


def _num_rows(family: str, name: str) -> int:
    """The rows of a program."""
    return 1 + (list(FAMILIES).index(family) + list(DRAFTERS).index(name)) % ROWS


@functools.cache
def _target(family: str) -> Any:
    """The shapes of a family's target; layers are a stack in every other one."""
    config = family_of_files(hf := hf_config(family, 1)).config.from_hf(hf)
    stacked = list(FAMILIES).index(family) % 2 == 0

    def make() -> Any:
        target = family_of(config).model(config, jax.random.key(0))
        return target if stacked else target.unstacked()

    return jax.eval_shape(make)


@functools.cache
def _drafter(family: str, name: str) -> Any:
    """The shapes of a drafter for it."""
    kind, changes, _ = DRAFTERS[name]
    target = _target(family)
    sizes: dict[str, Any] = dict(num_levels=LEVELS, feature_layers=(1, 2))
    config = default_config(target.config, kind=kind, **sizes, **changes)
    return jax.eval_shape(lambda: class_of(config)(config, jax.random.key(1), stacked=target.stacked))


def _drawn(shapes: Any, draw: np.random.Generator) -> Any:
    """The model of these shapes, with random weights: vectors about 1, matrices that keep the size of what they map."""
    sharpness = draw.choice((0.5, 1.0, 3.0))

    def values(leaf: Any) -> jax.Array:
        if len(leaf.shape) < 2:
            return jnp.asarray(1 + 0.3 * draw.standard_normal(leaf.shape), leaf.dtype)
        return jnp.asarray(draw.standard_normal(leaf.shape) * sharpness * leaf.shape[-2] ** -0.5, leaf.dtype)

    return jax.tree.map(values, shapes)


def main(argv: list[str] | None = None) -> int:
    """Prints the counts, and the failures; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="begin at this case: resumes a run that was stopped")
    parser.add_argument("--families", default=",".join(FAMILIES), help="some of them")
    args = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    began, counts = time.perf_counter(), collections.Counter[str]()
    programs, accepted = collections.Counter[str](), 0
    found = cases(args.families.split(","), args.seed, args.count, first=args.first)
    for number, case in enumerate(found, args.first + 1):
        counts[case.kind] += 1
        programs[case.program] += 1
        accepted += case.accepted
        if case.message:
            print(case.message, flush=True)
        if number % 500 == 0:
            so_far = f"{dict(counts)}; {accepted} guesses accepted, {time.perf_counter() - began:.0f} s"
            print(f"cases {args.first} to {number - 1}: {so_far}", file=sys.stderr, flush=True)
    num_programs = len(programs) + len({program.split(",")[0] for program in programs})
    seconds = time.perf_counter() - began
    print(
        f"seed {args.seed}: cases {args.first} to {args.count - 1} of {num_programs} programs, {counts[EQUAL]} equal, "
        f"{counts[TIED]} ties, {counts[FAILED]} failed; {accepted} guesses accepted, {seconds:.0f} s"
    )
    return int(counts[FAILED] > 0)


if __name__ == "__main__":
    sys.exit(main())
