"""Measured programs, ours and its peers', each a process that `benchmarks.run` starts and queries."""
