"""Every drafter of the table, and a newcomer's: lossless with every tree, stored and loaded, in the engine, measured.

A newcomer writes what `LinearHeads` is here, a class in a file of its own, and one line of drafters/table.py.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fasteagle_jax import Engine, SamplingParams
from fasteagle_jax.commands.bench import main as bench
from fasteagle_jax.decoding.interfaces import Accepted, Ranking, VocabWeights
from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import advance, start
from fasteagle_jax.decoding.state import State, make_stop
from fasteagle_jax.decoding.tree import Draft, TreeSpec, build
from fasteagle_jax.drafters import table
from fasteagle_jax.drafters.base import DrafterConfig, DrafterModule, draft_ids, rank
from fasteagle_jax.drafters.files import load_drafter, save_drafter
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.kv_cache import Cache
from fasteagle_jax.nn.linear import head_logits
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.targets.tokenizer import load_tokenizer
from tests.tiny_folder import make_target

N, MAX_NEW, CHUNK = 2, 16, 16
TREES = ["chain", "backbone:3", "best_first:8", "best_first:8+lookup:4"]
CHEAP = dict(
    context="target", levels="shared", side_by_side=True, reinject=True, edges=4, head="own", draft_vocab_size=100
)
# A kind of drafter by its name, and the changes of its configuration.
KINDS = {**{kind: (kind, {}) for kind in (*table.CLASSES, "linear_heads")}, "cheap": ("fasteagle", CHEAP)}


class LinearHeads(DrafterModule):
    """A newcomer's drafter: a linear map a level of the fused features at the last position, and the target's head."""

    architecture = "LinearHeadsDrafter"

    def __init__(self, config: DrafterConfig, key: jax.Array, dtype: Any = jnp.float32, *, stacked: bool = True):
        key_fc, key_maps = jax.random.split(key)
        super().__init__(config, key_fc, dtype)
        hidden = config.hidden_size
        self.maps = nnx.Param(jax.random.normal(key_maps, (config.num_levels, hidden, hidden), dtype) * hidden**-0.5)

    def unstacked(self) -> LinearHeads:
        return self

    def stacked_form(self) -> LinearHeads:
        return self

    def vocab_weights(self, target: Any) -> VocabWeights:
        return VocabWeights(target.embedding[...], target.head_rows(), None)

    def empty_cache(self, batch: int, num_slots: int, most_written: int) -> Cache:
        return Cache([], [], jnp.zeros((batch,), jnp.int32))  # a position and nothing else

    def extend(self, vocab: VocabWeights, new: Accepted, cache: Cache, num_levels: int, context: Any = ()) -> Cache:
        return cache._replace(length=cache.length + new.count)

    def draft(
        self, vocab: VocabWeights, new: Accepted, cache: Cache, tree: TreeSpec, ranking: Ranking, context: Any = ()
    ) -> tuple[Draft, Cache]:
        cache = self.extend(vocab, new, cache, self.num_levels)
        row, last = jnp.arange(len(new.count)), jnp.maximum(new.count - 1, 0)
        g = self.fused(new.features)[row, last]  # [B, H]
        maps = self.maps[...][: tree.num_levels(self.num_levels)]
        logits = head_logits(jnp.einsum("bh,nhk->bnk", g, maps), vocab.head)  # [B, N, V]
        positions = cache.length[:, None] + 1 + jnp.arange(len(maps))
        return build(tree, new.tokens[row, last], rank(logits, positions, draft_ids(vocab), ranking)), cache


@pytest.fixture(scope="module", autouse=True)
def newcomer():
    """The newcomer's line in the table."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(table.CLASSES, "linear_heads", LinearHeads)
        yield


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("all") / "target", stop_rate=-4)


@pytest.fixture(scope="module")
def loaded(target_folder):
    return load_target(str(target_folder))


@pytest.fixture(scope="module")
def tokenizer(target_folder):
    return load_tokenizer(target_folder)


@pytest.fixture(scope="module")
def drafters(loaded, tmp_path_factory):
    """A folder by kind, of random drafters."""
    folder = tmp_path_factory.mktemp("drafters")
    for name, (kind, changes) in KINDS.items():
        sizes = dict(num_levels=N, feature_layers=(0, 1))
        config = default_config(loaded.checkpoint.config, kind=kind, **sizes, **changes)

        def make(config: DrafterConfig = config) -> Any:
            drafter = table.class_of(config)(config, jax.random.key(1))
            drafter.feature_scale[...] = drafter.feature_scale[...] * 0.5
            return drafter

        save_drafter(jax.jit(make)(), folder / name, loaded.fingerprint, {})
    return folder


@pytest.fixture(params=KINDS, scope="module")
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def drafter(kind, drafters, loaded):
    return load_drafter(drafters / kind, loaded.checkpoint.config, loaded.fingerprint)


