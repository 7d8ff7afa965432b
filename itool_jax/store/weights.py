"""The weights of one command: the base in one layout at a time, and at most one policy made from it.

In: settings and a run directory. Out: policies to run, and parameters to train. `Weights` is their only owner: what it
hands out stays valid, and it lets go of its own references as soon as another layout or policy is asked for.
"""

import dataclasses

import jax
from flax import nnx

from itool_jax.config import Config
from itool_jax.inference.sampler import Policy
from itool_jax.model import forms, hf
from itool_jax.model.lora import beside, initialize_adapters, merge_adapters
from itool_jax.model.sharding import placed, runs_apart, use_own_mesh
from itool_jax.model.transformer import Params, abstract
from itool_jax.store import checkpoint
from itool_jax.store.base import load_base, model_folder
from itool_jax.store.directory import check_weights
from itool_jax.store.paths import (
    BASE,
    StepId,
    command,
    iteration_of,
    phase_name,
    policy_step,
    trained_phases,
    weights_folder,
)
from itool_jax.store.sources import check_sources


class Weights:
    """Owner of a command's weights; each is read when first asked for, and a phase's policy is restored once."""

    def __init__(self, config: Config):
        self._config = config
        self._base: Params | None = None
        self._stacked = False
        self._policy: tuple[str, Policy] | None = None

    def base(self, *, stacked: bool) -> Params:
        """The base's parameters on the mesh in use, stacked to train or layer by layer to run.

        The other layout is converted leaf by leaf, so both are never there at once.
        """
        config, other = self._config, self._base is not None and self._stacked != stacked
        if other and runs_apart(config.mesh):  # the other layout lies on other devices
            self._base = None
        if self._base is None:
            nf4 = config.quantize == "nf4"
            self._base = hf.load(model_folder(config), config.dtype, nf4=nf4, stacked=stacked)[1]
        elif other:
            self._base = (forms.to_train if stacked else forms.to_run)(self._base)
        self._stacked = stacked
        return jax.tree.map(lambda x: x, self._base)  # a dict of its own: the next conversion empties ours

    def policy(self, phase: str) -> Policy:
        """A phase's policy to run, on the devices that this process runs models with."""
        if self._policy is None or self._policy[0] != phase:
            self._policy = None
            with use_own_mesh(self._config.mesh):
                self._policy = phase, self._load_policy(phase)
        return self._policy[1]

    def _load_policy(self, phase: str) -> Policy:
        config = self._config
        model = dataclasses.replace(load_base(config).config, stacked=False)
        graph = abstract(model)[0]
        if phase == BASE:
            return Policy(graph, self.base(stacked=False))
        if not config.lora.rank:
            self._base = None
            return Policy(graph, forms.to_run(restore_trained(config, phase, config.dtype)))
        frozen = self.base(stacked=False)
        # In float32, a merged copy of what is a small model fits beside the base.
        if config.preference.merge or (config.dtype == "float32" and config.quantize == "none"):
            for part in merged_phases(config, phase):
                frozen = merge_adapters(frozen, forms.to_run(restore_trained(config, part)), config.lora)
            return Policy(graph, frozen)
        # Merged into weights of less precision, adapters would lose most of what they learned.
        trained = forms.to_run(restore_trained(config, phase))
        return Policy(abstract(model, config.lora)[0], beside(frozen, trained))

    def trainable(self, phase: str, *, merge: bool = False) -> tuple[Params, Params]:
        """A phase's float32 parameters for training to take over, and the frozen ones beside them.

        For the base, fresh adapters that change nothing; without adapters, its own weights. With `merge`, fresh
        adapters, and those of the phase are merged into the frozen parameters.
        """
        config, self._policy = self._config, None
        if not config.lora.rank:
            self._base = None  # the weights are there once: those that training changes
            trainable = hf.load(model_folder(config))[1] if phase == BASE else restore_trained(config, phase)
            return trainable, {}
        key, model = jax.random.key(config.seed), load_base(config).config
        if phase == BASE:
            return initialize_adapters(model, config.lora, key), self.base(stacked=True)
        if not merge:
            return restore_trained(config, phase), self.base(stacked=True)
        frozen, parts = self.base(stacked=True), merged_phases(config, phase)
        self._base = None  # what is merged takes its place
        for part in parts:
            frozen = merge_adapters(frozen, restore_trained(config, part), config.lora)
        return initialize_adapters(model, config.lora, jax.random.fold_in(key, len(parts))), frozen


class PhasePolicy:
    """The policy of a phase as a value that the loop passes on; its weights are loaded when they are first used."""

    def __init__(self, weights: Weights, config: Config, phase: str):
        self._weights, self._config, self.phase = weights, config, phase

    @property
    def origin(self) -> StepId | None:
        """The step that trained it; None for the base."""
        return policy_step(self.phase)

    def require(self) -> None:
        """ValueError names the step to run first if the phase has no weights yet."""
        if self.origin is not None and not weights_folder(self._config.run_dir, self.phase).is_dir():
            run_dir = self._config.run_dir
            raise ValueError(f"{run_dir} has no weights of {self.phase} yet; run {command(self.origin)} first")

    def running(self) -> Policy:
        """Its graph and parameters, to run.

        Restoring them is a collective: every process of a run calls this, whether it has work for the model or not.
        """
        return self._weights.policy(self.phase)

    def trainable(self, *, merge: bool = False) -> tuple[Params, Params]:
        """Its trainable and frozen parameters; see `Weights.trainable`."""
        return self._weights.trainable(self.phase, merge=merge)


def restore_trained(config: Config, phase: str, dtype: str = "float32") -> Params:
    """The adapters, or all weights, that a phase trained, in the stacked layout; the base is not loaded."""
    model = hf.read_config(model_folder(config), config.dtype)
    _, weights, adapters = abstract(model, config.lora)
    shapes = adapters if config.lora.rank else weights
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return checkpoint.restore(weights_folder(config.run_dir, phase), placed(shapes))


def merged_phases(config: Config, phase: str) -> list[str]:
    """The phases whose adapters are a phase's policy together with the base: with `preference.merge`, all up to it."""
    if config.preference.merge and phase.startswith("iteration_"):
        return [phase_name(i) for i in range(iteration_of(phase) + 1)]
    return [phase]


def training_graph(config: Config, *, dropout: bool) -> nnx.GraphDef:
    """The module that the trainable and the frozen parameters go into, with the dropout of `lora.dropout` or none."""
    lora = config.lora if dropout else dataclasses.replace(config.lora, dropout=0.0)
    return abstract(load_base(config).config, lora)[0]


def answering_phase(config: Config) -> str:
    """The phase that `generate.phase` names, or the base if it names none.

    Raises:
        ValueError: the run directory has no such weights, or they belong to another model.
    """
    name = config.generate.phase
    if name in (None, BASE):
        return BASE
    check_weights(config)
    check_sources(config, ["model"])  # adapters belong to one base
    phases = trained_phases(config.run_dir)
    chosen = phases[-1] if name == "last" and phases else name
    if chosen not in phases:
        there = ", ".join(phases) or "none yet"
        raise ValueError(f"generate.phase={name} has no weights in {config.run_dir}; there are: {there}")
    return chosen
