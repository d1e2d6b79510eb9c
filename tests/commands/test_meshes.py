"""A run on a mesh is the run on one device: same losses, same drafter, checkpoints that fit every mesh.

Eight devices are simulated in one process; two processes of four devices each are real, and meet over the network.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.commands import prepare_features
from fasteagle_jax.data.conversations import Conversation, ConversationWriter
from fasteagle_jax.devices.sharding import MeshShape, make_mesh
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.linear import to_columns
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from fasteagle_jax.training import loop
from fasteagle_jax.training.config import RunConfig, apply_changes, load_config
from fasteagle_jax.training.loop import train
from tests.two_processes import run_two_processes

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "configs" / "tiny.py"
STEPS = 20
MESHES = ["data=8 fsdp=1", "data=1 fsdp=8", "data=1 fsdp=4 tensor=2", "data=2 fsdp=2 tensor=2"]
TAU = "tau best_first:32"
CLOSE = dict(rtol=2e-4, atol=1e-5)  # float32: sums over devices in another order, through twenty steps of AdamW


@pytest.fixture(scope="module")
def data_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("meshes") / "data.jsonl"
    rng = np.random.default_rng(0)
    with ConversationWriter(path) as writer:
        for i in range(60):
            tokens = [int(t) for t in (rng.integers(256) + np.arange(rng.integers(20, 60))) % 256]
            writer.append([Conversation.of(str(i), tokens, [[4, len(tokens)]])])
    return path


def changes(target: Path, data: Path, mesh: str = "", *more: str) -> list[str]:
    words = [f"target={target}", f"data={data}", f"steps={STEPS}", "batch_size=8", "save_every=10", "tensorboard=False"]
    words.append("drafter.num_levels=2")  # a third is another of the same
    sizes = dict(word.split("=") for word in mesh.split())
    if mesh:
        sizes = {"data": "1", "fsdp": "1", "tensor": "1"} | sizes
        words.append(f"mesh={sizes['data']},{sizes['fsdp']},{sizes['tensor']}")
    return [*words, *more]


def config(*words: str) -> RunConfig:
    return apply_changes(load_config(str(CONFIG)), words)


def losses(run: Path) -> np.ndarray:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return np.array([[record["loss"], record["gradient_norm"], *record["level_loss"]] for record in records])


@pytest.fixture(scope="module")
def target_folder(talkative) -> Path:
    """A target whose answers are long enough to be drafted."""
    return talkative[0]


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> list[str]:
    """A real decode at the last step."""
    questions = tmp_path_factory.mktemp("meshes") / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": "Why " + "so " * i + "long?"}) + "\n" for i in range(4)))
    return [f"evaluation.prompts={questions}", "evaluation.max_new=16", "evaluation.trees=best_first:32"]


@pytest.fixture(scope="module")
def one_device(target_folder, data_file, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("meshes") / "one"
    train(config(*changes(target_folder, data_file)), run, quiet=True)
    assert losses(run)[-1, 0] < 0.9 * losses(run)[0, 0]
    return run


@pytest.fixture(scope="module")
def run_on(target_folder, data_file, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a run of all steps on a mesh, made once."""

    @functools.cache
    def run_on(mesh: str) -> Path:
        run = tmp_path_factory.mktemp("meshes") / "run"
        train(config(*changes(target_folder, data_file, mesh)), run, quiet=True)
        return run

    return run_on


def assert_same_drafter(run: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "drafter" / "model.safetensors") for folder in (run, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-2, atol=2e-3, err_msg=name)


# The last one splits by every axis.
@pytest.mark.parametrize("mesh", [*(pytest.param(m, marks=pytest.mark.slow) for m in MESHES[:3]), MESHES[3]])
def test_twenty_steps_on_a_mesh_are_those_on_one_device(one_device, run_on, mesh):
    run = run_on(mesh)
    np.testing.assert_allclose(losses(run), losses(one_device), **CLOSE)
    assert_same_drafter(run, one_device)


