"""`python -m itool_jax.main --stage=…`: reads the settings, runs the stage, turns errors of the user into one line."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from itool_jax import config as settings
from itool_jax.config import Config

USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code: 0, or 2 for what the user can mend."""
    try:
        code = _main(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output went away: nothing to complain about at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def _main(arguments: Sequence[str]) -> int:
    where = None
    try:
        config = settings.parse(arguments)
        where = config.output or config.run_dir
        _run(config)
    except BrokenPipeError:
        raise
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped, what is finished is kept", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        if os.environ.get("ITOOL_TRACEBACK"):
            raise
        print(settings.describe_error(error, where), file=sys.stderr)
        return USAGE_ERROR
    return 0


def _run(config: Config) -> None:
    import jax  # slow to import; --help and errors of the command line come without it

    from itool_jax.stages import dpo, evaluate, generate, iterate, score, search, warmup

    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/itool_jax/xla")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    if config.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    stages = {"iterate": iterate, "warmup": warmup, "score": score, "search": search, "dpo": dpo}
    stages |= {"evaluate": evaluate, "generate": generate}
    settings.save_or_check(config)
    stages[config.stage].run(config)


# glibc gives large buffers back to the system after each step and has them zeroed again for the next; kept, a training
# step on CPU takes up to half the time. It reads these when a process starts, so the program starts itself once more.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}


def _keep_freed_memory() -> None:
    if sys.platform == "linux" and not MALLOC.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **MALLOC})


if __name__ == "__main__":
    _keep_freed_memory()
    sys.exit(main())
