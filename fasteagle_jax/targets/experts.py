"""What the families with experts share: their configuration, and the names of experts in files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.moe import ExpertsConfig, expected_experts
from fasteagle_jax.nn.transformer import LayerConfig
from fasteagle_jax.targets.config import DecoderConfig


@dataclasses.dataclass(frozen=True)
class SparseConfig(DecoderConfig):
    """Sizes and switches of a target with experts; `intermediate_size` is that of its dense layers."""

    num_experts: int = 8  # E
    experts_per_token: int = 2  # k
    expert_size: int = 1  # the intermediate size of an expert
    renormalised: bool = True  # the weights of a token's experts add up to 1
    shared_expert_size: int | None = None  # of the expert that all tokens have
    dense_layers: tuple[int, ...] = ()  # those with an MLP in place of experts

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"a token has {self.experts_per_token} experts, and there are {self.num_experts}: "
                "take the model's own config.json"
            )

    @property
    def layer(self) -> LayerConfig:
        """Those of DecoderConfig, and the experts."""
        experts = ExpertsConfig(
            self.num_experts, self.experts_per_token, self.expert_size, self.renormalised, self.shared_expert_size
        )
        return dataclasses.replace(super().layer, experts=experts)

    def layer_at(self, index: int) -> LayerConfig:
        """Those of `layer`, of a dense one without experts."""
        return dataclasses.replace(self.layer, experts=None) if index in self.dense_layers else self.layer


def relative_reads(config: Any, num_tokens: int) -> float:
    """What a pass over n tokens is expected to read of a target's matrices, relative to a pass over one token.

    It is 1 for a dense target; see moe.expected_experts for what is assumed of a router.
    """
    if not isinstance(config, SparseConfig):
        return 1.0

    def of_pass(num_tokens: int) -> float:
        total = float(config.vocab_size * config.hidden_size)  # the head
        for index in range(config.num_layers):
            layer = config.layer_at(index)
            total += layer.matrix_size
            if (experts := layer.experts) is not None:
                more = expected_experts(num_tokens, experts.num_chosen, experts.num_experts) - experts.num_chosen
                total += more * 3 * config.hidden_size * experts.intermediate_size
        return total

    return of_pass(num_tokens) / of_pass(1)


def expert_names(prefix: str, gate: str, up: str, down: str) -> dict[str, str]:
    """The places of experts' parts by the names that `checkpoint.join_experts` gives their tensors."""
    parts = {gate: "gate", up: "up", down: "down"}
    return {f"{prefix}.{name}": f"mlp.experts.{place}" for name, place in parts.items()}


def read_dense_layers(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """The dense layers by `mlp_only_layers` and `decoder_sparse_step`: of every so many layers the last has experts."""
    step, only = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
    if not isinstance(step, int) or step < 1:
        raise UserError(f"decoder_sparse_step is {step!r}: take the model's own config.json")
    return tuple(i for i in range(hf["num_hidden_layers"]) if i in only or (i + 1) % step)
