"""Evaluates a phase's policy on a public benchmark: answers the questions, scores the responses, compares runs.

In: a phase with weights, or result files from any source, and the benchmark's data. Out, in `<phase>/<benchmark>/`:
responses (BFCL's in the leaderboard's layout), one `<category>.json` per finished category, `scores.json` and
`summary.json`.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from itool_jax.config import Config
from itool_jax.data import sources
from itool_jax.data.card import overlap, overlap_lines
from itool_jax.data.rows import read_rows
from itool_jax.evaluation import api_bank
from itool_jax.evaluation.bfcl import data as bfcl_data
from itool_jax.evaluation.bfcl import scores as bfcl_scores
from itool_jax.evaluation.bfcl import setup as bfcl_setup
from itool_jax.evaluation.bfcl.checker import Verdict
from itool_jax.evaluation.bfcl.scores import Score
from itool_jax.evaluation.bfcl.simulators import Conversations, Simulators, converse, official_verdicts
from itool_jax.evaluation.comparison import compare, fallen, read_scores
from itool_jax.inference.sampler import generate
from itool_jax.store import cache, splits
from itool_jax.store.across_hosts import Advance, by_row, stop_if_any_asked
from itool_jax.store.cache import Figures, Step, Task
from itool_jax.store.paths import trained_phases
from itool_jax.store.run import Run
from itool_jax.store.weights import PhasePolicy
from itool_jax.system import hosts
from itool_jax.system.files import write_json, write_jsonl
from itool_jax.system.messages import console_out, log
from itool_jax.text.calls import read_calls
from itool_jax.text.chat import Chat
from itool_jax.text.tool_formats import BRACKETS, read_any

UNFIT = "Error during inference: "
"""Prefix of a response in the leaderboard's result files where a model gave no answer."""


def run(run: Run) -> dict[str, Any]:
    """Scores result files, or evaluates the chosen phases of the run. Returns the figures of each."""
    config = run.config
    _check(config)
    if config.results is not None:
        return {"results": score_results(config)}
    known = trained_phases(config.run_dir)
    chosen = config.evaluate.phase or (known[-1] if known else "base")
    if chosen not in ("all", "base", *known):
        raise ValueError(
            f"evaluate.phase={chosen} has no weights in {config.run_dir}; phases with weights: base {' '.join(known)}"
        )
    return {phase: evaluate(run, phase) for phase in (("base", *known) if chosen == "all" else (chosen,))}


def _check(config: Config) -> None:
    """Checks settings, scorer and `against` before any work. Raises ValueError if one is invalid or missing."""
    if config.benchmark != "bfcl" and (config.official or config.results is not None):
        name = "results" if config.results is not None else "official"
        raise ValueError(f"{name} is only for --benchmark=bfcl, got --benchmark={config.benchmark}")
    if config.official:
        bfcl_setup.python()
    if config.against is not None:
        read_scores(config.against)


def evaluate(run: Run, phase: str) -> Figures:
    """Answers and scores the chosen categories that are not done yet, prints the table and returns the figures."""
    config, function_calling = run.config, _function_calling(run)
    if function_calling:
        log(f"{phase}: function-calling mode: the template lists the functions, calls are {run.base.chat.form.name}")
    scores = {category: _score(_category(run, phase, category)) for category in categories(config)}
    figures = summarize(config, scores)
    where = results_folder(config, phase)
    write_json(where / "scores.json", bfcl_scores.as_json(scores))
    write_json(where / "summary.json", figures)
    show(config, phase, scores, figures)
    if config.official:
        with Simulators() as simulators:
            responses = {c: _read_responses(config, phase, c) for c in scores}
            compare_official(config, scores, responses, simulators, function_calling)
    if config.against is not None:
        compare(config, scores, where / "comparison.json")
    log(f"responses and scores saved in {where}")
    return figures


