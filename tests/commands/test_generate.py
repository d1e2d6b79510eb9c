from __future__ import annotations

import json

import pytest

from fasteagle_jax.commands.generate import main
from fasteagle_jax.data import read_prompts
from fasteagle_jax.tokenizer import load_tokenizer
from tests.tiny_folder import make_drafter, make_target


@pytest.fixture
def generate(target_folder, capsys):
    """Runs generate with these options; returns what it prints, and what it says on stderr."""

    def run(*options):
        capsys.readouterr()
        argv = ["--target", target_folder, "--max-new", 12, "--temperature", 1, *options]
        assert main([str(word) for word in argv]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_drafter_changes_no_answer(generate, talkative, temperature):
    target, drafter = talkative
    asked = ["--prompt", "Why?", "--prompt", "When?", "--target", target, "--temperature", temperature]
    plain, _ = generate(*asked)
    fast, said = generate(*asked, "--tree", "best_first:6", "--drafter", drafter)
    assert fast == plain
    assert plain.startswith("> Why?\n< ")
    assert "24 new tokens" in said
    assert "for 22 tokens, the 2 made by prefill not counted" in said


def test_streaming_prints_the_same_answer_in_pieces(generate, drafter_folder):
    plain, _ = generate("--prompt", "Why?")
    for options in ((), ("--drafter", drafter_folder, "--tree", "best_first:6")):
        streamed, said = generate("--prompt", "Why?", "--stream", *options)
        assert plain == "> Why?\n< " + streamed
        assert "tokens/s" in said


def test_streaming_prints_whole_characters_only(generate, monkeypatch, capsys):
    """A character of several tokens is printed when its last byte is there; the random answers are full of such."""
    pieces = []
    import builtins

    show = builtins.print

    def note(*words, **options):
        if options.get("flush"):
            pieces.append(words[0])
        show(*words, **options)

    monkeypatch.setattr(builtins, "print", note)
    for seed in range(4):
        pieces.clear()
        streamed, _ = generate("--prompt", "Why?", "--stream", "--seed", seed)
        assert "".join(pieces) + "\n" == streamed
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_batches_change_no_answer_and_conversations_are_written(generate, prompts_file, tmp_path, target_folder):
    records = []
    for size in (1, 5):
        output = tmp_path / f"{size}.jsonl"
        generate("--input", prompts_file, "--limit", 7, "--output", output, "--batch-size", size)
        records.append([json.loads(line) for line in output.read_text().splitlines()])
    assert records[0] == records[1]
    assert [record["id"] for record in records[0]] == [p.id for p in read_prompts(str(prompts_file), 7)]
    conversation = records[0][3]
    assert [m["role"] for m in conversation["messages"]] == ["user", "assistant"] * 3
    assert len(conversation["tokens"]) == len(conversation["stopped"]) == 3
    tokenizer = load_tokenizer(target_folder)
    for record in records[0]:
        for tokens, stopped in zip(record["tokens"], record["stopped"], strict=True):
            assert (tokens[-1] == tokenizer.eos_token_id) == stopped
            assert stopped or len(tokens) == 12
    assert [p.turns for p in read_prompts(str(output))] == [p.turns for p in read_prompts(str(prompts_file), 7)]


def test_plain_text_is_continued_without_the_template(generate):
    out, _ = generate("--prompt", "Once upon", "--no-chat")
    assert out.startswith("Once upon")
    assert "<|im_start|>" not in out


def test_mistakes_are_one_line(complaint, target_folder, drafter_folder, prompts_file, tmp_path):
    given = ["--target", target_folder, "--prompt", "a"]
    there = tmp_path / "there.jsonl"
    there.write_text("keep")
    assert "exists" in complaint(main, *given, "--output", there)
    assert "temperature is -0.5" in complaint(main, *given, "--temperature", "-0.5")
    assert "top_p is 2.0" in complaint(main, *given, "--top-p", 2)
    assert "tree" in complaint(main, *given, "--tree", "oak:3")
    assert "at least 2" in complaint(main, *given, "--tree", "best_first:1")
    assert "no prompt" in complaint(main, "--target", target_folder)
    assert "no folder or file" in complaint(main, "--target", tmp_path / "nowhere", "--prompt", "a")
    assert "no folder" in complaint(main, *given, "--drafter", tmp_path / "nowhere")
    assert "config.json" in complaint(main, *given, "--drafter", tmp_path)
    assert "exceed the target's 1024 positions" in complaint(main, *given, "--prompt", "a" * 1000)
    assert "--stream" in complaint(main, *given, "--prompt", "b", "--stream")
    assert "several turns" in complaint(main, "--target", target_folder, "--input", prompts_file, "--no-chat")
    assert "is empty" in complaint(main, "--target", target_folder, "--prompt", "", "--no-chat")
    assert "'0'" in complaint(main, *given, "--max-new", 0)


def test_a_corrupt_prompt_is_named_by_file_and_line(complaint, target_folder, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 7}\n')
    assert f"{path}:2: " in complaint(main, "--target", target_folder, "--input", path)


def test_a_drafter_of_another_target_is_refused(complaint, target_folder, tmp_path):
    other = make_drafter(tmp_path / "drafter", make_target(tmp_path / "other", seed=1))
    said = complaint(main, "--target", target_folder, "--prompt", "a", "--drafter", other)
    assert "was trained for target" in said
