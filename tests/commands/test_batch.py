"""`fasteagle batch`: every line gets one record, whatever befalls the run, and the tokens are the engine's.

Children are real processes, forked by a server that has imported what takes seconds to import.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import random
import shlex
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import pytest

from fasteagle_jax import ChatOptions, Engine, SamplingParams
from fasteagle_jax.commands import batch, interrupts
from fasteagle_jax.commands.batch import main
from fasteagle_jax.data.shares import Share
from fasteagle_jax.engine.batch_records import AnswerFile, answer_record
from fasteagle_jax.engine.batch_requests import BatchRequest, Line, Refusal, read_requests
from fasteagle_jax.engine.detokenizer import Detokenizer
from fasteagle_jax.engine.requests import Completion, RequestStatistics
from tests.tiny_folder import CHAT_TEMPLATE, make_target
from tests.tiny_tokenizer import metaspace_tokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def openai(custom_id, url=CHAT, **body):
    content = {"messages": HELLO} if url == CHAT else {"prompt": "Why"}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": content | body}


def write(path, *lines):
    """A file of these lines: bytes as they are, else JSON."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def read(path):
    """The records by their lines, each there once."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    by_line = {record["line"]: record for record in records}
    assert len(by_line) == len(records)
    return dict(sorted(by_line.items()))


def tokens(record):
    """The answers' tokens, in either form; None for an error."""
    if record["error"]:
        return None
    if "response" in record:
        return [choice["token_ids"] for choice in record["response"]["body"]["choices"]]
    return [answer["tokens"] for answer in record.get("answers", [record])]


def all_tokens(path):
    return {line: tokens(record) for line, record in read(path).items()}


@pytest.fixture
def run(target_folder, tmp_path, capsys):
    """Answers a file; returns the output's path. `said` is then what it printed, out and err."""

    def run(source, *options, output="out.jsonl", code=0):
        capsys.readouterr()
        path = tmp_path / output
        argv = ["--target", target_folder, "--max-len", 128, "--slots", 4, "--max-new", 12]
        argv += ["--input", source, "--output", path, *options]
        assert main([str(word) for word in argv]) == code
        run.said = capsys.readouterr()
        return path

    return run


def mixed():
    """Requests of both forms, greedy and sampled, short and long, some with several samples."""
    rng = random.Random(1)
    lines = []
    for i in range(24):
        text = "so " * rng.randrange(12) + "?"
        fields = {
            "temperature": rng.choice([0, 0.7, 1]),
            "top_k": rng.choice([-1, 0, 20]),
            "top_p": rng.choice([1, 0.9]),
            "min_p": rng.choice([0, 0.02]),
            "seed": rng.randrange(2**32),
            "n": rng.choice([1, 1, 3]),
            "stop": rng.choice([None, "e", ["zz", "a"]]),
            "stop_token_ids": rng.choice([[], [120, 121]]),
            "ignore_eos": rng.random() < 0.5,
            "max_tokens": rng.randrange(1, 20),
        }
        messages = [{"role": "user", "content": text}]
        prompt = rng.choice([{"prompt": text}, {"messages": messages}, {"prompt": [1, 2, 3 + i]}])
        url = CHAT if "messages" in prompt else TEXT
        asked = prompt | fields
        lines.append(
            asked if i % 2 else {"custom_id": f"request-{i}", "method": "POST", "url": url, "body": asked | {}}
        )
    return lines


def asked(line):
    """A line of `mixed` as the engine is asked."""
    fields = dict(line.get("body", line))
    prompt = fields.pop("messages", None) or fields.pop("prompt")
    return prompt, SamplingParams(max_new_tokens=fields.pop("max_tokens"), **fields)


# --- answers ----------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_engine(run, target_folder, drafter_folder, tmp_path):
    lines = mixed()
    source = write(tmp_path / "in.jsonl", *lines)
    records = read(run(source, "--drafter", drafter_folder, "--tree", "best_first:4"))
    assert list(records) == list(range(1, 25))
    engine = Engine.load(str(target_folder), max_len=128, slots=4)  # the programs of the tests below
    made = engine.generate(*zip(*map(asked, lines), strict=True))
    for i, (line, record) in enumerate(zip(lines, records.values(), strict=True)):
        its = [completion for completion in made if completion.prompt_index == i]
        assert tokens(record) == [list(completion.tokens) for completion in its]
        if "response" in record:
            choices = record["response"]["body"]["choices"]
            assert record["custom_id"] == line["custom_id"]
            assert [choice["index"] for choice in choices] == list(range(len(its)))
            key = "text" if line["url"] == TEXT else "message"
            texts = [choice[key] if key == "text" else choice[key]["content"] for choice in choices]
        else:
            choices = record.get("answers", [record])
            texts = [choice["text"] for choice in choices]
        assert texts == [completion.text for completion in its]
        for name in ("finish_reason", "stop_reason"):
            assert [choice[name] for choice in choices] == [getattr(completion, name) for completion in its]
        took = record["statistics"]
        assert took["rounds"] + sum(took["accepted_at"]) == sum(len(completion.tokens) - 1 for completion in its)


