"""Optionally sends a run's metrics to TensorBoard and Weights & Biases, besides `metrics.jsonl`.

In: groups of numbers by name, each at a step. Out: `tensorboard/` and `wandb/` in the run directory. The metrics of a
training step are grouped by phase, at that step. The figures of a stage are grouped by stage, with the phase as the
step: 0 the base, 1 the warm-up, then the iterations.
"""

import dataclasses
import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from itool_jax.system.untrusted import one_line

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Trackers to use besides metrics.jsonl and log.jsonl, which are always written."""

    tensorboard: bool = False
    """Write TensorBoard event files to tensorboard/ in the run directory; needs `pip install tensorboardX`."""
    wandb: bool = False
    """Log to Weights & Biases, in the project named by WANDB_PROJECT; needs `pip install wandb`. The key comes from
    `wandb login` or WANDB_API_KEY. With WANDB_MODE=offline, everything stays in the run directory."""


@runtime_checkable
class Tracker(Protocol):
    """A destination for metrics."""

    def write(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Writes the numbers of a group at a step."""
        ...

    def close(self) -> None:
        """Waits until everything is written."""
        ...


def require(settings: LogSettings) -> None:
    """Raises ValueError if a package that the settings need is not installed."""
    for name, package in PACKAGES.items():
        if getattr(settings, name) and importlib.util.find_spec(package) is None:
            raise ValueError(f"log.{name} needs a package that is not installed; run: pip install {package}")


def open_trackers(settings: LogSettings, folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Opens the trackers that `settings` enables, for the run in `folder` with settings `config`."""
    trackers: list[Tracker] = []
    if settings.tensorboard:
        trackers.append(_TensorBoard(folder / "tensorboard"))
    if settings.wandb:
        trackers.append(_Wandb(folder, config))
    return trackers


class _TensorBoard:
    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter  # an optional package

        self.writer = SummaryWriter(str(folder), flush_secs=30)

    def write(self, group: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any]):
        import wandb  # an optional package

        # environment.json already records the machine and the command line, without secrets.
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True)
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "itool_jax"),
                dir=str(folder),
                name=folder.name,
                id=_run_id(folder / "wandb" / "id"),
                resume="allow",
                config=dict(config),
                settings=quiet,
            )
        except wandb.Error as error:
            raise ValueError(f"log.wandb: {one_line(error)}; run `wandb login`, or set WANDB_MODE=offline") from error
        self.groups: set[str] = set()

    def write(self, group: str, step: int, values: Mapping[str, float]) -> None:
        if group not in self.groups:  # each group has its own step counter
            self.groups.add(group)
            self.run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self.run.log({f"{group}/step": step} | {f"{group}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self.run.finish()


def _run_id(path: Path) -> str:
    """Returns one ID for all commands on a run directory, so that they continue the same run."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
