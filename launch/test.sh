#!/usr/bin/env bash
# Sets up and runs every check: lint, types and house rules beside the unit tests, then the real parts together.
# launch/test.sh --all: and what only repeats (tests marked `all`): the same proof at another moment or of another size.
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

real="not unit and not all"
if [ "${1:-}" = --all ]; then
    real="not unit"
    shift
fi
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi

phase lint ruff check flux_ray tests benchmarks
# What computes on one core alone, on two: types and house rules beside the unit tests. Their output follows at the end.
beside="$(mktemp)"
trap 'rm -f "$beside"' EXIT
{ phase types mypy && phase house python -m pytest -q tests/house; } > "$beside" 2>&1 &
status=0
phase unit python -m pytest -q -m unit --ignore=tests/house || status=$?
wait $! || status=$?
cat "$beside"
[ $status = 0 ] || exit $status
echo "== the rest: real engines, real training, real Ray"
python -m pytest -m "$real" --durations=15
