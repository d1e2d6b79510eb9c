"""An engine on a mesh answers as on one device: rows split over data, weights over fsdp and tensor, heads over tensor.

Eight devices are simulated in one process; two processes of four devices each are real, and meet over the network.
Everything is float32 with the highest precision on a tiny target, whose answers have no near-ties.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

import fasteagle_jax.engine.engine
from fasteagle_jax import Completion, Engine, SamplingParams, UserError
from fasteagle_jax.commands.terminal import add_share_options
from fasteagle_jax.data.shares import connect
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.decoding.tree_selection import TreeSelector
from fasteagle_jax.devices.sharding import MeshShape, make_mesh, place_weights, shardings
from fasteagle_jax.drafters.files import load_drafter
from fasteagle_jax.engine import slots
from fasteagle_jax.engine.sizes import row_counts
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.targets.tokenizer import load_tokenizer
from tests.tiny_folder import make_drafter, make_target
from tests.two_processes import run_two_processes

TREE = TreeSpec("best_first", nodes=8)
SPLIT = MeshShape(2, 2, 2)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    """264 tokens, which eight devices divide."""
    return make_target(tmp_path_factory.mktemp("models") / "target", stop_rate=4.5, spare=5)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory, target) -> dict[str, Path]:
    """Random, with a draft vocabulary, and a window that answers outgrow or the target's own cache."""
    folder = tmp_path_factory.mktemp("models")
    kinds: dict[str, dict[str, Any]] = {kind: dict(kind=kind, window=16) for kind in ("fasteagle", "eagle3")}
    kinds["cheap"] = dict(context="target", levels="shared", side_by_side=True, edges=8, head="own")
    return {
        name: make_drafter(folder / name, target, draft_vocab_size=128, **changes) for name, changes in kinds.items()
    }


def load(target: Path, drafter: Path | None, shape: MeshShape | None = None, **changes: Any) -> Engine:
    mesh = None if shape is None else make_mesh(shape)
    return Engine.load(str(target), drafter, **(dict(slots=8, max_len=128, tree=TREE, mesh=mesh) | changes))


def mixed_requests() -> tuple[list[list[int]], list[SamplingParams]]:
    """More than there are slots: greedy, sampled and filtered, with stops, with n, two with a common beginning."""
    rng = random.Random(0)
    prompts, params = [], []
    for i in range(18):
        prompts.append([1 + j % 7 for j in range(70)] * (i % 9 == 0) + [rng.randrange(256) for _ in range(3 + i)])
        params.append(
            SamplingParams(
                temperature=[0.0, 1.0, 8.0][i % 3],  # at 8 the noise decides, and even this drafter guesses right
                top_k=20 * (i % 4 == 1),
                top_p=0.9 if i % 5 == 2 else 1.0,
                seed=i,
                max_new_tokens=16 + i % 24,
                stop=("e", "qz") if i % 6 == 5 else (),
                ignore_eos=i % 2 == 0,
                logprobs=i % 7 == 0,
                n=3 if i == 10 else 1,
            )
        )
    return prompts, params


def answer(engine: Engine, num: int = 18) -> list[Completion]:
    return engine.generate(*(of_all[:num] for of_all in mixed_requests()))


@pytest.fixture(scope="module")
def expected(target, drafters) -> list[Completion]:
    made = answer(load(target, drafters["fasteagle"]))
    assert sum(sum(completion.statistics.accepted_at) for completion in made) > 50  # guesses are at stake
    assert {completion.finish_reason for completion in made} == {"stop", "length"}
    return made


def compare(made: list[Completion], expected: list[Completion]) -> None:
    for ours, theirs in zip(made, expected, strict=True):
        same = ("prompt_index", "sample", "tokens", "text", "finish_reason")
        assert [getattr(ours, name) for name in same] == [getattr(theirs, name) for name in same]
        np.testing.assert_allclose(ours.logprobs or (), theirs.logprobs or (), rtol=1e-4, atol=1e-4)


# --- equality ---------------------------------------------------------------------------------------------------


@pytest.mark.slow  # in short: tests/commands/test_generate.py answers on a mesh
@pytest.mark.parametrize(
    ("shape", "kind", "slots", "lookup"),
    [
        (SPLIT, "fasteagle", 16, None),
        (MeshShape(8, 1, 1), "fasteagle", 8, None),
        (MeshShape(1, 4, 2), "eagle3", 4, None),
        (SPLIT, "cheap", 8, None),
        (SPLIT, "eagle3", 8, 4),
    ],
    ids=[
        "data2-fsdp2-tensor2",
        "data8",
        "fsdp4-tensor2-eagle3",
        "data2-fsdp2-tensor2-cheap",
        "data2-fsdp2-tensor2-eagle3-lookup",
    ],
)
def test_on_eight_devices_answers_are_those_of_one(
    target, drafters, expected, shape, kind, slots, lookup, compilations
):
    engine = load(target, drafters[kind], shape, slots=slots, lookup=lookup)
    compilations.clear()
    made = answer(engine)
    compare(made, expected)
    accepted, alone = (sum(sum(c.statistics.accepted_at) for c in answers) for answers in (made, expected))
    # The guesses are the same as well, but for a few that rounding turns; EAGLE-3's are others.
    assert accepted == pytest.approx(alone, rel=0.05) if kind == "fasteagle" else accepted > 30
    assert len(compilations) <= engine.most_programs
    compilations.clear()
    answer(engine, 12)
    assert compilations == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fasteagle", "cheap"])
