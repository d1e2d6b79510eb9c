"""Speed-up of one drafter over another at the sizes of a published target: `fasteagle bench --cost`.

speed-up = tau / round. tau is that of a finished `fasteagle bench --acceptance`, with the small target that it ran on;
the round is compiled for slices that are not there, with a published target's widths and the measured drafter's
switches, levels and tree: what a round brings and what it costs belong to one configuration. Of widths, the hidden
units of a correction keep their share of the target's; the rank of edges stays, and the MLP is the target's.
Times are estimates, in brackets with the latency of the kernels (docs/tpu.md). Compiled programs are kept in
--results/compiled: the same command resumes, and compiles only what is missing.

The default mesh has the heads over all chips. With --meshes a batch may instead be split over 2, 4, ... times as many
rows of chips, with fewer chips a row to split heads over: of each round the fastest mesh counts, the number of
rows being doubled as long as that helps.

--measure times rounds of the measured target and drafters on this machine as well: batch 1, interleaved, medians.

examples:
  fasteagle bench --cost runs/acceptance --results runs/cost
  fasteagle bench --cost runs/acceptance --results runs/cost --slices v5e:2x4 --batches 1 --measure
  fasteagle bench --cost runs/acceptance --results runs/cost --batches 1,8,32,64,128 --meshes    # gains by batch
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fasteagle_jax.bench.decoders import PLAIN, DecoderSpec, find_drafters, load_drafters, parse_decoders
from fasteagle_jax.bench.figures import show
from fasteagle_jax.bench.progress import Progress
from fasteagle_jax.bench.prompts import Models
from fasteagle_jax.bench.runner import MEAN, tree_of
from fasteagle_jax.bench.sweeps import machine
from fasteagle_jax.bench.timing import Spread
from fasteagle_jax.bench.verify_cost import ROUNDS, interleaved, round_timers
from fasteagle_jax.compiling.programs import decode_mesh
from fasteagle_jax.compiling.published import PUBLISHED
from fasteagle_jax.compiling.table import compile_apart
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.decoding.sampling_fields import FIELDS
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.devices import topology
from fasteagle_jax.drafters.table import CLASSES
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import read_json, write_text, writing
from fasteagle_jax.targets.loading import open_checkpoint
from fasteagle_jax.training.config import KIND_FIELDS, DrafterChoice, RunConfig, apply_changes, drafter_config

SLICES = ("v5e:2x4", "v6e:2x4", "v5p:1x1x1", "h100")
BATCHES = (1, 32)
SCALED = "scaled"  # of --draft-vocab: the measured share of the vocabulary


class Decoder(NamedTuple):
    """A measured drafter with its tree, and what it brings."""

    spec: DecoderSpec
    config: Mapping[str, Any]  # as in its config.json
    tau: dict[float, float]  # by temperature

    @property
    def nodes(self) -> int:
        """Nodes of its tree."""
        return tree_of(self.spec).num_nodes(self.config["num_levels"])


class Round(NamedTuple):
    """The time of a round in seconds, without and with the latency of kernels, and the chips that it takes."""

    seconds: float
    with_latency: float | None = None
    mesh: str = ""  # "" for the default one
    num_devices: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """A decoder at one place, batch and temperature; None: not known."""

    place: str  # a slice, or the machine that measures
    batch: int
    temperature: float
    decoder: DecoderSpec
    tau: float
    round: Round
    over_plain: tuple[float | None, float | None]  # without and with latency
    baseline: DecoderSpec | None = None
    over_baseline: tuple[float | None, float | None] = (None, None)

    @property
    def where(self) -> str:
        """The place, and the mesh if it is not the default one."""
        return f"{self.place}, {self.round.mesh}" if self.round.mesh else self.place

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "place": self.place,
            "batch": self.batch,
            "temperature": self.temperature,
            "drafter": self.decoder.name,
            "tree": self.decoder.tree,
            "tau": self.tau,
            "round": self.round._asdict(),
            "over_plain": self.over_plain,
            "baseline": None if self.baseline is None else str(self.baseline),
            "over_baseline": self.over_baseline,
        }


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `cost`, without those of the target."""
    parser.add_argument("--cost", type=Path, required=True, metavar="R", help="results of --acceptance: folder or file")
    parser.add_argument("--results", type=Path, required=True, metavar="FOLDER", help="for compiled programs and table")
    parser.add_argument(
        "--cost-target", default="llama31_8b", metavar="NAME", help="of fasteagle compile (%(default)s)"
    )
    parser.add_argument("--slices", default=",".join(SLICES), metavar="S,...", help="default %(default)s")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), metavar="B,...", help="default %(default)s")
    parser.add_argument("--meshes", action="store_true", help="try meshes that split a batch over rows of chips, too")
    parser.add_argument(
        "--baseline", metavar="NAME", help="drafter to compare with (default: the first of kind eagle3)"
    )
    parser.add_argument(
        "--draft-vocab",
        metavar="V",
        help=f"draft vocabulary: a number, or `{SCALED}` for the measured share (default: the published run's)",
    )
    parser.add_argument("--measure", action="store_true", help="time rounds on this machine too, which takes weights")
    parser.add_argument("--repeats", type=int, default=9, metavar="R", help="of --measure (default 9)")


