"""Python API: a model that generates, scores and searches, for scripts and notebooks.

In: a model folder, a GGUF file, a hub name, `embedded`, or a run directory. Out: a `Model`, whose methods do what the
stages of the same names do, with the same settings. Errors are the program's: ValueError with one line that says what
to fix.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax

from itool_jax import config as settings_of
from itool_jax.config import Config, current_value
from itool_jax.data.sources import from_rows
from itool_jax.inference.sampler import GenerateSettings, generate
from itool_jax.mcts.search import SearchSettings
from itool_jax.model.sharding import mesh_here, use_mesh, use_own_mesh
from itool_jax.stages import score, search
from itool_jax.store.columns import json_of
from itool_jax.store.encoding import check_room, encode
from itool_jax.store.paths import BASE, trained_phases
from itool_jax.store.run import Run
from itool_jax.store.tables import SearchRow
from itool_jax.system import environment
from itool_jax.system.progress import progress
from itool_jax.text.chat import Encoded, encode_sample
from itool_jax.text.padding import target_width
from itool_jax.text.sample import Row, Sample, sample_row

Message = Mapping[str, Any]
"""{"role", "content"} in OpenAI's format; an assistant message may have `tool_calls`."""
Tool = Mapping[str, Any]
"""A function in OpenAI's schema, bare or as {"type": "function", "function": ...}."""
Conversation = str | Sequence[Message]
"""A list of messages, or a text, which becomes one user message."""


def load(source: str | os.PathLike[str] = "embedded", *settings: str, phase: str | None = None) -> "Model":
    """Loads a model with its tokenizer and weights onto the available devices.

    Args:
        source: a folder in Hugging Face layout, a GGUF file, a hub name, `embedded`, `smollm2`, or a run directory.
        settings: command-line settings, such as "--dtype=bfloat16".
        phase: the phase of a run whose weights to load: base, warmup, iteration_1, ...; default: the last with weights.

    Raises:
        ValueError: the model, phase or setting does not exist, or a file is damaged.
    """
    path = Path(source).expanduser()
    arguments = ["--stage=generate"]
    if fixed := [s for s in settings if s.split("=")[0] in ("--stage", "--run_dir", "--model", "--help", "-h")]:
        raise ValueError(f"load does not accept {fixed[0]}; pass settings such as --dtype=bfloat16")
    is_run = (path / "config.yaml").is_file() and not (path / "config.json").is_file()
    if is_run:
        arguments += [f"--config={path / 'config.yaml'}", f"--run_dir={path}"]
    elif path.is_dir() and (path.parent / "config.yaml").is_file() and not (path / "config.json").is_file():
        raise ValueError(f"{source} is part of a run; load {path.parent} with phase={path.name!r}")
    elif phase is not None:
        raise ValueError(f"phase={phase} needs a run directory, but {source} has no config.yaml")
    elif os.fspath(source) != "embedded":
        arguments.append(f"--model={path if path.exists() else source}")
    config = settings_of.parse([*arguments, *settings])
    if is_run:
        config = dataclasses.replace(config, mesh=mesh_here(config.mesh))
    if is_run and phase is None:
        phase = (trained_phases(config.run_dir) or [BASE])[-1]
    return Model(dataclasses.replace(config, generate=dataclasses.replace(config.generate, phase=phase)))


class Score(NamedTuple):
    """Probability of a target under a model."""

    log_prob: float
    """Sum of log π over the target's tokens, including the end of turn, in nats."""
    n_tokens: int
    perplexity: float
    """exp(-log_prob / n_tokens); 1 means certain."""


