"""Every family against transformers' in torch, float32, on the same weights: logits, features, text."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.nn.kv_cache import commit
from fasteagle_jax.nn.packed_attention import Packed
from fasteagle_jax.nn.rope import RopeConfig, rope_frequencies
from fasteagle_jax.targets.checkpoint import fingerprint
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from fasteagle_jax.targets.table import FAMILIES, family_of_files
from tests.tiny_families import V, hf_config, torch_family

pytestmark = pytest.mark.torch

RELATIVE = 1e-4  # of the largest value, as in test_llama.py
FEATURES = (1, 2, 3)  # each ends a segment of the layers, which is compiled; of the fast tests one must do
LENGTHS = (46, 26, 13)  # of the texts: all longer than a window
OTHERS = [name for name in FAMILIES if name != "llama"]
rng = np.random.default_rng(0)
TEXTS = [rng.integers(1, V, size=n) for n in LENGTHS]


def torch_outputs(model, text: np.ndarray, features: tuple[int, ...]) -> list[np.ndarray]:
    """Logits and features [T, ...] of a text."""
    import torch

    with torch.no_grad():
        out = model(torch.asarray(text[None]), output_hidden_states=True, use_cache=False)
    return [out.logits[0].numpy(), *(out.hidden_states[f][0].numpy() for f in features)]


@functools.partial(jax.jit, static_argnames="features")
def one_half(model, tokens: jax.Array, start: jax.Array, cache, features: tuple[int, ...]):
    """Logits and features [B, T/2, ...] of a half of right-padded texts, and the cache with it."""
    batch, size = tokens.shape
    causal = jnp.broadcast_to(jnp.tril(jnp.ones((size, size), bool)), (batch, size, size))
    positions = jnp.broadcast_to(start + jnp.arange(size), (batch, size))
    out = model(tokens, positions, causal, cache, features)
    cache = commit(cache, out.fresh, jnp.full((batch,), size))
    return [model.logits(out.hidden), *jnp.split(out.features, len(features), axis=-1)], cache


def padded(model, tokens: np.ndarray, features: tuple[int, ...]) -> list[jax.Array]:
    """Logits and features [B, T, ...] of right-padded texts, the second half with the first one in the cache."""
    batch, num_tokens = tokens.shape
    half = num_tokens // 2
    first, cache = one_half(model, tokens[:, :half], jnp.int32(0), model.empty_cache(batch, num_tokens), features)
    second, _ = one_half(model, tokens[:, half:], jnp.int32(half), cache, features)
    return [jnp.concatenate(parts, axis=1) for parts in zip(first, second, strict=True)]


@functools.partial(jax.jit, static_argnames="features")
def packed(
    model, tokens: jax.Array, positions: jax.Array, segments: jax.Array, features: tuple[int, ...]
) -> list[jax.Array]:
    """Logits and features [1, T, ...] of texts in one row."""
    out = model(tokens, positions, Packed(segments), None, features)
    return [model.logits(out.hidden), *jnp.split(out.features, len(features), axis=-1)]


def assert_alike(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=RELATIVE * np.abs(e).max())


def assert_parity(model, theirs, features: tuple[int, ...] = FEATURES) -> None:
    """The same logits and features of TEXTS, each alone, padded and packed."""
    expected = [torch_outputs(theirs, text, features) for text in TEXTS]
    tokens = np.zeros((len(TEXTS), max(LENGTHS)), np.int32)
    for row, text in zip(tokens, TEXTS, strict=True):
        row[: len(text)] = text
    rows = [np.asarray(part) for part in padded(model, tokens, features)]
    for i, of_text in enumerate(expected):
        assert_alike([part[i, : LENGTHS[i]] for part in rows], of_text)
    row = [np.concatenate(parts)[None] for parts in (TEXTS, [np.arange(n) for n in LENGTHS])]
    segments = np.repeat(np.arange(1, len(TEXTS) + 1), LENGTHS)[None]
    whole = [np.concatenate(parts)[None] for parts in zip(*expected, strict=True)]
    assert_alike([np.asarray(part) for part in packed(model, *row, segments, features)], whole)


@pytest.mark.parametrize(  # of Qwen's experts one
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "qwen2_moe")) for name in OTHERS]
)
def test_logits_and_features_are_those_of_transformers(name, tmp_path):
    theirs = torch_family(hf_config(name) | {"num_hidden_layers": 3}, tmp_path)  # some have two kinds of them
    assert_parity(load_target(str(tmp_path), stacked=True).model, theirs, (2,))


def test_the_text_part_of_a_model_that_sees_is_read(tmp_path):
    """Under both names that files give it, and with what its configuration leaves out."""
    torch_family(hf_config("gemma3") | {"num_attention_heads": 8, "num_key_value_heads": 4}, tmp_path / "text")
    own = open_checkpoint(tmp_path / "text")
    hf, tensors = (
        json.loads((tmp_path / "text/config.json").read_text()),
        load_file(tmp_path / "text/model.safetensors"),
    )
    assert hf.pop("architectures") == ["Gemma3ForCausalLM"]
    text = {key: value for key, value in hf.items() if key not in ("num_attention_heads", "num_key_value_heads")}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    for renamed in ("language_model.{}", "model.language_model.{}"):
        folder = tmp_path / renamed[:5]
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(whole))
        short = "" if renamed.startswith("language") else "model."
        names = {name: renamed.format(name.removeprefix(short)) for name in tensors}
        seen = {f"{short}vision_tower.a.weight": np.zeros((2, 2), np.float32)}
        save_file({names[name]: value for name, value in tensors.items()} | seen, folder / "model.safetensors")
        assert fingerprint(open_checkpoint(folder)) == fingerprint(own)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 7))
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_features_of_random_configurations_are_those_of_transformers(name, seed, tmp_path):
    theirs = torch_family(hf_config(name, seed), tmp_path, seed)
    for stacked in (True, False):
        assert_parity(load_target(str(tmp_path), stacked=stacked).model, theirs)


@pytest.mark.slow  # what follows from logits
@pytest.mark.parametrize("name", OTHERS)
def test_greedy_text_is_that_of_transformers(name, tmp_path):
    import torch

    theirs = torch_family(hf_config(name, 1), tmp_path, 1)
    prompts = [text[:n].tolist() for text, n in zip(TEXTS, (3, 20, 9), strict=True)]
    made = generate(load_target(str(tmp_path)).model, None, prompts, make_sampling(len(prompts)), max_new=24)
    for row, prompt in enumerate(prompts):
        tokens = torch.asarray([prompt])
        out = theirs.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert np.asarray(made.tokens[row]).tolist()[:24] == out[0, len(prompt) :].tolist()


# --- rotary kinds -----------------------------------------------------------------------------------------------

LIMIT = 32  # positions of the first training, after which longrope has other factors
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 5.0, 8.0]}
ROPES = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, its own bounds": {
        "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64, "beta_fast": 4.0, "beta_slow": 0.5,
        "attention_factor": 1.3,
    },
    "yarn, two scales": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.7,
        "mscale_all_dim": 0.4, "truncate": False,
    },
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": LONGROPE | {"original_max_position_embeddings": 64},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES.keys())
def test_rotary_frequencies_are_those_of_transformers(rope):
    """Of eight and, rotated in part, of four pairs of channels."""
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    partial = 0.5 if "short_factor" in rope else 1.0
    hf = dict(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_theta=300.0, head_dim=16,
        partial_rotary_factor=partial, original_max_position_embeddings=64,
    )  # fmt: skip
    theirs = Phi3Config(**{k: v for k, v in hf.items() if k != "rope_theta"}, pad_token_id=0)
    theirs.rope_parameters = rope | {
        "rope_theta": 300.0,
        "partial_rotary_factor": partial,
        "rope_type": rope.get("rope_type", "longrope"),
    }
    for length in (64, 65):
        expected, magnitude = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, seq_len=length)
        ours = RopeConfig.from_hf(hf | {"rope_scaling": rope}).for_length(length)
        np.testing.assert_allclose(rope_frequencies(ours, 16), expected.numpy(), rtol=1e-6)
        assert ours.magnitude == pytest.approx(magnitude)


@pytest.mark.parametrize("num_tokens", [pytest.param(LIMIT, marks=pytest.mark.slow), LIMIT + 8])
def test_longrope_is_that_of_transformers_on_both_sides_of_the_limit(num_tokens, tmp_path):
    hf = hf_config("phi3") | {"partial_rotary_factor": 0.5, "original_max_position_embeddings": LIMIT}
    theirs = torch_family(hf | {"rope_scaling": LONGROPE}, tmp_path)
    text = rng.integers(1, V, size=num_tokens)
    row = text[None], np.arange(num_tokens)[None], np.ones((1, num_tokens), np.int32)
    loaded = load_target(str(tmp_path), max_len=num_tokens)
    found = [np.asarray(part)[0] for part in packed(loaded.model, *row, (2,))]
    assert_alike(found, torch_outputs(theirs, text, (2,)))
    other = load_target(str(tmp_path), max_len=LIMIT if num_tokens > LIMIT else LIMIT + 8)  # of the other side
    assert other.fingerprint == loaded.fingerprint and other.model.config != loaded.model.config


def test_with_the_short_factors_no_text_is_longer_than_the_limit():
    hf = hf_config("phi3") | {"partial_rotary_factor": 0.5, "original_max_position_embeddings": LIMIT}
    config = family_of_files(hf).config.from_hf(hf | {"rope_scaling": LONGROPE})
    assert config.for_length(LIMIT).max_positions == LIMIT and not config.for_length(LIMIT).rope.long
    assert config.for_length(LIMIT + 1) == config == config.for_length(None)
