"""One command on a run directory: its settings, and the data and models that it loads once."""

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
    """A command's settings, data, base model and weights; each is loaded on first use."""

    def __init__(self, config: Config):
        self.config = config
        self.weights = Weights(config)
        self._tables: dict[Granularity, StepTable] = {}

    def with_settings(self, config: Config) -> "Run":
        """Returns this run with other settings of the computation; loaded splits are kept."""
        run = Run(config)
        if "splits" in self.__dict__:
            run.__dict__["splits"] = self.splits
        return run

    @property
    def base(self) -> Base:
        """The model's shapes and tokenizer."""
        return base.load_base(self.config)

    @functools.cached_property
    def splits(self) -> Splits:
        """The train, validation and test splits, created if they do not exist yet."""
        return splits.load_splits(self.config)

    def phase(self, name: str) -> Phase:
        """Returns a phase by name."""
        return Phase(self, name)

    def iterations(self) -> list[Phase]:
        """Lists the phases after the warm-up, in order."""
        return [self.phase(phase_name(i)) for i in range(1, self.config.iterations + 1)]

    def policy(self, phase: str) -> PhasePolicy:
        """Returns the policy that a phase ends with."""
        return PhasePolicy(self.weights, self.config, phase)

    def answering_policy(self) -> PhasePolicy:
        """Returns the policy that `generate.phase` names; the base if it names none."""
        return self.policy(weights.answering_phase(self.config))

    def step_table(self, granularity: Granularity) -> StepTable:
        """Returns the table of step boundaries and stop tokens for the vocabulary, built once."""
        if granularity not in self._tables:
            self._tables[granularity] = base.step_table(self.config, granularity)
        return self._tables[granularity]