def test_openai_records_have_openais_shape(run, tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        openai("a", model="mine", logprobs=True, seed=3),
        openai("b", TEXT, logprobs=0, seed=3),
        openai("c", TEXT, n=2),
    )
    before = int(time.time())
    chat, text, two = read(run(source)).values()
    assert list(chat) == ["id", "custom_id", "line", "response", "error", "statistics"]
    assert (chat["id"], chat["custom_id"], chat["line"], chat["error"]) == ("line-1", "a", 1, None)
    assert chat["response"]["status_code"] == 200
    body = chat["response"]["body"]
    assert list(body) == ["id", "object", "created", "model", "choices", "usage"]
    assert (body["object"], body["model"]) == ("chat.completion", "mine") and body["created"] >= before
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": choice["message"]["content"], "refusal": None}
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == body["usage"]["completion_tokens"]
    for token in choice["logprobs"]["content"]:
        assert token["logprob"] < 0 and token["top_logprobs"] == []
        assert token["bytes"] is None or bytes(token["bytes"]).decode() == token["token"]
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]

    body = text["response"]["body"]
    assert (body["object"], body["model"].endswith("target")) == ("text_completion", True)
    (choice,) = body["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"])
    assert choice["logprobs"]["text_offset"] == sorted(choice["logprobs"]["text_offset"])
    assert [choice["logprobs"] for choice in two["response"]["body"]["choices"]] == [None, None]


def test_log_probabilities_show_each_token_where_it_stands_in_the_text():
    tokenizer = metaspace_tokenizer()  # whose decoder drops the first space of a text
    prompt = tokenizer.encode("sky")
    tokens = tuple(tokenizer.convert_tokens_to_ids(["▁blue", "▁is", "<0xC3>", "<0xA9>", "!", "</s>"]))
    took = RequestStatistics(5, (), 0.1)
    completion = Completion(0, 0, 2, " blue isé!", tokens, (0,) * 6, "stop", None, (-0.5,) * 6, took)

    def choice(url):
        request = BatchRequest(Line(1, id="a"), prompt, SamplingParams(logprobs=True), url)
        record = answer_record(request, prompt, [completion], Detokenizer(tokenizer), "target")
        return record["response"]["body"]["choices"][0]

    text = choice(TEXT)["logprobs"]
    assert text["tokens"] == [" blue", " is", "\ufffd", "\ufffd", "!", "</s>"]
    assert text["text_offset"] == [0, 5, 8, 8, 9, 10]
    chat = choice(CHAT)["logprobs"]["content"]
    assert [token["token"] for token in chat] == text["tokens"]
    assert [token["bytes"] and bytes(token["bytes"]) for token in chat][1:4] == [b" is", None, None]


def test_simple_records_are_flat_and_carry_the_id_or_the_line(run, tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        {"prompt": "Why", "id": "mine", "logprobs": True},
        {"messages": HELLO, "id": 7, "max_new_tokens": 3, "ignore_eos": True},
        {"prompt": [1, 2], "n": 2},
    )
    first, second, third = read(run(source)).values()
    names = ["text", "tokens", "finish_reason", "stop_reason"]
    ends = ["prompt_tokens", "statistics", "error"]
    assert list(first) == ["id", "line", *names, "logprobs", *ends]
    assert len(first["logprobs"]) == len(first["tokens"])
    assert list(second) == ["id", "line", *names, *ends]
    assert (first["id"], second["id"], third["id"]) == ("mine", 7, "line-3")
    assert (len(second["tokens"]), second["finish_reason"]) == (3, "length")
    assert list(second["statistics"]) == ["rounds", "accepted_at", "acceptance_length", "seconds"]
    assert list(third) == ["id", "line", "answers", *ends]
    assert [list(answer) for answer in third["answers"]] == [names, names]
    assert third["prompt_tokens"] == 2


def test_options_stand_in_for_what_a_line_leaves_out(run, tmp_path):
    left_out = {"prompt": "Why", "ignore_eos": True}
    given = left_out | {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 5, "max_tokens": 7}
    options = shlex.split("--temperature 0.8 --top-k 9 --top-p 0.9 --min-p 0.01 --seed 5 --max-new 7")
    source = write(tmp_path / "in.jsonl", left_out, given)
    by_option = all_tokens(run(source, *options))
    assert by_option[1] == by_option[2] and len(by_option[1][0]) == 7
    otherwise = all_tokens(run(source, output="other.jsonl"))
    assert otherwise[1] != by_option[1] and otherwise[2] == by_option[2]
    (request,) = read_requests(
        [b'{"prompt": "a"}'], SamplingParams(temperature=batch._parser().get_default("temperature"))
    )
    assert request.params.temperature == 1.0  # as OpenAI's


def test_memory_is_stated_before_and_the_sums_after(run, tmp_path):
    source = write(tmp_path / "in.jsonl", {"prompt": "Why"}, b"rubbish", {"prompt": "How"})
    path = run(source)
    assert run.said.err.startswith("memory: ")
    made = sum(len(answer) for answers in all_tokens(path).values() for answer in answers or [])
    line = run.said.out.strip()
    assert line.startswith(f"{path}: 3 of 3 requests answered, 1 of them errors; {made} tokens in ")
    assert "tokens/s, acceptance length 1.00" in line


def test_lines_are_read_as_slots_become_free(run, tmp_path, monkeypatch):
    num_read, read_before_first_record = [0], []
    append = AnswerFile.append

    def counting(*args):
        for its in read_requests(*args):
            num_read[0] += 1
            yield its

    def noting(self, record):
        read_before_first_record.append(num_read[0])
        append(self, record)

    monkeypatch.setattr(batch, "read_requests", counting)
    monkeypatch.setattr(AnswerFile, "append", noting)
    run(write(tmp_path / "in.jsonl", *[{"prompt": "Why", "seed": i} for i in range(40)]), "--slots", 1)
    assert read_before_first_record[0] < 10 and num_read[0] == 40


def test_a_file_without_requests_is_answered(run, tmp_path):
    assert run(write(tmp_path / "in.jsonl", b"", b"  ")).read_text() == ""
    assert "0 of 0 requests answered" in run.said.out


# --- lines ------------------------------------------------------------------------------------------------------


