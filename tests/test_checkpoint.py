"""Checkpoints: what is saved comes back bit for bit, and damage is named in one line, at no loss."""

import errno
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itool_jax.store import checkpoint

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
        (without(make_tree(), "layers", "k"), "unexpected tensor layers.k"),
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


def test_what_jax_meets_while_it_reads_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With several processes a read fails where another one has died; a cluster's test met that."""
    import orbax.checkpoint as ocp

    checkpoint.save(tmp_path / "adapters", make_tree())

    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo AllGather failed"):
        checkpoint.restore(tmp_path / "adapters", make_tree())


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


# A training that goes on ---------------------------------------------------------------------------------------


def kept(folder: Path, steps: int, every: int = 1) -> checkpoint.TrainCheckpoints:
    """A training whose state was kept after each of so many steps; donated arrays are written over at once."""
    training, state = checkpoint.TrainCheckpoints(folder, every), make_tree(0)
    for step in range(1, steps + 1):
        state = changed(state)
        if training.due(step):
            training.save(step, state, {"next_index": step})
    training.finish()
    return training


def restored(folder: Path) -> tuple[int, Any, Any] | None:
    training = checkpoint.TrainCheckpoints(folder)
    result = training.restore(make_tree(1))
    training.finish()
    return result


@functools.partial(jax.jit, donate_argnums=0)
def changed(tree: Any) -> Any:
    return jax.tree.map(lambda x: x + 1, tree)


def later(steps: int) -> Any:
    tree = make_tree(0)
    for _ in range(steps):
        tree = changed(tree)
    return tree


def test_a_training_goes_on_from_its_newest_state(tmp_path: Path):
    assert restored(tmp_path / "new") is None
    kept(tmp_path / "training", 5)
    step, state, position = restored(tmp_path / "training") or pytest.fail("nothing kept")
    assert (step, position) == (5, {"next_index": 5})
    assert_same(state, later(5))
    assert names(tmp_path / "training") == ["4", "5"]


def test_states_are_kept_as_often_as_asked(tmp_path: Path):
    kept(tmp_path / "training", 7, every=3)
    assert names(tmp_path / "training") == ["3", "6"]


@pytest.mark.parametrize("what", ["bit", "file", "checksums", "unfinished"])
def test_of_a_damaged_state_the_one_before_is_used(tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "training"
    kept(folder, 4)
    largest = max((folder / "4/state").rglob("ocdbt.process_0/d/*"), key=lambda p: p.stat().st_size)
    if what == "bit":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    elif what == "file":
        largest.unlink()
    elif what == "checksums":
        (folder / "4/checksums.json").write_text("{")
    else:
        (folder / "4/checksums.json").unlink()
    step, state, _ = restored(folder) or pytest.fail("nothing kept")
    assert step == 3
    assert_same(state, later(3))
    said = capsys.readouterr().err.replace("\n", "")
    assert (f"checkpoint {folder}/4: " in said and "is damaged; falling back to the previous one" in said) == (
        what != "unfinished"
    )


def test_checkpoints_take_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a clock of steps of a second and writing of half a second: one in 25 steps."""
    clock = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])
    training, saved = checkpoint.TrainCheckpoints(tmp_path / "training"), []
    save = training.manager.save
    monkeypatch.setattr(training.manager, "save", lambda *a, **k: (save(*a, **k), clock.append(clock.pop() + 0.5)))
    for step in range(1, 80):
        clock[0] += 1
        if training.due(step):
            saved.append(step)
            training.save(step, make_tree(0), {})
    training.finish()
    assert saved == [1, 2, 27, 52, 77]
