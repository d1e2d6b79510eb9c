from __future__ import annotations

import json
import lzma
import re
import signal

import numpy as np
import pytest

from fasteagle_jax.commands import interrupts, prepare_data
from fasteagle_jax.commands.prepare_data import answer_seed, main
from fasteagle_jax.data.answering import LOOP_COPIES, LOOP_TOKENS, Rules, Sample, loop_start
from fasteagle_jax.data.conversations import read_conversations
from fasteagle_jax.data.shares import Share
from fasteagle_jax.data.sources import HeldOut
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import SamplingParams
from fasteagle_jax.errors import UserError
from fasteagle_jax.targets.tokenizer import encode_chat, load_tokenizer, user_header_ids
from tests.tiny_folder import CHAT_TEMPLATE, make_target

MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nhm {% endif %}"
)


HI = {"role": "user", "content": "Hi?"}


@pytest.fixture
def prepare(target_folder, prompts_file, tmp_path):
    """Runs prepare-data into a file of this name, with more options; returns the file."""

    def run(name, *options, prompts=prompts_file):
        path = tmp_path / name
        argv = ["--target", target_folder, "--output", path, "--max-length", 192, "--max-new", 24, "--slots", 4]
        if prompts is not None:
            argv += ["--prompts", prompts]
        assert main([str(word) for word in [*argv, *options]]) == 0
        return path

    return run


def counts(path):
    return json.loads(path.with_name(path.name + ".manifest.json").read_text())["counts"]


def test_conversations_are_the_prompts_and_whole_answers(prepare, target_folder, prompts_file):
    path = prepare("a.jsonl")
    conversations = read_conversations(path)
    tokenizer = load_tokenizer(target_folder)
    end = tokenizer.eos_token_id
    records = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    questions = {f"questions/{r['question_id']}": r["turns"] for r in records}
    assert len(conversations) >= 10
    assert [c.id for c in conversations] == [id for id in questions if id in {c.id for c in conversations}]
    for c in conversations:
        start, stop = c.assistant[0]
        assert c.tokens[:start].tolist() == encode_chat(tokenizer, [{"role": "user", "content": questions[c.id][0]}])
        assert stop == len(c.tokens) or len(c.assistant) > 1
        for start, stop in c.assistant:
            assert c.tokens[stop - 1] == end
            assert end not in c.tokens[start : stop - 1]
    assert counts(path)["samples"] == 14
    assert counts(path)["conversations"] + sum(counts(path)["dropped"].values()) == 14


def test_later_turns_follow_the_answers_as_they_were_sampled(prepare, target_folder):
    """Text is not tokenised again: what was sampled stays, and the template's words stand between."""
    c = next(c for c in read_conversations(prepare("a.jsonl")) if c.id == "questions/3")
    assert len(c.assistant) == 3
    tokenizer = load_tokenizer(target_folder)
    between = tokenizer.decode(c.tokens[c.assistant[0][1] : c.assistant[1][0]])
    assert between == "\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"


