"""`python -m itool_jax.main --stage=…`: reads the settings, runs the stage, and reports user errors in one line."""

import dataclasses
import gc
import importlib
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from itool_jax.system.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()  # may restart the program, so it comes before the imports below, which take a second
    gc.disable()  # what they create stays; collecting garbage in between takes a fifth of their time

from itool_jax import config as settings
from itool_jax.config import Config
from itool_jax.store import directory as run_directory
from itool_jax.system import hosts, messages, metrics, preemption, progress, trackers
from itool_jax.system.untrusted import show_traceback

USAGE_ERROR, PREEMPTED, INTERRUPTED, BROKEN_PIPE = 2, 75, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code; raises if the program itself is at fault.

    The code is 0 on success, 2 for an error that the user can fix, 75 after a request to stop, 130 after Ctrl-C, and
    141 if the reader of the output is gone.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    config = None
    try:
        config = settings.parse(arguments)
        run(config, arguments)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes stdout once more at exit
        return BROKEN_PIPE
    except SystemExit as stop:  # after --help
        return int(stop.code or 0)
    except preemption.PreemptionError:
        print("Stopped on request. Rerun the same command to resume.", file=sys.stderr)
        return PREEMPTED
    except KeyboardInterrupt:
        hosts.leave("interrupted")
        resumes = config is not None and config.resumes
        messages.fail("Interrupted. Rerun the same command to resume." if resumes else "Interrupted.")
        return INTERRUPTED
    except Exception as error:
        line = settings.describe_error(error, config and (config.output or config.run_dir))
        _tell_other_processes(error, line)
        if not _user_can_fix(error) or os.environ.get("ITOOL_TRACEBACK"):
            messages.note("error", line)
            raise
        messages.fail(line)
        return USAGE_ERROR
    finally:
        close_log()
        hosts.leave()


def _user_can_fix(error: Exception) -> bool:
    return isinstance(error, ValueError | OSError | MemoryError) or settings.is_out_of_memory(error)


def _tell_other_processes(error: Exception, line: str) -> None:
    """Reports the error to the other processes, unless it follows from another's failure, which then ends this one."""
    if isinstance(error, RuntimeError) and not _user_can_fix(error):  # maybe a collective that another process left
        hosts.await_verdict()
    hosts.leave(line)


def run(config: Config, arguments: Sequence[str] = ()) -> None:
    """Runs the stage of `config`, in its run directory if it has one."""
    if config.stage == "report":  # must not start JAX: a running command may hold the devices
        _stage(config).run(config)
        return
    _configure_jax(config)
    if config.looks_only:  # these stages choose their devices themselves
        _stage(config).run(config)
        return
    _join_processes(config)
    _run_in_directory(_on_devices_here(config), arguments)


def _stage(config: Config) -> Any:
    return importlib.import_module(f"itool_jax.stages.{config.stage}")


def _configure_jax(config: Config) -> None:
    """Enables the compilation cache, full precision for float32 matrix products, and all CPU cores if asked for."""
    import jax  # slow to import, and --help and command-line errors do not need it

    from itool_jax.system import environment

    environment.keep_programs()
    environment.use_gpu_memory()
    if config.mesh.data == 0 and not config.distributed.several:
        environment.split_cpu(math.gcd(config.warmup.batch_size, config.preference.batch_size))
    if config.dtype == "float32":
        jax.config.update("jax_default_matmul_precision", "highest")


def _join_processes(config: Config) -> None:
    """Joins the command's other processes; listens for stop requests if the command can be resumed."""
    from itool_jax.system import environment

    trackers.require(config.log)
    if config.deterministic:
        environment.make_deterministic()
    hosts.join(config.distributed, messages.current_stage)
    environment.require_devices()
    if config.resumes:
        preemption.listen(_acknowledge_stop)
    messages.console_out.quiet = not hosts.is_first()


def _acknowledge_stop(times: int) -> None:
    """Says what a requested stop waits for."""
    work, stage = progress.current_work(), messages.current_stage()
    place = f"the current step of {work}" if work else f"loading{f' in {stage}' if stage else ''}"
    if times == 1:
        messages.tell("info", f"Stopping after {place}; finished work is kept.")
    else:
        messages.tell("info", f"Still stopping after {place}; kill -9 ends it at once, and finished work is kept.")


def _on_devices_here(config: Config) -> Config:
    """Shrinks the mesh to the available devices, for stages that use a trained model on any machine."""
    from itool_jax.model.sharding import mesh_here

    if config.stage not in ("generate", "export"):
        return config
    mesh = mesh_here(config.mesh)
    if mesh != config.mesh:
        messages.log("the mesh needs more devices than this machine has; using one")
    return dataclasses.replace(config, mesh=mesh)


def _run_in_directory(config: Config, arguments: Sequence[str]) -> None:
    """Locks the run directory or output, saves or checks the settings there, and runs the stage."""
    from itool_jax.model.sharding import use_mesh
    from itool_jax.system import environment

    with run_directory.lock(config), use_mesh(config.mesh):
        hosts.broadcast_from_primary("settings", lambda: run_directory.save_or_check(config))
        if config.keeps_run:
            open_log(config)
            if line := environment.record(config.run_dir, [*settings.PROGRAM.split(), *arguments]):
                messages.log(line)
        from itool_jax.planning import sizes  # slow to import; wrong settings have been rejected by now
        from itool_jax.store.run import Run

        directory_run = sizes.resolved(Run(config))
        with sizes.explained(directory_run):
            _stage(config).run(directory_run)


def open_log(config: Config) -> None:
    """Starts writing messages, metrics and traces to the run directory; only the first process does."""
    close_log()
    if hosts.is_first():
        metrics.attach_trackers(trackers.open_trackers(config.log, config.run_dir, config.flat()))
        messages.open_log(config.run_dir)
        progress.trace_into(config.run_dir / "profile" if config.profile else None)


def close_log() -> None:
    """Closes what `open_log` opened, if anything."""
    messages.close_log()
    progress.trace_into(None)
    metrics.close_trackers()


if __name__ == "__main__":
    gc.freeze()
    gc.enable()
    sys.excepthook = show_traceback
    hosts.end(main())
