"""Serves the official BFCL scorer and simulators over JSON lines; runs in the environment that `setup` creates.

In: one command per line on stdin, `{"do": name, …}`. Out: one answer per line on stdout. Commands execute text written
by models. So each runs in its own forked process, with a time limit and without network, privileges, other processes
or files outside the working folder; one text cannot affect the next. No state is kept between commands: a conversation
comes with all its steps so far, and all are executed again. The parent must start it with an empty environment. If the
parent dies, the worker removes its working folder.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SECONDS, GRACE_SECONDS = 30, 5
ANSWER_BYTES = 1 << 28
MEMORY_BYTES = 4 << 30
FILE_BYTES = 1 << 28
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534
FORBIDDEN = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.kill")
FORBIDDEN += ("os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown")
FORBIDDEN += ("shutil.", "ctypes.", "pty.", "signal.", "os.listdir", "os.scandir", "resource.", "gc.")
MODEL = "itool"
FUNCTION_CALLING = "model_handler.api_inference.openai_completion"
"""Official module that decodes responses which list calls."""

Row = dict[str, Any]


class _TimeUp(BaseException):
    """Error for a command that took too long. Not an Exception, because the official code catches those."""


class _AnyModel(dict):
    """Replacement for the official list of models, which imports every vendor's client."""

    underscore_to_dot = False
    """True if the model was shown _ for every dot in a function's name."""

    def __missing__(self, name: str) -> Any:
        return SimpleNamespace(underscore_to_dot=self.underscore_to_dot)


def _module(name: str) -> Any:
    return importlib.import_module(f"bfcl_eval.{name}")


def execute(command: Row) -> Row:
    """Runs the steps of a conversation, each text or a list of calls.

    Returns the last step's calls and results, calls being null if it has none.
    """
    run = _module("eval_checker.multi_turn_eval.multi_turn_utils")
    calls, results = None, []
    for step in command["steps"]:
        try:
            calls = _handler(isinstance(step, list)).decode_execute(step)
        except Exception:  # text that the official reader cannot read is no call
            return {"calls": None, "results": []}
        if run.is_empty_execute_response(calls):
            return {"calls": None, "results": []}
        results = run.execute_multi_turn_func_call(
            calls, command["config"], command["classes"], MODEL, "conversation", command["long_context"]
        )[0]
    return {"calls": calls, "results": results}


def official(command: Row) -> Row:
    """Returns the official runner's error type for one response, null if it is right.

    The official code builds variable names from ids and parses the category out of them, so the id passed to it has
    the official form.
    """
    runner, handler = _module("eval_checker.eval_runner"), _handler(command["function_calling"])
    _AnyModel.underscore_to_dot = command["underscore_to_dot"]
    category, folder = command["category"], Path.cwd()
    name = {"id": f"{category}_0"}
    results, questions = [name | {"result": command["result"]}], [command["question"] | name]
    answers = [name | {"ground_truth": command["answer"]}]
    if "relevance" in category:
        runner.relevance_file_runner(handler, results, questions, MODEL, category, folder)
    elif "multi_turn" in category:
        runner.multi_turn_runner(handler, results, questions, answers, MODEL, category, folder)
    else:
        language = {"java": "Java", "javascript": "JavaScript"}.get(category, "Python")
        runner.ast_file_runner(handler, results, questions, answers, language, category, MODEL, folder)
    lines = (folder / MODEL / f"BFCL_v3_{category}_score.json").read_text().splitlines()
    if len(lines) == 1:
        return {"error_type": None}
    # For a response that is not a list of turns, the official runner reports two errors; the first is the reason.
    row = json.loads(lines[1])
    return {"error_type": row["error_type"] if "error_type" in row else row["error"]["error_type"]}


@functools.cache
def documentation() -> dict[str, list[Row]]:
    """Returns the documented functions by class."""
    files = _module("constants.category_mapping").MULTI_TURN_FUNC_DOC_FILE_MAPPING
    folder = Path(_module("constants.eval_config").MULTI_TURN_FUNC_DOC_PATH)
    read = {name: (folder / file).read_text().splitlines() for name, file in files.items()}
    return {name: [json.loads(line) for line in lines] for name, lines in read.items()}


def _handler(function_calling: bool) -> Any:
    if function_calling:
        handler = _module(FUNCTION_CALLING).OpenAICompletionsHandler
        decoders = SimpleNamespace(model_name=MODEL, is_fc_model=True)
        decoders.decode_ast = functools.partial(handler.decode_ast, decoders)
        decoders.decode_execute = functools.partial(handler.decode_execute, decoders)
        return decoders
    utils = _module("model_handler.utils")
    return SimpleNamespace(
        decode_ast=utils.default_decode_ast_prompting, decode_execute=utils.default_decode_execute_prompting
    )


COMMANDS: dict[str, Callable[[Row], Row]] = {"execute": execute, "official": official}
COMMANDS["functions"] = lambda _: {"functions": documentation()}


