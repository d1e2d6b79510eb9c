"""Make a target with experts out of a small dense one: MoEfication, then distillation on its own answers.

Where no sparse model can be had, this is one that talks, in Mixtral's format: neurons of an MLP that fire together
become an expert, a router is fitted to what they add, and the whole is distilled from the dense model, on the same
data, until --within of its perplexity on answers that no step has seen (checked every --every steps), or --steps are
over. Says how many experts 1, 4, 8, 16 and 60 neighbouring tokens choose together, and greedy answers of both models to
--show of the data's prompts. FOLDER is a target for every other command; tokenizer and template are the dense one's.

The training is of one device and holds the student, its gradient and AdamW's moments in float32 beside the dense model.

example:
  fasteagle sparsify --target smollm2-135m --data answers.jsonl --experts 8 --chosen 4 --output runs/sparse
"""

from __future__ import annotations

import argparse
import json
import sys
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
from fasteagle_jax.targets.checkpoint import Checkpoint, fingerprint
from fasteagle_jax.targets.llama import LlamaConfig
from fasteagle_jax.targets.loading import load_target, open_checkpoint
from fasteagle_jax.targets.tokenizer import load_tokenizer, stop_token_ids
from fasteagle_jax.training.optimizer import OptimizerConfig, make_optimizer
from fasteagle_jax.training.sparsify import (
    Distillation,
    Quality,
    chosen_experts,
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
    parser.add_argument("--show", type=whole(0), default=10, metavar="N", help="answers of both models (default 10)")
    parser.add_argument("--seed", type=int, default=0)
    return sparsify(parser.parse_args(argv))


def sparsify(args: argparse.Namespace) -> int:
    """Makes and distils the student, writes it and says what it is; returns the exit code."""
    # What can be wrong is found out before anything is computed.
    check_new(args.output)
    with writing(args.output):
        args.output.parent.mkdir(parents=True, exist_ok=True)
    recipe = OptimizerConfig(learning_rate=args.learning_rate, warmup_steps=min(20, args.steps), clip_norm=1.0)
    checkpoint = open_checkpoint(args.target)
    _check(args, checkpoint.config)
    texts = read_conversations(*args.data, vocab_size=checkpoint.config.vocab_size)
    check_target(args.data, fingerprint(checkpoint))
    data = PackedData(texts, args.length, args.batch, args.seed, held_out=HELD_OUT)
    rows = data.sample_rows(args.rows, held_out=True)
    tokenizer = load_tokenizer(checkpoint.path)
    ends = tuple(stop_token_ids(tokenizer, checkpoint.path))

    def filled(own: Sequence[list[int]]) -> Batch:
        return jax.tree.map(jnp.asarray, data.filled([*own, *[[]] * (args.batch - len(own))]))

    measured = [filled(rows[i : i + args.batch]) for i in range(0, len(rows), args.batch)]
    target = load_target(args.target, jnp.dtype(args.dtype), stacked=False, max_len=args.length).model
    student = _fitted(args, data)
    student = _distilled(args, student, target, data, measured, recipe)
    _write(args, student, checkpoint, tokenizer, ends)
    del student
    made = load_target(str(args.output), stacked=False, max_len=args.length).model
    own = _total([jax.jit(quality)(made, target, batch) for batch in measured])
    print(f"as written: perplexity {own.perplexity:.3f}, same first choice {int(own.hits) / int(own.count):.3f}")
    chosen = [np.asarray(jax.jit(chosen_experts)(made, batch)) for batch in measured]
    shares = {n: coverage(chosen, measured, n) for n in RUNS if n <= args.length}
    print(
        f"experts of a layer, of {args.experts}, that so many neighbouring tokens choose: "
        + ", ".join(f"{n}: {share:.2f}" for n, share in shares.items() if share is not None)
    )
    if args.show:
        _show({"dense": target, "sparse": made}, texts, tokenizer, ends, args)
    return 0


def _fitted(args: argparse.Namespace, data: PackedData) -> Any:
    """The student before its first step, in float32."""
    dense = load_target(args.target, stacked=False, max_len=args.length).model
    batch = jax.tree.map(jnp.asarray, data.filled(data.sample_rows(FITTED, held_out=False)))
    return sparsified(dense, batch, args.experts, args.chosen, args.seed)


def _check(args: argparse.Namespace, config: Any) -> None:
    if type(config) is not LlamaConfig or config.layer.attention_bias or config.layer.mlp_bias:
        raise UserError(f"target {args.target!r} is no plain Llama, which alone becomes a Mixtral: give another")
    if config.intermediate_size % args.experts:
        raise UserError(f"--experts {args.experts} does not divide {config.intermediate_size} neurons: give a divisor")
    if args.chosen >= args.experts:
        raise UserError(f"--chosen {args.chosen} of --experts {args.experts} leaves nothing out: choose fewer")
    if args.length > config.max_positions:
        raise UserError(f"--length {args.length} is more than the target's {config.max_positions} positions: lower it")
    if args.within < 1:
        raise UserError(f"--within {args.within} is below 1, the dense model's own: give e.g. 1.2")


def _distilled(
    args: argparse.Namespace,
    student: Any,
    target: Any,
    data: PackedData,
    measured: list[Batch],
    recipe: OptimizerConfig,
) -> Any:
    """The student after its last step."""
    graph, params, rest = nnx.split(student, is_trained, ...)  # type: ignore[misc]  # `...`: all the rest
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

    ratio = check(0, "")
    for number in range(1, args.steps + 1):
        batch = jax.tree.map(jnp.asarray, data.batch(number - 1))
        params, state, losses = step(params, state, rest, target, batch, number)
        if number % args.every == 0 or number == args.steps:
            divergence, balance = map(float, losses)
            ratio = check(number, f"; divergence {divergence:.3f}, balance {balance:.3f}")
            if ratio <= args.within:
                break
    if ratio > args.within:
        print(f"warning: after {args.steps} steps not within {args.within}: give more --steps", file=sys.stderr)
    return nnx.merge(graph, params, rest)


def _total(parts: Sequence[Quality]) -> Quality:
    return Quality(*(sum(each) for each in zip(*parts, strict=True)))


def _write(args: argparse.Namespace, student: Any, checkpoint: Checkpoint, tokenizer: Any, ends: Sequence[int]) -> None:
    """The folder of the student: Mixtral's configuration and tensors, and the dense target's tokenizer."""
    c = checkpoint.config
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
        "sliding_window": None,
        "tie_word_embeddings": c.tie_embeddings,
        "num_local_experts": args.experts,
        "num_experts_per_tok": args.chosen,
        "eos_token_id": list(ends),
    } | c.rope.to_hf()
    with writing(args.output), new_folder(args.output) as folder:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tokenizer.save_pretrained(folder)
    print(f"written   {args.output}")


def _show(
    models: dict[str, Any], texts: Conversations, tokenizer: Any, ends: tuple[int, ...], args: argparse.Namespace
) -> None:
    """Prints greedy answers of the models to the data's first prompts."""
    asked = [text.tokens[: text.assistant[0][0]].tolist() for text in texts[: 4 * args.show] if len(text.assistant)]
    prompts = [prompt for prompt in asked if 0 < len(prompt) <= args.length - SHOWN][: args.show]
    params = SamplingParams(temperature=0, max_new_tokens=SHOWN)
    for name, model in models.items():
        engine = Engine(model, None, tokenizer, ends, slots=min(8, max(len(prompts), 1)), max_len=args.length)
        for i, completion in enumerate(engine.generate(prompts, params)):
            print(f"{name} {i + 1}: {completion.text!r}")
