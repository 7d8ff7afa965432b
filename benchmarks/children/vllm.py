"""Runs vLLM's CPU build in float32: greedy generation, and several samples per prompt."""

from typing import Any

import vllm

from benchmarks.protocol import Task, Work, serve, timed


def _engine(task: Task) -> tuple[Any, list[Any]]:
    length = task["sizes"]["prompt"] + task["sizes"]["new"]
    engine = vllm.LLM(
        model=task["model"],
        dtype="float32",
        max_model_len=length,
        max_num_batched_tokens=len(task["prompts"]) * length,
        max_num_seqs=len(task["prompts"]) * task["sizes"].get("candidates", 1),
        seed=task["seed"],
        disable_log_stats=True,
    )
    return engine, [vllm.TokensPrompt(prompt_token_ids=ids) for ids in task["prompts"]]


def _work(task: Task, candidates: int) -> Work:
    engine, prompts = _engine(task)

    def run(temperature: float) -> list[list[int]]:
        engine.reset_prefix_cache()  # candidates share their prompt's cache; rounds must not
        new = task["sizes"]["new"]
        settings = vllm.SamplingParams(n=candidates, temperature=temperature, max_tokens=new, ignore_eos=True)
        answers = engine.generate(prompts, settings, use_tqdm=False)
        return [list(one.token_ids) for answer in answers for one in answer.outputs]

    # Greedy candidates are identical, and vLLM refuses to make more than one.
    greedy = [list(row) for row in _greedy(engine, prompts, task) for _ in range(candidates)]
    run(float(candidates > 1))
    return Work({"tokens": greedy}, timed(lambda: sum(map(len, run(float(candidates > 1))))))


def _greedy(engine: Any, prompts: list[Any], task: Task) -> list[list[int]]:
    settings = vllm.SamplingParams(temperature=0.0, max_tokens=task["sizes"]["new"], ignore_eos=True)
    return [list(answer.outputs[0].token_ids) for answer in engine.generate(prompts, settings, use_tqdm=False)]


def generate(task: Task) -> Work:
    return _work(task, 1)


def search_batched(task: Task) -> Work:
    return _work(task, task["sizes"]["candidates"])


if __name__ == "__main__":
    serve({"generate": generate, "search_batched": search_batched})
