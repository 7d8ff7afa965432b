"""Several processes, each a host of its own here: they come to what one does, stop together, and name who is gone."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from itool_jax.main import PREEMPTED, main
from itool_jax.system import hosts
from tests.conftest import FAST_COMPILER, REPOSITORY, read
from tests.runs import ITERATIONS, Made

PATIENCE = 9
TIMEOUT = 900.0


class Processes:
    """A command as several processes, each with one device of its own."""

    def __init__(self, count: int, folder: Path, *arguments: str, code: str | None = None):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment = os.environ | {"XLA_FLAGS": FAST_COMPILER}
        self.folder, self.started = folder, time.monotonic()
        self.children = [
            subprocess.Popen(
                [
                    *(sys.executable, *(["-m", "itool_jax.main"] if code is None else ["-c", code])),
                    *(f"--run_dir={folder}", *arguments),
                    *(f"--distributed.coordinator_address=localhost:{port}", f"--distributed.num_processes={count}"),
                    *(f"--distributed.process_id={i}", f"--distributed.heartbeat_timeout={PATIENCE}"),
                ],
                cwd=REPOSITORY,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(count)
        ]

    def await_line(self, text: str) -> None:
        """Until the log of the run says so."""
        log = self.folder / "log.jsonl"
        while not (log.exists() and text in log.read_text()):
            assert time.monotonic() - self.started < TIMEOUT, f"the log never says {text}"
            assert all(child.poll() is None for child in self.children), self.end()
            time.sleep(0.02)

    def end(self) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each."""
        outputs = [child.communicate(timeout=TIMEOUT) for child in self.children]
        return [(child.returncode, *output) for child, output in zip(self.children, outputs, strict=True)]


@pytest.fixture
def processes() -> Iterator[list[Processes]]:
    """Where a test puts its processes: they are gone when it is over."""
    started: list[Processes] = []
    yield started
    for child in (child for group in started for child in group.children):
        child.kill()
        child.communicate()


def iterate(processes: list[Processes], count: int, made: Made, folder: Path, *changes: str) -> Processes:
    processes.append(Processes(count, folder, "--stage=iterate", *made.settings, *changes))
    return processes[-1]


def assert_equal(made: Made, folder: Path) -> None:
    """The same pairs as a run of one process, and within 1e-5 the same losses."""
    for number in range(1, ITERATIONS + 1):
        ours, wanted = (read(run / f"iteration_{number}/pairs.jsonl") for run in (folder, made.folder))
        for key in ("id", "prompt", "chosen_ids", "rejected_ids", "visits_chosen", "visits_rejected"):
            assert [row[key] for row in ours] == [row[key] for row in wanted]
    ours, wanted = (read(run / "metrics.jsonl") for run in (folder, made.folder))
    assert [(row["stage"], row["step"]) for row in ours] == [(row["stage"], row["step"]) for row in wanted]
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, wanted, strict=True)]
    print(f"{len(ours)} losses, the largest difference {max(differences):.1e}")
    assert max(differences) <= 1e-5


# Equal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "mesh"),
    [
        (2, "--mesh.data=0"),
        pytest.param(4, "--mesh.data=0", marks=pytest.mark.slow),
        pytest.param(2, "--mesh.fsdp=2", marks=pytest.mark.slow),  # no host holds the model: all search together
        pytest.param(4, "--mesh.tensor=4", marks=pytest.mark.slow),
    ],
)
@pytest.mark.processes
def test_several_processes_come_to_what_one_does(
    made: Made, tmp_path: Path, processes: list[Processes], count: int, mesh: str
):
    ended = iterate(processes, count, made, tmp_path / "run", mesh).end()
    assert [code for code, *_ in ended] == [0] * count, ended
    assert_equal(made, tmp_path / "run")
    # Only the first reports, and nobody leaves anything behind.
    assert "Done. Open" in ended[0][2]
    assert not any("evaluate base" in out + err or "iteration_1" in out + err for _, out, err in ended[1:])
    names = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (tmp_path / "run", made.folder)]
    assert {name for name in names[0] ^ names[1] if "weights" not in name} == set()


@pytest.mark.slow
@pytest.mark.processes
def test_a_run_of_four_processes_goes_on_with_two(made: Made, tmp_path: Path, processes: list[Processes]):
    four = iterate(processes, 4, made, tmp_path / "run", "--mesh.data=0", "--warmup.checkpoint_every=1")
    four.await_line("warm-up, easy_to_hard")
    four.children[2].send_signal(signal.SIGTERM)  # one is told, all stop
    assert [code for code, *_ in four.end()] == [PREEMPTED] * 4
    two = iterate(processes, 2, made, tmp_path / "run", "--mesh.data=0", "--warmup.checkpoint_every=1")
    assert [code for code, *_ in two.end()] == [0, 0]
    assert_equal(made, tmp_path / "run")


# Gone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("victim", "number", "said"),
    [
        (1, signal.SIGKILL, "process 1 on"),
        pytest.param(1, signal.SIGSTOP, "process 1 on", marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, "process 0", marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, "process 0", marks=pytest.mark.slow),
    ],
)
@pytest.mark.processes
def test_a_process_that_dies_or_hangs_is_named(
    made: Made, tmp_path: Path, processes: list[Processes], victim: int, number: signal.Signals, said: str
):
    group = iterate(processes, 2, made, tmp_path / "run", "--mesh.data=0")
    group.await_line('"begin"')
    group.children[victim].send_signal(number)
    start, other = time.monotonic(), group.children[1 - victim]
    _, err = other.communicate(timeout=TIMEOUT)
    noticed = time.monotonic() - start
    print(f"{number.name} of process {victim}: noticed after {noticed:.1f} s with a timeout of {PATIENCE} s")
    assert other.returncode == hosts.LOST, err
    assert said in err.splitlines()[-1]
    assert noticed < PATIENCE + 25  # within 60 s with the default of 30


