"""A whole target in a folder, as Hugging Face keeps them: a tiny random Llama and a byte tokenizer that can chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fasteagle_jax.drafters.files import TOKENIZER, save_drafter
from fasteagle_jax.drafters.table import class_of, default_config
from fasteagle_jax.targets.loading import load_target
from fasteagle_jax.targets.tokenizer import load_tokenizer, vocabulary_fingerprint

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDE, POSITIONS = 16, 2, 4, 2, 8, 32, 1024


def make_target(
    folder: Path, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, stop_rate: float = 5.5, spare: int = 0
) -> Path:
    """The folder with config.json, model.safetensors and the tokenizer's files in it.

    At temperature 1 an answer has very roughly 1500 / exp(stop_rate) tokens. The target has `spare` tokens more than
    the tokenizer, as many have.
    """
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
    vocab = backend.get_vocab_size() + spare

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(np.random.default_rng(seed), vocab, vocab - spare - 1, stop_rate), folder / "model.safetensors")
    return folder


def _weights(rng: np.random.Generator, vocab: int, end: int, stop_rate: float) -> dict[str, np.ndarray]:
    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)

    ones = np.ones(HIDDEN, np.float32)
    weights: dict[str, Any] = {"model.embed_tokens.weight": normal(vocab, HIDDEN) * 4, "model.norm.weight": ones}
    head = normal(vocab, HIDDEN) * 8
    # All embeddings are large in the first place, where the final norm therefore leaves about sqrt(H): a constant that
    # gives the tokenizer's last token, the end of a turn, a logit of about `stop_rate`.
    weights["model.embed_tokens.weight"][:, 0] = 30
    head[:, 0] = 0
    head[end] = 0
    head[end, 0] = stop_rate / HIDDEN**0.5
    weights["lm_head.weight"] = head
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        weights |= {
            layer + "input_layernorm.weight": ones,
            layer + "post_attention_layernorm.weight": ones,
            layer + "self_attn.q_proj.weight": normal(HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.k_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.v_proj.weight": normal(KV_HEADS * HEAD_DIM, HIDDEN),
            layer + "self_attn.o_proj.weight": normal(HIDDEN, HEADS * HEAD_DIM),
            layer + "mlp.gate_proj.weight": normal(WIDE, HIDDEN),
            layer + "mlp.up_proj.weight": normal(WIDE, HIDDEN),
            layer + "mlp.down_proj.weight": normal(HIDDEN, WIDE),
        }
    return weights


def make_drafter(folder: Path, target_folder: Path, **changes: Any) -> Path:
    """The folder with a random drafter of two levels, but for `changes`, for a target by `make_target`."""
    target = load_target(str(target_folder))
    config = default_config(target.checkpoint.config, **({"num_levels": 2} | changes))
    drafter = jax.jit(lambda: class_of(config)(config, jax.random.key(1)))()  # one program instead of one an operation
    info = {TOKENIZER: vocabulary_fingerprint(load_tokenizer(target_folder))}
    save_drafter(drafter, folder, target.fingerprint, info)
    return folder
