#!/usr/bin/env bash
# Kills and stops the processes of real runs at moments that follow from a seed, and shows what came of each.
# launch/chaos.sh [ROW ...] [--seed N]: all rows without any; a row takes one to a few minutes, the soak longer.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
flux_setup cpu,test >&2
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m tests.faults.chaos "$@"
