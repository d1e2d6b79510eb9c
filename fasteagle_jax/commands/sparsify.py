"""Make a target with experts out of a small dense one: MoEfication, then distillation on its own answers.

Where no sparse model can be had, this is one that talks, in Mixtral's format: neurons of an MLP that fire together
become an expert, a router is fitted to what they add, and the whole is distilled from the dense model, on the same
data, until --within of its perplexity on answers that no step has seen (checked every --every steps), or --steps are
over. Says how many experts 1, 4, 8, 16 and 60 neighbouring tokens choose together, and greedy answers of both models to
--show of the data's prompts. FOLDER is a target for every other command; tokenizer and template are the dense one's.

The training is of one device and holds the model, its gradient and AdamW's moments in float32.

example:
  fasteagle sparsify --target smollm2-135m --data answers.jsonl --experts 8 --chosen 4 --output runs/sparse
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from fasteagle_jax.commands.terminal import Parser, program, whole
from fasteagle_jax.data.conversations import Conversations, read_conversations
from fasteagle_jax.data.manifest import check_target
from fasteagle_jax.data.packing import Batch, PackedData
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_new, new_folder, writing
from fasteagle_jax.targets.checkpoint import Checkpoint
from fasteagle_jax.targets.llama import LlamaConfig
from fasteagle_jax.targets.loading import LoadedTarget, load_target, open_checkpoint
from fasteagle_jax.targets.tokenizer import load_tokenizer, stop_token_ids
from fasteagle_jax.training.optimizer import OptimizerConfig, make_optimizer
from fasteagle_jax.training.sparsify import (
    Distillation,
    Quality,
    coverage,
    is_trained,
    make_distil_step,
    mixtral_tensors,
    quality,
    sparsified,
)

HELD_OUT = 0.02  # share of the conversations
FITTED = 8  # rows by which neurons are grouped and routers fitted, before the distillation
RUNS = (1, 4, 8, 16, 60)  # neighbouring tokens
SHOWN = 48  # tokens of an answer


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Makes the target as the command line says; returns the exit code."""
    parser = Parser(prog="fasteagle sparsify", description=__doc__)
    parser.add_argument(
        "--target", required=True, help="a dense one of the Llama family: folder, hub name or GGUF file"
    )
    parser.add_argument("--data", required=True, nargs="+", metavar="FILE", help="its answers, from prepare-data")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a new folder for the target")
    parser.add_argument("--experts", type=whole(2), default=8, metavar="E", help="of a layer (default 8)")
    parser.add_argument("--chosen", type=whole(1), default=4, metavar="K", help="experts of a token (default 4)")
    parser.add_argument("--within", type=float, default=1.2, metavar="X", help="of the perplexity (default 1.2)")
    parser.add_argument("--steps", type=whole(1), default=1000, metavar="N", help="of distillation, at most (1000)")
    parser.add_argument("--every", type=whole(1), default=100, metavar="N", help="steps between two checks (100)")
    parser.add_argument("--batch", type=whole(1), default=2, metavar="B", help="rows a step (default 2)")
    parser.add_argument("--length", type=whole(32), default=512, metavar="T", help="tokens of a row (default 512)")
    parser.add_argument("--rows", type=whole(1), default=16, metavar="N", help="held-out rows (default 16)")
    parser.add_argument("--learning-rate", type=float, default=3e-4, metavar="X", help="of AdamW (default 3e-4)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of products (bfloat16)")
    parser.add_argument("--show", type=int, default=10, metavar="N", help="answers of both models (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    return sparsify(parser.parse_args(argv))


def sparsify(args: argparse.Namespace) -> int:
    """Makes and distils the student, writes it and says what it is; returns the exit code."""
    check_new(args.output)
    config = open_checkpoint(args.target).config
    _check(args, config)
    texts = read_conversations(*args.data, vocab_size=config.vocab_size)
    data = PackedData(texts, args.length, args.batch, args.seed, held_out=HELD_OUT)
    rows = data.sample_rows(args.rows, held_out=True)

    def filled(own: Sequence[list[int]]) -> Batch:
        return jax.tree.map(jnp.asarray, data.filled([*own, *[[]] * (args.batch - len(own))]))

    measured = [filled(rows[i : i + args.batch]) for i in range(0, len(rows), args.batch)]
    loaded = load_target(args.target, jnp.dtype(args.dtype), stacked=False, max_len=args.length)
    check_target(args.data, *loaded.fingerprints)
    dense = load_target(args.target, stacked=False, max_len=args.length).model  # float32, which the student learns in
    fitted = jax.tree.map(jnp.asarray, data.filled(data.sample_rows(FITTED, held_out=False)))
    student = sparsified(dense, fitted, args.experts, args.chosen, args.seed)
    student = _distilled(args, student, loaded.model, data, measured)
    _write(args, student, loaded.checkpoint)
    made = load_target(str(args.output), stacked=False, max_len=args.length)
    _say(args, made, loaded, measured, texts)
    return 0


def _check(args: argparse.Namespace, config: Any) -> None:
    if type(config) is not LlamaConfig or config.layer.attention_bias or config.layer.mlp_bias:
        raise UserError(f"target {args.target!r} is no plain Llama, which alone becomes a Mixtral: give another")
    if config.intermediate_size % args.experts:
        raise UserError(f"--experts {args.experts} does not divide {config.intermediate_size} neurons: give a divisor")
    if args.chosen >= args.experts:
        raise UserError(f"--chosen {args.chosen} of --experts {args.experts} leaves nothing out: choose fewer")
    if args.within < 1:
        raise UserError(f"--within {args.within} is below 1, the dense model's own: give e.g. 1.2")


def _distilled(args: argparse.Namespace, student: Any, target: Any, data: PackedData, measured: list[Batch]) -> Any:
    """The student after its last step."""
    graph, params, rest = nnx.split(student, is_trained, ...)  # type: ignore[misc]  # `...`: all the rest
    recipe = OptimizerConfig(learning_rate=args.learning_rate, warmup_steps=min(20, args.steps), clip_norm=1.0)
    optimizer = make_optimizer(recipe, args.steps)
    step = make_distil_step(graph, optimizer, Distillation(dtype=args.dtype), args.seed)
    state = optimizer.init(params)
    measure = jax.jit(lambda params, rest, target, batch: quality(nnx.merge(graph, params, rest), target, batch))
    of_dense = jax.jit(lambda target, batch: quality(target, target, batch))
    dense = _total([of_dense(target, batch) for batch in measured])

    def check(number: int, losses: str) -> float:
        own = _total([measure(params, rest, target, batch) for batch in measured])
        ratio = own.perplexity / dense.perplexity
        print(
            f"step {number}: perplexity {own.perplexity:.3f}, {ratio:.3f} of the dense {dense.perplexity:.3f};"
            f" same first choice {int(own.hits) / int(own.count):.3f}{losses}",
            flush=True,
        )
        return ratio

    ratio, began = check(0, ""), time.perf_counter()
    for number in range(1, args.steps + 1):
        batch = jax.tree.map(jnp.asarray, data.batch(number - 1))
        params, state, losses = step(params, state, rest, target, batch, number)
        if number % args.every == 0 or number == args.steps:
            divergence, balance = map(float, losses)
            seconds = (time.perf_counter() - began) / number
            ratio = check(number, f"; divergence {divergence:.3f}, balance {balance:.3f}, {seconds:.2f} s a step")
            if ratio <= args.within:
                break
    if ratio > args.within:
        print(f"warning: after {args.steps} steps not within {args.within}: give more --steps", file=sys.stderr)
    return nnx.merge(graph, params, rest)


def _total(parts: Sequence[Quality]) -> Quality:
    return Quality(*(sum(each) for each in zip(*parts, strict=True)))


def _write(args: argparse.Namespace, student: Any, checkpoint: Checkpoint) -> None:
    """The folder of the student: Mixtral's configuration and tensors, and the dense target's tokenizer."""
    c = checkpoint.config
    tokenizer = load_tokenizer(checkpoint.path)
    tensors = mixtral_tensors(student)
    tensors |= {
        name: np.asarray(checkpoint.read(name), np.float32)
        for name in checkpoint.names()
        if not name.startswith("model.layers.")
    }
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size // args.experts,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope.theta,
        "sliding_window": None,
        "tie_word_embeddings": c.tie_embeddings,
        "num_local_experts": args.experts,
        "num_experts_per_tok": args.chosen,
        "eos_token_id": list(stop_token_ids(tokenizer, checkpoint.path)),
    }
    with writing(args.output), new_folder(args.output) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(folder)
    print(f"written   {args.output}")


