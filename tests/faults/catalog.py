"""Every fault of the catalogue, by what it is a fault of; a new one is a line in `inputs` or `files`."""

from tests.faults import files, inputs
from tests.faults.place import Fault

SECTIONS: dict[str, list[Fault]] = {
    "The command line": inputs.COMMAND_LINES,
    "Config files": inputs.CONFIGS,
    "Data": inputs.DATA,
    "Model folders": files.MODELS,
    "Run directories": files.RUNS,
    "Benchmarks and result files": files.BENCHMARKS,
    "Exports": files.EXPORTS,
}
FAULTS = [fault for section in SECTIONS.values() for fault in section]
