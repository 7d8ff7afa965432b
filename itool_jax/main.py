"""`python -m itool_jax.main --stage=…`: reads the settings, runs the stage, turns errors of the user into one line."""

import dataclasses
import importlib
import os
import sys
from collections.abc import Sequence

from itool_jax.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()  # before the imports below, which take a second and would come twice

from itool_jax import config as settings
from itool_jax import hosts, messages, metrics, preemption, progress, run_directory, trackers
from itool_jax.config import Config
from itool_jax.untrusted import show_traceback

USAGE_ERROR, PREEMPTED, INTERRUPTED, BROKEN_PIPE = 2, 75, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code: 0, 2 for what the user can mend, 75 where it was asked to stop."""
    where = config = None
    try:
        arguments = sys.argv[1:] if arguments is None else arguments
        config = settings.parse(arguments)
        where = config.output or config.run_dir
        run(config, arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # whoever read the output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    except preemption.PreemptionError:
        print("asked to stop; all is kept, and the same command goes on where it was", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        hosts.leave("interrupted")
        kept = config is not None and config.resumes
        messages.fail("interrupted; the same command goes on where it was" if kept else "interrupted")
        return INTERRUPTED
    except Exception as error:
        fault = not (isinstance(error, ValueError | OSError | MemoryError) or settings.is_out_of_memory(error))
        line = settings.describe_error(error, where)
        if fault and isinstance(error, RuntimeError):  # of an exchange with the others, perhaps
            hosts.await_verdict()
        hosts.leave(line)
        if fault or os.environ.get("ITOOL_TRACEBACK"):
            messages.note("error", line)
            raise
        messages.fail(line)
        return USAGE_ERROR
    finally:
        close_log()
        hosts.leave()


def run(config: Config, arguments: Sequence[str] = ()) -> None:
    """Runs the stage of `config`, in its run directory, with compiled programs kept for the next time."""
    if config.stage == "report":  # beside a run that goes on: it must not take a device
        importlib.import_module("itool_jax.stages.report").run(config)
        return
    import jax  # slow to import; --help and errors of the command line come without it

    from itool_jax import environment
    from itool_jax.model.sharding import mesh_here, use_mesh

    environment.keep_programs()
    if config.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")
    if config.looks_only:  # it decides itself which devices are used
        importlib.import_module(f"itool_jax.stages.{config.stage}").run(config)
        return
    trackers.require(config.log)
    if config.deterministic:
        environment.make_deterministic()
    hosts.join(config.distributed, messages.current_stage)
    if config.resumes:
        preemption.listen()
    messages.console_out.quiet = not hosts.is_first()
    if config.stage in ("generate", "export"):
        mesh = mesh_here(config.mesh)
        if mesh != config.mesh:
            messages.say("the mesh needs more devices than are here; one is used")
        config = dataclasses.replace(config, mesh=mesh)
    with run_directory.lock(config), use_mesh(config.mesh):
        hosts.by_first("settings", lambda: run_directory.save_or_check(config))
        if config.keeps_run:
            open_log(config)
            if line := environment.record(config.run_dir, [*settings.PROGRAM.split(), *arguments]):
                messages.say(line)
        from itool_jax.stages import sizes
        from itool_jax.stages.run import Run

        run = sizes.resolved(Run(config))
        with sizes.explained(run):
            importlib.import_module(f"itool_jax.stages.{config.stage}").run(run)


def open_log(config: Config) -> None:
    """Writes messages, numbers and traces to the run directory from now on; of several processes, the first does."""
    close_log()
    if hosts.is_first():
        metrics.attach_trackers(trackers.open_trackers(config.log, config.run_dir, config.flat()))
        messages.open_log(config.run_dir)
        progress.trace_into(config.run_dir / "profile" if config.profile else None)


def close_log() -> None:
    """Ends what `open_log` began; does nothing if it did not."""
    messages.close_log()
    progress.trace_into(None)
    metrics.close_trackers()


if __name__ == "__main__":
    sys.excepthook = show_traceback
    hosts.end(main())