def slow_loop_start(tokens):
    """The definition itself: the earliest stretch of copies, longest-running first, that is long enough."""
    cuts = []
    for start in range(len(tokens)):
        for period in range(1, (len(tokens) - start) // LOOP_COPIES + 1):
            size = max(LOOP_COPIES * period, LOOP_TOKENS)
            stretch = tokens[start : start + size]
            if len(stretch) == size and all(stretch[i] == stretch[i - period] for i in range(period, size)):
                cuts.append(start + period)
    return min(cuts, default=None)


@pytest.mark.parametrize("seed", range(6))
def test_a_loop_is_cut_where_its_second_copy_begins(seed):
    rng = np.random.default_rng(seed)
    period = int(rng.integers(1, 30))
    before, once = rng.integers(0, 50, 20).tolist(), rng.integers(0, 50, period).tolist()
    looping = before + once * (LOOP_TOKENS // period + LOOP_COPIES) + once[: period // 2]
    assert loop_start(looping) == slow_loop_start(looping) <= len(before) + 2 * period
    once_more = before + once * 2
    assert loop_start(once_more) == slow_loop_start(once_more)
    assert loop_start(before) is None
    assert loop_start([]) is None
    assert loop_start([7] * (LOOP_TOKENS - 1)) is None


def test_a_dialogue_ends_with_the_answer_that_loops(target_folder):
    """The next turn is not asked, since the loop would stand in the context of all later answers."""
    rules = Rules(load_tokenizer(target_folder), [], 259, 512, False, False, HeldOut([]))
    dialogue = rules.start(0, Sample("a", ["Hello?", "And?", "So?"]))
    first = [*range(3, 30), load_tokenizer(target_folder).eos_token_id]
    dialogue = rules.add_answer(dialogue, first, True)
    asked = len(dialogue.tokens)
    (conversation,) = rules.add_answer(dialogue, [*range(3, 23), *[5, 6, 7] * 20], False)
    assert conversation.assistant.tolist()[1] == [asked, asked + 23]
    assert conversation.tokens[asked:].tolist() == [*range(3, 23), 5, 6, 7]
    at_once = rules.add_answer(rules.start(0, Sample("b", ["Hello?"])), [4] * 60, False)
    assert at_once == "looping answers"


def test_a_token_that_the_embedding_lacks_is_named_with_its_sample(target_folder):
    tokenizer = load_tokenizer(target_folder)
    tokenizer.add_tokens(["[PAD]"])  # 259
    rules = Rules(tokenizer, [], 259, 512, False, False, HeldOut([]))
    asked, said = ({"role": role, "content": "a [PAD] b"} for role in ("user", "assistant"))
    for sample in (Sample("a", ["a [PAD]"]), Sample("a", None, [asked, said]), Sample("a", None, [HI, said])):
        with pytest.raises(UserError, match="^sample a holds token 259, but the target has 259: "):
            rules.start(0, sample)
    dialogue = rules.start(0, Sample("a", ["Hi?", "a [PAD]"]))
    with pytest.raises(UserError, match="^turn 1 of the dialogue that begins 'Hi.' holds token 259"):
        rules.add_answer(dialogue, [1, 2, 3, 258], True)


def test_answers_do_not_depend_on_the_batch_they_are_made_in(prepare):
    by_size = [prepare(f"{size}.jsonl", "--slots", size) for size in (1, 4)]
    assert len({path.read_bytes() for path in by_size}) == 1


def test_a_drafter_and_its_tree_change_no_token(prepare, drafter_folder, capsys):
    plain = prepare("plain.jsonl")
    drafted = prepare("drafted.jsonl", "--drafter", drafter_folder, "--tree", "best_first:4")
    assert drafted.read_bytes() == plain.read_bytes()
    assert counts(drafted) == counts(plain)


def test_answers_are_the_engines_own(prepare, target_folder):
    """Nothing but the prompt, the params and the seed of the thing said decides an answer."""
    engine = Engine.load(str(target_folder), slots=4, max_len=192)  # the programs of `prepare`
    for c in list(read_conversations(prepare("a.jsonl", "--temperature", 0.7, "--top-k", 50)))[:4]:
        start, stop = c.assistant[0]
        params = SamplingParams(temperature=0.7, top_k=50, seed=answer_seed(0, c.id, "assistant 0"), max_new_tokens=24)
        (completion,) = engine.generate([c.tokens[:start].tolist()], params)
        assert list(completion.tokens) == c.tokens[start:stop].tolist()


def test_processes_share_the_samples(prepare, monkeypatch, tmp_path):
    whole = prepare("whole.jsonl", "--keep-truncated", "--prompts", "self", "--limit", 20)
    shares = []
    for i in range(3):
        monkeypatch.setattr(prepare_data, "join", lambda args, i=i: Share(i, 3))
        prepare("a.jsonl", "--keep-truncated", "--prompts", "self", "--limit", 20)
        path = tmp_path / f"a-{i:05d}-of-00003.jsonl"
        before = path.read_bytes()
        prepare("a.jsonl", "--keep-truncated", "--prompts", "self", "--limit", 20)
        assert path.read_bytes() == before
        shares.append(path)
    assert [counts(path)["samples"] for path in shares] == [7, 7, 6]
    lines = [path.read_bytes().splitlines() for path in shares]
    assert sorted(line for its in lines for line in its) == sorted(whole.read_bytes().splitlines())
    for i, its in enumerate(lines):
        for source, number in (json.loads(line)["id"].split("/") for line in its):
            assert (2 * int(number) + (source == "self")) % 3 == i
    settings = json.loads(shares[1].with_name(shares[1].name + ".manifest.json").read_text())["settings"]
    assert settings["share"] == {"process": 1, "processes": 3}


@pytest.mark.parametrize("lost", [1, 40, 700])
def test_a_run_resumed_after_a_torn_tail_gives_the_same_file(prepare, lost):
    path = prepare("a.jsonl")
    whole, of_all = path.read_bytes(), counts(path)
    path.write_bytes(whole[:-lost])
    prepare("a.jsonl")
    assert path.read_bytes() == whole
    again = counts(path)
    assert again["samples"] == of_all["samples"]
    assert sum(again["dropped"].values()) == sum(of_all["dropped"].values())


def test_a_run_killed_between_two_writes_gives_the_same_file(prepare, monkeypatch, capsys):
    whole = prepare("whole.jsonl").read_bytes()
    save = prepare_data.Manifest.save
    calls = []

    def save_then_stop(self, written):
        calls.append(written)
        if len(calls) == 3:  # a batch is written, the manifest does not know of it
            raise KeyboardInterrupt
        save(self, written)

    monkeypatch.setattr(prepare_data.Manifest, "save", save_then_stop)
    with pytest.raises(AssertionError):
        prepare("a.jsonl")
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.undo()
    path = prepare("a.jsonl")
    assert path.read_bytes() == whole
    assert counts(path)["conversations"] + sum(counts(path)["dropped"].values()) == counts(path)["samples"] == 14


def test_a_signal_during_a_write_keeps_what_is_answered(prepare, monkeypatch, listening, capsys):
    whole = prepare("whole.jsonl").read_bytes()
    append = prepare_data.ConversationWriter.append
    calls = []

    def append_and_hear(self, conversations):
        append(self, conversations)
        calls.append(len(self))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(prepare_data.ConversationWriter, "append", append_and_hear)
    with pytest.raises(AssertionError):
        prepare("a.jsonl")
    assert "interrupted" in capsys.readouterr().err
    assert [signal.getsignal(each) for each in interrupts.SIGNALS] == listening
    monkeypatch.undo()
    path = prepare("a.jsonl")
    assert f"{calls[-1]} conversations of" in capsys.readouterr().out  # counted, not only written
    assert path.read_bytes() == whole


def test_a_finished_run_has_nothing_left_to_do(prepare, monkeypatch):
    path = prepare("a.jsonl", "--keep-truncated")
    before = path.read_bytes(), counts(path)
    monkeypatch.setattr(Engine, "requests", None)  # nothing is generated
    prepare("a.jsonl", "--keep-truncated")
    assert (path.read_bytes(), counts(path)) == before


def test_a_longer_limit_continues_a_shorter_one(prepare):
    short = prepare("a.jsonl", "--limit", 6, "--prompts", "self").read_bytes()
    longer = prepare("a.jsonl", "--limit", 12, "--prompts", "self").read_bytes()
    assert longer.startswith(short)
    assert longer == prepare("b.jsonl", "--limit", 12, "--prompts", "self").read_bytes()


def test_packed_answers_give_the_same_file_and_the_run_goes_on(
    prepare, complaint, target_folder, prompts_file, tmp_path, capsys
):
    """Without its questions: those of the prompts come from their file again."""
    options = ["--keep-truncated", "--prompts", "self"]
    path = prepare("a.jsonl", *options, "--limit", 16)
    before, manifest = path.read_bytes(), path.with_name("a.jsonl.manifest.json").read_bytes()
    assert any(len(c.assistant) > 1 for c in read_conversations(path)) and b'"self/' in before
    packed = tmp_path / "answers.jsonl.xz"
    prepare("a.jsonl", "--pack", packed)
    assert f"{len(read_conversations(path))} conversations" in capsys.readouterr().out
    with lzma.open(packed, "rt") as file:
        records = [json.loads(line) for line in file][1:]
    conversations = read_conversations(path)
    for record, c in zip(records, conversations, strict=True):
        assert record.keys() == {"id", "answers"} | ({"prompt"} if c.id.startswith("self/") else set())
        assert record["answers"] == [c.tokens[start:end].tolist() for start, end in c.assistant]

    path.unlink(), path.with_name("a.jsonl.manifest.json").unlink()
    again = prepare("a.jsonl", *options, "--limit", 16, "--packed", packed)
    assert again.read_bytes() == before and again.with_name("a.jsonl.manifest.json").read_bytes() == manifest
    longer = prepare("b.jsonl", *options, "--limit", 20, "--packed", packed).read_bytes()
    assert longer.startswith(before) and longer == prepare("c.jsonl", *options, "--limit", 20).read_bytes()

    words = ["--target", target_folder, "--output", tmp_path / "d.jsonl", "--max-length", 192, "--prompts"]
    words += [prompts_file, *options, "--limit", 16, "--packed"]
    assert "made with max_new 24, not 30: give the options" in complaint(main, *words, packed, "--max-new", 30)
    torn = tmp_path / "torn.xz"
    torn.write_bytes(packed.read_bytes()[:-40])
    assert "torn.xz is damaged" in complaint(main, *words, torn, "--max-new", 24)
    assert "cannot read" in complaint(main, *words, tmp_path / "nowhere.xz", "--max-new", 24)
    assert "has no d.jsonl.manifest.json" in complaint(main, *words, packed, "--pack", tmp_path / "x.xz")


def test_answers_are_packed_while_the_run_goes_on(prepare, tmp_path):
    """Lines are written before they are counted: those that are not counted yet are left for the next time."""
    options = ["--keep-truncated", "--prompts", "self"]
    path = prepare("a.jsonl", *options, "--limit", 8)
    manifest = path.with_name("a.jsonl.manifest.json")
    before, counted = path.read_bytes(), manifest.read_bytes()
    prepare("a.jsonl", *options, "--limit", 16)
    manifest.write_bytes(counted)
    prepare("a.jsonl", "--pack", tmp_path / "answers.xz")
    assert prepare("b.jsonl", *options, "--limit", 8, "--packed", tmp_path / "answers.xz").read_bytes() == before


def test_other_settings_are_refused(prepare, complaint, target_folder, prompts_file, tmp_path):
    path = prepare("a.jsonl", "--limit", 4)
    options = ["--target", target_folder, "--output", path, "--max-length", 192, "--prompts", prompts_file]
    said = complaint(main, *options, "--limit", 4, "--max-new", 30, "--seed", 5)
    assert "max_new 24, not 30" in said and "seed 0, not 5" in said
    assert "more than are asked for" in complaint(main, *options, "--limit", 1, "--max-new", 24)
    prompts_file.write_text(prompts_file.read_text().replace("Why", "How"))
    assert "sources" in complaint(main, *options, "--limit", 4, "--max-new", 24)
    path.with_name("a.jsonl.manifest.json").unlink()
    assert "exists without a.jsonl.manifest.json" in complaint(main, *options)


def test_self_made_questions_open_with_the_templates_header(prepare, target_folder):
    path = prepare("a.jsonl", "--prompts", "self", "--limit", 16, prompts=None)
    header = user_header_ids(load_tokenizer(target_folder))
    conversations = read_conversations(path)
    assert conversations
    for c in conversations:
        assert c.tokens[: len(header)].tolist() == header
        assert len(c.assistant) == 1
    assert set(counts(path)["dropped"]) <= {"poor self-made questions", "truncated answers", "prompts too long"}


def test_truncated_answers_are_dropped_unless_kept(prepare):
    dropped = prepare("dropped.jsonl", "--max-new", 3)
    kept = prepare("kept.jsonl", "--max-new", 3, "--keep-truncated")
    assert counts(dropped)["dropped"]["truncated answers"] > 0
    assert counts(kept)["dropped"] == {}
    assert len(read_conversations(kept)) == 14


def test_held_out_questions_are_left_out(prepare, prompts_file, tmp_path, capsys):
    records = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    (tmp_path / "held.jsonl").write_text(
        json.dumps({"turns": ["Something else", records[3]["turns"][0].upper()]}) + "\n"
    )
    ids = {c.id for c in read_conversations(prepare("a.jsonl", "--held-out", tmp_path / "held.jsonl"))}
    assert "left out 1 of 14 samples" in capsys.readouterr().err
    every = {c.id for c in read_conversations(prepare("b.jsonl"))}
    assert ids == every - {f"questions/{records[3]['question_id']}"} != every


def test_self_made_questions_are_not_those_held_out(prepare, target_folder, tmp_path):
    made = read_conversations(prepare("a.jsonl", "--prompts", "self", "--limit", 16, prompts=None))
    header = user_header_ids(tokenizer := load_tokenizer(target_folder))
    asked = [tokenizer.decode(c.tokens[len(header) : c.assistant[0][0]]).split("<|im_end|>")[0] for c in made]
    known = next(text for text in asked if re.search(r"\w", text))
    (tmp_path / "held.jsonl").write_text(json.dumps({"turns": [known]}) + "\n")
    options = ("--prompts", "self", "--limit", 16, "--held-out", tmp_path / "held.jsonl")
    path = prepare("b.jsonl", *options, prompts=None)
    assert counts(path)["dropped"]["held-out questions"] == 1 and len(read_conversations(path)) == len(made) - 1


def test_long_prompts_are_dropped_and_counted(prepare, tmp_path):
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 60}) + "\n" + json.dumps({"prompt": "Hi"}) + "\n")
    path = prepare("a.jsonl", "--keep-truncated", prompts=long)
    assert counts(path)["dropped"] == {"prompts too long": 1}
    assert [c.id for c in read_conversations(path)] == ["long/1"]