@pytest.mark.slow  # the test above is of a mesh
def test_a_cascade_that_shares_its_layer_and_reads_the_targets_cache_trains_on_a_mesh_as_on_one_device(
    target_folder, data_file, tmp_path
):
    more = ["steps=8", "drafter.correction=None", "drafter.edges=8", "drafter.levels=shared", "drafter.context=target"]
    more += ["drafter.side_by_side=True", "drafter.head=own"]
    words = ["--config", CONFIG, "--output", tmp_path / "features", "--store", "float32"]
    assert prepare_features.main([*map(str, words), *changes(target_folder, data_file, "", *more)]) == 0
    stored = f"features={tmp_path / 'features'}"
    for folder, mesh, features in (("one", "", ""), ("mesh", MESHES[3], ""), ("stored", "", stored)):
        run = config(*changes(target_folder, data_file, mesh, *more), *[features] * bool(features))
        train(run, tmp_path / folder, quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "one"), **CLOSE)
    np.testing.assert_allclose(losses(tmp_path / "stored"), losses(tmp_path / "one"), **CLOSE)
    assert losses(tmp_path / "one")[-1, 0] < losses(tmp_path / "one")[0, 0]
    assert_same_drafter(tmp_path / "mesh", tmp_path / "one")


@pytest.mark.slow
def test_every_switch_of_the_loss_muon_and_held_out_rows_are_on_a_mesh_as_on_one_device(
    target_folder, data_file, tmp_path
):
    more = ["steps=4", "drafter.correction=None", "drafter.edges=8", "drafter.levels=shared", "drafter.context=shared"]
    more += ["loss.cross_entropy=0.1", "loss.total_variation=0.5", "loss.hybrid=0.4", "loss.expected_length=True"]
    more += ["loss.after_wrong=0.5", "loss.without_edges=1", "loss.curriculum=0.5", "loss.tv_last=0.25"]
    more += ["loss.chunk=256", "optimizer.name=muon", "held_out.share=0.2", "held_out.rows=9"]
    train(config(*changes(target_folder, data_file, "", *more)), tmp_path / "one", quiet=True)
    more.append("accumulate=2")
    train(config(*changes(target_folder, data_file, MESHES[3], *more)), tmp_path / "mesh", quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "one"), **CLOSE)
    assert_same_drafter(tmp_path / "mesh", tmp_path / "one")
    one, mesh = (json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("one", "mesh"))
    assert one["held-out expected length"] == pytest.approx(mesh["held-out expected length"], rel=2e-4)
    assert one["held-out expected length"] > 1


@pytest.mark.slow  # its step on a mesh: tests/training/test_deepkd.py
def test_deepkd_trains_on_a_mesh_in_microbatches_with_recomputation_as_on_one_device(
    target_folder, data_file, tmp_path
):
    more = ["steps=6", "loss.deepkd=True", "drafter.draft_vocab_size=250"]
    train(config(*changes(target_folder, data_file, "", *more)), tmp_path / "one", quiet=True)
    more += ["remat=dots", "accumulate=2"]
    train(config(*changes(target_folder, data_file, MESHES[3], *more)), tmp_path / "mesh", quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "one"), **CLOSE)
    assert_same_drafter(tmp_path / "mesh", tmp_path / "one")
    one, mesh = (json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1]) for run in ("one", "mesh"))
    assert one["left_out"] == mesh["left_out"] and one["kept_classes"] == mesh["kept_classes"] == 249
    for part in ("task", "target_class", "non_target"):
        assert one[f"loss_{part}"] == pytest.approx(mesh[f"loss_{part}"], rel=2e-4)
        assert one[f"signal_to_noise_{part}"] == pytest.approx(mesh[f"signal_to_noise_{part}"], rel=1e-2, abs=1e-3)


@pytest.mark.slow  # on one device its step: tests/training/test_step.py
@pytest.mark.parametrize("mesh", ["", MESHES[3]])
def test_recomputation_and_accumulation_change_nothing_but_rounding(
    one_device, target_folder, data_file, tmp_path, mesh
):
    more = ["remat=dots", "accumulate=2"]
    train(config(*changes(target_folder, data_file, mesh, *more)), tmp_path / "run", quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one_device), **CLOSE)


