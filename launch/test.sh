#!/usr/bin/env bash
# Sets up and runs every check: lint, types, house rules, unit tests, then the real parts together.
# launch/test.sh [pytest arguments]: with arguments, only pytest with them (e.g. -m unit, tests/batch, -k name).
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
flux_setup cpu,test
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"   # two thread pools on one core are slower than one thread

phase() {
    local name="$1" started=$SECONDS status=0
    shift
    "$@" || status=$?
    echo "== $name: $((SECONDS - started)) s"
    return $status
}

if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
phase lint ruff check flux_ray examples tests benchmarks
phase types mypy
phase house python -m pytest -q tests/house
phase unit python -m pytest -q -m unit --ignore=tests/house
echo "== the rest: real engines, real training, real Ray"
exec python -m pytest -m "not unit"
