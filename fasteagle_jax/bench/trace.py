"""The rounds of one answer, each with its draft, and as a page to look through: `fasteagle generate --trace FILE.html`.

M nodes. Each part of a round is a program of its own, timed on the host: a round takes longer than in one program, and
its tokens are the same.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jax
import numpy as np

from fasteagle_jax.decoding.prefill import pad_prompts
from fasteagle_jax.decoding.rules import Rules
from fasteagle_jax.decoding.sampling import Sampling
from fasteagle_jax.decoding.speculative import commit_path, draft_tree, num_levels_of, start, verify
from fasteagle_jax.decoding.state import make_stop
from fasteagle_jax.decoding.tree import TreeSpec

PARTS = ("draft", "verify", "commit")


@dataclasses.dataclass(frozen=True)
class TracedRound:
    """A round: its draft's nodes, the root first, and what the target made of them."""

    tokens: list[int]  # M of them
    parents: list[int]  # -1 for the root
    probabilities: list[float]  # of the paths to the nodes, by the drafter; with shared noise they are of its ranking
    path: list[int]  # accepted nodes, the root first
    emitted: list[int]  # new tokens: the path's without the root's, and the target's own
    milliseconds: list[float]  # of PARTS


def trace(
    target: Any,
    drafter: Any | None,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    max_new: int,
    stop_tokens: Sequence[int] = (),
    tree: TreeSpec | None,
    chunk: int = 64,
    shared_noise: bool = True,
    rules: Rules | None = None,
) -> tuple[int, list[TracedRound]]:
    """The token that prefill makes, and the rounds after it, of one prompt; arguments as of speculative.generate."""
    stop = make_stop(1, max_new, tuple(stop_tokens))
    prompts, lengths = pad_prompts([list(prompt)], chunk)
    sizes = {"max_new": max_new, "num_levels": num_levels_of(drafter, tree), "chunk": chunk}
    state, vocab = start(target, drafter, prompts, lengths, sampling, stop, rules, **sizes)
    drafting = jax.jit(functools.partial(draft_tree, tree=tree, shared_noise=shared_noise))
    verifying = jax.jit(functools.partial(verify, tree=tree))
    committing = jax.jit(functools.partial(commit_path, tree=tree))
    first = int(state.emitted[0, 0])
    draft, drafter_cache = drafting(drafter, vocab, state, sampling, rules)  # once before they are timed: they compile
    verified = verifying(target, drafter, state, draft, sampling, stop, rules)
    jax.block_until_ready(committing(drafter, state, drafter_cache, verified, stop))
    rounds: list[TracedRound] = []
    while not bool(state.done[0]):
        times = [time.perf_counter()]

        def timed(result: Any, times: list[float] = times) -> Any:
            jax.block_until_ready(result)
            times.append(time.perf_counter())
            return result

        before = int(state.num_emitted[0])
        draft, drafter_cache = timed(drafting(drafter, vocab, state, sampling, rules))
        verified = timed(verifying(target, drafter, state, draft, sampling, stop, rules))
        state = timed(committing(drafter, state, drafter_cache, verified, stop))
        emitted = np.asarray(state.emitted)[0, before : int(state.num_emitted[0])]
        nodes, accepted = (np.asarray(x)[0] for x in verified.path)
        # A stop token or the limit may cut the path.
        on_path = nodes[: min(int(accepted), len(emitted) - 1) + 1]
        rounds.append(
            TracedRound(
                np.asarray(draft.tokens)[0].tolist(),
                np.asarray(draft.parents)[0].tolist(),
                [round(float(p), 4) for p in np.exp(np.asarray(draft.scores)[0])],
                on_path.tolist(),
                emitted.tolist(),
                [round(1e3 * (b - a), 2) for a, b in zip(times, times[1:], strict=False)],
            )
        )
    return first, rounds


def page(title: str, tokenizer: Any, prompt: Sequence[int], first: int, rounds: Sequence[TracedRound]) -> str:
    """The page: one HTML file that needs no other."""
    used = {token for r in rounds for token in (*r.tokens, *r.emitted)} | {first, *prompt}
    names = {token: tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in sorted(used)}
    data = {
        "title": title,
        "parts": PARTS,
        "prompt": tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False),
        "first": first,
        "texts": names,
        "rounds": [dataclasses.asdict(r) for r in rounds],
    }
    template = resources.files("fasteagle_jax.bench").joinpath("trace.html").read_text(encoding="utf-8")
    # Inside of a script element only "</" and "<!--" could end it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("__DATA__", text)