def cost(args: argparse.Namespace, load: Any) -> None:
    """Compiles the rounds, prints the table and writes cost.json; `load` gives the Models of a target's name."""
    if args.cost_target not in PUBLISHED:
        raise UserError(f"target {args.cost_target!r} is not known: use one of {', '.join(PUBLISHED)}")
    slices, failures = _slices(args.slices)
    batches = _batches(args.batches)
    report, decoders = read_acceptance(args.cost)
    baselines = {decoder.spec: find_baseline(decoder, decoders, args.baseline).spec for decoder in decoders}
    run = PUBLISHED[args.cost_target]
    changes = {decoder.spec: switches(decoder.config, run, args.draft_vocab) for decoder in decoders}
    for words in changes.values():  # what does not fit together is found out before anything is compiled
        changed = apply_changes(run, words)
        drafter_config(changed.drafter, changed.target_config)  # type: ignore[arg-type]
    temperatures = list(dict.fromkeys(t for decoder in decoders for t in decoder.tau))
    measured_target = report.get("arguments", {}).get("target", "an unnamed target")
    rounds: dict[tuple[str, int, float | None], dict[DecoderSpec, Round]] = {}
    if args.measure:
        times = _measure(args, report, decoders, temperatures, load)
        rounds |= {(machine(), 1, temperature): found for temperature, found in times.items()}
    compiled = args.results / "compiled"
    with writing(compiled):
        compiled.mkdir(parents=True, exist_ok=True)
    for slice_name in slices:
        for batch in batches:
            found: dict[DecoderSpec, Round] = {}
            for spec in (DecoderSpec(PLAIN), *changes):
                words = ["--config", args.cost_target, "--topology", slice_name, "--program", "decode"]
                words += ["--batch", str(batch), "--tree", spec.tree or PLAIN, *changes.get(spec, [])]
                compile_round = functools.partial(_compiled, compiled, args.cost_target, slice_name, batch, spec)
                outcome = compile_round(words)
                if args.meshes and isinstance(outcome, Round):
                    changed = apply_changes(run, changes.get(spec, []))
                    outcome = _on_fastest_mesh(outcome, changed, batch, words, compile_round)
                if isinstance(outcome, Round):
                    found[spec] = outcome
                else:
                    failures.append(f"{slice_name}, batch {batch}, {spec}: {outcome}")
            rounds[slice_name, batch, None] = found
    rows = []
    for (place, batch, only), found in rounds.items():
        for temperature in temperatures:
            if only in (None, temperature):
                rows += _rows(place, batch, temperature, decoders, baselines, found)
    labels = {
        "tau_of": measured_target,
        "cost_of": f"{args.cost_target} ({run.target})",
        "switches": {str(spec): words for spec, words in changes.items()},
    }
    _show(labels, rows)
    for line in failures:
        print(f"no round: {line}")
    best = best_trees(rows)
    if len(best) < sum(row.decoder.name != PLAIN for row in rows):
        _show_best(best)
    content = json.dumps(labels | {"rows": [row.record() for row in rows], "failures": failures}, indent=2)
    with writing(args.results):
        write_text(args.results / "cost.json", content + "\n")
        if len(batches) > 1 and best:
            gains_figure(best).savefig(args.results / "gains.png", dpi=120)


# --- what was measured ------------------------------------------------------------------------------------------