def parse(*lines):
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return list(read_requests(raw, SamplingParams()))


def test_fields_become_params():
    line = {
        "max_completion_tokens": 5,
        "max_tokens": 5,
        "stop": "x",
        "stop_token_ids": [3],
        "top_k": -1,
        "temperature": 2,
        "ignore_eos": True,
        "logprobs": True,
        "seed": None,
        "n": 2.0,
    }
    for request in parse(openai("a", **line), {"prompt": "x"} | line):
        params = dict(max_new_tokens=5, stop=("x",), stop_token_ids=(3,), temperature=2.0, ignore_eos=True)
        assert request.params == SamplingParams(**params, logprobs=True, n=2)
    assert [r.params.logprobs for r in parse(openai("a", TEXT, logprobs=0), openai("b", TEXT, logprobs=False))] == [
        1,
        0,
    ]


def test_rules_and_alternatives_become_params():
    rules = {"min_tokens": 2, "repetition_penalty": 1.5, "presence_penalty": -1, "frequency_penalty": 0.5}
    lists = {"allowed_token_ids": [5, 6], "bad_words": ["a", "b c"], "prompt_logprobs": 2}
    line = {**rules, **lists, "logit_bias": {"5": -100, "6": 0.5}}
    expected = SamplingParams(**rules, **lists, logit_bias={5: -100.0, 6: 0.5})
    assert [request.params for request in parse(openai("a", **line), {"prompt": "x"} | line)] == [expected] * 2
    lines = openai("a", logprobs=True, top_logprobs=3), openai("b", TEXT, logprobs=3), {"prompt": "x", "logprobs": 3}
    assert [request.params for request in parse(*lines)] == [SamplingParams(logprobs=3)] * 3
    schema = {"type": "object"}
    formats = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}, {"type": "json_object"}
    asked = parse(*(openai(kind["type"], response_format=kind) for kind in (*formats, {"type": "text"})))
    given = [{"json": schema}, {"json_object": True}, None]
    assert [request.params.structured_outputs for request in asked] == given
    (request,) = parse({"prompt": "x", "structured_outputs": {"regex": "a+"}})
    assert request.params == SamplingParams(structured_outputs={"regex": "a+"})
    none = {"logit_bias": {}, "allowed_token_ids": None, "bad_words": [], "top_logprobs": 0, "prompt_logprobs": None}
    assert [request.params for request in parse(openai("a", **none))] == [SamplingParams()]


def test_alternatives_are_openais_and_the_prompts_log_probabilities_vllms():
    tokenizer = metaspace_tokenizer()
    prompt = tokenizer.encode("sky", add_special_tokens=False) * 2
    blue, is_, high, low = tokenizer.convert_tokens_to_ids(["▁blue", "▁is", "<0xC3>", "<0xA9>"])
    best = ({blue: -0.25, is_: -1.5}, {high: -1.0, low: -2.0})
    took = RequestStatistics(1, (), 0.1)
    parts = ((0, 0), "length", None, (-0.25, -1.0), took, best, (None, -3.0), (None, {is_: -0.5}))
    completion = Completion(0, 0, 2, " blue\ufffd", (blue, high), *parts)

    def body(url):
        request = BatchRequest(Line(1, id="a"), prompt, SamplingParams(logprobs=2, prompt_logprobs=1), url)
        record = answer_record(request, prompt, [completion], Detokenizer(tokenizer), "target")
        return record["response"]["body"] if url else record

    of_prompt = [
        None,
        {
            str(prompt[1]): {"logprob": -3.0, "decoded_token": " sky"},
            str(is_): {"logprob": -0.5, "decoded_token": " is"},
        },
    ]
    chat = body(CHAT)
    assert chat["prompt_logprobs"] == of_prompt
    first, second = (token["top_logprobs"] for token in chat["choices"][0]["logprobs"]["content"])
    assert first[0] == {"token": " blue", "logprob": -0.25, "bytes": list(b" blue")}
    assert [token["token"] for token in second] == ["\ufffd"] * 2
    (text,) = body(TEXT)["choices"]
    assert text["prompt_logprobs"] == of_prompt
    assert text["logprobs"]["top_logprobs"] == [{" blue": -0.25, " is": -1.5}, {"\ufffd": -1.0}]
    simple = body(None)
    assert simple["top_logprobs"] == [{str(blue): -0.25, str(is_): -1.5}, {str(high): -1.0, str(low): -2.0}]
    assert (simple["prompt_logprobs"], simple["prompt_top_logprobs"]) == ([None, -3.0], [None, {str(is_): -0.5}])


def test_neutral_values_of_unsupported_fields_are_accepted():
    neutral = {
        "stream": False,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "response_format": {"type": "text"},
        "logit_bias": None,
        "user": "me",
        "metadata": {"a": "b"},
        "tools": [],
        "model": "any",
        "top_logprobs": None,
    }
    assert [type(its) for its in parse(openai("a", **neutral), {"prompt": "x"} | neutral)] == [BatchRequest] * 2


def test_messages_may_be_copied_from_a_response_and_have_parts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "tool_calls": None}
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}, said]
    (request,) = parse({"messages": messages})
    assert request.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
    ]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def test_tools_calls_thoughts_and_variables_of_the_template_are_read():
    call = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "Hm.", "refusal": None}
    messages = [*HELLO, said, {"role": "tool", "content": "7", "tool_call_id": "x"}]
    fields = {"tools": [TOOL], "chat_template_kwargs": {"a": 1}, "add_generation_prompt": True, "tool_choice": "auto"}
    for request in parse(openai("x", messages=messages, **fields), {"messages": messages} | fields):
        assert request.chat == ChatOptions([TOOL], None, {"a": 1}, True)
        read = call | {"function": {"name": "f", "arguments": {"a": 1}}}
        assert request.prompt == [
            *HELLO,
            {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [read]},
            {"role": "tool", "content": "7", "tool_call_id": "x"},
        ]
    (request,) = parse({"messages": [*HELLO, {"role": "assistant", "content": "So"}], "continue_final_message": True})
    assert request.chat == ChatOptions(continue_final_message=True)
    (request,) = parse({"messages": HELLO, "date": "2026-02-28"})
    assert request.chat == ChatOptions(date="2026-02-28")


