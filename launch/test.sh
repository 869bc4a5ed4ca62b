#!/usr/bin/env bash
# Sets up and runs every check: lint, types, house rules and unit tests and, beside them, the real parts together.
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

real="not unit and not all" unit="unit and not all"
if [ "${1:-}" = --all ]; then
    real="not unit" unit=unit
    shift
fi
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi

failed=0   # all checks are run: one that fails hides no other
phase lint ruff check flux_ray examples tests benchmarks || failed=1

# Real parts wait a good deal for processes to start and to end: two lanes of about as much work fill two cores.
# tests/cluster comes first: it starts its own Ray, and tests/system keeps one to the end.
runs=(tests/cluster tests/system tests/faults tests/rollout tests/launch)
output="$(mktemp)"
set -m   # a process group of its own, which an interrupt reaches
phase "whole runs, real engines" python -m pytest -m "$real" --durations=20 "${runs[@]}" > "$output" 2>&1 &
set +m
beside=$!
trap 'kill -INT -- "-$beside" 2> /dev/null && wait "$beside" || true; rm -f "$output"' EXIT
phase types mypy || failed=1
phase house python -m pytest -q tests/house || failed=1
phase unit python -m pytest -q -m "$unit" --ignore=tests/house --durations=20 || failed=1
phase "real training, real Ray" python -m pytest -m "$real" --durations=20 "${runs[@]/#/--ignore=}" || failed=1
tail -n +1 -f --pid="$beside" "$output"
wait "$beside" || failed=1
exit $failed
