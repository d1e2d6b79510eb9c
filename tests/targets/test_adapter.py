"""LoRA adapters in PEFT's format, merged into a target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from tests.tiny_folder import make_target

RANK, ALPHA = 3, 6
Q, DOWN, EMBEDDING = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("base") / "target")


def weights(base: Path) -> dict[str, np.ndarray]:
    return load_file(base / "model.safetensors")


def lora(shape: tuple[int, ...], rank: int = RANK, seed: int = 0, *, embedding: bool = False) -> dict[str, np.ndarray]:
    """Parts by the ends of their names, of a matrix [out, in]."""
    rng = np.random.default_rng(seed)
    outputs, inputs = shape
    if embedding:  # [V, H]
        sizes = {"lora_embedding_A": (rank, outputs), "lora_embedding_B": (inputs, rank)}
    else:
        sizes = {"lora_A.weight": (rank, inputs), "lora_B.weight": (outputs, rank)}
    return {end: rng.standard_normal(size).astype(np.float32) for end, size in sizes.items()}


def make_adapter(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file(
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def test_the_merged_target_is_the_one_of_merged_weights(base: Path, tmp_path: Path) -> None:
    """Matrices, an embedding and a whole norm; ranks and scales of modules of their own."""
    old = weights(base)
    parts = {
        Q: lora(old[f"{Q}.weight"].shape),
        DOWN: lora(old[f"{DOWN}.weight"].shape, 5, 1),
        EMBEDDING: lora(old[f"{EMBEDDING}.weight"].shape, seed=2, embedding=True),
    }
    norm = np.full(old["model.norm.weight"].shape, 2.0, np.float32)
    tensors = {f"{module}.{end}": value for module, ends in parts.items() for end, value in ends.items()}
    adapter = make_adapter(
        tmp_path / "adapter",
        tensors | {"model.norm.weight": norm},
        rank_pattern={"mlp.down_proj": 5},
        alpha_pattern={r"layers\.\d\.mlp\.down_proj": 20},
    )
    q, down, embedding = parts.values()
    new = old | {
        f"{Q}.weight": old[f"{Q}.weight"] + ALPHA / RANK * (q["lora_B.weight"] @ q["lora_A.weight"]),
        f"{DOWN}.weight": old[f"{DOWN}.weight"] + 20 / 5 * (down["lora_B.weight"] @ down["lora_A.weight"]),
        f"{EMBEDDING}.weight": old[f"{EMBEDDING}.weight"]
        + ALPHA / RANK * (embedding["lora_embedding_B"] @ embedding["lora_embedding_A"]).T,
        "model.norm.weight": norm,
    }
    merged = make_target(tmp_path / "merged")
    save_file(new, merged / "model.safetensors")
    ours, theirs = load_target(str(base), adapter=str(adapter)), load_target(str(merged))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours.model, theirs.model)
    assert len({ours.fingerprint, theirs.fingerprint, load_target(str(base)).fingerprint}) == 3
    rows = open_checkpoint(base, str(adapter)).read(f"{EMBEDDING}.weight", 7)
    np.testing.assert_allclose(rows, new[f"{EMBEDDING}.weight"][:7], rtol=1e-5, atol=1e-5)


def test_rank_stabilised_scales_are_over_the_root_of_the_rank(base: Path, tmp_path: Path) -> None:
    old = weights(base)[f"{Q}.weight"]
    parts = lora(old.shape)
    tensors = {f"{Q}.{end}": value for end, value in parts.items()}
    adapter = make_adapter(tmp_path / "adapter", tensors, use_rslora=True)
    expected = old + ALPHA / RANK**0.5 * (parts["lora_B.weight"] @ parts["lora_A.weight"])
    np.testing.assert_allclose(open_checkpoint(base, str(adapter)).read(f"{Q}.weight"), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_gives_the_target_a_fingerprint_of_its_own(base: Path, tmp_path: Path) -> None:
    """Whatever it changes: the plain fingerprint does not read layers' matrices."""
    found = {fingerprint(open_checkpoint(base))}
    for seed in (0, 1):
        parts = lora(weights(base)[f"{Q}.weight"].shape, seed=seed)
        adapter = make_adapter(tmp_path / f"{seed}", {f"{Q}.{end}": value for end, value in parts.items()})
        found.add(fingerprint(open_checkpoint(base, str(adapter))))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({}, {"peft_type": "IA3"}, "is of kind 'IA3': LORA adapters alone can be merged"),
        ({}, {"use_dora": True}, "has use_dora True, which is not handled: merge it with PEFT"),
        ({}, {"init_lora_weights": "pissa_niter_4"}, "has init_lora_weights 'pissa_niter_4', which is not handled"),
        ({}, {"lora_alpha": "x"}, "has lora_alpha 'x': give a number above 0"),
        ({Q: (32, 16)}, {"rank_pattern": 2}, "has rank_pattern 2: give numbers above 0 by modules' names"),
        ({Q: (32, 16)}, {"alpha_pattern": {"q": "x"}}, "has alpha_pattern {'q': 'x'}: give numbers above 0"),
        ({Q: (32, 16)}, {"alpha_pattern": {"q(": 1}}, "has alpha_pattern 'q(', which is no pattern"),
        ({}, {}, "holds no weights: give a trained adapter"),
        ({"model.layers.9.self_attn.q_proj": (32, 16)}, {}, "changes model.layers.9.self_attn.q_proj.weight, which"),
        ({Q: (32, 8)}, {}, "is (32, 8), the target's (32, 16): give the target that it was trained on"),
        ({Q: (32, 16)}, {"r": 4}, "has rank 3, adapter_config.json says 4"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(
    base: Path, tmp_path: Path, tensors: dict[str, tuple[int, int]], config: dict[str, Any], message: str
) -> None:
    parts = {f"{module}.{end}": value for module, shape in tensors.items() for end, value in lora(shape).items()}
    adapter = make_adapter(tmp_path / "adapter", parts, **config)
    with pytest.raises(UserError) as error:
        open_checkpoint(base, str(adapter))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_half_a_pair_and_folders_without_an_adapter_are_one_line(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "half", {f"{Q}.lora_A.weight": np.zeros((RANK, 16), np.float32)})
    with pytest.raises(UserError, match="lacks one of lora_A and lora_B"):
        open_checkpoint(base, str(adapter))
    with pytest.raises(UserError, match="has no adapter_config.json: give a folder that PEFT saved"):
        open_checkpoint(base, str(tmp_path))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="safe_serialization=True"):
        open_checkpoint(base, str(adapter))
