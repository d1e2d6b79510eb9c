"""What the benchmark compares, and on what: decoders by their names, and prompts by their tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fasteagle_jax.bench.prompts import Models
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.files import load_drafter, read_config
from fasteagle_jax.drafters.simulated import parse_rates
from fasteagle_jax.drafters.table import CLASSES
from fasteagle_jax.engine.shipped import SHIPPED, drafter_folder
from fasteagle_jax.errors import UserError
from fasteagle_jax.nn.linear import product_dtype
from fasteagle_jax.targets.checkpoint import Checkpoint

PLAIN, SIMULATED = "plain", "simulated"
NO_DRAFTER = "none"  # in the place of a drafter's folder: lookup alone


@dataclasses.dataclass(frozen=True)
class DecoderSpec:
    """A decoder to compare: plain, or a drafter with the tree that it drafts."""

    name: str
    tree: str | None = None  # None: plain
    folder: Path | None = None  # of a trained drafter
    rates: tuple[float, ...] = ()  # of a simulated one

    @property
    def is_lookup_alone(self) -> bool:
        """Whether all guesses are copied from the text."""
        return self.tree is not None and self.folder is None and not self.rates

    def __str__(self) -> str:
        return self.name if self.tree is None else f"{self.name} {self.tree}"


def parse_decoders(words: Sequence[str], tree: str) -> list[DecoderSpec]:
    """The decoders that `plain`, `NAME=FOLDER[@TREE]`, `NAME=none@TREE` and `simulated=RATES[@TREE]` name, plain
    decoding first.

    `tree` is for those that name none. Raises UserError for what is not understood.
    """
    decoders = [DecoderSpec(PLAIN)]
    for word in words:
        if word == PLAIN:
            continue
        name, equals, rest = word.partition("=")
        value, _, own_tree = rest.partition("@")
        if not equals or not name or not value or name == PLAIN:
            raise UserError(
                f"drafter {word!r} is not known: write plain, NAME=FOLDER or simulated=0.8/0.7/0.6, each with @TREE "
                f"behind it if wanted, FOLDER being that of a drafter ({', '.join(CLASSES)}) or `{SHIPPED}`"
            )
        if name.startswith(SIMULATED):
            decoders.append(DecoderSpec(name, own_tree or tree, rates=parse_rates(value)))
        elif value == NO_DRAFTER:
            if not TreeSpec.parse(own_tree or tree).lookup:
                raise UserError(f"{word} drafts nothing: write {name}={NO_DRAFTER}@best_first:8+lookup:8")
            decoders.append(DecoderSpec(name, own_tree))
        else:
            decoders.append(DecoderSpec(name, own_tree or tree, Path(value).expanduser()))
    folders: dict[str, Any] = {}
    for decoder in decoders:
        if folders.setdefault(decoder.name, (decoder.folder, decoder.rates)) != (decoder.folder, decoder.rates):
            raise UserError(f"two drafters have the name {decoder.name}: give each its own")
    return list(dict.fromkeys(decoders))


def find_decoder(record: Mapping[str, Any], decoders: Iterable[DecoderSpec]) -> DecoderSpec:
    """The decoder whose name and tree a record of results holds."""
    return next(d for d in decoders if (d.name, d.tree) == (record["drafter"], record["tree"]))


def find_drafters(decoders: Sequence[DecoderSpec], checkpoint: Checkpoint) -> list[DecoderSpec]:
    """The decoders with their drafters' folders, `shipped` being the one that comes with the program for the target.

    Raises UserError for a folder that holds no drafter, before anything large is read.
    """
    found = []
    for decoder in decoders:
        if decoder.folder is not None:
            folder = drafter_folder(decoder.folder, checkpoint)
            if folder is None:
                raise UserError(f"no drafter comes with this program for {checkpoint.path}: name a drafter's folder")
            read_config(folder)
            decoder = dataclasses.replace(decoder, folder=folder)
        found.append(decoder)
    return found


def load_drafters(models: Models, decoders: Sequence[DecoderSpec]) -> dict[Path, Any]:
    """The trained drafters by their folders; UserError for one that does not fit the target."""
    config, dtype = models.target.config, product_dtype(models.dtype)
    folders = dict.fromkeys(decoder.folder for decoder in decoders if decoder.folder is not None)
    return {folder: load_drafter(folder, config, models.fingerprint, dtype) for folder in folders}
