"""Our Llama against transformers' in torch, float32, on the same weights: logits, features, text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.targets.tokenizer import encode_chat, load_tokenizer, stop_token_ids
from tests.tiny_folder import make_target

if TYPE_CHECKING:  # torch takes seconds to import: where it is used, and not in every worker that collects this file
    from transformers import LlamaForCausalLM

RELATIVE = 1e-4  # of the largest value: two float32 implementations differ by some 1e-6 a layer, bugs by far more

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 300.0},
    "linear": {"rope_type": "linear", "rope_theta": 300.0, "factor": 4.0},
    # Of the eight wavelengths, 6 to 930, some are kept, one is blended and some are divided.
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 300.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
CASES = {
    "default, grouped by 2, vocab": dict(
        rope_parameters=ROPES["default"], num_key_value_heads=2, tie_word_embeddings=True
    ),
    "linear, not grouped, attention bias": dict(
        rope_parameters=ROPES["linear"], num_key_value_heads=4, attention_bias=True
    ),
    "llama3, grouped by 4, mlp bias": dict(rope_parameters=ROPES["llama3"], num_key_value_heads=1, mlp_bias=True),
}


@pytest.mark.parametrize("platform, decoding, training", [("cpu", 0, 0), ("gpu", 0, 1), ("tpu", 1, 1)])
def test_layers_come_in_the_form_that_the_backend_runs_faster(tmp_path, monkeypatch, platform, decoding, training):
    folder = str(make_target(tmp_path / "target"))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert load_target(folder).model.stacked == bool(decoding)
    assert load_target(folder, training=True).model.stacked == bool(training)


def torch_model(**changes) -> LlamaForCausalLM:
    """A random transformers model whose logits are of size 1 and whose biases and norms are not at rest."""
    import torch
    from transformers import LlamaConfig as TorchConfig
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)  # on two shared cores, two of its threads wait for each other: fifteen times slower
    config = TorchConfig(
        **dict(
            vocab_size=61,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=5,
            num_attention_heads=4,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.15,
            rms_norm_eps=1e-5,
        )
        | changes
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
            elif "norm" in name:
                value.uniform_(0.5, 1.5)
    return model


def torch_outputs(model: LlamaForCausalLM, tokens: np.ndarray, feature_layers: tuple[int, ...]) -> list[np.ndarray]:
    import torch

    with torch.no_grad():
        out = model(torch.asarray(tokens).long(), output_hidden_states=True)
    return [out.logits.numpy(), *(out.hidden_states[f].numpy() for f in feature_layers)]


def our_outputs(model, tokens: np.ndarray, feature_layers: tuple[int, ...]) -> list[np.ndarray]:
    batch, num = tokens.shape

    @jax.jit
    def forward(model, tokens):
        causal = jnp.broadcast_to(jnp.tril(jnp.ones((num, num), bool)), (batch, num, num))
        positions = jnp.broadcast_to(jnp.arange(num), (batch, num))
        out = model(tokens, positions, causal, None, feature_layers)
        return [model.logits(out.hidden), *jnp.split(out.features, len(feature_layers), axis=-1)]

    return [np.asarray(x) for x in forward(model, jnp.asarray(tokens))]


def assert_alike(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=RELATIVE * np.abs(e).max())


@pytest.mark.torch
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_and_features_are_those_of_transformers_stacked_or_not(case, tmp_path):
    theirs = torch_model(**case)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(61, size=(2, 150))
    features = (1, 2, 4)
    expected = torch_outputs(theirs, tokens, features)
    assert_alike(our_outputs(load_target(str(tmp_path), stacked=True).model, tokens, features), expected)
    assert_alike(our_outputs(load_target(str(tmp_path), stacked=False).model, tokens, features), expected)


@pytest.mark.torch
def test_a_stacked_target_unstacked_is_the_target_loaded_as_a_list(tmp_path):
    torch_model().save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(61, size=(1, 9))
    stacked, listed = (load_target(str(tmp_path), stacked=stacked).model for stacked in (True, False))
    assert stacked.stacked and not listed.stacked and not stacked.unstacked().stacked
    expected = our_outputs(listed, tokens, (2, 3))
    for a, e in zip(our_outputs(stacked.unstacked(), tokens, (2, 3)), expected, strict=True):
        np.testing.assert_array_equal(a, e)


@pytest.mark.torch
def test_everything_that_does_not_fit_is_named_in_one_error(tmp_path):
    torch_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"], tensors["model.layers.3.mlp.up_proj.weight"]
    tensors["model.layers.9.self_attn.q_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((64, 47), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)  # of older files: not a weight
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        load_target(str(tmp_path))
    message = str(caught.value)
    assert "missing: model.layers.3.mlp.up_proj.weight, model.norm.weight;" in message
    assert "surplus: model.layers.9.self_attn.q_proj.weight;" in message
    assert "mis-shaped: model.layers.1.self_attn.q_proj.weight is (64, 47) instead of (64, 48)" in message
    assert "inv_freq" not in message and "\n" not in message


@pytest.mark.torch
def test_a_tied_checkpoint_that_stores_the_shared_matrix_twice_loads(tmp_path):
    torch_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    model = load_target(str(tmp_path)).model
    assert model.head is None
    np.testing.assert_array_equal(model.head_rows(), tensors["lm_head.weight"])


@pytest.mark.torch
def test_older_configurations_with_rope_scaling_mean_the_same(tmp_path):
    torch_model(**CASES["llama3, grouped by 4, mlp bias"]).save_pretrained(tmp_path)
    newer = load_target(str(tmp_path)).model.config
    raw = json.loads((tmp_path / "config.json").read_text())
    scaling = raw.pop("rope_parameters")
    raw["rope_theta"] = scaling.pop("rope_theta")
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_scaling": scaling}))
    assert load_target(str(tmp_path)).model.config == newer
    assert newer.rope.kind == "llama3" and newer.rope.factor == 8.0


# --- a real model -----------------------------------------------------------------------------------------------

QUESTIONS = [
    "What is the capital of France?",
    "Write a Python function that reverses a string.",
    "If a train travels 60 km in 45 minutes, how fast is it?",
    "Name three animals that live in the sea and say one thing of each.",
    "Why is the sky blue?",
]


@pytest.fixture(scope="module")
def smollm2():
    """Our SmolLM2-135M, transformers' with the same weights, and five questions as tokens."""
    import torch

    loaded = load_target("smollm2-135m")
    c = loaded.checkpoint.config
    theirs = torch_model(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_positions,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": c.rope.kind, "rope_theta": c.rope.theta},
        tie_word_embeddings=c.tie_embeddings,
    )
    names = loaded.checkpoint.names()
    state = {name: torch.asarray(np.array(loaded.checkpoint.read(name), np.float32)) for name in names}
    if c.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    tokenizer = load_tokenizer(loaded.checkpoint.path)
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]
    return loaded.model, theirs, prompts, stop_token_ids(tokenizer, loaded.checkpoint.path)


@pytest.mark.torch
@pytest.mark.real
@pytest.mark.slow  # test_checkpoint.py has torch read a text with the same weights, and the cases above our arithmetic
def test_a_real_models_logits_and_features_are_those_of_transformers(smollm2):
    ours, theirs, prompts, _ = smollm2
    num_layers = ours.config.num_layers
    features = (2, num_layers // 2, num_layers - 3)
    tokens = np.array([prompts[1]])
    assert_alike(our_outputs(ours, tokens, features), torch_outputs(theirs, tokens, features))


@pytest.mark.torch
@pytest.mark.real
@pytest.mark.slow  # as above
def test_a_real_models_greedy_text_is_that_of_transformers(smollm2):
    import torch

    ours, theirs, prompts, stop_tokens = smollm2
    made = generate(ours, None, prompts, make_sampling(len(prompts)), max_new=64, stop_tokens=stop_tokens)
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=list(stop_tokens),
                pad_token_id=stop_tokens[0],
            )
        assert np.asarray(made.tokens[row])[: int(made.lengths[row])].tolist() == out[0, len(prompt) :].tolist()
