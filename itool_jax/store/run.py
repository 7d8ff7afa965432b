"""One command on a run directory: its settings, and what it reads once and keeps."""

import functools

from itool_jax.config import Config
from itool_jax.store import base, splits, weights
from itool_jax.store.base import Base
from itool_jax.store.cache import Phase
from itool_jax.store.paths import phase_name
from itool_jax.store.splits import Splits
from itool_jax.store.weights import PhasePolicy, Weights
from itool_jax.text.steps import Granularity, StepTable


class Run:
    """The settings of a command, and its data, base model and weights, each loaded when first asked for."""

    def __init__(self, config: Config):
        self.config = config
        self.weights = Weights(config)
        self._tables: dict[Granularity, StepTable] = {}

    def with_settings(self, config: Config) -> "Run":
        """The same with other settings of the computation; what is loaded is kept."""
        run = Run(config)
        if "splits" in self.__dict__:
            run.__dict__["splits"] = self.splits
        return run

    @property
    def base(self) -> Base:
        """Shapes and tokenizer of the model."""
        return base.load_base(self.config)

    @functools.cached_property
    def splits(self) -> Splits:
        """Train, validation and test split, made when they are not there yet."""
        return splits.load_splits(self.config)

    def phase(self, name: str) -> Phase:
        """A phase by its name."""
        return Phase(self, name)

    def iterations(self) -> list[Phase]:
        """The phases after the warm-up, in order."""
        return [self.phase(phase_name(i)) for i in range(1, self.config.iterations + 1)]

    def policy(self, phase: str) -> PhasePolicy:
        """The policy that a phase ends with."""
        return PhasePolicy(self.weights, self.config, phase)

    def answering_policy(self) -> PhasePolicy:
        """The policy that `generate.phase` names; the base if it names none."""
        return self.policy(weights.answering_phase(self.config))

    def step_table(self, granularity: Granularity) -> StepTable:
        """Step boundaries and stop tokens of the vocabulary."""
        if granularity not in self._tables:
            self._tables[granularity] = base.step_table(self.config, granularity)
        return self._tables[granularity]