@pytest.mark.parametrize(
    "line, expected",
    [({}, (True, 5)), ({"logprobs": True}, (True, 5)), ({"logprobs": 3}, (True, 3)), ({"logprobs": False}, (False, 0))],
)
def test_a_lines_log_probabilities_are_not_bound_to_the_defaults(line, expected):
    raw = json.dumps({"prompt": "a"} | line).encode()
    (request,) = read_requests([raw], SamplingParams(logprobs=5))
    assert (request.params.logprobs, request.params.top_logprobs) == expected


def messages(**changes):
    return {"messages": [HELLO[0] | changes]}


BAD = [  # a line, the code of its error, what the error says
    (b'{"prompt": "a"', "invalid_line", "not JSON (Expecting ',' delimiter at character 15)"),
    (b"\xff\xfe", "invalid_line", "not UTF-8 (byte 1)"),
    (b'["prompt"]', "invalid_line", "a list, not an object"),
    (b"null", "invalid_line", "null, not an object"),
    (b'{"prompt": "a", "top_p": NaN}', "invalid_line", "NaN is no number"),
    (b'{"prompt": "half \\ud83d"}', "invalid_line", "half a character"),
    (b'{"a":' * 100_000, "invalid_line", "nested too deeply"),
    (b'{"seed": ' + b"1" * 5000 + b"}", "invalid_line", "not JSON that can be read"),
    ({"prompt": "a", "bogus": 1}, "unknown_field", '"bogus" is unknown'),
    ({"prompt": "a", "line\nbreak": 1}, "unknown_field", '"line\\nbreak" is unknown'),
    (openai("x", bogus=None), "unknown_field", '"body.bogus" is unknown'),
    (openai("x") | {"bogus": 1}, "unknown_field", '"bogus" is unknown'),
    ({"messages": HELLO, "custom_id": "x"}, "unknown_field", '"messages" is unknown: give custom_id, method'),
    (messages(bogus=1), "unknown_field", '"messages[0].bogus" is unknown'),
    (messages(content=[{"type": "text", "text": "a", "b": 1}]), "unknown_field", '"messages[0].content[0].b"'),
    (openai("x", stream=True), "unsupported_value", "body.stream is true: only false is supported"),
    (
        openai("x", response_format={"type": "grammar"}),
        "invalid_value",
        'body.response_format is {"type": "grammar"}: give',
    ),
    (
        openai("x", response_format="json"),
        "invalid_value",
        'body.response_format is "json": give one of the type json_',
    ),
    (
        openai("x", response_format={"type": "json_schema"}),
        "invalid_value",
        "body.response_format.json_schema.schema is",
    ),
    (
        openai("x", structured_outputs={"choice": ["a"]}),
        "invalid_value",
        "body.structured_outputs is {'choice': ['a']}",
    ),
    (
        openai("x", structured_outputs={"regex": 7}),
        "invalid_value",
        "body.structured_outputs.regex is 7: give a regular",
    ),
    (openai("x", TEXT, tools=[TOOL]), "unsupported_value", "body.tools is of messages alone"),
    ({"prompt": "a", "chat_template_kwargs": {"a": 1}}, "unsupported_value", "chat_template_kwargs is of messages"),
    (openai("x", tool_choice="required"), "unsupported_value", 'body.tool_choice is "required"'),
    (openai("x", tools=[{"type": "function"}]), "invalid_value", "body.tools[0] is"),
    (openai("x", chat_template_kwargs=5), "invalid_value", "body.chat_template_kwargs is 5"),
    (
        openai("x", add_generation_prompt=True, continue_final_message=True),
        "invalid_value",
        "body.add_generation_prompt and continue_final_message are both True",
    ),
    (openai("x", url="/v1/embeddings"), "unsupported_value", 'url is "/v1/embeddings"'),
    (openai("x") | {"method": "GET"}, "unsupported_value", 'method is "GET"'),
    (openai("x", TEXT, prompt=["a", "b"]), "unsupported_value", "body.prompt is a list of texts"),
    (messages(function_call={"name": "f"}), "unsupported_value", "messages[0].function_call"),
    (messages(tool_calls=[{}]), "invalid_value", "messages[0].tool_calls[0] is {}"),
    (messages(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "invalid_value", "arguments are not JSON"),
    (messages(reasoning_content=5), "invalid_value", "messages[0].reasoning_content is 5"),
    (messages(content=[{"type": "image_url"}]), "unsupported_value", "messages[0].content[0]"),
    ({"custom_id": "x"}, "invalid_value", "method is missing"),
    (openai(""), "invalid_value", 'custom_id is ""'),
    (openai(7), "invalid_value", "custom_id is 7"),
    (openai("x") | {"body": "a"}, "invalid_value", "body is a text"),
    (openai("x", TEXT, messages=HELLO), "unknown_field", '"body.messages" is unknown'),
    (openai("x", model=1), "invalid_value", "body.model is 1"),
    (openai("x", temperature="hot"), "invalid_value", 'body.temperature is "hot": give a number'),
    (openai("x", temperature=-1), "invalid_value", "body.temperature is -1.0: it must be 0 or more"),
    (
        b'{"custom_id": "e", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "top_p": 1e999}}',
        "invalid_value",
        "body.top_p is Infinity",
    ),
    ({"prompt": "a", "temperature": 10**400}, "invalid_value", "temperature is 1000"),
    ({"prompt": "a", "temperature": True}, "invalid_value", "temperature is true"),
    ({"prompt": "a", "top_p": 0}, "invalid_value", "top_p is 0.0"),
    ({"prompt": "a", "min_p": 2}, "invalid_value", "min_p is 2.0"),
    ({"prompt": "a", "top_k": 1.5}, "invalid_value", "top_k is 1.5"),
    ({"prompt": "a", "seed": -1}, "invalid_value", "seed is -1: give a whole number from 0"),
    ({"prompt": "a", "seed": 2**32}, "invalid_value", "seed is 4294967296"),
    ({"prompt": "a", "max_tokens": 0}, "invalid_value", "max_tokens is 0"),
    ({"prompt": "a", "max_new_tokens": "9"}, "invalid_value", 'max_new_tokens is "9"'),
    ({"prompt": "a", "max_tokens": 3, "max_completion_tokens": 4}, "invalid_value", "max_completion_tokens is 4, but"),
    ({"prompt": "a", "n": 10**9}, "invalid_value", "n is 1000000000: give a whole number from 1 to 128"),
    ({"prompt": "a", "stop": ["a", ""]}, "invalid_value", "stop is"),
    ({"prompt": "a", "stop_token_ids": [2**40]}, "invalid_value", "stop_token_ids is"),
    ({"prompt": "a", "ignore_eos": 1}, "invalid_value", "ignore_eos is 1: give true or false"),
    (openai("x", logprobs=2), "invalid_value", "body.logprobs is 2"),
    (openai("x", TEXT, logprobs=21), "invalid_value", "body.logprobs is 21: give true, false or a whole number up to"),
    (openai("x", TEXT, logprobs=1.5), "invalid_value", "body.logprobs is 1.5: give true, false or a whole number"),
    (openai("x", TEXT, top_logprobs=2), "unknown_field", "body.top_logprobs is of /v1/chat/completions: give the num"),
    (openai("x", top_logprobs=3), "invalid_value", "body.top_logprobs is 3 without logprobs"),
    (openai("x", logprobs=True, top_logprobs=21), "invalid_value", "body.top_logprobs is 21: give a whole number"),
    ({"prompt": "a", "logprobs": 2, "top_logprobs": 3}, "invalid_value", "logprobs is 2, but top_logprobs 3"),
    ({"prompt": "a", "prompt_logprobs": True}, "invalid_value", "prompt_logprobs is true: give a whole number from 0"),
    (openai("x", presence_penalty=2.5), "invalid_value", "body.presence_penalty is 2.5: it must be -2 to 2"),
    (openai("x", frequency_penalty="a"), "invalid_value", 'body.frequency_penalty is "a": give a number'),
    ({"prompt": "a", "repetition_penalty": 0}, "invalid_value", "repetition_penalty is 0.0: it must be 0.01 to 100"),
    ({"prompt": "a", "min_tokens": -1}, "invalid_value", "min_tokens is -1: give a whole number from 0"),
    ({"prompt": "a", "min_tokens": 9, "max_tokens": 3}, "invalid_value", "min_tokens is 9, but max_new_tokens 3"),
    (openai("x", logit_bias=[5]), "invalid_value", "body.logit_bias is [5]: give an object of numbers by token id"),
    (openai("x", logit_bias={"5": "a"}), "invalid_value", 'body.logit_bias["5"] is "a": give a number'),
    (openai("x", logit_bias={"five": 1}), "invalid_value", "body.logit_bias is for 'five': give token ids"),
    (openai("x", logit_bias={"5": 101}), "invalid_value", "body.logit_bias of token 5 is 101.0: give a number from"),
    (openai("x", allowed_token_ids=[]), "invalid_value", "body.allowed_token_ids is empty"),
    (openai("x", bad_words=[""]), "invalid_value", "body.bad_words is"),
    ({"prompt": "a", "id": [1]}, "invalid_value", "id is [1]"),
    ({"prompt": "a", "messages": HELLO}, "invalid_value", "messages and prompt are both there"),
    ({"id": "x"}, "invalid_value", "messages or prompt is missing"),
    (openai("x", messages=None), "invalid_value", "body.messages is missing"),
    (messages(role="robot"), "invalid_value", 'messages[0].role is "robot"'),
    (messages(content=None), "invalid_value", "messages[0].content is null"),
    (messages(content=7), "invalid_value", "messages[0].content is 7"),
    (messages(content=[{"type": "text"}]), "invalid_value", "messages[0].content[0].text is null"),
    ({"messages": ["a"]}, "invalid_value", "messages[0] is a text"),
    ({"prompt": ""}, "invalid_prompt", 'prompt is ""'),
    ({"prompt": []}, "invalid_prompt", "prompt is []"),
    ({"prompt": [1, True]}, "invalid_prompt", "prompt is [1, true]"),
    ({"messages": []}, "invalid_prompt", "messages is []"),
    (messages(content=""), "invalid_prompt", "messages is without any text"),
]
BAD_FOR_THE_ENGINE = [
    ({"prompt": "long " * 40}, "invalid_prompt", "the prompt has 200 tokens, but a request has 128"),
    ({"prompt": [10**9]}, "invalid_prompt", "the prompt holds 1000000000: give token ids below 259"),
    ({"messages": [{"role": "tool", "content": "7"}]}, "invalid_prompt", "the chat template refuses"),
    ({"messages": HELLO, "chat_template_kwargs": {"b": 1}}, "invalid_prompt", "the chat template has no variable 'b'"),
    ({"messages": HELLO, "chat_template": "rag"}, "invalid_prompt", "no chat template named 'rag'"),
    ({"prompt": "a", "stop_token_ids": list(range(16))}, "invalid_prompt", "17 stop tokens"),
    ({"prompt": "a", "stop": "x<|im_end|>"}, "invalid_prompt", "give its id, 258, as one of stop_token_ids"),
    ({"prompt": "a", "logit_bias": {"259": 1}}, "invalid_prompt", "logit_bias is for token 259: give token ids below"),
    ({"prompt": "a", "allowed_token_ids": [258], "min_tokens": 1}, "invalid_prompt", "does not end the answer, and"),
]


@pytest.mark.parametrize(("line", "code", "says"), BAD, ids=range(len(BAD)))
def test_a_bad_line_is_refused_by_the_name_of_what_is_wrong(line, code, says):
    (refusal,) = parse(line)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, says in refusal.message) == (code, True), refusal
    assert "\n" not in refusal.message and len(refusal.message) < 300


