"""A training run's configuration, from a Python file and `key=value` changes, and what is saved of it."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fasteagle_jax.data.manifest import differences
from fasteagle_jax.devices.sharding import MeshShape
from fasteagle_jax.drafters.base import DrafterConfig
from fasteagle_jax.drafters.files import TOKENIZER, config_from
from fasteagle_jax.drafters.table import CLASSES, class_named, default_config
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line, read_json
from fasteagle_jax.nn.packed_attention import KINDS
from fasteagle_jax.nn.rope import RopeConfig
from fasteagle_jax.targets.checkpoint import Checkpoint
from fasteagle_jax.targets.config import DecoderConfig
from fasteagle_jax.targets.llama import LlamaConfig
from fasteagle_jax.targets.table import FAMILIES, family_name
from fasteagle_jax.targets.tokenizer import load_tokenizer, vocabulary_fingerprint
from fasteagle_jax.training.deepkd import DeepKD
from fasteagle_jax.training.losses import LossConfig
from fasteagle_jax.training.optimizer import OptimizerConfig

# Rematerialization of a drafter's level in the backward pass, by name: nothing is recomputed, all but the level's
# input, or all but the results of products.
REMAT: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class StepOptions(NamedTuple):
    """Choices of a step that change its speed and memory, and its results by rounding alone."""

    attention: str = "auto"  # of packed_attention.KINDS
    remat: str = "none"  # of REMAT


@dataclasses.dataclass(frozen=True)
class DrafterChoice:
    """The drafter to train; sizes that are None are the target's."""

    kind: str = "fasteagle"  # or eagle3
    num_levels: int = 7
    draft_vocab_size: int | None = None  # rows of the head, the most frequent tokens of answers; None for all
    vocabulary_data: tuple[str, ...] = ()  # files of conversations whose answers are counted; empty: the run's data
    intermediate_size: int | None = None
    feature_layers: tuple[int, ...] | None = None  # None: 2, L // 2, L - 3
    norm_inputs: bool = False  # fuse features and token each over its root mean square
    reinject: bool = False  # add the fused input again before every level
    correction: int | None = None  # hidden units that correct a guess by the token before it; None for none
    context: str = "own"  # whose keys a level attends to: its "own", the "target"'s, or the first level's ("shared")
    context_layer: int | None = None  # of the target, for context target; None for the last with full attention
    levels: str = "own"  # each level's attention and MLP: "own", "shared" by all, or by all after the "first"
    side_by_side: bool = False  # a level's attention and MLP read the same stream
    edges: int | None = None  # rank of scores that a guess gets by the tokens before it; None for none
    edges_reach: int = 1  # how many tokens
    edges_gated: bool = False  # these read silu of the tokens and the state
    head: str = "target"  # whose head reads guesses: the target's, frozen, or its "own", which starts as that
    window: int | None = None  # positions that a level attends to; None for all
    from_target: bool = False  # start each level, or EAGLE-3's one layer, from the target's last layer
    start: str = ""  # start from the drafter in this folder: its weights, draft vocabulary and first levels
    strict: bool = False  # `start` must have been trained for this very target, not for one of the same sizes
    scale_features: bool = True  # divide each feature by its root mean square, measured on the first batch

    def __post_init__(self) -> None:
        if self.norm_inputs and self.from_target and not self.scale_features:
            raise UserError(
                "drafter norm_inputs with from_target starts at the size of the target's stream, which is measured "
                "with scale_features: set drafter.scale_features=True"
            )


# Of DrafterChoice, of some kinds alone.
KIND_FIELDS = {
    "norm_inputs",
    "reinject",
    "correction",
    "context",
    "context_layer",
    "levels",
    "side_by_side",
    "edges",
    "edges_reach",
    "edges_gated",
    "head",
}


@dataclasses.dataclass(frozen=True)
class EvalChoice:
    """The real decode on held-out prompts during training."""

    prompts: str = ""  # a source of data.read_prompts; empty for no evaluation
    limit: int = 16
    max_new: int = 64
    trees: tuple[str, ...] = ("chain", "best_first:16")
    every: int = 500

    def __post_init__(self) -> None:
        for name, least in (("limit", 0), ("max_new", 1), ("every", 1)):
            if getattr(self, name) < least:
                raise UserError(f"evaluation {name} is {getattr(self, name)}: it must be at least {least}")


