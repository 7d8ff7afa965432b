"""The weights of one command: the base in one layout at a time, and at most one policy made from it.

In: settings and a run directory. Out: policies to run, and parameters to train. `Weights` is their only owner. Whatever
it returns stays valid; it drops its own references as soon as another layout or policy is requested.
"""

import dataclasses
from pathlib import Path

import jax
from flax import nnx

from itool_jax.config import Config
from itool_jax.inference.sampler import Policy
from itool_jax.model import hf, peft, stacking
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
from itool_jax.store.sources import MODEL, check_sources
from itool_jax.system.messages import log


class Weights:
    """Owner of a command's weights; the base is read on first use, and a phase's policy is restored once."""

    def __init__(self, config: Config):
        self._config = config
        self._base: Params | None = None
        self._stacked = False
        self._policy: tuple[str, Policy] | None = None
        self._told = self._warned = False

    def _load(self, dtype: str = "float32", *, nf4: bool = False, stacked: bool = True) -> Params:
        """Reads the base's weights; says once if its file has them quantized."""
        path = model_folder(self._config)
        if not self._told and (stored := hf.quantization(path)):
            log(f"the weights of {self._config.model} come from {stored}, so they are not quite the original model's")
        self._told = True
        return hf.load(path, dtype, nf4=nf4, stacked=stacked)[1]

    def base(self, *, stacked: bool) -> Params:
        """Returns the base's parameters on the mesh in use: stacked for training, or layer by layer for inference.

        The other layout is converted leaf by leaf, so that both never exist at once.
        """
        config, other = self._config, self._base is not None and self._stacked != stacked
        if other and runs_apart(config.mesh):  # the other layout is on other devices
            self._base = None
        if self._base is None:
            self._base = self._load(config.dtype, nf4=config.quantize == "nf4", stacked=stacked)
        elif other:
            self._base = (stacking.to_train if stacked else stacking.to_run)(self._base)
        self._stacked = stacked
        return jax.tree.map(lambda x: x, self._base)  # return a copy of the dict: the next conversion empties ours

    def policy(self, phase: str) -> Policy:
        """Returns a phase's policy for inference, on the devices this process runs models on."""
        if self._policy is None or self._policy[0] != phase:
            self._policy = None
            with use_own_mesh(self._config.mesh):
                self._policy = phase, self._load_policy(phase)
        return self._policy[1]

    def _load_policy(self, phase: str) -> Policy:
        config = self._config
        model = dataclasses.replace(load_base(config).config, stacked=False)
        graph = abstract(model)[0]
        if phase == BASE and config.adapter is None:
            return Policy(graph, self.base(stacked=False))
        if not config.lora.rank:
            self._base = None
            return Policy(graph, stacking.to_run(restore_trained(config, phase, config.dtype)))
        frozen = self.base(stacked=False)
        if config.preference.merge or (config.dtype == "float32" and config.quantize == "none"):
            self._base = None  # the merged weights take its place
            for part in merged_phases(config, phase):
                frozen = merge_adapters(frozen, stacking.to_run(self._adapters(part)), config.lora)
            return Policy(graph, frozen)
        # Merging adapters into lower-precision weights would lose most of what they learned.
        return Policy(abstract(model, config.lora)[0], beside(frozen, stacking.to_run(self._adapters(phase))))

    def _adapters(self, phase: str) -> Params:
        """Returns a phase's adapters; those of the base are `--adapter`, or fresh ones that change nothing."""
        config = self._config
        if phase != BASE:
            return restore_trained(config, phase)
        fresh = initialize_adapters(load_base(config).config, config.lora, jax.random.key(config.seed))
        if config.adapter is None:
            return fresh
        adapters = peft.load_adapter(config.adapter, fresh, config.lora)
        theirs = peft.base_name(config.adapter)
        if Path(theirs).name not in ("", Path(config.model).name, model_folder(config).name) and not self._warned:
            log(f"adapter {config.adapter} names {theirs} as its model, not {config.model}")
        self._warned = True
        return adapters

    def trainable(self, phase: str, *, merge: bool = False) -> tuple[Params, Params]:
        """Returns a phase's trainable float32 parameters, which training takes over, and the frozen parameters.

        For the base, these are the adapters of `--adapter`, fresh ones that change nothing or, without LoRA, the base's
        own weights. With `merge`, the phase's adapters are merged into the frozen parameters, and fresh ones trained.
        """
        config, self._policy = self._config, None
        if not config.lora.rank:
            self._base = None  # keep only one copy of the weights: the one that training changes
            trainable = self._load() if phase == BASE else restore_trained(config, phase)
            return trainable, {}
        key, model = jax.random.key(config.seed), load_base(config).config
        if phase == BASE or not merge:
            return self._adapters(phase), self.base(stacked=True)
        frozen, parts = self.base(stacked=True), merged_phases(config, phase)
        self._base = None  # the merged weights take its place
        for part in parts:
            frozen = merge_adapters(frozen, restore_trained(config, part), config.lora)
        return initialize_adapters(model, config.lora, jax.random.fold_in(key, len(parts))), frozen


