"""The training loop: from a run's configuration to its drafter, resuming where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fasteagle_jax.data.conversations import read_conversations
from fasteagle_jax.data.features import Features, load_features
from fasteagle_jax.data.manifest import check_target
from fasteagle_jax.data.packing import Batch, PackedData
from fasteagle_jax.data.prefetch import Prefetcher
from fasteagle_jax.data.sources import read_prompts
from fasteagle_jax.data.vocabulary import coverage, draft_vocabulary, token_counts
from fasteagle_jax.decoding.acceptance import measure_acceptance
from fasteagle_jax.decoding.speculative import check_room
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices.sharding import (
    check_batch,
    check_experts,
    check_heads,
    fetch,
    make_mesh,
    make_on,
    place_batch,
)
from fasteagle_jax.drafters.base import DrafterConfig
from fasteagle_jax.drafters.files import load_drafter, save_drafter
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import check_writable, first_line, in_bucket, write_file
from fasteagle_jax.io.progress import progress_bar
from fasteagle_jax.io.text import parse_json
from fasteagle_jax.targets.loading import LoadedTarget, load_target
from fasteagle_jax.targets.tokenizer import check_ids, encode_chat, load_tokenizer, stop_token_ids
from fasteagle_jax.training.checkpoints import Checkpoints, newest_record
from fasteagle_jax.training.config import (
    RunConfig,
    changes_since,
    drafter_config,
    earlier_runs,
    target_tokenizer,
    to_json,
    trained,
)
from fasteagle_jax.training.deepkd import Parts, mask_sizes
from fasteagle_jax.training.flops import flops_per_token, peak_flops
from fasteagle_jax.training.held_out import LENGTH, HeldOut, stalled
from fasteagle_jax.training.init import drafter_from, feature_rms, init_drafter, strongest_neurons
from fasteagle_jax.training.metrics_log import Log, Record, check_wandb, expected_length, finite, plot, rounded
from fasteagle_jax.training.optimizer import make_optimizer
from fasteagle_jax.training.step import StepResult, first_state, in_dtype, train_step

SPIKE_WINDOW, SPIKE_LEAST = 100, 20  # losses in the mean that spikes are measured by: at most, and at least


def train(
    config: RunConfig,
    run: str | os.PathLike[str],
    *,
    allow_change: bool = False,
    quiet: bool = False,
    profile: range = range(0),
) -> None:
    """Trains to the last step, from the run folder's last checkpoint if there is one, and writes the drafter.

    `profile` are the steps, counted from 1, that jax.profiler traces. On SIGTERM it saves and raises SystemExit(0).
    """
    if config.mesh is None and jax.process_count() > 1:
        raise UserError(
            f"the run has no mesh, and {jax.process_count()} processes would each train alone: "
            f"set mesh=1,{jax.device_count()},1 (data, fsdp, tensor), or other numbers"
        )
    mesh = None if config.mesh is None else make_mesh(config.mesh)
    if mesh is not None:
        check_batch(mesh, config.batch_size // config.accumulate)
    with _Sigterm() as sigterm, contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        _train(config, epath.Path(os.fspath(run)), mesh, allow_change, quiet, profile or range(0), sigterm)


def _train(
    config: RunConfig,
    run: epath.Path,
    mesh: Mesh | None,
    allow_change: bool,
    quiet: bool,
    profile: range,
    sigterm: _Sigterm,
) -> None:
    # --- the configuration, the target and the data -----------------------------------------------------------
    is_first = jax.process_index() == 0  # the process that writes
    quiet = quiet or not is_first
    check_wandb(config.wandb)
    if config.held_out.patience and not config.held_out.is_wanted:
        raise UserError("held_out.patience stops by held-out rows, and there are none: set held_out.share or data")
    check_writable(run)
    saved = newest_record(run / "checkpoints")
    _check_config(saved, config, run, allow_change=allow_change)
    if (run / "drafter").exists():
        raise UserError(f"{run / 'drafter'} exists: this run is finished; use another --run, or remove that folder")
    dtype = jnp.dtype(config.dtype)
    of_run: dict[str, Any] = {"training": True, "max_len": config.length, "adapter": config.adapter}
    loaded = load_target(config.target, config.dtype_of_target, mesh=mesh, **of_run)
    target = loaded.model
    check_target(config.data, *loaded.fingerprints)
    conversations = read_conversations(*config.data, vocab_size=target.config.vocab_size)
    data = PackedData(conversations, config.length, config.batch_size, config.seed, config.held_out.share)
    digests = {"digest": data.digest(), "spans": data.spans_digest()}
    _check_sources(saved, loaded.fingerprint, digests, run, allow_change=allow_change)

    # --- the drafter and its optimiser ------------------------------------------------------------------------
    parent, start = None, config.drafter.start
    if start:
        known = target.config, loaded.fingerprint
        parent = load_drafter(start, *known, stacked=False, mesh=mesh, strict=config.drafter.strict)
    sizes = drafter_config(config.drafter, target.config, None if parent is None else parent.config)
    if config.loss.deepkd is not None and config.loss.deepkd.mask:
        mask_sizes(config.loss.deepkd, sizes.draft_vocab_size)  # before any work: UserError if K is too large
    if config.loss.weighs_without_edges and not (getattr(sizes, "edges", None) or getattr(sizes, "correction", None)):
        raise UserError(
            "loss.without_edges and its curriculum are of drafters with drafter.edges or drafter.correction, and this "
            "one has neither: set loss.without_edges=0 loss.without_edges_end=0"
        )
    optimizer = make_optimizer(config.optimizer, config.steps, config.loss.deepkd)
    if mesh is not None:
        check_experts(mesh, target.config)
        try:
            check_heads(mesh, target.config, sizes)
        except UserError as uneven:  # the engine's caches need even heads; training is slower without
            _say(quiet, f"slower    {uneven}")
    store = None
    if config.features:
        hidden = target.config.hidden_size
        store = load_features(Path(config.features), data, loaded.fingerprint, sizes.input_layers, hidden)
    drafter = _new_drafter(config, sizes, parent, target, mesh, conversations, data, store, quiet)
    earlier = earlier_runs(start)
    needs_target = config.evaluation.prompts or config.held_out.data or sizes.context_layers
    if store is not None and not needs_target:
        target.layers = nnx.List([])  # never run: this frees their memory
    graph, params, constants = nnx.split(drafter, nnx.Param, ...)  # type: ignore[misc]  # `...`: all the rest
    state = make_on(mesh, lambda params: first_state(params, optimizer, config.optimizer.ema), params)
    num_params = sum(p.size for p in jax.tree.leaves(params))
    if any(data.left_out):
        _say(quiet, f"left out  {data.left_out}")
    _say(quiet, f"target    {config.target}: {target.config.num_layers} layers, fingerprint {loaded.fingerprint}")
    _say(quiet, f"drafter   {drafter.num_levels} levels, {num_params / 1e6:.1f}M parameters, {config.dtype} products")
    peak = peak_flops(jax.devices()[0].device_kind)
    passes = config.loss.backward_passes
    flops = flops_per_token(target.config, drafter.config, config.length, config.loss.share, backward_passes=passes)
    del drafter, params, parent  # the state has copies: on a mesh these would stay in memory for the whole run

    if is_first:
        write_file(run / "config.json", json.dumps(to_json(config), indent=2) + "\n")

    with Checkpoints(run / "checkpoints", config.keep) as checkpoints:
        latest = checkpoints.latest_step()
        if latest is not None:
            state, constants = checkpoints.restore(latest, (state, constants))
            _say(quiet, f"resume    from step {latest}")
        placed = None
        if mesh is not None:
            placed = jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, PartitionSpec())
        step = train_step(config, graph, placed)

        # --- the loop -----------------------------------------------------------------------------------------
        resume_step = int(state.step)
        evaluate = _Evaluation(config, loaded, graph, constants, dtype)
        held_out = HeldOut(config, loaded, data, store, graph, constants, mesh)
        best = (checkpoints.best() or (0, 0.0))[1]
        with (
            Log(
                run,
                resume_step,
                tensorboard=config.tensorboard,
                wandb=config.wandb,
                config=to_json(config),
                writes=is_first,
            ) as log,
            progress_bar(config.steps, "step", initial=resume_step, disable=quiet) as bar,
            _Profile(profile, run / "profile") as profiler,
        ):
            tokens_seen = sum(record["tokens"] for record in log.records)

            def say(line: str) -> None:
                if not quiet:  # which a disabled bar's own `write` does not ask
                    bar.write(line, file=sys.stderr)

            def is_due(step: int, every: int) -> bool:
                return step == config.steps or step % every == 0

            def measured_at(step: int, known: Record) -> Record:
                """The measurements of the step's weights that are due and not known."""
                found: Record = {}
                with sigterm.interrupts():
                    if is_due(step, config.held_out.every) and LENGTH not in known:
                        found.update(held_out(state.weights))
                    if is_due(step, config.evaluation.every) and _tau(known) is None:
                        found.update(evaluate(state.weights))
                return found | ({"epochs": round(data.epochs(step), 4)} if found else {})

            if resume_step and log.records:  # measurements that SIGTERM had interrupted
                more = measured_at(resume_step, log.records[-1])
                if (score := _score(config, log.records[-1] | more)) is not None and more:
                    checkpoints.set_tau(resume_step, score)  # before the record, which says that it is done
                    best = max(best, score)
                log.amend(more)

            terminated = False  # by SIGTERM, whichever process got it
            clock = time.perf_counter()  # when the step before was over
            waited = 0.0  # for batches since then

            def record_of(flight: _Flight) -> Record:
                """The record of a step; waits for it."""
                nonlocal clock, waited, terminated, tokens_seen
                index, result, num_tokens = flight.batch_index, flight.result, flight.batch.num_tokens
                loss, norm = float(result.loss), float(result.norm)
                now = time.perf_counter()
                seconds, data_seconds = now - clock, waited
                clock, waited = now, 0.0
                terminated = terminated or bool(flight.sigterm)
                tokens_seen += num_tokens
                record: Record = {
                    "step": index + 1,
                    "loss": finite(loss),
                    "gradient_norm": finite(norm),
                    "level_loss": rounded(result.metrics.loss),
                    "accuracy": rounded(result.metrics.accuracy),
                    "acceptance": rounded(result.metrics.acceptance),
                    "tokens": num_tokens,
                    "seconds": round(seconds, 4),
                    "data_seconds": round(data_seconds, 4),
                    "tokens_per_second": round(num_tokens / seconds, 1),
                }
                record.update(_of_parts(result))
                record["expected_length"] = expected_length(record["acceptance"])
                if peak is not None:
                    record["flops_utilisation"] = round(flops * num_tokens / seconds / peak / jax.device_count(), 4)
                if not result.applied:
                    record["skipped"] = [pieces.tolist() for pieces in flight.batch.pieces]
                    say(
                        f"step {index + 1}: update skipped, loss {loss:g}, gradient norm {norm:g}: "
                        f"batch {index}, pieces {record['skipped']}"
                    )
                accuracy = " ".join(f"{math.nan if a is None else a:.2f}" for a in record["accuracy"])
                speed = f"{num_tokens / seconds:.0f} tokens/s"
                bar.set_postfix_str(f"loss {loss:.3f}, right by level {accuracy}, {speed}", refresh=False)
                bar.update()
                return record

            # The device computes a step while the host reads the metrics of the one before, and a thread places the
            # next batches. A step is waited for if its state is needed before the next one replaces it.
            flight: _Flight | None = None  # the step whose record is not written yet
            make = functools.partial(_make_batch, mesh, data, store)
            with Prefetcher(make, range(resume_step, config.steps)) as batches:
                for index in range(resume_step, config.steps):
                    if terminated or stalled(log.records, config.held_out.patience):
                        break
                    profiler.at(index + 1)
                    start_time = time.perf_counter()
                    batch = batches.take()
                    waited += time.perf_counter() - start_time
                    limit = _spike_limit(config.spike_factor, log.records)
                    state, result = step(state, constants, target, batch.batch, limit, batch.values)
                    before, flight = flight, _Flight(index, batch, result, sigterm.ask())
                    terminated = flight.sigterm is True
                    if before is not None:
                        log.write(record_of(before))
                        _check_skipped(config, log.records, checkpoints, run)
                    is_measured = any(is_due(index + 1, c.every) for c in (config.held_out, config.evaluation))
                    is_saved = is_due(index + 1, config.save_every)
                    # A spike is measured by the losses of all steps before it.
                    is_waited_for = is_measured or is_saved or config.spike_factor or profiler.changes(index + 2)
                    if not (is_waited_for or terminated):
                        continue
                    record, flight = record_of(flight), None
                    if is_measured and not terminated:
                        more = measured_at(index + 1, record)
                        for name in more:
                            if name.startswith(("tau", LENGTH)):
                                say(f"step {index + 1}: {name} {more[name]:.3f}")
                        record.update(more)
                        terminated = sigterm.came_anywhere()
                    log.write(record)
                    score = _score(config, record)
                    better, best = (score or 0.0) > best, max(best, score or 0.0)
                    if better or terminated or is_saved:
                        position = {**digests, "next_batch": index + 1, "tokens": tokens_seen}
                        about: Record = {
                            "config": to_json(config),
                            "target_fingerprint": loaded.fingerprint,
                            "data": position,
                            "seed": config.seed,
                        } | ({"earlier": earlier} if earlier else {})
                        if start:  # of which some are the parent's
                            about["sizes"] = dataclasses.asdict(sizes)
                        checkpoints.save(index + 1, (state, constants), about, score)
                        log.flush()
                    _check_skipped(config, log.records, checkpoints, run)
                    clock = time.perf_counter()
        checkpoints.wait()
        if terminated:
            _say(quiet, f"stopped   by SIGTERM at step {int(state.step)}: the same command resumes from there")
            raise SystemExit(0)
        steps = int(state.step)
        if config.held_out.is_wanted and (found := checkpoints.best()) is not None and found[0] != steps:
            steps = found[0]
            _say(quiet, f"best      of the held-out rows at step {steps}: length {found[1]:.3f}")
            state, constants = checkpoints.restore(steps, (state, constants))
            tokens_seen = sum(record["tokens"] for record in log.records[:steps])

    # --- the finished drafter ---------------------------------------------------------------------------------
    weights, constants = fetch((state.weights, constants))
    if not is_first:
        return
    drafter = nnx.merge(graph, weights, constants)
    info = target_tokenizer(loaded.checkpoint) | {"trained": trained(config, steps, tokens_seen, earlier)}
    _save_drafter(drafter, run / "drafter", loaded.fingerprint, info)
    plot(log.records, run / "curve.png")
    _say(quiet, f"written   {run / 'drafter'}, {run / 'curve.png'}")


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)


