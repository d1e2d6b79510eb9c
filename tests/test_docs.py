"""What documents show: their Python compiles, their commands have these options, their links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest
from tiny_folder import make_target

from fasteagle_jax import SamplingParams
from fasteagle_jax.cli import VERBS, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS += [ROOT / "train" / "README.md", ROOT / "train" / "answers" / "README.md"]
FORMS = ("--predict", "--cost")  # of bench
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_VERB_OF = {"chat": "chat", "bench": "bench", "demo": "demo", "drafter": "train", "prepare_data": "prepare-data"}


def blocks(path: Path, language: str) -> list[str]:
    """The code blocks of a language, "" for those without one."""
    return [code for name, code in _BLOCK.findall(path.read_text()) if name == language]


def commands(path: Path) -> list[list[str]]:
    """The words of each `fasteagle VERB ...` and `python -m train.X ...` in a document, the verb first."""
    found = []
    for code in blocks(path, ""):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 else line.split()
            for i, word in enumerate(words):
                if word == "fasteagle" and i + 1 < len(words) and words[i + 1] in VERBS:
                    found.append(words[i + 1 :])
                elif re.fullmatch(r"(train|infer)\.\w+", word) and words[i - 1] == "-m":
                    name = word.partition(".")[2]
                    found.append([_VERB_OF.get(name, name.replace("_", "-")), *words[i + 1 :]])
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_in_documents_compiles_and_what_it_imports_is_there(path: Path) -> None:
    for code in blocks(path, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fasteagle_jax"):
                assert {alias.name for alias in node.names} <= names_of(node.module), ast.unparse(node)


def names_of(module: str) -> set[str]:
    """What a module offers; integrations are read, since importing them takes packages that few installations have."""
    if not module.startswith("fasteagle_jax.integrations."):
        loaded = importlib.import_module(module)
        return {*dir(loaded), *getattr(loaded, "__all__", ())}
    body = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text()).body
    return {node.name for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.name)
def test_python_in_documents_runs_from_top_to_bottom(path: Path, tmp_path, monkeypatch, capsys) -> None:
    """On a tiny target in place of the real one."""
    monkeypatch.chdir(tmp_path)
    target = make_target(tmp_path / "target")
    Path("prompts.txt").write_text("The sky is\n\nA poem about the sea\n")  # one line is empty but for its end
    namespace: dict = {"__name__": "__main__"}
    for code in blocks(path, "python"):
        if "fasteagle_jax.integrations" in code:
            continue  # of an extra: tests/integrations
        exec(compile(code.replace("smollm2-135m", str(target)), path.name, "exec"), namespace)
    assert capsys.readouterr().out and namespace["answer"].tokens


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_have_the_options_that_they_are_given(path: Path, capsys) -> None:
    for verb, *words in commands(path):
        # Some verbs have a form of their own behind a first option.
        for form in ([], *([option, "x"] for option in FORMS if option in words)):
            assert main([verb, *form, "--help"]) == 0
        known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= known, f"{path.name}: {verb} has no {', '.join(sorted(used - known))}"


# Of vllm/sampling_params.py at the commit that docs/engine.md names; those that begin with "_" are its own.
VLLM_FIELDS = re.findall(
    r"\w+",
    """
    n presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop stop_token_ids
    ignore_eos max_tokens min_tokens logprobs prompt_logprobs prompt_logprob_token_ids prompt_logprob_start
    logprob_token_ids flat_logprobs detokenize skip_special_tokens spaces_between_special_tokens
    include_stop_str_in_output output_kind stream_interval skip_clone output_text_buffer_length structured_outputs
    logit_bias allowed_token_ids extra_args bad_words skip_reading_prefix_cache thinking_token_budget
    repetition_detection routed_experts_prompt_start trace_decode_token_ids
    """,
)


def test_every_field_of_vllms_sampling_params_is_in_the_table_and_those_that_are_the_same_are_ours() -> None:
    rows = re.findall(r"^\| (`.*?) \| (.*) \|$", (ROOT / "docs" / "engine.md").read_text(), re.MULTILINE)
    said = {name: there for names, there in rows for name in re.findall(r"`(\w+)`", names)}
    assert {name for name in VLLM_FIELDS if name not in said} == set()
    ours = {field.name for field in dataclasses.fields(SamplingParams)}
    same = {name for name in VLLM_FIELDS if name in ours}
    absent = {name for name in VLLM_FIELDS if said[name].startswith("not there")}
    assert same >= {name for name in VLLM_FIELDS if said[name].startswith("same")} and not same & absent
    assert set(VLLM_FIELDS) - same - absent == {"max_tokens", "output_kind", "stream_interval"}  # other names


def test_the_documents_show_commands_of_most_verbs() -> None:
    shown = {words[0] for path in DOCUMENTS for words in commands(path)}
    assert shown <= set(VERBS) and len(shown) > len(VERBS) // 2


def test_every_page_is_on_the_site_and_every_link_leads_somewhere() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert pages and all(f": {page}\n" in site for page in pages)
    for path in DOCUMENTS:
        for link in re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / link).exists(), f"{path.name} has a link to {link}"
