#!/usr/bin/env bash
# Which algorithms learn: each on two-digit addition with three seeds, and a table of the steps to 0.8, anew after each run.
# launch/learn.sh [--algorithms grpo,dapo] [--seeds 0,1,2] [--steps N] [--folder DIR] [--table] [overrides of every run]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
flux_setup cpu,test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m examples.learn "$@"
