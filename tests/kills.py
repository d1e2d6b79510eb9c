"""Kills `fasteagle batch` and `fasteagle train` again and again, and compares what they end with with undisturbed runs.

    python tests/kills.py --seed 0 --kills 100

Each of the two commands is killed (SIGKILL) so many times. Most kills come shortly after one of the writes to the
command's folder, the others at a moment since its start, loading and compiling included. After every kill the same
command is given again, until a run ends; another one is then begun. Whatever is left behind must be of use: of a batch
file, the records that were whole stay as they are, and in the end each line has one, with the tokens of an undisturbed
run; of training, every step has one line in metrics.jsonl, with the loss of an undisturbed run, and the drafter is the
same bit by bit. No other files may be left.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.modules["torch"] = None  # type: ignore[assignment]  # transformers would import it, in seconds, for a tokenizer

import jax  # noqa: E402
import numpy as np  # noqa: E402
from tiny_folder import make_drafter, make_target  # noqa: E402

from fasteagle_jax.commands import batch, train_drafter  # noqa: E402
from fasteagle_jax.data.conversations import Conversation, ConversationWriter  # noqa: E402

ROOT = Path(__file__).parents[1]
PRELOADED = (  # what takes longest to import; the command itself imports it late
    "matplotlib.pyplot",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.configuration_llama",
    "transformers.tokenization_utils_tokenizers",
)
SECONDS = 300  # of a life, at most
MOST_LIVES = 40  # of a run: more than that are a run that does not advance
MOST = "most kills of a run"


@dataclasses.dataclass(frozen=True)
class Killed:
    """A command that is killed and given again: how a run is begun, and what is wrong with what it has left."""

    name: str
    command: Callable[[Path], tuple[Callable[[list[str]], int], list[str]]]  # main and its arguments, for a folder
    values: Callable[[Path], Any]  # of a run's folder, what must be an undisturbed run's
    whole: Callable[[Path], Any]  # what a kill must leave as it is
    is_torn: Callable[[Path], bool]  # whether the kill came in the middle of a write
    writes: int  # that a run makes at least


# --- kills ------------------------------------------------------------------------------------------------------


def kill(one: Killed, rng: random.Random, kills: int, work: Path) -> tuple[collections.Counter[str], list[str]]:
    """What happened, counted, and the failures."""
    counts = collections.Counter(dict.fromkeys(("kills", "torn", "runs", MOST), 0))
    failures: list[str] = []
    undisturbed = work / f"{one.name}-undisturbed"
    started = time.perf_counter()
    undisturbed.mkdir()
    log = work / f"{one.name}.log"
    assert (code := _life(one, undisturbed, None, log)) == 0, f"{code}: {log.read_text()}"
    seconds = time.perf_counter() - started
    expected, files = one.values(undisturbed), _names(undisturbed)
    while counts["kills"] < kills and not failures:
        folder, lives = work / f"{one.name}-killed", 0
        folder.mkdir()
        for lives in range(MOST_LIVES):  # noqa: B007  # counted
            before = one.whole(folder)
            moment = None
            if counts["kills"] < kills:
                moment = _by_time(rng, seconds) if rng.random() < 0.2 else _by_writes(rng, folder, one.writes)
            log.write_text("")
            code = _life(one, folder, moment, log)
            if code == -signal.SIGKILL and moment is not None:
                counts["kills"] += 1
                counts["torn"] += one.is_torn(folder)
                if not _begins_with(one.whole(folder), before):
                    failures.append(f"a kill took back what was written: {before} became {one.whole(folder)}")
                    break
                continue
            if code:
                failures.append(f"ended with {code}: {log.read_text()[-2000:]}")
            break
        else:
            failures.append(f"{MOST_LIVES} lives, and the run has not ended: {log.read_text()[-2000:]}")
        counts["runs"] += 1
        counts[MOST] = max(counts[MOST], lives)
        if not failures and (found := one.values(folder)) != expected:
            failures.append(f"run {counts['runs']} ended otherwise: {found}, not {expected}")
        if not failures and (names := _names(folder)) != files:
            failures.append(f"run {counts['runs']} left other files: {sorted(names ^ files)}")
        shutil.rmtree(folder)
        print(f"{one.name}: {counts['kills']} kills, {counts['runs']} runs", file=sys.stderr, flush=True)
    return counts, failures


Moment = Callable[[], bool]


def _by_time(rng: random.Random, seconds: float) -> Moment:
    """True after a time of at most `seconds`."""
    end = time.perf_counter() + rng.random() * seconds
    return lambda: time.perf_counter() >= end


def _by_writes(rng: random.Random, folder: Path, most: int) -> Moment:
    """True up to 10 ms after one of the next writes: a file that grows, comes or goes."""
    left, seen, until = rng.randint(1, most), _sizes(folder), [0.0]

    def now() -> bool:
        nonlocal left, seen
        if left:
            if (sizes := _sizes(folder)) != seen:
                left, seen = left - 1, sizes
                until[0] = time.perf_counter() + rng.random() * 0.01
            return False
        return time.perf_counter() >= until[0]

    return now


def _sizes(folder: Path) -> dict[str, int]:
    """The sizes of all files, as far as they do not come and go meanwhile."""
    found = {}
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found[path] = os.stat(path := os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return found


def _names(folder: Path) -> set[str]:
    """The names of files, without those of arrays, which are drawn."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if "/d/" not in name}


def _begins_with(later: Any, before: Any) -> bool:
    return later[: len(before)] == before


def _life(one: Killed, folder: Path, moment: Moment | None, log: Path) -> int:
    """The exit code of the command in a child, killed at `moment`; minus the signal's number where one ended it."""
    if not (pid := os.fork()):
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        main, arguments = one.command(folder)
        os._exit(main(arguments))
    start = time.perf_counter()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        late = time.perf_counter() - start > SECONDS
        if late or (moment is not None and moment()):
            os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            return -signal.SIGALRM if late else code
        time.sleep(0.0005)


