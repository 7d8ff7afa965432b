"""Runs TRL's SFTTrainer and DPOTrainer on PyTorch, with PEFT's adapters.

Times them inside a real `train()`, from the beginning of the first step to the end of the last.
"""

import os
import sys
import tempfile
import time
from typing import Any

import datasets
import peft
import torch
import transformers
import trl

from benchmarks.protocol import Task, Work, serve

ALPHA = 32.0


class Clock(transformers.TrainerCallback):
    """Callback that records when the steps of a `train()` began and ended, and their losses."""

    def __init__(self) -> None:
        self.start = self.end = 0.0
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.start, self.logs = 0.0, []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = self.start or time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end = time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.logs.append(logs)


class TokenDpoTrainer(trl.DPOTrainer):
    """A DPOTrainer for pairs that are already token ids."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def sft(task: Task) -> Work:
    ids = list(zip(task["prompts"], task["targets"], strict=True))
    rows = [
        {"input_ids": prompt + target, "completion_mask": [0] * len(prompt) + [1] * len(target)}
        for prompt, target in ids
    ]
    settings = trl.SFTConfig(**_arguments(task), packing=False, completion_only_loss=True)
    trainer = trl.SFTTrainer(**_parts(task, settings, rows))
    return _work(trainer, sum(len(row["input_ids"]) for row in rows) * task["sizes"]["steps"], task)


def dpo(task: Task, precompute: bool = False) -> Work:
    columns = zip(task["prompts"], task["chosen"], task["rejected"], strict=True)
    rows = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)) for ids in columns]
    settings = trl.DPOConfig(**_arguments(task), precompute_ref_log_probs=precompute)
    trainer = TokenDpoTrainer(**_parts(task, settings, rows))
    return _work(trainer, len(rows) * task["sizes"]["steps"], task)


def _arguments(task: Task) -> dict[str, Any]:
    """Returns arguments that match our training: one batch per step, AdamW, cosine without warm-up, no recomputation.

    Everything is float32.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    return {
        "output_dir": tempfile.mkdtemp(dir=task["out"]),
        "per_device_train_batch_size": task["sizes"]["rows"],
        "num_train_epochs": task["sizes"]["steps"],
        "learning_rate": task["learning_rate"],
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "max_length": None,
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": task["seed"],
    }


def _parts(task: Task, settings: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    rank = task["sizes"]["lora"]["rank"]
    lora = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return {
        "model": transformers.AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32),
        "args": settings,
        "train_dataset": datasets.Dataset.from_list(rows),
        "processing_class": transformers.AutoTokenizer.from_pretrained(task["model"]),
        "peft_config": lora if rank else None,
        "callbacks": [Clock()],
    }


def _work(trainer: Any, amount: float, task: Task) -> Work:
    clock = next(x for x in trainer.callback_handler.callbacks if isinstance(x, Clock))

    def run() -> tuple[float, float]:
        trainer.train()
        return amount, clock.end - clock.start

    run()
    losses = [log["loss"] for log in clock.logs]
    # For preferences also the log-probabilities: before the first step, the loss is ln 2 for any model.
    values = [clock.logs[0][f"logps/{side}"] for side in ("chosen", "rejected") if f"logps/{side}" in clock.logs[0]]
    return Work({"values": [*values, *(losses[:1] if task["sizes"]["lora"]["rank"] else losses)]}, run)


def cached_dpo(task: Task) -> Work:
    """Runs DPO with the reference's log-probabilities computed beforehand, an option of TRL."""
    return dpo(task, precompute=True)


if __name__ == "__main__":
    serve({"dpo": cached_dpo} if "--cached" in sys.argv else {"sft": sft, "full_sft": sft, "dpo": dpo})
