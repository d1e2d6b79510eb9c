"""The table of target families: a new one is a file of its own and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.family import Family
from fasteagle_jax.targets.gemma import GEMMA2, GEMMA3
from fasteagle_jax.targets.gpt_oss import GPT_OSS
from fasteagle_jax.targets.granite import GRANITE
from fasteagle_jax.targets.llama import LLAMA
from fasteagle_jax.targets.mistral import MISTRAL
from fasteagle_jax.targets.mixtral import MIXTRAL
from fasteagle_jax.targets.phi import PHI3
from fasteagle_jax.targets.qwen import QWEN2, QWEN3
from fasteagle_jax.targets.qwen_moe import QWEN2_MOE, QWEN3_MOE
from fasteagle_jax.targets.smollm3 import SMOLLM3

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi3": PHI3,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2_MOE,
    "qwen3_moe": QWEN3_MOE,
    "gpt_oss": GPT_OSS,
}


def family_of_files(hf: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face `config.json` (read into a dict); UserError, listing all, if it is unknown."""
    architectures = hf.get("architectures") or []
    for family in FAMILIES.values():
        if set(family.architectures) & set(architectures):
            return family
    known = [name for family in FAMILIES.values() for name in family.architectures]
    raise UserError(
        f"architecture {', '.join(architectures) or 'unknown'} is not supported: use a target of {', '.join(known)}; "
        "CONTRIBUTING.md says how to add a family"
    )


def family_of_gguf(architecture: str) -> Family:
    """The family of a GGUF file's `general.architecture`; UserError, listing all, if it is unknown."""
    known = {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None}
    if architecture not in known:
        raise UserError(f"architecture {architecture!r} is not supported: use a target of {', '.join(known)}")
    return known[architecture]


def family_of(config: Any) -> Family:
    """The family of a target's configuration; UserError, listing all, if it is unknown."""
    return FAMILIES[family_name(config)]


def family_name(config: Any) -> str:
    """The name in the table of the family of a target's configuration; UserError, listing all, if it is unknown."""
    for name, family in FAMILIES.items():
        if type(config) is family.config:
            return name
    raise UserError(f"{type(config).__name__} is of no family of targets: there are {', '.join(FAMILIES)}")