@pytest.mark.parametrize(
    ("mesh", "others"),
    [
        (MESHES[3], [(1, "", STEPS)]),
        pytest.param(MESHES[2], [(4, "data=2 fsdp=1 tensor=2", 16), (1, "", STEPS)], marks=pytest.mark.slow),
    ],
    ids=["8 and 1", "8 and 4 and 1"],
)
def test_a_checkpoint_goes_on_on_other_meshes(one_device, run_on, target_folder, data_file, tmp_path, mesh, others):
    """Eight devices, then fewer; and on the same mesh bitwise."""
    parts, start = tmp_path / "parts", 0
    whole = run_on(mesh)
    for num_devices, next_mesh, steps in ((8, mesh, 10), *others):
        run = config(*changes(target_folder, data_file, next_mesh))
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            patch.setattr(loop, "make_mesh", functools.partial(make_mesh, devices=jax.devices()[:num_devices]))
            if steps < STEPS:
                stop_after(patch, steps, start)
                stack.enter_context(pytest.raises(SystemExit))
            train(run, parts, allow_change=True, quiet=True)
        assert len(losses(parts)) == steps
        start = steps
    np.testing.assert_array_equal(losses(parts)[:10], losses(whole)[:10])
    np.testing.assert_allclose(losses(parts), losses(one_device), **CLOSE)


def stop_after(patch: pytest.MonkeyPatch, steps: int, start: int) -> None:
    """Lets SIGTERM come to a run in its step `steps`; it begins after step `start`."""
    done = itertools.count(start + 1)

    def ask(self: loop._Sigterm) -> bool:
        self.came = next(done) >= steps
        return self.came

    patch.setattr(loop._Sigterm, "ask", ask)


def test_weights_go_straight_into_their_shards(target_folder):
    mesh = make_mesh(MeshShape(data=1, fsdp=4, tensor=2))
    whole = load_target(str(target_folder))
    to_columns(whole.model)
    for stacked in (True, False):
        sharded = load_target(str(target_folder), stacked=stacked, mesh=mesh)
        layers = sharded.model.layers if stacked else sharded.model.layers[1]
        shard = layers.mlp.gate.weight[...].addressable_shards[0].data
        assert shard.size == layers.mlp.gate.weight[...].size // 8
        ours = layers.mlp.gate.weight[...][1] if stacked else layers.mlp.gate.weight[...]
        np.testing.assert_array_equal(ours, whole.model.layers[1].mlp.gate.weight[...])


# Two runs, one after the other, of one process of several; it says which rows of batches it built.
PROCESS = """
import sys
from fasteagle_jax.commands import train_drafter
from fasteagle_jax.data.packing import PackedData
built, batch = set(), PackedData.batch
def recorded(self, step, rows=None):
    built.add((rows.start, rows.stop))
    return batch(self, step, rows)
PackedData.batch = recorded
at = sys.argv.index("then")
code = train_drafter.main(sys.argv[1:at])
train_drafter.connect = lambda args: True
code = code or train_drafter.main(sys.argv[at + 1 :])
print(sorted(built))
sys.exit(code)
"""


@pytest.mark.slow  # the engine's test of two processes is the short form
def test_two_processes_of_four_devices_are_one_device(one_device, target_folder, data_file, evaluation, tmp_path):
    """From the first step, and from a checkpoint of one process; each reads its own rows of the data alone."""
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    shutil.copytree(one_device, resumed)
    shutil.rmtree(resumed / "drafter")
    shutil.rmtree(resumed / "checkpoints" / str(STEPS))
    words = changes(target_folder, data_file, "data=2 fsdp=2 tensor=2")
    then = ["then", "--config", str(CONFIG), "--run", str(resumed), "--allow-change", *words]
    said = run_two_processes(PROCESS, ["--config", str(CONFIG), "--run", str(run)], [*words, *evaluation, *then])
    assert [out.splitlines()[-1] for out, _ in said] == ["[(0, 2), (2, 4)]", "[(4, 6), (6, 8)]"]
    assert "resume    from step 10" in said[0][1]
    alone = tmp_path / "alone"
    train(config(*changes(target_folder, data_file, "", *evaluation)), alone, quiet=True)
    for folder in (run, resumed):
        np.testing.assert_allclose(losses(folder), losses(one_device), **CLOSE)
        assert_same_drafter(folder, one_device)
    one, two = (json.loads((f / "metrics.jsonl").read_text().splitlines()[-1])[TAU] for f in (alone, run))
    # Rounding may turn a guess of the drafter, of some thirty; the text is the target's in any case.
    assert one > 1.3 and two == pytest.approx(one, abs=0.05)


