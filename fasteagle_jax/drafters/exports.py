"""EAGLE-3 drafters in the forms that other programs read: names, layers counted their way, positions, bfloat16.

    vllm           Eagle3LlamaForCausalLM, layers by their inputs at the top level (id i: what layer i reads)
    sglang         LlamaForCausalLMEagle3, layers by their outputs in eagle_config (id i: what layer i writes, so i + 1)
    tpu-inference  Eagle3LlamaForCausalLM; it reads EAGLE-3's own layers whatever a file says, and needs d2t
    speculators    Eagle3Speculator: sizes in transformer_layer_config, layers.0 for midlayer, layers by their inputs

vLLM and SGLang read the layer's matrices in int8, too: compressed-tensors' pack-quantized with 8 bits and a scale a
row, its only format of int8 weights and float activations there. Matrices that they multiply as one (q, k and v; gate
and up) are all in int8 or none. fc, which SGLang multiplies in floats alone, and the head stay in bfloat16.

As in vLLM's llama_eagle3.py and gpu_model_runner.py, SGLang's llama_eagle3.py and set_eagle3_layers_to_capture,
tpu-inference's llama_eagle3.py and model_loader.py, speculators 0.9.0, and compressed_tensors.py and
compressed_tensors_wNa16.py of the first two. What a program has no place for is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from fasteagle_jax.drafters.files import MAX_INT8_RELATIVE_ERROR, TENSORS, int8_scheme, pack, tensors_of
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import new_folder

RUNTIMES = ("vllm", "sglang", "tpu-inference", "speculators")
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
# Changes of EAGLE-3 that a program's model has (its newest release read: see the files named above).
CHANGES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "qk_norm")
_KNOWN: dict[str, tuple[str, ...]] = {
    "vllm": CHANGES[:4],
    "sglang": (),
    "tpu-inference": CHANGES[:1],
    "speculators": CHANGES,
}
STORAGE = ("bfloat16", "int8")
_NO_INT8 = {
    "tpu-inference": "the matrices of its EAGLE-3 have no scales",
    "speculators": "int8 was not tried there (vllm reads it in its own form)",
}
# Matrices of the layer that are multiplied as one, by the name of that one.
_TOGETHER = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}


def export_drafter(
    drafter: Any,
    folder: Path,
    runtime: str,
    target_config: Any,
    verifier: dict[str, Any],
    storage: str = "bfloat16",
) -> None:
    """Writes a new folder that `runtime`, one of RUNTIMES, reads, whole or not at all.

    `verifier` has the target's "name_or_path", as that program finds it, and its "architectures". `storage`, one of
    STORAGE, is that of the layer's matrices. UserError for a drafter that is not EAGLE-3, or has what the program does
    not.
    """
    if drafter.config.kind != "eagle3":
        raise UserError(f"a drafter of kind {drafter.config.kind} cannot be exported for {runtime}: eagle3 alone can")
    if storage not in STORAGE:
        raise UserError(f"{runtime} reads no {storage}: use {' or '.join(STORAGE)}")
    if storage == "int8" and runtime in _NO_INT8:
        raise UserError(f"storage int8 is not written for {runtime}, {_NO_INT8[runtime]}: leave it out")
    config = runtime_config(drafter.config, runtime, target_config, verifier)
    tensors = runtime_tensors(drafter, runtime)
    if storage == "int8":
        rounded, ignore = _in_int8(tensors_of(drafter))
        tensors = {name: value for name, value in tensors.items() if f"{name}_packed" not in rounded} | rounded
        config["quantization_config"] = int8_scheme("pack-quantized", ignore)
    with new_folder(folder) as aside:
        save_file(tensors, aside / TENSORS)
        (aside / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def runtime_config(c: Any, runtime: str, target_config: Any, verifier: dict[str, Any]) -> dict[str, Any]:
    """The config.json for `runtime` of an Eagle3Config; UserError, by name, for what it cannot say."""
    _check(c, runtime, target_config)
    assert c.rope is not None  # its keys are its own
    layer: dict[str, Any] = {
        "model_type": "qwen3" if c.qk_norm else "llama",
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "rms_norm_eps": c.rms_norm_eps,
        "vocab_size": c.vocab_size,
        "max_position_embeddings": target_config.max_positions,
        **c.rope.to_hf(),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
    if c.window is not None:
        layer |= {"sliding_window": c.window, "layer_types": ["sliding_attention"]}
    changes = {name: getattr(c, name) for name in CHANGES[:4]}
    if runtime == "speculators":
        proposal = {"proposal_type": "greedy", "speculative_tokens": c.num_levels}
        return {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "draft_vocab_size": c.draft_vocab_size,
            "target_hidden_size": None,
            **changes,
            LAYER_IDS: list(c.feature_layers),
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": verifier,
            },
            "transformer_layer_config": layer,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
    architecture = "LlamaForCausalLMEagle3" if runtime == "sglang" else "Eagle3LlamaForCausalLM"
    config = {
        "architectures": [architecture],
        **layer,
        "draft_vocab_size": c.draft_vocab_size,
        "torch_dtype": "bfloat16",
        **{name: True for name, is_there in changes.items() if is_there},
    }
    if runtime == "sglang":
        config["eagle_config"] = {"use_aux_hidden_state": True, LAYER_IDS: [i - 1 for i in c.feature_layers]}
    else:
        config[LAYER_IDS] = list(c.feature_layers)
    return config


def runtime_tensors(drafter: Any, runtime: str) -> dict[str, np.ndarray]:
    """The tensors under the names that `runtime` reads, matrices and norms in bfloat16."""
    tensors = tensors_of(drafter)
    if runtime == "tpu-inference" and "d2t" not in tensors:
        tensors["d2t"] = np.zeros(drafter.config.draft_vocab_size, np.int64)
    renamed = {}
    for name, value in tensors.items():
        new = name.replace("midlayer.", "layers.0.") if runtime == "speculators" else name
        renamed[new] = value if name in ("d2t", "t2d") else value.astype(jnp.bfloat16)
    return renamed


def _in_int8(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The layer's matrices packed, by their names in files, and patterns of the modules that stay in floats."""
    rounded: dict[str, np.ndarray] = {}
    ignore = ["re:.*lm_head$", "re:.*fc$"]
    for whole, parts in _TOGETHER.items():
        names = [name for name in tensors if name.startswith("midlayer.") and name.split(".")[-2] in parts]
        packed = [_packed(name, tensors[name]) for name in names]
        if all(packed):
            rounded |= {name: value for each in packed for name, value in each.items()}
        else:
            ignore.append(f"re:.*({'|'.join(dict.fromkeys((whole, *parts)))})$")
    if not rounded:
        raise UserError(
            f"int8 differs from all of the layer's matrices by more than {MAX_INT8_RELATIVE_ERROR:.0%}: use bfloat16"
        )
    return rounded, ignore


