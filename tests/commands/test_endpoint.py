"""Answers of a server: asked in tokens, several at once, resumed after it fails, told in one line."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fasteagle_jax.commands.prepare_data import main
from fasteagle_jax.data import endpoint
from fasteagle_jax.data.conversations import read_conversations
from fasteagle_jax.engine.engine import Engine
from fasteagle_jax.engine.requests import SamplingParams
from fasteagle_jax.targets.tokenizer import encode_chat, load_tokenizer


class Server(ThreadingHTTPServer):
    """A server on this machine that answers each prompt with a word of its own, and fails as it is told to."""

    gives_ids, fails_after, status, extra = True, 10**9, 500, 0

    def __init__(self, tokenizer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.asked, self.lock = tokenizer, [], threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            fails = len(server.asked) > server.fails_after
        if fails:
            return self.reply(server.status, {"error": {"message": "no\nmore"}})
        if not server.gives_ids and "return_token_ids" in body:
            return self.reply(400, {"error": "unknown field"})
        text = "so " + hashlib.sha256(str(body["prompt"]).encode()).hexdigest()[:9]
        choice = {"text": text, "finish_reason": "stop"}
        if server.gives_ids:
            choice["token_ids"] = [*server.tokenizer.encode(text), 258]
        usage = {"prompt_tokens": len(body["prompt"]) + server.extra}
        self.reply(200, {"choices": [choice], "usage": usage})

    def reply(self, status, record):
        data = json.dumps(record).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(target_folder):
    made = Server(load_tokenizer(target_folder))
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def argv(target_folder, prompts_file, tmp_path, server, monkeypatch):
    """The command for an output of this name; no weights are needed, nor waits."""
    monkeypatch.setattr(Engine, "load", None)
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def words(name, *options):
        given = ["--target", target_folder, "--prompts", prompts_file, "--output", tmp_path / name, "--slots", 3]
        given += ["--max-length", 256, "--max-new", 24, "--endpoint", server.url, "--model", "tiny", *options]
        return [str(word) for word in given]

    return words


def test_answers_are_the_servers_to_the_prompts_in_tokens(argv, server, tmp_path, target_folder):
    assert main(argv("a.jsonl", "--temperature", 0.5)) == 0
    tokenizer = load_tokenizer(target_folder)
    conversations = {c.id: c for c in read_conversations(tmp_path / "a.jsonl")}
    assert len(conversations) == 14
    c = conversations["questions/3"]
    assert c.tokens[: c.assistant[0][0]].tolist() == encode_chat(tokenizer, [{"role": "user", "content": "Hi?"}])
    assert len(c.assistant) == 3
    for start, end in c.assistant:
        word = hashlib.sha256(str(c.tokens[:start].tolist()).encode()).hexdigest()[:9]
        assert tokenizer.decode(c.tokens[start:end]) == f"so {word}<|im_end|>"
    paths, keys, bodies = zip(*server.asked, strict=True)
    assert set(paths) == {"/v1/completions"} and set(keys) == {"Bearer secret"} and len(bodies) == 17
    assert all(body["model"] == "tiny" and body["temperature"] == 0.5 for body in bodies)
    assert len({body["seed"] for body in bodies}) == 17 and all(body["max_tokens"] <= 24 for body in bodies)
    settings = json.loads((tmp_path / "a.jsonl.manifest.json").read_text())["settings"]
    assert settings["endpoint_model"] == "tiny" and "dtype" not in settings


def test_a_server_without_token_ids_gives_texts_which_are_encoded(argv, server, tmp_path):
    assert main(argv("ids.jsonl")) == 0
    server.gives_ids = False
    assert main(argv("texts.jsonl")) == 0
    assert (tmp_path / "texts.jsonl").read_bytes() == (tmp_path / "ids.jsonl").read_bytes()


def test_a_server_that_fails_half_way_is_told_and_the_same_command_resumes(argv, server, tmp_path, capsys):
    assert main(argv("whole.jsonl")) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    server.fails_after = len(server.asked) + 7
    assert main(argv("a.jsonl")) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == (
        f"error: {server.url} does not answer after 5 tries (500: no more): what was answered is kept, "
        "the same command resumes"
    )
    kept = (tmp_path / "a.jsonl").read_bytes()
    assert 0 < len(kept) < len(whole) and whole.startswith(kept)
    server.fails_after = 10**9
    assert main(argv("a.jsonl")) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == whole


def test_no_thread_that_waits_for_an_answer_keeps_the_process(server):
    """A pool's threads are joined when Python ends, up to the end of all their tries."""
    waiting = threading.Event()

    def slow(handler, status, record, reply=Handler.reply):
        waiting.wait(20)
        reply(handler, status, record)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "reply", slow)
        asked = endpoint.Endpoint(server.url, "m", server.tokenizer, (258,), vocab_size=300, max_len=99, concurrent=3)
        answers = asked.serve(iter([((5, 6), SamplingParams(max_new_tokens=4))] * 3))
        asker = threading.Thread(target=lambda: next(answers, None), daemon=True)
        asker.start()
        found = []
        for _ in range(200):
            found = [thread for thread in threading.enumerate() if thread.name == "endpoint"]
            if len(found) == 3:
                break
            asker.join(0.05)
        assert len(found) == 3 and all(thread.daemon for thread in found)
        waiting.set()
        asker.join(20)


def test_what_a_server_gives_wrong_is_one_line(argv, server, capsys):
    def said(*options):
        capsys.readouterr()
        assert main(argv("a.jsonl", *options)) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    server.extra = 1
    assert "tokens counted in a prompt of" in said() and "it changes prompts" in said()
    server.extra, server.fails_after, server.status = 0, 0, 401
    assert f"{server.url} gave 401: no more (model tiny)" in said()
    assert "--endpoint is 'localhost'" in said("--endpoint", "localhost")
    server.shutdown()
    server.server_close()
    assert "does not answer after 5 tries" in said()