def test_rules_and_grammars_on_eight_devices_are_those_on_one(target, drafters, kind, compilations):
    pytest.importorskip("llguidance", reason="of the extra `grammar`")
    rules: list[dict[str, Any]] = [
        dict(logit_bias={65: 4.0, 66: -2.0}, logprobs=2),
        dict(frequency_penalty=0.7, repetition_penalty=1.2, prompt_logprobs=1),
        dict(structured_outputs={"regex": "(ab|c){2,9}d"}),
        dict(allowed_token_ids=list(range(40, 90)), min_tokens=4),
        dict(structured_outputs={"json": {"type": "array", "items": {"type": "boolean"}, "maxItems": 6}}),
        {},
    ]
    prompts, params = [], []
    for i in range(12):
        prompts.append([1 + i, 50, 66, 7, 50, 66] * (1 + i % 3))
        params.append(SamplingParams(seed=i, temperature=[0.0, 1.0][i % 2], max_new_tokens=20, **rules[i // 2 % 6]))
    alone, split = load(target, drafters[kind]), load(target, drafters[kind], SPLIT)
    expected = alone.generate(prompts, params)
    compilations.clear()
    compare(split.generate(prompts, params), expected)
    assert len(compilations) <= split.most_programs_with_rules
    compilations.clear()
    compare(split.generate(prompts, params), expected)
    assert compilations == []


@pytest.mark.slow
def test_two_processes_of_four_devices_answer_as_one_device(target, drafters, expected, tmp_path):
    """Also where their clocks disagree about the faster tree."""
    script = "import sys; from tests.engine.test_engine_mesh import one_of_two; one_of_two(sys.argv[1:])"
    run_two_processes(script, [str(target), str(drafters["fasteagle"]), str(tmp_path)])
    said = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert said[0] == said[1]
    assert said[0]["tokens"] == [list(completion.tokens) for completion in expected[:6]]
    assert set(said[0]["trees"]) == {"None", str(TREE)}


def one_of_two(words: list[str]) -> None:
    """The program of each process: writes what it answered and with which trees."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folders", nargs=3, type=Path)
    add_share_options(parser, "the engine")
    args = parser.parse_args(words)
    connect(args)
    target, drafter, output = args.folders
    calls, trees, used = itertools.count(), (None, TREE), []
    first, advance = jax.process_index() == 0, slots.advance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TreeSelector, "unmeasured", lambda self, rows: [])
        patch.setattr(TreeSelector, "choose", lambda self, rows: trees[next(calls) % 2 if first else 0])
        patch.setattr(fasteagle_jax.engine.engine, "tree_choices", lambda *sizes: trees)
        patch.setattr(slots, "advance", lambda *a, **kw: used.append(str(kw["tree"])) or advance(*a, **kw))
        made = answer(load(target, drafter, SPLIT, slots=4, tree="auto"), 6)
    record = {"tokens": [completion.tokens for completion in made], "trees": used}
    (output / f"{jax.process_index()}.json").write_text(json.dumps(record))


# --- what moves, and what is where ------------------------------------------------------------------------------


class Collective(NamedTuple):
    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of what a device ends up with
    place: str  # where it comes from in the program
    dimension: int  # along which a gather joins parts; -1 of other kinds


def collectives(program: str) -> list[Collective]:
    """Those in the text of a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    found = []
    for line in program.splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(.*op_name=\"([^\"]*)\"", line):
            shapes = re.findall(r"[a-z]+\d*\[([\d,]*)\]", match[1])
            sizes = tuple(tuple(map(int, s.split(","))) if s else () for s in shapes)
            gathered = re.search(r" dimensions=\{(\d+)\}", line) if match[2] == "all-gather" else None
            found.append(Collective(match[2], sizes, match[3], int(gathered[1]) if gathered else -1))
    return found


def compile_round(target: Path, drafter: Path, tree: TreeSpec) -> tuple[Engine, slots.Slots, Any]:
    """An engine of 16 slots on eight devices, the shapes of these, and its compiled round."""
    mesh = make_mesh(SPLIT)
    loaded = load_target(str(target), stacked=True, mesh=mesh)
    config = loaded.checkpoint.config
    model = load_drafter(drafter, config, loaded.fingerprint, stacked=True, mesh=mesh)
    tokenizer = load_tokenizer(loaded.checkpoint.path)
    engine = Engine(loaded.model, model, tokenizer, (), slots=16, max_len=1000, tree=tree, mesh=mesh)
    with jax.set_mesh(mesh):
        empty = engine.runner.slots_shape(16)
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), empty, shardings(mesh, empty, slots.AXES)
        )
        ended, one, until = np.zeros(16, bool), np.int32(1), np.asarray(False)
        models = engine.target, engine.drafter, engine.runner.vocab
        lowered = slots.advance.lower(*models, placed, ended, one, until, tree=tree, shared_noise=True)
        return engine, empty, lowered.compile()


@pytest.mark.parametrize("kind", ["fasteagle", pytest.param("cheap", marks=pytest.mark.slow)])
def test_no_collective_moves_a_cache_or_a_weight(target, drafters, kind):
    """What a round exchanges are activations, of a device's own 8 rows: nothing is as long as a cache."""
    engine, empty, compiled = compile_round(target, drafters[kind], TREE)
    found = collectives(compiled.as_text())
    own = [] if kind == "cheap" else [empty.state.drafter_cache]
    lengths = {cache.k.shape[3] for cache in (empty.state.target_cache, *own)}
    assert lengths == ({1064} if kind == "cheap" else {1064, 144})
    assert {c.kind for c in found} >= {"all-reduce", "all-gather"}
    for c in found:
        if "/while/" in c.place:
            assert not lengths & {n for shape in c.shapes for n in shape}, c
            # Rows, or rows times levels or tokens as one dimension, come first; they are each device's own.
            assert c.kind != "all-gather" or ({shape[0] % 8 for shape in c.shapes} == {0} and c.dimension > 0), c
        else:  # once a call: what the host reads, and the features of the device's own rows
            assert c.kind == "all-gather" and set(c.shapes) <= {(16,), (16, 1064), (8, 3, 48)}, c
    caches = engine.memory.target_cache + engine.memory.drafter_cache
    assert compiled.memory_analysis().alias_size_in_bytes >= caches  # written in place


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fasteagle", "eagle3"])
def test_lookup_exchanges_nothing(target, drafters, kind):
    """Each device looks up in the text of its own rows."""
    without, with_lookup = (
        collections.Counter((c.kind, c.shapes) for c in collectives(compiled.as_text()))
        for _, _, compiled in (
            compile_round(target, drafters[kind], tree) for tree in (TREE, dataclasses.replace(TREE, lookup=4))
        )
    )
    assert with_lookup == without


def test_the_stated_memory_is_what_each_device_holds(target, drafters):
    engine = load(target, drafters["fasteagle"], SPLIT, slots=16)
    state = engine.runner.empty_slots(16).state

    def held(tree: Any) -> set[int]:
        sizes = dict.fromkeys(jax.devices(), 0)
        for x in jax.tree.leaves(tree):
            for shard in x.addressable_shards:
                sizes[shard.device] += shard.data.nbytes
        return set(sizes.values())

    memory = engine.memory
    assert held(state.target_cache) == {memory.target_cache}
    assert held(state.drafter_cache) == {memory.drafter_cache}
    assert held(engine.target) == {memory.target}
    assert held((engine.drafter, engine.runner.vocab.head)) == {memory.drafter - engine.runner.vocab.token_ids.nbytes}
    assert memory.target_cache < load(target, None, slots=16).memory.target_cache / 3.9


def test_a_weight_that_lies_the_other_way_round_is_turned_and_others_stay():
    mesh = make_mesh(MeshShape(1, 1, 8))
    value, axes = np.arange(2 * 4 * 16.0).reshape(2, 4, 16), {"gate": ("embed", "mlp")}
    split = shardings(mesh, {"gate": value}, axes)["gate"]
    other = jax.device_put(value, Format(Layout((0, 2, 1)), split))
    turned = place_weights(mesh, {"gate": other}, axes)["gate"]
    assert turned.format.layout.major_to_minor == (0, 1, 2) and turned.sharding == split
    np.testing.assert_array_equal(turned, value)
    assert place_weights(mesh, {"gate": turned}, axes)["gate"] is turned


# --- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "slots", "message"),
    [
        (MeshShape(8, 1, 1), 12, "slots is 12, which data 8 of the mesh does not divide: use a multiple of 8"),
        (MeshShape(1, 2, 4), 8, "tensor 4 of the mesh does not divide the target's 2 heads of K/V: use tensor 1, 2"),
        (MeshShape(3, 1, 1), 9, "mesh data 3 x fsdp 1 x tensor 1 does not fit 8 devices: use data x fsdp x tensor = "),
    ],
)
def test_meshes_that_do_not_divide_are_user_errors(target, drafters, shape, slots, message):
    with pytest.raises(UserError, match=message):
        load(target, drafters["fasteagle"], shape, slots=slots)


def test_numbers_of_rows_are_multiples_of_the_data_axis():
    assert [row_counts(16, ways) for ways in (1, 2, 4, 8)] == [(16, 4), (16, 4), (16,), (16,)]
    assert row_counts(64, 4) == (64, 16)
