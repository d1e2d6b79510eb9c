"""Train a FastEagle drafter on conversations from prepare-data.

The run folder holds config.json, checkpoints/, metrics.jsonl, curve.png and, at the end, drafter/ (safetensors and
config.json). The same command after an interruption goes on from the last checkpoint, bitwise as if nothing had
happened.

example:
  fasteagle train --config configs/smollm2_135m.py --run runs/smollm2 steps=2000 loss.share=0.5
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from fasteagle_jax.checkpoint import Checkpoints
from fasteagle_jax.commands.terminal import Parser, program
from fasteagle_jax.data import PackedData, coverage, draft_vocabulary, read_conversations, read_prompts, token_counts
from fasteagle_jax.drafters.fasteagle import FastEagle
from fasteagle_jax.drafters.files import save_drafter
from fasteagle_jax.errors import UserError
from fasteagle_jax.files import write_text
from fasteagle_jax.metrics import measure_acceptance
from fasteagle_jax.run import RunConfig, apply_changes, differences, drafter_config, load_config, to_json
from fasteagle_jax.targets.loading import LoadedTarget, load_target
from fasteagle_jax.tokenizer import encode_chat, load_tokenizer, stop_token_ids
from fasteagle_jax.training import TrainState, feature_rms, in_dtype, init_drafter, make_optimizer, make_train_step
from fasteagle_jax.tree import Tree


@program
def main(argv: Sequence[str] | None = None) -> int:
    """Trains as the command line says; returns the exit code."""
    parser = Parser(prog="fasteagle train", description=__doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config() -> RunConfig")
    parser.add_argument("--run", required=True, type=Path, help="the folder for checkpoints, metrics and the drafter")
    parser.add_argument("--allow-change", action="store_true", help="go on though the configuration has changed")
    parser.add_argument("changes", nargs="*", metavar="key=value", help="e.g. steps=100 loss.share=0.25")
    args = parser.parse_args(argv)
    config = apply_changes(load_config(args.config), args.changes)
    train(config, args.run, allow_change=args.allow_change)
    return 0


def train(config: RunConfig, run: Path, *, allow_change: bool = False, quiet: bool = False) -> None:
    """Trains to the last step, from the run folder's last checkpoint if it has one, and writes the drafter."""
    # --- what was asked for -----------------------------------------------------------------------------------
    _check_config(config, run, allow_change=allow_change)
    if (run / "drafter").exists():
        raise UserError(f"{run / 'drafter'} exists: this run is finished; use another --run, or remove that folder")
    dtype = jnp.dtype(config.dtype)
    loaded = load_target(config.target, dtype)
    target = loaded.model
    conversations = [sample for path in config.data for sample in read_conversations(path)]
    data = PackedData(conversations, config.length, config.batch_size, config.seed)

    # --- the drafter and its optimiser ------------------------------------------------------------------------
    drafter = _new_drafter(config, loaded, conversations, data, quiet=quiet)
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)  # type: ignore[misc]  # `...`: all the rest
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))
    num_params = sum(p.size for p in jax.tree.leaves(params))
    _say(quiet, f"target    {config.target}: {target.config.num_layers} layers, fingerprint {loaded.fingerprint}")
    _say(quiet, f"drafter   {drafter.num_levels} levels, {num_params / 1e6:.1f}M parameters, {config.dtype} products")

    write_text(run / "config.json", json.dumps(to_json(config), indent=2) + "\n")

    with Checkpoints(run / "checkpoints", config.keep) as checkpoints:
        latest = checkpoints.latest_step()
        if latest is not None:
            state, constants = checkpoints.restore(latest, (state, constants))
            _say(quiet, f"resume    from step {latest}")
        step = make_train_step(graph, constants, optimizer, config.loss, dtype, config.seed)

        # --- the loop -----------------------------------------------------------------------------------------
        start = int(state.step)
        evaluate = _Evaluation(config, loaded, graph, constants, dtype)
        bar_options: dict[str, Any] = {"unit": "step", "dynamic_ncols": True, "disable": quiet}
        with (
            _MetricsLog(run / "metrics.jsonl", start) as log,
            tqdm(total=config.steps, initial=start, **bar_options) as bar,
        ):
            for index in range(start, config.steps):
                began = time.perf_counter()
                batch = data.batch(index)
                num_tokens = int((batch.segments > 0).sum())
                state, (loss, norm, metrics) = step(state, target, jax.tree.map(jnp.asarray, batch))
                record: dict[str, Any] = {
                    "step": index + 1,
                    "loss": float(loss),
                    "gradient_norm": float(norm),
                    "level_loss": _rounded(metrics.loss),
                    "accuracy": _rounded(metrics.accuracy),
                    "acceptance": _rounded(metrics.acceptance),
                    "tokens": num_tokens,
                }
                seconds = time.perf_counter() - began
                record["seconds"] = round(seconds, 3)
                accuracy = " ".join(f"{a:.2f}" for a in record["accuracy"])
                bar.set_postfix_str(
                    f"loss {record['loss']:.3f}, right by level {accuracy}, {num_tokens / seconds:.0f} tok/s"
                )
                bar.update()
                last = index + 1 == config.steps
                if last or (index + 1) % config.evaluation.every == 0:
                    record.update(evaluate(state.params))
                    for name, value in record.items():
                        if name.startswith("tau"):
                            bar.write(f"step {index + 1}: {name} {value:.3f}")
                log.write(record)
                if last or (index + 1) % config.save_every == 0:
                    checkpoints.save(index + 1, (state, constants))
        checkpoints.wait()

    # --- what is left behind ----------------------------------------------------------------------------------
    drafter = nnx.merge(graph, state.params, constants)
    tokens_seen = sum(record["tokens"] for record in log.records)
    info = {"trained": {"steps": config.steps, "tokens": tokens_seen, "run": to_json(config)}}
    save_drafter(drafter, run / "drafter", loaded.fingerprint, info)
    plot_run(log.records, run / "curve.png")
    _say(quiet, f"written   {run / 'drafter'}, {run / 'curve.png'}")


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)


