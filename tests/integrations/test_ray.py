"""`--ray`: whatever befalls the workers or the job, the records are those of one process.

Jobs are real processes, on a Ray of this machine that all of them share.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import yaml

from fasteagle_jax import SamplingParams
from fasteagle_jax.commands import batch, prepare_data
from fasteagle_jax.errors import UserError
from fasteagle_jax.integrations.ray import Answers, RequestFiles, read_rows, request_files, workers, workers_for
from tests.tiny_folder import make_target

pytestmark = [
    pytest.mark.ray,
    # Ray leaves pipes and processes of its own to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray[.].*"),  # Ray's own
]

ROOT = Path(__file__).parents[2]
SECONDS = 900  # of a job, at the most
ROWS, BAD = 2000, 50


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return make_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def cluster():
    """Ray on this machine, with room for two workers and for those who read and write; its address."""
    # On a busy machine Ray starts slowly, and its workers, which it makes nicer than all others, hardly at all.
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_agent_register_timeout_ms": "300000",
        "RAY_worker_niceness": "0",
    }
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def job(verb, *words):
    """A command in a process of its own; what it prints comes out of `said`."""
    command = [sys.executable, "-m", "fasteagle_jax.cli", verb, *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def said(process, code=0):
    """What a job prints, once it has ended with this code."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert process.returncode == code, err
    return out, err


def batch_words(target, source, output, *more):
    sizes = ["--max-len", 128, "--slots", 8, "--tree", "plain"]
    return ["--target", target, *sizes, "--input", source, "--output", output, *more]


