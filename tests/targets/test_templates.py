"""Chat templates of published families, their own or rebuilt in small: rendered as transformers renders, with the right
spans."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import Any

import pytest

from fasteagle_jax.errors import UserError
from fasteagle_jax.targets import templates
from fasteagle_jax.targets import tokenizer as tok
from fasteagle_jax.targets.chats import Chat, encode_rows
from fasteagle_jax.targets.messages import plain_messages
from fasteagle_jax.targets.templates import ChatOptions
from tests.tiny_folder import make_target

# As Llama 3.1's: the date and tools in the system message, calls of tools as JSON.
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}'
    "{%- endif %}{{- '<|im_start|>system\nToday is ' + date_string + '.' }}"
    "{%- for t in tools or [] %}{{- '\n' + (t | tojson) }}{%- endfor %}{{- '<|im_end|>' }}"
    "{%- for m in messages %}{{- '<|im_start|>' + ('ipython' if m.role == 'tool' else m.role) + '\n' }}"
    "{%- if m.tool_calls %}{%- set f = m.tool_calls[0].function %}{{- f.name + '(' + (f.arguments | tojson) + ')' }}"
    "{%- else %}{{- m.content | trim }}{%- endif %}{{- '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# As Qwen3's: thoughts are left out of all turns but those after the last question, and off by enable_thinking.
THINKING = (
    "{%- if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}"
    "{%- if m.role == 'assistant' %}{%- set thoughts = '' %}{%- if m.reasoning_content is string %}"
    "{%- set thoughts = m.reasoning_content %}{%- elif '</think>' in content %}"
    "{%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\n' }}{%- if loop.index0 > ns.last and (loop.last or thoughts) %}"
    "{{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' }}{%- endif %}{{- content }}"
    "{%- for c in m.tool_calls or [] %}{{- '<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}"
    "{{- '<|im_end|>\n' }}{%- elif m.role == 'tool' %}{{- '<|im_start|>user\n<tool_response>\n' + content }}"
    "{{- '\n</tool_response><|im_end|>\n' }}{%- else %}{{- '<|im_start|>' + m.role + '\n' + content }}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# As DeepSeek-R1's: the generation prompt opens the thoughts, of which no message shows any.
OPENED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)
# As SmolLM3's: marks of its own, and thoughts dropped.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Gemma 3's: the system message inside of the first question, `model` for the assistant, turns that alternate.
FOLDED = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- set first = messages[0]['content'] + '\n\n' -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set loop_messages = messages -%}"
    "{%- endif -%}{%- for m in loop_messages -%}{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}"
    "{{ '<|im_start|>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '') }}"
    "{{ m['content'] | trim }}{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>model\n' }}{%- endif -%}"
)
# As Mistral's: no generation prompt, and the tools before the last question.
BARE = (
    "{{ bos_token }}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS]"
    "{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
    " {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)
# As Phi-4's: no newlines.
TIGHT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '|' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant|' }}{% endif %}"
)
# As GPT-OSS's: thoughts are a message of their own in another channel, dropped afterwards; the end is another token.
CHANNELS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}"
    "{{ '<|im_start|>assistant analysis:' + m.thinking + '<|im_end|>' }}{% endif %}"
    "{{ '<|im_start|>assistant final:' + m.content + ('<|endoftext|>' if loop.last else '<|im_end|>') }}"
    "{% else %}{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
FAMILIES = {
    "gemma 3": FOLDED,
    "mistral": BARE,
    "phi-4": TIGHT,
    "gpt-oss": CHANNELS,
    "llama 3.1": DATED,
    "qwen3": THINKING,
}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "sum", "parameters": {"type": "object"}}}
CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"function": {"name": "sum", "arguments": '{"a": [1, "é"]}'}}],
}
ASKED = [{"role": "user", "content": "What is 1 + 2?"}, CALL, {"role": "tool", "content": "3", "tool_call_id": "x"}]
SAID = [
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "So.", "reasoning_content": "Hm."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "\n\nYes.", "reasoning_content": "Oh."},
]


def inline(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages with their thoughts in the content, as data sets have them."""
    return [
        {"role": m["role"], "content": f"<think>\n{m['reasoning_content']}\n</think>\n\n{m['content'].strip()}"}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads the tiny tokenizer with a template."""
    folder = make_target(tmp_path_factory.mktemp("templates") / "target")

    def loaded(template: Any):
        tokenizer = tok.load_tokenizer(folder)
        tokenizer.chat_template = template
        return tokenizer

    return loaded


def rows_of(tokenizer, messages, **options) -> list[tuple[str, list[str]]]:
    """The text before the first answer of each row, and its answers."""
    (rows,) = encode_rows(tokenizer, [plain_messages(messages, "x")], [ChatOptions(**options)])
    assert not isinstance(rows, UserError), rows
    return [
        (tokenizer.decode(row.ids[: row.spans[0][0]]), [tokenizer.decode(row.ids[a:b]) for a, b in row.spans])
        for row in rows
    ]


@pytest.mark.parametrize("template", [DATED, THINKING], ids=["dated", "thinking"])
@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["plain", "tools"])
@pytest.mark.parametrize("messages", [ASKED, SAID[:3], SAID], ids=["calls", "asked", "said"])
def test_conversations_are_rendered_as_transformers_renders_them(load, template, tools, messages):
    tokenizer = load(template)
    parsed = json.loads(json.dumps(messages).replace(json.dumps(CALL["tool_calls"][0]["function"]["arguments"]), "0"))
    for message in parsed:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = {"a": [1, "é"]}  # as templates take them
    for opens in (True, False):
        expected = tokenizer.apply_chat_template(
            parsed, tools=tools, add_generation_prompt=opens, tokenize=True, return_dict=False
        )
        options = ChatOptions(tools=tools, add_generation_prompt=opens)
        assert tok.encode_chat(tokenizer, plain_messages(messages, "x"), options=options) == expected


@pytest.mark.parametrize("system", [False, True], ids=["no system", "system"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_rendered_as_transformers_renders_it_and_answers_begin_where_prompts_end(load, family, system):
    tokenizer = load(FAMILIES[family])
    messages = [
        *([{"role": "system", "content": "Be brief."}] if system else []),
        *SAID[:3],
        SAID[3] | {"content": "Yes."},
    ]
    options = {"tools": [TOOL]} if family in ("mistral", "qwen3", "llama 3.1") else {}
    plain = plain_messages(messages, "x")
    for num in range(1 + system, len(messages) + 1):
        for opens in (True, False):
            expected = tokenizer.apply_chat_template(messages[:num], **options, add_generation_prompt=opens)[
                "input_ids"
            ]
            assert tok.encode_chat(tokenizer, plain[:num], opens, ChatOptions(**options)) == expected
    (rows,) = encode_rows(tokenizer, [plain], [ChatOptions(**options)])
    assert not isinstance(rows, UserError), rows
    answers = [(row, span) for row in rows for span in row.spans]
    assert len(answers) == 2 and len(rows) == (2 if family in ("gpt-oss", "qwen3", "mistral") else 1)
    for (row, (start, end)), i in zip(answers, (1 + system, 3 + system), strict=True):
        prompt = tok.encode_chat(tokenizer, plain[:i], options=ChatOptions(**options))
        assert row.ids[:start] == prompt
        text = tokenizer.decode(row.ids[start:end])
        assert text.rstrip().endswith(
            messages[i]["content"] + ("<|endoftext|>" if family == "gpt-oss" else "<|im_end|>")
        )
        assert (messages[i]["reasoning_content"] in text) == (family in ("gpt-oss", "qwen3"))


# --- published templates, whole ---------------------------------------------------------------------------------

PUBLISHED = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
_SPECIAL = re.compile(r"<[|｜][^|｜<>'\" ]+[|｜]>|\[/?[A-Z_]+\]")
SUM: dict[str, Any] = {"name": "sum", "arguments": '{"a": [1, 2]}'}
ADDS: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "sum",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}},
    },
}
CALLED = [
    {"role": "user", "content": "What is 1 + 2?"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "abcdefghi", "type": "function", "function": SUM}]},
    {"role": "tool", "content": "3", "tool_call_id": "abcdefghi"},
    {"role": "assistant", "content": "3."},
]
# The ends of the prompts and of the answers to SAID[0] and SAID[2], and whether the answers have their thoughts.
ENDS = {
    "qwen3": ("<|im_start|>assistant\n", "<|im_end|>", True),
    "mistral_nemo": ("[/INST]", "<|im_end|>", False),  # the tiny tokenizer's eos_token
    "deepseek_r1_distill": ("<｜Assistant｜><think>\n", "<｜end▁of▁sentence｜>", True),
    "gpt_oss": ("<|start|>assistant", "<|return|>", True),
    "smollm3": ("<|im_start|>assistant\n", "<|im_end|>", False),
}


def published(load, name: str):
    """The tiny tokenizer with a published template, whose own tokens are special."""
    tokenizer = load(PUBLISHED[name])
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(_SPECIAL.findall(PUBLISHED[name])))})
    return tokenizer


def for_transformers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as transformers' documentation asks for them: arguments as objects, no content that is null."""
    changed = json.loads(json.dumps(messages))
    for message in changed:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
            message["content"] = ""
    return changed


@pytest.mark.parametrize("said", ["said", "system", "calls"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_are_rendered_as_transformers_renders_them(load, name, said):
    tokenizer = published(load, name)
    messages = {"said": SAID, "system": [{"role": "system", "content": "Be brief."}, *SAID], "calls": CALLED}[said]
    if (name, said) == ("deepseek_r1_distill", "calls"):  # with "" it would leave the call out, with null refuse it
        with pytest.raises(UserError, match="refuses this conversation: .*no attribute 'content'"):
            tok.encode_chat(tokenizer, plain_messages(messages, "x"), options=ChatOptions(tools=[ADDS]))
        return
    variables: list[dict[str, Any]] = [{}]
    if name in ("qwen3", "smollm3"):
        variables = [{"enable_thinking": thinking} for thinking in (True, False)]
    for tools in (None, [ADDS]):
        for given in variables:
            for num in range(1 + (said == "system"), len(messages) + 1):
                for opens in (True, False):
                    expected = tokenizer.apply_chat_template(
                        for_transformers(messages[:num]),
                        tools=tools,
                        add_generation_prompt=opens,
                        return_dict=False,
                        **given,
                    )
                    options = ChatOptions(tools=tools, chat_template_kwargs=given)
                    assert tok.encode_chat(tokenizer, plain_messages(messages[:num], "x"), opens, options) == expected


@pytest.mark.parametrize("tools", [None, [ADDS]], ids=["plain", "tools"])
@pytest.mark.parametrize("system", [False, True], ids=["no system", "system"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_give_each_answer_behind_its_prompt(load, name, system, tools):
    """Mistral's were refused with a system message, which the template writes into the last question alone."""
    tokenizer = published(load, name)
    messages = [{"role": "system", "content": "Be brief."}, *SAID] if system else SAID
    plain, options = plain_messages(messages, "x"), ChatOptions(tools=tools)
    (rows,) = encode_rows(tokenizer, [plain], [options])
    assert not isinstance(rows, UserError), rows
    answers = [(row, span) for row in rows for span in row.spans]
    opens, ends, has_thoughts = ENDS[name]
    for (row, (start, end)), i in zip(answers, (1 + system, 3 + system), strict=True):
        assert row.ids[:start] == tok.encode_chat(tokenizer, plain[:i], options=options)
        prompt, answer = tokenizer.decode(row.ids[:start]), tokenizer.decode(row.ids[start:end])
        assert prompt.endswith(opens) and answer.endswith(messages[i]["content"].strip() + ends)
        assert (messages[i]["reasoning_content"] in answer) == has_thoughts
        assert ("Be brief." in prompt) == system


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_templates_give_calls_as_answers_or_are_refused(load, name):
    """Calls have no content in OpenAI's form, and Qwen3's template refused them; SmolLM3's leaves them out: what was
    trained on was an empty answer."""
    tokenizer, options = published(load, name), ChatOptions(tools=[ADDS])
    (rows,) = encode_rows(tokenizer, [plain_messages(CALLED, "x")], [options])
    if name == "smollm3":
        assert "leaves out an assistant's calls of tools" in str(rows)
    elif name == "deepseek_r1_distill":
        assert "no attribute 'content'" in str(rows)
    else:
        assert not isinstance(rows, UserError), rows
        answers = [(row, span) for row in rows for span in row.spans]
        for (row, (start, end)), i, said in zip(answers, (1, 3), ('{"a": [1, 2]}', "3."), strict=True):
            assert row.ids[:start] == tok.encode_chat(tokenizer, plain_messages(CALLED[:i], "x"), options=options)
            assert said in tokenizer.decode(row.ids[start:end])


def test_without_thinking_qwen3s_answers_begin_behind_empty_thoughts(load):
    tokenizer, options = published(load, "qwen3"), {"chat_template_kwargs": {"enable_thinking": False}}
    plain = [{key: text for key, text in message.items() if key != "reasoning_content"} for message in SAID]
    for (prompt, (answer,)), text in zip(rows_of(tokenizer, plain, **options), ("So.", "Yes."), strict=True):
        assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and answer == text + "<|im_end|>"


# --- what templates are given -----------------------------------------------------------------------------------


def test_variables_of_the_template_are_given_and_unknown_ones_named(load):
    tokenizer = load(THINKING)
    for thinking, tail in ((True, ""), (False, "<think>\n\n</think>\n\n")):
        options = ChatOptions(chat_template_kwargs={"enable_thinking": thinking})
        ids = tok.encode_chat(tokenizer, SAID[:1], options=options)
        assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n" + tail)
    with pytest.raises(UserError, match=r"no variable 'thinking': leave it out \(it has: enable_thinking, thoughts\)"):
        tok.encode_chat(tokenizer, SAID[:1], options=ChatOptions(chat_template_kwargs={"thinking": 1}))
    assert templates.template_variables(MARKED) == {"messages", "add_generation_prompt"}
    with pytest.raises(UserError, match="refuses this conversation: .*endfor"):
        templates.template_variables("{% for m in messages %}{{ m }}")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tools": [{"type": "function"}]}, r"tools\[0\] is .*: give"),
        ({"tools": "sum"}, "tools is 'sum': give a list"),
        ({"tools": [{"name": "sum", "x": {1}}]}, r"tools\[0\] holds what JSON does not"),
        ({"chat_template": 5}, "chat_template is 5"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs is \[1\]"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs has tools: give it beside"),
        ({"continue_final_message": 1}, "continue_final_message is 1"),
        ({"date": "today"}, "date is 'today': give it as YYYY-MM-DD"),
        ({"date": 2024}, "date is 2024: give it as YYYY-MM-DD"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "are both True: give one"),
    ],
)
def test_options_that_are_none_or_contradict_are_one_line(options, says):
    with pytest.raises(UserError, match=says) as caught:
        ChatOptions(**options)
    assert "\n" not in str(caught.value)


def test_the_final_message_is_continued(load):
    tokenizer = load(DATED)
    ids = tok.encode_chat(tokenizer, SAID[:2], options=ChatOptions(continue_final_message=True))
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\nSo.")
    ids = tok.encode_chat(tokenizer, SAID[:1], options=ChatOptions(add_generation_prompt=False))
    assert tokenizer.decode(ids).endswith("Why?<|im_end|>")


def test_templates_are_chosen_by_name_and_by_tools(load):
    named = {"default": "{{ 'default' }}", "tool_use": "{{ 'tools' }}", "rag": "{{ 'rag' }}"}
    tokenizer = load(named)

    def text(**options):
        return tokenizer.decode(tok.encode_chat(tokenizer, SAID[:1], options=ChatOptions(**options)))

    assert (text(), text(tools=[TOOL]), text(chat_template="rag")) == ("default", "tools", "rag")
    assert text(tools=[TOOL], chat_template="default") == "default" and text(tools=[]) == "default"
    assert text(chat_template="{{ 'own' }}") == "own"
    with pytest.raises(UserError, match="named default, tool_use, rag, none of them rug: name one of them"):
        text(chat_template="rug")
    with pytest.raises(UserError, match="no chat template named 'rag'"):
        tok.encode_chat(load(DATED), SAID[:1], options=ChatOptions(chat_template="rag"))
    assert templates.template_digest(tokenizer) != templates.template_digest(load(dict(named, rag="{{ 1 }}")))


def test_the_date_is_the_one_that_was_fixed(load):
    tokenizer = load(DATED)
    today = datetime.date.today()
    expected = tok.encode_chat(tokenizer, SAID)
    dated = tok.encode_chat(tokenizer, SAID, options=ChatOptions(date=today.isoformat()))
    assert dated == expected or datetime.date.today() != today
    plain = tok.encode_chat(load("\n  {% if true %}x{% endif %}\n"), SAID)
    old = "\n  {% if true %}x{% endif %}\n{{ strftime_now('%A %-d.%m.%y %H:%M') }}"
    for templates_there, own in (({"default": old}, None), (None, old)):
        there = load(templates_there)
        ids = tok.encode_chat(there, SAID, options=ChatOptions(date="2024-02-03", chat_template=own))
        assert tokenizer.decode(ids) == tokenizer.decode(plain) + "Saturday 3.02.24 00:00"


def test_a_template_that_only_appends_gives_one_row(load):
    ((prompt, answers),) = rows_of(load(DATED.replace("m.content | trim", "m.content")), SAID)
    assert prompt.endswith("Why?<|im_end|><|im_start|>assistant\n")
    assert answers == ["So.<|im_end|>", "\n\nYes.<|im_end|>"]
    (_, calls), *rest = rows_of(load(DATED), [*ASKED, {"role": "assistant", "content": "3."}], tools=[TOOL])
    assert calls == ['sum({"a": [1, "é"]})<|im_end|>', "3.<|im_end|>"] and not rest


@pytest.mark.parametrize("messages", [SAID, inline(SAID)], ids=["fields", "inline"])
@pytest.mark.parametrize("template", ["thinking", "opened", "marked"])
def test_where_thoughts_are_dropped_every_answer_has_the_prompt_of_inference(load, template, messages):
    if template == "marked" and messages is SAID:
        messages = inline(SAID)  # it knows no other
    tokenizer = load({"thinking": THINKING, "opened": OPENED, "marked": MARKED}[template])
    rows = rows_of(tokenizer, messages)
    for (prompt, answers), i in zip(rows, (1, 3), strict=True):
        assert prompt == tokenizer.decode(tok.encode_chat(tokenizer, plain_messages(messages[:i], "x")))
        thoughts, text = ("Hm.", "So.") if i == 1 else ("Oh.", "\n\nYes." if messages is SAID else "Yes.")
        opened = "" if template == "opened" else "<think>\n"
        assert answers == [f"{opened}{thoughts}\n</think>\n\n{text}<|im_end|>"]


def test_answers_between_calls_of_tools_keep_their_thoughts_and_their_row(load):
    messages = [
        ASKED[0],
        CALL | {"reasoning_content": "Sum."},
        ASKED[2],
        {"role": "assistant", "content": "3."},
        *SAID[:2],
    ]
    (_, first), (prompt, last) = rows_of(load(THINKING), messages, tools=[TOOL])
    assert first == [
        '<think>\nSum.\n</think>\n\n<tool_call>\n{"name": "sum", "arguments": {"a": [1, "é"]}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\n3.<|im_end|>",
    ]
    assert "Sum." not in prompt and last == ["<think>\nHm.\n</think>\n\nSo.<|im_end|>"]


def test_rows_are_grouped_by_their_options_and_come_in_order(load):
    tokenizer = load(THINKING)
    chats = [plain_messages([{"role": "user", "content": str(i)}, SAID[1]], "x") for i in range(4)]
    tools = [ChatOptions(tools=[TOOL] if i % 2 else None) for i in range(4)]
    texts = [tokenizer.decode(rows[0].ids) for rows in encode_rows(tokenizer, chats, tools) if isinstance(rows, list)]
    assert [text.startswith("<|im_start|>system") for text in texts] == [False, True, False, True]
    assert all(f"user\n{i}<|im_end|>" in text for i, text in enumerate(texts))


def test_thoughts_that_no_message_has_are_refused(load):
    plain = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    (error,) = encode_rows(load(OPENED), [plain], [ChatOptions()])
    assert isinstance(error, UserError) and "without stable prefixes" in str(error)
    (rows,) = encode_rows(load(DATED), [plain[:1]], [ChatOptions()])
    assert rows == [Chat(tok.encode_chat(load(DATED), plain[:1], False), [])]


def test_newlines_that_merge_with_the_header_count_to_the_answer(tmp_path):
    """They were dropped as refused by the template: the header's newline and the answer's are one token."""
    from tests.targets.test_tokenizer import CHATML, VOCAB, load_with

    tokenizer = load_with(tmp_path, CHATML)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "\n\nhello"}]
    ids, ((start, end),) = tok.prefix_spans(tokenizer, messages)
    assert ids[start:end] == [VOCAB.index("ĊĊ"), VOCAB.index("Ċ"), VOCAB.index("hello"), 2]
    assert ids[:start] == tok.encode_chat(tokenizer, messages[:1])[:start]
    (rows,) = encode_rows(tokenizer, [messages], [ChatOptions()])
    assert isinstance(rows, list) and rows[0].spans == [(start, end)]