def score_results(config: Config) -> Figures:
    """Scores the result files of `results`, writes `output`, and prints the table."""
    assert config.results is not None
    files = bfcl_data.find_results(config.results, config.evaluate.layout)
    chosen = [category for category in files if not config.categories or category in categories(config)]
    if not chosen:
        raise ValueError(f"{config.results} contains none of the categories {', '.join(categories(config))}")
    if set(chosen) & set(bfcl_data.MULTI_TURN):
        bfcl_setup.python()
    questions = {category: bfcl_data.load_questions(data_folder(config), category) for category in chosen}
    responses = {category: bfcl_data.read_results(files[category], questions[category]) for category in chosen}
    function_calling = any(
        bfcl_data.is_function_calling(result, category)
        for category, results in responses.items()
        for result in results.values()
    )
    scores = {
        category: _scored(config, questions[category], questions[category], results, function_calling)
        for category, results in responses.items()
    }
    figures = summarize(config, scores)
    if config.output is not None:
        write_json(config.output, bfcl_scores.as_json(scores))
    show(config, config.results.name, scores, figures)
    if config.official:
        with Simulators() as simulators:
            compare_official(config, scores, responses, simulators, function_calling)
    if config.against is not None:
        compare(config, scores, config.output and config.output.with_suffix(".comparison.json"))
    return figures


def categories(config: Config) -> tuple[str, ...]:
    """Returns the categories to run, for BFCL by default the single-turn ones.

    Raises ValueError for a category that cannot be run here.
    """
    if config.benchmark == "bfcl":
        chosen = bfcl_data.select(config.categories or ("single_turn",))
        if set(chosen) & set(bfcl_data.MULTI_TURN):
            bfcl_setup.python()
        return chosen
    if unknown := set(config.categories) - set(api_bank.CATEGORIES):
        raise ValueError(f"unknown API-Bank category {min(unknown)!r}; choose from: {', '.join(api_bank.CATEGORIES)}")
    return config.categories or api_bank.CATEGORIES


def data_folder(config: Config) -> Path:
    """Returns the folder of the questions: evaluate.benchmark_data, else --data, else the installed scorer's data."""
    if config.evaluate.benchmark_data is not None:
        return config.evaluate.benchmark_data
    if config.stage == "evaluate" and config.data != "generated":
        return Path(config.data)
    if config.benchmark == "bfcl":
        return bfcl_setup.data()
    raise ValueError("api_bank needs --data=DIR with level-1-api.json and level-2-api.json")


def question_files(config: Config) -> list[str]:
    """Returns the files of the questions that a run is evaluated on, for the leakage check of its training data."""
    if config.benchmark is None:
        return []
    return sorted({str(_module(config).question_file(data_folder(config), name)) for name in categories(config)})


def results_folder(config: Config, phase: str) -> Path:
    """Returns the folder of a phase's responses and scores."""
    limit = config.evaluate.benchmark_limit
    return config.run_dir / phase / (f"{config.benchmark}_{limit}" if limit else str(config.benchmark))


def _load(config: Config, category: str) -> Sequence[Any]:
    return _module(config).load_questions(data_folder(config), category)


def _module(config: Config) -> Any:
    return bfcl_data if config.benchmark == "bfcl" else api_bank


def _function_calling(run: Run) -> bool:
    """Returns True if BFCL's functions go to the chat template, whose own form of calls is not the leaderboard's."""
    return run.config.benchmark == "bfcl" and run.base.chat.native and run.base.chat.form is not BRACKETS


def _response_file(config: Config, phase: str, category: str) -> Path:
    where = results_folder(config, phase)
    if config.benchmark == "bfcl":
        return bfcl_data.result_file(where, category, config.evaluate.layout)
    return where / f"{category}_result.jsonl"


def _category(run: Run, phase: str, category: str) -> Figures:
    """Returns the figures of one category, which is answered, scored and written first unless that is done."""
    config = run.config
    file, questions = _response_file(config, phase, category), _load(config, category)
    name = f"{results_folder(config, phase).name}/{category}"
    work = functools.partial(_answer_category, category, questions, file)
    hashes = {"questions": cache.hash_of(repr(questions) + ("function calling" if _function_calling(run) else ""))}
    outputs = [str(file.relative_to(config.run_dir / phase))]
    step: Step[Figures] = Step(name, outputs, work, lambda phase: phase.figures(name), hashes)
    return run.phase(phase).cached(step, run.policy(phase))


