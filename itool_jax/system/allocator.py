"""glibc's allocator, told to keep what is freed, which else goes back to the system, page by page, each time.

In: the environment. Out: the program, started again with it set, since glibc reads it when a process starts.
"""

import os
import sys

KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456"}


def keep_freed_memory() -> None:
    """Starts the program again with glibc told to keep large buffers, unless one of its settings is there already."""
    if sys.platform == "linux" and not KEEP_FREED_MEMORY.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **KEEP_FREED_MEMORY})
