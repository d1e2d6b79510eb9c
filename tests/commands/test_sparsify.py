"""`fasteagle sparsify`: a Mixtral out of a tiny dense target."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file
from tiny_folder import make_target

from fasteagle_jax.commands.sparsify import main
from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.packing import PackedData
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from fasteagle_jax.targets.tokenizer import load_tokenizer, stop_token_ids
from fasteagle_jax.training import sparsify


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("dense") / "target")


def write_data(path: Path, num: int = 60) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for i in range(num):
        tokens = rng.integers(0, 250, size=40).tolist()
        lines.append(json.dumps({"id": str(i), "tokens": tokens, "assistant": [[8, 40]]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def packed(num_rows: int = 2, length: int = 64):
    rng = np.random.default_rng(1)
    texts = [Conversation.of(str(i), rng.integers(0, 250, size=30).tolist(), [[5, 30]]) for i in range(8)]
    return jax.tree.map(jnp.asarray, PackedData(texts, length, num_rows, 0).batch(0))


def test_neurons_that_fire_together_stand_together_in_groups_of_equal_size():
    rng = np.random.default_rng(0)
    of_group = np.abs(rng.standard_normal((50, 4)))
    membership = rng.permutation(np.repeat(np.arange(4), 8))
    activity = of_group[:, membership] * rng.uniform(0.5, 2, size=32) + 0.01 * rng.uniform(size=(50, 32))
    order = sparsify.balanced_groups(activity, 4, seed=0)
    assert sorted(order) == list(range(32))
    groups = membership[order].reshape(4, 8)
    assert (groups == groups[:, :1]).all()


def test_with_all_groups_chosen_alike_it_is_the_dense_mlp(dense):
    target = load_target(str(dense), stacked=False).model
    mlp, x = target.layers[0].mlp, jax.random.normal(jax.random.key(0), (20, 16))
    whole = sparsify.grouped(mlp, x, 4, 4, seed=0)
    whole.router.set_matrix(jnp.zeros(whole.router.matrix.shape))
    np.testing.assert_allclose(whole(x), mlp(x), atol=1e-5)
    half = sparsify.grouped(mlp, x, 4, 2, seed=0)
    weights = half.weights(x)
    assert ((weights > 0).sum(axis=-1) == 2).all() and np.allclose(weights.sum(axis=-1), 2, atol=1e-5)
    # Nearer to the dense one than with any two groups of all tokens.
    error = float(jnp.square(half(x) - mlp(x)).sum())
    fixed = []
    for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        neurons = half.mlp.neurons(x).reshape(20, 4, -1).at[:, np.setdiff1d(range(4), pair)].set(0)
        fixed.append(float(jnp.square(half.mlp.down(neurons.reshape(20, -1)) - mlp(x)).sum()))
    assert error < min(fixed)


@pytest.mark.slow
def test_the_distillation_learns_in_the_layers_alone_and_uses_experts_alike(dense):
    target, batch = load_target(str(dense), stacked=False).model, packed()
    student = sparsify.sparsified(target, batch, 4, 2, seed=0)
    graph, params, rest = nnx.split(student, sparsify.is_trained, ...)
    before = sparsify.quality(student, target, batch)
    same = sparsify.quality(target, target, batch)
    assert int(same.hits) == int(same.count) == int(before.count) > 50
    optimizer = sparsify.optax.adam(3e-3)
    step = sparsify.make_distil_step(graph, optimizer, sparsify.Distillation(share=1.0, dtype="float32"), seed=0)
    state, losses = optimizer.init(params), []
    for number in range(60):
        params, state, found = step(params, state, rest, target, batch, number)
        losses.append(np.asarray(found))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert all(1 - 1e-3 < balance < 2 for _, balance in losses)  # 1 if all are alike, E / k = 2 if the same are chosen
    after = sparsify.quality(nnx.merge(graph, params, rest), target, batch)
    assert int(after.hits) > int(before.hits)
    assert not any("layers" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(rest))


@pytest.mark.slow
def test_what_is_written_is_a_mixtral_that_says_what_the_student_says(dense, tmp_path, capsys):
    data = write_data(tmp_path / "answers.jsonl")
    argv = ["--target", dense, "--data", data, "--output", tmp_path / "sparse", "--experts", 4, "--chosen", 2]
    argv += ["--steps", 4, "--every", 2, "--length", 64, "--rows", 2, "--dtype", "float32", "--show", 2, "--within", 9]
    assert main([str(word) for word in [*argv, "--every", 4]]) == 0
    said = capsys.readouterr().out
    assert (
        "step 0: perplexity" in said and "step 4: perplexity" in said and "dense 2: " in said and "sparse 2: " in said
    )
    counts = [float(part.split(": ")[1]) for part in said.split("tokens choose: ")[1].split("\n")[0].split(", ")]
    assert len(counts) == 4  # no text has 60 tokens
    assert counts[0] == 2 < counts[1] and counts == sorted(counts) and counts[-1] <= 4

    perplexities = [said.split(f"{name}: perplexity ")[1].split(",")[0] for name in ("step 4", "as written")]
    assert float(perplexities[0]) == pytest.approx(float(perplexities[1]), rel=1e-5)
    made = load_target(str(tmp_path / "sparse"), stacked=False)
    assert made.checkpoint.config.num_experts == 4 and made.checkpoint.config.experts_per_token == 2
    # The written target computes what a student with its weights does.
    target, batch = load_target(str(dense), stacked=False).model, packed()
    student = sparsify.sparsified(target, batch, 4, 2, seed=0)
    tensors = sparsify.mixtral_tensors(student)
    path = tmp_path / "sparse/model.safetensors"
    save_file(load_file(path) | tensors, path)
    again = load_target(str(tmp_path / "sparse"), stacked=False).model
    args = batch.tokens, batch.positions, Packed(batch.segments)
    real = np.asarray(batch.segments) > 0
    np.testing.assert_allclose(again(*args).hidden[real], student(*args).hidden[real], atol=2e-4)


@pytest.mark.slow
def test_a_scaled_rope_and_the_ends_go_with_it(tmp_path):
    folder = make_target(tmp_path / "target")
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"rope_theta": 5e5, "rope_scaling": scaling | {"original_max_position_embeddings": 256}}
    (folder / "config.json").write_text(json.dumps(raw))
    argv = ["--target", folder, "--data", write_data(tmp_path / "answers.jsonl"), "--output", tmp_path / "sparse"]
    argv += ["--experts", 4, "--chosen", 2, "--steps", 1, "--length", 64, "--rows", 2, "--show", 0]
    assert main([str(word) for word in argv]) == 0
    theirs, ours = (open_checkpoint(str(path)) for path in (folder, tmp_path / "sparse"))
    assert ours.config.rope == theirs.config.rope
    ends = [stop_token_ids(load_tokenizer(found.path), found.path) for found in (theirs, ours)]
    assert ends[0] and set(ends[0]) == set(ends[1])


def test_mistakes_are_one_line(dense, tmp_path, complaint):
    data = write_data(tmp_path / "answers.jsonl")

    def of(*words: object) -> str:
        return complaint(main, "--target", dense, "--data", data, "--output", tmp_path / "out", *words)

    assert "--experts 5 does not divide 32 neurons" in of("--experts", 5)
    assert "leaves nothing out" in of("--experts", 4, "--chosen", 4)
    assert "--within 0.5 is below 1" in of("--within", 0.5)
    assert "--length 2048 is more than the target's 1024 positions" in of("--length", 2048)
    assert "learning_rate is 0.0" in of("--learning-rate", 0)
    few = write_data(tmp_path / "few.jsonl", 2)
    said = complaint(main, "--target", dense, "--data", few, "--output", tmp_path / "out")
    assert "none of 2 pieces are held out by a share of 0.02: give more data" in said
    assert "exists" in complaint(main, "--target", dense, "--data", data, "--output", tmp_path)