def read_acceptance(path: Path) -> tuple[dict[str, Any], list[Decoder]]:
    """The report of a finished `fasteagle bench --acceptance`, given its folder or results.json, and its decoders."""
    file = path / "results.json" if path.is_dir() else path
    remedy = "make it with fasteagle bench --acceptance --results FOLDER"
    if not file.is_file():
        raise UserError(f"{file} is not there: {remedy}")
    report = read_json(file)
    if not report.get("acceptance"):
        raise UserError(f"{file} has no acceptance: {remedy}")
    found: dict[DecoderSpec, Decoder] = {}
    try:
        for record in report["acceptance"]:
            estimates = record["estimates"]
            tasks = {estimate["task"] for estimate in estimates}
            for estimate in estimates:
                if len(tasks) > 1 and estimate["task"] != MEAN:
                    continue
                spec = DecoderSpec(estimate["drafter"], estimate["tree"])
                decoder = found.setdefault(spec, Decoder(spec, report["drafters"][spec.name], {}))
                if decoder.config["kind"] not in CLASSES:
                    raise UserError(f"{file}: drafter kind {decoder.config['kind']!r} is not known")
                if estimate["tau"] is not None:
                    decoder.tau[record["temperature"]] = estimate["tau"]
                assert decoder.nodes
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not understood ({type(error).__name__}: {error}): {remedy}") from None
    return report, list(found.values())


def find_baseline(decoder: Decoder, decoders: Sequence[Decoder], name: str | None) -> Decoder:
    """What a decoder is compared with: of the same number of nodes if there is one, else the first that fits.

    `name` is a drafter's, or a drafter's and a tree's; None for the first drafter of kind eagle3, and where none has
    the same number of nodes the first decoder.
    """
    if name is None:
        of_kind = [d for d in decoders if d.config["kind"] == "eagle3" and d.nodes == decoder.nodes]
        return (of_kind or list(decoders))[0]
    named = [d for d in decoders if name in (d.spec.name, str(d.spec))]
    if not named:
        raise UserError(f"baseline {name!r} was not measured: use one of {', '.join(str(d.spec) for d in decoders)}")
    return ([d for d in named if d.nodes == decoder.nodes] or named)[0]


# --- at the published sizes -------------------------------------------------------------------------------------

_SIZES = {"draft_vocab_size", "intermediate_size", "feature_layers", "context_layer"}  # the published target's


