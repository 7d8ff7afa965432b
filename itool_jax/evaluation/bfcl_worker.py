"""The official BFCL scorer and simulators behind JSON lines: runs in the environment that `bfcl_setup` makes.

In: a command a line on stdin, `{"do": name, …}`. Out: an answer a line on stdout. It executes text that models wrote.
So it takes away its own network, rights and all files outside its working folder, and each command has its time;
whoever starts it gives it an empty environment and replaces it when it hangs or dies.
It keeps nothing between commands: a conversation comes with all its steps so far, and they are executed anew.
"""

import copy
import ctypes
import functools
import importlib
import io
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SECONDS = 30
MEMORY_BYTES = 4 << 30
FILE_BYTES = 1 << 28
CLONE_NEWUSER, CLONE_NEWNET, CAPABILITY_VERSION = 0x10000000, 0x40000000, 0x20080522
FORBIDDEN = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill")
FORBIDDEN += ("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown")
FORBIDDEN += ("shutil.", "ctypes.", "pty.", "signal.", "os.listdir", "os.scandir", "resource.", "gc.")
MODEL = "itool"

Row = dict[str, Any]


class _TimeUp(BaseException):
    """A command took too long. No Exception, for the official code catches those."""


class _AnyModel(dict):
    """Takes the place of the official list of models, which imports every vendor's client."""

    def __missing__(self, name: str) -> Any:
        return SimpleNamespace(underscore_to_dot=False)


def _module(name: str) -> Any:
    return importlib.import_module(f"bfcl_eval.{name}")


def _forget_simulators() -> None:
    """The official code keeps every simulator it made as a global variable."""
    names = vars(_module("eval_checker.multi_turn_eval.multi_turn_utils"))
    for name in [name for name in names if name.endswith("_instance")]:
        del names[name]


def execute(command: Row) -> Row:
    """Runs the steps of a conversation: the last one's calls and their results, or null where it holds no calls."""
    utils, run = _module("model_handler.utils"), _module("eval_checker.multi_turn_eval.multi_turn_utils")
    _forget_simulators()
    calls, results = None, []
    for text in command["steps"]:
        try:
            calls = utils.default_decode_execute_prompting(text)
        except Exception:  # whatever the official reader stumbles over is no call
            return {"calls": None, "results": []}
        if run.is_empty_execute_response(calls):
            return {"calls": None, "results": []}
        results = run.execute_multi_turn_func_call(
            calls, command["config"], command["classes"], MODEL, "conversation", command["long_context"]
        )[0]
    return {"calls": calls, "results": results}


def official(command: Row) -> Row:
    """Has the official runner score a category; the error type of each question that failed, by id."""
    runner, handler = _module("eval_checker.eval_runner"), _handler()
    _forget_simulators()
    category, folder = command["category"], Path.cwd()
    shared = [copy.deepcopy(command["questions"]), MODEL, category, folder]
    if "relevance" in category:
        runner.relevance_file_runner(handler, command["results"], *shared)
    elif "multi_turn" in category:
        shared[1:1] = [command["answers"]]
        runner.multi_turn_runner(handler, command["results"], *shared)
    else:
        language = {"java": "Java", "javascript": "JavaScript"}.get(category, "Python")
        shared[1:1] = [command["answers"], language]
        shared[3:5] = [category, MODEL]
        runner.ast_file_runner(handler, command["results"], *shared)
    lines = (folder / MODEL / f"BFCL_v3_{category}_score.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    # Of a response that is no list of turns the official runner reports two errors; the first is the reason.
    failed = {row["id"]: row["error_type"] if "error_type" in row else row["error"]["error_type"] for row in rows[::-1]}
    return {"failed": failed, "correct": json.loads(lines[0])["correct_count"]}


@functools.cache
def documentation() -> dict[str, list[Row]]:
    """The documented functions by class."""
    files = _module("constants.category_mapping").MULTI_TURN_FUNC_DOC_FILE_MAPPING
    folder = Path(_module("constants.eval_config").MULTI_TURN_FUNC_DOC_PATH)
    read = {name: (folder / file).read_text().splitlines() for name, file in files.items()}
    return {name: [json.loads(line) for line in lines] for name, lines in read.items()}


def _handler() -> Any:
    utils = _module("model_handler.utils")
    return SimpleNamespace(
        decode_ast=utils.default_decode_ast_prompting, decode_execute=utils.default_decode_execute_prompting
    )


COMMANDS: dict[str, Callable[[Row], Row]] = {
    "execute": execute,
    "official": official,
    "functions": lambda _: {"functions": documentation()},
}


def answer(line: str) -> Row:
    """The answer to one command; what goes wrong is told, not raised."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        command = json.loads(line)
        return COMMANDS[command["do"]](command)
    except (KeyboardInterrupt, _TimeUp):
        return {"error": f"it took more than {SECONDS} seconds"}
    except BaseException as error:  # the text that was executed may even exit
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _time_up(*_: object) -> None:
    raise _TimeUp


def _confine() -> None:
    """Takes the process's rights away, as far as the system lets it, and for good."""
    readable = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix)})
    writable = os.path.realpath(os.getcwd()) + os.sep
    system = ctypes.CDLL(None)
    if system.unshare(CLONE_NEWUSER | CLONE_NEWNET) == 0:  # where the system refuses, the hook below has to do
        os.chroot(".")
        os.chdir(os.sep)
        writable = os.sep
        # The rights that came with the namespace, to leave this folder again among them, go too.
        if system.capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()):
            raise OSError("the rights of a new namespace could not be given up")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    watched = (*FORBIDDEN, "open", "os.mkdir")  # not a global name, which what is executed could change

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "signal.setitimer" or not event.startswith(watched):
            return
        if event in ("open", "os.mkdir") and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if path.startswith(writable) or (reads and path.startswith(readable)):
                return
        raise PermissionError(f"{event} is not allowed here")

    sys.addaudithook(hook)


def main() -> None:
    """Serves commands until stdin ends."""
    # What is executed may print, and exit() closes stdin: it gets others.
    commands = os.fdopen(os.dup(sys.stdin.fileno()))
    replies = io.TextIOWrapper(os.fdopen(os.dup(sys.stdout.fileno()), "wb"), line_buffering=True)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    sys.modules["bfcl_eval.constants.model_config"] = SimpleNamespace(MODEL_CONFIG_MAPPING=_AnyModel())  # type: ignore
    for name in ("eval_checker.eval_runner", "model_handler.utils", "constants.category_mapping"):
        _module(name)
    for path in _module("eval_checker.multi_turn_eval.multi_turn_utils").CLASS_FILE_PATH_MAPPING.values():
        importlib.import_module(path)
    importlib.import_module("_strptime")  # which datetime imports when first needed
    documentation()
    signal.signal(signal.SIGALRM, _time_up)
    _confine()
    for line in commands:
        replies.write(json.dumps(answer(line)) + "\n")


if __name__ == "__main__":
    main()
