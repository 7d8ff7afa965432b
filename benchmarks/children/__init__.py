"""The programs that are measured: ours and its peers, each a process that `benchmarks.run` starts and asks."""
