"""Accelerators that a run can be planned for, given by name or as three numbers.

In: `--plan.device`. Out: memory, bandwidth and peak rate of one device. The values come from the makers' data sheets,
for dense bfloat16 products (float16 if there is no bfloat16). Programs can use less than the stated memory.
"""

import dataclasses
import math
from typing import NamedTuple

HERE = "here"
"""The name for this machine's devices."""


class Shares(NamedTuple):
    """Shares of a device's peak rates that kinds of work reach."""

    decode: float
    """Share of the bandwidth, or of the peak if that is the limit."""
    training: float
    scoring: float


SHARES = Shares(0.55, 0.22, 0.45)
"""Measured on an H200 (decoding, scoring) and an H100 (training), with weights in bfloat16."""
CPU_SHARES = Shares(0.45, 0.58, 0.79)
"""Measured on two CPU cores in float32: see docs/performance.md."""


class Device(NamedTuple):
    """One accelerator, as in its data sheet."""

    gigabytes: float
    bandwidth: float
    """Memory bandwidth in GB/s."""
    teraflops: float
    """Peak rate of dense 16-bit products, in 10¹² operations a second."""
    source: str
    topology: str = ""
    """The TPU compiler's name for the kind, if it describes a chip as one device, as JAX does; else empty."""
    shares: Shares = SHARES


_CLOUD = "cloud.google.com/tpu/docs"
DEVICES = {
    "t4": Device(16, 320, 65, "NVIDIA T4 data sheet (float16)"),
    "l4": Device(24, 300, 121, "NVIDIA L4 data sheet (half of the value with sparsity)"),
    "a100-40": Device(40, 1555, 312, "NVIDIA A100 data sheet, 40 GB"),
    "a100-80": Device(80, 2039, 312, "NVIDIA A100 data sheet, 80 GB SXM"),
    "a10g": Device(24, 600, 70, "NVIDIA A10G data sheet (half of the value with sparsity)"),
    "l40s": Device(48, 864, 362, "NVIDIA L40S data sheet (without sparsity)"),
    "rtx-3090": Device(24, 936, 71, "NVIDIA GA102 white paper, appendix A (sums in float32, without sparsity)"),
    "rtx-4090": Device(24, 1008, 165, "NVIDIA Ada white paper, appendix A (sums in float32, without sparsity)"),
    "rtx-5090": Device(32, 1792, 209.5, "NVIDIA RTX Blackwell white paper, appendix A (sums in float32, no sparsity)"),
    "h100": Device(80, 3350, 989, "NVIDIA H100 data sheet, SXM (half of the value with sparsity)"),
    "h200": Device(141, 4800, 989, "NVIDIA H200 data sheet, SXM (half of the value with sparsity)"),
    "b200": Device(180, 8000, 2250, "NVIDIA DGX B200 data sheet, an eighth (half of the value with sparsity)"),
    "mi300x": Device(192, 5300, 1307, "AMD Instinct MI300X data sheet (without sparsity)"),
    "tpu-v4": Device(32, 1200, 275, f"{_CLOUD}/v4"),
    "tpu-v5e": Device(16, 819, 197, f"{_CLOUD}/v5e", "v5e"),
    "tpu-v5p": Device(95, 2765, 459, f"{_CLOUD}/v5p", "v5p"),
    "tpu-v6e": Device(32, 1640, 918, f"{_CLOUD}/v6e", "v6e"),
}

TPU_KINDS = {"v5 lite": "tpu-v5e", "v5e": "tpu-v5e", "v6 lite": "tpu-v6e", "v5": "tpu-v5p", "v4": "tpu-v4"}
"""JAX's names for the TPU kinds; the first match counts."""
OTHERS = {"laptop", "ti", "super", "d", "nvl", "mig"}
"""Words that mark a variant of a GPU with other figures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Planning of a run (stage plan): the devices, and the share of their limits that programs reach."""

    device: str = HERE
    """Device to plan for: t4, l4, a10g, l40s, rtx-3090, rtx-4090, rtx-5090, a100-40, a100-80, h100, h200, b200, mi300x,
    tpu-v4, tpu-v5e, tpu-v5p or tpu-v6e. For any other, give GB:bandwidth:TFLOPS with the bandwidth in GB/s, such as
    48:864:181. "here" means this machine's devices."""
    count: int = 0
    """Number of devices; 0 = as many as the mesh needs, or all devices of this machine."""
    memory_share: float = 0.9
    """Share of a device's memory that programs may use, in a plan and in sizes chosen by auto; the rest covers what
    the analysis does not see."""
    decode_share: float | None = None
    """Share of the memory bandwidth that sampling reaches. Default: 0.55 (measured on an H200 with layers of 8B shape
    in bfloat16: 0.55 for one row, 0.60 for 32, 0.57 for 128); 0.45 on a CPU."""
    training_share: float | None = None
    """Share of the peak that training steps reach. Default: 0.22 (measured on an H100 with 8B weights in bfloat16, one
    row at a time: 0.24 for SFT, 0.19 for DPO); 0.58 on a CPU."""
    scoring_share: float | None = None
    """Share of the peak that passes without a gradient reach. Default: 0.45 (measured on an H200); 0.79 on a CPU."""
    pairs_a_tree: float = 5.0
    """Preference pairs per search tree (assumed)."""

    def __post_init__(self) -> None:
        if self.device != HERE:
            device_of(self.device)
        if self.count < 0:
            raise ValueError(f"plan.count must not be negative, got {self.count}")
        for name in ("memory_share", "decode_share", "training_share", "scoring_share"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"plan.{name} must be in (0, 1], got {share}")
        if not self.pairs_a_tree >= 0:
            raise ValueError(f"plan.pairs_a_tree must not be negative, got {self.pairs_a_tree}")

    def shares(self, device: Device | None) -> Shares:
        """Returns the shares that are set, and a device's own for the others."""
        own = SHARES if device is None else device.shares
        given = (self.decode_share, self.training_share, self.scoring_share)
        return Shares(*(x if y is None else y for x, y in zip(own, given, strict=True)))


def device_of(text: str) -> Device:
    """Returns the device with that name, or built from three numbers; else ValueError listing the names."""
    if text.lower() in DEVICES:
        return DEVICES[text.lower()]
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or not all(math.isfinite(x) and x > 0 for x in numbers):
        names = ", ".join((*DEVICES, HERE))
        raise ValueError(f"plan.device must be one of {names}, or GB:bandwidth:TFLOPS such as 80:3350:989, got {text}")
    gigabytes, bandwidth, teraflops = numbers
    return Device(gigabytes, bandwidth, teraflops, "given")


def device_like(kind: str) -> Device | None:
    """Returns the device for a JAX `device_kind`, such as "NVIDIA H100 80GB HBM3" or "TPU v5 lite"; else None."""
    words = kind.lower().replace("-", " ")
    if "tpu" in words:
        return next((DEVICES[name] for part, name in TPU_KINDS.items() if part in words), None)
    named = set(words.split())
    if named & OTHERS:
        return None
    if "a100" in named:
        return DEVICES["a100-80" if "80gb" in named else "a100-40"]
    names = [name for name in DEVICES if name.removeprefix("rtx-") in named and "pcie" not in named]
    return DEVICES[names[0]] if names else None