def lines(number=ROWS, bad=BAD):
    """Requests of both forms; every so many of them is one that cannot be answered."""
    for i in range(number):
        if i % (number // bad) == 3:
            yield [b"not json", b'{"prompt": 7}', b'{"prompt": "' + b"so " * 99 + b'"}', b"[1]", b'{"prompt": "\xff"}'][
                i % 5
            ]
            continue
        fields = {"prompt": "Why " + "so " * (i % 9) + "?", "seed": i, "max_tokens": 2 + i % 7}
        openai = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": fields}
        yield json.dumps(openai if i % 3 else fields | {"id": f"r{i}"}).encode()


def records(place):
    """Records by their lines, each there once, without what a clock says."""
    found = {}
    for path in sorted(place.glob("*.jsonl")) if place.is_dir() else [place]:
        for line in path.read_text().splitlines():
            record = json.loads(line)
            (record.get("statistics") or {}).pop("seconds", None)
            ((record.get("response") or {}).get("body") or {}).pop("created", None)
            key = record.pop("file", ""), record["line"]
            assert key not in found, key
            found[key] = record
    return found


def children(pid):
    """The processes that a process started, and those that these started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more} - found
        found |= more
    return found


def workers_at_work(name):
    """Process ids of the workers of that name of this session's Ray."""
    found = []
    for pid in children(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().decode().startswith(f"ray::{name}"):
                found.append(pid)
    return found


def wait_for(condition, process):
    """Waits until something holds; the job must not end before."""
    until = time.monotonic() + SECONDS
    while not (held := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return held


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("requests") / "in.jsonl"
    path.write_bytes(b"\n".join(lines()) + b"\n")
    return path


@pytest.fixture(scope="module")
def alone(target, source, tmp_path_factory):
    """The records of one process."""
    output = tmp_path_factory.mktemp("alone") / "out.jsonl"
    assert batch.main([str(word) for word in batch_words(target, source, output)]) == 0
    return records(output)


# --- batch ------------------------------------------------------------------------------------------------------


def test_a_worker_that_is_killed_half_way_changes_no_record_of_2000_rows_with_50_bad_ones(
    cluster, target, source, alone, tmp_path
):
    output = tmp_path / "out"
    run = job("batch", *batch_words(target, source, output, "--ray", cluster, "--workers", 2))
    wait_for(lambda: len([*output.glob("*.jsonl")]) > 2, run)
    both = workers_at_work("MapWorker(MapBatches(Answers))")
    assert len(both) == 2
    os.kill(both[0], signal.SIGKILL)
    out, _ = said(run)
    assert f"{ROWS} of {ROWS} requests answered, {ROWS} by this run, {BAD} of these errors" in out
    assert records(output) == alone and len(alone) == ROWS
    assert sum(record["error"] is not None for record in alone.values()) == BAD


def test_a_job_that_is_killed_and_started_again_computes_what_is_missing(cluster, target, source, alone, tmp_path):
    output = tmp_path / "out"
    words = batch_words(target, source, output, "--ray", cluster, "--workers", 2)
    run = job("batch", *words)
    wait_for(lambda: len([*(tmp_path / "out.done").glob("*[!g].parquet")]) > 2, run)
    run.kill()
    run.communicate()
    wait_until_gone("MapWorker(MapBatches(Answers))")  # its workers end with the job, and those who write
    wait_until_gone("Write")
    done = {
        path: path.read_bytes()
        for path in output.glob("*.jsonl")
        if (tmp_path / "out.done" / f"{path.stem}.parquet").exists()
    }
    num_done = sum(content.count(b"\n") for content in done.values())
    assert 0 < num_done < ROWS
    out, _ = said(job("batch", *words))
    assert f"{ROWS} of {ROWS} requests answered, {ROWS - num_done} by this run" in out
    assert records(output) == alone
    assert all(path.read_bytes() == content for path, content in done.items())


def wait_until_gone(name):
    until = time.monotonic() + SECONDS
    while workers_at_work(name):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_folders_of_both_kinds_duplicates_and_an_input_that_grows(cluster, target, tmp_path):
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    rows = [{"prompt": f"Why {i}?", "seed": i, "max_tokens": 4, "key": f"k{i}"} for i in range(12)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    pq.write_table(pa.Table.from_pylist(rows[5:8]), folder / "b.parquet")
    words = batch_words(target, folder, output, "--ray", cluster, "--workers", 1, "--id-column", "key")
    out, _ = said(job("batch", *words))
    assert "8 of 8 requests answered, 8 by this run, 0 of these errors" in out
    first = records(output)
    # Ids are the rows' own, whatever file and line they come to stand in.
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[8:]))
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    out, _ = said(job("batch", *words))
    assert "12 of 12 requests answered, 4 by this run" in out
    made = [json.loads(line) for path in output.glob("*.jsonl") for line in path.read_text().splitlines()]
    assert sorted(record["id"] for record in made) == sorted(row["key"] for row in rows)
    engine_free = {record["id"]: record["tokens"] for record in made}
    assert {record["id"]: record["tokens"] for record in first.values()}.items() <= engine_free.items()

    # A file of records that is gone is missed, and so is a second row with an id that is taken.
    next(iter(output.glob("*.jsonl"))).rename(tmp_path / "elsewhere.jsonl")
    _, err = said(job("batch", *words), 2)
    assert err.count("\n") == 1 + err.count("requests of 3 files") and "files of records are gone" in err
    (folder / "d.jsonl").write_text(json.dumps(rows[2]) + "\n")
    _, err = said(job("batch", *words), 2)
    assert err == (
        f"error: {folder}: the key of d.jsonl, line 1 is that of c.jsonl, line 3: make them unique, "
        "or leave out --id-column\n"
    )


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere:6379", "nowhere"])
def test_an_address_that_does_not_answer_is_one_line(address, target, source, tmp_path, capsys):
    words = batch_words(target, source, tmp_path / "out", "--ray", address)
    assert batch.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and address in line and not (tmp_path / "out").exists()


def test_folders_without_requests_or_rows_are_one_line(cluster, target, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    words = batch_words(target, tmp_path / "in", tmp_path / "out", "--ray", cluster)
    assert batch.main([str(word) for word in words]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/in holds no file of requests: give .jsonl or .parquet files\n"
    (tmp_path / "in" / "a.jsonl").write_text("\n")
    _, err = said(job("batch", *words), 2)
    assert err == f"error: {tmp_path}/in holds no row: give requests, a line or row each\n"
    assert not (tmp_path / "out").exists()


def test_what_the_engine_of_a_worker_refuses_is_one_line(cluster, target, source, tmp_path):
    words = batch_words(target, source, tmp_path / "out", "--ray", cluster, "--workers", 1)
    _, err = said(job("batch", *words, "--slots", 600_000, "--max-len", 1024), 2)
    assert err.splitlines()[-1].startswith("error: memory needed is ")


# --- prepare-data -----------------------------------------------------------------------------------------------


def test_prepared_data_is_that_of_one_process_though_a_worker_is_killed(cluster, target, tmp_path):
    questions = tmp_path / "questions.jsonl"
    turns = [["Why " + "so " * (i % 9) + "long?", "And?"][: 1 + i % 2] for i in range(300)]
    questions.write_text("".join(json.dumps({"question_id": i, "turns": its}) + "\n" for i, its in enumerate(turns)))
    words = ["--target", target, "--prompts", questions, "--max-length", 128, "--max-new", 24, "--keep-truncated"]
    words += ["--slots", 4, "--tree", "plain"]
    alone, output = tmp_path / "alone.jsonl", tmp_path / "out.jsonl"
    assert prepare_data.main([str(word) for word in [*words, "--output", alone]]) == 0
    run = job("prepare-data", *words, "--output", output, "--ray", cluster, "--workers", 2)
    wait_for(lambda: output.exists() and output.stat().st_size, run)
    os.kill(workers_at_work("_Worker")[0], signal.SIGKILL)
    said(run)
    assert output.read_bytes() == alone.read_bytes()


# --- parts ------------------------------------------------------------------------------------------------------


def test_a_dataset_of_ones_own_gets_a_record_for_each_row(cluster, target):
    rows = [{"request": json.dumps({"prompt": f"Why {i}?", "seed": i}), "line": i, "mine": i * i} for i in range(1, 9)]
    rows[2]["request"], rows[4]["request"] = "not json", None
    arguments = {
        "target": str(target),
        "tree": None,
        "slots": 2,
        "max_len": 64,
        "params": SamplingParams(max_new_tokens=3),
    }
    how = workers(1, 2, CPU=1)
    made = ray.data.from_items(rows).map_batches(Answers, fn_constructor_kwargs=arguments, **how).take_all()
    assert sorted(row["mine"] for row in made) == [i * i for i in range(1, 9)]
    for row in made:
        record = json.loads(row["record"])
        assert record["line"] == row["line"] and row["is_error"] == (row["line"] in (3, 5))
        assert (record["error"] or {}).get("code") == ("invalid_line" if row["is_error"] else None)
        assert "request" not in row and len(record.get("tokens", "abc")) <= 3


def test_parquet_rows_are_lines_without_what_a_row_lacks(tmp_path):
    rows = [
        {"prompt": "Why?", "seed": 3},
        {"messages": [{"role": "user", "content": "Hi", "name": None}], "seed": None},
    ]
    pq.write_table(
        pa.Table.from_pylist(
            rows,
            pa.schema(
                [
                    ("prompt", pa.string()),
                    ("seed", pa.int64()),
                    (
                        "messages",
                        pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("name", pa.string())])),
                    ),
                ]
            ),
        ),
        tmp_path / "a.parquet",
    )
    read = [(number, json.loads(raw)) for number, raw in read_rows(str(tmp_path / "a.parquet"))]
    assert read == [(1, rows[0]), (2, {"messages": rows[1]["messages"]})]


def test_each_row_has_an_id_and_the_owner_of_its_custom_id(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join('{"id": 5}' for _ in range(2)))
    files = request_files(str(tmp_path))
    tasks = RequestFiles(files, None, {(files[1].path, 3): "line 1"}).get_read_tasks(1)
    table = pa.concat_tables([block for task in tasks for block in task()])
    assert table["row"].to_pylist() == ["a.jsonl:1", "a.jsonl:3", "b.jsonl:1", "b.jsonl:3"]
    assert table["owner"].to_pylist() == ["", "", "", "line 1"]


def test_with_a_column_of_ids_a_row_without_one_is_known_by_what_it_says(tmp_path):
    """By its place, another request there would count as answered once the file has changed."""

    def rows(*lines):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (task,) = RequestFiles(request_files(str(tmp_path / "a.jsonl")), "key").get_read_tasks(1)
        return pa.concat_tables([*task()])

    keyed, other, another = {"key": "k", "id": 7, "prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}
    first, second = rows(keyed, other, other), rows(another, other, keyed, other)
    known = second["row"].to_pylist()
    assert first["row"].to_pylist() == ["k", known[1], known[3]] and known[2] == "k" and len(set(known)) == 4
    assert json.loads(first["request"][0].as_py()) == {"id": "k", "prompt": "a"}


def test_workers_that_no_machine_has_room_for_are_refused(cluster):
    assert workers_for(None, None, None) == (1, "CPU", 1.0)  # one a machine
    assert workers_for(None, "CPU=2", None).number == 1 and workers_for(2, "CPU=2", None).number == 2
    assert workers_for(40, "CPU=0.1", None).number == 40
    with pytest.raises(UserError, match="3 workers of 2 CPU each do not fit: the cluster has room for 2: lower"):
        workers_for(3, "CPU=2", None)
    for words in (None, "CPU=5", None), (None, "TPU=4", None):
        with pytest.raises(UserError, match="but no machine of the cluster has more than [40]: give --worker"):
            workers_for(*words)


def test_the_cluster_for_google_cloud_follows_rays_own_schema():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((ROOT / "examples" / "ray_tpu_cluster.yaml").read_text())
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):  # it would tell
        jsonschema.validate(cluster | {"worker_setup": []}, schema)
    tpu = cluster["available_node_types"]["tpu"]
    assert tpu["resources"] == {"TPU": int(tpu["node_config"]["acceleratorType"].partition("-")[2])}
    assert cluster["head_node_type"] in cluster["available_node_types"]