def _packed(name: str, matrix: np.ndarray) -> dict[str, np.ndarray]:
    """A matrix [out, in] in int8 with a scale bfloat16 [out, 1], as pack-quantized; {} if that is too far from it."""
    matrix = matrix.astype(np.float32)
    largest = np.abs(matrix).max(axis=1, keepdims=True)
    scale = np.where(largest > 0, largest / 127, np.float32(1)).astype(jnp.bfloat16)  # as programs multiply with it
    of_rows = scale.astype(np.float32)
    values = np.clip(np.rint(matrix / of_rows), -127, 127).astype(np.int8)
    error = np.linalg.norm(values * of_rows - matrix)
    if matrix.shape[1] % 4 or error > MAX_INT8_RELATIVE_ERROR * np.linalg.norm(matrix):
        return {}
    shape = np.asarray(matrix.shape, np.int64)
    return {f"{name}_packed": pack(values), f"{name}_scale": scale, f"{name}_shape": shape}


def _check(c: Any, runtime: str, target_config: Any) -> None:
    """Raises UserError for what the program has no place for."""
    lacking = [name for name in CHANGES if getattr(c, name) and name not in _KNOWN[runtime]]
    if c.window is not None and runtime in ("sglang", "tpu-inference"):
        lacking.append(f"a window of {c.window}")
    if lacking:
        raise UserError(f"{runtime} does not read EAGLE-3 with {', '.join(lacking)}: export for another program")
    layers, num_layers = c.feature_layers, target_config.num_layers
    if list(layers) != sorted(set(layers)):
        raise UserError(f"feature_layers is {layers}: programs join features in the order of layers, so give it so")
    own = (2, num_layers // 2, num_layers - 3)
    if runtime == "tpu-inference" and layers != own:
        raise UserError(
            f"tpu-inference reads layers {own} of the target alone, this drafter {layers}: train it for those"
        )
    if runtime == "vllm" and len(layers) != 3:
        raise UserError(f"vllm reads three layers of the target, this drafter {layers}: train it for three")
    if runtime == "sglang" and (len(layers) != 3 or layers[0] == 0 or layers[-1] == num_layers):
        raise UserError(f"sglang reads three outputs of layers before the last, this drafter's inputs are {layers}")
