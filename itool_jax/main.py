"""`python -m itool_jax.main --stage=…`: reads the settings, runs the stage, turns errors of the user into one line."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from itool_jax import config as settings
from itool_jax.config import Config

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code: 0, or 2 for what the user can mend."""
    try:
        _run(settings.parse(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, OSError) as error:
        if os.environ.get("ITOOL_TRACEBACK"):
            raise
        print(settings.describe_error(error), file=sys.stderr)
        return USAGE_ERROR
    return 0


def _run(config: Config) -> None:
    import jax  # slow to import; --help and errors of the command line come without it

    from itool_jax.stages import dpo, evaluate, generate, iterate, score, search, warmup

    cache = Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/itool_jax/xla")).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    if config.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    stages = {
        "iterate": iterate.run,
        "warmup": warmup.run,
        "score": score.run,
        "search": search.run,
        "dpo": dpo.run,
        "evaluate": evaluate.run,
        "generate": generate.run,
    }
    if config.output is None and config.stage != "generate":
        settings.save_or_check(config)
    stages[config.stage](config)


if __name__ == "__main__":
    sys.exit(main())
