"""Features on disk: what is read is what the target computes, whatever the packing, and damage never goes unnoticed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fasteagle_jax.data.conversations import Conversation
from fasteagle_jax.data.features import Features, FeatureSettings, TargetValues, load_features, write_features
from fasteagle_jax.data.packing import Batch, PackedData
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import sha256

T, B, H, LAYERS = 32, 3, 4, (1, 2)


def packed(T: int = T, B: int = B, seed: int = 0) -> PackedData:
    rng = np.random.default_rng(0)
    lengths = [3, T, T + 20, 3 * T, *(int(n) for n in rng.integers(3, 60, 30))]
    return PackedData(
        [Conversation.of(str(i), rng.integers(1, 90, n).tolist(), [[0, n]]) for i, n in enumerate(lengths)], T, B, seed
    )


def compute(batch: Batch) -> TargetValues:
    """A target whose values are known: of the token, its position and the sum of its segment up to it."""
    values = np.zeros((*batch.tokens.shape, 3 * H), np.float32)
    for b, row in enumerate(batch.segments):
        for t, segment in enumerate(row):
            seen = batch.tokens[b, : t + 1][row[: t + 1] == segment].sum()
            values[b, t] = np.arange(3 * H) + [batch.tokens[b, t], batch.positions[b, t], seen] * H
    return TargetValues(jnp.asarray(values[..., : 2 * H]), jnp.asarray(values[..., 2 * H :]))


def settings(data: PackedData, dtype: str = "float32") -> FeatureSettings:
    return FeatureSettings("fingerprint", LAYERS, H, data.digest(), data.T, dtype)


def write(folder: Path, data: PackedData, dtype: str = "float32", file_bytes: int = 4000) -> int:
    return sum(write_features(folder, data, settings(data, dtype), compute, file_bytes=file_bytes))


def read(folder: Path, data: PackedData) -> Features:
    return load_features(folder, data, "fingerprint", LAYERS, H)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_read_is_what_the_target_computes_for_the_batch(tmp_path, dtype):
    data = packed()
    assert write(tmp_path, data, dtype) == data.lengths.sum()
    assert all(len(raw) < 4000 + 1000 for raw in contents(tmp_path).values()) and len(contents(tmp_path)) > 5
    for other in (data, packed(seed=7), packed(B=5)):  # one set of features for all seeds and batch sizes
        features = read(tmp_path, other)
        for step in range(other.num_batches_per_epoch(0) + 2):
            batch = other.batch(step)
            expected, got = compute(batch), features.batch(step)
            real = batch.segments > 0
            for ours, theirs in zip(got, expected, strict=True):
                assert ours.dtype == jnp.dtype(dtype) and ours.shape == theirs.shape
                assert np.array_equal(ours[real], np.asarray(theirs.astype(dtype))[real])
                assert not ours[~real].any()


def test_features_of_some_of_the_stored_layers_are_read_in_the_order_asked_for(tmp_path):
    data = packed()
    write(tmp_path, data)
    both = read(tmp_path, data).batch(0)
    first, second = np.split(both.features, 2, axis=-1)
    for layers, expected in ((LAYERS[1:], second), (LAYERS[::-1], np.concatenate([second, first], axis=-1))):
        found = load_features(tmp_path, data, "fingerprint", layers, H).batch(0)
        assert np.array_equal(found.features, expected) and np.array_equal(found.hidden, both.hidden)


def test_hosts_read_only_their_rows(tmp_path):
    data = packed()
    write(tmp_path, data)
    features = read(tmp_path, data)
    whole = features.batch(1)
    parts = [features.batch(1, slice(start, end)) for start, end in ((0, 1), (1, 3))]
    for name in ("features", "hidden"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_a_run_stopped_after_any_file_goes_on_and_gives_the_same_folder(tmp_path):
    data = packed()
    write(tmp_path / "whole", data)
    whole = contents(tmp_path / "whole")
    for stop in range(len(whole)):
        writing = write_features(tmp_path / "a", data, settings(data), compute, file_bytes=4000)
        for _ in zip(range(stop), writing, strict=False):
            pass
        writing.close()
    write(tmp_path / "a", data)
    assert contents(tmp_path / "a") == whole


def test_a_killed_runs_leftovers_are_written_over(tmp_path):
    data = packed()
    write(tmp_path / "whole", data)
    writing = write_features(tmp_path / "a", data, settings(data), compute, file_bytes=4000)
    next(writing), next(writing)
    writing.close()
    (tmp_path / "a" / "features-00002.npy").write_bytes(b"torn, and not in the index")
    (tmp_path / "a" / ".features-00002.npy.tmp").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"of \d+ pieces: give the prepare-features command again"):
        read(tmp_path / "a", data)
    write(tmp_path / "a", data)
    assert contents(tmp_path / "a") == contents(tmp_path / "whole")


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    data = packed()
    write(tmp_path, data)
    before = contents(tmp_path)
    for _ in write_features(tmp_path, data, settings(data), lambda batch: pytest.fail("nothing is computed")):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_corrupt_file_is_named_and_made_anew(tmp_path, damage):
    data = packed()
    write(tmp_path, data)
    before = contents(tmp_path)
    path = tmp_path / "features-00003.npy"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw if damage == "bit" else raw[:-1])
    if damage == "gone":
        path.unlink()
    message = rf"features-00003\.npy is {'not there' if damage == 'gone' else 'corrupt'}: give the prepare-features"
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, data)
    assert "\n" not in str(caught.value)
    write(tmp_path, data, file_bytes=9999)  # the files there are keep their sizes
    assert contents(tmp_path) == before


def test_features_of_something_else_are_refused(tmp_path):
    data = packed()
    write(tmp_path, data)
    for other, said in (
        ({"target": "another"}, "target fingerprint, not another"),
        ({"feature_layers": (0, 2)}, r"feature_layers \[1, 2\], not \[0, 2\]"),
        ({"length": 16}, "length 32, not 16"),
        ({"dtype": "bfloat16"}, "dtype float32, not bfloat16"),
    ):
        changed = dataclasses.replace(settings(data), **other)
        with pytest.raises(UserError, match=said):
            Features(tmp_path, data, changed)
        with pytest.raises(UserError, match=said):
            list(write_features(tmp_path, data, changed, compute))
    with pytest.raises(UserError, match="data .*, not "):
        read(tmp_path, PackedData([Conversation.of("a", [1, 2, 3], [[0, 3]])], T, B, 0))
    with pytest.raises(UserError, match="dtype 'int8' of features: use bfloat16 or float32"):
        settings(data, "int8")


def test_a_folder_without_an_index_or_with_a_damaged_one_is_one_line(tmp_path):
    data = packed()
    with pytest.raises(UserError, match="holds no features"):
        read(tmp_path, data)
    write(tmp_path, data)
    index = tmp_path / "index.json"
    saved = json.loads(index.read_text())
    for text in ("{", "[]", "{}", json.dumps({**saved, "files": [{"file": "a"}]})):
        index.write_text(text)
        with pytest.raises(UserError, match=r"index\.json is damaged"):
            read(tmp_path, data)
    index.write_text(json.dumps({**saved, "files": saved["files"] * 2}))
    with pytest.raises(UserError, match="more pieces than the data"):
        write(tmp_path, data)


@pytest.mark.parametrize("changes", [{"file": "../secret.npy"}, {"file": 7}, {"pieces": [1]}, {"tokens": -1}])
def test_an_index_names_no_other_file_and_no_other_number(tmp_path, changes):
    """An index could name any file of the disk, and one with a list for a number was a traceback."""
    data = packed()
    write(tmp_path, data)
    index = tmp_path / "index.json"
    saved = json.loads(index.read_text())
    saved["files"][0] |= changes
    index.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"index\.json is damaged \(its entry 0 is"):
        read(tmp_path, data)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**43}, {2**43}), }}",
        "{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }",
        "(" * 5000,
    ],
    ids=["pickled", "terabytes", "another shape", "nested"],
)
def test_a_file_of_another_array_is_refused_though_its_checksum_is_right(tmp_path, header):
    data = packed()
    write(tmp_path, data)
    path, index = tmp_path / "features-00000.npy", tmp_path / "index.json"
    raw = path.read_bytes()
    path.write_bytes(raw[:8] + len(header).to_bytes(2, "little") + header.encode() + raw[128:])
    saved = json.loads(index.read_text())
    saved["files"][0]["sha256"] = sha256(path)
    index.write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"features-00000\.npy is corrupt \(.*give the prepare-features"):
        read(tmp_path, data)


def test_batches_can_go_to_a_device(tmp_path):
    data = packed()
    write(tmp_path, data, "bfloat16")
    values = jax.tree.map(jnp.asarray, read(tmp_path, data).batch(0))
    assert values.features.dtype == values.hidden.dtype == jnp.bfloat16
    assert values.features.shape == (B, T, 2 * H) and values.hidden.shape == (B, T, H)
