"""Batch requests on Ray Data: engines on many machines answer folders of requests, and the records are `batch`'s own.

Ray hands batches of rows to workers that have finished theirs, starts a worker that died anew and gives it its rows
again, whose answers are bitwise the same: the noise is a function of seed and position. Rows are known by an id column
whose values Ray Data writes down beside the records (its checkpointing), so that a killed job computes what is missing.

`Answers` and `workers` are for Datasets of one's own, `answer_files` is `fasteagle batch --ray`, and `Cluster` stands
in an engine's place for `prepare-data --ray`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import math
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
import pyarrow.fs as pa_fs
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.checkpoint import CheckpointConfig
from ray.data.datasource import BlockBasedFileDatasink, Datasource, ReadTask

from fasteagle_jax.devices.chips import set_libtpu_flags
from fasteagle_jax.devices.compiled import keep_compiled
from fasteagle_jax.devices.sharding import MeshShape, make_mesh
from fasteagle_jax.engine.batch_records import answer_record, record_text, refusal_record
from fasteagle_jax.engine.batch_requests import BatchRequest, Line, Refusal, numbered, read_custom_id, read_request
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import Completion, Refused, SamplingParams
from fasteagle_jax.engine.shared import SharedEngine
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line, in_bucket
from fasteagle_jax.targets.messages import short
from fasteagle_jax.targets.templates import PLAIN, ChatOptions

KINDS = ("TPU", "GPU", "CPU")  # of a worker's device: the first one that a cluster has

ROWS_A_SLOT = 4  # of a batch: as long as one is waiting, the end of another leaves no slot empty
CALLS = 3  # batches that a worker has at once
READERS = 2  # files read at once; they wait for the workers
FILTER_BYTES = 64 * 2**20  # of memory that Ray reserves for a reader of what is done; its own default is a GiB

CONNECT_SECONDS = 5.0


# --- the cluster ------------------------------------------------------------------------------------------------


def connect(address: str) -> None:
    """Joins the cluster at an address, `auto` for that of this machine; without one starts Ray on this machine.

    Raises UserError for an address at which no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    address = address or os.environ.get("RAY_ADDRESS", "")
    _check_address(address)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if not address:
        # Ray's CPUs are a count, no cores: reading and writing must not wait for workers who have them all.
        options |= {"num_cpus": (os.cpu_count() or 1) + READERS, "include_dashboard": False}
    logging.getLogger("ray").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray[.]")  # advice on fewer rows than workers
    try:
        ray.init(address=address or "local", **options)
    except Exception as error:  # of many kinds, Exception itself among them
        raise _no_cluster(address, error) from error
    ray.data.DataContext.get_current().enable_progress_bars = os.isatty(2)
    logging.getLogger("ray.data").setLevel(logging.ERROR)


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """`connect` for as long as the block lasts; a UserError of a worker is raised as one."""
    connect(address)
    try:
        yield
    except ray.exceptions.RayError as error:
        if (behind := user_error(error)) is None:
            raise
        raise behind from error
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raises UserError if nothing listens at host:port; Ray itself would try for a minute and then end the process."""
    if address in ("", "auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--ray is {address!r}: give HOST:PORT or auto, or leave it empty")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address or 'this machine'} ({first_line(error)[:200]}): "
        "start one (ray start --head), give its address, or give none to start one here"
    )


class Workers(NamedTuple):
    """Number of workers, and the device that each takes."""

    number: int
    kind: str  # of KINDS
    devices: float  # of this kind, a worker

    def __str__(self) -> str:
        return f"{self.number} workers, each with {self.devices:g} {self.kind}"

    def dtype(self, asked: str | None) -> str:
        """The dtype asked for, else the one that their device has as its default; this machine may have none."""
        return asked or ("float32" if self.kind == "CPU" else "bfloat16")


def workers_for(number: int | None, per_worker: str | None, mesh: str | None) -> Workers:
    """The workers that a cluster has room for, or the number asked for.

    `per_worker` is as "TPU=4"; without it the cluster's own kind of device, as many as the mesh has. XLA computes on
    all cores of a CPU, so that there is one worker a machine without accelerators.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    of_mesh = 1 if mesh is None else math.prod(n for n in dataclasses.astuple(MeshShape.parse(mesh)) if n > 0)
    kind = next((kind for kind in KINDS if any(node.get(kind) for node in nodes)), "CPU")
    devices = 1.0 if kind == "CPU" else float(of_mesh)
    if per_worker is not None:
        kind, _, given = per_worker.partition("=")
        with contextlib.suppress(ValueError):
            devices = float(given)
        if kind not in KINDS or not given or devices <= 0:
            raise UserError(f"--worker is {per_worker!r}: give TPU=N, GPU=N or CPU=N")
    # Of each machine, as a worker is on one.
    room = [int(node.get(kind, 0) / devices + 1e-6) for node in nodes]
    if not sum(room):
        most = max((node.get(kind, 0) for node in nodes), default=0)
        raise UserError(
            f"a worker takes {devices:g} {kind}, but no machine of the cluster has more than {most:g}: "
            "give --worker, or add machines"
        )
    if number is None:
        number = sum(map(bool, room)) if kind == "CPU" else sum(room)
    elif number > sum(room):
        raise UserError(
            f"{number} workers of {devices:g} {kind} each do not fit: the cluster has room for {sum(room)}: "
            "lower --workers, give --worker, or add machines"
        )
    return Workers(number, kind, devices)


