"""The report of what devices hold, on a small model: it knows what a run keeps."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import memory
from itool_jax.model.sharding import MeshSettings

SMALL = dataclasses.replace(
    memory.LLAMA,
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    n_layers=1,
    n_heads=4,
    n_kv_heads=2,
    head_dim=32,
)
MACHINES = (
    memory.Machine(name="one", gigabytes=1, mesh=MeshSettings(), search_batch=2),
    memory.Machine(name="eight", gigabytes=0, mesh=MeshSettings(fsdp=8), weights=("lora",), search_batch=2),
)


@pytest.mark.memory
def test_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(memory, "MACHINES", MACHINES)
    memory.main(memory.Settings(model=SMALL, length=64, kinds=("sft", "search"), json=tmp_path / "memory.json"))
    rows = {
        tuple(row[k] for k in ("devices", "step", "weights")): row
        for row in json.loads((tmp_path / "memory.json").read_text())
    }
    assert len(rows) == 6
    # Weights in bfloat16, adapters of rank 16 and their two moments in float32; batches are small beside them.
    linear = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 256
    adapters = 16 * (4 * 256 - 2 * 64 + 3 * 384)
    expected = (2 * (2 * 512 * 128 + linear) + 3 * 4 * adapters) / 1e9
    assert rows["one", "sft", "lora"]["arguments"] == pytest.approx(expected, rel=0.1)
    assert rows["one", "sft", "qlora"]["arguments"] < expected - 1.4 * linear / 1e9
    assert rows["eight", "sft", "lora"]["arguments"] < expected / 2
    for kind in ("sft", "search"):
        assert rows["eight", kind, "lora"]["total"] < rows["one", kind, "lora"]["total"]
    printed = capsys.readouterr().out
    assert printed.count(" fits") == 4
    assert printed.count("does not fit") == 2
