"""Runs Hugging Face transformers on PyTorch: batched generation, scoring and loading."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.protocol import Task, Work, serve, timed

ROWS_PER_FORWARD = 8  # for scoring: faster here than all rows at once, whose logits alone are gigabytes


def load(task: Task) -> Any:
    """Loads the model, ready to generate without stopping early."""
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(task["seed"])
    model = transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def sampler(model: Any, ids_BT: torch.Tensor, new: int) -> Callable[[bool], torch.Tensor]:
    """Returns a function that continues all rows by `new` tokens, sampled at temperature 1 or greedy."""

    def run(sample: bool) -> torch.Tensor:
        drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
        with torch.inference_mode():
            sequences_BS = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=new, **drawn)
        return sequences_BS[:, ids_BT.shape[1] :]

    return run


def generate(task: Task) -> Work:
    run = sampler(load(task), torch.tensor(task["prompts"]), task["sizes"]["new"])
    return Work({"tokens": run(False).tolist()}, timed(lambda: run(False).numel()))


def search_batched(task: Task) -> Work:
    ids_BT = torch.tensor(task["prompts"]).repeat_interleave(task["sizes"]["candidates"], dim=0)
    run = sampler(load(task), ids_BT, task["sizes"]["new"])
    return Work({"tokens": run(False).tolist()}, timed(lambda: run(True).numel()))


def log_prob_sums(model: Any, ids_BT: torch.Tensor, n_targets: int) -> torch.Tensor:
    """Returns the sums of log π over the last tokens of each row; computes logits only for these."""
    with torch.inference_mode():
        logits = model(ids_BT, logits_to_keep=n_targets + 1, use_cache=False).logits[:, :-1].float()
    targets = ids_BT[:, -n_targets:, None]
    return (logits.gather(2, targets)[..., 0] - logits.logsumexp(-1)).sum(-1)


def score(task: Task) -> Work:
    model = load(task)
    ids_BT = torch.cat([torch.tensor(task["prompts"]), torch.tensor(task["targets"])], dim=1)
    n_targets = len(task["targets"][0])

    def sums() -> list[float]:
        return [x for part in ids_BT.split(ROWS_PER_FORWARD) for x in log_prob_sums(model, part, n_targets).tolist()]

    def work() -> float:
        sums()
        return ids_BT.numel()

    return Work({"values": sums()}, timed(work))


def load_weights(task: Task) -> Work:
    def load_and_sum() -> float:
        with torch.inference_mode():
            return float(sum(x.abs().sum() for x in load(task).parameters()))

    size = sum(path.stat().st_size for path in Path(task["model"]).glob("*.safetensors")) / 1e9

    def work() -> float:
        load_and_sum()
        return size

    return Work({"values": [load_and_sum()]}, timed(work))


SUITES = {"generate": generate, "score": score, "search_batched": search_batched, "import": load_weights}

if __name__ == "__main__":
    serve(SUITES)
