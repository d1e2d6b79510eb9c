from __future__ import annotations

import builtins
import json
import re

import pytest

from fasteagle_jax.commands.answers import COLOURS, Screen
from fasteagle_jax.commands.generate import main
from fasteagle_jax.data.sources import read_prompts
from fasteagle_jax.decoding.tree import TreeSpec
from fasteagle_jax.engine.requests import Piece
from fasteagle_jax.targets.tokenizer import load_tokenizer
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


@pytest.mark.parametrize(
    ("temperature", "tree"), [(0, "best_first:4"), pytest.param(1, "backbone:2", marks=pytest.mark.slow)]
)
def test_a_drafter_changes_no_answer(generate, talkative, temperature, tree):
    target, drafter = talkative
    asked = ["--prompt", "Why?", "--prompt", "When?", "--target", target, "--temperature", temperature]
    plain, _ = generate(*asked)
    assert plain.startswith("> Why?\n< ")
    fast, said = generate(*asked, "--drafter", drafter, "--tree", tree)
    assert fast == plain
    assert "24 new tokens" in said
    assert "for 22 tokens, the 2 made by prefill not counted" in said
    fast, said = generate(*asked, "--drafter", drafter, "--tree", "plain")
    assert fast == plain
    assert "acceptance" not in said


def test_a_mesh_changes_no_answer(generate, talkative):
    asked = ["--prompt", "Why?", "--prompt", "When?", "--target", talkative[0]]
    assert generate(*asked, "--mesh", "2,2,2")[0] == generate(*asked)[0]


def test_for_several_prompts_the_tree_is_measured_and_for_one_it_is_not(generate, talkative, monkeypatch):
    few = (None, TreeSpec("best_first", nodes=4))  # the engine's test of auto has them all
    monkeypatch.setattr("fasteagle_jax.engine.engine.tree_choices", lambda *sizes: few)
    target, drafter = talkative
    asked = ["--prompt", "Why?", "--target", target, "--max-new", 40]
    models = ["--drafter", drafter]
    plain, _ = generate(*asked, "--prompt", "When?")
    fast, said = generate(*asked, "--prompt", "When?", *models)
    assert fast == plain
    assert "measuring" in said and "80 new tokens" in said
    assert "measuring" not in generate(*asked, *models)[1]


def test_one_prompt_is_streamed_the_same_answer_in_pieces(generate, drafter_folder):
    plain, _ = generate("--prompt", "Why?", "--no-stream")
    for options in ((), ("--stream",), ("--drafter", drafter_folder, "--tree", "best_first:4")):
        streamed, said = generate("--prompt", "Why?", *options)
        assert plain == "> Why?\n< " + streamed
        assert "tokens/s" in said


def test_a_streamed_conversation_reads_like_a_printed_one(generate, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"turns": ["Hi?", "And?"]}))
    streamed, _ = generate("--input", path)
    assert streamed == generate("--input", path, "--no-stream")[0]
    assert streamed.count("\n< ") == 2


def test_streaming_prints_whole_characters_only(generate, monkeypatch):
    """A character of several tokens is printed when its last byte is there; the random answers are full of such."""
    pieces = []
    show = builtins.print

    def note(*words, **options):
        if options.get("flush") and words[0]:
            pieces.append(words[0])
        show(*words, **options)

    monkeypatch.setattr(builtins, "print", note)
    for seed in range(4):
        pieces.clear()
        streamed, _ = generate("--prompt", "Why?", "--seed", seed)
        assert "".join(pieces) == streamed
        *pieces, newline = pieces
        assert newline == "\n"
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_slots_change_no_answer_and_conversations_are_written(generate, prompts_file, tmp_path, target_folder):
    records = []
    for slots in (1, 5):
        output = tmp_path / f"{slots}.jsonl"
        generate("--input", prompts_file, "--limit", 7, "--output", output, "--slots", slots)
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


