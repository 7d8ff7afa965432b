"""Trains a phase's weights: the loop of `training.loop.fit`, with metrics, checkpoints and a clean stop.

In: a loss, batches and initial parameters. Out: the weights in the phase's folder. A killed training resumes from its
newest checkpoint, bit for bit.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Array

from itool_jax.model.transformer import Params
from itool_jax.store import checkpoint
from itool_jax.store.cache import Task
from itool_jax.store.paths import WEIGHTS
from itool_jax.system import hosts
from itool_jax.system.files import whole_file
from itool_jax.system.messages import log
from itool_jax.system.metrics import Metrics
from itool_jax.system.preemption import PreemptionError, asked_to_stop
from itool_jax.system.progress import progress
from itool_jax.training.loop import LossFn, Update, adamw, fit, new_state
from itool_jax.training.settings import TrainingSettings

READ = grain.ReadOptions(num_threads=0)  # batches are made while the device computes
PATIENCE = 3
"""Training fails after this many steps in a row without a finite loss and gradient."""


def train_and_save(
    task: Task,
    loss: LossFn,
    settings: TrainingSettings,
    start: tuple[Params, Params],
    batches: grain.MapDataset,
    *,
    seed: int,
    what: str,
    spans: Sequence[int] = (),
    round_folder: Path | None = None,
    steps_before: int = 0,
) -> str:
    """Trains from `start`, (trainable, frozen), saves the weights and returns their digest.

    The weights go to the phase's folder, or to `round_folder` if training has several rounds. `steps_before` counts the
    steps of earlier rounds.
    """
    trained = train_resumably(
        loss,
        settings,
        start,
        batches,
        seed=seed,
        what=what,
        spans=spans,
        metrics=Metrics(task.config.run_dir / "metrics.jsonl", task.phase, steps_before),
        checkpoints=checkpoint.TrainCheckpoints((round_folder or task.working) / "training", settings.checkpoint_every),
    )
    return checkpoint.save((round_folder or task.folder) / WEIGHTS, trained)


def train_resumably(
    loss: LossFn,
    settings: TrainingSettings,
    start: tuple[Params, Params],
    batches: grain.MapDataset,
    *,
    seed: int,
    what: str,
    metrics: Metrics,
    spans: Sequence[int] = (),
    checkpoints: checkpoint.TrainCheckpoints | None = None,
) -> Params:
    """Trains from the newest checkpoint, or else from `start`, which is consumed; returns the trained parameters.

    The learning rate rises and falls once in each of `spans`, given as numbers of steps, or else once over the whole
    training. Without `checkpoints`, an interrupted training starts over.

    Raises:
        ValueError: three steps in a row had no finite loss or gradient; the last batch is saved.
        PreemptionError: the run was asked to stop; the state is saved.
    """
    trainable, frozen = start
    state = new_state(adamw(settings.weight_decay, settings.clip_norm), trainable)
    data, n_steps, first = iter(batches.to_iter_dataset(READ)), len(batches), 0
    rates = settings.rates(spans or [n_steps])
    assert len(rates) == n_steps
    if checkpoints is not None and (restored := checkpoints.restore(state)) is not None:
        first, state, position = restored
        data.set_state(position)
        log(f"{what}: resuming after step {first} of {n_steps}")
    metrics.drop_after(first)
    hosts.stop_together()  # before the first step compiles
    with progress(what, n_steps, first) as advance:
        reports = _Reports(metrics, settings.section, advance)
        updates = fit(loss, settings, state, frozen, reports.watch(data), rates, seed=seed, steps_done=first)
        for update in updates:
            state = update.state
            due = checkpoints is not None and checkpoints.due(update.step)
            decided = reports.add(update, hosts.vote(stop=asked_to_stop(), save=due))
            if checkpoints is not None and (decided.stop or decided.save):
                reports.flush()  # report every step that the checkpoint includes
                checkpoints.save(update.step, state, data.get_state())
                if decided.stop:
                    checkpoints.finish()
                    raise PreemptionError
        reports.flush()
    if checkpoints is not None:
        checkpoints.finish()
    return state.trainable


class _Reports:
    """Reports each step once the next one has been dispatched, so that the device never waits for the host.

    A vote to save or stop therefore takes effect one step later.
    """

    def __init__(self, metrics: Metrics, section: str, advance: Callable[..., None]):
        self.metrics, self.section, self.advance = metrics, section, advance
        self.shapes: set[Any] = set()
        self.batch: Any = None
        self.skipped = 0
        """Steps in a row without a finite loss and gradient."""
        self.pending: tuple[int, dict[str, Array], Any, hosts.Vote] | None = None
        self.decided: hosts.Vote | None = None

    def watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yields the batches; reports the last step before a batch of new shapes, which has to compile.

        A process that compiles longer than the others is then not mistaken for one that hangs.
        """
        for batch in batches:
            shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
            if shapes not in self.shapes:
                self.shapes.add(shapes)
                self.decided = self.flush()
            self.batch = batch
            yield batch

    def add(self, update: Update, vote: hosts.Vote) -> hosts.Vote:
        """Reports the previous step and returns its vote."""
        decided, self.decided = self.flush() if self.decided is None else self.decided, None
        self.pending = update.step, update.metrics, self.batch, vote
        return decided

    def flush(self) -> hosts.Vote:
        """Reports the newest step and returns its vote."""
        if self.pending is None:
            return hosts.Vote(False, False)
        (step, metrics, batch, vote), self.pending = self.pending, None
        values = {name: float(value) for name, value in metrics.items()}
        hosts.step_done()
        self.metrics.write(step, **values)
        self._check(step, values, batch)
        self.advance(1, note=f"loss {values['loss']:.3f}")
        return hosts.decided(vote)

    def _check(self, step: int, values: dict[str, float], batch: Any) -> None:
        """Logs a skipped step; raises ValueError after `PATIENCE` of them in a row."""
        self.skipped = self.skipped + 1 if values["skipped"] else 0
        if not self.skipped:
            return
        what = f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
        log(f"{self.metrics.stage}: skipped step {step}: loss or gradient not finite ({what})")
        if self.skipped == PATIENCE:
            path = self.metrics.path.parent / self.metrics.stage / f"not_finite_step_{step}.npz"
            _save_batch(path, batch)
            raise ValueError(
                f"{self.metrics.stage}: {PATIENCE} steps in a row had a non-finite loss or gradient; the batch of step "
                f"{step} is saved in {path}; lower {self.section}.learning_rate, or inspect the batch"
            )


def _save_batch(path: Path, batch: Any) -> None:
    leaves = jax.tree.leaves_with_path(batch)
    arrays: dict[str, Any] = {jax.tree_util.keystr(p, simple=True, separator="."): x for p, x in leaves}
    with whole_file(path) as file:
        np.savez(file, **arrays)
