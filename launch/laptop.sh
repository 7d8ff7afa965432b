#!/usr/bin/env bash
# The default run on this machine: two cores and 4 GB are enough. Arguments are passed on, for instance --seed=1.
set -euo pipefail
exec python -m itool_jax.main --stage=iterate "$@"