def _check_config(saved: Record | None, config: RunConfig, run: epath.Path, *, allow_change: bool) -> None:
    """Raises UserError if the run has another configuration, in its newest checkpoint or else in config.json."""
    path = run / "config.json"
    try:
        old = saved["config"] if saved else parse_json(path.read_text()) if path.exists() else None
        changed = changes_since(old, config) if old and not allow_change else []
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        damaged = f"the record of the newest checkpoint in {run}" if saved else f"{path}"
        raise UserError(f"{damaged} is damaged ({first_line(error)}): remove it, or name another --run") from error
    if changed:
        raise UserError(
            f"{run} was started with another configuration ({'; '.join(changed)}): "
            "use that one, another --run, or --allow-change to resume with the new one"
        )


def _check_sources(
    saved: Record | None, fingerprint: str, digests: dict[str, str], run: epath.Path, *, allow_change: bool
) -> None:
    """Raises UserError if the newest checkpoint is of another target, or of other data unless that is allowed."""
    if saved is None:
        return
    if saved["target_fingerprint"] != fingerprint:
        raise UserError(
            f"{run} trains a drafter for target {saved['target_fingerprint']}, this one's weights are {fingerprint}: "
            "use that target, or another --run"
        )
    for name, what in (("digest", "other data"), ("spans", "other answers marked in its data")):
        old = saved["data"].get(name, digests[name])  # checkpoints of older versions have no spans
        if old != digests[name] and not allow_change:
            raise UserError(
                f"{run} was started with {what} (sha256 {old[:12]} -> {digests[name][:12]}): "
                "use that data, another --run, or --allow-change to resume with the new data"
            )