@dataclasses.dataclass(frozen=True, repr=False)
class SearchTree:
    """A finished search tree; printing it draws it as text."""

    id: str
    gold: str
    """The target that responses were graded against."""
    nodes: list[Row]
    """Rows with node, parent, depth, text, token_ids, visits (N), q, value (V), prior, outcome (O), confidence (C),
    terminal, and gold, true if the response so far matches the target. The first row is the root."""
    pairs: list[Row]
    """Preference pairs, as in pairs.jsonl: prompt, chosen, rejected, their token ids, q and visits."""

    def to_dict(self) -> Row:
        """Returns the tree as a row of trees.jsonl; `pairs` already holds rows of pairs.jsonl."""
        return {"id": self.id, "gold": self.gold, "nodes": self.nodes}

    def __repr__(self) -> str:
        return "\n".join([f"{self.id}: gold {self.gold}", *self._lines(0, "")])

    def _lines(self, parent: int, indent: str) -> Iterator[str]:
        children = [row for row in self.nodes if row["parent"] == parent]
        for row in children:
            last = row is children[-1]
            yield f"{indent}{'└─' if last else '├─'} {self._label(row)}"
            yield from self._lines(row["node"], f"{indent}{'   ' if last else '│  '}")

    def _label(self, row: Row) -> str:
        """Formats a node: text, N, Q, p, C, O if the response ends here, and marks for gold, chosen and rejected."""
        sides = [side for side in ("chosen", "rejected") for p in self.pairs if p[f"{side}_node"] == row["node"]]
        notes = ["gold"] * row["gold"] + sides
        text = f"{row['text'] or '(nothing)'}  N={row['visits']} Q={row['q']:+.2f} p={row['prior']:.2f}"
        text += f" C={row['confidence']:.2f}" + (f" O={row['outcome']:+g}" if row["terminal"] else "")
        return " ".join([text.replace("\n", "\\n"), *(f"[{note}]" for note in notes)])