def test_dialogues_are_taken_as_they_are(prepare, target_folder, tmp_path):
    def said(*words):
        return json.dumps({"conversations": [{"from": who, "value": text} for who, text in words]}) + "\n"

    path = tmp_path / "ready.jsonl"
    path.write_text(
        said(("human", "Hi"), ("gpt", "Hello."), ("human", "Bye"), ("gpt", "Bye."))
        + said(("gpt", "cut beginning"), ("human", "Hi"), ("gpt", "Hello."))
        + said(("human", "Hi"), ("tool", "7"), ("gpt", "Hello."))
        + said(("gpt", "only an answer"))
    )
    output = prepare("a.jsonl", "--dialogues", path, prompts=None)
    conversations = read_conversations(output)
    tokenizer = load_tokenizer(target_folder)
    assert [c.id for c in conversations] == ["ready.jsonl/dialogue-0", "ready.jsonl/dialogue-1"]
    answers = [tokenizer.decode(conversations[0].tokens[start:end]) for start, end in conversations[0].assistant]
    assert answers == ["Hello.<|im_end|>", "Bye.<|im_end|>"]
    assert "cut beginning" not in tokenizer.decode(conversations[1].tokens)
    assert counts(output)["dropped"] == {
        "dialogues that the chat template refuses": 1,
        "dialogues without an answer": 1,
    }


