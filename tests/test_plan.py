"""The plan of a run: what it says of memory is what programs take, what it says of work is what runs do."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from itool_jax import config as settings
from itool_jax.config import Config
from itool_jax.main import main
from itool_jax.mcts.search import SearchSettings
from itool_jax.model.linear import LoraSettings
from itool_jax.model.sharding import MeshSettings, use_mesh
from itool_jax.model.transformer import abstract
from itool_jax.planning import memory, roofline, sizes
from itool_jax.planning.estimate import as_arguments, changes, hardware_of, laid_out, with_settings
from itool_jax.planning.memory import Lengths
from itool_jax.stages import plan
from itool_jax.store.base import load_base
from itool_jax.store.splits import divide
from itool_jax.store.weights import Weights, training_graph
from itool_jax.system.devices import CPU_SHARES, DEVICES, HERE, PlanSettings, device_like, device_of
from itool_jax.text.padding import collate
from itool_jax.training import loop as train
from itool_jax.training.losses import LossSettings
from tests import tiny
from tests.conftest import REPOSITORY
from tests.runs import ITERATIONS, Made

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

Row = dict[str, Any]


def configured(made: Made, *changes: str) -> Config:
    return settings.parse(["--stage=plan", *made.settings, *changes])


def planned(made: Made, folder: Path, *changes: str) -> Row:
    output = folder / "plan.json"
    assert main(["--stage=plan", f"--run_dir={folder / 'run'}", f"--output={output}", *made.settings, *changes]) == 0
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def roomy(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Row:
    """The plan of the shared run on a device with room for all of it."""
    return planned(made, tmp_path_factory.mktemp("roomy"), "--plan.device=h100")


# Memory -----------------------------------------------------------------------------------------------------


def test_a_training_step_takes_what_is_planned(made: Made):
    """Against the arrays that a run makes, and the program that it compiles from them."""
    config = configured(made)
    model, rows, width = load_base(config).config, 8, 128
    adapters, base = Weights(config).trainable("base")
    optimizer = train.adamw(config.warmup.weight_decay, config.warmup.clip_norm)
    state = train.new_state(optimizer, adapters)
    batch = collate([([1] * 9, [2] * 9)] * rows, width, rows)
    loss = train.sft_loss(training_graph(config, dropout=True))
    given = (loss, optimizer, 2, state, base, batch, jax.random.key(0), np.float32(1))
    compiled = train.train_step.lower(*given).compile()
    analysis: Any = compiled.memory_analysis()
    need = memory.training(None, model, config.lora, 2, rows, width)
    held = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (base, state.trainable, state.optimizer)]
    assert [need.weights, need.adapters, need.optimizer] == held
    assert need.temporaries == pytest.approx(analysis.temp_size_in_bytes, rel=0.1)
    assert need.arguments == pytest.approx(analysis.argument_size_in_bytes, rel=0.1)
    before = sum(x.nbytes for x in jax.live_arrays())
    new, _ = train.train_step(*given)
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 0.1 * need.total + 1e4
    assert jax.tree.structure(new) == jax.tree.structure(state)


@pytest.mark.memory
@pytest.mark.parametrize("loss", [None, LossSettings()])
def test_each_layer_of_a_deep_model_is_planned_alike(tmp_path: Path, loss: LossSettings | None):
    """Training compiles the whole depth as one loop, so nothing is extrapolated."""
    model = dataclasses.replace(tiny.model_config(tmp_path), remat="layers")
    needs = [
        memory.training(loss, dataclasses.replace(model, n_layers=n), LoraSettings(rank=2), 2, 4, 128).total
        for n in (9, 18, 27)
    ]
    assert needs[2] - needs[1] == pytest.approx(needs[1] - needs[0], rel=0.02)


@pytest.mark.memory
def test_deep_answers_are_planned_from_shallow_ones(tmp_path: Path):
    model = tiny.model_config(tmp_path, num_hidden_layers=14)
    for program in (memory.log_probs(LoraSettings(rank=2), 4, 128), memory.responses(LoraSettings(rank=2), 4, 128, 64)):
        assert program.at_depth(model).total == pytest.approx(program.need(model).total, rel=0.02)


@pytest.mark.slow
def test_a_deep_search_is_planned_from_shallow_ones(tmp_path: Path):
    model = tiny.model_config(tmp_path, num_hidden_layers=40)
    for program in memory.searching(LoraSettings(rank=2), SearchSettings(), Lengths(256, 256, 65, 128), 4):
        assert program.at_depth(model).total == pytest.approx(program.need(model).total, rel=0.02)


@pytest.mark.memory
def test_nf4_kernels_are_decoded_one_layer_after_the_other(tmp_path: Path):
    """In a process of its own: the flags with which the host stands for another device are read once."""
    code = f"""
