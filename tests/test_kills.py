"""Batch files and training runs that are killed at random moments end as undisturbed ones do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch", "training"])
def test_a_command_that_is_killed_again_and_again_ends_as_if_nobody_had_disturbed_it(name):
    """In a process of its own, which forks: this one has threads."""
    command = [sys.executable, TESTS / "kills.py", "--seed", "1", "--kills", "6", "--only", name]
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"^{name}, seed 1: 6 kills, .*; 0 failed", done.stdout, re.MULTILINE), done.stdout