@pytest.fixture
def long_dialogues(tmp_path):
    """A file of dialogues of which every other one is too long for a conversation of 192 bytes."""
    path = tmp_path / "ready.jsonl"
    records = []
    for i in range(12):
        turns = [
            ("Hi", f"Hello {i}. " * (1 + 30 * (i == 4))),
            ("And " + "so on, " * 40 * (i == 6), "Bye. " * 20),
            ("?", "!"),
        ]
        turns = turns if i % 2 == 0 else turns[:1]
        messages = [m for asked, said in turns for m in (("user", asked), ("assistant", said))]
        records.append({"messages": [{"role": role, "content": text} for role, text in messages]})
    records[7] = {
        "messages": [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "refused"}, *records[7]["messages"]]
    }
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_long_dialogue_is_cut_into_windows_that_begin_with_questions(prepare, long_dialogues, target_folder, capsys):
    output = prepare("a.jsonl", "--dialogues", long_dialogues, prompts=None)
    tokenizer = load_tokenizer(target_folder)
    records = [json.loads(line)["messages"] for line in long_dialogues.read_text().splitlines()]
    by_dialogue = {}
    for c in read_conversations(output):
        by_dialogue.setdefault(int(re.search(r"dialogue-(\d+)", c.id)[1]), []).append(c)
    assert list(by_dialogue) == [i for i in range(12) if i != 7]
    assert counts(output)["dropped"] == {"dialogues that the chat template refuses": 1}
    begin = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    for i, windows in by_dialogue.items():
        name = f"ready.jsonl/dialogue-{i}"
        assert [c.id for c in windows] == [name, *(f"{name}#w{n}" for n in range(2, len(windows) + 1))]
        answers = "".join(tokenizer.decode(c.tokens[a:b]) for c in windows for a, b in c.assistant)
        assert answers == "".join(m["content"] + "<|im_end|>" for m in records[i] if m["role"] == "assistant")
        texts = [tokenizer.decode(c.tokens) for c in windows]
        assert all(len(c.tokens) <= 192 and len(c.assistant) for c in windows)
        inside = {4: 1, 6: 1}.get(i, 0)  # of a long answer, and of a long question
        assert sum(not text.startswith(begin) for text in texts) >= inside
        if not inside:
            assert len(windows) == 1 + (i % 2 == 0) and all(text.startswith(begin) for text in texts)
    num = sum(map(len, by_dialogue.values())) - 5
    assert f"a.jsonl: 6 dialogues are cut into {num} windows of at most 192 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("mixed", [False, True])