@pytest.mark.parametrize(
    ("mesh", "more", "message"),
    [
        (
            "data=3 fsdp=1",
            [],
            "mesh data 3 x fsdp 1 x tensor 1 does not fit 8 devices: use data x fsdp x tensor = 1 x 1 x 8",
        ),
        ("data=8 fsdp=1", ["batch_size=12"], "batch_size 12 is not divisible by data x fsdp = 8: use a multiple of 8"),
        ("data=0 fsdp=1", [], "give whole numbers of at least 1"),
        ("data=-1 fsdp=-1", [], "at most once"),
    ],
)
def test_meshes_that_do_not_fit_are_user_errors(target_folder, data_file, tmp_path, mesh, more, message):
    assert jax.device_count() == 8
    with pytest.raises(UserError, match=message):
        train(config(*changes(target_folder, data_file, mesh, *more)), tmp_path / "run", quiet=True)


# --- features stored before -------------------------------------------------------------------------------------


@pytest.mark.slow  # stored features are those that training computes: test_prepare_features.py
@pytest.mark.parametrize("mesh", ["", MESHES[3]])
def test_training_on_stored_features_is_training_on_the_target(one_device, target_folder, data_file, tmp_path, mesh):
    words = ["--config", CONFIG, "--output", tmp_path / "features", "--store", "float32"]
    assert prepare_features.main([*map(str, words), *changes(target_folder, data_file)]) == 0
    words = changes(target_folder, data_file, mesh, f"features={tmp_path / 'features'}")
    train(config(*words), tmp_path / "run", quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(one_device), **CLOSE)


# --- two layers of a real model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_real_layers(tmp_path_factory) -> Path:
    """The first two layers of SmolLM2-135M between its embedding and its head."""
    checkpoint = open_checkpoint("smollm2-135m")
    folder = tmp_path_factory.mktemp("real") / "target"
    folder.mkdir()
    kept = [name for name in checkpoint.names() if not name.startswith("model.layers.") or name.split(".")[2] in "01"]
    save_file({name: np.ascontiguousarray(checkpoint.read(name)) for name in kept}, folder / "model.safetensors")
    c = checkpoint.config
    sizes = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 2,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope.theta,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


FEW = [
    "drafter.num_levels=2",
    "drafter.draft_vocab_size=1024",
    "length=16",
    "loss.share=0.1",
    "optimizer.learning_rate=1e-4",
]


@pytest.fixture(scope="module")
def real_losses(two_real_layers, data_file, tmp_path_factory) -> np.ndarray:
    """On one device."""
    run = tmp_path_factory.mktemp("real") / "run"
    train(config(*changes(two_real_layers, data_file, "", *FEW)), run, quiet=True)
    return losses(run)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_steps_with_two_real_layers_are_the_same_on_meshes(
    real_losses, two_real_layers, data_file, tmp_path, mesh
):
    """Three K/V heads of 64 channels over two devices: what does not divide evenly is split all the same."""
    train(config(*changes(two_real_layers, data_file, mesh, *FEW)), tmp_path / "run", quiet=True)
    np.testing.assert_allclose(losses(tmp_path / "run"), real_losses, **CLOSE)


@pytest.mark.real
@pytest.mark.slow
def test_twenty_steps_with_two_real_layers_are_the_same_in_two_processes(
    real_losses, two_real_layers, data_file, tmp_path
):
    script = "import sys; from fasteagle_jax.commands import train_drafter; sys.exit(train_drafter.main(sys.argv[1:]))"
    words = changes(two_real_layers, data_file, MESHES[-1], *FEW)
    said = run_two_processes(script, ["--config", str(CONFIG), "--run", str(tmp_path / "run")], words)
    np.testing.assert_allclose(losses(tmp_path / "run"), real_losses, **CLOSE)
    assert "slower    tensor 2 of the mesh does not divide the target's 3 heads of K/V: use tensor 1\n" in said[0][1]
