"""What an installation needs: declared packages, extras that decoding does without, one address of the repository."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import fasteagle_jax
from fasteagle_jax.commands.terminal import EXTRAS

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DISTRIBUTIONS = {"orbax": "orbax-checkpoint"}  # of modules named otherwise


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=; ]", requirement)[0] for requirement in requirements}


def test_every_package_that_is_imported_is_declared():
    extras = {extra: names(requirements) for extra, requirements in PROJECT["optional-dependencies"].items()}
    extras["train"] |= extras["plot"]  # by name
    for path in Path(fasteagle_jax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for package in {str(module).partition(".")[0] for module in modules}:
                if package in sys.stdlib_module_names | {"fasteagle_jax", "torch", "llama_cpp"}:
                    continue  # `fasteagle import` and `bench --beside` ask for these where they need them
                declared = extras[EXTRAS[package]] if package in EXTRAS else names(PROJECT["dependencies"])
                assert DISTRIBUTIONS.get(package, package) in declared, f"{path} imports {package}"


BLOCK = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(EXTRAS)}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def test_decoding_needs_no_extra():
    code = "for module in sys.argv[1:]: importlib.import_module('fasteagle_jax.' + module)"
    verbs = ("generate", "chat", "batch", "demo", "bench", "compile_check")
    command = [sys.executable, "-c", BLOCK + code, "engine.engine", *(f"commands.{verb}" for verb in verbs)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (["train", "--help"], "error: orbax is not installed: pip install 'fasteagle-jax[train]'"),
        pytest.param(
            ["bench", "--tasks", "x.csv", "--drafters", "simulated=0.5", "--results", "new"],
            "error: matplotlib is not installed: pip install 'fasteagle-jax[plot]'",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_missing_package_is_one_line_with_its_extra(words, said):
    code = "from fasteagle_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", BLOCK + code, *words], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == said, done.stderr


def test_the_repositorys_address_stands_in_one_place():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("train/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    clones = [line for path in documents for line in path.read_text().splitlines() if "git clone" in line]
    assert clones and all("git clone REPOSITORY fasteagle-jax" in line for line in clones)
    address = PROJECT["urls"]["Repository"]
    assert not [path for path in documents if address in path.read_text()]


def test_the_conda_recipe_asks_for_what_pip_does():
    recipe = yaml.safe_load((ROOT / "conda" / "recipe.yaml").read_text())
    assert recipe["package"] == {"name": PROJECT["name"], "version": PROJECT["version"]}
    assert recipe["build"]["python"]["entry_points"] == [f"{k} = {v}" for k, v in PROJECT["scripts"].items()]
    about = {"homepage": PROJECT["urls"]["Repository"], "license": PROJECT["license"], "license_file": "LICENSE"}
    assert recipe["about"] == {**about, "summary": PROJECT["description"]}
    epath = {each for each in requires("etils") or () if re.search(r"extra == .epath.$", each)}
    of_epath = names(sorted(epath)) - {"etils"}  # conda has no extras
    asked = {re.sub(r"\[.*\]", "", each).replace(">=", " >=") for each in PROJECT["dependencies"]}
    python = f"python {PROJECT['requires-python']}".replace("3.11", "${{ python_min }}")
    assert set(recipe["requirements"]["run"]) == {python, *asked, *of_epath}
    assert recipe["context"]["python_min"] == PROJECT["requires-python"].removeprefix(">=")


def test_the_constraints_name_a_version_of_every_package_that_is_asked_for():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    versions = dict(line.lower().split("==") for line in lines)
    assert "torch" not in versions
    extras = PROJECT["optional-dependencies"]
    for asked in [
        *PROJECT["dependencies"],
        *extras["train"],
        *extras["plot"],
        *extras["grammar"],
        *extras["test-light"],
    ]:
        requirement = Requirement(asked)
        if requirement.name != PROJECT["name"]:
            assert requirement.specifier.contains(versions[requirement.name.lower()]), asked