def test_a_killed_run_gives_the_same_windows(prepare, long_dialogues, prompts_file, target_folder, monkeypatch, mixed):
    """Killed between any two lines or in one, before and after the manifest knows of them."""
    options, num_samples = ["--dialogues", long_dialogues, "--limit", 20, "--keep-truncated"], 20 if mixed else 12
    prompts = prompts_file if mixed else None
    if mixed:
        engine = Engine.load(str(target_folder), slots=4, max_len=192)
        monkeypatch.setattr(Engine, "load", lambda *args, **options: engine)  # compiled once
    whole = prepare("whole.jsonl", *options, prompts=prompts)
    lines = whole.read_bytes().splitlines(keepends=True)
    manifest = whole.with_name("whole.jsonl.manifest.json").read_bytes()
    assert len([line for line in lines if b"#w" in line]) == (7 if mixed else 8)
    path = whole.with_name("a.jsonl")
    for num in (2, 9, 14) if mixed else range(len(lines)):
        torn = b"".join(lines[:num]) + lines[num][: len(lines[num]) * (num % 3) // 3]
        # None of the lines are counted, or more lines than there are.
        for tried, written in ((0, 0), (num_samples, len(lines))):
            path.write_bytes(torn)
            saved = json.loads(manifest)
            saved["counts"] |= {"samples": tried, "conversations": written, "dropped": {}}
            path.with_name("a.jsonl.manifest.json").write_text(json.dumps(saved))
            prepare("a.jsonl", *options, prompts=prompts)
            assert path.read_bytes() == whole.read_bytes()
            assert counts(path)["samples"] == num_samples and counts(path)["conversations"] == len(lines)
            assert sum(counts(path)["dropped"].values()) == 1


def test_files_in_which_long_dialogues_were_dropped_are_not_continued(
    prepare, complaint, long_dialogues, target_folder, prompts_file
):
    path = prepare("a.jsonl", "--dialogues", long_dialogues, prompts=None)
    manifest = path.with_name("a.jsonl.manifest.json")
    saved = json.loads(manifest.read_text())
    assert saved["settings"].pop("long_dialogues") == "windows"
    manifest.write_text(json.dumps(saved))
    options = ["--target", target_folder, "--max-length", 192, "--max-new", 24]
    said = complaint(main, *options, "--output", path, "--dialogues", long_dialogues)
    assert "a.jsonl.manifest.json is of a version that dropped the dialogues above --max-length" in said
    assert said.endswith("name another --output")
    own = prepare("b.jsonl", "--limit", 3)
    assert "long_dialogues" not in own.with_name("b.jsonl.manifest.json").read_text()  # these go on


def test_a_prompt_with_the_id_of_a_window_is_refused(complaint, long_dialogues, target_folder, tmp_path):
    (tmp_path / "sub").mkdir()
    prompts = tmp_path / "sub" / "ready.jsonl.jsonl"
    prompts.write_text('{"id": "dialogue-4#w2", "prompt": "Hi"}\n')
    options = ["--target", target_folder, "--output", tmp_path / "a.jsonl", "--dialogues", long_dialogues]
    assert "has the id of a window of dialogue 'ready.jsonl/dialogue-4'" in complaint(
        main, *options, "--prompts", prompts
    )


def test_dialogues_need_no_weights(prepare, target_folder, tmp_path, monkeypatch):
    path = tmp_path / "ready.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Hi {i}", "response": "Hello."}) + "\n" for i in range(600)))
    monkeypatch.setattr(Engine, "load", None)
    output = prepare("a.jsonl", "--dialogues", path, prompts=None)
    assert [c.id for c in read_conversations(output)] == [f"ready.jsonl/dialogue-{i}" for i in range(600)]