def test_a_conversation_ends_where_the_next_turn_does_not_fit(generate, tmp_path, caplog):
    questions = [["short", "and " * 100], ["hi", "there", "you"]]
    given = tmp_path / "questions.jsonl"
    given.write_text("".join(json.dumps({"question_id": str(i), "turns": q}) + "\n" for i, q in enumerate(questions)))
    generate("--input", given, "--max-len", 256, "--output", tmp_path / "answers.jsonl")
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [len(record["tokens"]) for record in records] == [1, 3]
    assert [len(record["messages"]) for record in records] == [2, 6]
    assert "ends after 1 of 2 turns" in caplog.text and "256" in caplog.text
    first = given.read_text().splitlines(keepends=True)[0]
    given.write_text(first + json.dumps({"question_id": "2", "turns": ["hi"]}) + "\n")
    printed, _ = generate("--input", given, "--max-len", 256)  # nothing is answered after the first ends
    assert [line for line in printed.splitlines() if line.startswith("> ")] == ["> short", "> hi"]


def test_conversations_are_printed_in_their_order(generate, prompts_file):
    printed, _ = generate("--input", prompts_file, "--limit", 7, "--slots", 5)
    turns = [turn for prompt in read_prompts(str(prompts_file), 7) for turn in prompt.turns]
    assert [line[2:] for line in printed.splitlines() if line[2:] in turns and line.startswith("> ")] == turns


def test_plain_text_is_continued_without_the_template(generate):
    out, _ = generate("--prompt", "Once upon", "--no-chat")
    assert out.startswith("Once upon")
    assert "<|im_start|>" not in out
    assert out == generate("--prompt", "Once upon", "--no-chat", "--no-stream")[0]


def test_an_answer_ends_before_a_stop_text(generate, talkative, tmp_path):
    asked = ["--target", talkative[0], "--prompt", "Why?", "--max-new", 40]
    whole = generate(*asked)[0][:-1]
    stop = whole[10:12]
    assert "\ufffd" not in stop
    output = tmp_path / "a.jsonl"
    generate(*asked, "--stop", "nowhere to be found", "--stop", stop, "--output", output)
    record = json.loads(output.read_text())
    assert record["messages"][1]["content"] == whole[: whole.index(stop)]
    assert record["stopped"] == [True] and len(record["tokens"][0]) < 40


def test_an_answer_ends_at_a_stop_token_which_is_not_printed(generate, talkative, tmp_path):
    given = ["--target", talkative[0], "--prompt", "Hi?", "--max-new", 12, "--temperature", 1]
    output = tmp_path / "all.jsonl"
    generate(*given, "--output", output)
    (tokens,) = json.loads(output.read_text())["tokens"]
    at = next(i for i, token in enumerate(tokens) if i and token not in tokens[:i])
    generate(*given, "--stop-token-ids", 258, tokens[at], "--output", tmp_path / "ended.jsonl")
    ended = json.loads((tmp_path / "ended.jsonl").read_text())
    assert (ended["tokens"], ended["stopped"]) == ([tokens[: at + 1]], [True])
    text = load_tokenizer(talkative[0]).decode(tokens[:at])
    assert ended["messages"][1]["content"] == text


def test_min_p_of_1_leaves_the_most_probable_token_alone(generate):
    asked = ["--prompt", "Why?", "--prompt", "When?"]
    assert generate(*asked, "--min-p", 1)[0] == generate(*asked, "--temperature", 0)[0] != generate(*asked)[0]


@pytest.mark.parametrize("drafted", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "drafted"])
def test_an_answer_keeps_the_rules(generate, talkative, tmp_path, drafted):
    """Also a traced one, which is decoded another way."""
    target, drafter = talkative
    rules = ["--allowed-token-ids", *range(65, 73), "--min-tokens", 12, "--logit-bias", "65=-100", "--bad-words", "cd"]
    rules += ["--repetition-penalty", 1.2, "--presence-penalty", 0.5, "--frequency-penalty", 0.1]
    asked = ["--prompt", "Why?", "--target", target, "--tree", "best_first:4", *rules]
    plain, _ = generate(*asked)
    assert set(plain.strip()) <= set("cdefghi") and "cd" not in plain and len(plain.strip()) == 12
    if drafted:
        assert generate(*asked, "--drafter", drafter)[0] == plain
        assert generate(*asked, "--drafter", drafter, "--trace", tmp_path / "page.html")[0] == plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--logit-bias", "5"], "'5' is not understood: write ID=X, e.g. 5=-100"),
        (["--logit-bias", "5=101"], "logit_bias of token 5 is 101.0: give a number from -100 to 100"),
        (["--logit-bias", "259=1"], "prompt 0: logit_bias is for token 259: give token ids below 259"),
        (["--allowed-token-ids", "x"], "'x' is not a whole number of at least 0"),
        (["--min-tokens", "13", "--max-new", "12"], "min_tokens is 13, but max_new_tokens 12: lower it"),
        (["--bad-words", ""], "bad_words is ['']: give texts that are not empty"),
        (["--presence-penalty", "3"], "presence_penalty is 3.0: it must be -2 to 2"),
    ],
)
def test_rules_that_cannot_be_are_one_line(complaint, target_folder, options, message):
    assert message in complaint(main, "--target", target_folder, "--prompt", "Why?", *options)


