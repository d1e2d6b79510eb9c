"""`fasteagle import`: published EAGLE-3 drafters, of both families of names, become ours."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.commands.import_drafter import _LAYERS as LAYERS
from fasteagle_jax.commands.import_drafter import _feature_layers, eagle3_config, main
from fasteagle_jax.drafters.eagle3 import Eagle3
from fasteagle_jax.drafters.files import draft_vocabulary_ids, load_drafter, save_drafter
from fasteagle_jax.drafters.table import default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.targets.loading import load_target

IDS = np.arange(0, 259, 3)  # the draft vocabulary
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
}
ROPE = RopeConfig(theta=5e5, kind="llama3", factor=8.0)  # of drafters; the target's has a theta of 10,000


@pytest.fixture(scope="module")
def drafter(target_folder) -> Eagle3:
    target = load_target(str(target_folder)).model.config
    config = default_config(target, kind="eagle3", draft_vocab_size=len(IDS), rope=ROPE)
    made = Eagle3(config, jax.random.key(0), stacked=False)
    made.token_ids[...] = IDS
    return made


@pytest.fixture
def tensors(drafter, tmp_path) -> dict[str, np.ndarray]:
    """As we write them, which is as its authors do."""
    save_drafter(drafter, tmp_path / "ours", "x", {})
    return load_file(tmp_path / "ours" / "model.safetensors")


def published(folder: Path, config: dict) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def authors(folder: Path, tensors: dict) -> Path:
    """A pytorch_model.bin, with the embedding in it."""
    import torch

    published(folder, {"architectures": ["LlamaForCausalLMEagle3"], **SIZES, "draft_vocab_size": len(IDS)})
    values = {name: torch.from_numpy(np.asarray(value)) for name, value in tensors.items()}
    values["embed_tokens.weight"] = torch.zeros(259, 16)
    torch.save(values, folder / "pytorch_model.bin")
    return folder


def speculators(folder: Path, tensors: dict) -> Path:
    """Sizes nested, the layer numbered."""
    config = {"speculators_model_type": "eagle3", "transformer_layer_config": SIZES, "draft_vocab_size": len(IDS)}
    config["eagle_aux_hidden_state_layer_ids"] = [0, 1, 2]
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    config["transformer_layer_config"] = SIZES | {"rope_theta": 500000.0, "rope_scaling": scaling}
    published(folder, config)
    renamed = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    return folder


@pytest.mark.torch
@pytest.mark.parametrize("family", [pytest.param(authors, marks=pytest.mark.real), speculators])
def test_both_families_come_in_with_every_weight(drafter, tensors, target_folder, tmp_path, family):
    source, output = family(tmp_path / "source", tensors), tmp_path / "imported"
    argv = ["--source", source, "--target", target_folder, "--output", output]
    assert main([str(word) for word in argv]) == 0
    target = load_target(str(target_folder))
    loaded = load_drafter(output, target.model.config, target.fingerprint, stacked=False)
    assert loaded.num_levels == 8 and loaded.config.draft_vocab_size == len(IDS)
    np.testing.assert_array_equal(loaded.token_ids[...], IDS)
    found, expected = (
        {name: v[...].T if transposed else v[...] for name, v, transposed in d.stored()} for d in (loaded, drafter)
    )
    assert found.keys() == expected.keys() and len(found) == 14
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert loaded.feature_layers == ((0, 1, 2) if family is speculators else drafter.feature_layers)
    assert loaded.config.rope == ROPE if family is speculators else loaded.config.rope.theta == 10_000


def test_what_is_written_has_the_keys_of_a_published_drafter(drafter, tensors, target_folder, tmp_path):
    raw = json.loads((tmp_path / "ours/config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLMEagle3"] and raw["model_type"] == "llama"
    assert (raw["num_hidden_layers"], raw["num_attention_heads"], raw["num_key_value_heads"]) == (1, 4, 2)
    assert (raw["vocab_size"], raw["draft_vocab_size"], raw["tie_word_embeddings"]) == (259, len(IDS), False)
    argv = ["--source", tmp_path / "ours", "--target", target_folder, "--levels", 7, "--output", tmp_path / "again"]
    assert main([str(word) for word in argv]) == 0
    target = load_target(str(target_folder))
    assert load_drafter(tmp_path / "again", target.model.config, target.fingerprint).config == drafter.config


def test_a_drafter_of_the_whole_vocabulary_may_bring_a_map_of_zeros(tensors, target_folder, tmp_path):
    source = published(tmp_path / "source", SIZES)
    whole = {
        "lm_head.weight": np.ones((259, 16), np.float32),
        "d2t": np.zeros(259, np.int64),
        "t2d": np.ones(259, bool),
    }
    save_file(tensors | whole, source / "model.safetensors")
    argv = ["--source", source, "--target", target_folder, "--output", tmp_path / "imported"]
    assert main([str(word) for word in argv]) == 0
    target = load_target(str(target_folder))
    assert load_drafter(tmp_path / "imported", target.model.config, target.fingerprint).token_ids is None


@pytest.mark.parametrize("where", ["config.json", "eagle_config", "transformer_layer_config"])
def test_changes_of_the_model_are_read_wherever_they_stand(tensors, target_folder, where):
    """norm_before_residual inside eagle_config was ignored, and later refused."""
    changes = {"norm_before_residual": True, "norm_output": True}
    config = {
        "config.json": SIZES | changes,
        "eagle_config": SIZES | {"eagle_config": changes},
        "transformer_layer_config": {"transformer_layer_config": SIZES | changes},
    }[where]
    target = load_target(str(target_folder)).model.config
    read = eagle3_config(config, tensors, target, 8, (0, 1))
    assert read.norm_before_residual and read.norm_output and not read.fc_norm and not read.norm_before_fc


def test_an_embedding_of_its_own_is_told(tensors, target_folder, tmp_path, capsys):
    source = published(tmp_path / "source", SIZES)
    embedding = load_target(str(target_folder)).checkpoint.read("model.embed_tokens.weight")
    for scale in (1, 2):
        save_file(tensors | {"embed_tokens.weight": embedding * scale}, source / "model.safetensors")
        argv = ["--source", source, "--target", target_folder, "--output", tmp_path / f"imported{scale}"]
        assert main([str(word) for word in argv]) == 0
        assert ("it has an embedding of its own, and the target's is used" in capsys.readouterr().err) == (scale == 2)


def test_the_mask_of_the_vocabulary_agrees_with_the_offsets(tensors):
    assert tensors["d2t"].dtype == np.int64 and tensors["t2d"].dtype == bool
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), np.arange(len(IDS)) + tensors["d2t"])


@pytest.mark.parametrize(
    ("config", "layers", "told"),
    [
        ({LAYERS: [2, 6, 9]}, (2, 6, 9), ""),
        ({"transformer_layer_config": {LAYERS: [0, 3, 7]}}, (0, 3, 7), ""),
        ({"eagle_config": {LAYERS: [0, 3, 7]}}, (1, 4, 8), ""),
        ({"eagle_config": {LAYERS: [1, 5, 8]}, LAYERS: [2, 6, 9]}, (2, 6, 9), ""),
        ({LAYERS: [1, 5, 8]}, (2, 6, 9), "taken as counted by outputs, before layers (2, 6, 9)"),
        ({LAYERS: [0, 3, 6, 9]}, (0, 3, 6, 9), ""),
        ({LAYERS: [1, 5, 8], "feature_layers": [1, 5, 8]}, (1, 5, 8), ""),
        ({}, None, "has no eagle_aux_hidden_state_layer_ids: taken as EAGLE-3's own"),
    ],
    ids=str,
)
def test_every_spelling_of_the_layers_is_taken_rightly_and_told_when_guessed(config, layers, told):
    found, guess = _feature_layers(config, 12)
    assert found == layers
    assert told in guess and bool(told) == bool(guess)


def test_layers_that_contradict_or_are_none_are_refused():
    for config, says in (
        ({LAYERS: [2, 6, 9], "eagle_config": {LAYERS: [2, 6, 9]}}, r"before \(2, 6, 9\) by .* before \(3, 7, 10\) by"),
        ({LAYERS: []}, "is \\[\\]: give a list"),
        ({LAYERS: "2,6,9"}, "is '2,6,9': give a list"),
        ({LAYERS: [2, 6.5]}, "is .2, 6.5.: give a list"),
        ({LAYERS: [6, 2, 9]}, r"is \[6, 2, 9\]: give different layers in their order"),
        ({"eagle_config": {LAYERS: [2, 2, 9]}}, r"is \[2, 2, 9\]: give different layers in their order"),
    ):
        with pytest.raises(UserError, match=says):
            _feature_layers(config, 12)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(d2t=np.zeros(3, np.int64) - [0, 1, 2]), "d2t maps row 1 to token 0"),
        (dict(d2t=np.array([0, 3, 1])), "d2t maps row 2 to token 3"),
        (dict(d2t=np.array([-1, 0, 0])), "d2t maps row 0 to token -1"),
        (dict(d2t=np.array([0, 0, 7])), "guesses tokens up to 9, the target has 9"),
        (dict(d2t=np.array([0.0, 1, 2])), "d2t is float64"),
        (dict(d2t=np.array([0, 1, 2]), t2d=np.arange(9) < 3), "t2d and d2t disagree on token 1"),
        (dict(d2t=np.array([0, 1, 2]), t2d=np.ones(8, bool)), "t2d is of .8,. tokens, the target has 9"),
    ],
)
def test_a_map_that_is_not_increasing_ids_is_refused_by_its_first_bad_row(changes, says):
    with pytest.raises(UserError, match=f"^there: .*{says}"):
        draft_vocabulary_ids(changes, 9, "there")
    assert draft_vocabulary_ids(dict(d2t=np.array([0, 1, 2])), 9, "x").tolist() == [0, 2, 4]


def test_copies_of_the_targets_tensors_are_left_out_if_they_are_equal(tensors, target_folder, tmp_path, complaint):
    of_target = load_file(target_folder / "model.safetensors")
    head, norm = of_target["lm_head.weight"], of_target["model.norm.weight"]
    for i, copies in enumerate(({"verifier_lm_head.weight": head}, {"verifier_lm_head.weight": head[IDS]})):
        source = published(tmp_path / f"source{i}", SIZES)
        save_file(tensors | copies | {"verifier_norm.weight": norm}, source / "model.safetensors")
        argv = ["--source", source, "--target", target_folder, "--output", tmp_path / f"imported{i}"]
        assert main([str(word) for word in argv]) == 0
    other = published(tmp_path / "other", SIZES)
    for name, value in (("verifier_lm_head.weight", head + 1), ("verifier_norm.weight", norm[:8])):
        save_file(tensors | {name: value}, other / "model.safetensors")
        argv = ["--source", other, "--target", target_folder, "--output", tmp_path / "out"]
        assert f"{name} is not the target's" in complaint(main, *argv).splitlines()[-1]


@pytest.mark.torch
@pytest.mark.real
def test_a_damaged_file_of_torchs_is_one_line(complaint, target_folder, tmp_path):
    damaged = published(tmp_path / "damaged", SIZES)
    (damaged / "pytorch_model.bin").write_bytes(b"not a pickle")
    argv = ["--source", damaged, "--target", target_folder, "--output", tmp_path / "out"]
    assert "pytorch_model.bin cannot be read" in complaint(main, *argv)


def test_mistakes_are_one_line(complaint, tensors, target_folder, tmp_path):
    given = ["--target", target_folder, "--output", tmp_path / "out"]
    empty = published(tmp_path / "empty", SIZES)
    assert "neither model.safetensors nor pytorch_model.bin" in complaint(main, "--source", empty, *given)
    other = published(tmp_path / "other", SIZES | {"hidden_size": 32})
    save_file(tensors, other / "model.safetensors")
    assert "hidden_size 32, the target 16" in complaint(main, "--source", other, *given)
    less = published(tmp_path / "less", SIZES)
    save_file({name: value for name, value in tensors.items() if "q_proj" not in name}, less / "model.safetensors")
    assert "does not fit its config.json: midlayer.self_attn.q_proj" in complaint(main, "--source", less, *given)
    normed = published(tmp_path / "normed", {"transformer_layer_config": SIZES, "fc_norm": True})
    save_file(tensors, normed / "model.safetensors")
    assert "does not fit its config.json: fc_norm.0.weight" in complaint(main, "--source", normed, *given)
    for name, config in {
        "attention_bias, which is not supported": SIZES | {"eagle_config": {"attention_bias": True}},
        "both True": SIZES | {"eagle_config": {"fc_norm": True}, "norm_before_fc": True},
        "hidden_act 'gelu'": SIZES | {"hidden_act": "gelu"},
        "quantization_config": {"transformer_layer_config": SIZES, "quantization_config": {"quant_method": "fp8"}},
        "2 layers": SIZES | {"num_hidden_layers": 2},
        "eagle_config is 7": SIZES | {"eagle_config": 7},
    }.items():
        (normed / "config.json").write_text(json.dumps(config))
        assert name in complaint(main, "--source", normed, *given)
    larger = published(tmp_path / "larger", SIZES)
    save_file(tensors | {"d2t": tensors["d2t"] + 259}, larger / "model.safetensors")
    assert f"guesses tokens up to {max(IDS) + 259}, the target has 259" in complaint(main, "--source", larger, *given)
    deeper = published(tmp_path / "deeper", SIZES | {"eagle_aux_hidden_state_layer_ids": [0, 1, 30]})
    save_file(tensors, deeper / "model.safetensors")
    assert "feature_layers has 30, the target 2 layers" in complaint(main, "--source", deeper, *given)
    bare = published(tmp_path / "bare", {"hidden_size": 16})
    save_file(tensors, bare / "model.safetensors")
    assert "lacks intermediate_size" in complaint(main, "--source", bare, *given)
