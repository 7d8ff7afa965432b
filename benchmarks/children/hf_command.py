"""Does one work of `benchmarks.real_lengths` with transformers, from the loading of the model to the result.

`python -m benchmarks.children.hf_command WORK TASKS CHECK`: rows are token ids; batches hold rows of similar length,
padded on the left to the longest, and logits are computed for targets only.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

Row = dict[str, Any]
ROWS = 4  # at once where no gradient needs more


def load(task: Row) -> Any:
    torch.set_num_threads(os.cpu_count() or 1)
    return transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32).eval()


def adapted(task: Row) -> Any:
    """Loads the model with new adapters, which recomputes layers in the backward pass, as ours does."""
    import peft

    lora = peft.LoraConfig(r=task["rank"], lora_alpha=task["alpha"], target_modules="all-linear")
    model = load(task)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return peft.get_peft_model(model, lora).train()


def padded(rows: Sequence[list[int]]) -> Row:
    """Pads rows on the left, so that the last tokens of all rows stand in the same columns."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def by_length(rows: Sequence[Row]) -> Iterator[list[int]]:
    """Yields the numbers of the rows of each batch."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]["prompt"]))
    yield from (order[i : i + ROWS] for i in range(0, len(order), ROWS))


def log_prob_sums(model: Any, rows: Sequence[Row]) -> torch.Tensor:
    """Returns the sum of log π over the target of each row."""
    batch = padded([row["prompt"] + row["target"] for row in rows])
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    n = max(len(row["target"]) for row in rows)
    logits = model(**batch, position_ids=places, logits_to_keep=n + 1, use_cache=False).logits[:, :-1]
    log_probs = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["input_ids"][:, -n:].flatten(), reduction="none"
    ).view(len(rows), n)
    counts = torch.tensor([len(row["target"]) for row in rows])
    return torch.where(torch.arange(n) >= n - counts[:, None], log_probs, 0.0).sum(1)


def score(task: Row, rows: Sequence[Row]) -> Row:
    model, sums = load(task), [0.0] * len(rows)
    with torch.inference_mode():
        for batch in by_length(rows):
            for i, value in zip(batch, log_prob_sums(model, [rows[i] for i in batch]).tolist(), strict=True):
                sums[i] = value
    return {"values": sums}


def generate(task: Row, rows: Sequence[Row]) -> Row:
    model, answers = load(task), [[0]] * len(rows)
    settings = {"max_new_tokens": task["max_tokens"], "do_sample": False, "eos_token_id": task["stop"]}
    with torch.inference_mode():
        for batch in by_length(rows):
            given = padded([rows[i]["prompt"] for i in batch])
            sequences = model.generate(**given, **settings, pad_token_id=0)[:, given["input_ids"].shape[1] :]
            for i, ids in zip(batch, sequences.tolist(), strict=True):
                end = next((n for n, token in enumerate(ids) if token in task["stop"]), len(ids))
                answers[i] = ids[: end + 1]
    return {"tokens": answers}


def warmup(task: Row, batches: Sequence[Sequence[Row]]) -> Row:
    model, losses = adapted(task), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], task["learning_rate"])
    for rows in batches:
        loss = -log_prob_sums(model, rows).sum() / sum(len(row["target"]) for row in rows)
        step(model, optimizer, loss)
        losses.append(loss.item())
    return {"values": losses[:1]}


def dpo(task: Row, pairs: Sequence[Sequence[Row]]) -> Row:
    model, rows = adapted(task), [row for pair in pairs for row in pair]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], task["learning_rate"])
    reference = torch.zeros(len(rows))
    with torch.no_grad(), model.disable_adapter():
        for batch in by_length(rows):
            reference[batch] = log_prob_sums(model, [rows[i] for i in batch])
    ratios = log_prob_sums(model, rows) - reference
    step(model, optimizer, -torch.nn.functional.logsigmoid(ratios[::2] - ratios[1::2]).mean())
    return {"values": reference.tolist()}


def step(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    what, tasks, check = sys.argv[1:]
    task = json.loads(Path(tasks).read_text())
    work = {"start": score, "score": score, "generate": generate, "warmup": warmup, "dpo": dpo}[what]
    Path(check).write_text(json.dumps(work(task, task[what])))