@dataclasses.dataclass(frozen=True)
class HeldOutChoice:
    """The acceptance on held-out rows during training, given the true tokens: cheap, and what stops a run."""

    share: float = 0.0  # of the run's conversations, which are then never trained on
    data: tuple[str, ...] = ()  # or files of conversations that the run's data does not have
    rows: int = 32  # packed rows that are measured, at most
    every: int = 500  # steps
    patience: int = 0  # measurements without gain after which training stops; 0 for none

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise UserError(f"held_out share is {self.share}: it must be 0 or more and below 1")
        for name, least in (("rows", 1), ("every", 1), ("patience", 0)):
            if getattr(self, name) < least:
                raise UserError(f"held_out {name} is {getattr(self, name)}: it must be at least {least}")

    @property
    def is_wanted(self) -> bool:
        """Whether anything is held out."""
        return bool(self.share or self.data)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Settings of a training run: all that decides its result, and what is logged of it."""

    target: str  # a name or path for targets.loading.open_checkpoint
    data: tuple[str, ...]  # files of conversations, from prepare-data
    steps: int
    batch_size: int = 4  # B, rows
    accumulate: int = 1  # microbatches of a step: the same step in less memory
    length: int = 512  # T, tokens a row
    seed: int = 0
    dtype: str = "bfloat16"  # of the products
    target_dtype: str = ""  # of the frozen target's weights: int8 (see targets.loading), empty for `dtype`
    drafter: DrafterChoice = DrafterChoice()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvalChoice = EvalChoice()
    held_out: HeldOutChoice = HeldOutChoice()
    save_every: int = 200
    keep: int = 2  # last checkpoints; that of the best acceptance length, held-out or else measured, is kept besides
    spike_factor: float = 0.0  # skip a batch whose loss is above this many times the mean of the last 100; 0 for none
    max_bad_steps: int = 20  # skipped updates in a row (not finite, or spikes) that end the run
    tensorboard: bool = True  # events in the run folder's tensorboard/
    wandb: str = ""  # a project of Weights & Biases; empty for none
    mesh: MeshShape | None = None  # of devices; None for one device
    attention: str = "auto"  # over packed rows, one of packed_attention.KINDS
    remat: str = "none"  # of the drafter's levels, a policy of REMAT
    adapter: str = ""  # folder of a LoRA adapter that is merged into the target; empty for none
    features: str = ""  # a folder of prepare-features, which replaces the target's layers; empty: they run
    target_config: DecoderConfig | None = None  # the target's sizes, for use without its weights

    @property
    def dtype_of_target(self) -> Any:
        """The dtype that the target's weights are loaded in."""
        return jnp.dtype(self.target_dtype or self.dtype)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "length", "save_every", "keep", "max_bad_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} is {value!r}: give a whole number of at least 1")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}: "
                f"use a multiple of {self.accumulate}"
            )
        if self.spike_factor and self.spike_factor <= 1:
            raise UserError(f"spike_factor is {self.spike_factor}: give a factor above 1, e.g. 3, or 0 for none")
        for name, known in (("attention", KINDS), ("remat", tuple(REMAT))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(known)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}: use float32 or bfloat16")
        if self.target_dtype not in ("", "int8"):
            raise UserError(f"target_dtype is {self.target_dtype!r}: use int8, or nothing for the dtype {self.dtype}")


def load_config(path: str) -> RunConfig:
    """The RunConfig that `get_config()` of the Python file at `path` returns."""
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file: name a config, e.g. configs/smollm2_135m.py")
    spec = importlib.util.spec_from_file_location("run_config", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (SyntaxError, AttributeError, TypeError, ImportError) as error:
        raise UserError(f"{path} gives no configuration ({error}): define get_config() -> RunConfig") from None
    if not isinstance(config, RunConfig):
        raise UserError(f"get_config() of {path} returns a {type(config).__name__}: it must return a RunConfig")
    return config


def apply_changes(config: RunConfig, changes: Sequence[str]) -> RunConfig:
    """The config with changes like `steps=100`, `loss.share=0.5` or `data=a.jsonl,b.jsonl`; UserError for an unknown
    key.

    `loss.deepkd` is a group that need not be there: True, or a change of one of its keys, makes one of defaults.
    """
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"{change!r} is not a change: write key=value, e.g. steps=100")
        config = _changed(config, key.split("."), text, key)
    return config


