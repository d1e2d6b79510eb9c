"""Many programs compiled for many slices, each in a process of its own: `fasteagle compile --table`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasteagle_jax.compiling.programs import NO_FIT
from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.devices.chips import GIB
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import write_new

SAME_SIZES = "DeepSeek-R1-Distill-LLaMA-8B has LLaMA-3.1-8B's sizes, and so its rows."

CRASHES = (signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)

# Runs of PUBLISHED and the slices that they are compiled for.
TARGETS = {
    "llama31_8b": ("v4:2x2x2", "v5e:2x4", "v6e:2x4", "tpu7x:2x2x1"),
    "vicuna_13b": ("v5e:2x4", "v6e:2x4"),
    "llama33_70b": ("v5e:4x4", "v5e:4x8", "v5p:2x2x1", "v5p:2x2x4"),
    "qwen3_8b": ("v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
    "gemma3_12b": ("v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
    "mistral_7b": ("v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
    "qwen3_30b_a3b": ("v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
}

COLUMNS = {
    f"{kind}, batch {batch}": ("--program", "decode", "--batch", str(batch), "--tree", tree)
    for batch in (1, 32)
    for kind, tree in (("plain", "plain"), ("60 nodes", "best_first:60"))
} | {f"train, {length}": ("--program", "train", f"length={length}") for length in (2048, 8192)}


def table(folder: Path) -> str:
    """The table of TARGETS by their slices in Markdown; programs that have no file in the folder are compiled."""
    folder.mkdir(parents=True, exist_ok=True)
    head = ("target", "slice", "program", "peak a chip", "bytes ratio", "FLOPs ratio", "estimate, ms", "bound by")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, slices in TARGETS.items():
        longest = PUBLISHED[name].target_config.max_positions  # type: ignore[union-attr]
        for slice_name in slices:
            for title, words in COLUMNS.items():
                if any(word == f"length={n}" for word in words for n in (2048, 8192) if n > longest):
                    continue
                path = file_of(folder, name, slice_name, title)
                if not path.exists():
                    compile_apart(path, ["--config", name, "--topology", slice_name, *words])
                lines.append(f"| {name} | {slice_name} | {title} | {_cells(json.loads(path.read_text())[0])} |")
    return "\n".join(lines)


def file_of(folder: Path, name: str, slice_name: str, title: str) -> Path:
    """Where the table keeps one program's figures, as --json has them."""
    return folder / "-".join((name, slice_name.replace(":", "-"), title.replace(",", "").replace(" ", "-") + ".json"))


def compile_apart(path: Path, words: Sequence[str]) -> None:
    """Writes what `fasteagle compile --json` writes, from a process of its own, since a compiler's bug can end it.

    The file holds the figures, or says that the compiler crashed or what does not fit. Any other failure is a
    UserError and leaves no file: another call may succeed.
    """
    command = [sys.executable, "-m", "fasteagle_jax.cli", "compile", *words, "--json", str(path)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode == 0:
        print(f"{path} written", file=sys.stderr)
        return
    reason = (done.stderr.strip().splitlines() or ["failed"])[-1].removeprefix("error: ")
    if -done.returncode in CRASHES:
        reason = "the compiler crashed"
    elif not reason.startswith(NO_FIT):
        raise UserError(f"{' '.join(words)}: {reason[:300]}")
    write_new(path, json.dumps([{"error": reason}]) + "\n")


def _cells(figures: dict[str, Any]) -> str:
    if "error" in figures:
        return f"no: {figures['error']} | | | |"
    share = f"{figures['peak'] / GIB:.1f} of {figures['hbm'] / GIB:.1f} GiB"
    products = figures["cost"]["product_flops"] / figures["necessary_flops"]
    moved = f"{figures['bytes_ratio']:.2f}" if figures["program"] == "decode" else ""
    return f"{share} | {moved} | {products:.2f} | {1e3 * figures['estimate']:.1f} | {figures['bound']}"
