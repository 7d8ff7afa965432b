"""What keeps a run from working here, and what to do about it: `--stage=doctor [--model=DIR --data=FILE]`.

In: the settings of a run. Out: a line a check, ok, warning or error with a remedy; and a few samples as they are
trained on, in colour. Nothing is changed. Errors end it with exit code 2.
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
"""Bytes that a run directory should have room for, whatever the model."""


def run(config: Config) -> None:
    """Prints what it finds. ValueError, one line, where there is an error."""
    found: list[Finding] = []
    for finding in _examined(config):
        found.append(finding)
        _print(finding)
    if _read(found) and not _absent(found, "dataset "):
        of_data, samples = doctor_model.data(config)
        found += of_data
        for finding in of_data:
            _print(finding)
        for shown in samples:
            for line in doctor_model.preview(config, shown):
                console_out.print(line, soft_wrap=True)
    errors, warnings = (_counted(found, level) for level in ("error", "warning"))
    if any(finding.level == "error" for finding in found):
        raise ValueError(f"doctor: {errors} and {warnings}; mend what is marked error above")
    console_out.print(Text(f"no errors, {warnings}"))


def _counted(found: list[Finding], level: str) -> str:
    count = sum(finding.level == level for finding in found)
    return f"{count} {level}{'s' * (count != 1)}"


def _examined(config: Config) -> Iterator[Finding]:
    """All but the data, as it is found."""
    there = environment.versions()
    yield from machine.packages(there)
    yield from machine.devices(config, there)
    yield from machine.processes(config)
    yield from machine.run_directory(config)
    yield from machine.compile_cache(environment.programs_folder())
    hub = list(machine.hub(config))
    yield from hub
    # Files that are not here are not fetched for this: the first run, or the plan, does.
    if _absent(hub, "model "):
        answers = all(finding.level == "ok" for finding in hub)
        remedy = f"hf download {config.model}" if answers else ""
        yield Finding("warning", "model", "its files are not here, so not looked at", remedy)
        yield from machine.disk(config.run_dir, int(LEAST))
        return
    found = list(doctor_model.model(config))
    yield from found
    yield from machine.disk(config.run_dir, _kept(config) if _read(found) else int(LEAST))


def _read(found: list[Finding]) -> bool:
    """Whether the model's configuration and tokenizer could be read, and prompts can be made."""
    refused = any(finding.level == "error" and finding.what == "template" for finding in found)
    return not refused and any(finding.level == "ok" and finding.what == "tokenizer" for finding in found)


def _absent(found: list[Finding], kind: str) -> bool:
    """Whether what the hub is asked for is not in its cache."""
    return any(f.what == "hub" and f.text.startswith(kind) and not f.text.endswith("in the cache") for f in found)


def _kept(config: Config) -> int:
    """Bytes that a run keeps: what each phase trained, and two checkpoints with their optimizer's state."""
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
