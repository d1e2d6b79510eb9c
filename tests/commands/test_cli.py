from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fasteagle_jax.cli import VERBS, main
from fasteagle_jax.commands.terminal import program


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert all(f"  {verb} " in help_text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb, capsys):
    assert main([verb, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"usage: fasteagle {verb}")


@pytest.mark.parametrize("verb", ["prepare-data", "prepare-features", "generate", "chat", "bench", "bench-train"])
def test_the_examples_of_the_help_are_understood(verb, capsys):
    import importlib
    import shlex

    module = importlib.import_module(f"fasteagle_jax.commands.{VERBS[verb][0]}")
    _, _, examples = (module.__doc__ or "").partition("example")
    lines = [line for line in examples.replace("\\\n", " ").splitlines() if line.strip().startswith("fasteagle ")]
    assert lines
    for line in lines:
        assert shlex.split(line)[1] == verb
        module._parser().parse_args(shlex.split(line)[2:])


def test_an_unknown_verb_is_one_line(complaint):
    assert "no verb 'fly'" in complaint(main, "fly")
    assert "no verb: give one of" in complaint(main)


def test_an_unknown_option_is_one_line(complaint):
    assert "--wings" in complaint(main, "generate", "--prompt", "a", "--wings")


def test_help_needs_no_jax():
    """`fasteagle --help` answers at once: nothing heavy is imported for it."""
    code = "import sys; from fasteagle_jax.cli import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    "program",
    ["train.prepare_data", "train.prepare_features", "train.drafter", "infer.generate", "infer.chat", "infer.bench"],
)
def test_a_program_beside_the_package_is_its_command(program):
    import importlib

    module = importlib.import_module(program)
    assert module.main.__module__.startswith("fasteagle_jax.commands.")


@pytest.mark.parametrize("given, folder", [(None, "compiled"), ("elsewhere", "elsewhere")])
def test_programs_keep_what_they_compile_unless_a_folder_is_set(given, folder, tmp_path, monkeypatch):
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("FASTEAGLE_CACHE", str(tmp_path))
    try:
        for keeps_compiled in (False, True):
            jax.config.update("jax_compilation_cache_dir", given)
            assert program(lambda argv: 0, keeps_compiled)([]) == 0
            found = jax.config.jax_compilation_cache_dir
            if given is None and keeps_compiled:
                assert Path(found).parent == tmp_path / folder
            else:
                assert found == given
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