PROMPTS = [[72, 105], [1, 2, 3, 4, 5] * 6, [200], [7] * 17]
SAMPLING = make_sampling(4, temperature=[0.0, 0.0, 1.0, 1.0], top_p=[1.0, 1.0, 1.0, 0.9], seed=[0, 1, 2, 3])
STOP = make_stop(4, MAX_NEW)


def speculate(target, drafter, tree: TreeSpec) -> State:
    """The State at the end; all trees share the prefill's program."""
    prompts, lengths = pad_prompts(PROMPTS, CHUNK)
    sizes = dict(max_new=MAX_NEW, num_levels=N, chunk=CHUNK)
    state, vocab = start(target, drafter, prompts, lengths, SAMPLING, STOP, **sizes)
    return advance(target, drafter, vocab, state, SAMPLING, STOP, jnp.int32(MAX_NEW), tree=tree)


@pytest.fixture(scope="module")
def plain(loaded):
    return np.asarray(speculate(loaded.model, None, TreeSpec()).emitted[:, :MAX_NEW])


@pytest.mark.parametrize("tree", [*(pytest.param(tree, marks=pytest.mark.slow) for tree in TREES[:3]), TREES[3]])
def test_greedy_and_sampled_tokens_are_those_of_plain_decoding(loaded, drafter, plain, tree):
    state = speculate(loaded.model, drafter, TreeSpec.parse(tree))
    np.testing.assert_array_equal(state.emitted[:, :MAX_NEW], plain)
    statistics = jax.device_get(state.statistics)
    assert (1 + statistics.rounds + statistics.accepted_at.sum(axis=1) == MAX_NEW).all()
    assert statistics.accepted_at.shape == (4, N)


def test_a_drafter_saved_again_is_the_same_in_every_byte(loaded, drafter, kind, drafters, tmp_path):
    save_drafter(drafter, tmp_path / "again", loaded.fingerprint, {})
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (drafters / kind / file).read_bytes()
    damaged = bytearray((drafters / kind / "model.safetensors").read_bytes())
    damaged[-3] ^= 1
    (tmp_path / "again" / "model.safetensors").write_bytes(damaged)
    with pytest.raises(UserError, match="has the SHA-256"):
        load_drafter(tmp_path / "again", loaded.checkpoint.config, loaded.fingerprint)


@pytest.mark.parametrize(  # FastEagle: see tests/engine/test_engine.py
    "kind",
    [kind if kind == "linear_heads" else pytest.param(kind, marks=pytest.mark.slow) for kind in list(KINDS)[1:]],
    indirect=True,
)
def test_the_engine_answers_as_without_a_drafter(loaded, drafter, tokenizer, plain):
    engine = Engine(loaded.model, drafter, tokenizer, (), slots=1, max_len=64, tree="best_first:8", chunk=CHUNK)
    rows = [dict(temperature=0.0), dict(temperature=0.0), dict(temperature=1.0), dict(temperature=1.0, top_p=0.9)]
    params = [SamplingParams(seed=i, max_new_tokens=MAX_NEW, **row) for i, row in enumerate(rows)]
    answers = engine.generate(PROMPTS, params)
    assert [list(answer.tokens) for answer in answers] == plain.tolist()


@pytest.mark.slow  # the benchmark knows no kind of drafter; its own tests run FastEagle
def test_the_newcomer_runs_in_the_benchmark(target_folder, drafters, tmp_path, capsys):
    """Beside a simulated one, in a sweep, whose points are benchmarks."""
    (tmp_path / "talk.jsonl").write_text(json.dumps({"turns": ["Hi?"]}) + "\n")
    argv = ["--target", target_folder, "--tasks", tmp_path / "talk.jsonl", "--max-new", 13, "--repeats", 1]
    argv += ["--drafters", f"mine={drafters / 'linear_heads'}@best_first:8,simulated=1@chain"]
    argv += ["--sweep", "levels", "--results", tmp_path / "results"]
    assert bench([str(word) for word in argv]) == 0
    assert "mine" in capsys.readouterr().out
    assert sorted(file.name for file in (tmp_path / "results").iterdir()) == ["levels.png", "results.json"]
    report = json.loads((tmp_path / "results/results.json").read_text())
    points = [(point["drafter"], point["value"], point["tree"]) for point in report["ablations"]]
    assert points == [("mine", 1, "best_first:8:1"), ("mine", 2, "best_first:8:2"), ("simulated", 1, "chain:1")]
    results = report["results"]
    assert [(r["drafter"], r["tree"]) for r in results] == [
        ("plain", None),
        *((name, tree) for name, _, tree in points),
    ]
    assert [len(r["accepted_at"]) for r in results] == [0, 1, 2, 1]
    assert results[-1]["target_passes"] == 6  # 12 tokens after prefill's, in rounds of two
    assert all(r["differing"] == [] for r in results) and report["compilations_while_timed"] == 0