def _changed(config: Any, path: list[str], text: str, whole_key: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(config)}
    if path[0] not in fields:
        raise UserError(f"{whole_key} is not a key: there {'are' if len(fields) > 1 else 'is'} {', '.join(fields)}")
    old = getattr(config, path[0])
    kind = str(fields[path[0]].type)
    if kind == "DeepKD | None":
        if len(path) == 1:
            return dataclasses.replace(config, **{path[0]: _group(text, old, DeepKD, whole_key)})
        old = old or DeepKD()
    if dataclasses.is_dataclass(old) and not (len(path) == 1 and kind == "MeshShape | None"):
        if len(path) == 1:
            keys = ", ".join(f"{whole_key}.{field.name}" for field in dataclasses.fields(old))
            raise UserError(f"{whole_key} is a group: change one of {keys}")
        return dataclasses.replace(config, **{path[0]: _changed(old, path[1:], text, whole_key)})
    if len(path) > 1:
        raise UserError(f"{whole_key} is not a key: {path[0]} holds a single value")
    return dataclasses.replace(config, **{path[0]: _value(text, kind, whole_key)})


def _group(text: str, old: Any, kind: type, key: str) -> Any:
    """A group that need not be there: as it was, or of defaults, for True, and None for None or False."""
    if text not in ("True", "False", "None"):
        keys = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(kind))
        raise UserError(f"{key}={text}: give True, None, or change one of {keys}")
    return (old or kind()) if text == "True" else None


