"""A model's tensors by their names in files, from a table of names."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax import nnx

from fasteagle_jax.nn.linear import Linear


class NamedVariable(NamedTuple):
    """A tensor's name in a file, and the variable that holds it."""

    name: str
    variable: nnx.Variable[Any]
    transposed: bool = False  # [out, in] in the file, as torch has a Linear's weight, and [in, out] in the variable


def stored_tensors(model: Any, names: Mapping[str, str]) -> list[NamedVariable]:
    """The tensors of a model by a table from a part's name in files to its place in the model, such as `mlp.up`.

    A part is a variable, stored as NAME.weight, or a module, whose `weight` and `bias` are stored as NAME.weight and
    NAME.bias. Parts and biases that are None, or that a layer of this structure does not have, are left out.
    """
    tensors = []
    for name, place in names.items():
        part = functools.reduce(lambda module, name: getattr(module, name, None), place.split("."), model)
        if isinstance(part, nnx.Variable):
            tensors.append(NamedVariable(f"{name}.weight", part))
        elif part is not None:
            for attribute in ("weight", "bias"):
                if (variable := getattr(part, attribute, None)) is not None:
                    transposed = isinstance(part, Linear) and attribute == "weight" and not part.by_rows
                    tensors.append(NamedVariable(f"{name}.{attribute}", variable, transposed))
    return tensors