ENDING = """
import sys
from itool_jax import config
from itool_jax.system import hosts
hosts.BEAT = 0.001  # always in a call to the store
hosts.join(config.parse(["--stage=iterate", *sys.argv[1:]]).distributed)
hosts.barrier("all")
hosts.leave()
hosts.end(0)
"""


@pytest.mark.processes
def test_processes_that_end_well_are_not_torn_out_of_a_call(tmp_path: Path, processes: list[Processes]):
    processes.append(Processes(2, tmp_path, code=ENDING))
    assert [code for code, *_ in processes[-1].end()] == [0, 0]


ASKED = """
import sys, threading
from itool_jax import config
from itool_jax.system import hosts, preemption
hosts.join(config.parse(["--stage=iterate", *sys.argv[1:]]).distributed)
hosts.barrier("all")
if hosts.index() == 1:
    preemption.ask_to_stop()  # and gone before the next sign of life
    hosts.leave()
    hosts.end(75)
try:
    hosts.barrier("never")
except preemption.PreemptionError:
    hosts.leave()
    hosts.end(75)
"""
WRONG = """
import sys
from itool_jax import main
from itool_jax.system import hosts
from itool_jax.stages import iterate

def fail(*_):
    raise TypeError("a mistake of ours")

def wait(*_):
    hosts.barrier("never")

iterate.iterate = fail if "--distributed.process_id=1" in sys.argv else wait
hosts.end(main.main(sys.argv[1:]))
"""


@pytest.mark.processes
def test_who_stops_at_once_tells_the_others_first(tmp_path: Path, processes: list[Processes]):
    processes.append(Processes(2, tmp_path, code=ASKED))
    ended = processes[-1].end()
    assert [code for code, *_ in ended] == [75, 75], ended
    assert time.monotonic() - processes[-1].started < 100  # JAX itself finds it after two minutes


@pytest.mark.processes
def test_a_mistake_of_ours_in_one_is_what_the_others_end_with(made: Made, tmp_path: Path, processes: list[Processes]):
    processes.append(Processes(2, tmp_path / "run", "--stage=iterate", *made.settings, "--mesh.data=0", code=WRONG))
    ended = processes[-1].end()
    assert ended[0][0] == hosts.LOST
    assert "process 1 failed: python -m itool_jax.main: error: a mistake of ours" in ended[0][2].splitlines()[-1]
    assert "Traceback" in ended[1][2]


HANGING = """
import sys, time
from itool_jax import main
from itool_jax.system import hosts
from itool_jax.store import training
flush, steps = training._Reports.flush, 0

def hang(reports):
    global steps
    steps += 1
    if steps == 5 and hosts.index() == 1:
        time.sleep(1000)
    return flush(reports)

training._Reports.flush = hang
hosts.end(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.processes
def test_a_main_thread_that_hangs_in_a_training_is_named(made: Made, tmp_path: Path, processes: list[Processes]):
    """Its other threads go on giving signs of life."""
    processes.append(Processes(2, tmp_path / "run", "--stage=iterate", *made.settings, "--mesh.data=0", code=HANGING))
    _, err = processes[0].children[0].communicate(timeout=TIMEOUT)
    assert processes[0].children[0].returncode == hosts.LOST
    assert "process 1 on" in err.splitlines()[-1]
    assert "has been at one training step for" in err.splitlines()[-1]


@pytest.mark.processes
def test_an_error_of_one_ends_all_with_its_line(made: Made, tmp_path: Path, processes: list[Processes]):
    ended = iterate(processes, 2, made, tmp_path / "run", "--mesh.data=1").end()
    assert {code for code, *_ in ended} <= {2, hosts.LOST}  # each says its own line, or is faster to hear the other's
    assert all("must all be used; set --mesh.data=0" in err.splitlines()[-1] for *_, err in ended), ended
    (tmp_path / "run/data").mkdir(parents=True)
    (tmp_path / "run/data/card.json").write_text("{")
    (tmp_path / "run/config.yaml").write_text("seed: 0\n")
    ended = iterate(processes, 2, made, tmp_path / "run", "--mesh.data=0").end()
    assert {code for code, *_ in ended} <= {2, hosts.LOST}
    assert all("config.yaml is damaged" in err.splitlines()[-1] for *_, err in ended), ended


# Settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--distributed.num_processes=2"], "distributed.num_processes is set alone"),
        (
            ["--distributed.auto", "--distributed.process_id=0"],
            "distributed.process_id is set with distributed.auto",
        ),
        (
            [
                *("--distributed.coordinator_address=localhost:1", "--distributed.num_processes=2"),
                "--distributed.process_id=2",
            ],
            "distributed.process_id must be from 0 to num_processes - 1, got 2 of 2",
        ),
        (["--distributed.heartbeat_timeout=1"], "distributed.heartbeat_timeout must be more than 4 seconds"),
        (["--distributed.auto", "--stage=export"], "stage export needs a single process"),
        (["--distributed.auto", "--stage=generate"], "stage generate needs --output"),
    ],
)
def test_settings_that_do_not_go_together(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]):
    stage = [] if any("stage" in argument for argument in arguments) else ["--stage=iterate"]
    assert main([*stage, *arguments]) == 2
    assert line in capsys.readouterr().err


def test_one_process_meets_nobody():
    numbers = iter(range(2))
    assert [hosts.broadcast_from_primary("x", lambda: next(numbers)) for _ in range(2)] == [0, 1]
    hosts.barrier("x")
    assert hosts.decided(hosts.vote(stop=False, save=True)) == hosts.Vote(False, True)
    assert (hosts.index(), hosts.count(), hosts.is_first()) == (0, 1, True)
