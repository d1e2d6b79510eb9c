"""The files for Google Cloud in examples/, as far as they can be held to what they mean without running them."""

from __future__ import annotations

import math
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from fasteagle_jax.cli import VERBS, main

EXAMPLES = Path(__file__).parents[2] / "examples"
CHIPS_A_HOST = 4


def test_the_job_set_runs_one_slice_whose_hosts_are_all_its_pods():
    jobs = yaml.safe_load((EXAMPLES / "train_jobset.yaml").read_text())
    assert (jobs["apiVersion"], jobs["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobs["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert set(jobs["spec"]) == {"failurePolicy", "replicatedJobs"} and jobs["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = jobs["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"} and replicated["replicas"] == 1
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    hosts = math.prod(map(int, topology.split("x"))) // CHIPS_A_HOST
    assert job["parallelism"] == job["completions"] == hosts and job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    chips = {"google.com/tpu": CHIPS_A_HOST}
    assert container["resources"] == {"requests": chips, "limits": chips}
    (script,) = container["args"]
    assert container["command"] == ["bash", "-c"]
    words = shlex.split(next(line for line in script.replace("\\\n", " ").splitlines() if "fasteagle" in line))
    assert "--distributed" in words and (EXAMPLES.parent / words[words.index("--config") + 1]).exists()
    assert words[words.index("--run") + 1] + "/drafter" in script


@pytest.mark.parametrize("outcome", ["finished", "stopped", "failed"])
def test_the_jobs_script_succeeds_if_the_drafter_is_there_alone(outcome, tmp_path):
    """SIGTERM on the way reaches the run, whose exit code 0 then does not end the job."""
    jobs = yaml.safe_load((EXAMPLES / "train_jobset.yaml").read_text())
    script = jobs["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]["args"][0]
    run = {"finished": f"mkdir {tmp_path}/drafter", "stopped": "sleep 60 >&- 2>&- & wait", "failed": "exit 3"}[outcome]
    stop = "kill -TERM $PPID; " if outcome == "stopped" else ""
    (tmp_path / "fasteagle").write_text(f"#!/bin/bash\ntrap 'echo saved; exit 0' TERM\n{stop}{run}\n")
    (tmp_path / "fasteagle").chmod(0o755)
    (tmp_path / "python").write_text(f"#!/bin/bash\ntest -e {tmp_path}/drafter\n")
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=50
    )
    assert (done.returncode == 0) == (outcome == "finished"), done
    assert ("saved" in done.stdout) == (outcome == "stopped")


@pytest.mark.parametrize("name", ["ray_tpu_cluster.yaml", "train_jobset.yaml"])
def test_commands_in_the_files_have_the_options_that_they_are_given(name, capsys):
    text = re.sub(r"\\\n#?", " ", (EXAMPLES / name).read_text())
    commands = [shlex.split(line.replace("'", " ")) for line in re.findall(r"fasteagle (?!-)([^`\n]*)", text)]
    commands = [words for words in commands if words and words[0] in VERBS]
    assert commands
    for verb, *words in commands:
        assert main([verb, "--help"]) == 0
        known = set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))
        assert {word for word in words if word.startswith("--")} <= known
