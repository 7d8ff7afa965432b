"""Checkpoints: what is saved comes back bit for bit, and damage is named in one line, at no loss."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itool_jax import checkpoint

Change = Callable[[Path], Any]


def make_tree(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "layers": {"q": jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32), "k": jnp.asarray(rng.normal(size=5))},
        "half": jnp.asarray(rng.normal(size=(3, 2)), jnp.bfloat16),
        "step": jnp.int32(seed + 7),
    }


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x, np.float64), np.asarray(y, np.float64))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path):
    checkpoint.save(tmp_path / "new/adapters", make_tree(1))
    # `like` gives structure, shapes and types; its values do not matter.
    assert_same(checkpoint.restore(tmp_path / "new/adapters", make_tree(2)), make_tree(1))
    assert names(tmp_path / "new") == ["adapters"]


def test_a_relative_folder_is_taken_from_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(Path("adapters"), make_tree())
    assert_same(checkpoint.restore(Path("adapters"), make_tree(1)), make_tree())


def test_saving_again_replaces(tmp_path: Path):
    for seed in (1, 2):
        checkpoint.save(tmp_path / "adapters", make_tree(seed))
    assert_same(checkpoint.restore(tmp_path / "adapters", make_tree()), make_tree(2))


def without(tree: dict[str, Any], *path: str) -> dict[str, Any]:
    head, *rest = path
    kept = {name: value for name, value in tree.items() if name != head}
    return kept | {head: without(tree[head], *rest)} if rest else kept


@pytest.mark.parametrize(
    ("like", "message"),
    [
        (make_tree() | {"more": {"x": jnp.zeros(2)}}, "tensor more.x is missing"),
        (without(make_tree(), "layers", "k"), "tensor layers.k is unexpected"),
        (make_tree() | {"half": jnp.zeros((3, 3))}, r"tensor half has shape \(3, 2\), expected \(3, 3\)"),
        (make_tree() | {"half": jnp.zeros((3, 1))}, r"tensor half has shape \(3, 2\), expected \(3, 1\)"),
        (make_tree() | {"half": jnp.zeros(6)}, r"tensor half has shape \(3, 2\), expected \(6,\)"),
    ],
)
def test_another_structure_or_shape_is_refused_by_tensor(tmp_path: Path, like: Any, message: str):
    checkpoint.save(tmp_path / "adapters", make_tree())
    with pytest.raises(ValueError, match=rf"^checkpoint {tmp_path}/adapters: {message}; delete it"):
        checkpoint.restore(tmp_path / "adapters", like)


def test_a_missing_checkpoint_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=rf"^checkpoint {tmp_path}/adapters does not exist; run the stage"):
        checkpoint.restore(tmp_path / "adapters", make_tree())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("change", [cut, blank])
@pytest.mark.parametrize("file", ["_METADATA", "array_metadatas/*", "manifest.ocdbt", "d/*"])
def test_damage_is_one_line_that_says_what_to_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], file: str, change: Change
):
    checkpoint.save(tmp_path / "adapters", make_tree())
    [damaged] = (tmp_path / "adapters").glob(file)
    change(damaged)
    with pytest.raises(ValueError, match=rf"^checkpoint {tmp_path}/adapters: .+; delete it to compute") as caught:
        checkpoint.restore(tmp_path / "adapters", make_tree())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    """Orbax reports the disk's errors as ValueErrors of its storage library, met by background threads."""
    import orbax.checkpoint as ocp

    checkpoint.save(tmp_path / "adapters", make_tree(1))
    full = "No space left on device [os_error_code='28']" if number == errno.ENOSPC else "Input/output error"

    def fail(self: Any, directory: Path, *args: Any, **kwargs: Any) -> None:
        (directory.parent / f"{directory.name}.orbax-checkpoint-tmp").mkdir()
        logging.getLogger("absl").error("Traceback of a thread")
        raise ValueError(f"RESOURCE_EXHAUSTED: Error writing a.x: Failed to write 692919 bytes to file 4: {full}")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointer, "save", fail)
        with pytest.raises(OSError) as caught:
            checkpoint.save(tmp_path / "adapters", make_tree(2))
    assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path / "adapters"))
    assert ("No space left" in str(caught.value)) == (number == errno.ENOSPC)
    assert names(tmp_path) == ["adapters"]
    assert_same(checkpoint.restore(tmp_path / "adapters", make_tree()), make_tree(1))
    assert not logging.getLogger("absl").disabled