def test_an_answer_ends_at_max_len(generate, talkative):
    _, said = generate("--target", talkative[0], "--prompt", "Why?", "--max-len", 70, "--max-new", 70)
    assert int(said.split()[0]) < 70


# --- drafts shown -----------------------------------------------------------------------------------------------


def test_without_colours_accepted_tokens_carry_their_depth(generate, talkative):
    """At a high temperature noise that target and drafter share decides: many guesses are accepted."""
    target, drafter = talkative
    asked = ["--prompt", "Why?", "--target", target, "--drafter", drafter, "--temperature", 4, "--max-new", 40]
    plain, said = generate(*asked)
    for options in (["--stream"], ["--no-stream"]):
        shown, said = generate(*asked, *options, "--show-drafts")
        legend, _, answer = shown.partition("\n\n")
        assert legend == "tokens: the target's own; accepted as the drafter's guess at depth 1¹ 2²"
        if options == ["--no-stream"]:
            answer = answer.removeprefix("> Why?\n< ")
        assert re.sub("[¹²]", "", answer) == plain
        rounds = int(re.search(r"(\d+) rounds", said).group(1))
        marks = answer.count("¹") + answer.count("²")
        assert marks == 39 - rounds > 0
    assert "accepted by depth 0." in said


def test_with_colours_each_depth_has_one_and_no_character_is_added(generate, talkative, monkeypatch):
    target, drafter = talkative
    asked = ["--prompt", "Why?", "--target", target, "--drafter", drafter, "--temperature", 4, "--max-new", 40]
    plain, _ = generate(*asked)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown, _ = generate(*asked, "--show-drafts")
    legend, _, answer = shown.partition("\n\n")
    assert "\x1b[32m1\x1b[0m \x1b[36m2\x1b[0m" in legend
    assert "\x1b[32m" in answer
    assert re.sub("\x1b\\[[0-9]*m", "", answer) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert "1¹ 2²" in generate(*asked, "--show-drafts")[0]


def test_a_mark_stands_behind_the_token_before_its_line_ends(capsys):
    screen = Screen(num_levels=len(COLOURS) + 4)
    capsys.readouterr()
    for piece in (Piece("The", 0), Piece(" sky\n", 2), Piece("", 1), Piece("is", 11), Piece("\n", 0)):
        screen.piece(piece)
    assert capsys.readouterr().out == "The sky²\n¹is¹¹\n"


