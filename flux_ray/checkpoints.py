"""The checkpoints of a run, for whoever looks after them: `flux-ray checkpoint`, and the same from Python.

Takes:  a run's folder, or a checkpoint's.
Gives:  `list_checkpoints`, `verify`, `export`, `prune`; `command`, for the command line.
Knows:  what a checkpoint holds is enough for the model, beside the one that the run began with.
Never:  starts Ray; touches the folder of a run that goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_ray import config as configs
from flux_ray import run_dir
from flux_ray.config import Config, changed
from flux_ray.errors import UserError, unknown
from flux_ray.run import checkpoint as saved

if TYPE_CHECKING:
    from flux_ray.model import PackedModel

USAGE = """\
flux-ray checkpoint list RUN                     what there is: step, age, size, state
flux-ray checkpoint verify RUN|CHECKPOINT        reads every byte; exit code 1 where one is broken
flux-ray checkpoint export CHECKPOINT FOLDER     the model, as Hugging Face folders have it
flux-ray checkpoint prune RUN --keep K           deletes all but the newest K and the best
"""
BROKEN = 1  # exit code
TRAINER = "trainer"  # the group whose model a run is about


@dataclass(frozen=True)
class Checkpoint:
    """One of a run's checkpoints.

    Attributes:
        path: Its folder.
        step: The steps that were done.
        age_s: Seconds since it was made.
        num_bytes: What it takes on disk.
        problem: Why it can't be gone on with; None where nothing is known against it.
        has_manifest: Whether each file's size and SHA-256 are written down; an earlier version wrote none.
        is_best: Whether it is the one that `checkpoint.best` keeps.
    """

    path: Path
    step: int
    age_s: float
    num_bytes: int
    problem: str | None
    has_manifest: bool
    is_best: bool

    @property
    def state(self) -> str:
        """In words."""
        return self.problem or ("whole" if self.has_manifest else "unverified: it has no manifest")


def list_checkpoints(run: str | Path, *, read_all: bool = False) -> list[Checkpoint]:
    """The checkpoints of a run, the oldest first.

    Args:
        run: The run's folder.
        read_all: Read every byte; otherwise sizes alone are compared with the manifest, which is fast.

    Raises:
        UserError: The folder has no checkpoints.

    Examples:
        >>> for one in list_checkpoints("runs/first"):  # doctest: +SKIP
        ...     print(one.step, one.state)
    """
    folder = _checkpoints(run)
    marked = saved.best(folder)
    return [_looked_at(path, read_all=read_all, is_best=marked is not None and saved.step_of(path) == marked.step)
            for path in saved.all_of(folder)]


def verify(path: str | Path) -> list[Checkpoint]:
    """Read every byte of a checkpoint, or of all those of a run. Each one's `problem` says what is wrong with it.

    Args:
        path: A run's folder, or a checkpoint's.

    Raises:
        UserError: There is none.
    """
    folder = _folder(path)
    if not _is_checkpoint(folder):
        return list_checkpoints(folder, read_all=True)
    marked = saved.best(folder.parent)
    return [_looked_at(folder, read_all=True, is_best=marked is not None and saved.step_of(folder) == marked.step)]


def export(checkpoint: str | Path, folder: str | Path) -> Path:
    """Make a model out of a checkpoint, as the run itself makes one at its end: adapters are merged.

    Args:
        checkpoint: The checkpoint's folder, in its run's folder: the run's config is read there. The model that the run
            began with must be where it was.
        folder: The new folder, in Hugging Face layout.

    Returns:
        The new folder.

    Raises:
        UserError: The checkpoint is broken, or the folder is there already.
    """
    source, target = _folder(checkpoint), Path(folder).expanduser().absolute()
    if not _is_checkpoint(source):
        raise UserError(f"{checkpoint} is no checkpoint: runs/first/checkpoints/step-000010 would be one")
    if target.exists():
        raise UserError(f"{folder} is there already: name a new folder")
    problem = saved.verify(source).problem
    if problem is not None:
        raise UserError(f"{checkpoint} is broken: {problem}")
    config = configs.from_dict({}, before=run_dir.saved_config(str(source), named=""))
    from flux_ray.train import full_weights
    from flux_ray.train.rank import SAVED_AT_ONCE_BYTES, write_model

    model = _model(config, source / TRAINER)
    write_model(model, config, target, full_weights.iter_weights(model, SAVED_AT_ONCE_BYTES))
    return target


def prune(run: str | Path, *, keep: int) -> list[Path]:
    """Delete all checkpoints but the newest and the best, and what an interrupted save left behind.

    Args:
        run: The run's folder.
        keep: How many of the newest stay.

    Returns:
        The folders that are gone.

    Raises:
        UserError: The run goes on, or has no checkpoints.
    """
    if keep < 1:
        raise UserError(f"keep={keep}: one checkpoint stays at least")
    folder = _checkpoints(run)
    with run_dir.held(str(folder.parent)):
        return saved.prune(folder, keep)


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder")
    return folder


def _checkpoints(run: str | Path) -> Path:
    folder = _folder(run) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{run} has no checkpoints: it is no run's folder, or its run made none")
    return folder


def _is_checkpoint(folder: Path) -> bool:
    return bool(saved.NAME.fullmatch(folder.name)) or (folder / saved.STATE).is_file()


def _looked_at(path: Path, *, read_all: bool, is_best: bool) -> Checkpoint:
    found = saved.verify(path, read_all=read_all)
    made_s = max((file.stat().st_mtime for file in path.iterdir()), default=path.stat().st_mtime)
    return Checkpoint(path, saved.load(path).step if found.problem is None else saved.step_of(path),
                      max(0.0, time.time() - made_s),
                      sum(file.stat().st_size for file in path.rglob("*") if file.is_file()), found.problem,
                      found.by_manifest, is_best)


def _model(config: Config, folder: Path) -> PackedModel:
    """The model that a rank of this config trains, with the checkpoint's fp32 masters in it, in the run's type."""
    import torch
    from safetensors import safe_open

    from flux_ray.model import ScoreModel, adapt, resolve_dtype
    from flux_ray.train import full_weights
    from flux_ray.train.rank import trained_policy, trained_score

    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = resolve_dtype(state.get("dtype", config.model.dtype), device)
    load = trained_score if config.is_score else trained_policy
    model = load(changed(config, {"model.attention": "auto", "model.layout": "auto"}), dtype)
    if config.train.lora.rank:
        model.adapter = adapt(model.hf, config.train.lora, seed=config.seed, train_head=isinstance(model, ScoreModel))
        model.hf.to(dtype)
    parameters = dict(full_weights.parameters(model))
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for key in filter(lambda key: key.startswith("master."), list(stored.keys())):
                _put(parameters, key.removeprefix("master."), stored.get_tensor(key))
    if parameters:
        raise UserError(f"{folder} lacks {next(iter(parameters))}: it is of another model than {config.model.path}")
    return model


def _put(parameters: dict[str, Any], name: str, value: Any) -> None:
    """Into the model, and out of the parameters that are still missing."""
    parameter = parameters.pop(name, None)
    if parameter is None or parameter.shape != value.shape:
        raise UserError(f"the checkpoint's {name} with shape {tuple(value.shape)} fits nothing in the model that the "
                        "run's config names")
    parameter.data.copy_(value)


def command(arguments: list[str]) -> int:
    """`flux-ray checkpoint ...`; the exit code."""
    action, *rest = arguments or ["--help"]
    if action in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if action not in ACTIONS:
        raise unknown("action of flux-ray checkpoint", action, ACTIONS)
    act, count = ACTIONS[action]
    if len(rest) != count or any(word.startswith("-") and word != "--keep" for word in rest):
        usage = next(line for line in USAGE.splitlines() if f" {action} " in line)
        raise UserError(usage.partition("   ")[0])
    return act(*rest)


def _list(run: str) -> int:
    _print(list_checkpoints(run))
    return 0


def _verify(path: str) -> int:
    found = verify(path)
    _print(found)
    return BROKEN if any(one.problem is not None for one in found) else 0


def _export(checkpoint: str, folder: str) -> int:
    print(f"model in {export(checkpoint, folder)}")
    return 0


def _prune(run: str, option: str, keep: str) -> int:
    if option != "--keep" or not keep.isdecimal():
        raise UserError("flux-ray checkpoint prune RUN --keep K")
    for path in prune(run, keep=int(keep)):
        print(f"deleted {path}")
    return 0


#: What it does, and how many words it takes.
ACTIONS: dict[str, tuple[Callable[..., int], int]] = {
    "list": (_list, 1), "verify": (_verify, 1), "export": (_export, 2), "prune": (_prune, 3)}


def _print(found: list[Checkpoint]) -> None:
    for one in found:
        print(f"step {one.step:>6}  {_age(one.age_s):>9}  {_size(one.num_bytes):>9}  {one.state}"
              f"{'  (best)' if one.is_best else ''}")


def _age(seconds: float) -> str:
    """
    >>> _age(59), _age(3600), _age(200_000)
    ('59 s ago', '60 min ago', '2 d ago')
    """
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _size(num_bytes: int) -> str:
    """
    >>> _size(512), _size(3_200_000), _size(84_000_000_000)
    ('512 B', '3.2 MB', '84.0 GB')
    """
    for power, unit in ((9, "GB"), (6, "MB"), (3, "kB")):
        if num_bytes >= 10**power:
            return f"{num_bytes / 10**power:.1f} {unit}"
    return f"{num_bytes} B"
