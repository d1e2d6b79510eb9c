"""The drafters that come with the package: found by the target's weights."""

from __future__ import annotations

import pytest
from tiny_folder import make_drafter, make_target

from fasteagle_jax.bench.decoders import find_drafters, parse_decoders
from fasteagle_jax.decoding.acceptance import measure_acceptance
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.files import TENSORS, load_drafter
from fasteagle_jax.engine import shipped
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.loading import DEFAULT_TARGET, load_target, open_checkpoint
from fasteagle_jax.targets.tokenizer import encode_chat, load_tokenizer, stop_token_ids


def test_a_target_is_loaded_with_the_drafter_that_comes_for_it(tmp_path, monkeypatch):
    mine, other = make_target(tmp_path / "mine", seed=1), make_target(tmp_path / "other", seed=2)
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    folder = make_drafter(tmp_path / "shipped" / "mine", mine)
    sizes = dict(slots=1, max_len=64, tree="chain")
    assert Engine.load(str(mine), **sizes).drafter is not None
    assert Engine.load(str(mine), None, **sizes).drafter is None
    assert Engine.load(str(other), **sizes).drafter is None
    with pytest.raises(UserError, match="no folder .*nowhere: name a drafter's folder"):
        Engine.load(str(mine), tmp_path / "nowhere", **sizes)

    decoders = parse_decoders(["a=shipped@chain"], "best_first:16")
    assert [decoder.folder for decoder in find_drafters(decoders, str(mine))] == [None, folder]
    with pytest.raises(UserError, match="no drafter comes with this program for .*other"):
        find_drafters(decoders, str(other))


@pytest.mark.real
def test_the_default_target_has_one_that_loads():
    checkpoint = open_checkpoint(DEFAULT_TARGET)
    mark = fingerprint(checkpoint)
    folder = shipped.shipped(mark)
    assert folder is not None and (folder / "README.md").is_file()
    assert (folder / TENSORS).stat().st_size <= 40e6
    assert load_drafter(folder, checkpoint.config, mark).num_levels == 5  # undamaged, and of this target's sizes


QUESTIONS = [
    "What is the capital of France?",
    "Explain why the sky is blue.",
    "A train travels 60 km in 45 minutes. How fast is it?",
    "Write a Python function that reverses a string.",
]


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
