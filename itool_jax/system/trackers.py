"""Where a run's numbers go besides `metrics.jsonl`, when asked: TensorBoard and Weights & Biases.

In: groups of numbers by name, each at a step. Out: `tensorboard/` and `wandb/` in the run directory. The numbers of a
training step form the group of its phase, at the step; the figures of a stage form the group of the stage, at the
phase: 0 the base, 1 the warm-up, then the iterations.
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
    """Where numbers go besides metrics.jsonl, which is always written, as log.jsonl is."""

    tensorboard: bool = False
    """Write TensorBoard's event files to tensorboard/ in the run directory; needs `pip install tensorboardX`."""
    wandb: bool = False
    """Log to Weights & Biases, under the project that WANDB_PROJECT names; needs `pip install wandb`. The key comes
    from `wandb login` or WANDB_API_KEY; with WANDB_MODE=offline all stays in the run directory."""


@runtime_checkable
class Tracker(Protocol):
    """What takes numbers."""

    def write(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a group at a step."""
        ...

    def close(self) -> None:
        """Waits until all is written."""
        ...


def require(settings: LogSettings) -> None:
    """ValueError where a package that the settings need is not installed."""
    for name, package in PACKAGES.items():
        if getattr(settings, name) and importlib.util.find_spec(package) is None:
            raise ValueError(f"log.{name} needs a package that is not installed; run: pip install {package}")


def open_trackers(settings: LogSettings, folder: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """Those that the settings ask for, for the run in `folder` of the settings `config`."""
    found: list[Tracker] = []
    if settings.tensorboard:
        found.append(_TensorBoard(folder / "tensorboard"))
    if settings.wandb:
        found.append(_Wandb(folder, config))
    return found


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

        # What it would note of the machine and the command line stands in environment.json, without secrets.
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
        if group not in self.groups:  # each group counts on its own
            self.groups.add(group)
            self.run.define_metric(f"{group}/*", step_metric=f"{group}/step")
        self.run.log({f"{group}/step": step} | {f"{group}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self.run.finish()


def _run_id(path: Path) -> str:
    """The same for all commands on one run directory, so that they continue one run."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(4))
    return path.read_text().strip()