def test_bad_lines_become_errors_that_name_the_line_and_the_rest_goes_on(run, tmp_path):
    bad = BAD + BAD_FOR_THE_ENGINE
    for i, (line, _, _) in enumerate(bad):
        if isinstance(line, dict) and line.get("custom_id") == "x":
            line["custom_id"] = f"x{i}"
    lines = [line for one, _, _ in bad for line in (one, {"prompt": "Why", "max_tokens": 1})]
    records = read(run(write(tmp_path / "in.jsonl", *lines)))
    assert list(records) == list(range(1, len(lines) + 1))
    for i, (line, code, says) in enumerate(bad):
        record = records[2 * i + 1]
        assert record["error"]["code"] == code
        assert record["error"]["message"].startswith(f"line {2 * i + 1}: ") and says in record["error"]["message"]
        assert records[2 * i + 2]["error"] is None
        if isinstance(line, bytes) or "custom_id" in line:
            assert record["response"] is None
        if isinstance(line, dict) and line.get("custom_id"):
            assert record["custom_id"] == (line["custom_id"] if line["custom_id"] != 7 else None)
    assert f"{len(bad)} of them errors" in run.said.out


def test_of_a_custom_id_the_first_line_is_answered(run, tmp_path):
    source = write(tmp_path / "in.jsonl", openai("a"), openai("b"), openai("a", seed=1), {"prompt": "x", "id": "a"})
    records = read(run(source))
    assert [line for line, record in records.items() if record["error"]] == [3]
    assert records[3]["error"] == {
        "code": "duplicate_custom_id",
        "message": 'line 3: custom_id "a" is that of line 1: rename it',
    }