def _spike_limit(factor: float, records: list[Record]) -> np.float32:
    """The loss above which a batch is skipped: `factor` times the mean of the last ones not skipped; or infinity."""
    if not factor:
        return np.float32(np.inf)
    losses: list[float] = []
    for record in reversed(records):
        if "skipped" not in record:
            losses.append(record["loss"])
        if len(losses) == SPIKE_WINDOW:
            break
    return np.float32(factor * np.mean(losses) if len(losses) >= SPIKE_LEAST else np.inf)


def _check_skipped(config: RunConfig, records: list[Record], checkpoints: Checkpoints, run: epath.Path) -> None:
    """Raises UserError if too many updates in a row were skipped."""
    bad = records[-config.max_bad_steps :]
    if len(bad) < config.max_bad_steps or any("skipped" not in record for record in bad):
        return
    before = [step for step in checkpoints.steps() if step < bad[0]["step"]]
    good = f"checkpoint {before[-1]} in {run / 'checkpoints'}" if before else "none yet"
    raise UserError(
        f"steps {bad[0]['step']} to {bad[-1]['step']} gave no usable update (last loss {bad[-1]['loss']}, gradient "
        f"norm {bad[-1]['gradient_norm']}); last good checkpoint: {good}: remove later ones, then resume with "
        "--allow-change and a lower optimizer.learning_rate, or without the data of these steps (see metrics.jsonl)"
    )


