"""What is installed, what the machine has, and what is missing for what.

Gives:  `info`: lines of (heading, text), for a person and for a report of a fault.
Never:  imports Ray, vLLM or DeepSpeed; starts anything.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import flux_ray
from flux_ray.errors import UserError
from flux_ray.machine import LEAST_SHM_GIB

PACKAGES = ("torch", "vllm", "deepspeed", "ray", "transformers", "hydra-core", "omegaconf", "pyarrow")

#: Package ► what needs it.
OPTIONAL = {
    "trl": "backend='trl'",
    "unsloth": "backend='unsloth'",
    **{name: f"observability.monitors=[{name}]" for name in ("tensorboard", "wandb", "mlflow", "trackio")},
    "datasets": "data.train=NAME of the hub",
}

#: The kernel's word for a feature of the processor ► its name.
FEATURES = {"avx512f": "AVX-512", "avx512_bf16": "bf16", "amx_tile": "AMX"}

GIB = 2**30


def info(*, asks_gpus: bool = True) -> Iterator[tuple[str, str]]:
    """Headings and their texts. To ask a GPU takes some of its memory as long as this process lives: a run names those
    that the system tells of.
    """
    yield "flux_ray", f"{flux_ray.__version__} in {Path(flux_ray.__file__).parent}"
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "system", f"{platform.system()} {platform.release()} {platform.machine()}"
    for package in PACKAGES:
        yield package, _version(package) or "missing: flux_ray can't run without it"
    yield "cpu", _cpu()
    yield "memory", _memory()
    yield "/dev/shm", _shared_memory()
    yield "gpu", _gpus() if asks_gpus else _gpus_of_system()
    for package, what in OPTIONAL.items():
        found = _version(package)
        yield package, found or f"not installed; {what} needs it"


def _version(package: str) -> str | None:
    """Of the package, or of its build for CPUs, whose name differs."""
    for name in (package, f"{package}-cpu"):
        try:
            return version(name) if name == package else f"{version(name)} ({name})"
        except PackageNotFoundError:
            continue
    return None


def _cpu() -> str:
    flags = _proc("/proc/cpuinfo", "flags") or ""
    known = [name for flag, name in FEATURES.items() if flag in flags.split()]
    name = _proc("/proc/cpuinfo", "model name") or platform.processor()
    return f"{len(os.sched_getaffinity(0))} cores, {name}, {', '.join(known) or 'no AVX-512: float32 is slow'}"


def _memory() -> str:
    kib = [int((_proc("/proc/meminfo", key) or "0 kB").split()[0]) for key in ("MemTotal", "MemAvailable")]
    total, free = (value * 1024 / GIB for value in kib)
    return f"{total:.1f} GiB, {free:.1f} free"


def _shared_memory() -> str:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return "missing: Ray keeps objects on disk, which is slow"
    free = shutil.disk_usage(folder).free / GIB
    small = f"; small: Ray wants {LEAST_SHM_GIB:g} GiB (docker run --shm-size=2g)" if free < LEAST_SHM_GIB else ""
    return f"{free:.1f} GiB free{small}"


def _gpus() -> str:
    if importlib.util.find_spec("torch") is None or not Path("/dev/nvidiactl").exists():
        return "none: engines and training run on the CPU"
    import torch

    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if not names:
        return f"a driver, but none that torch {torch.__version__} can use (CUDA_VISIBLE_DEVICES, torch's CUDA version)"
    return "; ".join(f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" for gpu in names)


def _gpus_of_system() -> str:
    """Without a context on any of them."""
    found = [_proc(str(file), "Model") for file in Path("/proc/driver/nvidia/gpus").glob("*/information")]
    return "; ".join(sorted(name for name in found if name)) or "none that the system tells of"


def _proc(file: str, key: str) -> str | None:
    """The first value of a key in one of the kernel's files."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)


def command(arguments: Sequence[str]) -> None:
    """`flux-ray info`."""
    if arguments:
        raise UserError(f"flux-ray info takes nothing, got {' '.join(arguments)}")
    for heading, text in info():
        print(f"{heading:<12} {text}")
