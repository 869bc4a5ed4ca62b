#!/usr/bin/env bash
# The documentation's site: serves it at http://127.0.0.1:8000, anew after each change; or builds it, and fails at a dead link.
# launch/docs.sh [options of mkdocs serve]
# launch/docs.sh build [options of mkdocs build]     into build/site
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
flux_setup docs
export NO_MKDOCS_2_WARNING=1   # what its theme says of itself at every start
if [ "${1:-}" = build ]; then
    shift
    exec python -m mkdocs build --strict "$@"
fi
exec python -m mkdocs serve "$@"
