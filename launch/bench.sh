#!/usr/bin/env bash
# Measures what docs/benchmarks.md describes: each figure against bare floors, and TRL, in one run. A table, or JSON lines.
# launch/bench.sh [--quick] [--json] [--only NAME,NAME] [--dtype bfloat16|float32] [--runs N] [--tokens N]
#     [--lengths equal|log_normal] [--trl THREADS BATCH]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
flux_setup cpu,test >&2
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m benchmarks.bench "$@"
