"""Rows of a run's files: one type for each file of JSON lines, its fields in the order of the keys in the file.

Defaults stand for the keys that files of earlier versions lack; a field that is None by default is written only if it
has a value. `store.columns` checks the types, and the rules of annotated ones.
"""

from typing import Annotated, Any, NamedTuple

TokenIds = Annotated[list[int], "a list of token ids", lambda ids: all(0 <= token < 2**31 for token in ids)]
NodeNumber = Annotated[int, "a node number", lambda number: number >= 0]


def _follow_their_parents(nodes: list[dict[str, Any]]) -> bool:
    """Returns True if the first node is the root and every other one comes after its parent."""
    return bool(nodes) and all((0 if n else -1) <= node["parent"] < n for n, node in enumerate(nodes))


class PerplexityRow(NamedTuple):
    """A sample and the perplexity of its gold response, as `--stage=score --output=FILE` writes it."""

    id: str
    n_tokens: int
    """Length of the gold response in tokens, including the end of turn."""
    logprob_sum: float
    perplexity: float


class ScoreRow(NamedTuple):
    """A sample of the replay buffer, a row of `scores.jsonl`: a `PerplexityRow`, then rank and counts of answers."""

    id: str
    n_tokens: int
    logprob_sum: float
    perplexity: float
    rank: int | None
    """Position among the samples to search; None if it is not searched."""
    right: int | None
    """Right answers among the sampled ones; None if none were sampled."""
    greedy: int | None
    """1 if the greedy answer is right, 0 if it is wrong; None if it is not searched."""


class NodeRow(NamedTuple):
    """A node of a search tree; its statistics are those of `mcts.tree`."""

    node: NodeNumber
    """Its position in the list of nodes."""
    parent: int
    """-1 for the root."""
    depth: int
    text: str
    """The step into the node, as text with special tokens."""
    token_ids: TokenIds
    visits: int
    q: float
    value: float
    prior: float
    outcome: float
    confidence: float
    terminal: bool
    gold: bool
    """True if the response up to here matches the gold response."""
    sampled: bool = True
    """True if the model sampled the step, False if it is an injected gold step."""
    complete: bool = True
    """True if the step ends at a step boundary or a stop token, False if it was cut off."""
    observed: str | None = None
    """What was recorded between this turn's end and the next turn, for the last step of a turn that has a next one."""


class TreeRow(NamedTuple):
    """A search tree, a row of `trees.jsonl`."""

    id: str
    gold: str
    """The target that responses were graded against."""
    nodes: Annotated[list[NodeRow], "a list of nodes, each after its parent", _follow_their_parents]
    """The root first."""


class PreferenceRow(NamedTuple):
    """A preference pair of two steps from the same node, a row of `pairs.jsonl`."""

    id: str
    prompt: str
    """The prompt with the response up to the node."""
    chosen: str
    rejected: str
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    q_chosen: float
    q_rejected: float
    visits_chosen: int
    visits_rejected: int
    tree: str
    """Id of the tree, which is the sample's."""
    node: NodeNumber
    chosen_node: NodeNumber
    rejected_node: NodeNumber
    best_ending_chosen: float
    best_ending_rejected: float
    chosen_sampled: bool = True
    chosen_is_gold: bool = False
    valid: bool = True
    """True if the outcomes agree that the chosen step is better."""


class AnswerRow(NamedTuple):
    """A right turn that the model sampled itself in a search, a row of `answers.jsonl`."""

    id: str
    tree: str
    prompt_ids: TokenIds
    answer_ids: TokenIds


class SearchRow(NamedTuple):
    """The result of searching one sample, a row of the search's journal."""

    tree: TreeRow
    pairs: list[PreferenceRow]
    invalid_pairs: int
    """Pairs that compare no right ending with a wrong one."""
    answers: list[AnswerRow]
    sampled_tokens: int
    judged: tuple[float, float] | None
    """Confidence in one of its first steps, and the same with the answer letters reversed; None if not asked."""
    reachable: bool
    """True if the search's limits allow the gold response."""


class ReferenceRow(NamedTuple):
    """Log-probabilities of the two steps of a pair under a policy, a row of `reference.jsonl`."""

    id: str
    chosen: float
    rejected: float


class EvaluationRow(NamedTuple):
    """A graded answer to a held-out sample, a row of `evaluation_<split>_<limit>.jsonl`."""

    id: str
    categories: list[str]
    correct: bool
    finished: bool
    """True if the answer ends with a stop token, False if it ran into the length limit."""
    response: str
    target: str


class GeneratedRow(NamedTuple):
    """A response to a prompt, as `--stage=generate --output=FILE` writes it."""

    id: str
    token_ids: TokenIds
    text: str
