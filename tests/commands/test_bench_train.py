"""`fasteagle bench-train`: tokens a second of train steps, in turns."""

from __future__ import annotations

from pathlib import Path

from fasteagle_jax.commands.bench_train import main

CONFIG = Path(__file__).parent.parent.parent / "configs" / "tiny.py"


def test_a_row_for_each_way_with_its_ratio_to_the_first(target_folder, capsys):
    words = ["--config", str(CONFIG), "--steps", "1", "--repeats", "2", f"target={target_folder}", "length=32"]
    assert main([*words, "--against", "loss.share=1 loss.chunk=64"]) == 0
    said = capsys.readouterr().out
    first, second = (line for line in said.splitlines() if " to " in line and "min to max" not in line)
    assert "as configured" in first and first.count("(") == 1
    assert "loss.share=1 loss.chunk=64" in second and second.count("(") == 2


def test_mistakes_are_one_line(complaint, target_folder):
    said = complaint(main, "--config", CONFIG, f"target={target_folder}", "--against", "loss.shape=1")
    assert "loss.shape is not a key" in said