def test_where_the_template_refuses_later_turns_the_first_ones_are_answered(prepare, tmp_path, capsys):
    refusing = "{% if messages | length > 2 %}{{ raise_exception('one turn') }}{% endif %}" + CHAT_TEMPLATE
    target = make_target(tmp_path / "refusing", chat_template=refusing)
    conversations = read_conversations(prepare("a.jsonl", "--target", target, "--keep-truncated"))
    assert [len(c.assistant) for c in conversations] == [1] * 14
    said = capsys.readouterr().err
    assert "of several turns, the first ones alone are answered: the chat template refuses" in said


@pytest.mark.parametrize("marked", [False, True])
def test_where_the_template_rewrites_what_was_said_each_answer_is_a_line_behind_its_own_prompt(
    prepare, tmp_path, marked
):
    """As with templates that leave the thoughts of earlier turns out: only the first turns were answered."""
    thinking = CHAT_TEMPLATE.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nhm {% endif %}")
    target = make_target(tmp_path / "thinking", chat_template=MARKED if marked else thinking, stop_rate=6.5)
    path = prepare("a.jsonl", "--target", target, "--max-new", 12)
    tokenizer, rows = load_tokenizer(target), {c.id: c for c in read_conversations(path)}
    lines = [rows[id] for id in ("questions/3", "questions/3#w2", "questions/3#w3")]
    messages = []
    for turn, c in zip(("Hi?", "And?", "Go on."), lines, strict=True):
        messages.append({"role": "user", "content": turn})
        ((start, end),) = c.assistant.tolist()
        assert c.tokens[:start].tolist() == encode_chat(tokenizer, messages) and end == len(c.tokens)
        messages.append({"role": "assistant", "content": tokenizer.decode(c.tokens[start : end - 1])})
    # Killed after any of these lines, it is the same file.
    whole = path.read_bytes()
    for id in ("questions/2", *(c.id for c in lines)):
        cut = whole.index(b"\n", whole.index(f'"{id}"'.encode())) + 1
        path.write_bytes(whole[:cut])
        saved = json.loads((manifest := path.with_name("a.jsonl.manifest.json")).read_text())
        manifest.write_text(json.dumps(saved | {"counts": {"samples": 0, "conversations": 0, "dropped": {}}}))
        assert prepare("a.jsonl", "--target", target, "--max-new", 12).read_bytes() == whole
    with pytest.raises(AssertionError):
        prepare("b.jsonl", "--pack", tmp_path / "packed.xz", "--output", path)


