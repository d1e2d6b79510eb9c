"""The tokens of a real target on a device, plain and drafted, against those of this machine's CPU.

A part of `fasteagle check-device`, which for the CPU runs it in a process of its own.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np

from fasteagle_jax.bench.device_check import Row, Task, gaps_where_parted
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.speculative import generate
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.drafters.files import load_drafter
from fasteagle_jax.engine.shipped import SHIPPED, drafter_folder
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.loading import LoadedTarget, is_at_hand, load_target
from fasteagle_jax.targets.tokenizer import encode_chat, load_tokenizer, stop_token_ids

QUESTIONS = (
    "Why is the sky blue?",
    "What is 12 times 7? Explain how you get there.",
    "Write a Python function that reverses a list.",
    "Name three rivers of Europe and where they end.",
)
NEAR = 1e-2  # two logits that float32 sums in another order may exchange
SEED = 1


def answers(name: str, temperature: float, max_new: int, *, drafted: bool) -> dict[str, Any]:
    """The target's answers to QUESTIONS in float32 on this process's device, plain and, if wanted, drafted.

    "plain" and "drafted" are lists of tokens, "drafted" None if no drafter comes for the target; with tokens a second.
    """
    with jax.default_matmul_precision("highest"):
        loaded = load_target(name)
        prompts = _prompts(loaded)
        stop_tokens = tuple(stop_token_ids(load_tokenizer(loaded.checkpoint.path), loaded.checkpoint.path))
        sampling = make_sampling(len(prompts), temperature=temperature, seed=SEED)
        folder = drafter_folder(SHIPPED, loaded.checkpoint)
        ways: dict[str, Any] = {"plain": None}
        if drafted and folder is not None:
            ways["drafted"] = load_drafter(folder, loaded.checkpoint.config, loaded.fingerprint)
        found: dict[str, Any] = {"drafted": None}
        for way, drafter in ways.items():
            tree = None if drafter is None else TreeSpec("best_first", nodes=8)
            for _ in range(2):  # the first compiles
                started = time.perf_counter()
                made = generate(
                    loaded.model, drafter, prompts, sampling, max_new=max_new, stop_tokens=stop_tokens, tree=tree
                )
                tokens = [row[:length].tolist() for row, length in zip(*map(np.asarray, made[:2]), strict=True)]
            seconds = time.perf_counter() - started
            found[way] = tokens
            found[f"{way}_tokens_per_second"] = sum(map(len, tokens)) / seconds
        return found


def target_tasks(name: str, small: bool) -> dict[str, Task]:
    """Rows of a real target; none, with a line about it, if its weights would have to be fetched."""
    if not is_at_hand(name):
        print(f"{name} is not on this machine: the part `target` is left out", file=sys.stderr)
        return {}
    max_new = 8 if small else 64
    return {
        f"target, {name}, temperature {temperature:g}": functools.partial(compare, name, temperature, max_new)
        for temperature in (0.0, 1.0)
    }


def compare(name: str, temperature: float, max_new: int) -> Row:
    """A row of the check: the answers that drafting changed on this device, and those that the CPU gives otherwise.

    "wrong" counts the former and, of greedy answers, those that leave the CPU's where the logits of the two tokens are
    further apart than NEAR. Where sampled ones may leave them is not computed: they are counted alone.
    """
    own, cpu = answers(name, temperature, max_new, drafted=True), on_cpu(name, temperature, max_new)
    changed = None  # nothing is drafted
    if own["drafted"] is not None:
        changed = sum(ours != plain for ours, plain in zip(own["drafted"], own["plain"], strict=True))
    others = sum(ours != theirs for ours, theirs in zip(own["plain"], cpu["plain"], strict=True))
    gaps = _gaps(name, own["plain"], cpu["plain"]) if others and not temperature else []
    return {
        "target": name,
        "temperature": temperature,
        "answers": len(QUESTIONS),
        "changed": changed,
        "not_the_cpus": others,
        "largest_gap": max(gaps, default=0.0),
        "wrong": (changed or 0) + sum(gap > NEAR for gap in gaps),
        "plain_tokens_per_second": own["plain_tokens_per_second"],
        "tokens_per_second": own.get("drafted_tokens_per_second"),
    }


def on_cpu(name: str, temperature: float, max_new: int) -> dict[str, Any]:
    """Plain `answers` of a process that has the CPU alone."""
    command = [sys.executable, "-m", "fasteagle_jax.bench.device_tokens", name, str(temperature), str(max_new)]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["failed"])[-1]
        raise UserError(f"the CPU's answers of {name}: {reason[:200]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _gaps(name: str, ours: list[list[int]], theirs: list[list[int]]) -> list[float]:
    """Those of `gaps_where_parted`, of the target's answers to QUESTIONS."""
    with jax.default_matmul_precision("highest"):
        loaded = load_target(name)
        return gaps_where_parted(loaded.model, _prompts(loaded), ours, theirs)


def _prompts(loaded: LoadedTarget) -> list[list[int]]:
    """QUESTIONS as the target's chat has them."""
    tokenizer = load_tokenizer(loaded.checkpoint.path)
    return [encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in QUESTIONS]


if __name__ == "__main__":
    print(json.dumps(answers(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), drafted=False)))
