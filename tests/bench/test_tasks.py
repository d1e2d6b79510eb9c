"""The tasks of a benchmark: files, and data sets of the hub by the names that people know."""

from __future__ import annotations

import json

import datasets
import pytest

from fasteagle_jax.bench.tasks import PRESETS, read_tasks
from fasteagle_jax.errors import UserError

# A row of each data set as the hub has it, and the user's messages in it.
ROWS = {
    "mt_bench": ({"category": "math", "prompt": ["One?", "Two?"], "reference": [], "prompt_id": 7}, ["One?", "Two?"]),
    "humaneval": ({"task_id": "0", "prompt": "\ndef f():\n"}, ["Complete the code I provided.\n\ndef f():\n"]),
    "gsm8k": ({"question": "How many?", "answer": "#### 3"}, ["How many?"]),
    "alpaca": ({"instruction": "Sort.", "input": "b a", "output": "a b"}, ["Sort.\n\nb a"]),
    "cnn_dm": ({"article": "Long.", "highlights": "Short.", "id": "x"}, ["Summarize: Long."]),
    "speed_bench": ({"question_id": "1", "category": "qa", "turns": ["Who?"]}, ["Who?"]),
    "speed_bench_2k": ({"question_id": "1", "category": "low_entropy", "turns": ["Who?"]}, ["Who?"]),
    "mgsm_de": ({"question": "Wie viele?", "answer": 3}, ["Wie viele?"]),
}


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps({"prompt": f"{i}?"}) for i in range(4)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/sums.jsonl").write_text("\n".join(lines))
    return tmp_path / "tasks"


def test_files_of_one_name_are_tasks_of_their_own(folder, tmp_path):
    other = tmp_path / "sums.jsonl"
    other.write_text(json.dumps({"prompt": "5?"}))
    for names in (["sums", str(other)], [str(other), "sums"]):
        found = read_tasks(names, folder, None)
        assert list(found) == names and len(found["sums"]) == 4 and len(found[str(other)]) == 1
    assert list(read_tasks([str(other)], None, None)) == ["sums"]


@pytest.mark.parametrize("name", ROWS)
def test_a_data_set_of_the_hub_is_read_by_its_tasks_name(name, monkeypatch):
    row, turns = ROWS[name]
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return iter([row] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_tasks([name], None, 2)
    assert [prompt.turns for prompt in found[name]] == [turns] * 2
    assert len({prompt.id for prompt in found[name]}) == 2
    assert asked == [(PRESETS[name].args, {**PRESETS[name].options, "streaming": True})]


def test_a_file_of_the_folder_comes_before_the_hub(folder, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)
    (folder / "gsm8k.jsonl").write_text(json.dumps({"turns": ["Here?"]}))
    assert read_tasks(["gsm8k"], folder, None)["gsm8k"][0].turns == ["Here?"]


def test_a_task_that_cannot_be_had_names_the_remedy(folder, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route to the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"'gsm8k' is openai/gsm8k main on the hub.*no route to the hub\): give a file"):
        read_tasks(["gsm8k"], folder, None)
    with pytest.raises(UserError, match="spec_bench' is not on the hub: give the file, data/spec_bench/question.jsonl"):
        read_tasks(["spec_bench"], folder, None)
    with pytest.raises(UserError, match=r"'sum' is not known: .* has sums; the hub mt_bench, humaneval"):
        read_tasks(["sum"], folder, None)


def test_a_data_set_whose_rows_have_changed_is_named(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"problem": "How many?"}]))
    with pytest.raises(UserError, match="gsm8k.*'question'"):
        read_tasks(["gsm8k"], None, 2)
