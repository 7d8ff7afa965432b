"""Lets the policy act as the `Model` of a search: it proposes steps and judges itself; rules grade its responses.

In: a policy and samples of similar length. Out: the answers to the requests of `mcts.search`; each call is one
compiled program over all growing trees. Of `mcts`, only this module uses the sampler and the model.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from itool_jax.inference.sampler import Policy, choice_logits, prefill, row_keys, sample_step, score_step, stable_hash
from itool_jax.mcts.search import Problem, Response, SearchSettings, State, Step, Turn
from itool_jax.mcts.value import SelfEvaluationSettings, confidence, four_grade_confidence, outcome
from itool_jax.model.cache import Prefix, empty_prefix, place
from itool_jax.model.sharding import row_devices, to_host
from itool_jax.text.chat import Chat, Encoded, EvaluationFrame, answer_ids, evaluation_frame
from itool_jax.text.padding import bucket, pad
from itool_jax.text.sample import Sample
from itool_jax.text.steps import StepTable, split_steps
from itool_jax.types import AnyArray

PROMPT_BUCKET, PATH_BUCKET, OWN_BUCKET = 256, 64, 64  # smallest padded widths: few programs matter more than tight ones
FEW = 4
"""If a request covers at most 1/FEW of the lanes, a program of that smaller size runs."""


def prompt_width(length: int) -> int:
    """Returns the padded width of contexts: prompts, or prompts and the beginning of a question."""
    return bucket(length, PROMPT_BUCKET)


def path_width(length: int) -> int:
    """Returns the padded width of responses so far, each after its context's last token."""
    return 1 + bucket(length, PATH_BUCKET)


def own_width(length: int) -> int:
    """Returns the padded width of what a candidate adds to its path: a gold step, or the end of a question."""
    return bucket(length, OWN_BUCKET)


class Searched(NamedTuple):
    """A sample under search."""

    sample: Sample
    encoded: Encoded
    solved: bool = False
    """True if the model sampled a right response before."""