def _rounded(values: jax.Array) -> list[float]:
    return [round(float(v), 5) for v in np.asarray(values)]


def _check_config(config: RunConfig, run: Path, *, allow_change: bool) -> None:
    """Raises UserError where the run was started with another configuration, unless that is allowed."""
    path = run / "config.json"
    if path.exists() and not allow_change:
        changed = differences(json.loads(path.read_text()), to_json(config))
        if changed:
            raise UserError(
                f"{run} was started with another configuration ({'; '.join(changed)}): "
                "use that one, another --run, or --allow-change to go on with the new one"
            )


def _new_drafter(
    config: RunConfig, loaded: LoadedTarget, conversations: Any, data: PackedData, *, quiet: bool
) -> FastEagle:
    """The drafter that the configuration describes, with its first weights."""
    target, choice = loaded.model, config.drafter
    sizes = drafter_config(choice, target.config)
    token_ids = None
    if sizes.draft_vocab_size < target.config.vocab_size:
        counts = token_counts(conversations, target.config.vocab_size, assistant_only=True)
        counted = counts
        if choice.vocabulary_data:
            corpus = [sample for path in choice.vocabulary_data for sample in read_conversations(path)]
            counted = token_counts(corpus, target.config.vocab_size, assistant_only=True)
        token_ids = draft_vocabulary(counted, sizes.draft_vocab_size)
        print(
            f"vocabulary {len(token_ids)} rows cover {coverage(token_ids, counts):.1%} of the answers", file=sys.stderr
        )
    first = jax.tree.map(jnp.asarray, data.batch(0))
    rms = None
    if choice.scale_features:
        rms = jax.jit(feature_rms, static_argnums=2)(target, first, sizes.feature_layers)
    return init_drafter(
        sizes,
        target,
        jax.random.key(config.seed),
        token_ids=token_ids,
        feature_rms=rms,
        from_target=choice.from_target,
    )


class _MetricsLog:
    """metrics.jsonl, one record a step; on a resume, records past the checkpoint are dropped."""

    def __init__(self, path: Path, step: int):
        self.records: list[dict[str, Any]] = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break  # torn by a kill; the checkpoint is older
                if record["step"] <= step:
                    self.records.append(record)
        write_text(path, "".join(json.dumps(record) + "\n" for record in self.records))
        self._file = open(path, "a")  # noqa: SIM115  # closed by __exit__

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def __enter__(self) -> _MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class _Evaluation:
    """The real decode on held-out prompts, greedy: acceptance length and by depth, for each tree."""

    def __init__(self, config: RunConfig, loaded: LoadedTarget, graph: Any, constants: Any, dtype: Any):
        self._choice, self._target = config.evaluation, loaded.model
        self._graph, self._constants, self._dtype = graph, constants, dtype
        self._prompts: list[list[int]] = []
        if not self._choice.prompts:
            return
        tokenizer = load_tokenizer(loaded.checkpoint.path)
        self._stop = stop_token_ids(tokenizer, loaded.checkpoint.path)
        for prompt in read_prompts(self._choice.prompts, self._choice.limit):
            self._prompts.append(encode_chat(tokenizer, [{"role": "user", "content": prompt.turns[0]}]))

    def __call__(self, params: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if not self._prompts:
            return result
        drafter = nnx.merge(self._graph, in_dtype(params, self._dtype), self._constants)
        for name in self._choice.trees:
            counts = measure_acceptance(
                self._target,
                drafter,
                self._prompts,
                Tree.parse(name),
                max_new=self._choice.max_new,
                stop_tokens=self._stop,
            )
            if counts.rounds:  # else every answer ended with its first token, and there was nothing to draft
                result[f"tau {name}"] = round(counts.length, 4)
                result[f"by depth {name}"] = [None if math.isnan(x) else round(x, 4) for x in counts.by_depth]
        return result


def plot_run(records: list[dict[str, Any]], path: Path) -> None:
    """A PNG of a run: loss and accuracy by level, and the measured acceptance length, over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    tokens = np.cumsum([record["tokens"] for record in records]) / 1e6
    window = max(1, len(records) // 100)
    smooth = np.ones(window) / window
    for axes, name in zip(figure.subplots(1, 3), ("level_loss", "accuracy", "tau"), strict=True):
        axes.set_xlabel("training tokens, millions")
        axes.grid(alpha=0.3)
        if name == "tau":
            measured = sorted({key for record in records for key in record if key.startswith("tau ")})
            axes.set_title("acceptance length of the real decode" if measured else "acceptance length: not measured")
            for key in measured:
                points = [(t, record[key]) for t, record in zip(tokens, records, strict=True) if key in record]
                axes.plot(*zip(*points, strict=True), marker="o", label=key.removeprefix("tau "))
            if measured:
                axes.legend()
            continue
        axes.set_title(name.replace("_", " "))
        for level, values in enumerate(np.array([record[name] for record in records]).T, 1):
            axes.plot(tokens[window - 1 :], np.convolve(values, smooth, "valid"), label=f"level {level}")
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