def test_marks_tell_later_turns(prepare, tmp_path):
    """A template that marks answers is used for later turns: they follow in the same line, as sampled."""
    target = make_target(tmp_path / "marked", chat_template=MARKED.replace("hm ", ""), stop_rate=6.5)
    c = next(c for c in read_conversations(prepare("a.jsonl", "--target", target)) if c.id == "questions/3")
    assert len(c.assistant) == 3
    between = load_tokenizer(target).decode(c.tokens[c.assistant[0][1] : c.assistant[1][0]])
    assert between == "<|im_start|>user\nAnd?<|im_end|><|im_start|>assistant\n"


def test_dialogues_need_a_template_that_tells_answers(complaint, prepare, tmp_path):
    thinking = CHAT_TEMPLATE.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nhm {% endif %}")
    path = tmp_path / "ready.jsonl"
    path.write_text('{"prompt": "Hi", "response": "Hello."}\n')
    targets = make_target(tmp_path / "thinking", chat_template=thinking), tmp_path / "marked"
    make_target(targets[1], chat_template=MARKED)
    said = complaint(main, "--target", targets[0], "--dialogues", path, "--output", tmp_path / "a.jsonl")
    assert "chat template without stable prefixes" in said and "marks answers by {% generation %}" in said
    (c,) = read_conversations(prepare("a.jsonl", "--target", targets[1], "--dialogues", path, prompts=None))
    assert [load_tokenizer(targets[1]).decode(c.tokens[a:b]) for a, b in c.assistant] == ["Hello.<|im_end|>"]


def test_all_samples_dropped_is_one_line_with_the_remedy(prepare, capsys):
    with pytest.raises(AssertionError):
        prepare("a.jsonl", "--max-length", 40)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a.jsonl is empty: all 14 samples were dropped (14 prompts too long): raise --max-length" in last


def test_a_source_without_any_sample_is_one_line(complaint, target_folder, tmp_path):
    """It was an empty file and exit 0."""
    path = tmp_path / "unanswered.jsonl"
    path.write_text(json.dumps({"messages": [HI]}) + "\n")
    given = ["--target", target_folder, "--output", tmp_path / "a.jsonl"]
    assert "no sample in unanswered.jsonl: give questions" in complaint(main, *given, "--dialogues", path)
    path.write_text("")
    assert "no sample in unanswered.jsonl" in complaint(main, *given, "--prompts", path)


def test_a_file_goes_on_with_the_date_of_its_first_run(complaint, prepare, target_folder, tmp_path, monkeypatch):
    """A template that writes the date made two kinds of answers in one file, resumed on another day."""
    dated = CHAT_TEMPLATE.replace("Be brief.", "Today is {{ strftime_now('%d %b %Y') }}.")
    target = make_target(tmp_path / "dated", chat_template=dated)

    def at(day):
        monkeypatch.setattr("fasteagle_jax.data.manifest.today", lambda: day)

    options = ("--target", target, "--max-new", 12)
    at("2024-02-03")
    whole = prepare("whole.jsonl", *options).read_bytes()
    assert "Today is 03 Feb 2024." in load_tokenizer(target).decode(json.loads(whole.splitlines()[0])["tokens"])
    prepare("a.jsonl", *options, "--limit", 4)
    at("2024-02-04")
    path = prepare("a.jsonl", *options)
    assert path.read_bytes() == whole
    assert prepare("b.jsonl", *options).read_bytes() != whole
    # What else decides a token: the ends of answers, the tokenizer, the template's variables. Older files go on.
    argv = ["--target", target, "--output", path, "--max-length", 192, "--slots", 4, *options]
    argv += ["--prompts", tmp_path / "questions.jsonl"]
    (target / "generation_config.json").write_text('{"eos_token_id": [258, 113]}')
    assert "stop_token_ids [258], not [113, 258]" in complaint(main, *argv)
    manifest = path.with_name("a.jsonl.manifest.json")
    saved = json.loads(manifest.read_text())
    del saved["settings"]["stop_token_ids"], saved["settings"]["tokenizer"]
    manifest.write_text(json.dumps(saved))
    assert main([str(word) for word in argv]) == 0
    saved = json.loads(manifest.read_text())
    saved["settings"]["tokenizer"] = "another"
    manifest.write_text(json.dumps(saved))
    assert "tokenizer another, not" in complaint(main, *argv)
    variables = ("--chat-template-kwargs", '{"messages": 1}')
    assert "chat_template_kwargs has messages: give it beside" in complaint(main, *argv, *variables)
    assert "is not JSON" in complaint(main, *argv, "--chat-template-kwargs", "{")
    assert "no variable 'thinking'" in complaint(main, *argv, "--chat-template-kwargs", '{"thinking": true}')