class ModelPolicy:
    """Policy that serves as the `Model` of a search over samples of similar length.

    Each prompt is prefilled once alone and once with the beginning of the question, which may show the reference
    response. All nodes share those caches.
    """

    def __init__(
        self,
        policy: Policy,
        chat: Chat,
        max_length: int,
        table: StepTable,
        batch: Sequence[Searched],
        settings: SearchSettings,
        self_eval: SelfEvaluationSettings,
        key: jax.Array,
    ):
        self.policy, self.chat, self.table, self.batch = policy, chat, table, batch
        self.settings, self.self_eval, self.key = settings, self_eval, key
        self.letters = np.array(answer_ids(chat, self_eval.letters), np.int32)
        self.golds = [[(row.sample.target, row.encoded.target_ids, []), *_later(chat, row.sample)] for row in batch]
        """By problem and turn: the text of the gold turn, its tokens, and the recorded tokens before it."""
        self.problems = [self._problem(row, turns) for row, turns in zip(batch, self.golds, strict=True)]
        shown = [self._shown(problem.gold) for problem in self.problems]
        self.frames = [self._frame(gold, self_eval.letters) for gold in shown]
        self.reversed_frames = [self._frame(gold, self_eval.letters[::-1]) for gold in shown]
        self.swapped: dict[int, tuple[float, float]] = {}
        """By problem: the confidence in one of its first steps, and the same with the answer letters reversed."""
        prompts = [row.encoded.prompt_ids for row in batch]
        questions = [prompt + frame.before for prompt, frame in zip(prompts, self.frames, strict=True)]
        self.token_budgets = [
            max_length - (len(question) + len(frame.after) if self_eval.weight else len(prompt))
            for prompt, question, frame in zip(prompts, questions, self.frames, strict=True)
        ]
        """By problem: the longest response, gold included, for which the question about it fits the context."""
        for problem, budget in zip(self.problems, self.token_budgets, strict=True):
            if budget < len(problem.gold):
                raise ValueError(
                    f"sample {problem.id}: its recorded answers and the self-evaluation question do not fit the "
                    f"model's context of {max_length} tokens; remove the sample, use a model with a longer context, or "
                    "set self_eval.weight=0 to ask no question"
                )
        self.prompts = _ContextCache(policy, prompts, settings.lanes)
        self.questions = _ContextCache(policy, questions, settings.lanes)

    def _problem(self, row: Searched, turns: Sequence["_Turn"]) -> Problem:
        (_, first, _), *later = turns
        cut = functools.partial(split_steps, self.table)
        return Problem(row.sample.id, cut(first), row.solved, tuple(Turn(behind, cut(ids)) for _, ids, behind in later))

    def _shown(self, response: Sequence[int]) -> list[int]:
        """Returns the tokens of a response to show in a question, without tokens that end a turn or the response."""
        ids = self.chat.content_ids(response)
        return ids if ids == list(response[: len(ids)]) else [i for i in ids if i not in self.chat.special_ids]

    def _frame(self, gold: list[int], letters: str) -> EvaluationFrame:
        shown = gold if self.self_eval.reference == "gold" else None
        return evaluation_frame(self.chat, shown, self.self_eval.scale, letters=letters)

    def propose(self, states: Sequence[State], /) -> list[list[Step]]:
        """Samples `breadth` steps per state in one compiled loop, and scores the gold steps that join."""
        s, (cache, rows) = self.settings, self.prompts.read(states)
        until_stop = any(state.until_stop for state in states)
        max_tokens = s.longest_step if until_stop else s.max_step_tokens
        steps = sample_step(
            self.policy.graph,
            max_tokens,
            self.policy.params,
            self.table,
            cache,
            *self._paths(states, rows),
            self._keys(states, rows),
            np.repeat(rows.column([self._limit(state) for state in states]), s.breadth),
            np.repeat(rows.column([state.until_stop for state in states], bool), s.breadth),
            np.float32(s.temperature),
            np.float32(s.top_p),
            rows.column([state.turn_start for state in states]),
        )
        gold = self._gold_steps(states)
        steps = to_host(steps)
        proposals = []
        for state, place_of_state in zip(states, rows.taken, strict=True):
            sampled = range(place_of_state * s.breadth, (place_of_state + 1) * s.breadth)
            proposals.append([_step(steps, row) for row in sampled] + gold.get(state.lane, []))
        return proposals

    def _gold_steps(self, states: Sequence[State]) -> dict[int, list[Step]]:
        """Returns, by lane, the gold step and its log π of each state that has one."""
        with_gold = [state for state in states if state.gold_step]
        if not with_gold:
            return {}
        cache, rows = self.prompts.read(with_gold)
        gold = [state.gold_step for state in with_gold]
        steps = rows.pad(gold, own_width(max(map(len, gold))))
        log_prob_P = to_host(score_step(*self.policy, cache, *self._paths(with_gold, rows), *steps))
        return {
            state.lane: [
                Step(
                    state.gold_step,
                    float(log_prob_P[row]),
                    stopped=state.gold_step[-1] in self.chat.stop_ids,
                    sampled=False,
                )
            ]
            for state, row in zip(with_gold, rows.taken, strict=True)
        }

    def _paths(self, states: Sequence[State], rows: "_Rows") -> tuple[np.ndarray, np.ndarray]:
        paths = [[self.prompts.last_token(state.problem), *state.response] for state in states]
        return rows.pad(paths, path_width(max(map(len, paths)) - 1))

    def _limit(self, state: State) -> int:
        return max(1, min(state.limit, self.token_budgets[state.problem] - len(state.response)))

    def _keys(self, states: Sequence[State], rows: "_Rows") -> jax.Array:
        """Derives one key per row from the prompt's id, the node's path and the candidate, but never from the row."""
        breadth = self.settings.breadth
        ids = rows.column([stable_hash(self.batch[state.problem].sample.id) for state in states], np.uint32)
        paths = rows.column([stable_hash(" ".join(map(str, state.response))) for state in states], np.uint32)
        candidates = np.tile(np.arange(breadth, dtype=np.uint32), rows.size)
        return row_keys(self.key, np.repeat(ids, breadth), np.repeat(paths, breadth), candidates)

    def judge(self, responses: Sequence[Response], /) -> list[float]:
        """Asks the policy to judge each response with a one-token answer (eq 7).

        The first response to each problem is also judged with the answer letters reversed, see `swapped`.
        """
        by_problem = [list(same) for _, same in itertools.groupby(responses, lambda response: response.problem)]
        confidences = self._judge(by_problem, in_reverse=False)
        firsts = dict(zip(itertools.accumulate(map(len, by_problem[:-1]), initial=0), by_problem, strict=True))
        new = {i: same[0] for i, same in firsts.items() if same[0].problem not in self.swapped}
        again = self._ask([[response] for response in new.values()], 1, in_reverse=True)
        for (i, response), confidence_in_reverse in zip(new.items(), again, strict=True):
            self.swapped[response.problem] = confidences[i], confidence_in_reverse
        if not self.self_eval.both_orders:
            return confidences
        return [(a + b) / 2 for a, b in zip(confidences, self._judge(by_problem, in_reverse=True), strict=True)]

    def _judge(self, by_problem: Sequence[Sequence[Response]], *, in_reverse: bool) -> list[float]:
        """Returns the confidence in every response, grouped by problem.

        Most states have `breadth` candidates. Injected gold steps are judged in a second pass, so that the other lanes
        carry no padding row for them.
        """
        breadth = self.settings.breadth
        first = self._ask([same[:breadth] for same in by_problem], breadth, in_reverse=in_reverse)
        more = [same[breadth:] for same in by_problem if len(same) > breadth]
        sampled, injected = iter(first), iter(self._ask(more, 1, in_reverse=in_reverse))
        return [next(sampled if i < breadth else injected) for same in by_problem for i in range(len(same))]

    def _ask(self, groups: Sequence[Sequence[Response]], most: int, *, in_reverse: bool) -> list[float]:
        """Computes the confidence in every response of the groups in one forward pass.

        A group is at most `most` responses to one problem; their common prefix is computed once.
        """
        frames, letters = (self.reversed_frames, self.letters[::-1]) if in_reverse else (self.frames, self.letters)
        if not groups:
            return []
        cache, rows = self.questions.read([group[0] for group in groups])
        shared, own = [], []
        for group in groups:
            problem = group[0].problem
            shown = [self._shown(response.token_ids) for response in group]
            n = _n_common(shown)
            shared.append([self.questions.last_token(problem), *shown[0][:n]])
            own += [[*ids[n:], *frames[problem].after] for ids in shown]
        own_rows = rows.split([len(group) for group in groups], most)
        logits_BA = choice_logits(
            *self.policy,
            cache,
            *rows.pad(shared, path_width(max(map(len, shared)) - 1)),
            *own_rows.pad(own, own_width(max(map(len, own)))),
            np.ascontiguousarray(letters),
        )
        return to_host(_confidences(logits_BA))[own_rows.taken].tolist()

    def grade(self, problem: int, turn: int, response: list[int], stopped: bool, /) -> float:
        """Grades a whole turn against the gold turn (O of eq 6)."""
        text = self.chat.tokenizer.decode(self.chat.content_ids(response))
        gold, tools = self.golds[problem][turn][0], self.batch[problem].sample.tools
        grading, read = self.settings.outcome, self.chat.read_calls
        return outcome(gold, text, finished=stopped, tools=tools, grading=grading, read=read)