def _value(text: str, kind: str, key: str) -> Any:
    """`text` as a value of the annotated type `kind`."""
    if kind == "str":
        return text
    if kind == "MeshShape | None":
        return None if text == "None" else MeshShape.parse(text)
    if kind == "tuple[str, ...]":
        return tuple(part for part in text.split(",") if part)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "int | None": (int, type(None)),
        "tuple[int, ...] | None": (tuple, type(None)),
        "tuple[float, float]": (tuple,),
        "tuple[float, float, float]": (tuple,),
    }
    good = isinstance(value, kinds.get(kind, ()))
    if not good or (isinstance(value, bool) and "bool" not in kind):
        raise UserError(f"{key}={text} is not of type {kind}")
    return float(value) if kind == "float" else value


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration as a JSON file gives it back; the sizes of a target that is no Llama name their family."""
    raw = json.loads(json.dumps(dataclasses.asdict(config)))
    if config.target_config is not None and type(config.target_config) is not LlamaConfig:
        raw["target_config"]["family"] = family_name(config.target_config)
    return raw


def trained(config: RunConfig, steps: int, tokens: int, earlier: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """A drafter's entry `trained` in config.json; files by their names alone, since drafters are given away.

    `earlier` are such entries, oldest first, of the runs that trained the drafter it started from. Their tokens count
    in `total_tokens`, which is None if the first of them is not known.
    """

    def name(path: str) -> str:
        return Path(path).name if path and Path(path).exists() else path

    choice, evaluation, held_out = config.drafter, config.evaluation, config.held_out
    config = dataclasses.replace(
        config,
        target=name(config.target),
        adapter=name(config.adapter),
        data=tuple(map(name, config.data)),
        features=name(config.features),
        drafter=dataclasses.replace(
            choice, start=name(choice.start), vocabulary_data=tuple(map(name, choice.vocabulary_data))
        ),
        evaluation=dataclasses.replace(evaluation, prompts=name(evaluation.prompts)),
        held_out=dataclasses.replace(held_out, data=tuple(map(name, held_out.data))),
    )
    entry = {"steps": steps, "tokens": tokens, "run": to_json(config)}
    if not choice.start:
        return entry
    is_known = bool(earlier) and not earlier[0]["run"]["drafter"]["start"]
    total = tokens + sum(run["tokens"] for run in earlier) if is_known else None
    return entry | {"total_tokens": total, "earlier": list(earlier)}


def target_tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """A drafter's entry in config.json of its target's tokenizer; none for a target without one."""
    try:
        return {TOKENIZER: vocabulary_fingerprint(load_tokenizer(checkpoint.path))}
    except UserError:
        return {}


def earlier_runs(folder: str) -> list[dict[str, Any]]:
    """Entries `trained` of the runs that trained the drafter in a folder, oldest first; empty if there are none."""
    path = Path(folder, "config.json")
    last = read_json(path).get("trained") if folder and path.is_file() else None
    return [] if last is None else [*last.get("earlier", ()), {key: last[key] for key in ("steps", "tokens", "run")}]


def from_json(raw: dict[str, Any]) -> RunConfig:
    """The configuration of which `to_json` gave `raw`; keys that it does not have are at their defaults.

    Raises UserError for a key that is not known, as a later version's may be.
    """

    def build(kind: Any, raw: dict[str, Any], prefix: str = "") -> Any:
        parts = {field.name: _PARTS.get(str(field.type)) for field in dataclasses.fields(kind)}
        values = {}
        for key, value in raw.items():
            if key == "target_config" and value is not None:
                sizes = {name: one for name, one in value.items() if name != "family"}
                values[key] = build(FAMILIES[value.get("family", "llama")].config, sizes, f"{prefix}{key}.")
            elif parts.get(key) is not None and value is not None:
                values[key] = build(parts[key], value, f"{prefix}{key}.")
            elif key in parts:
                values[key] = tuple(value) if isinstance(value, list) else value
        config = kind(**values)
        if unknown := [f"{prefix}{key}" for key in raw if key not in parts]:
            raise UserError(
                f"the run's configuration has {', '.join(unknown)}, which this version does not know: "
                "use the version that wrote it, or start another run"
            )
        return config

    return build(RunConfig, raw)


def config_of_record(record: dict[str, Any]) -> tuple[RunConfig, DrafterConfig | None]:
    """The configuration in the record of a checkpoint, and the drafter's sizes if some are those of a parent.

    UserError if it is damaged, and as of `from_json`.
    """
    try:
        sizes = record.get("sizes")
        return from_json(record["config"]), None if sizes is None else config_from(sizes)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UserError(
            f"a checkpoint's record of the run is damaged ({first_line(error)}): take an older checkpoint"
        ) from error


_PARTS: dict[str, Any] = {
    "DrafterChoice": DrafterChoice,
    "LossConfig": LossConfig,
    "DeepKD | None": DeepKD,
    "OptimizerConfig": OptimizerConfig,
    "EvalChoice": EvalChoice,
    "HeldOutChoice": HeldOutChoice,
    "MeshShape | None": MeshShape,
    "RopeConfig": RopeConfig,
}


def changes_since(old: dict[str, Any], config: RunConfig) -> list[str]:
    """`key old, not new` for what differs from a configuration saved earlier; keys it lacks are at their defaults."""
    return differences(to_json(from_json(old)), to_json(config))


def drafter_config(
    choice: DrafterChoice, target_config: DecoderConfig, parent: DrafterConfig | None = None
) -> DrafterConfig:
    """The sizes of the drafter of a run for a target of these sizes.

    Of a `parent` of the same kind and context, which it starts from, as `load_drafter` gives its sizes for this target,
    it has what a run cannot choose: an imported drafter's rotary table, heads and norms need not be the target's.
    """
    known = {field.name for field in dataclasses.fields(class_named(choice.kind).Config)}
    # What is at its default, None for the target's sizes, need not be of the kind.
    changes = {name: value for name, value in vars(choice).items() if value is not None and name in known}
    for field in dataclasses.fields(choice):
        if field.name in KIND_FIELDS - known and getattr(choice, field.name) != field.default:
            kinds = ", ".join(kind for kind, c in CLASSES.items() if field.name in c.Config.__dataclass_fields__)
            raise UserError(
                f"drafter.{field.name} is of drafters of kind {kinds}, not {choice.kind}: "
                f"set drafter.{field.name}={field.default}"
            )
    form = choice.kind, choice.context
    if parent is not None and (parent.kind, getattr(parent, "context", choice.context)) == form:
        for name in known - {field.name for field in dataclasses.fields(choice)} - {"hidden_size", "vocab_size"}:
            changes[name] = getattr(parent, name)
    return default_config(target_config, **changes)