class _Batch(NamedTuple):
    """A step's batch, made ahead."""

    batch: Batch  # on the devices
    values: Any  # the target's, on the devices, if they are stored; else None
    num_tokens: int
    pieces: list[np.ndarray]  # of each row


def _make_batch(mesh: Mesh | None, data: PackedData, store: Features | None, step: int) -> _Batch:
    return _Batch(*_place(mesh, data, store, step), data.num_tokens(step), data.pieces(step))


class _Flight(NamedTuple):
    """A step that was handed to the devices."""

    batch_index: int
    batch: _Batch
    result: StepResult
    sigterm: jax.Array | bool  # of `_Sigterm.ask`


class _Sigterm:
    """Handler of SIGTERM inside `with`: the machine will be gone in a moment, and `came` is true."""

    def __init__(self) -> None:
        self.came = self._interrupts = False
        self._before: Any = None

    def _handle(self, *_: object) -> None:
        self.came = True
        if self._interrupts:
            self._interrupts = False
            raise _Interrupted

    def ask(self) -> jax.Array | bool:
        """Whether it came to any process, all of which must ask together; of several an array, not waited for."""
        if jax.process_count() == 1:
            return self.came
        devices = np.asarray(jax.devices()).reshape(jax.process_count(), -1)
        mesh = Mesh(devices, ("process", "device"))
        own = np.asarray([self.came])
        by_process = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("process")), own)
        return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))(by_process)

    def came_anywhere(self) -> bool:
        """Whether the signal came to any process; all processes must call this together."""
        self.came = bool(self.ask())
        return self.came

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """A block that takes long and changes nothing, and that the signal ends at once."""
        self._interrupts = jax.process_count() == 1  # others would wait for this one's part of the computation
        try:
            yield
        except _Interrupted:
            pass
        finally:
            self._interrupts = False

    def __enter__(self) -> _Sigterm:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)