class PhasePolicy:
    """A phase's policy, as a value to pass between steps; its weights are loaded on first use."""

    def __init__(self, weights: Weights, config: Config, phase: str):
        self._weights, self._config, self.phase = weights, config, phase

    @property
    def origin(self) -> StepId | None:
        """The step that trained it; None for the base."""
        return policy_step(self.phase)

    def require(self) -> None:
        """Raises ValueError, naming the step to run first, if the phase has no weights yet."""
        if self.origin is not None and not weights_folder(self._config.run_dir, self.phase).is_dir():
            run_dir = self._config.run_dir
            raise ValueError(f"{run_dir} has no weights of {self.phase} yet; run {command(self.origin)} first")

    def running(self) -> Policy:
        """Returns the policy's graph and parameters for inference.

        Restoring them is a collective operation: every process of a run must call this, even one without work.
        """
        return self._weights.policy(self.phase)

    def trainable(self, *, merge: bool = False) -> tuple[Params, Params]:
        """Returns its trainable and frozen parameters; see `Weights.trainable`."""
        return self._weights.trainable(self.phase, merge=merge)


def restore_trained(config: Config, phase: str, dtype: str = "float32") -> Params:
    """Restores what a phase trained, adapters or all weights, in the stacked layout; the base is not loaded."""
    model = hf.read_config(model_folder(config), config.dtype)
    _, weights, adapters = abstract(model, config.lora)
    shapes = adapters if config.lora.rank else weights
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return checkpoint.restore(weights_folder(config.run_dir, phase), placed(shapes))


def merged_phases(config: Config, phase: str) -> list[str]:
    """Lists the phases whose adapters, added to the base, make a phase's policy; see `preference.merge`.

    With `preference.merge` these are the warm-up and all iterations up to the phase; else only the phase itself.
    """
    if config.preference.merge and phase.startswith("iteration_"):
        return [phase_name(i) for i in range(iteration_of(phase) + 1)]
    return [phase]


def training_graph(config: Config, *, dropout: bool) -> nnx.GraphDef:
    """Returns the module for the trainable and frozen parameters, with `lora.dropout` or no dropout."""
    lora = config.lora if dropout else dataclasses.replace(config.lora, dropout=0.0)
    return abstract(load_base(config).config, lora)[0]


def answering_phase(config: Config) -> str:
    """Returns the phase that `generate.phase` names, or the base if it names none.

    Raises:
        ValueError: the run directory has no such weights, or they belong to another model.
    """
    name = config.generate.phase
    if name in (None, BASE):
        return BASE
    check_weights(config)
    check_sources(config, MODEL)  # adapters belong to one base
    phases = trained_phases(config.run_dir)
    chosen = phases[-1] if name == "last" and phases else name
    if chosen not in phases:
        there = ", ".join(phases) or "none yet"
        raise ValueError(f"generate.phase={name} has no weights in {config.run_dir}; phases with weights: {there}")
    return chosen
