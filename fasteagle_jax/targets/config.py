"""The configuration that target families extend: sizes, per-layer settings, and how a config.json is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.nn.transformer import LayerConfig, LayerKind

# Entries of a config.json that change a model's arithmetic, and the values, None among them, at which they do not. A
# family handles an entry, or refuses other values of it.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "layer_types": ("full_attention",),
    "use_bidirectional_attention": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "partial_rotary_factor": (1,),
    "no_rope_layers": (1,),
    "no_rope_layer_interval": (),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "logits_scaling": (1,),
    "logit_scale": (1,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "clip_qkv": (),
    "lm_head_bias": (False,),
    "full_attn_mod": (1,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "swiglu_alpha": (),
    "swiglu_limit": (),
}


MOST_LAYERS = 10_000  # of a config.json: more than any model has, few enough for a list of them


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches of a target, extended by each family."""

    vocab_size: int  # V
    hidden_size: int  # H
    intermediate_size: int
    num_layers: int  # L
    num_heads: int
    num_kv_heads: int  # K
    head_dim: int  # D
    rms_norm_eps: float = 1e-5
    max_positions: int = 2048
    rope: RopeConfig = RopeConfig()
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None  # W of the local layers: a position sees itself and the W - 1 before it
    local_layers: tuple[int, ...] = ()  # those with the window

    handled: ClassVar[frozenset[str]] = frozenset()  # of SWITCHES
    defaults: ClassVar[Mapping[str, Any]] = {}  # of the entries that a config.json may leave out
    activation: ClassVar[tuple[str, str]] = ("hidden_act", "silu")  # the entry that names it, and what it must be

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            optional = field.type == "int | None" and value is None
            if field.type in ("int", "int | None") and not optional and (not isinstance(value, int) or value < 1):
                raise UserError(f"{field.name} is {value!r}: give a whole number of at least 1")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}: "
                "grouped attention shares each K/V head among equally many query heads"
            )
        rotated = self.rope.width(self.head_dim)
        if rotated % 2:
            raise UserError(f"{rotated} of {self.head_dim} channels would be rotated: they must be an even number")
        for name in ("short_factor", "long_factor") if self.rope.kind == "longrope" else ():
            if len(getattr(self.rope, name)) != rotated // 2:
                raise UserError(
                    f"rope {name} has {len(getattr(self.rope, name))} values, the heads {rotated // 2} rotated pairs: "
                    "take the model's own config.json"
                )

    # --- what the layers read -----------------------------------------------------------------------------------

    @property
    def layer(self) -> LayerConfig:
        """The sizes and switches that all layers share."""
        return LayerConfig(
            self.hidden_size, self.intermediate_size, self.num_heads, self.num_kv_heads, self.head_dim,
            self.rms_norm_eps, self.attention_bias, self.mlp_bias,
        )  # fmt: skip

    def layer_at(self, index: int) -> LayerConfig:
        """The sizes and switches of one layer, which may lack what the others have."""
        return self.layer

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """What differs between layers, one LayerKind each."""
        local = LayerKind(self.rope, self.window)
        return tuple(local if i in self.local_layers else LayerKind(self.rope) for i in range(self.num_layers))

    def for_length(self, max_len: int | None) -> Self:
        """The configuration for texts of up to `max_len` tokens, None for as many as there are positions.

        It differs for longrope alone: its factors are chosen here, and with the short ones no text may be longer than
        the original positions.
        """
        if max_len is None or self.rope.kind != "longrope":
            return self
        rope = self.rope.for_length(max_len)
        positions = self.max_positions if rope.long else min(self.max_positions, rope.original_max_positions)
        return dataclasses.replace(self, rope=rope, max_positions=positions)

    # --- from a config.json -------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Self:
        """The configuration that a Hugging Face `config.json` (read into a dict) describes.

        Raises UserError for one that lacks a size, or has a switch that the family does not handle.
        """
        hf = {**cls.defaults, **hf}
        name, known = cls.activation
        if hf.get(name, known) != known:
            raise UserError(f"{name} {hf[name]!r} is not supported: {_architecture(hf)} targets use {known}")
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        absent = [name for name in required if name not in hf]
        if absent:
            raise UserError(f"config.json lacks {', '.join(absent)}: take the model's complete configuration")
        num_layers = hf["num_hidden_layers"]
        if not isinstance(num_layers, int) or not 1 <= num_layers <= MOST_LAYERS:
            raise UserError(f"num_hidden_layers is {num_layers!r}: give a whole number from 1 to {MOST_LAYERS}")
        cls._check_switches(hf)
        return cls(**cls.read(hf))

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the configuration, from a complete config.json."""
        num_heads, rope = hf["num_attention_heads"], cls.read_rope(hf)
        positions = hf.get("max_position_embeddings", 2048)
        if rope.kind == "yarn":  # whose files may leave the model's first positions there
            positions = max(positions, int(rope.original_max_positions * rope.factor))
        return dict(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=hf.get("num_key_value_heads") or num_heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // num_heads,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            max_positions=positions,
            rope=rope,
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
        )

    @classmethod
    def read_rope(cls, hf: Mapping[str, Any]) -> RopeConfig:
        """The rotary embedding of the layers with full attention."""
        rope = RopeConfig.from_hf(hf)
        if rope.partial != 1 and "partial_rotary_factor" not in cls.handled:
            raise UserError(_not_handled(hf, [f"partial_rotary_factor {rope.partial}"]))
        return rope

    @classmethod
    def _check_switches(cls, hf: Mapping[str, Any]) -> None:
        wrong = []
        for name, at_rest in SWITCHES.items():
            value = hf.get(name)
            values = value if isinstance(value, list) else [value]
            if name not in cls.handled and not all(one is None or one in at_rest for one in values):
                wrong.append(f"{name} {value}")
        if wrong:
            raise UserError(_not_handled(hf, wrong))


def read_window(hf: Mapping[str, Any], is_local: Callable[[int], bool]) -> dict[str, Any]:
    """The fields `window` and `local_layers` of a config.json.

    `is_local` says of a layer's index whether it has the window, for files without `layer_types`. A window of all
    positions is none.
    """
    num_layers, window, types = hf["num_hidden_layers"], hf.get("sliding_window"), hf.get("layer_types")
    if types is None:
        types = ["sliding_attention" if window and is_local(i) else "full_attention" for i in range(num_layers)]
    if unknown := sorted({kind for kind in types if kind not in ("sliding_attention", "full_attention")}):
        raise UserError(f"{_not_handled(hf, [f'layer_types {kind}' for kind in unknown])}")
    if len(types) != num_layers:
        raise UserError(f"layer_types has {len(types)} entries for {num_layers} layers: take the model's own file")
    local = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
    if local and not window:
        raise UserError("config.json has layers of sliding_attention and no sliding_window: take the model's own file")
    everywhere = not local or window >= hf.get("max_position_embeddings", 2048)
    return {"window": None if everywhere else window, "local_layers": local}


def _architecture(hf: Mapping[str, Any]) -> str:
    return ", ".join(hf.get("architectures") or ["unknown"])


def _not_handled(hf: Mapping[str, Any], switches: list[str]) -> str:
    return f"{_architecture(hf)} targets do not support {', '.join(switches)}: use a target without"
