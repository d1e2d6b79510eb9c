"""The `fasteagle` command: `fasteagle VERB ...`, each verb a module of fasteagle_jax.commands."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fasteagle_jax.commands.terminal import USER_ERROR, not_installed

VERBS = {  # verb: module, and what it does
    "prepare-data": ("prepare_data", "sample the target's answers to prompts: training data"),
    "prepare-features": ("prepare_features", "store the target's features: training without its layers"),
    "train": ("train_drafter", "train a drafter for a target"),
    "sparsify": ("sparsify", "make a target with experts out of a small dense one"),
    "import": ("import_drafter", "bring a published EAGLE-3 drafter in"),
    "export": ("export", "write a drafter out of a training run's checkpoint"),
    "generate": ("generate", "answer prompts, sped up by a drafter"),
    "chat": ("chat", "talk with a target at the terminal, sped up by a drafter"),
    "batch": ("batch", "answer a file of requests, OpenAI's batch lines or simple ones"),
    "compile": ("compile_check", "say what a run's programs need of a chip, from shapes alone"),
    "bench": ("bench", "measure plain against speculative decoding"),
    "ablate": ("ablate", "train variants of a run and measure what is accepted of each"),
    "bench-train": ("bench_train", "measure a train step against the same with other values"),
    "check-device": ("check_device", "check that a GPU or TPU is lossless, and time its rounds and train steps"),
    "simulate": ("simulate", "hold the theory of acceptance to random targets and drafters"),
    "demo": ("demo", "watch a drafter decode beside plain decoding; --train trains a small one first"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the verb; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in VERBS:
        try:
            module = importlib.import_module(f"fasteagle_jax.commands.{VERBS[words[0]][0]}")
        except ModuleNotFoundError as error:
            if (message := not_installed(error)) is None:
                raise
            print(f"error: {message}", file=sys.stderr)
            return USER_ERROR
        return module.main(words[1:])
    if words and words[0] in ("-h", "--help"):
        print(_help())
        return 0
    what = f"no verb {words[0]!r}" if words else "no verb"
    print(f"error: {what}: give one of {', '.join(VERBS)} (see fasteagle --help)", file=sys.stderr)
    return USER_ERROR


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {what}" for verb, (_, what) in VERBS.items())
    return (
        "usage: fasteagle VERB ...\n\n"
        "FastEagle in JAX: train drafters and decode with them, exactly as the target alone would.\n\n"
        f"verbs:\n{verbs}\n\n"
        "fasteagle VERB --help explains a verb, with an example:\n"
        '  fasteagle generate --prompt "Why is the sky blue?" --stream'
    )


if __name__ == "__main__":
    sys.exit(main())
