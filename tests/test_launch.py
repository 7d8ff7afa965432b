"""The scripts of launch/: clean by their linters, and their dry runs are what docs/launch.md shows."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from itool_jax import config
from itool_jax.main import PREEMPTED
from itool_jax.system.hosts import LOST
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.launch

LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
SBATCH = sorted(LAUNCH.glob("slurm*.sh"))
IMAGES = sorted(LAUNCH.glob("Dockerfile.*"))

SBATCH_OPTIONS = set(
    """
    account array bb bbf begin chdir cluster-constraint clusters comment constraint container contiguous core-spec
    cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot dependency distribution error exclude
    exclusive export export-file extra-node-info get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket
    gpus-per-task gres gres-flags hold ignore-pbs input job-name licenses mail-type mail-user mcs-label mem mem-per-cpu
    mem-per-gpu mincpus nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-node
    ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power priority profile propagate qos
    quiet reboot requeue reservation signal sockets-per-node spread-job switches thread-spec threads-per-core time
    time-min tmp tres-per-task uid use-min-nodes verbose wait wait-all-nodes wckey
    """.split()
)
"""Options of sbatch that a script may hold, as Slurm 22.05 and later know them."""


class Example(NamedTuple):
    """A dry run that the documentation shows, and what it prints."""

    command: str
    output: list[str]


def examples() -> list[Example]:
    text = (REPOSITORY / "docs/launch.md").read_text()
    blocks = re.findall(r"```console\n\$ (.*DRY_RUN=1.*)\n((?:.+\n)*)```", text)
    return [Example(command, output.splitlines()) for command, output in blocks]


EXAMPLES = examples()


def script_of(command: str) -> str:
    return next(word for word in command.split() if word.startswith("launch/"))


def dry_run(command: str, folder: Path) -> list[str]:
    """What the command prints in a folder of its own that has launch/."""
    (folder / "launch").symlink_to(LAUNCH)
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", [*SCRIPTS, REPOSITORY / ".ci/run"], ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path: Path):
    if not shutil.which("shellcheck"):
        pytest.skip("needs shellcheck: pip install -e '.[dev]'")
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_hadolint_finds_nothing(path: Path):
    if not shutil.which("hadolint"):
        pytest.skip("needs hadolint: pip install -e '.[dev]'")
    done = subprocess.run(["hadolint", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.name)
def test_images_copy_what_the_package_is_built_from(path: Path):
    lines = [line.split() for line in path.read_text().splitlines()]
    copied = [word for words in lines if words[:1] == ["COPY"] for word in words[1:-1]]
    assert sorted(copied) == ["LICENSE", "README.md", "configs", "itool_jax", "pyproject.toml"]
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert all((REPOSITORY / name).exists() and f"!{name}" in ignored for name in copied)


def test_every_script_has_a_dry_run_in_the_documentation():
    assert {script_of(example.command) for example in EXAMPLES} == {f"launch/{path.name}" for path in SCRIPTS}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: script_of(example.command))
def test_a_dry_run_prints_what_the_documentation_shows(example: Example, tmp_path: Path):
    printed = dry_run(example.command, tmp_path)
    assert sorted(printed) == sorted(example.output)  # processes.sh starts them at once, in no order
    for arguments in (arguments for line in printed for arguments in commands(line)):
        config.parse([word for word in arguments if "config.yaml" not in word])  # every setting exists


def commands(line: str) -> list[list[str]]:
    """The arguments of each of our own commands in a line, also where it stands in another's argument."""
    words = shlex.split(line)
    if "itool_jax.main" in words:
        return [words[words.index("itool_jax.main") + 1 :]]
    inner = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    return [arguments for word in inner for arguments in commands(word)]


# Slurm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_sbatch_knows_what_a_script_asks_for(path: Path):
    lines = path.read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    body = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert options
    assert not any(line.startswith("#SBATCH") for line in lines[body:])  # sbatch reads none after the first command
    for line in options:
        name = re.fullmatch(r"--([a-z-]+)(=\S+)?", line)
        assert name, line
        assert name[1] in SBATCH_OPTIONS, line
    assert {"--requeue", "--open-mode=append"} <= set(options)
    assert any(re.fullmatch(r"--signal=TERM@\d+", line) for line in options)  # to the processes, not to the shell


AGAIN = [(0, False), (2, False), (PREEMPTED, True), (LOST, True), (137, True)]