def _answer_category(category: str, questions: Sequence[Any], file: Path, task: Task, policy: PhasePolicy) -> Figures:
    config = task.config
    asked = questions[: config.evaluate.benchmark_limit or None]
    policy.running()  # on every process, even one without questions
    work = functools.partial(_answer, task.run, policy, category)
    answers = task.map(asked, work, f"{config.benchmark} {category}")
    if category not in bfcl_data.MULTI_TURN and (unfit := sum(map(_unanswered, answers))):
        log(
            f"{category}: {unfit} of {len(answers)} prompts do not fit the model's context and get an error "
            "line as response"
        )
    results = {question.id: result for question, result in zip(asked, answers, strict=True)}
    write_jsonl(file, ({"id": name, "result": result} for name, result in results.items()))
    return _scored(config, questions, asked, results, _function_calling(task.run), task.run.base.chat)._asdict()


def _score(figures: Figures) -> Score:
    return Score(**{name: figures[name] for name in Score._fields if name in figures})


def _read_responses(config: Config, phase: str, category: str) -> dict[str, Any]:
    return {row["id"]: row["result"] for _, row in read_rows(_response_file(config, phase, category))}


def _scored(
    config: Config,
    questions: Sequence[Any],
    asked: Sequence[Any],
    results: Mapping[str, Any],
    function_calling: bool,
    chat: Chat | None = None,
) -> Score:
    """Scores the responses to `asked`, a subset of a category's `questions`; `chat` is of the model that gave them."""
    if config.benchmark == "api_bank":
        native = None if chat is None or chat.form is BRACKETS else chat.read_calls
        verdicts = api_bank.judge(asked, results, native)
    else:
        verdicts = _judge(config, asked, results, function_calling)
        _warn_of_other_forms(asked[0].category if asked else "", results)
    return bfcl_scores.score(verdicts, len(questions), sum(map(_unanswered, results.values())))


def _unanswered(result: Any) -> bool:
    """Returns True if, at any step, the harness wrote an error line in place of the model's answer."""
    if isinstance(result, list):
        return any(map(_unanswered, result))
    return isinstance(result, str) and result.startswith(UNFIT)


def _judge(
    config: Config, questions: Sequence[Any], results: Mapping[str, Any], function_calling: bool
) -> dict[str, Verdict]:
    """Judges a category's responses; multi-turn responses are judged by the official scorer."""
    mode = _mode(config, function_calling)
    if questions and questions[0].category in bfcl_data.MULTI_TURN:
        with Simulators() as simulators:
            return official_verdicts(questions, results, simulators, **mode)
    return bfcl_scores.judge(questions, results, **mode)


def _mode(config: Config, function_calling: bool) -> dict[str, bool]:
    """Returns how the model was asked, for the judges; our own tools have `_` for every dot in a name."""
    ours = function_calling and config.results is None
    return {"underscore_to_dot": config.evaluate.underscore_to_dot or ours, "function_calling": function_calling}


def _warn_of_other_forms(category: str, results: Mapping[str, Any]) -> None:
    """Says how many responses hold, as text, calls that the leaderboard does not read."""
    n = sum(
        any(read_calls(text) is None and read_any(text) for text in _texts_in(result)) for result in results.values()
    )
    if n:
        log(
            f"{category}: {n} of {len(results)} responses hold calls in a form that the leaderboard does not read, "
            "such as <tool_call>, and count as text; it reads [f(a=1)], or lists of {name: arguments}"
        )


def _texts_in(result: Any) -> Iterator[str]:
    if isinstance(result, str):
        yield result
    for item in result if isinstance(result, list) else ():
        yield from _texts_in(item)