def test_blank_lines_count_but_are_skipped(run, tmp_path):
    line = json.dumps({"prompt": "Wäh?"}, ensure_ascii=False).encode()
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n \n" + line)
    assert [r["line"] for r in read(run(source)).values() if r["error"] is None] == [1, 4]


# --- resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lost", [1, 40, 3000])
def test_after_a_torn_tail_the_same_command_goes_on(run, tmp_path, lost):
    source = write(tmp_path / "in.jsonl", *mixed(), b"rubbish")
    path = run(source)
    complete, expected = path.read_bytes(), all_tokens(path)
    path.write_bytes(complete[:-lost])
    run(source)
    assert path.read_bytes().startswith(complete[: complete[:-lost].rfind(b"\n") + 1])
    assert all_tokens(path) == expected
    assert "25 of 25 requests answered, 1 of them errors" in run.said.out


def test_a_finished_run_has_nothing_left_to_do(run, tmp_path):
    source = write(tmp_path / "in.jsonl", *mixed()[:4], b"rubbish")
    path = run(source)
    before = path.read_bytes()
    run(source)
    assert path.read_bytes() == before
    assert "5 of 5 requests are answered already" in run.said.out
    assert "5 of 5 requests answered, 1 of them errors; 0 tokens" in run.said.out


def test_slots_drafter_and_tree_may_change_between_runs(run, tmp_path, drafter_folder):
    source = write(tmp_path / "in.jsonl", *mixed())
    path = run(source)
    expected = all_tokens(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:9]))
    run(source, "--slots", 2, "--drafter", drafter_folder, "--tree", "chain")
    assert all_tokens(path) == expected


def test_a_full_disk_is_one_line_and_the_run_can_go_on(run, tmp_path, monkeypatch):
    source = write(tmp_path / "in.jsonl", *mixed())
    expected = all_tokens(run(source, output="whole.jsonl"))
    write_lines = AnswerFile.append_lines

    def fill(self, line):
        if len(self.done) == 5:
            os.write(self._file.fileno(), line[:20])
            raise OSError(28, "No space left on device")
        write_lines(self, line)

    monkeypatch.setattr(AnswerFile, "append_lines", fill)
    path = run(source, code=2)
    assert run.said.err.strip().splitlines()[-1] == f"error: cannot write {path}: No space left on device"
    monkeypatch.undo()
    run(source)
    assert "cut off a torn last line of 20 bytes" in run.said.err or "5 of 24 requests are answered" in run.said.out
    assert all_tokens(path) == expected


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_during_a_write_waits_for_its_end(name, run, tmp_path, monkeypatch, listening):
    source = write(tmp_path / "in.jsonl", *mixed())
    expected = all_tokens(run(source, output="whole.jsonl"))
    write_lines = AnswerFile.append_lines

    def write_slowly(self, line):
        if len(self.done) == 5:
            os.write(self._file.fileno(), line[:20])
            signal.raise_signal(signal.Signals[name])
            line = line[20:]
        write_lines(self, line)

    monkeypatch.setattr(AnswerFile, "append_lines", write_slowly)
    path = run(source, code=130)
    assert [signal.getsignal(each) for each in interrupts.SIGNALS] == listening
    last = run.said.err.strip().splitlines()[-1]
    assert last == "interrupted: 6 of 24 requests are answered; the same command resumes with the others"
    assert len(read(path)) == 6
    monkeypatch.undo()
    run(source)
    assert all_tokens(path) == expected


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(complaint, target_folder):
    """What is said of a run that is refused and writes nothing."""

    def run(source, output, *options):
        argv = ["--target", target_folder, "--max-len", 128, "--slots", 4, "--max-new", 12]
        return complaint(main, *argv, "--input", source, "--output", output, *options)

    return run


