"""Searches with Hugging Face generate, one prompt and candidate at a time, like the public code of arXiv 2405.00451.

Every candidate reads its prompt again, and is scored by one forward pass and judged by another.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from benchmarks import serial
from benchmarks.children.hf import load, log_prob_sums
from benchmarks.protocol import Task, Work, serve, timed

N_CHECKED = 2


class StepEnd(transformers.StoppingCriteria):
    """Stopping criterion that decodes the new text after each token and stops where the step ends."""

    def __init__(self, tokenizer: Any, prompt_length: int, path: list[int]):
        self.tokenizer, self.start, self.before = tokenizer, prompt_length, tokenizer.decode(path)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor(
            [serial.ends_step(self.before, self.tokenizer.decode(row[self.start :])) for row in input_ids]
        )


class Serial:
    """The model as the functions that `benchmarks.serial` takes, for one problem."""

    def __init__(self, model: Any, tokenizer: Any, task: Task, problem: dict[str, Any]):
        self.model, self.tokenizer, self.problem = model, tokenizer, problem
        self.stop_ids, self.letters = task["stop_ids"], task["letters"]

    def sample(self, path: list[int], limit: int, until_stop: bool, _: int) -> list[int]:
        ids = torch.tensor([self.problem["prompt_ids"] + path])
        ends = [] if until_stop else [StepEnd(self.tokenizer, ids.shape[1], path)]
        with torch.inference_mode():
            sequences_BS = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=limit,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=self.stop_ids,
                stopping_criteria=transformers.StoppingCriteriaList(ends),
            )
        return sequences_BS[0, ids.shape[1] :].tolist()

    def log_prob(self, path: list[int], step: list[int]) -> float:
        ids = torch.tensor([self.problem["prompt_ids"] + path + step])
        return log_prob_sums(self.model, ids, len(step)).item()

    def judge(self, path: list[int]) -> float:
        frame, shown = self.problem["frame"], [i for i in path if i not in self.stop_ids]
        ids = torch.tensor([[*self.problem["prompt_ids"], *frame["before"], *shown, *frame["after"]]])
        with torch.inference_mode():
            logits = self.model(ids, logits_to_keep=1, use_cache=False).logits[0, -1, self.letters]
        return logits.softmax(-1)[0].item()

    def grade(self, path: list[int], finished: bool) -> float:
        """Compares calls as text without spaces: stricter than the package's reading, and as cheap."""
        gold, text = self.problem["sample"]["target"], self.tokenizer.decode(path, skip_special_tokens=True)
        return 1.0 if finished and gold.split() == text.split() else -1.0

    def functions(self) -> serial.Model:
        return serial.Model(self.sample, self.log_prob, self.judge, self.grade)


def search(task: Task) -> Work:
    """Measures the whole search of one prompt per round, the next prompt each time."""
    model, tokenizer = load(task), transformers.AutoTokenizer.from_pretrained(task["model"])
    settings = serial.SerialSettings(**task["sizes"]["settings"])
    problems = itertools.cycle(task["problems"])

    def work() -> float:
        problem = next(problems)
        functions = Serial(model, tokenizer, task, problem).functions()
        return serial.nodes_below(serial.search(problem["gold_steps"], task["stop_ids"], functions, settings))

    return Work({"values": _first_gold_steps(model, tokenizer, task, settings.max_step_tokens)}, timed(work))


def _first_gold_steps(model: Any, tokenizer: Any, task: Task, limit: int) -> Sequence[float]:
    """Returns log-probability and self-evaluation of the first problems' first gold steps; warms up generation."""
    scores: list[float] = []
    for problem in task["problems"][:N_CHECKED]:
        one, step = Serial(model, tokenizer, task, problem), problem["gold_steps"][0][:limit]
        one.sample([], 2, False, 0)
        scores += [one.log_prob([], step), one.judge(step)]
    return scores


if __name__ == "__main__":
    serve({"search": search})