def _answer(run: Run, policy: PhasePolicy, category: str, questions: Sequence[Any]) -> Iterator[Advance]:
    """Answers questions. A multi-turn question is finished when its conversation has ended."""
    chat = run.base.chat if _function_calling(run) else None
    if category not in bfcl_data.MULTI_TURN:
        batches = _texts(run, policy, [_first(run.config, question, chat) for question in questions])
        yield from by_row([(i, _response(text, chat)) for i, text in batch] for batch in batches)
        return

    def next_step(conversations: Conversations) -> list[str]:
        texts: dict[int, str] = {}
        for batch in _texts(run, policy, conversations):
            texts |= dict(batch)
            stop_if_any_asked(run.config)
        return [texts[i] for i in range(len(conversations))]

    with Simulators() as simulators:
        yield from by_row(converse(questions, next_step, simulators, chat))


def _response(text: str, chat: Chat | None) -> bfcl_data.Response:
    return bfcl_data.written_response(text, chat.read_calls(text)) if chat else text


def _first(config: Config, question: Any, chat: Chat | None) -> tuple[str, Sequence[Any], Sequence[Any]]:
    """Returns the first conversation of a question of one turn; with `chat`, its functions go to the chat template."""
    if config.benchmark == "api_bank":
        return question.id, question.messages, ()
    if chat:
        return question.id, question.turns[0], bfcl_data.first_tools(question)
    return question.id, bfcl_data.first_messages(question), ()


def _texts(run: Run, policy: PhasePolicy, conversations: Conversations) -> Iterator[list[tuple[int, str]]]:
    """Yields the policy's answers to many conversations, a batch at a time, as (index, text).

    A conversation longer than the model's context is answered by a line that says so, as on the leaderboard.
    """
    config, (model, chat) = run.config, run.base
    temperature = bfcl_data.TEMPERATURE if config.benchmark == "bfcl" else 0.0
    settings, limit = dataclasses.replace(config.generate, temperature=temperature), model.max_length
    prompts = [(key, chat.prompt_ids(messages, tools)) for key, messages, tools in conversations]
    places = [i for i, (_, ids) in enumerate(prompts) if len(ids) < limit]
    unfit = [(i, len(ids)) for i, (_, ids) in enumerate(prompts) if len(ids) >= limit]
    if unfit:
        yield [(i, f"{UNFIT}{length} tokens do not fit the context of {limit}") for i, length in unfit]
    fitting = [prompts[i] for i in places]
    for batch in generate(policy.running(), run.step_table("sentence"), fitting, settings, limit, config.seed):
        yield [(places[i], chat.tokenizer.decode(chat.content_ids(ids))) for i, ids in batch]


def summarize(config: Config, scores: Mapping[str, Score]) -> Figures:
    """Returns accuracies by category and column with 95 % intervals, counts, and failures by kind of error.

    For BFCL, also which edition of the questions was scored.
    """
    intervals = bfcl_scores.intervals(scores, config.seed)
    figures: Figures = {
        "accuracy": {name: score.correct / score.total if score.total else None for name, score in scores.items()},
        "n": {name: score.total for name, score in scores.items()},
        "questions": {name: score.questions for name, score in scores.items()},
        "unanswered": {name: score.unanswered for name, score in scores.items()},
        "interval": intervals.categories,
        "errors": {name: dict(score.kinds().most_common()) for name, score in scores.items()},
    }
    if config.benchmark == "bfcl":
        figures |= {"columns": bfcl_scores.figures(scores), "column_interval": intervals.columns}
        figures["edition"] = bfcl_data.edition(data_folder(config), scores)._asdict()
    return figures