class _Interrupted(BaseException):
    """Ends a block of `_Sigterm.interrupts`."""


class _Profile:
    """A trace of a range of steps, by jax.profiler, in a folder."""

    def __init__(self, steps: range, folder: epath.Path):
        self._steps, self._folder, self._running = steps, folder, False

    def changes(self, step: int) -> bool:
        """Whether the trace starts or stops before a step, so that the one before must be over."""
        return (step in self._steps) != self._running

    def at(self, step: int) -> None:
        """Starts or stops the trace; to be called before each step."""
        if self.changes(step):
            if self._running:
                jax.profiler.stop_trace()
            else:
                jax.profiler.start_trace(os.fspath(self._folder))
            self._running = not self._running

    def __enter__(self) -> _Profile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            jax.profiler.stop_trace()


def _place(mesh: Mesh | None, data: PackedData, store: Features | None, step: int) -> tuple[Batch, Any]:
    """A step's batch on the devices, and the target's values if they are stored, else None."""
    batch = place_batch(mesh, functools.partial(data.batch, step), data.B)
    return batch, None if store is None else place_batch(mesh, functools.partial(store.batch, step), data.B)


def _save_drafter(drafter: Any, folder: epath.Path, fingerprint: str, info: Record) -> None:
    """Writes a drafter's folder, which may be in a bucket."""
    if not in_bucket(folder):
        save_drafter(drafter, folder, fingerprint, info)
        return
    with tempfile.TemporaryDirectory() as aside:
        save_drafter(drafter, Path(aside) / "drafter", fingerprint, info)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "config.json"):  # without its config.json a folder is no drafter yet
            epath.Path(aside, "drafter", name).copy(folder / name)


