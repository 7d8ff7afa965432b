"""Checks that a run would work here, and says how to fix what would not: `--stage=doctor [--model=DIR --data=FILE]`.

In: the settings of a run. Out: one line per check (ok, warning or error, with a remedy), and a few training samples in
colour, as the model sees them. Nothing is changed. If there are errors, the exit code is 2.
"""

from collections.abc import Iterator

import jax
from rich.text import Text

from itool_jax.config import Config
from itool_jax.doctor import machine
from itool_jax.doctor import model as doctor_model
from itool_jax.doctor.machine import Finding
from itool_jax.model.transformer import abstract
from itool_jax.store.base import load_base
from itool_jax.system import environment
from itool_jax.system.hosts import is_first
from itool_jax.system.messages import console_out
from itool_jax.system.untrusted import harmless, redacted

STYLES = {"ok": "green", "warning": "yellow", "error": "bold red"}
LEAST = 1e9
"""Free bytes that a run directory needs regardless of the model."""


def run(config: Config) -> None:
    """Prints the findings; raises a one-line ValueError if any is an error."""
    findings: list[Finding] = []
    for finding in _examined(config):
        findings.append(finding)
        _print(finding)
    if _read(findings) and not _absent(findings, "dataset "):
        of_data, samples = doctor_model.data(config)
        findings += of_data
        for finding in of_data:
            _print(finding)
        for shown in samples:
            for line in doctor_model.preview(config, shown):
                console_out.print(line, soft_wrap=True)
    errors, warnings = (_counted(findings, level) for level in ("error", "warning"))
    if any(finding.level == "error" for finding in findings):
        raise ValueError(f"doctor: {errors} and {warnings}; fix the errors marked above")
    console_out.print(Text(f"no errors, {warnings}"))


def _counted(findings: list[Finding], level: str) -> str:
    count = sum(finding.level == level for finding in findings)
    return f"{count} {level}{'s' * (count != 1)}"


def _examined(config: Config) -> Iterator[Finding]:
    """Yields the findings about everything but the data."""
    there = environment.versions()
    yield from machine.packages(there)
    yield from machine.devices(config, there)
    yield from machine.processes(config)
    yield from machine.run_directory(config)
    yield from machine.compile_cache(environment.programs_folder())
    hub = list(machine.hub(config))
    yield from hub
    # The doctor does not download missing files; the first run or the plan does.
    if _absent(hub, "model "):
        answers = all(finding.level == "ok" for finding in hub)
        remedy = f"hf download {config.model}" if answers else ""
        yield Finding("warning", "model", "not checked: its files are not on this machine", remedy)
        yield from machine.disk(config.run_dir, int(LEAST))
        return
    findings = list(doctor_model.model(config))
    yield from findings
    yield from machine.disk(config.run_dir, _kept(config) if _read(findings) else int(LEAST))


def _read(findings: list[Finding]) -> bool:
    """Returns true if the model's configuration and tokenizer could be read and its template makes prompts."""
    refused = any(finding.level == "error" and finding.what == "template" for finding in findings)
    return not refused and any(finding.level == "ok" and finding.what == "tokenizer" for finding in findings)


def _absent(findings: list[Finding], kind: str) -> bool:
    """Returns true if a hub finding is about a `kind` that is not in the local cache."""
    return any(f.what == "hub" and f.text.startswith(kind) and not f.text.endswith("in the cache") for f in findings)


def _kept(config: Config) -> int:
    """Estimates the bytes that a run keeps: each phase's trained weights, and two checkpoints with optimizer state."""
    _, base, adapters = abstract(load_base(config).config, config.lora)
    trained = sum(4 * x.size for x in jax.tree.leaves(adapters if config.lora.rank else base))
    return int(LEAST + trained * (config.iterations + 1 + 2 * 3))


def _print(finding: Finding) -> None:
    if not is_first():
        return
    line = Text(f"{finding.level:<8}", STYLES[finding.level])
    line.append(f"{finding.what:<16}", "bold").append(harmless(redacted(finding.text)), "default")
    if finding.remedy and finding.level != "ok":
        line.append(f"\n{'':<8}{'':<16}→ {finding.remedy}")
    console_out.print(line, soft_wrap=True)