def answer(line: bytes) -> Row:
    """Returns the answer to one command; errors are reported in the answer, not raised."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        command = json.loads(line)
        return COMMANDS[command["do"]](command)
    except (KeyboardInterrupt, _TimeUp):
        return _error(f"it took more than {SECONDS} seconds")
    except BaseException as error:  # executed text may even call exit()
        return _error(f"{type(error).__name__}: {error}"[:1000])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _error(reason: str) -> Row:
    return {"error": reason}


def _time_up(*_: object) -> None:
    raise _TimeUp


def _leave() -> bool:
    """Gives up access to the network, to files outside the working folder, and to all existing processes.

    Returns False if the system refuses; then the rules of `_confine` must suffice.
    """
    if os.geteuid() == 0:  # process limits do not apply to root
        with contextlib.suppress(OSError):
            os.chown(".", NOBODY, NOBODY)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    if ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID):
        return False
    folder = os.getcwd()
    if process := os.fork():  # the child is the first process of the namespace, which ends with it
        os.waitpid(process, 0)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)
    os.chroot(".")
    os.chdir(os.sep)
    return True


def _confine(alone: bool) -> None:
    """Drops the process's privileges permanently, as far as the system allows."""
    readable = tuple({os.path.realpath(path) + os.sep for path in (sys.prefix, sys.base_prefix)})
    writable = os.path.realpath(os.getcwd()) + os.sep
    # Drop the capabilities that came with the namespace; one of them would allow leaving this folder again.
    if alone and ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()):
        raise OSError("could not drop the capabilities of the new namespace")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    for module in (os, *map(importlib.import_module, ("posix", "_posixsubprocess", "subprocess"))):
        for name in ("fork", "forkpty", "fork_exec", "_fork_exec", "posix_spawn", "posix_spawnp"):
            vars(module).pop(name, None)
    watched = (*FORBIDDEN, "open", "os.mkdir")  # a local: executed text could change a global

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


def _in_a_process(line: bytes, alone: bool) -> bytes:
    """Runs a command in a separate process and returns its answer as JSON; the process is gone when this returns."""
    folder = f"command_{time.monotonic_ns()}"
    os.mkdir(folder)
    result, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.chdir(folder)
            os.dup2(writer, 3)
            os.closerange(4, os.sysconf("SC_OPEN_MAX"))
            signal.signal(signal.SIGALRM, _time_up)
            _confine(alone)
            reply = json.dumps(answer(line)).encode()
            while reply:
                reply = reply[os.write(3, reply) :]
        finally:
            os._exit(0)
    os.close(writer)
    checked = _read(result, time.monotonic() + SECONDS + GRACE_SECONDS)
    os.close(result)
    _end(process, alone)
    shutil.rmtree(folder, ignore_errors=True)
    return checked


def _read(result: int, until: float) -> bytes:
    """Reads a process's output until it closes the pipe; returns the JSON object, or an error if it is not one."""
    parts: list[bytes] = []
    while sum(map(len, parts)) <= ANSWER_BYTES:
        if not select.select([result], [], [], max(0, until - time.monotonic()))[0]:
            return json.dumps(_error(f"it took more than {SECONDS} seconds")).encode()
        if not (part := os.read(result, 1 << 20)):
            break
        parts.append(part)
    try:
        reply = json.loads(b"".join(parts))
        if isinstance(reply, dict):
            return json.dumps(reply).encode()
    except (ValueError, RecursionError):
        pass
    return json.dumps(_error("the process ended without an answer")).encode()


def _end(process: int, alone: bool) -> None:
    """Kills a process and, in a namespace of our own, everything that it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1 if alone else process, signal.SIGKILL)
    os.waitpid(process, 0)
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    """Serves commands until stdin ends."""
    # Executed text may print, and exit() closes stdin, so give it other streams.
    commands, replies = os.fdopen(os.dup(sys.stdin.fileno()), "rb"), os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())
    sys.modules["bfcl_eval.constants.model_config"] = SimpleNamespace(MODEL_CONFIG_MAPPING=_AnyModel())  # type: ignore
    sys.modules["openai"] = SimpleNamespace(OpenAI=None, RateLimitError=Exception)  # type: ignore  # not used to decode
    for name in ("eval_checker.eval_runner", "model_handler.utils", "constants.category_mapping", FUNCTION_CALLING):
        _module(name)
    for path in _module("eval_checker.multi_turn_eval.multi_turn_utils").CLASS_FILE_PATH_MAPPING.values():
        importlib.import_module(path)
    importlib.import_module("_strptime")  # datetime imports it on first use
    documentation()
    folder = os.getcwd()
    alone = _leave()
    gc.freeze()  # forked processes share existing objects
    for line in commands:
        replies.write(_in_a_process(line, alone) + b"\n")
        replies.flush()
    if not alone:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