# --- mistakes ---------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(complaint, target_folder, drafter_folder, prompts_file, tmp_path):
    given = ["--target", target_folder, "--prompt", "a"]
    there = tmp_path / "there.jsonl"
    there.write_text("keep")
    assert "exists" in complaint(main, *given, "--output", there)
    assert "temperature is -0.5" in complaint(main, *given, "--temperature", "-0.5")
    assert "top_p is 2.0" in complaint(main, *given, "--top-p", 2)
    assert "min_p is 2.0" in complaint(main, *given, "--min-p", 2)
    assert "stop is ['']" in complaint(main, *given, "--stop", "")
    assert "tree" in complaint(main, *given, "--tree", "oak:3")
    assert "at least 2" in complaint(main, *given, "--tree", "best_first:1")
    assert "no prompt" in complaint(main, "--target", target_folder)
    assert "no folder or file" in complaint(main, "--target", tmp_path / "nowhere", "--prompt", "a")
    assert "no folder" in complaint(main, *given, "--drafter", tmp_path / "nowhere")
    assert "config.json" in complaint(main, *given, "--drafter", tmp_path)
    said = complaint(main, *given, "--prompt", "a" * 1000)
    assert "prompt-2 has 10" in said and "but a request has 1024, answer included" in said
    assert "max_len is 2000" in complaint(main, *given, "--max-len", 2000)
    assert "--stream" in complaint(main, *given, "--prompt", "b", "--stream")
    assert "--stream" in complaint(main, *given, "--output", tmp_path / "new.jsonl", "--stream")
    assert "several turns" in complaint(main, "--target", target_folder, "--input", prompts_file, "--no-chat")
    assert "is empty" in complaint(main, "--target", target_folder, "--prompt", "", "--no-chat")
    assert "'0'" in complaint(main, *given, "--max-new", 0)
    assert "name its folder with --drafter" in complaint(main, *given, "--show-drafts")
    assert "lookup is 0: give 1 to 8 tokens" in complaint(main, *given, "--lookup", 0)
    shown = [*given, "--drafter", drafter_folder, "--show-drafts", "--output", tmp_path / "new.jsonl"]
    assert "--show-drafts with --output" in complaint(main, *shown)
    assert "mesh '2x4' is not understood: write data,fsdp,tensor" in complaint(main, *given, "--mesh", "2x4")
    assert "does not fit 8 devices" in complaint(main, *given, "--mesh", "1,1,2")
    assert "slots is 1, which data 8 of the mesh does not" in complaint(main, *given, "--mesh", "8,1,1")


def test_texts_of_the_command_line_that_are_none_are_one_line(complaint, target_folder):
    given = ["--target", target_folder, "--prompt", "a"]
    assert "prompt-2: message 0: its content is no text" in complaint(main, *given, "--prompt", "half \ud83d")
    assert "is no text" in complaint(main, *given, "--stop", "half \ud83d")
    assert "stop_token_ids" in complaint(main, *given, "--stop", "a<|im_end|>")
    assert "stop_token_ids is" in complaint(main, *given, "--stop-token-ids", 3, 2**31)
    assert "'-1'" in complaint(main, *given, "--stop-token-ids", -1)


def test_a_corrupt_prompt_is_named_by_file_and_line(complaint, target_folder, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 7}\n')
    assert f"{path}:2: " in complaint(main, "--target", target_folder, "--input", path)


def test_a_drafter_of_another_target_gives_the_same_answers_and_is_refused_with_strict(
    complaint, target_folder, tmp_path, capsys, caplog
):
    other = make_drafter(tmp_path / "drafter", make_target(tmp_path / "other", seed=1))
    words = ["--target", str(target_folder), "--prompt", "a", "--drafter", str(other), "--max-new", "8"]
    assert "was trained for target" in complaint(main, *words, "--strict")
    assert main([*words, "--tree", "plain"]) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--tree", "chain"]) == 0
    assert capsys.readouterr().out == plain and "was trained for target" in caplog.text


@pytest.mark.slow  # traces: tests/bench/test_trace.py
def test_a_traced_answer_is_the_same_and_a_page(generate, talkative, tmp_path):
    target, drafter = talkative
    asked = ["--prompt", "Why?", "--target", target, "--drafter", drafter, "--tree", "best_first:4"]
    plain, _ = generate(*asked)
    traced, said = generate(*asked, "--trace", tmp_path / "page.html")
    assert traced == plain and "12 tokens in" in said
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    generate(*asked, "--output", tmp_path / "answer.jsonl")
    (tokens,) = json.loads((tmp_path / "answer.jsonl").read_text())["tokens"]
    asked += ["--stop-token-ids", tokens[5]]
    assert generate(*asked, "--trace", tmp_path / "ended.html")[0] == generate(*asked)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "When?"], "--trace is of one answer"),
        (["--tree", "auto"], "--trace with --tree auto: name the tree"),
        (["--stop", "x"], "--trace with --stop: leave one of them out"),
    ],
)
def test_what_cannot_be_traced_is_one_line(target_folder, tmp_path, capsys, options, message):
    argv = ["--target", str(target_folder), "--prompt", "Why?", "--trace", str(tmp_path / "page.html"), *options]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