import dataclasses
from pathlib import Path
from itool_jax import config as settings
from itool_jax.planning import memory
from itool_jax.mcts.search import SearchSettings
from itool_jax.planning.memory import Lengths
from itool_jax.model.linear import LoraSettings
from itool_jax.planning.estimate import hardware_of
from tests import tiny
hardware_of(settings.parse(["--stage=plan", "--plan.device=l4"]))
given = (LoraSettings(rank=2), SearchSettings(batch=1, breadth=2), Lengths(64, 64, 65, 64), 1)
for layers in (3, 9):
    model = tiny.model_config(Path({str(tmp_path)!r}), num_hidden_layers=layers, hidden_size=128, intermediate_size=256)
    print(memory.asking(dataclasses.replace(model, nf4=True, dtype="float16"), *given).temporaries)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    few, many = map(int, done.stdout.split())
    assert many < few + 3 * 2 * 128 * 256  # three more layers' kernels of one kind would be more


def test_few_layers_stand_for_many(tmp_path: Path):
    """As few as suffice: more if what a sampling loop needs at its start may hide what it needs at its end."""
    asked: list[int] = []
    model = dataclasses.replace(tiny.model_config(tmp_path), n_layers=80)

    def sized(x: int, temporaries: int) -> memory.MemoryEstimate:
        return memory.MemoryEstimate(x, x, x, x, x, temporaries, 0)

    def program(start: int, layer: int) -> memory.Program:
        asked.clear()

        def need(model: Any) -> memory.MemoryEstimate:
            asked.append(model.n_layers)
            return sized(10 * model.n_layers, max(start, layer * model.n_layers))

        return memory.Program(need, lambda _: sized(10, layer))

    for start, layer, depths in ((0, 0, [4]), (500, 0, [4]), (0, 10, [4]), (45, 10, [4]), (300, 30, [4, 12])):
        assert program(start, layer).at_depth(model).weights == 800
        assert asked == depths
    assert program(300, 30).at_depth(model).temporaries == 2400
    assert program(0, 0)._replace(layer=None).at_depth(model).weights == 800  # training: a loop over all layers
    assert asked == [80]
    assert program(0, 0).at_depth(dataclasses.replace(model, n_layers=8)).weights == 80
    assert asked == [8]
    with use_mesh(MeshSettings(data=2)):  # what devices exchange is measured
        assert program(0, 10).at_depth(model) == sized(800, 800)
    assert asked == [12, 18]


def test_weights_are_in_the_plan_by_what_they_are(tmp_path: Path):
    model = tiny.model_config(tmp_path, dtype="bfloat16")
    _, base, adapters = abstract(model, LoraSettings(rank=2))
    sizes_ = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (base, adapters)]
    need = memory.scoring(model, LoraSettings(rank=2), 2, 128)
    assert (need.weights, need.adapters, need.optimizer, need.caches) == (2 * sizes_[0], 4 * sizes_[1], 0, 0)
    need = memory.responding(model, LoraSettings(rank=0), 2, 128, 8)
    assert need.adapters == 0
    assert need.caches == pytest.approx(roofline.cache_bytes(model, 2 * 128), rel=0.01)
    assert memory.scoring(dataclasses.replace(model, dtype="float32"), LoraSettings(rank=2), 2, 128).adapters == 0


# The stage --------------------------------------------------------------------------------------------------


def test_the_plan_is_what_the_run_did(made: Made, roomy: Row):
    """Steps, prompts and samples of the shared run, which went its way without the plan."""
    figures = json.loads((made.folder / "warmup/warmup.json").read_text())
    work = {row["stage"]: row["work"] for row in roomy["stages"]}
    assert work["warmup"] == f"{figures['samples']} samples, {figures['steps']} steps"
    prompts = sum(json.loads((made.folder / f"iteration_{i + 1}/search.json").read_text())["prompts"] for i in range(2))
    assert work["search"].startswith(f"{prompts} trees")
    scores = json.loads((made.folder / "iteration_1/score.json").read_text())
    assert work["score"] == f"{ITERATIONS} × {scores['samples']} samples, 72 answers"
    card = json.loads((made.folder / "data/card.json").read_text())
    assert work["evaluate"] == f"{ITERATIONS + 2} × {card['parts']['test']['samples']} samples"
    assert all(0 < row["tokens"] <= row["padded_tokens"] for row in roomy["stages"])
    assert all(row["hours"] > 0 for row in roomy["stages"])


