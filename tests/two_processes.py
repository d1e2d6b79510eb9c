"""Two real processes of four simulated devices each, which meet over the network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_two_processes(script: str, words: Sequence[str], more: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What a Python text says on stdout and stderr, run twice, each time with these words and the options by which both
    meet; both must succeed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    # transformers imports torch for a tokenizer, which takes longer than all else that is imported.
    script = f"import sys; sys.modules['torch'] = None\n{script}"
    processes = []
    for i in range(2):
        share = ["--coordinator", f"localhost:{port}", "--num-processes", "2", "--process-id", str(i)]
        command = [sys.executable, "-c", script, *words, *share, *more]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(command, env=environment, text=True, **pipes))
    try:
        said = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()  # where one has failed, the other would wait for it for ever
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], said
    return said