def _new_drafter(
    config: RunConfig,
    sizes: DrafterConfig,
    parent: Any,
    target: Any,
    mesh: Mesh | None,
    conversations: Any,
    data: PackedData,
    store: Features | None,
    quiet: bool,
) -> Any:
    """The drafter of these sizes with the first weights that the configuration names, sharded over the mesh.

    `parent` is the drafter that it starts from, None for none.
    """
    choice, token_ids = config.drafter, None
    if parent is None and sizes.draft_vocab_size < target.config.vocab_size:
        counts = token_counts(conversations, target.config.vocab_size, assistant_only=True)
        counted = counts
        if choice.vocabulary_data:
            corpus = read_conversations(*choice.vocabulary_data)
            counted = token_counts(corpus, target.config.vocab_size, assistant_only=True)
        token_ids = draft_vocabulary(counted, sizes.draft_vocab_size)
        _say(quiet, f"vocabulary {len(token_ids)} rows cover {coverage(token_ids, counts):.1%} of the answers")
    copied = sizes.copied_layer(target.config.num_layers)
    layer = target.config.layer_at(copied)
    starts_narrower = layer.experts is None and sizes.intermediate_size < layer.intermediate_size
    starts_narrower = starts_narrower and choice.from_target and parent is None
    rms = neurons = None
    if choice.scale_features or starts_narrower:
        first, values = _place(mesh, data, store, 0)
    if choice.scale_features:
        measured = jax.jit(feature_rms, static_argnums=(2, 3))
        rms = measured(target, first, sizes.feature_layers, config.attention, values)
    if starts_narrower:
        strongest = jax.jit(strongest_neurons, static_argnums=(2, 3, 4))
        neurons, left_out = strongest(target, first, copied, sizes.intermediate_size, config.attention)
        _say(
            quiet,
            f"mlp       starts from {len(neurons)} of {layer.intermediate_size} neurons of the target's layer {copied}"
            f"; the others add {float(left_out):.1%} of its squared output",
        )

    def make(target: Any, rms: Any, neurons: Any, parent: Any) -> Any:
        if parent is not None:
            return drafter_from(sizes, parent, feature_rms=rms, stacked=target.stacked)
        key, from_target = jax.random.key(config.seed), choice.from_target
        first_weights: dict[str, Any] = {"feature_rms": rms, "neurons": neurons, "from_target": from_target}
        return init_drafter(sizes, target, key, token_ids=token_ids, **first_weights)

    return make_on(mesh, make, target, rms, neurons, parent)