def switches(config: Mapping[str, Any], run: RunConfig, draft_vocab: str | None) -> list[str]:
    """Changes of a published run that give its drafter the switches of a measured drafter's configuration."""
    target = run.target_config
    assert target is not None
    known = {field.name for field in dataclasses.fields(DrafterChoice)}
    of_kind = {field.name for field in dataclasses.fields(CLASSES[config["kind"]].Config)}
    names = ({"kind", "num_levels", "window"} | KIND_FIELDS) & known & of_kind & set(config) - _SIZES
    values = {name: config[name] for name in sorted(names)}
    if values.get("correction"):
        share = values["correction"] / config["hidden_size"]
        values["correction"] = max(round(share * target.hidden_size), 1)
    if (num := len(config["feature_layers"])) != len(drafter_config(run.drafter, target).feature_layers):
        values["feature_layers"] = tuple(i * (target.num_layers - 1) // max(num - 1, 1) for i in range(num))
    if draft_vocab == SCALED:
        share = config["draft_vocab_size"] / config["vocab_size"]
        values["draft_vocab_size"] = max(round(share * target.vocab_size), 1)
    elif draft_vocab is not None:
        if not draft_vocab.isdigit() or not int(draft_vocab):
            raise UserError(f"--draft-vocab {draft_vocab!r} is not understood: give a number or `{SCALED}`")
        values["draft_vocab_size"] = int(draft_vocab)
    return [f"drafter.{name}={value}" for name, value in values.items()]


def _batches(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdigit() and int(word) for word in words):
        raise UserError(f"--batches {text!r} is not a list of numbers of at least 1: write 1,32")
    return list(dict.fromkeys(map(int, words)))


def _slices(text: str) -> tuple[list[str], list[str]]:
    """The slices, and why others that are named cannot be compiled for here."""
    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if unknown := [name for name in names if name not in topology.topology_names()]:
        raise UserError(f"slice {unknown[0]!r} is not known: use some of {', '.join(topology.topology_names())}")
    left_out = [name for name in names if name in topology.GPUS and not topology.has_gpu_compiler()]
    if not (kept := [name for name in names if name not in left_out]):
        raise UserError(f"--slices {text!r} leaves nothing to compile for: name a slice, e.g. {SLICES[0]}")
    return kept, [f"{name} needs the CUDA compiler's packages: {topology.INSTALL['cuda']}" for name in left_out]


def _compiled(
    folder: Path, target: str, slice_name: str, batch: int, spec: DecoderSpec, words: Sequence[str]
) -> Round | str:
    """The Round of `fasteagle compile` with these words, kept in the folder, or why there is none."""
    digest = hashlib.sha256("\0".join(words).encode()).hexdigest()[:8]
    name = "-".join((target, slice_name, f"batch{batch}", spec.tree or PLAIN, digest)).replace(":", "-")
    path = folder / f"{name}.json"
    if not path.exists():
        compile_apart(path, words)
    try:
        figures = json.loads(path.read_text())[0]
        if "error" in figures:
            return str(figures["error"])
        if figures["estimate"] is None:
            return "nothing is known of the device's speed"
        late = figures.get("estimate_with_latency")
        return Round(figures["estimate"], late, num_devices=figures.get("devices", 1))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and run the same command again") from None


def _on_fastest_mesh(
    default: Round, run: RunConfig, batch: int, words: Sequence[str], compile_round: Callable[[list[str]], Round | str]
) -> Round:
    """The Round of the fastest of meshes with 1, 2, 4, ... rows of chips, without latency.

    More rows are tried as long as that helps.
    """
    best, rows = default, 2
    while batch % rows == 0 and default.num_devices % rows == 0:
        shape = dataclasses.replace(decode_mesh(run, default.num_devices // rows), data=rows)
        mesh = ",".join(map(str, dataclasses.astuple(shape)))
        outcome = compile_round([*words, "--mesh", mesh])
        if isinstance(outcome, str) or outcome.seconds >= best.seconds:
            break
        best, rows = outcome._replace(mesh=str(shape)), 2 * rows
    return best


# --- on this machine --------------------------------------------------------------------------------------------


def _measure(
    args: argparse.Namespace,
    report: Mapping[str, Any],
    decoders: Sequence[Decoder],
    temperatures: Sequence[float],
    load: Any,
) -> dict[float, dict[DecoderSpec, Round]]:
    """Median seconds of a round of each decoder and of plain decoding, by temperature, batch 1, interleaved."""
    given = report.get("arguments", {})
    target = args.target or given.get("target")
    words = args.drafters.split(",") if args.drafters else given.get("drafters")
    if not target or not words:
        raise UserError("--measure needs the weights: give --target and --drafters NAME=FOLDER,...")
    folders = {spec.name: spec for spec in parse_decoders(words, "chain")}
    if missing := [d.spec.name for d in decoders if d.spec.name not in folders]:
        raise UserError(f"--measure needs the folder of {missing[0]}: give --drafters {missing[0]}=FOLDER,...")
    specs = [dataclasses.replace(d.spec, folder=folders[d.spec.name].folder) for d in decoders]
    specs = find_drafters(specs, open_checkpoint(target))
    models: Models = load(target, given.get("dtype"))
    drafters = load_drafters(models, specs)
    for decoder, spec in zip(decoders, specs, strict=True):
        loaded = json.loads(json.dumps(dataclasses.asdict(drafters[spec.folder].config)))  # type: ignore[index]
        if loaded != decoder.config:
            raise UserError(f"{spec.folder} holds another drafter than {args.cost} measured: name that one's folder")
    lengths = [case["prompt_tokens"] for record in report["acceptance"] for case in record.get("cases", [])]
    vocab_size = models.target.config.vocab_size
    prompt = [i % vocab_size for i in range(int(statistics.median(lengths)) if lengths else 128)]
    runs: dict[DecoderSpec, tuple[Any, TreeSpec | None]] = {DecoderSpec(PLAIN): (None, None)}
    for decoder, spec in zip(decoders, specs, strict=True):
        runs[decoder.spec] = drafters[spec.folder], tree_of(spec)  # type: ignore[index]
    levels = max(drafter.num_levels for drafter, _ in runs.values() if drafter is not None)
    max_new = max(given.get("max_new", 0), ROUNDS * (levels + 1) + 1)  # a row that is done would be timed doing nothing
    times: dict[float, dict[DecoderSpec, Round]] = {}
    progress = Progress(len(temperatures) * args.repeats, "repeat")
    for temperature in temperatures:
        # The other fields are those of the measurement; older results do not have all of them.
        fields = {name: given.get(name, row.default) for name, row in FIELDS.items()}
        sampling = make_sampling(1, **fields | {"temperature": temperature})
        timers = round_timers(models.target, runs, prompt, sampling, max_new)
        seconds = interleaved(timers, args.repeats, lambda: progress.update("rounds on this machine"))
        times[temperature] = {spec: Round(Spread.of(values).median) for spec, values in seconds.items()}
    progress.close()
    return times


# --- the table --------------------------------------------------------------------------------------------------


def _rows(
    place: str,
    batch: int,
    temperature: float,
    decoders: Sequence[Decoder],
    baselines: Mapping[DecoderSpec, DecoderSpec],
    rounds: Mapping[DecoderSpec, Round],
) -> list[Row]:
    plain = DecoderSpec(PLAIN)
    taus = {plain: 1.0} | {d.spec: d.tau[temperature] for d in decoders if temperature in d.tau}
    rows = []
    for spec, tau in taus.items():
        if spec not in rounds:
            continue
        over_plain = _speed_up(spec, plain, taus, rounds)
        if spec == plain:
            rows.append(Row(place, batch, temperature, spec, tau, rounds[spec], over_plain))
        else:
            base = baselines[spec]
            over = _speed_up(spec, base, taus, rounds)
            rows.append(Row(place, batch, temperature, spec, tau, rounds[spec], over_plain, base, over))
    return rows


def _speed_up(
    spec: DecoderSpec, base: DecoderSpec, taus: Mapping[DecoderSpec, float], rounds: Mapping[DecoderSpec, Round]
) -> tuple[float | None, float | None]:
    """tau / round over another decoder's, without and with latency."""
    if base not in rounds or base not in taus:
        return None, None
    ratio = taus[spec] / taus[base]
    own, other = rounds[spec], rounds[base]
    known = own.with_latency is not None and other.with_latency is not None
    return ratio * other.seconds / own.seconds, (
        ratio * other.with_latency / own.with_latency if known else None  # type: ignore[operator]
    )


def _show(labels: Mapping[str, Any], rows: Sequence[Row]) -> None:
    cells = []
    for row in rows:
        late = None if row.round.with_latency is None else 1e3 * row.round.with_latency
        base = "" if row.baseline in (None, row.decoder) else f"{_pair(row.over_baseline)} {row.baseline}"
        cells.append(
            (
                row.where,
                str(row.decoder),
                str(row.batch),
                f"{row.temperature:g}",
                f"{row.tau:.3f}",
                _pair((1e3 * row.round.seconds, late)),
                "" if row.decoder.name == PLAIN else _pair(row.over_plain),
                base,
            )
        )
    title = f"tau of {labels['tau_of']}, cost of {labels['cost_of']}; in brackets with the latency of kernels"
    columns = ("where", "drafter", "batch", "T", "tau", "round, ms", "over plain", "over another")
    show(title, columns, cells)
    print(
        "Rounds of slices are estimates from compiled programs, not times; speed-up: tau / round over that of plain"
        " decoding, and of the drafter named."
    )


def best_trees(rows: Sequence[Row]) -> list[Row]:
    """For each place, batch, temperature and drafter the Row of the tree that gains most, without latency."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row.place, row.batch, row.temperature, row.decoder.name
        if row.decoder.name != PLAIN and row.over_plain[0] is not None:
            found[key] = max(found.get(key, row), row, key=lambda r: r.over_plain[0] or 0.0)
    return list(found.values())


def _show_best(best: Sequence[Row]) -> None:
    cells = [
        (row.place, row.decoder.name, f"{row.temperature:g}", str(row.batch), str(row.decoder.tree))
        + (row.round.mesh or "default", f"{row.tau:.3f}", _pair(row.over_plain))
        for row in sorted(best, key=lambda row: (row.place, row.temperature, row.decoder.name, row.batch))
    ]
    columns = ("where", "drafter", "T", "batch", "tree", "mesh", "tau", "over plain")
    show("the tree of each drafter that gains most", columns, cells, left=6)


def gains_figure(best: Sequence[Row]) -> Any:
    """The gain over plain decoding by batch of each drafter's best tree, without and (dashed) with latency."""
    from matplotlib.figure import Figure

    colours = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(row.decoder.name for row in best))}
    labelled: set[str] = set()
    panels = list(dict.fromkeys((row.place, row.temperature) for row in best))
    figure = Figure(figsize=(max(3.6 * len(panels), 6.0), 3.8), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (place, temperature) in zip(grid, panels, strict=True):
        shown = [row for row in best if (row.place, row.temperature) == (place, temperature)]
        for name in dict.fromkeys(row.decoder.name for row in shown):
            own = sorted((row for row in shown if row.decoder.name == name), key=lambda row: row.batch)
            for part, style in ((0, "-"), (1, "--")):
                points = [(row.batch, row.over_plain[part]) for row in own if row.over_plain[part] is not None]
                if points:
                    label = None if name in labelled else name
                    labelled.add(name)
                    axes.plot(*zip(*points, strict=True), style, marker="o", color=colours[name], label=label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("batch")
        axes.set_title(f"{place}, temperature {temperature:g}", fontsize="small")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("speed over plain")
    figure.legend(fontsize="small", loc="outside lower center", ncols=len(colours))
    return figure


def _pair(values: tuple[float | None, float | None]) -> str:
    without, late = ("-" if value is None else f"{value:.2f}" for value in values)
    return without if values[1] is None else f"{without} ({late})"
