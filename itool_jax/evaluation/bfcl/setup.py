"""`python -m itool_jax.evaluation.bfcl.setup` installs the official BFCL scorer in a separate environment.

The scorer includes the questions, the multi-turn simulators and the official checker. It pins an old numpy and cannot
be installed beside jax. It also executes text written by models, so it only runs as a child process
(`itool_jax.evaluation.bfcl.worker`), without network and with limits.
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

PACKAGE = "bfcl-eval==2025.8.6.2"
REQUIREMENTS = (
    *("tree_sitter==0.21.3", "tree-sitter-java==0.21.0", "tree-sitter-javascript==0.21.4", "numpy==1.26.4"),
    *("mpmath==1.3.0", "filelock==3.20.0", "tenacity==9.1.2", "python-dotenv==1.2.1", "tqdm==4.67.1"),
    *("pandas==2.3.3", "overrides==7.7.0", "setuptools==80.9.0"),
)
COMMAND = "python -m itool_jax.evaluation.bfcl.setup"


def environment() -> Path:
    """Returns the environment's folder: $ITOOL_BFCL, else one in the user's cache."""
    return Path(os.environ.get("ITOOL_BFCL", "~/.cache/itool_jax/bfcl")).expanduser()


def python() -> Path:
    """Returns the environment's interpreter. Raises ValueError, with the command to run, if it is not installed."""
    path = environment() / "bin" / "python"
    if not (path.exists() and (environment() / "done").exists()):
        raise ValueError(f"the official BFCL scorer is not installed in {environment()}; run {COMMAND}")
    return path


def data() -> Path:
    """Returns the scorer's folder of questions, possible answers and documentation of simulated functions."""
    python()
    return next(environment().glob("lib/python3*/site-packages/bfcl_eval/data"))


def install(folder: Path) -> None:
    """Creates the environment, about 200 MB, and replaces an earlier one. Raises ValueError if pip fails."""
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    for packages in (REQUIREMENTS, ("--no-deps", PACKAGE)):
        command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *packages]
        if subprocess.run(command, check=False).returncode:
            raise ValueError(f"pip could not install {' '.join(packages)}; see its output above")
    (folder / "done").write_text(PACKAGE)


def main() -> int:
    """Installs the scorer unless it is installed already; returns the exit code."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--again", action="store_true", help="reinstall the scorer if it is already installed")
    again = parser.parse_args().again
    try:
        if again or not (environment() / "done").exists():
            install(environment())
        from itool_jax.evaluation.bfcl.simulators import Simulators

        with Simulators() as simulators:
            tools = simulators.ask({"do": "functions"})["functions"]
    except (ValueError, OSError) as error:
        print(f"{COMMAND}: error: {error}", file=sys.stderr)
        return 2
    print(f"{PACKAGE} is ready in {environment()}: {len(tools)} simulated APIs, {data()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