def workers(number: int, slots: int, **devices: float) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` for `number` workers that keep an engine of `slots` each.

    `devices` are TPU=4, GPU=1 or CPU=1: what each worker takes. A worker has several batches at once, so that the slots
    which the last rows of one leave empty are filled from the next.
    """
    (given,) = devices.items()
    pool = {"max_concurrent_calls_per_actor": CALLS, "max_tasks_in_flight_per_actor": CALLS + 1}
    compute = ray.data.ActorPoolStrategy(size=number, **pool, enable_true_multi_threading=True)
    return {"compute": compute, "batch_size": ROWS_A_SLOT * slots, **_needs(*given)}


def _needs(kind: str, devices: float) -> dict[str, Any]:
    """What Ray is told of a worker that takes so many devices."""
    if kind == "TPU":
        return {"resources": {"TPU": devices}, "num_cpus": 0}
    return {"num_gpus": devices, "num_cpus": 0} if kind == "GPU" else {"num_cpus": devices}


# --- answers ----------------------------------------------------------------------------------------------------


class Answers:
    """Callable class for `Dataset.map_batches`: one engine a worker, kept; a column "record" for each row.

    Rows have a "request", the text of a line of a batch file (JSON: prompt or messages with sampling fields, or
    OpenAI's form), and may have a "line" and a "file", which the record repeats. The record is JSON, too, and
    `fasteagle batch`'s own; "is_error" tells of an error. A row that cannot be answered never fails its batch.
    """

    def __init__(
        self,
        target: str,
        *,
        params: SamplingParams | None = None,
        chat: ChatOptions = PLAIN,
        mesh: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        """Loads the engine.

        Args:
          target: as of `Engine.load`, on every machine.
          params: for what a request leaves out.
          chat: for what a request leaves out.
          mesh: data,fsdp,tensor of the worker's devices; None for one of them.
          name: of the model in OpenAI's records; the target's if there is none.
          options: drafter, slots, max_len, tree, lookup, dtype, strict, adapter: as of `Engine.load`.
        """
        self._shared = SharedEngine(load_engine(target, mesh=mesh, **options))
        self._name = name or target
        self._params, self._chat = params or SamplingParams(), chat
        self._lock = threading.Lock()  # of the tokenizer: batches are asked by several threads

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with a record for each request, in place of it."""
        requests = batch.pop("request")
        lines = batch.get("line", range(1, len(requests) + 1))
        files, owners = batch.get("file", itertools.repeat("")), batch.pop("owner", itertools.repeat(""))
        with self._lock:
            asked = [*map(self._ask, requests, lines, files, owners)]
        records = [self._record(*one) for one in asked]
        texts = np.array([record_text(record) for record in records], object)
        return batch | {
            "record": texts,
            "is_error": np.array([record["error"] is not None for record in records], bool),
        }

    def _ask(self, request: Any, line: int, file: str, owner: str) -> _OnItsWay:
        if not isinstance(request, (str, bytes)):
            what = f"request is {short(request)}: give a line of a batch file as a text"
            return _OnItsWay(Refusal(Line(int(line), file=file or ""), "invalid_line", what), (), None)
        raw = request.encode(errors="surrogatepass") if isinstance(request, str) else request
        read = read_request(raw, int(line), self._params, self._chat, file=file or "", owner=owner or None)
        if isinstance(read, Refusal):
            return _OnItsWay(read, (), None)
        try:
            tokens = self._shared.engine.encode(read.prompt, "the prompt", read.chat)
        except UserError as error:
            return _OnItsWay(Refusal(read.line, "invalid_prompt", str(error)), (), None)
        return _OnItsWay(read, tokens, self._shared.ask(tokens, read.params))

    def _record(
        self, request: BatchRequest | Refusal, prompt: Sequence[int], answers: Future[list[Completion]] | None
    ) -> dict[str, Any]:
        if isinstance(request, Refusal):
            return refusal_record(request)
        assert answers is not None
        try:
            completions = answers.result()
        except UserError as error:
            return refusal_record(Refusal(request.line, "invalid_prompt", str(error)))
        return answer_record(request, prompt, completions, self._shared.engine.detokenizer, self._name)


class _OnItsWay(NamedTuple):
    """A row, its prompt's tokens, and its answers to come."""

    request: BatchRequest | Refusal
    prompt: Sequence[int]
    answers: Future[list[Completion]] | None


def load_engine(target: str, *, mesh: str | None = None, **options: Any) -> Engine:
    """A worker's engine, its programs kept; arguments are those of `Answers`."""
    set_libtpu_flags()
    keep_compiled()
    devices = None if mesh is None else make_mesh(MeshShape.parse(mesh), jax.local_devices())
    return Engine.load(target, mesh=devices, **options)


@ray.remote
class _Worker:
    """An engine on one of the machines."""

    def __init__(self, target: str, options: Mapping[str, Any]) -> None:
        self._shared = SharedEngine(load_engine(target, **options))

    def ask(self, prompt: Sequence[int], params: SamplingParams) -> list[Completion] | str:
        """The prompt's answers, or why it has none."""
        answers = self._shared.ask(prompt, params)
        try:
            return answers.result()
        except UserError as error:
            return str(error)


class Cluster:
    """Engines of a Ray cluster as a source of answers; it has what `answering.answer_all` needs of an engine."""

    def __init__(self, their: Workers, target: str, options: Mapping[str, Any]) -> None:
        """Starts workers with an engine each; `options` are those of `load_engine`, slots among them."""
        self.ahead = 2 * options["slots"]  # prompts that a worker has: those of the slots, and as many that wait
        how = {
            "max_concurrency": self.ahead,
            "max_restarts": -1,
            "max_task_retries": -1,
            "scheduling_strategy": "SPREAD",
        }
        how |= _needs(their.kind, their.devices)
        self._workers = [_Worker.options(**how).remote(target, options) for _ in range(their.number)]  # type: ignore[attr-defined]

    def serve(self, pairs: Iterator[tuple[Sequence[int], SamplingParams]]) -> Iterator[Completion | Refused]:
        """The answers to prompts as they come; `prompt_index` is their number, from 0 on.

        `pairs` of a prompt and its params is asked for more before each wait. Raises UserError if no engine can be had.
        """
        numbers = itertools.count()
        under_way: dict[Any, tuple[int, int]] = {}  # a prompt's number and worker, by the reference to its answers
        busy = [0] * len(self._workers)
        while True:
            while min(busy) < self.ahead and (pair := next(pairs, None)) is not None:
                worker = busy.index(min(busy))
                under_way[self._workers[worker].ask.remote(tuple(pair[0]), pair[1])] = next(numbers), worker
                busy[worker] += 1
            if not under_way:
                return
            ray.wait([*under_way], num_returns=1)
            ready, _ = ray.wait([*under_way], num_returns=len(under_way), timeout=0)
            for reference in ready:
                number, worker = under_way.pop(reference)
                busy[worker] -= 1
                yield from self._answers(reference, number)

    def _answers(self, reference: Any, number: int) -> Iterator[Completion | Refused]:
        try:
            answers = ray.get(reference)
        except ray.exceptions.RayError as error:
            if (behind := user_error(error)) is None:
                raise
            raise behind from error
        if isinstance(answers, str):
            yield Refused(number, answers)
        else:
            yield from (dataclasses.replace(answer, prompt_index=number) for answer in answers)


# --- folders of requests ----------------------------------------------------------------------------------------


class RequestFile(NamedTuple):
    """A file of requests, and the name that records give it: "" for one that is alone."""

    path: str
    name: str


JSON, PARQUET = (".jsonl", ".json", ".ndjson"), (".parquet",)


def request_files(place: str) -> list[RequestFile]:
    """The files of a folder or bucket, sorted by name, or the one file; UserError if there is none."""
    system, path = _filesystem(place)
    try:
        (info,) = system.get_file_info([path])
        if info.type == pa_fs.FileType.File:
            return [RequestFile(place, "")]
        found = system.get_file_info(pa_fs.FileSelector(path)) if info.type == pa_fs.FileType.Directory else []
    except OSError as error:  # a bucket's
        raise UserError(f"cannot read {place} ({first_line(error)[:200]}): check its name and rights") from error
    if info.type != pa_fs.FileType.Directory:
        raise UserError(f"no file or folder {place}: name one of requests")
    names = sorted(one.base_name for one in found if one.base_name.lower().endswith((*JSON, *PARQUET)) and one.is_file)
    if not names:
        raise UserError(f"{place} holds no file of requests: give .jsonl or .parquet files")
    return [RequestFile(f"{place.rstrip('/')}/{name}", name) for name in names]


def _filesystem(place: str) -> tuple[pa_fs.FileSystem, str]:
    """The file system of a path or address, and the path there."""
    if not in_bucket(place):
        return pa_fs.LocalFileSystem(), place
    try:
        return pa_fs.FileSystem.from_uri(place)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(f"cannot read {place} ({first_line(error)[:200]}): give gs://, s3:// or a folder") from error


def read_rows(path: str) -> Iterator[tuple[int, bytes]]:
    """The rows of a file as lines of JSON with their numbers, from 1; blank lines are left out and count.

    Columns of a Parquet file are a line's fields, null where the row lacks one.
    """
    system, inside = _filesystem(path)
    if path.lower().endswith(PARQUET):
        with system.open_input_file(inside) as file:
            rows = (row for batch in pq.ParquetFile(file).iter_batches(1024) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                fields = {name: value for name, value in row.items() if value is not None}
                yield number, json.dumps(fields, default=str).encode()
    else:
        with system.open_input_stream(inside, compression=None) as stream, io.BufferedReader(stream) as file:
            yield from numbered(file)


class Survey(NamedTuple):
    """What a file of requests holds."""

    sha256: str
    num_rows: int
    ids: list[tuple[int, str]]  # of rows that have one, by their number


@ray.remote(num_cpus=0)
def _survey(path: str, id_column: str | None) -> Survey:
    """Reads a file through; `ids` are values of the column, or without one the custom_ids."""
    system, inside = _filesystem(path)
    digest = hashlib.sha256()
    with system.open_input_stream(inside, compression=None) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    ids, num_rows = [], 0
    for number, raw in read_rows(path):
        num_rows += 1
        if (id := read_custom_id(raw) if id_column is None else _id_of(raw, id_column)) is not None:
            ids.append((number, id))
    return Survey(digest.hexdigest(), num_rows, ids)


def survey(files: Sequence[RequestFile], id_column: str | None) -> list[Survey]:
    """What each of the files holds; UserError for files without rows or that cannot be read."""
    waiting = [_survey.remote(file.path, id_column) for file in files]
    try:
        found: list[Survey] = ray.get(waiting)
    except ray.exceptions.RayTaskError as error:
        raise UserError(
            f"the requests cannot be read ({first_line(error.cause)[:200]}): mend or remove the file"
        ) from error
    if not sum(one.num_rows for one in found):
        raise UserError(f"{_folder(files)} holds no row: give requests, a line or row each")
    return found


def _folder(files: Sequence[RequestFile]) -> str:
    return files[0].path if not files[0].name else files[0].path.rpartition("/")[0]


def _place(file: RequestFile, number: int) -> str:
    return f"line {number}" if not file.name else f"{file.name}, line {number}"


def first_owners(files: Sequence[RequestFile], found: Sequence[Survey]) -> dict[tuple[str, int], str]:
    """For each row, by file and number, whose id is an earlier row's: the place of that row."""
    owners: dict[str, str] = {}
    later = {}
    for file, its in zip(files, found, strict=True):
        for number, id in its.ids:
            place = _place(file, number)
            if (owner := owners.setdefault(id, place)) != place:
                later[file.path, number] = owner
    return later


def check_ids(files: Sequence[RequestFile], found: Sequence[Survey], column: str) -> None:
    """Raises UserError for ids that several rows have: of these one alone would be answered."""
    later = first_owners(files, found)
    for (path, number), owner in later.items():
        file = next(file for file in files if file.path == path)
        more = f", and {len(later) - 1} more rows are so" if len(later) > 1 else ""
        raise UserError(
            f"{_folder(files)}: the {column} of {_place(file, number)} is that of {owner}{more}: "
            "make them unique, or leave out --id-column"
        )
    if not any(its.ids for its in found):
        raise UserError(f"{_folder(files)}: no row has a {column}: name a column of ids, or leave out --id-column")


def _id_of(raw: bytes, column: str) -> str | None:
    """The row's value of a column, as a text; None if it has none that is a text or a whole number."""
    try:
        value = json.loads(raw)[column]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _as_id(raw: bytes, column: str) -> bytes:
    """The row with this column by the name that records repeat."""
    if column in ("id", "custom_id") or _id_of(raw, column) is None:
        return raw
    row = json.loads(raw)
    id = row.pop(column)
    return json.dumps(row | {"id": id}).encode()


ROW = "row"  # the column by which Ray knows what is done
SCHEMA = pa.schema(
    [(ROW, pa.string()), ("file", pa.string()), ("line", pa.int64()), ("request", pa.binary()), ("owner", pa.string())]
)


class RequestFiles(Datasource):
    """Files of requests as a Dataset of SCHEMA, a reading task each."""

    def __init__(
        self, files: Sequence[RequestFile], id_column: str | None = None, owners: Mapping[tuple[str, int], str] = {}
    ) -> None:
        self._files, self._id_column = files, id_column
        self._owners: dict[str, dict[int, str]] = collections.defaultdict(dict)
        for (path, number), owner in owners.items():
            self._owners[path][number] = owner

    def estimate_inmemory_data_size(self) -> int | None:
        """Not known."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: Any = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task a file, whatever the parallelism asked for."""
        about = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(self._reader(file), about, SCHEMA) for file in self._files]

    def _reader(self, file: RequestFile) -> Callable[[], Iterator[pa.Table]]:
        column, owners = self._id_column, self._owners.get(file.path, {})

        def read() -> Iterator[pa.Table]:
            rows, alike = read_rows(file.path), collections.Counter[str]()
            while some := [*itertools.islice(rows, 64)]:
                columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
                for number, raw in some:
                    id = f"{file.name}:{number}" if column is None else _id_of(raw, column)
                    if id is None:  # files may change: it is known by what it says, and counted among its like
                        said = hashlib.sha256(raw).hexdigest()
                        alike[said] += 1
                        id = f"{file.name}:{said}:{alike[said]}"
                    columns[ROW].append(id)
                    columns["file"].append(file.name)
                    columns["line"].append(number)
                    columns["request"].append(raw if column is None else _as_id(raw, column))
                    columns["owner"].append(owners.get(number, ""))
                yield pa.table(columns, SCHEMA)

        return read


# --- folders of records -----------------------------------------------------------------------------------------


class RecordFiles(BlockBasedFileDatasink):
    """A folder of .jsonl files with the column "record" of what is written, a line each, and counts of it."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder, file_format="jsonl")
        self.num_rows = self.num_errors = 0  # of this run, once it is over

    def write(self, blocks: Iterable[Any], ctx: Any) -> Any:
        """Writes a file; returns the number of its error records."""
        blocks = [*blocks]
        super().write(blocks, ctx)
        return sum(sum(BlockAccessor.for_block(block).to_arrow()["is_error"].to_pylist()) for block in blocks)

    def write_block_to_file(self, block: BlockAccessor, file: Any) -> None:
        """Writes the records of a block."""
        for record in block.to_arrow()["record"].to_pylist():
            file.write(record.encode() + b"\n")

    def on_write_complete(self, write_result: Any) -> None:
        """Counts what was written."""
        self.num_rows, self.num_errors = write_result.num_rows, sum(write_result.write_returns)


def checkpoint_folder(output: str) -> str:
    """Where Ray Data keeps the ids of the rows whose records are in a folder."""
    return f"{output}.done"


def check_records(output: str) -> None:
    """Raises UserError if a file of records is gone whose rows count as answered."""
    stems = []
    for folder in (checkpoint_folder(output), output):
        system, path = _filesystem(folder)
        entries = system.get_file_info(pa_fs.FileSelector(path, allow_not_found=True))
        stems.append({PurePosixPath(one.path).stem for one in entries if one.is_file})
    if gone := sorted(stem for stem in stems[0] - stems[1] if not stem.endswith(".pending")):
        done = f"{checkpoint_folder(output)}/{gone[0]}.parquet"
        raise UserError(
            f"{len(gone)} files of records are gone from {output}, the first of them {gone[0]}.jsonl: "
            f"put them back, or remove {done} and its like to compute their rows again"
        )


class Answered(NamedTuple):
    """What a run has written."""

    num_rows: int
    num_errors: int


def answer_files(
    files: Sequence[RequestFile],
    output: str,
    their: Workers,
    slots: int,
    arguments: Mapping[str, Any],
    *,
    id_column: str | None,
    owners: Mapping[tuple[str, int], str],
) -> Answered:
    """Writes records of the rows that have none yet into the folder `output`; `arguments` are those of `Answers`."""
    check_records(output)
    done = CheckpointConfig(ROW, checkpoint_folder(output), delete_checkpoint_on_success=False)
    done.checkpoint_actor_memory_bytes, done.checkpoint_actor_pool_max_size = FILTER_BYTES, 1
    sizes = {"override_num_blocks": len(files), "concurrency": min(READERS, len(files)), "num_cpus": 0}
    rows = ray.data.read_datasource(RequestFiles(files, id_column, owners), **sizes)
    rows.context.checkpoint_config = done  # of this Dataset alone
    rows = rows.repartition(target_num_rows_per_block=ROWS_A_SLOT * slots)  # as it is read; else blocks of megabytes
    how = workers(their.number, slots, **{their.kind: their.devices})
    records = rows.map_batches(Answers, fn_constructor_kwargs=dict(arguments), **how)
    sink = RecordFiles(output)
    records.write_datasink(sink, ray_remote_args={"num_cpus": 0}, concurrency=READERS)
    return Answered(sink.num_rows, sink.num_errors)


def user_error(error: BaseException) -> UserError | None:
    """The UserError behind one of Ray's, which hold it or, of a worker's start or a batch, its traceback alone."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, UserError):
        return cause
    _, name, told = str(error).rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
    return UserError(first_line(Exception(told))) if name else None


def absolute(name: str) -> str:
    """A local path as one that holds in any working directory; names and buckets' addresses as they are."""
    return str(Path(name).absolute()) if not in_bucket(name) and Path(name).exists() else name
