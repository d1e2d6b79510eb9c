"""What a drafter of some acceptance would bring on chips that are not there: `fasteagle bench --predict`.

speed-up = tau x (estimated time of a plain round) / (estimated time of a round with its tree), of the programs that
`fasteagle compile --table` compiled; tau = 1 + r1 + r1 r2 + ... of the rates at which the guesses of each depth are
accepted where those before them are (`by depth` of fasteagle bench). docs/tpu.md says what the estimate leaves out.

example:
  fasteagle compile --table runs/compiled
  fasteagle bench --predict runs/compiled --rates 0.8/0.75/0.7/0.65/0.6/0.6/0.6
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Sequence
from pathlib import Path

from fasteagle_jax.compiling.table import SAME_SIZES, TARGETS, file_of
from fasteagle_jax.errors import UserError


def acceptance_length(rates: Sequence[float]) -> float:
    """tau: tokens a round brings, the target's own included."""
    return 1 + sum(itertools.accumulate(rates, operator.mul))


def predictions(folder: Path, rates: Sequence[float]) -> str:
    """In Markdown, for each target and slice of the folder, the estimated speed-up of a 60-node tree."""
    tau = acceptance_length(rates)
    head = ("target", "slice", "batch", "plain, ms", "60 nodes, ms", "speed-up", "tokens/s, all rows")
    lines = [
        f"tau {tau:.2f}; times and speed-ups are estimates from compiled programs\n{SAME_SIZES}",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for (name, slices), batch in itertools.product(TARGETS.items(), (1, 32)):
        for slice_name in slices:
            titles = (f"plain, batch {batch}", f"60 nodes, batch {batch}")
            times = [_estimate(file_of(folder, name, slice_name, title)) for title in titles]
            if all(math.isfinite(t) for t in times):
                plain, drafted = times
                cells = f"{1e3 * plain:.2f} | {1e3 * drafted:.2f} | {tau * plain / drafted:.2f}"
                lines.append(f"| {name} | {slice_name} | {batch} | {cells} | {batch * tau / drafted:.0f} |")
    if len(lines) == 4:
        raise UserError(f"{folder} holds no plain and drafted round: make them with fasteagle compile --table {folder}")
    return "\n".join(lines)


def _estimate(path: Path) -> float:
    """Seconds of a compiled program; nan if it is not there or does not fit."""
    if not path.exists():
        return math.nan
    try:
        return json.loads(path.read_text())[0].get("estimate", math.nan)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and run fasteagle compile --table again") from None