class Model:
    """A model ready to run, created by `load`."""

    def __init__(self, config: Config):
        self.config = config
        self._precision = "highest" if config.dtype == "float32" else None
        self._run = Run(config)
        environment.keep_programs()
        with self._working():
            self._base = self._run.base
            policy = self._run.answering_policy()
            self.phase = policy.phase
            """Phase of the run that the weights come from; base is the untrained model."""
            self._policy = policy.running()

    def __repr__(self) -> str:
        return f"<{self.config.model}, {self.phase}: context of {self._base.config.max_length} tokens>"

    @overload
    def generate(  # pyright: ignore[reportOverlappingOverload]: a text is a sequence of texts
        self,
        messages: Conversation,
        tools: Sequence[Tool] | None = None,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> str: ...

    @overload
    def generate(
        self,
        messages: Sequence[Conversation],
        tools: Sequence[Tool] | None = None,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> list[str]: ...

    def generate(
        self,
        messages: Conversation | Sequence[Conversation],
        tools: Sequence[Tool] | None = None,
        *,
        temperature: float | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> str | list[str]:
        """Generates the model's answer to a conversation, or a list of answers to a list of conversations.

        Args:
            messages: a conversation that ends with a user or tool turn, or a list of conversations.
            tools: the tools of all conversations.
            temperature: 0 is greedy; default: the setting generate.temperature.
            max_tokens: maximum length of an answer; default: the setting generate.max_tokens.
            seed: sampling seed; a conversation's answer does not depend on the others in the list.

        Raises:
            ValueError: a conversation or tool is malformed, or leaves no room for an answer in the context.
        """
        several = isinstance(messages, Sequence) and not isinstance(messages, str)
        alone = not several or isinstance(next(iter(messages), None), Mapping)
        given: list[Any] = [messages] if alone else list(messages)
        rows = [{"messages": _messages(one), "tools": tools} for one in given]
        for number, row in enumerate(rows, 1):
            if row["messages"] and row["messages"][-1].get("role") == "assistant":
                raise ValueError(f"conversation {number} ends with an assistant turn, so there is nothing to answer")
        changes = {"temperature": temperature, "max_tokens": max_tokens}
        changes = {name: value for name, value in changes.items() if value is not None}
        settings = dataclasses.replace(self.config.generate, **changes)
        chat, limit = self._base.chat, self._base.config.max_length
        # Ids come from the content; otherwise the position in the list would change what is sampled.
        encoded = [encode_sample(chat, from_rows([row], need_target=False)[0]) for row in rows]
        check_room(encoded, limit, room=1)
        settings = _fitting(settings, encoded)
        with self._working():
            prompts = [(row.id, row.prompt_ids) for row in encoded]
            seed = self.config.seed if seed is None else seed
            table = self._run.step_table("sentence")
            batches = generate(self._policy, table, prompts, settings, limit, seed)
            answers = dict(row for batch in batches for row in batch)
        texts = [chat.tokenizer.decode(chat.content_ids(answers[i])) for i in range(len(prompts))]
        return texts[0] if alone else texts

    def score(self, messages: Conversation, target: str | Message, tools: Sequence[Tool] | None = None) -> Score:
        """Computes the model's probability of a target as the answer to a conversation.

        Args:
            messages: the conversation before the target.
            target: a bracketed list of calls, a text, or an assistant message with `tool_calls`.
            tools: the tools of the conversation.

        Raises:
            ValueError: an argument is malformed, they do not fit the context together, or the weights are damaged.
        """
        rows = [{"messages": _messages(messages), "tools": tools, "target": target}]
        with self._working():
            encoded = encode(self._base, from_rows(rows, need_target=True))
            config = dataclasses.replace(self.config, generate=_fitting(self.config.generate, encoded))
            [[(_, row)]] = score.perplexities(self._policy, encoded, config)
        return Score(row.logprob_sum, row.n_tokens, row.perplexity)

    @overload
    def search(self, samples: Mapping[str, Any] | Sample, **settings: Any) -> SearchTree: ...

    @overload
    def search(self, samples: Sequence[Mapping[str, Any] | Sample], **settings: Any) -> list[SearchTree]: ...

    def search(
        self, samples: Mapping[str, Any] | Sample | Sequence[Mapping[str, Any] | Sample], **settings: Any
    ) -> SearchTree | list[SearchTree]:
        """Searches a sample and returns its tree with preference pairs, or a list of trees for a list of samples.

        Args:
            samples: {"messages", "tools", "target"} and optionally "id", as in a data file; or a list of them.
            settings: fields of `itool_jax.mcts.search.SearchSettings`, such as n_simulations, breadth, max_depth or
                temperature; the others keep the values the model was loaded with.

        Raises:
            ValueError: a sample is malformed or does not fit the context, or a setting is out of range.
        """
        given: list[Any] = [*samples] if isinstance(samples, Sequence) else [samples]
        if wrong := [one for one in given if not isinstance(one, Mapping | Sample)]:
            raise ValueError(f"a sample must be a dict with messages, tools and target, got {wrong[0]!r:.80}")
        if unknown := settings.keys() - {field.name for field in dataclasses.fields(SearchSettings)}:
            raise ValueError(f"unknown search setting {min(unknown)}; see SearchSettings")
        settings = {name: current_value(f"search.{name}", value) for name, value in settings.items()}
        rows = [sample_row(one) if isinstance(one, Sample) else dict(one) for one in given]
        parsed = from_rows(rows, need_target=True)
        if not parsed:
            return []
        default = {"batch": 64} if self.config.search.batch == "auto" else {}
        config = dataclasses.replace(
            self.config, search=dataclasses.replace(self.config.search, **(default | settings))
        )
        by_number: dict[int, SearchRow] = {}
        with self._working(), progress("search", len(parsed) * config.search.n_simulations) as advance:
            items = [search.Searched(*row) for row in zip(parsed, encode(self._base, parsed), strict=True)]
            table = self._run.step_table(config.search.granularity)
            for n_simulations, finished in search.trees(
                self._policy, self._base, table, items, config, config.iteration
            ):
                advance(n_simulations)
                by_number.update(finished)
        searched = [by_number[number] for number in range(len(items))]
        trees = [SearchTree(**json_of(row.tree), pairs=[json_of(pair) for pair in row.pairs]) for row in searched]
        return trees if isinstance(samples, Sequence) else trees[0]

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """Runs programs as the stages do: on the mesh, and float32 in full precision."""
        precise = jax.default_matmul_precision("highest") if self._precision else contextlib.nullcontext()
        with precise, use_mesh(self.config.mesh), use_own_mesh(self.config.mesh):
            yield


def _fitting(settings: GenerateSettings, encoded: Sequence[Encoded]) -> GenerateSettings:
    """Limits batches to the number of samples, rounded up to a power of two; a row's result does not depend on it."""
    width = max((target_width(len(row.prompt_ids), len(row.target_ids)) for row in encoded), default=1)
    tokens = width << max(len(encoded) - 1, 0).bit_length()
    return dataclasses.replace(settings, tokens_per_batch=min(settings.tokens_per_batch, tokens))


def _messages(conversation: Conversation) -> list[Row]:
    if isinstance(conversation, str):
        return [{"role": "user", "content": conversation}]
    if not isinstance(conversation, Sequence) or not all(isinstance(message, Mapping) for message in conversation):
        raise ValueError(f"a conversation must be a string or a list of message dicts, got {conversation!r:.80}")
    return [dict(message) for message in conversation]
