"""Runs Tunix on JAX: its sampler, and its trainers with qwix adapters, in float32."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import ModelConfig
from tunix.models.llama3.params import create_model_from_safe_tensors
from tunix.sft import peft_trainer, utils
from tunix.sft.dpo import dpo_trainer

from benchmarks.protocol import Task, Work, serve, timed

LINEAR = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"
ALPHA = 32.0
MESH = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def load(task: Task) -> tuple[ModelConfig, Any]:
    raw = json.loads((Path(task["model"]) / "config.json").read_text())
    config = ModelConfig(
        num_layers=raw["num_hidden_layers"],
        vocab_size=raw["vocab_size"],
        embed_dim=raw["hidden_size"],
        hidden_dim=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        head_dim=raw["head_dim"],
        num_kv_heads=raw["num_key_value_heads"],
        rope_theta=raw["rope_parameters"]["rope_theta"],
        norm_eps=raw["rms_norm_eps"],
        weight_tying=raw["tie_word_embeddings"],
    )
    return config, create_model_from_safe_tensors(task["model"], config, MESH, jnp.float32)


class Rows:
    """A tokenizer whose texts are the indices of the task's prompts; no token ends a response."""

    def __init__(self, prompts: Sequence[list[int]]):
        self.prompts = prompts

    def encode(self, text: str, **_: Any) -> list[int]:
        return self.prompts[int(text)]

    def decode(self, _: Any, **__: Any) -> str:
        return ""

    def bos_id(self) -> int:
        return 0

    def eos_id(self) -> int:
        return -1

    def pad_id(self) -> int:
        return 0


def _sampling(task: Task, candidates: int) -> Work:
    config, model = load(task)
    size, new = task["sizes"], task["sizes"]["new"]
    cache = CacheConfig(size["prompt"] + new, config.num_layers, config.num_kv_heads, config.head_dim)
    sampler = Sampler(model, Rows(task["prompts"]), cache)
    texts = [str(i) for i in range(len(task["prompts"])) for _ in range(candidates)]

    def run(**drawn: Any) -> list[list[int]]:
        sampled = sampler(texts, max_generation_steps=new, max_prompt_length=size["prompt"], **drawn)
        return [np.asarray(tokens).tolist() for tokens in sampled.tokens]

    greedy, drawn = run(), {} if candidates == 1 else {"temperature": 1.0, "top_p": 1.0}
    run(**drawn)
    return Work({"tokens": greedy}, timed(lambda: sum(map(len, run(**drawn)))))


def generate(task: Task) -> Work:
    return _sampling(task, 1)


def search_batched(task: Task) -> Work:
    return _sampling(task, task["sizes"]["candidates"])


def _adapted(task: Task, model: Any) -> Any:
    rank = task["sizes"]["lora"]["rank"]
    if not rank:
        return model
    provider = qwix.LoraProvider(module_path=LINEAR, rank=rank, alpha=ALPHA)
    return qwix.apply_lora_to_model(model, provider, **model.get_model_input())


def _optimizer(task: Task) -> optax.GradientTransformation:
    rate = optax.cosine_decay_schedule(task["learning_rate"], task["sizes"]["steps"])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01))


def sft(task: Task) -> Work:
    _, model = load(task)
    tokens_BT = np.concatenate([task["prompts"], task["targets"]], axis=1, dtype=np.int32)
    mask_BT = np.arange(tokens_BT.shape[1]) >= len(task["prompts"][0])
    batch = peft_trainer.TrainingInput(tokens_BT, np.broadcast_to(mask_BT, tokens_BT.shape).astype(np.int32))
    trainer = peft_trainer.PeftTrainer(
        _adapted(task, model), _optimizer(task), peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
    )
    ones_BT = jnp.ones(tokens_BT.shape, bool)

    def inputs(x: peft_trainer.TrainingInput) -> dict[str, Any]:
        return {
            "input_tokens": x.input_tokens,
            "input_mask": x.input_mask,
            "positions": utils.build_positions_from_mask(ones_BT),
            "attention_mask": utils.make_causal_attn_mask(ones_BT),
        }

    return _training(trainer.with_gen_model_input_fn(inputs), batch, tokens_BT.size, task, ["loss"])


def dpo(task: Task) -> Work:
    (_, model), (_, reference) = load(task), load(task)
    parts = [np.array(task[name], np.int32) for name in ("prompts", "chosen", "rejected")]
    batch = dpo_trainer.TrainingInput(*(x for part in parts for x in (part, np.ones_like(part))))
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9)
    trainer = dpo_trainer.DPOTrainer(_adapted(task, model), reference, _optimizer(task), config)
    return _training(trainer, batch, len(parts[0]), task, ["log_probs/chosen", "log_probs/rejected", "loss"])


def _training(trainer: Any, batch: Any, amount: float, task: Task, names: Sequence[str]) -> Work:
    """Measures some steps inside a `train()` per round; checks the metrics of the first step."""
    trainer.is_managed_externally = True  # the trainer continues instead of skipping what it has seen
    steps = task["sizes"]["steps"]

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        with jax.set_mesh(MESH):
            trainer.train([batch] * steps)
            jax.block_until_ready(trainer.optimizer.step)
        return amount * steps, time.perf_counter() - start

    run()
    run()
    history = [trainer.metrics_logger.get_metric_history(trainer.metrics_prefix, name, "train") for name in names]
    return Work({"values": [float(values[0]) for values in history]}, run)


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    serve({"generate": generate, "search_batched": search_batched, "sft": sft, "full_sft": sft, "dpo": dpo})
