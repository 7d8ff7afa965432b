"""The policy as the functions that `mcts.search` takes: what it proposes, how it judges itself, how it is graded.

In: a policy and samples of similar length. Out: the trees of a search of them, every call of the model one compiled
program over all trees that still grow.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Callable as C
from typing import Any, NamedTuple

import jax
import numpy as np


Keep = C


def keep_nothing(_, compute):
    return compute()


from itool_jax.mcts.search import Forest, Problem, Proposal, SearchSettings, State, search
from itool_jax.mcts.value import SelfEvaluationSettings, confidence, four_grade_confidence, outcome
from itool_jax.model.cache import Prefix, empty_prefix, place
from itool_jax.model.sharding import row_devices, to_host
from itool_jax.sampler import Policy, answer, prefill, row_keys, sample_step, score_step, text_key
from itool_jax.stages.base import Base
from itool_jax.text.chat import Chat, Encoded, EvaluationFrame, answer_ids, evaluation_frame
from itool_jax.text.padding import bucket, pad
from itool_jax.text.sample import Sample
from itool_jax.text.steps import StepTable, split_steps
from itool_jax.types import AnyArray

PROMPT_BUCKET, PATH_BUCKET, OWN_BUCKET = 256, 64, 64  # smallest padded widths: few programs matter more than tight ones
FEW = 4
"""Where no more than this part of the seats is asked about, a program of that size answers."""


class Searched(NamedTuple):
    """A sample under search."""

    sample: Sample
    encoded: Encoded


class Searcher:
    """The policy as the functions that `mcts.search` takes, over samples of similar length.

    Prompts, and prompts with the reference answer behind them, are computed once; every node reads those caches.
    """

    def __init__(
        self,
        policy: Policy,
        base: Base,
        table: StepTable,
        batch: Sequence[Searched],
        settings: SearchSettings,
        self_eval: SelfEvaluationSettings,
        seed: int,
        keep: Keep = keep_nothing,
    ):
        self.policy, self.chat, self.table, self.batch = policy, base.chat, table, batch
        self.settings, self.key, self.keep, self.asks = settings, jax.random.key(seed), keep, itertools.count()
        self.letters = np.array(answer_ids(base.chat, self_eval.letters), np.int32)
        self.frames = [self._frame(row.encoded, self_eval) for row in batch]
        prompts = [row.encoded.prompt_ids for row in batch]
        asked = [prompt + frame.before for prompt, frame in zip(prompts, self.frames, strict=True)]
        # A response, the gold one too, may be as long as the question about it fits the context.
        lengths = [len(ids) + len(frame.after) for ids, frame in zip(asked, self.frames, strict=True)]
        self.room = [base.config.max_length - length for length in lengths]
        needed = [len(row.encoded.target_ids) for row in batch]
        if short := [row.sample.id for row, *room in zip(batch, self.room, needed, strict=True) if room[0] < room[1]]:
            raise ValueError(
                f"sample {short[0]}: the question about its answers does not fit the model's context of "
                f"{base.config.max_length} tokens; remove the sample, or take a model with a longer context"
            )
        self.prompt, self.asked = _Contexts(prompts, settings.seats), _Contexts(asked, settings.seats)
        self.seat_of: dict[int, int] = {}
        self.waiting: dict[int, int] = {}

    def search(self, advance: Callable[..., None] = lambda *_: None) -> Forest:
        """The trees of all samples. With `keep`, the model is not asked again for what it has answered before."""
        functions = self._kept_proposals, self._kept_judgements, self.grade
        return search(self.problems(), *functions, self.settings, advance, self.seat)

    def problems(self) -> list[Problem]:
        """What to search."""
        return [Problem(row.sample.id, split_steps(self.table, row.encoded.target_ids)) for row in self.batch]

    def _frame(self, encoded: Encoded, self_eval: SelfEvaluationSettings) -> EvaluationFrame:
        gold = self.chat.content_ids(encoded.target_ids)
        return evaluation_frame(self.chat, gold if self_eval.reference == "gold" else None, self_eval.scale)

    def _kept_proposals(self, states: list[State]) -> list[Proposal]:
        found = self.keep(f"proposals {next(self.asks)}", lambda: self.propose(states))
        return [Proposal(*proposal) for proposal in found]

    def _kept_judgements(self, states: list[tuple[int, list[int]]]) -> list[float]:
        return self.keep(f"judgements {next(self.asks)}", lambda: self.judge(states))

    def seat(self, taken: Sequence[tuple[int, int]]) -> None:
        """Gives (seat, problem) their places; they are computed when the model is asked next."""
        self.seat_of |= {problem: seat for seat, problem in taken}
        self.waiting |= dict(taken)

    def _compute_waiting(self) -> None:
        """Computes the problems that took a seat, as many at a time as the mesh takes rows to different devices."""
        taken, count = list(self.waiting.items()), row_devices(running=True)
        for start in range(0, len(taken), count):
            for contexts in (self.prompt, self.asked):
                contexts.compute(self.policy, taken[start : start + count], count)
        self.waiting = {}

    def propose(self, states: list[State]) -> list[Proposal]:
        """Samples `breadth` steps for each state, in one compiled loop, and scores the gold's next where it joins."""
        s, (prefix, seats) = self.settings, self._seated(self.prompt, [state.problem for state in states])
        whole = any(state.whole for state in states)
        room = max(s.max_last_step_tokens, s.max_step_tokens) if whole else s.max_step_tokens
        steps = sample_step(
            self.policy.graph,
            room,
            self.policy.params,
            self.table,
            prefix,
            *self._paths(states, seats),
            self._keys(states, seats),
            np.repeat(seats.column([self._limit(state) for state in states]), s.breadth),
            np.repeat(seats.column([state.whole for state in states], bool), s.breadth),
            np.float32(s.temperature),
        )
        gold = self._gold_log_probs(states) if s.inject_gold else None
        return _proposals(to_host(steps), states, seats, s.breadth, gold, self.chat)

    def _gold_log_probs(self, states: list[State]) -> list[float]:
        """Log π of the gold's next step where it joins the candidates, else 0."""
        found, chosen = [0.0] * len(states), [i for i, state in enumerate(states) if state.gold_step]
        if not chosen:
            return found
        with_gold = [states[i] for i in chosen]
        prefix, seats = self._seated(self.prompt, [state.problem for state in with_gold])
        steps = [state.gold_step for state in with_gold]
        steps = _padded(steps, seats, bucket(max(map(len, steps)), OWN_BUCKET))
        sums_P = to_host(score_step(*self.policy, prefix, *self._paths(with_gold, seats), *steps))
        for i, seat in zip(chosen, seats.taken, strict=True):
            found[i] = float(sums_P[seat])
        return found

    def _paths(self, states: list[State], seats: "_Seats") -> tuple[np.ndarray, np.ndarray]:
        paths = [[self.prompt.ids[state.problem][-1], *state.path] for state in states]
        return _padded(paths, seats, _path_width(paths))

    def _limit(self, state: State) -> int:
        return max(1, min(state.limit, self.room[state.problem] - len(state.path)))

    def judge(self, states: list[tuple[int, list[int]]]) -> list[float]:
        """Asks the policy about every state: one answer token each (eq 7).

        What the states of a problem have in common is read once. One more than `breadth`, the gold's, is asked about
        in a second pass, lest every problem had an empty row for it.
        """
        by_problem: dict[int, list[int]] = {}
        for i, (problem, _) in enumerate(states):
            by_problem.setdefault(problem, []).append(i)
        breadth, found = self.settings.breadth, [0.0] * len(states)
        for first, rows in ((0, breadth), (breadth, 1)):
            groups = [(problem, ids[first : first + rows]) for problem, ids in by_problem.items() if len(ids) > first]
            for i, score in self._ask(groups, states, rows) if groups else ():
                found[i] = score
        return found

    def _ask(
        self, groups: list[tuple[int, list[int]]], states: list[tuple[int, list[int]]], rows: int
    ) -> Iterator[tuple[int, float]]:
        """(number of the state, confidence) of groups of at most `rows` states a problem."""
        prefix, seats = self._seated(self.asked, [problem for problem, _ in groups])
        paths, own = [], [[0]] * (seats.size * rows)
        for seat, (problem, ids) in zip(seats.taken, groups, strict=True):
            shown = [self.chat.content_ids(states[i][1]) for i in ids]
            n = _n_common(shown)
            paths.append([self.asked.ids[problem][-1], *shown[0][:n]])
            own[seat * rows : seat * rows + len(ids)] = [[*x[n:], *self.frames[problem].after] for x in shown]
        own_width = bucket(max(map(len, own)), OWN_BUCKET)
        shared = _padded(paths, seats, _path_width(paths))
        logits_BA = answer(*self.policy, prefix, *shared, *pad(own, own_width), self.letters)
        scores_B = to_host(_confidences(logits_BA)).tolist()
        for seat, (_, ids) in zip(seats.taken, groups, strict=True):
            yield from zip(ids, scores_B[seat * rows :], strict=False)

    def grade(self, problem: int, response: list[int], finished: bool) -> float:
        """Outcome of a whole response against the gold (O of eq 6)."""
        sample = self.batch[problem].sample
        text = self.chat.tokenizer.decode(self.chat.content_ids(response))
        grading = self.settings.outcome
        return outcome(sample.target, text, finished=finished, tools=sample.tools, grading=grading)

    def _seated(self, contexts: "_Contexts", problems: list[int]) -> tuple[Prefix, "_Seats"]:
        """The caches that a call about these problems reads, and where in them each has its place.

        All caches as they lie, or where few trees still grow, copies of a quarter of them.
        """
        self._compute_waiting()
        assert contexts.cache is not None, "no problem has a seat yet"
        batch, taken = self.settings.seats, [self.seat_of[problem] for problem in problems]
        if len(problems) > (few := max(1, batch // FEW)):
            return contexts.cache, _Seats(taken, batch)
        seats = _Seats(list(range(len(problems))), few)
        return _take(contexts.cache, seats.column(taken)), seats

    def _keys(self, states: list[State], seats: "_Seats") -> jax.Array:
        """A key a row from the prompt's id, the path of the node and the candidate: never from the row's place."""
        breadth = self.settings.breadth
        ids = seats.column([text_key(self.batch[state.problem].sample.id) for state in states], np.uint32)
        paths = seats.column([text_key(" ".join(map(str, state.path))) for state in states], np.uint32)
        candidates = np.tile(np.arange(breadth, dtype=np.uint32), seats.size)
        return row_keys(self.key, np.repeat(ids, breadth), np.repeat(paths, breadth), candidates)


class _Contexts:
    """Token ids that the model continues, a row a problem, and the caches of those that have a seat.

    The last token of each opens its rows' own part, whose first pass gives the first logits.
    """

    def __init__(self, ids: list[list[int]], size: int):
        self.ids, self.size = ids, size
        self.cache: Prefix | None = None
        self.width = bucket(max(map(len, ids)), PROMPT_BUCKET)

    def compute(self, policy: Policy, taken: Sequence[tuple[int, int]], count: int) -> None:
        """Puts at most `count` problems into the caches, at their seats."""
        new = prefill(*policy, *pad([self.ids[problem][:-1] for _, problem in taken], self.width, count))
        seats = np.full(count, self.size, np.int32)
        seats[: len(taken)] = [seat for seat, _ in taken]
        self.cache = place(empty_prefix(new, self.size) if self.cache is None else self.cache, new, seats)


class _Seats(NamedTuple):
    """Places in a batch of `size` prompts; those that are not taken stay idle."""

    taken: list[int]
    size: int

    def column(self, values: Sequence[int], dtype: Any = np.int32) -> np.ndarray:
        """The values at their places, 0 elsewhere."""
        found = np.zeros(self.size, dtype)
        found[self.taken] = values
        return found


@jax.jit
def _take(prefix: Prefix, index_P: jax.Array) -> Prefix:
    return jax.tree.map(lambda x: x[index_P], prefix)


@jax.jit
def _confidences(logits_BA: jax.Array) -> AnyArray:
    if logits_BA.shape[1] == 2:
        return confidence(logits_BA[:, 0], logits_BA[:, 1])
    return four_grade_confidence(logits_BA)


def _path_width(paths: Sequence[list[int]]) -> int:
    """Room for a prompt's last token and the response so far, whose steps are often as long as they may be."""
    return 1 + bucket(max(map(len, paths)) - 1, PATH_BUCKET)


def _n_common(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows begin with alike."""
    alike = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(itertools.takewhile(bool, alike))


def _padded(rows: Sequence[list[int]], seats: _Seats, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens at their places, right-padded, and their lengths; idle rows are a token of no meaning."""
    seated: list[list[int]] = [[0]] * seats.size
    for seat, row in zip(seats.taken, rows, strict=True):
        seated[seat] = row
    return pad(seated, width)


def _proposals(
    steps: Any, states: Sequence[State], seats: _Seats, breadth: int, gold: Sequence[float] | None, chat: Chat
) -> list[Proposal]:
    """The sampled steps of each state, and behind them the gold's with its log π where the gold may join."""

    def proposal(number: int, state: State) -> Proposal:
        rows = range(seats.taken[number] * breadth, (seats.taken[number] + 1) * breadth)
        found = Proposal(
            [steps.tokens_BT[r, : steps.length_B[r]].tolist() for r in rows],
            [float(steps.log_prob_B[r]) for r in rows],
            [bool(steps.stopped_B[r]) for r in rows],
        )
        if gold is not None:
            found.steps.append(state.gold_step)
            found.log_probs.append(gold[number])
            found.stopped.append(any(token in chat.stop_ids for token in state.gold_step[-1:]))
        return found

    return [proposal(i, state) for i, state in enumerate(states)]