def test_the_input_is_never_the_output(refused, tmp_path):
    source = write(tmp_path / "in.jsonl", {"prompt": "Why"})
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "hard.jsonl").hardlink_to(source)
    for name in ("in.jsonl", "link.jsonl", "hard.jsonl"):
        assert "is the input, too" in refused(source, tmp_path / name)
    assert "is the input, too" in refused(tmp_path / "link.jsonl", source)


def test_what_cannot_be_is_one_line(refused, tmp_path):
    source, output = write(tmp_path / "in.jsonl", {"prompt": "Why"}), tmp_path / "folder" / "out.jsonl"
    assert "no file" in refused(tmp_path / "nowhere.jsonl", output)
    assert "no file" in refused(tmp_path, output)
    assert "with --ray" in refused("gs://bucket/in", output)
    assert "memory needed is" in refused(source, output, "--slots", 600_000, "--max-len", 1024)
    assert "max_len is 4000" in refused(source, output, "--max-len", 4000)
    assert "temperature is -1" in refused(source, output, "--temperature", "-1")
    assert "tree 'bush'" in refused(source, output, "--tree", "bush")
    assert "no folder" in refused(source, output, "--drafter", tmp_path / "nowhere")
    assert "slots is 4, which data 8 of the mesh does not" in refused(source, output, "--mesh", "8,1,1")
    assert "cannot join the other processes" in refused(source, output, "--coordinator", "localhost:1")
    assert "--ray shares the work out by itself" in refused(source, output, "--ray", "--num-processes", 2)
    assert "--worker are of a Ray cluster" in refused(source, output, "--worker", "TPU=4")
    assert "--id-column is of --ray" in refused(source, output, "--id-column", "key")
    assert not output.parent.exists()


def test_other_settings_are_refused(run, refused, tmp_path):
    source = write(tmp_path / "in.jsonl", {"prompt": "Why"})
    path = run(source)
    said = refused(source, path, "--max-new", 13, "--seed", 5, "--min-p", 0.1, "--dtype", "bfloat16")
    assert all(words in said for words in ("max_new 12, not 13", "seed 0, not 5", "min_p 0.0, not 0.1"))
    assert "dtype float32, not bfloat16" in said
    assert "max_len 128, not 64" in refused(source, path, "--max-len", 64)
    assert "target " in refused(source, path, "--target", make_target(tmp_path / "other", seed=1))
    write(source, {"prompt": "How"})
    assert "sha256" in refused(source, path)


def test_the_date_is_that_of_the_first_run_and_the_ends_of_answers_are_known(run, refused, tmp_path, monkeypatch):
    dated = CHAT_TEMPLATE.replace("Be brief.", "{{ strftime_now('%d %b %Y') }}")
    target = make_target(tmp_path / "dated", chat_template=dated)
    own = {"messages": HELLO, "chat_template": dated}
    source = write(tmp_path / "in.jsonl", {"messages": HELLO}, own)

    def at(day):
        monkeypatch.setattr("fasteagle_jax.data.manifest.today", lambda: day)

    at("2024-02-03")
    path = run(source, "--target", target)
    first = all_tokens(path)
    assert first[1] == first[2]  # the date of a template in a line is that one, too
    path.write_text("")
    at("2024-02-04")
    settings = json.loads(path.with_name("out.jsonl.manifest.json").read_text())["settings"]
    assert settings["date"] == "2024-02-03" and settings["stop_token_ids"] == [258]
    assert all_tokens(run(source, "--target", target)) == first
    assert "chat None, not" in refused(source, path, "--target", target, "--chat-template", "{{ messages }}")
    (target / "generation_config.json").write_text('{"eos_token_id": [258, 113]}')
    assert "stop_token_ids [258], not [113, 258]" in refused(source, path, "--target", target)


def test_files_that_are_no_answers_are_refused(run, refused, tmp_path):
    source = write(tmp_path / "in.jsonl", {"prompt": "Why"}, {"prompt": "How"})
    path = run(source)
    manifest = path.with_name("out.jsonl.manifest.json")
    text, lines = manifest.read_text(), path.read_bytes().splitlines(keepends=True)
    for broken in (b"rubbish\n", b"{}\n", lines[0], b'{"line": 3, "error": null}\n'):
        path.write_bytes(lines[0] + broken + lines[1])
        assert f"{path}:2: no answer of this batch" in refused(source, path)
    manifest.write_text("[]")
    assert f"{manifest} is damaged" in refused(source, path)
    manifest.unlink()
    assert "exists without out.jsonl.manifest.json" in refused(source, path)
    path.write_bytes(b"")
    manifest.write_text(text)
    assert len(read(run(source))) == 2


def test_an_output_has_one_writer(run, refused, tmp_path):
    source = write(tmp_path / "in.jsonl", {"prompt": "Why"})
    path = run(source)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "is being written by another run" in refused(source, path)
    run(source)


# --- processes --------------------------------------------------------------------------------------------------


