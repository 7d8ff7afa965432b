#!/usr/bin/env bash
# Starts the default run on this machine: two cores and 4 GB are enough. Passes settings on, such as --seed=1.
set -euo pipefail
run() { if [[ ${DRY_RUN:-} ]]; then printf -v line ' %q' "$@" && echo "${line:1}"; else "$@"; fi; }

run python -m itool_jax.main --stage=iterate "$@"
