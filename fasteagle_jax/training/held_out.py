"""The acceptance on rows that no step trains on, which says when more epochs stop to help."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fasteagle_jax.data.conversations import read_conversations
from fasteagle_jax.data.features import Features
from fasteagle_jax.data.manifest import check_target
from fasteagle_jax.data.packing import PackedData
from fasteagle_jax.devices.sharding import place_batch
from fasteagle_jax.targets.loading import LoadedTarget
from fasteagle_jax.training.config import RunConfig
from fasteagle_jax.training.losses import PathSums
from fasteagle_jax.training.metrics_log import Record, rounded
from fasteagle_jax.training.step import path_measure

LENGTH = "held-out length"  # by which weights are better than others


class HeldOut:
    """A measurement of weights on held-out rows, given the true tokens before each guess."""

    def __init__(
        self,
        config: RunConfig,
        loaded: LoadedTarget,
        data: PackedData,
        store: Features | None,
        graph: Any,
        constants: Any,
        mesh: Mesh | None,
    ):
        """Of the pieces that `data` holds out, or of the files that the configuration names, or of nothing."""
        choice = config.held_out
        self._target, self._constants, self._mesh, self._batch_size = loaded.model, constants, mesh, config.batch_size
        self._data, self._store = data, store
        self._rows: list[list[int]] = []
        if choice.data:
            check_target(choice.data, *loaded.fingerprints)
            texts = read_conversations(*choice.data, vocab_size=loaded.model.config.vocab_size)
            self._data, self._store = PackedData(texts, config.length, config.batch_size, 0), None
            self._rows = self._data.sample_rows(choice.rows, held_out=False)
        elif choice.share:
            self._rows = data.sample_rows(choice.rows, held_out=True)
        out = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self._measure = path_measure(config, graph, out)

    def __call__(self, weights: Any) -> Record:
        """The figures of a record; none if nothing is held out.

        The accuracy by level; the acceptance length of a chain, 1 + the number of leading right guesses, a mean over
        paths; and likewise the length expected from the acceptances sum min(p, q).
        """
        if not self._rows:
            return {}
        size = self._batch_size
        batches = [self._rows[first : first + size] for first in range(0, len(self._rows), size)]
        batches[-1] += [[]] * (size - len(batches[-1]))
        sums = PathSums(*(sum(parts) for parts in zip(*(self._sums(weights, rows) for rows in batches), strict=True)))
        paths = max(int(sums.count[0]), 1)
        return {
            "held-out accuracy": rounded(sums.hits / np.maximum(sums.count, 1)),
            LENGTH: round(1 + float(sums.run) / paths, 5),
            "held-out expected length": round(1 + float(sums.length) / paths, 5),
        }

    def _sums(self, weights: Any, rows: list[list[int]]) -> Any:
        def filled(own: slice) -> Any:
            return self._data.filled(rows[own]), None if self._store is None else self._store.of(rows[own])

        batch, values = place_batch(self._mesh, filled, len(rows))
        return jax.tree.map(np.asarray, self._measure(weights, self._constants, self._target, batch, values))


def stalled(records: list[Record], patience: int) -> bool:
    """Whether the last `patience` measurements were no better than the best before them; 0 never is."""
    lengths = [record[LENGTH] for record in records if LENGTH in record]
    return bool(patience) and len(lengths) > patience and max(lengths[-patience:]) <= max(lengths[:-patience])