def test_dialogues_have_tools_and_thoughts_and_variables_of_the_template(prepare, tmp_path):
    template = CHAT_TEMPLATE.replace(
        "Be brief.", "{{ mood }}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}"
    )
    template = template.replace(
        "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}", ""
    )
    said = "{{ message['content'] }}"
    template = template.replace(
        said, "{{ message['tool_calls'] | tojson if message['tool_calls'] else message['content'] }}"
    )
    target = make_target(tmp_path / "tools", chat_template=template)
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    messages = [HI, call, {"role": "tool", "content": "7"}, {"role": "assistant", "content": "Seven."}]
    path = tmp_path / "ready.jsonl"
    tools = [{"type": "function", "function": {"name": "f"}}]
    path.write_text(
        json.dumps({"messages": messages, "tools": tools}) + "\n" + json.dumps({"messages": messages}) + "\n"
    )
    options = ("--target", target, "--dialogues", path, "--chat-template-kwargs", '{"mood": "Calm. "}')
    with_tools, without = read_conversations(prepare("a.jsonl", *options, "--max-length", 512, prompts=None))
    decode = load_tokenizer(target).decode
    assert "system\nCalm. f<|im_end|>" in decode(with_tools.tokens)
    assert "system\nCalm. <|im_end|>" in decode(without.tokens)
    for c in (with_tools, without):
        answers = [decode(c.tokens[a:b]) for a, b in c.assistant]
        assert answers == ['[{"function": {"name": "f", "arguments": {}}}]<|im_end|>', "Seven.<|im_end|>"]


def test_seeds_are_the_same_everywhere():
    assert answer_seed(0, "questions/1", "assistant 0") == 1126926255
    seeds = {answer_seed(s, f"q/{i}", f"assistant {t}") for s in range(9) for i in range(9) for t in range(9)}
    assert len(seeds) == 729


def test_bad_values_are_one_line(complaint, target_folder, prompts_file, tmp_path):
    output = tmp_path / "out" / "a.jsonl"
    given = ["--target", target_folder, "--prompts", prompts_file, "--output", output]
    assert "temperature is -1" in complaint(main, *given, "--temperature", "-1")
    assert "top_p is 0.0" in complaint(main, *given, "--top-p", 0)
    assert "top_p is 1.5" in complaint(main, *given, "--top-p", 1.5)
    assert "'none'" in complaint(main, *given, "--limit", "none")
    assert "--max-length is 4096, but the target has 1024" in complaint(main, *given, "--max-length", 4096)
    assert "'0' is not a whole number" in complaint(main, *given, "--slots", 0)
    assert "tree 'bush'" in complaint(main, *given, "--tree", "bush")
    assert "no folder" in complaint(main, *given, "--drafter", tmp_path / "nowhere")
    self_made = ("--prompts", "self", "--limit", 1)
    assert "give at least" in complaint(main, *given, *self_made, "--max-length", 32)
    assert "no source" in complaint(main, "--target", target_folder, "--output", output)
    assert "give --limit" in complaint(main, *given, "--prompts", "self")
    assert "hold a sample" in complaint(main, *given, "--prompts", prompts_file)
    assert "no folder or file" in complaint(main, *given[2:], "--target", tmp_path / "nowhere")
    assert "cannot read" in complaint(main, *given, "--prompts", tmp_path / "nowhere.jsonl")
    assert "required: --output" in complaint(main, "--prompts", prompts_file)
    assert not output.parent.exists()


def test_a_corrupt_prompt_is_named_by_file_and_line(complaint, target_folder, prompts_file, tmp_path):
    prompts_file.write_text(prompts_file.read_text() + '{"turns": ["cut')
    given = ["--target", target_folder, "--prompts", prompts_file, "--output", tmp_path / "a.jsonl"]
    assert f"{prompts_file}:15: not JSON" in complaint(main, *given)


def test_a_target_without_a_chat_template_is_refused(complaint, prompts_file, tmp_path):
    folder = make_target(tmp_path / "plain", chat_template=None)
    given = ["--target", folder, "--prompts", prompts_file, "--output", tmp_path / "a.jsonl"]
    assert "no chat template" in complaint(main, *given)


def test_a_full_disk_is_one_line_and_the_run_can_go_on(prepare, monkeypatch, capsys, tmp_path):
    whole = prepare("whole.jsonl").read_bytes()

    def full(self, conversations):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_data.ConversationWriter, "append", full)
    with pytest.raises(AssertionError):
        prepare("a.jsonl")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"error: cannot write {tmp_path / 'a.jsonl'}: No space left on device"
    monkeypatch.undo()
    assert prepare("a.jsonl").read_bytes() == whole


def test_samples_come_from_the_sources_in_turn(prepare, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": f"And {i}?"}) + "\n" for i in range(3)))
    conversations = read_conversations(prepare("a.jsonl", "--prompts", other, "--keep-truncated"))
    order = [c.id.split("/")[0] for c in conversations]
    assert order[:6] == ["questions", "other"] * 3
    assert order[6:] == ["questions"] * 11
    assert all(np.all(c.tokens >= 0) for c in conversations)