def start(argv: list[str], log: str) -> None:
    """The program in a child, on a CPU."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(argv))


@pytest.fixture(scope="session")
def server():
    """What forks children, quickly: what takes seconds to import is imported there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "fasteagle_jax.commands.batch",
            "transformers.models.auto.tokenization_auto",
            "transformers.models.llama.configuration_llama",
            "pytest",
        ]
    )
    return context


@pytest.fixture
def child(server, talkative, tmp_path):
    """Starts the program in a child; its `log` is what it says. None outlives the test."""
    children = []

    def run(source, output, *options):
        argv = ["--target", talkative[0], "--max-len", 256, "--slots", 4, "--max-new", 60]
        argv += ["--input", source, "--output", output, *options]
        log = tmp_path / f"child-{len(children)}.log"
        process = server.Process(target=start, args=([str(x) for x in argv], str(log)))
        process.start()
        process.log = log
        children.append(process)
        return process

    yield run
    for process in children:
        process.kill()
        process.join()


def ended(process):
    process.join(150)
    return process.exitcode


def wait_to_grow(path, process, by=1):
    """Waits until a file has so many bytes more than now, or the process has ended."""

    def size():
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_size
        return 0

    aim = size() + by
    while size() < aim and process.is_alive():
        time.sleep(0.001)


@pytest.fixture
def long_file(tmp_path):
    """Requests of both forms with answers of 30 to 60 tokens, a bad line among every dozen."""
    rng = random.Random(3)
    lines = []
    for i in range(180):
        fields = {"seed": i, "temperature": i % 3 / 2, "max_tokens": rng.randrange(30, 60), "n": 2 if i % 7 == 0 else 1}
        content = {"messages": [{"role": "user", "content": "so " * (i % 9)}]}
        lines.append(
            openai(f"request-{i}", **fields) if i % 2 else content | fields if i % 4 else {"prompt": "W"} | fields
        )
        if i % 12 == 0:
            lines.append(b"rubbish")
    return write(tmp_path / "in.jsonl", *lines)


@pytest.mark.slow  # torn tails, as kills leave them, and an interrupted process have tests of their own
@pytest.mark.parametrize("most", [1, 20])
def test_killed_at_random_moments_each_request_is_answered_once_and_as_without(child, long_file, tmp_path, most):
    reference, path = tmp_path / "reference.jsonl", tmp_path / "out.jsonl"
    assert ended(child(long_file, reference)) == 0
    expected = all_tokens(reference)
    rng = random.Random()  # other moments each time
    kills = 0
    while kills < most:
        process = child(long_file, path)
        wait_to_grow(path, process, by=rng.randrange(1, 10_000))
        time.sleep(rng.random() * 0.02)
        process.kill()
        if ended(process) == 0:  # it was faster: another file
            assert all_tokens(path) == expected
            path.unlink()
        else:
            assert process.exitcode == -signal.SIGKILL, process.log.read_text()
            kills += 1
    torn = path.read_bytes()
    process = child(long_file, path)
    assert ended(process) == 0, process.log.read_text()
    assert all_tokens(path) == expected
    assert path.read_bytes().startswith(torn[: torn.rfind(b"\n") + 1])


def test_ctrl_c_says_how_far_it_is_and_the_same_command_goes_on(child, long_file, tmp_path):
    path = tmp_path / "out.jsonl"
    process = child(long_file, path)
    wait_to_grow(path, process, by=5000)
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) == 130
    done, total = len(read(path)), len(long_file.read_text().splitlines())
    assert 0 < done < total
    last = process.log.read_text().strip().splitlines()[-1]
    assert last == f"interrupted: {done} of {total} requests are answered; the same command resumes with the others"
    process = child(long_file, path)
    assert ended(process) == 0
    assert f"{path}: {done} of {total} requests are answered already" in process.log.read_text()
    assert list(read(path)) == list(range(1, total + 1))


@pytest.mark.slow  # the lines' shares have a test of their own, two processes the engine's
def test_two_processes_share_the_lines(child, long_file, tmp_path):
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port = sock.getsockname()[1]
    processes = [
        child(
            long_file,
            tmp_path / "out.jsonl",
            *("--coordinator", f"localhost:{port}", "--num-processes", 2, "--process-id", i),
        )
        for i in range(2)
    ]
    assert [ended(process) for process in processes] == [0, 0], [process.log.read_text() for process in processes]
    assert ended(child(long_file, tmp_path / "alone.jsonl")) == 0
    shares = [all_tokens(tmp_path / f"out-{i:05d}-of-00002.jsonl") for i in range(2)]
    assert all(line % 2 == i for i, share in enumerate(shares) for line in share)
    assert shares[0] | shares[1] == all_tokens(tmp_path / "alone.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_shares_are_all_lines_once():
    shares = [Share(i, 3) for i in range(3)]
    assert all(sum(share.has(number) for share in shares) == 1 for number in range(1, 50))
    assert Share(1, 3).of_file(Path("a/b.jsonl")) == Path("a/b-00001-of-00003.jsonl")
    assert Share(0, 1).of_file(Path("a/b.jsonl")) == Path("a/b.jsonl")


# --- the program ------------------------------------------------------------------------------------------------


def test_the_examples_of_the_help_are_understood():
    _, _, examples = (batch.__doc__ or "").partition("examples:")
    lines = [line for line in examples.splitlines() if line.strip()]
    assert len(lines) == 4
    for line in lines:
        assert shlex.split(line)[:2] == ["fasteagle", "batch"]
        batch._parser().parse_args(shlex.split(line)[2:])


def test_the_program_beside_the_package_is_the_command():
    assert importlib.import_module("infer.batch").main is main