def _say(
    args: argparse.Namespace, made: LoadedTarget, dense: LoadedTarget, measured: list[Batch], texts: Conversations
) -> None:
    """Coverage of the written target's experts, and answers of both models."""
    runs = [n for n in RUNS if n <= args.length]
    found = {n: [coverage(made.model, batch, n) for batch in measured] for n in runs}
    shares = {n: np.nanmean(values) for n, values in found.items() if not np.isnan(values).all()}
    print(
        f"experts of a layer, of {args.experts}, that so many neighbouring tokens choose: "
        + ", ".join(f"{n}: {share:.2f}" for n, share in shares.items())
    )
    if not args.show:
        return
    tokenizer = load_tokenizer(dense.checkpoint.path)
    ends = stop_token_ids(tokenizer, dense.checkpoint.path)
    room = args.length - SHOWN
    prompts = [
        list(map(int, text.tokens[: text.assistant[0][0]])) for text in texts[: 4 * args.show] if len(text.assistant)
    ]
    prompts = [prompt for prompt in prompts if 0 < len(prompt) <= room][: args.show]
    params = SamplingParams(temperature=0, max_new_tokens=SHOWN)
    for name, model in (("dense", dense.model), ("sparse", made.model)):
        engine = Engine(model, None, tokenizer, ends, slots=min(8, max(len(prompts), 1)), max_len=args.length)
        for i, completion in enumerate(engine.generate(prompts, params)):
            print(f"{name} {i + 1}: {completion.text!r}")
