"""The drafters that come with the package: found by the target's weights."""

from __future__ import annotations

import pytest
from tiny_folder import make_drafter, make_target

from fasteagle_jax.bench.decoders import find_drafters, parse_decoders
from fasteagle_jax.drafters.files import TENSORS, load_drafter
from fasteagle_jax.engine import shipped
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.loading import DEFAULT_TARGET, open_checkpoint


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
