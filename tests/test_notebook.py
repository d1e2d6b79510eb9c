"""The notebook runs from top to bottom, here on a tiny model, and is kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_folder import make_drafter, make_target

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "fasteagle_colab.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text())["cells"]


def test_the_notebook_is_kept_free_of_outputs(cells):
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    for i, cell in enumerate(code[1:], 2):  # the first one has magics
        compile("".join(cell["source"]), f"cell {i}", "exec")


@pytest.mark.slow
def test_every_cell_runs(cells, tmp_path, monkeypatch, capsys):
    """Magics, which only the first cell has, install what is installed here."""
    target = make_target(tmp_path / "target", stop_rate=-4)
    monkeypatch.setenv("FASTEAGLE_TARGET", str(target))
    monkeypatch.setenv("FASTEAGLE_DRAFTER", str(make_drafter(tmp_path / "drafter", target)))
    monkeypatch.setenv("MPLBACKEND", "agg")
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    magics = [line for source in sources for line in source.splitlines() if line.lstrip().startswith(("%", "!"))]
    assert magics == ['%pip install --quiet "{SOURCE}[plot]"'] and magics[0] in sources[0]
    shown = []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: shown.append(1))
    namespace: dict = {"__name__": "__main__"}
    for i, source in enumerate(sources):
        exec(compile(source.replace(magics[0], ""), f"cell {i}", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "speculative" in printed and "tokens a target pass" in printed and shown
    assert len(namespace["answers"]) == 10 and all(answer.tokens for answer in namespace["answers"])
