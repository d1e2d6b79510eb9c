"""The tasks of a benchmark: files of prompts, and data sets of the hub that are known by a task's name."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasteagle_jax.data.sources import Prompt, read_prompts
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line


class Preset(NamedTuple):
    """Where a task's questions are on the hub, and how a row becomes the user's messages."""

    args: tuple[str, ...]  # of datasets.load_dataset
    options: Mapping[str, Any]  # likewise; read as a stream
    turns: Callable[[Mapping[str, Any]], list[str]]

    @property
    def where(self) -> str:
        """The data set, in words."""
        return str(self.options.get("data_files", " ".join(self.args)))


def _alpaca(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]]


def _mgsm(language: str) -> Preset:
    """A language's questions, whose data set is a folder of tables (its loading script is refused by datasets 4)."""
    file = f"hf://datasets/juletxara/mgsm/mgsm_{language}.tsv"
    options = {"data_files": file, "split": "train", "sep": "\t", "column_names": ["question", "answer"]}
    return Preset(("csv",), options, lambda row: [row["question"]])


def _speed_bench(config: str) -> Preset:
    return Preset(("nvidia/SPEED-Bench", config), {"split": "test"}, lambda row: list(row["turns"]))


TEST = {"split": "test"}
PRESETS = {
    "mt_bench": Preset(("HuggingFaceH4/mt_bench_prompts",), {"split": "train"}, lambda row: list(row["prompt"])),
    "humaneval": Preset(
        ("openai/openai_humaneval",), TEST, lambda row: [f"Complete the code I provided.\n{row['prompt']}"]
    ),
    "gsm8k": Preset(("openai/gsm8k", "main"), TEST, lambda row: [row["question"]]),
    "alpaca": Preset(("tatsu-lab/alpaca",), {"split": "train"}, _alpaca),
    "cnn_dm": Preset(("abisee/cnn_dailymail", "3.0.0"), TEST, lambda row: [f"Summarize: {row['article']}"]),
    "speed_bench": _speed_bench("qualitative"),
    **{f"speed_bench_{size}": _speed_bench(f"throughput_{size}") for size in ("1k", "2k", "8k", "16k", "32k")},
    **{f"mgsm_{each}": _mgsm(each) for each in ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")},
}
# Names that people know, whose questions are no data set of the hub.
FILES = {"spec_bench": "data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench"}


def read_tasks(names: Sequence[str], folder: Path | None, limit: int | None) -> dict[str, list[Prompt]]:
    """The first `limit` prompts of each task.

    A task is a file of `folder` by its name without .jsonl, or else a source (see sources.py): a file by its path, or a
    data set of the hub as owner/name:split; or else one of PRESETS. Raises UserError for one that is none of these, or
    holds no prompt.
    """
    there = [] if folder is None else sorted(path.stem for path in folder.glob("*.jsonl"))
    if folder is not None and not there:
        raise UserError(f"{folder} holds no .jsonl file: name a folder of prompt files")
    tasks: dict[str, list[Prompt]] = {}
    for name in dict.fromkeys(names):
        if folder is not None and name in there:
            source = str(folder / f"{name}.jsonl")
        elif "/" in name or Path(name).suffix or Path(name).exists():
            source = name
        elif name in PRESETS:
            tasks[name] = read_preset(name, limit)
            continue
        elif name in FILES:
            raise UserError(f"task {name!r} is not on the hub: give the file, {FILES[name]}")
        else:
            known = f"{folder} has {', '.join(there)}; " if there else ""
            raise UserError(
                f"task {name!r} is not known: {known}the hub {', '.join(PRESETS)}; or name a folder of files with "
                "--prompts-folder, a file, or a data set, owner/name:split"
            )
        prompts = list(read_prompts(source, limit))
        if not prompts:
            raise UserError(f"no prompt in {source}: name another task")
        stem = Path(source).stem
        tasks[name if name in there or stem in (*there, *tasks) else stem] = prompts
    return tasks


def read_preset(name: str, limit: int | None) -> list[Prompt]:
    """The first `limit` prompts of one of PRESETS, from the hub.

    Raises UserError without the hub, or if its rows are not as they were.
    """
    import datasets  # seconds to import, and few runs need it

    preset = PRESETS[name]
    try:
        rows = datasets.load_dataset(*preset.args, **preset.options, streaming=True)
        turns = [preset.turns(row) for row in itertools.islice(rows, limit)]
    except Exception as error:  # whatever the hub, the network and the readers raise
        raise UserError(
            f"task {name!r} is {preset.where} on the hub, which does not load ({first_line(error)}): give a file of "
            f'lines {{"turns": ["..."]}} instead, as {name}.jsonl in --prompts-folder'
        ) from error
    return [Prompt(f"{name}/{i}", each) for i, each in enumerate(turns)]