def show(config: Config, name: str, scores: Mapping[str, Score], figures: Figures) -> None:
    """Prints accuracies with their intervals, counts and most frequent errors; for BFCL also the columns of Table 1."""
    table = Table(title=f"{config.benchmark}, {name}: % correct [95 % interval]", title_justify="left", box=None)
    for column in ("category", "correct", "n", *(["unanswered"] if any(figures["unanswered"].values()) else [])):
        table.add_column(column, justify="left" if column == "category" else "right", no_wrap=True)
    for category, score in scores.items():
        partial = f"{score.total} of {score.questions}" if score.total < score.questions else str(score.total)
        cell = _cell(figures["accuracy"][category], figures["interval"].get(category))
        cells = (category, cell, partial, str(score.unanswered))
        table.add_row(*cells[: len(table.columns)])
    if config.benchmark == "bfcl":
        table.add_section()
        for column, value in figures["columns"].items():
            table.add_row(column, _cell(value, figures["column_interval"].get(column)), _count(column, scores))
    console_out.print(table)
    if config.benchmark == "bfcl":
        console_out.print(bfcl_data.Edition(**figures["edition"]).line(), soft_wrap=True)
    if total := sum(figures["unanswered"].values()):
        console_out.print(
            f"the model did not answer {total} of {sum(figures['n'].values())} questions: they count as wrong, or as "
            "correct where no call is expected, which says nothing about the model",
            soft_wrap=True,
        )
    for category, score in scores.items():
        if score.failed:
            kinds = ", ".join(f"{kind} {count}" for kind, count in score.kinds().most_common())
            console_out.print(f"{category}, errors: {kinds}", soft_wrap=True)


def _cell(value: float | None, bounds: Sequence[float] | None) -> str:
    if value is None or bounds is None:
        return "not run"
    return f"{100 * value:.2f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def _count(column: str, scores: Mapping[str, Score]) -> str:
    needed = bfcl_scores.NEEDED[column]
    missing = [category for category in needed if category not in scores]
    if missing:
        return f"{len(missing)} of {len(needed)} missing"
    done, there = (sum(getattr(scores[category], name) for category in needed) for name in ("total", "questions"))
    return f"{done} of {there}" if done < there else str(done)


def compare_official(
    config: Config,
    scores: Mapping[str, Score],
    responses: Mapping[str, Mapping[str, Any]],
    simulators: Simulators,
    function_calling: bool,
) -> None:
    """Prints the official scorer's figures beside ours, with up to five ids per category where the verdicts differ."""
    table = Table(title="the official scorer and ours", title_justify="left", box=None)
    for column in ("category", "n", "official", "ours", "verdicts differ"):
        table.add_column(
            column, justify="left" if column == "category" else "right", no_wrap=column != "verdicts differ"
        )
    official = {}
    for category, score in scores.items():
        questions = _load(config, category)
        verdicts = official_verdicts(questions, responses[category], simulators, **_mode(config, function_calling))
        official[category] = bfcl_scores.score(verdicts, len(questions))
        differ = sorted(official[category].failed.keys() ^ score.failed.keys())
        names = ", ".join(differ[:5]) + (", …" if len(differ) > 5 else "") if differ else "none"
        table.add_row(category, str(score.total), str(official[category].correct), str(score.correct), names)
    table.add_section()
    theirs, ours = bfcl_scores.figures(official), bfcl_scores.figures(scores)
    for column, value in ours.items():
        cells = ["not run" if x is None else f"{100 * x:.2f}" for x in (theirs[column], value)]
        table.add_row(column, _count(column, scores), *cells, "")
    console_out.print(table)


def regressions(config: Config, before: str, phase: str) -> list[str]:
    """Returns a line for each benchmark category that fell from one phase to the next, with its significance."""
    then, now = (read_scores(results_folder(config, name) / "scores.json") for name in (before, phase))
    differences = {category: bfcl_scores.paired(now[category], then[category]) for category in now}
    return fallen(differences)


# Leakage -----------------------------------------------------------------------------------------------------


def check_leakage(run: Run) -> None:
    """Adds the overlap of the benchmarks with the training samples to the data card, unless it is there already."""
    hosts.broadcast_from_primary("benchmarks", functools.partial(_check_leakage, run))


def _check_leakage(run: Run) -> None:
    config = run.config
    names = [*config.evaluate.benchmarks, *question_files(config)]
    known = splits.read_card(config)["benchmarks"] if names and splits.are_made(config) else ()
    new = {name: sources.load_questions(Path(name)) for name in names if name not in known}
    train = run.splits.train
    if new:
        overlaps = overlap(train.samples, new)
        card = splits.read_card(config)
        write_json(config.run_dir / splits.CARD, card | {"benchmarks": card["benchmarks"] | overlaps})
        for line in overlap_lines(overlaps):
            log(line)
