#!/usr/bin/env bash
# From nothing to a model that learned: sets up, builds a tiny model and a data set of sums, warms it up, runs GRPO.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
flux_setup cpu,test
export FLUX_RAY_STARTED_S=$(date +%s)   # the seconds it tells are the run's, without the installation
exec python -m examples.quickstart "$@"
