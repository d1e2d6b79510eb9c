from __future__ import annotations

import io
import json
import sys

import pytest

from fasteagle_jax.commands import generate
from fasteagle_jax.commands.chat import main
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.targets.tokenizer import load_tokenizer
from tests.tiny_folder import make_target


@pytest.fixture
def chat(talkative, capsys, monkeypatch):
    """Runs chat on these lines, or this stdin, with these options; returns its answers, and what it says on stderr."""

    def run(lines, *options):
        capsys.readouterr()
        stdin = io.StringIO("".join(f"{line}\n" for line in lines)) if isinstance(lines, list) else lines
        monkeypatch.setattr(sys, "stdin", stdin)
        argv = ["--target", talkative[0], "--max-new", 12, "--temperature", 1, *options]
        assert main([str(word) for word in argv]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def asked(monkeypatch):
    """The prompts that the engine is given, decoded."""
    prompts = []
    stream = Engine.stream_pieces

    def noting(engine, prompt, sampling=None):
        prompts.append(engine.tokenizer.decode(prompt))
        return stream(engine, prompt, sampling)

    monkeypatch.setattr(Engine, "stream_pieces", noting)
    return prompts


def test_a_chat_says_what_generate_answers_to_the_same_turns(chat, talkative, tmp_path):
    turns = ["Hi?", "And?", "Go on."]
    source, output = tmp_path / "talk.jsonl", tmp_path / "answers.jsonl"
    source.write_text(json.dumps({"turns": turns}))
    argv = ["--target", talkative[0], "--max-new", 12, "--temperature", 1, "--input", source, "--output", output]
    assert generate.main([str(word) for word in argv]) == 0
    messages = json.loads(output.read_text())["messages"]
    expected = "".join(message["content"] + "\n" for message in messages if message["role"] == "assistant")
    answers, said = chat(turns)
    assert answers == expected
    assert said.count("the answer was cut at --max-new 12 tokens") == 3
    assert said.splitlines()[-1].startswith("36 new tokens in ")
    assert chat(turns, "--drafter", talkative[1], "--tree", "best_first:4")[0] == expected


def test_the_template_is_given_variables_and_tools(chat, talkative, asked, tmp_path):
    template = "{{ mood }}{% for t in tools %}{{ t.name }}{% endfor %}{{ messages[-1].content }}"
    target = make_target(tmp_path / "target", chat_template=template, stop_rate=-4)
    (tmp_path / "tools.json").write_text('[{"name": "f"}]')
    chat(["Hi"], "--target", target, "--chat-template-kwargs", '{"mood": "Calm "}', "--tools", tmp_path / "tools.json")
    assert asked == ["Calm fHi"]


def test_reset_forgets_all_but_the_system_message_and_exit_ends(chat, asked):
    answers, said = chat(["Hi?", "", "  And?  ", "/reset", "Hi?", "/exit", "More?"], "--system", "Be rude.")
    assert len(asked) == 3
    system = "<|im_start|>system\nBe rude.<|im_end|>\n<|im_start|>user\nHi?"
    assert asked[0] == asked[2] and asked[0].startswith(system)
    assert asked[1].startswith(asked[0]) and "user\nAnd?<|im_end|>" in asked[1]
    assert "a new conversation" in said


def test_an_unknown_command_is_no_message(chat, asked):
    _, said = chat(["/help", "/etc is what?"])
    assert "no command /help: give /reset or /exit" in said
    assert len(asked) == 1 and "/etc is what?" in asked[0]


def test_a_conversation_that_is_full_says_what_to_do_and_goes_on(chat, asked):
    _, said = chat(["Hi?", "a" * 40, "/reset", "Hi?"], "--max-len", 100)
    assert len(asked) == 2
    assert said.count("the conversation has reached --max-len 100: /reset begins a new one, or") == 1
    _, said = chat(["Hi?"], "--max-len", 70, "--max-new", 70)
    assert "the conversation has reached --max-len 70: /reset begins a new one\n" in said


def test_a_line_that_the_target_has_no_token_for_is_told_and_the_conversation_goes_on(chat, asked, monkeypatch):
    def with_pad(path):
        tokenizer = load_tokenizer(path)
        tokenizer.add_tokens(["[PAD]"])
        return tokenizer

    monkeypatch.setattr("fasteagle_jax.engine.engine.load_tokenizer", with_pad)
    _, said = chat(["Hi?", "a [PAD] b", "half \udc3d", "And?"])
    assert len(asked) == 2 and "Hi?" in asked[1] and "And?" in asked[1]
    assert said.count("the conversation holds token 259, but the target has 259") == 1
    assert said.count("the conversation: message 2: its content is no text") == 1


def test_an_interrupted_answer_stays_said_as_far_as_it_came(chat, asked, monkeypatch):
    stream = Engine.stream_pieces
    interrupted_after = iter([6, 0])

    def interrupted(engine, prompt, sampling=None):
        pieces = stream(engine, prompt, sampling)
        left = next(interrupted_after, None)
        if left is None:
            return pieces

        def some():
            for _ in range(left):
                yield next(pieces)
            raise KeyboardInterrupt

        return some()

    monkeypatch.setattr(Engine, "stream_pieces", interrupted)
    answers, said = chat(["Hi?", "Not asked?", "And?"])
    beginning, nothing, whole, end = answers.split("\n")
    assert beginning and nothing == end == "" and whole
    assert f"assistant\n{beginning}<|im_end|>\n<|im_start|>user\nAnd?" in asked[2]
    assert "Not asked?" not in asked[2]
    assert "18 new tokens" in said


def test_drafts_are_shown_with_statistics_of_each_answer_and_of_all(chat, talkative):
    options = ["--drafter", talkative[1], "--temperature", 4, "--max-new", 30]
    plain, _ = chat(["Hi?", "And?"], *options)
    shown, said = chat(["Hi?", "And?"], *options, "--show-drafts")
    legend, _, answers = shown.partition("\n\n")
    assert legend.endswith("1¹ 2²")
    assert "¹" in answers
    assert answers.replace("¹", "").replace("²", "") == plain
    assert said.count("30 new tokens in ") == 2 and said.count("60 new tokens in ") == 1
    assert said.count("accepted by depth") == 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_at_a_terminal_it_asks_for_lines(chat, monkeypatch):
    lines = iter(["Hi?", None, "/exit"])
    prompts = []

    def type_in(prompt):
        prompts.append(prompt)
        line = next(lines)
        if line is None:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", type_in)
    answers, said = chat(Terminal())
    assert prompts == ["> "] * 3
    assert answers.count("\n") == 1
    assert "/exit ends the chat, Ctrl-C stops an answer" in said and "12 new tokens" in said


def test_mistakes_are_one_line(complaint, talkative, tmp_path, monkeypatch):
    given = ["--target", talkative[0]]
    assert "name its folder with --drafter" in complaint(main, *given, "--show-drafts")
    assert "temperature is -1.0" in complaint(main, *given, "--temperature", -1)
    assert "tree 'oak' is not known" in complaint(main, *given, "--tree", "oak:3")
    assert "no folder" in complaint(main, *given, "--drafter", tmp_path / "nowhere")
    assert "--system is no text" in complaint(main, *given, "--system", "half \ud83d")
    assert "no chat template" in complaint(main, "--target", make_target(tmp_path / "target", chat_template=None))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8"))
    assert "the input is not utf-8 text" in complaint(main, *given)
