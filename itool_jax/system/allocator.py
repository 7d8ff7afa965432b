"""Makes glibc's allocator keep freed memory, which it would otherwise return to the system page by page each time.

In: the environment. Out: the program restarted with glibc's settings, because glibc reads them when a process starts.
"""

import contextlib
import ctypes
import gc
import os
import sys

KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "2",  # else each thread keeps what it freed to itself
}


def keep_freed_memory() -> None:
    """Restarts the program so that glibc keeps large buffers, unless MALLOC_MMAP_MAX_ is set; other set values stay."""
    if sys.platform == "linux" and "MALLOC_MMAP_MAX_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**KEEP_FREED_MEMORY, **os.environ})


def release_freed_memory() -> None:
    """Returns all freed memory to the system once, so that what comes does not add to what has been."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
