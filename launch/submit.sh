#!/usr/bin/env bash
# Trains as a job of a running Ray cluster:
#   launch/submit.sh [overrides]                                 the project is installed on the cluster (docker/)
#   launch/submit.sh --working-dir . [...] -- [overrides]        options of `ray job submit`, then --, then overrides
# Where: RAY_DASHBOARD, else RAY_ADDRESS where that is http(s)://; else http://127.0.0.1:8265. A cluster with a token
# takes it from RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, which ray reads itself.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

address="${RAY_DASHBOARD:-}"
case "${RAY_ADDRESS:-}" in http://*|https://*) address="${address:-$RAY_ADDRESS}" ;; esac

options=()
for argument in "$@"; do
    if [ "$argument" = "--" ]; then
        while [ "$1" != "--" ]; do options+=("$1"); shift; done
        shift
        break
    fi
done

# A proxy is for other machines than this one.
export no_proxy="${no_proxy:+$no_proxy,}127.0.0.1,localhost,::1" NO_PROXY="${NO_PROXY:+$NO_PROXY,}127.0.0.1,localhost,::1"

ray="$VENV/bin/ray"
[ -x "$ray" ] || ray="$(command -v ray)" || { flux_setup cpu,test; ray="$VENV/bin/ray"; }
# ray quotes each word of the entrypoint for the shell that runs it on the cluster.
exec "$ray" job submit --address "${address:-http://127.0.0.1:8265}" ${options[@]+"${options[@]}"} \
    -- python -m flux_ray train "$@"