# --- a batch file -----------------------------------------------------------------------------------------------


def batch_file(models: Path) -> Killed:
    """Sixty requests of both forms, greedy and sampled, some of them to be refused, and bad lines; with a drafter."""
    source, rng = models / "requests.jsonl", random.Random(3)
    lines = []
    for i in range(60):
        fields = {"seed": i, "temperature": i % 3 / 2, "max_tokens": rng.randrange(20, 50), "n": 2 if i % 7 == 0 else 1}
        body = {"messages": [{"role": "user", "content": "so " * (i % 9)}]} | fields
        openai = {"custom_id": f"request-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(openai if i % 2 else body if i % 4 else {"prompt": "W"} | fields))
        lines += ["rubbish"] * (i % 12 == 0)
    source.write_text("\n".join(lines) + "\n")

    def command(folder: Path) -> tuple[Callable[[list[str]], int], list[str]]:
        words = {"--target": models / "target", "--drafter": models / "drafter", "--tree": "best_first:4"}
        words |= {"--max-len": 256, "--slots": 4, "--input": source, "--output": folder / "out.jsonl"}
        return batch.main, [str(word) for pair in words.items() for word in pair]

    def whole(folder: Path) -> list[str]:
        output = folder / "out.jsonl"
        return [line for line in output.read_text().splitlines(True) if line.endswith("\n")] if output.exists() else []

    def values(folder: Path) -> Any:
        records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        return sorted((record["line"], json.dumps(_answer(record))) for record in records)

    def is_torn(folder: Path) -> bool:
        output = folder / "out.jsonl"
        return output.exists() and output.stat().st_size > 0 and not output.read_bytes().endswith(b"\n")

    return Killed("batch", command, values, whole, is_torn, 40)


def _answer(record: dict[str, Any]) -> Any:
    """What a record answers, without the times."""
    if record["error"]:
        return record["error"]
    if "response" in record:
        return [(choice["message"]["content"], choice["token_ids"]) for choice in record["response"]["body"]["choices"]]
    return [(answer["text"], answer["tokens"]) for answer in record.get("answers", [record])]


# --- training ---------------------------------------------------------------------------------------------------

STEPS = 40


def training(models: Path) -> Killed:
    """A run of STEPS steps with a checkpoint every other one, an average, and a drafter in the end."""

    def command(folder: Path) -> tuple[Callable[[list[str]], int], list[str]]:
        changes = {"target": models / "target", "data": models / "data.jsonl", "tensorboard": False, "steps": STEPS}
        changes |= {"drafter.num_levels": 1, "save_every": 2, "optimizer.ema": 0.9, "evaluation.every": 1000}
        words = ["--config", ROOT / "configs" / "tiny.py", "--run", folder / "run"]
        return train_drafter.main, [*map(str, words), *(f"{name}={value}" for name, value in changes.items())]

    def values(folder: Path) -> Any:
        """Losses and gradient norms of steps, and a digest of the drafter's weights."""
        records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        weights = (folder / "run" / "drafter" / "model.safetensors").read_bytes()
        steps = [(record["step"], record["loss"], record["gradient_norm"]) for record in records]
        return steps, hashlib.sha256(weights).hexdigest()

    def whole(folder: Path) -> list[int]:
        """Whether there are checkpoints: old ones make room for new ones."""
        return [1] * bool(_checkpoints(folder))

    def is_torn(folder: Path) -> bool:
        return any("tmp" in name for name in _checkpoints(folder))

    return Killed("training", command, values, whole, is_torn, 80)


def _checkpoints(folder: Path) -> list[str]:
    place = folder / "run" / "checkpoints"
    return os.listdir(place) if place.exists() else []


# --- the command ------------------------------------------------------------------------------------------------


def make_models(models: Path) -> None:
    """A target that hardly ever ends an answer, a drafter for it, and forty conversations."""
    make_drafter(models / "drafter", make_target(models / "target", stop_rate=-4))
    rng = np.random.default_rng(0)
    samples = []
    for i in range(40):
        tokens = [int(t) for t in (rng.integers(256) + np.arange(rng.integers(20, 60))) % 256]
        samples.append(Conversation.of(f"sample-{i}", tokens, [[4, len(tokens)]]))
    with ConversationWriter(models / "data.jsonl") as writer:
        writer.append(samples)


def main(argv: list[str] | None = None) -> int:
    """Prints the counts, and the failures; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=100, help="of each command")
    parser.add_argument("--only", choices=("batch", "training"))
    args = parser.parse_args(argv)
    num_failures = 0
    with tempfile.TemporaryDirectory() as name:
        # Children are forked from this process, which has imported everything and started nothing.
        jax.config.update("jax_platforms", "cpu")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{name}/programs")
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"}
        for module in PRELOADED:
            importlib.import_module(module)
        models = Path(name, "models")
        if not (pid := os.fork()):
            make_models(models)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        for one in (batch_file(models), training(models)):
            if args.only not in (None, one.name):
                continue
            start = time.perf_counter()
            counts, failures = kill(one, random.Random(f"{args.seed} {one.name}"), args.kills, Path(name))
            for failure in failures:
                print(failure, flush=True)
            said = ", ".join(f"{count} {what}" for what, count in counts.items())
            seconds = time.perf_counter() - start
            print(f"{one.name}, seed {args.seed}: {said}; {len(failures)} failed, {seconds:.0f} s", flush=True)
            num_failures += len(failures)
    return int(num_failures > 0)


if __name__ == "__main__":
    sys.exit(main())
