"""The drafters that come with the package: found by the target's weights."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny_folder import make_drafter, make_target

from fasteagle_jax.bench.decoders import find_drafters, parse_decoders
from fasteagle_jax.decoding.acceptance import measure_acceptance
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.files import TENSORS, TOKENIZER, load_drafter
from fasteagle_jax.engine import shipped
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.checkpoint import StoredTensor, fingerprint
from fasteagle_jax.targets.loading import DEFAULT_TARGET, load_target, open_checkpoint
from fasteagle_jax.targets.tokenizer import encode_chat, load_tokenizer, stop_token_ids


def test_a_target_is_loaded_with_the_drafter_that_comes_for_it(tmp_path, monkeypatch):
    mine, other = make_target(tmp_path / "mine", seed=1), make_target(tmp_path / "other", seed=2, spare=1)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    folder = make_drafter(tmp_path / "shipped" / "mine", mine)
    sizes = dict(slots=1, max_len=64, tree="chain")
    assert Engine.load(str(mine), **sizes).drafter is not None
    assert Engine.load(str(mine), None, **sizes).drafter is None
    assert Engine.load(str(other), **sizes).drafter is None
    with pytest.raises(UserError, match="no folder .*nowhere: name a drafter's folder"):
        Engine.load(str(mine), tmp_path / "nowhere", **sizes)

    decoders = parse_decoders(["a=shipped@chain"], "best_first:16")
    assert [decoder.folder for decoder in find_drafters(decoders, open_checkpoint(mine))] == [None, folder]
    with pytest.raises(UserError, match="no drafter comes with this program for .*other"):
        find_drafters(decoders, open_checkpoint(other))


def test_a_target_of_other_weights_has_the_drafter_of_one_of_its_sizes_and_tokenizer_with_a_warning(
    tmp_path, monkeypatch, caplog
):
    """The same model in other storage was decoded plainly, without a word."""
    mine, alike = make_target(tmp_path / "mine", seed=1), make_target(tmp_path / "alike", seed=2)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    folder = make_drafter(tmp_path / "shipped" / "mine", mine)
    sizes = dict(slots=1, max_len=64, tree="chain")
    assert Engine.load(str(mine), **sizes).drafter is not None and not caplog.messages
    assert Engine.load(str(alike), **sizes).drafter is not None
    assert len(caplog.messages) == 1 and "answers stay exact, but fewer guesses may be accepted" in caplog.text
    exact = make_drafter(tmp_path / "shipped" / "other", alike)  # whose name comes after the first's
    assert shipped.drafter_folder("shipped", open_checkpoint(str(alike))) == exact
    shutil.rmtree(exact)

    raw = json.loads((folder / "config.json").read_text())
    for change in ({TOKENIZER: "0123456789abcdef"}, {TOKENIZER: None}, {"head_dim": 4}, {"feature_layers": [9]}):
        (folder / "config.json").write_text(json.dumps(raw | change))
        assert shipped.drafter_folder("shipped", open_checkpoint(str(alike))) is None, change
    (folder / "config.json").write_text(json.dumps(raw))
    for path in alike.glob("tokenizer*"):
        path.unlink()
    assert shipped.drafter_folder("shipped", open_checkpoint(str(alike))) is None


@pytest.mark.real
def test_the_default_target_has_one_that_loads():
    checkpoint = open_checkpoint(DEFAULT_TARGET)
    mark = fingerprint(checkpoint)
    folder = shipped.shipped(mark)
    assert folder is not None and (folder / "README.md").is_file()
    assert (folder / TENSORS).stat().st_size <= 40e6
    assert load_drafter(folder, checkpoint.config, mark).num_levels == 5  # undamaged, and of this target's sizes
    # As the hub's file has it, whose values are not rounded to GGUF's.
    norm = checkpoint.tensors["model.norm.weight"]
    other = {"model.norm.weight": StoredTensor(norm.shape, lambda num_rows: norm.load(num_rows) * 1.01)}
    checkpoint = dataclasses.replace(checkpoint, tensors={**checkpoint.tensors, **other})
    assert fingerprint(checkpoint) != mark and shipped.drafter_folder("shipped", checkpoint) == folder


QUESTIONS = [
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "A train travels 60 km in 45 minutes. How fast is it?",
    "Write a Python function that reverses a string.",
]


@pytest.mark.real
@pytest.mark.slow  # half a gigabyte is written, and the whole target decodes
def test_the_shipped_drafter_drafts_for_the_default_target_written_as_safetensors_by_others(tmp_path, caplog):
    """With one norm and one row of the embedding changed, as other storage rounds them otherwise."""
    checkpoint = open_checkpoint(DEFAULT_TARGET)
    c = checkpoint.config
    weights = {name: np.array(checkpoint.read(name), np.float32) for name in checkpoint.names()}
    weights["model.norm.weight"] *= 1.001
    weights["model.embed_tokens.weight"][5] *= 0.999
    save_file(weights, tmp_path / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope.theta,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(checkpoint.path)
    tokenizer.save_pretrained(tmp_path)
    engine = Engine.load(str(tmp_path), slots=1, max_len=256, tree="best_first:8")
    assert engine.drafter is not None
    assert [record.name for record in caplog.records] == ["fasteagle_jax.drafters.files"]
    prompt = encode_chat(load_tokenizer(tmp_path), [{"role": "user", "content": QUESTIONS[0]}])
    assert prompt == encode_chat(tokenizer, [{"role": "user", "content": QUESTIONS[0]}])
    found = measure_acceptance(engine.target, engine.drafter, [prompt], TreeSpec("best_first", nodes=8), max_new=64)
    assert found.length > 1.8, found


@pytest.mark.real
@pytest.mark.slow  # the whole target decodes, a minute
def test_the_shipped_drafter_is_accepted_as_often_as_it_was():
    """Exactness does not tell of a drafter that is loaded, scaled or asked wrongly; the acceptance length does."""
    loaded = load_target(DEFAULT_TARGET)
    path = loaded.checkpoint.path
    drafter = load_drafter(shipped.shipped(loaded.fingerprint), loaded.checkpoint.config, loaded.fingerprint)
    tokenizer = load_tokenizer(path)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    found = measure_acceptance(
        loaded.model,
        drafter,
        prompts,
        TreeSpec("best_first", nodes=8),
        max_new=64,
        stop_tokens=stop_token_ids(tokenizer, path),
    )
    assert found.length > 2.1, found  # 2.27, of 83 rounds
