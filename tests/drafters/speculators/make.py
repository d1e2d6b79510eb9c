"""Writes the values that tests/drafters/test_speculators.py compares with, computed by speculators itself.

    make speculators     makes an environment with speculators 0.9.0, which pins other packages, and runs this in it

`ours/` beside this file is an export for speculators (`python -m tests.drafters.test_speculators` writes it, in our own
environment); it is loaded here. `theirs/` is a drafter that speculators makes and saves, with every change of EAGLE-3
that it knows. values.safetensors has the inputs, and of both drafters the head's inputs and the logits of N runs.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModelConfig, SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from transformers import LlamaConfig

HERE = Path(__file__).parent
RUNS, TOKENS = 3, 12


def main() -> None:
    """Writes theirs/ and values.safetensors."""
    torch.manual_seed(0)
    layer = json.loads((HERE / "ours" / "config.json").read_text())["transformer_layer_config"]
    hidden, vocab = layer["hidden_size"], layer["vocab_size"]
    values = {
        "features": torch.randn(1, TOKENS, 3 * hidden),
        "tokens": torch.randint(vocab, (1, TOKENS)),
        "embedding": torch.randn(vocab, hidden),
    }
    write_theirs(HERE / "theirs", layer, load_file(HERE / "ours" / "model.safetensors"))
    for name in ("ours", "theirs"):
        values |= {f"{name}.{key}": value for key, value in run(HERE / name, values).items()}
    save_file({name: value.contiguous() for name, value in values.items()}, HERE / "values.safetensors")


def write_theirs(folder: Path, layer: dict, ours: dict[str, torch.Tensor]) -> None:
    """A random drafter of speculators', saved by it."""
    changes = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 5}
    draft = LlamaConfig(**(layer | changes | {"layer_types": ["sliding_attention"]}))
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=draft,
        draft_vocab_size=len(ours["d2t"]),
        norm_before_residual=True,
        fc_norm=True,
        norm_output=True,
        eagle_aux_hidden_state_layer_ids=[1, 5, 10],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=RUNS)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
    )
    model = Eagle3DraftModel(config)
    model.load_vocab_mappings(ours["t2d"], ours["d2t"])
    with torch.no_grad():
        for name, value in model.named_parameters():
            spread = 1 + 0.2 * torch.randn(value.shape) if "norm" in name else torch.randn(value.shape) * 0.25
            value.copy_(spread)
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "config.py").unlink(missing_ok=True)  # a copy of speculators' own
    stored = load_file(folder / "model.safetensors")
    stored.pop("embed_tokens.weight", None)  # the target's, which the test brings
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def run(folder: Path, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The head's inputs [N, T, H] and the logits [N, T, V] of N runs given the true tokens, in float32."""
    with tempfile.TemporaryDirectory() as aside:
        copy = Path(shutil.copytree(folder, Path(aside) / "drafter"))
        raw = json.loads((copy / "config.json").read_text())
        raw["speculators_config"]["verifier"]["name_or_path"] = str(
            write_verifier(Path(aside) / "verifier", raw, values)
        )
        (copy / "config.json").write_text(json.dumps(raw))
        config = SpeculatorModelConfig.from_pretrained(copy)
        config.transformer_layer_config._attn_implementation = "eager"
        model = Eagle3DraftModel.from_pretrained(copy, config=config, dtype=torch.float32)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(values["embedding"])
    found: dict[str, list[torch.Tensor]] = {"hidden": [], "logits": []}

    def note(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found["hidden"].append(inputs[0][0])
        found["logits"].append(output[0])

    model.lm_head.register_forward_hook(note)
    with torch.no_grad():
        model(values["features"], values["tokens"], torch.zeros_like(values["tokens"]), ttt_steps=RUNS)
    return {name: torch.stack(states) for name, states in found.items()}


def write_verifier(folder: Path, raw: dict, values: dict[str, torch.Tensor]) -> Path:
    """A target as far as speculators looks at it: sizes, embedding, norm and head."""
    sizes = {name: raw["transformer_layer_config"][name] for name in ("hidden_size", "vocab_size")}
    more = {"num_hidden_layers": 12, "num_attention_heads": 2, "architectures": ["LlamaForCausalLM"]}
    LlamaConfig(**sizes, **more).save_pretrained(folder)
    embedding = values["embedding"]
    weights = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    save_file(weights | {"model.norm.weight": torch.ones(sizes["hidden_size"])}, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    sys.exit(main())