@pytest.mark.parametrize(("code", "again"), AGAIN)
@pytest.mark.parametrize("path", SBATCH, ids=lambda path: path.name)
def test_a_slurm_job_is_queued_again_where_that_may_help(path: Path, code: int, again: bool, tmp_path: Path):
    """With stand-ins for srun and scontrol, which need a cluster; docs/launch.md tells what a real one did."""
    for name, body in (("srun", f"exit {code}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "8", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    grid = [str(tmp_path), "demo", "0 1"] if "array" in path.name else []
    done = subprocess.run([str(path), *grid], env=environment, capture_output=True, text=True)
    assert done.returncode == code
    asked = tmp_path / "asked"
    assert asked.exists() == again
    if again:
        assert asked.read_text().split() == ["requeue", "7_1" if grid else "8"]


# Kubernetes -------------------------------------------------------------------------------------------------


def test_kubernetes_takes_the_manifests(tmp_path: Path):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="needs: pip install -e '.[dev]'")
    for job in rendered(tmp_path)["spec"]["replicatedJobs"]:
        assert job.keys() <= {"name", "groupName", "template", "replicas", "dependsOn"}
        whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}, **job["template"]}
        kubernetes.validate(whole, "1.33", strict=True)
    kubernetes.validate(yaml.safe_load((LAUNCH / "gke_storage.yaml").read_text()), "1.33", strict=True)


def test_the_jobset_restarts_what_was_asked_to_stop_without_end(tmp_path: Path):
    jobset = rendered(tmp_path)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert re.fullmatch("[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule.pop("name"))
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["backoffLimit"] == 0
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # a policy for failed pods goes with no other
    conditions, codes = spec["podFailurePolicy"]["rules"]
    assert conditions == {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    (container,) = spec["template"]["spec"]["containers"]
    wanted = {"containerName": container["name"], "operator": "In", "values": [PREEMPTED]}
    assert codes == {"action": "FailJob", "onExitCodes": wanted}


def test_the_processes_of_a_jobset_find_each_other(tmp_path: Path):
    jobset = rendered(tmp_path, "--data=/runs/it's 8 & more.jsonl")
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2
    (container,) = spec["template"]["spec"]["containers"]
    parsed = config.parse([argument.replace("$(PROCESS)", "1") for argument in container["args"]])
    assert parsed.data == "/runs/it's 8 & more.jsonl"
    name = jobset["metadata"]["name"]
    host = f"{name}-{job['name']}-0-0.{name}"  # the set's, the job's, the number of the job, that of its pod
    assert parsed.distributed.coordinator_address == f"{host}:{container['ports'][0]['containerPort']}"
    assert (parsed.distributed.num_processes, parsed.distributed.process_id) == (2, 1)
    assert any(variable["name"] == "PROCESS" for variable in container["env"])
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_a_jobset_without_settings_passes_none(tmp_path: Path):
    dry_run("DRY_RUN=1 launch/gke.sh mine 2 registry/itool:cuda", tmp_path)
    (job,) = yaml.safe_load((tmp_path / "mine.yaml").read_text())["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    assert all(argument.startswith("--") for argument in container["args"])


def test_a_script_that_is_given_what_cannot_be_says_so(tmp_path: Path):
    (tmp_path / "launch").symlink_to(LAUNCH)
    bash = shutil.which("bash")
    assert bash
    for command in ("gke.sh My_Run 2 IMAGE", "gke.sh mine 0 IMAGE", "processes.sh x", "gpu_node.sh --help"):
        done = subprocess.run([bash, *f"launch/{command}".split()], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2, command
        assert done.stderr.startswith("# "), command
    alone = subprocess.run(
        [bash, "launch/gpu_node.sh", "a"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": ""}
    )
    assert (alone.returncode, alone.stderr) == (2, "nvidia-smi not found: set GPUS\n")
    assert [path.name for path in tmp_path.iterdir()] == ["launch"]


@pytest.mark.parametrize("name", ["gke", "gpu_node", "processes", "slurm_array", "tpu_pod", "xpk"])
def test_a_script_that_is_given_too_little_says_how_it_is_used(name: str, tmp_path: Path):
    done = subprocess.run(["bash", LAUNCH / f"{name}.sh"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"launch/{name}.sh" in done.stderr


def rendered(folder: Path, *settings: str) -> dict[str, Any]:
    """The manifest that launch/gke.sh writes for two nodes."""
    command = ["launch/gke.sh", "mine", "2", "registry/itool:cuda", "--config=models/llama3.1-8b", *settings]
    assert dry_run(f"DRY_RUN=1 {shlex.join(command)}", folder) == ["kubectl apply -f mine.yaml"]
    return yaml.safe_load((folder / "mine.yaml").read_text())
