"""Output files that a command writes outside a run directory (`--output`), resumable like the steps of a run."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from itool_jax.config import Config
from itool_jax.store.cache import file_hash, hash_of, open_working
from itool_jax.store.checkpoint import CHECKSUMS
from itool_jax.store.paths import BASE, weights_folder
from itool_jax.store.sources import fingerprints
from itool_jax.store.weights import answering_phase
from itool_jax.system import hosts


@contextlib.contextmanager
def resumed(config: Config, output: Path) -> Iterator[Path]:
    """Yields a folder beside the output file for its finished rows, removed once the file is written.

    For a pipe, it is a temporary folder elsewhere.
    """
    if output.exists() and not output.is_file():
        if hosts.count() > 1:
            raise ValueError(
                f"output {output} must be a regular file: {hosts.count()} processes coordinate through files beside it"
            )
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere)
        return
    working = output.with_name(f"{output.name}.working")
    settings = {name: value for name, value in config.flat().items() if not name.startswith("distributed.")}
    phase = answering_phase(config)
    checksums = weights_folder(config.run_dir, phase) / CHECKSUMS
    weights = file_hash(checksums) if phase != BASE and checksums.exists() else None
    basis = {"settings": hash_of(settings), "sources": fingerprints(config), "weights": weights}
    hosts.broadcast_from_primary(f"begin {output}", lambda: open_working(working, basis))
    yield working
    hosts.broadcast_from_primary(f"end {output}", lambda: shutil.rmtree(working))