def test_a_run_without_a_held_out_part_is_planned_without_its_evaluation(made: Made, tmp_path: Path):
    result = planned(made, tmp_path, "--plan.device=h100", "--samples.test_share=0", "--iterations=0")
    assert [row["stage"] for row in result["stages"]] == ["warmup"]


def test_the_largest_sizes_fit_where_there_is_room(made: Made, roomy: Row):
    assert roomy["fits"]
    assert roomy["change"] is None
    assert {row["setting"] for row in roomy["largest"]} == set(sizes.STAGE_OF)
    assert [row["value"] for row in roomy["largest"] if row["stage"] == "warmup"] == [8]
    for row in roomy["largest"]:
        assert row["of"] in ("a device's whole share of a batch", "an iteration has 8 prompts")
    for row in roomy["stages"]:
        need = row["bytes_a_device"]
        assert need["total"] == sum(value for name, value in need.items() if name != "total")


@pytest.mark.memory
def test_what_is_proposed_does_fit(made: Made, roomy: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A device with half of what the run needs: another plan with the proposed settings says that it fits."""
    most = max(row["bytes_a_device"]["total"] for row in roomy["stages"])
    device = f"--plan.device={most / 1e9 * 0.75}:100:1"
    short = planned(made, tmp_path, device)
    assert not short["fits"]
    assert f"does not fit as set; a run will lower it to {short['change']['arguments']}:" in capsys.readouterr().out
    again = planned(made, tmp_path, device, *short["change"]["arguments"].split())
    assert again["fits"]
    assert not (tmp_path / "run").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert any("whatever dtype" in text for text in plan._largest(short | {"change": None}))


def test_a_mesh_that_is_not_given_takes_all_devices(made: Made):
    config = configured(made, "--plan.device=h100", "--plan.count=4")
    hardware = hardware_of(config)
    assert laid_out(config, hardware).mesh.data == 4
    assert laid_out(configured(made, "--mesh.fsdp=2", "--mesh.data=0"), hardware).mesh.data == 2
    assert hardware.limit == 72_000_000_000
    with pytest.raises(ValueError, match=r"needs 8 devices; set plan\.count"):
        laid_out(configured(made, "--mesh.fsdp=8"), hardware)
    with pytest.raises(ValueError, match=r"plan\.count=999, but JAX already runs on 8"):
        hardware_of(configured(made, "--plan.device=h100", "--plan.count=999"))
    with pytest.raises(ValueError, match=r"plan\.count=9, but this machine has 8"):
        hardware_of(configured(made, "--plan.count=9"))


def test_planning_leaves_the_environment_as_it_was(made: Made, monkeypatch: pytest.MonkeyPatch):
    for flags in (os.environ["XLA_FLAGS"], None):
        if flags is None:
            monkeypatch.delenv("XLA_FLAGS")
        hardware_of(configured(made, "--plan.device=h100"))
        assert os.environ.get("XLA_FLAGS") == flags


def test_changes_go_from_cheap_to_dear(made: Made):
    config = configured(made, "--plan.device=h100", "--plan.count=4", "--lora.rank=0")
    config = laid_out(config, hardware_of(config))
    model = load_base(config).config
    tried = list(changes(config, hardware_of(config), model))
    assert tried[:4] == [
        {"dtype": "bfloat16"},
        {"remat": "layers"},
        {"mesh.data": 2, "mesh.fsdp": 2},
        {"mesh.data": 1, "mesh.fsdp": 4},
    ]
    assert {"lora.rank": 16, "quantize": "nf4"}.items() <= tried[-1].items()
    assert len({as_arguments(change) for change in tried}) == len(tried)
    for change in tried:
        flat = with_settings(config, change).flat()
        assert all(flat[name] == value for name, value in change.items())


def test_data_that_a_run_refuses_is_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [f"--data={tmp_path / 'none.jsonl'}", f"--model={made.settings[0].partition('=')[2]}"]
    assert main(["--stage=plan", *arguments]) == 2
    assert capsys.readouterr().err.endswith("none.jsonl does not exist\n")


def test_no_weights_are_needed(made: Made, tiny_folder: Path, tmp_path: Path):
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = dataclasses.replace(configured(made), model=str(tmp_path))
    assert load_base(config).config == load_base(configured(made)).config
    assert divide(config, None)[0]["train"].samples


# Devices and hours ------------------------------------------------------------------------------------------


def test_devices_by_name_and_by_numbers():
    assert device_of("H100") is DEVICES["h100"]
    assert device_of("48:864:181")[:3] == (48, 864, 181)
    for wrong in ("gpu", "1:2", "a:b:c", "0:1:1", "nan:1:1", "1:inf:1"):
        with pytest.raises(ValueError, match=r"^plan\.device must be one of t4, .*, here, or GB:bandwidth:TFLOPS"):
            device_of(wrong)
    kinds = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA A100-SXM4-80GB": "a100-80"}
    kinds |= {"Tesla T4": "t4", "NVIDIA L4": "l4", "NVIDIA H200": "h200", "NVIDIA A10G": "a10g", "NVIDIA L40S": "l40s"}
    kinds |= {f"NVIDIA GeForce RTX {n}": f"rtx-{n}" for n in (3090, 4090, 5090)}
    kinds |= {"NVIDIA B200": "b200", "AMD Instinct MI300X": "mi300x", "NVIDIA A100 80GB PCIe": "a100-80"}
    kinds |= {"TPU v5 lite": "tpu-v5e", "TPU v5": "tpu-v5p", "TPU v6 lite": "tpu-v6e", "TPU v4": "tpu-v4"}
    for kind, name in kinds.items():
        assert device_like(kind) is DEVICES[name]
    others = ("NVIDIA A10", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti")
    for kind in ("cpu", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", *others):
        assert device_like(kind) is None


def test_a_cpu_is_timed(made: Made):
    device = hardware_of(configured(made)).device
    assert device is not None
    assert 0 < device.teraflops < 100
    assert 0 < device.bandwidth < 10000
    assert PlanSettings(decode_share=0.1).shares(device) == CPU_SHARES._replace(decode=0.1)


def test_durations_are_written_as_a_person_would():
    hours = (None, 0, 0.4 / 3600, 40 / 3600, 150 / 3600, 2.14, 30, 100)
    assert [plan._duration(x) for x in hours] == ["?", "0 s", "0.4 s", "40 s", "2.5 min", "2.1 h", "30 h", "4.2 days"]


@pytest.mark.parametrize("change", ["memory_share=1.5", "decode_share=0", "count=-1", "pairs_a_tree=-1"])
def test_settings_that_mean_nothing(change: str):
    name = change.split("=")[0]
    with pytest.raises(ValueError, match=rf"plan\.{name} must"):
        settings.parse(["--stage=plan", f"--plan.{change}"])
    assert PlanSettings().device == HERE


def test_without_a_data_sheet_there_are_no_times(made: Made, roomy: Row, capsys: pytest.CaptureFixture[str]):
    here = roomy | {"stages": [row | {"hours": None} for row in roomy["stages"]]}
    plan._show(here | {"devices": roomy["devices"] | {"data_sheet": None}})
    assert "no data sheet for this device" in capsys.readouterr().out


def test_times_are_shown_in_full_beside_a_long_description(roomy: Row, capsys: pytest.CaptureFixture[str]):
    plan._show(roomy | {"stages": [row | {"work": "wide " * 40, "hours": 40 / 3600} for row in roomy["stages"]]})
    assert capsys.readouterr().out.count(" 40 s\n") == len(roomy["stages"])


def test_a_step_of_all_weights_takes_three_passes():
    from benchmarks.memory import LLAMA

    once = roofline.forward(LLAMA, 2, 512, 64).flops
    assert roofline.full_step(LLAMA, 2, 512, 64).flops == 3 * once
    assert 2 * once < roofline.lora_step(LLAMA, 2, 512, 64).flops < 2.5 * once
    assert roofline.weight_bytes(dataclasses.replace(LLAMA, nf4=True)) < 0.4 * roofline.weight_bytes(LLAMA)
    adapters = abstract(dataclasses.replace(LLAMA, n_layers=2), LoraSettings())[2]
    assert roofline.adapter_weights(LLAMA, 16) == 16 * sum(x.size for x in jax.tree.leaves(adapters))