class _Evaluation:
    """Greedy decoding of held-out prompts: the acceptance length and acceptance by depth with each tree."""

    def __init__(self, config: RunConfig, loaded: LoadedTarget, graph: Any, constants: Any, dtype: Any):
        self._choice, self._target = config.evaluation, loaded.model
        self._graph, self._constants, self._dtype = graph, constants, dtype
        self._trees = {name: TreeSpec.parse(name) for name in self._choice.trees}  # before any step
        self._prompts: list[list[int]] = []
        if not self._choice.prompts:
            return
        tokenizer = load_tokenizer(loaded.checkpoint.path)
        self._stop = stop_token_ids(tokenizer, loaded.checkpoint.path)
        sizes = loaded.model.config
        for prompt in read_prompts(self._choice.prompts, self._choice.limit):
            tokens = encode_chat(tokenizer, [{"role": "user", "content": prompt.turns[0]}])
            check_ids(tokens, sizes.vocab_size, f"prompt {prompt.id}")
            check_room(f"prompt {prompt.id}", len(tokens), self._choice.max_new, sizes.max_positions)
            self._prompts.append(tokens)

    def __call__(self, params: Any) -> dict[str, Any]:
        result: dict[str, Any] = {}
        if not self._prompts:
            return result
        drafter = nnx.merge(self._graph, in_dtype(params, self._dtype), self._constants)
        for name, tree in self._trees.items():
            counts = measure_acceptance(
                self._target,
                drafter,
                self._prompts,
                tree,
                max_new=self._choice.max_new,
                stop_tokens=self._stop,
            )
            if counts.rounds:  # none if every answer ended with its first token
                result[f"tau {name}"] = round(counts.length, 4)
                result[f"by depth {name}"] = [None if math.isnan(x) else round(x, 4) for x in counts.by_depth]
        return result


def _of_parts(result: StepResult) -> Record:
    """What a record has of DeepKD: the parts' losses and signal-to-noise ratios, K, and the positions left out."""
    parts = result.parts
    if parts is None:
        return {}
    losses, ratios = np.asarray(parts.losses), np.asarray(parts.signal_to_noise)
    found: Record = {f"loss_{name}": finite(float(loss)) for name, loss in zip(Parts._fields, losses, strict=True)}
    found |= {
        f"signal_to_noise_{name}": finite(float(ratio)) for name, ratio in zip(Parts._fields, ratios, strict=True)
    }
    if parts.num_kept is not None:
        found["kept_classes"] = int(parts.num_kept)
    return found | {"left_out": np.asarray(result.metrics.left_out).tolist()}


def _score(config: RunConfig, record: Record) -> float | None:
    """The acceptance length of a record that checkpoints are compared by: on held-out rows, if there are any."""
    return record.get(LENGTH) if config.held_out.is_wanted else _tau(record)


def _tau(record: Record) -> float | None:
    """The acceptance length of a record's real decode, the mean over trees; None if none was measured."""
    lengths = [value for name, value in record.items() if name.startswith("tau ")]
    return sum(lengths) / len(lengths) if lengths else None