_Turn = tuple[str, list[int], list[int]]


def _later(chat: Chat, sample: Sample) -> list[_Turn]:
    """Returns the assistant turns recorded after a sample's target: text, its tokens, and the tokens before them.

    Stops at the last assistant turn, or before the first empty one.
    """
    turns: list[_Turn] = []
    messages, answer, between = [*sample.messages], sample.target, []
    for message in sample.following:
        if message["role"] != "assistant":
            between.append(message)
            continue
        if not message["content"]:
            break
        behind = chat.observation_ids(messages, answer, between, sample.tools)
        ids = chat.target_ids(message["content"], message.get("before_calls", ""))
        turns.append((message["content"], ids, behind))
        messages += [{"role": "assistant", "content": answer}, *between]
        answer, between = message["content"], []
    return turns


class _ContextCache:
    """Keys and values of one context per lane: a prompt, or a prompt and the beginning of the question about it.

    A lane's context is computed at its first request for a problem. The last token of the context is left out and
    becomes the first token of the request, so that its forward pass gives the first logits.
    """

    def __init__(self, policy: Policy, contexts: Sequence[list[int]], lanes: int):
        self.policy, self.contexts, self.lanes = policy, contexts, lanes
        self.width = prompt_width(max(map(len, contexts)))
        self.problem_of: dict[int, int] = {}
        self.cache: Prefix | None = None

    def last_token(self, problem: int) -> int:
        return self.contexts[problem][-1]

    def read(self, requests: Sequence[State | Response]) -> tuple[Prefix, "_Rows"]:
        """Returns a cache, and the requests' rows in it; each request must come from a different lane.

        The cache has one row per lane, or a quarter as many when few trees still grow.
        """
        wanted = {request.lane: request.problem for request in requests}
        self._compute({lane: problem for lane, problem in wanted.items() if self.problem_of.get(lane) != problem})
        assert self.cache is not None
        lanes, few = list(wanted), max(1, self.lanes // FEW)
        if len(lanes) > few:
            return self.cache, _Rows(lanes, self.lanes)
        rows = _Rows(list(range(len(lanes))), few)
        return _take(self.cache, rows.column(lanes)), rows

    def _compute(self, problem_of: dict[int, int]) -> None:
        """Prefills the contexts of some lanes, in batches of one row per device that the mesh spreads rows over."""
        lanes, count = list(problem_of), row_devices(running=True)
        for start in range(0, len(lanes), count):
            chosen = lanes[start : start + count]
            contexts = [self.contexts[problem_of[lane]][:-1] for lane in chosen]
            new = prefill(*self.policy, *pad(contexts, self.width, count))
            unused = [self.lanes] * (count - len(chosen))  # out-of-range rows are dropped
            cache = empty_prefix(new, self.lanes) if self.cache is None else self.cache
            self.cache = place(cache, new, np.array(chosen + unused, np.int32))
        self.problem_of |= problem_of


class _Rows(NamedTuple):
    """Rows that requests take in a batch of `size`; the others are padding."""

    taken: list[int]
    size: int

    def column(self, values: Sequence[int], dtype: Any = np.int32) -> np.ndarray:
        """Returns one value per row [size], 0 in padding rows."""
        column = np.zeros(self.size, dtype)
        column[self.taken] = values
        return column

    def pad(self, token_ids: Sequence[list[int]], width: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns right-padded tokens [size, width] and their lengths [size]; padding rows have one token."""
        rows = [[0]] * self.size
        for row, ids in zip(self.taken, token_ids, strict=True):
            rows[row] = ids
        return pad(rows, width)

    def split(self, counts: Sequence[int], most: int) -> "_Rows":
        """Returns the rows of a batch with `most` rows for each of these rows, the first `counts` of them taken."""
        assert max(counts) <= most
        taken = [row * most + i for row, count in zip(self.taken, counts, strict=True) for i in range(count)]
        return _Rows(taken, self.size * most)


@jax.jit
def _take(prefix: Prefix, index_P: jax.Array) -> Prefix:
    return jax.tree.map(lambda x: x[index_P], prefix)


@jax.jit
def _confidences(logits_BA: jax.Array) -> AnyArray:
    if logits_BA.shape[1] == 2:
        return confidence(logits_BA[:, 0], logits_BA[:, 1])
    return four_grade_confidence(logits_BA)


def _step(steps: Any, row: int) -> Step:
    token_ids = steps.tokens_BT[row, : steps.length_B[row]].tolist()
    stopped, complete = bool(steps.stopped_B[row]), bool(steps.complete_B[row])
    return Step(token_ids, float(steps.log_prob_B[row]), stopped, complete)


def _n_common(rows: Sequence[list[int]]) -> int:
    """Returns the length of the longest common prefix of the rows."""
    alike = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(itertools.takewhile(bool, alike))
