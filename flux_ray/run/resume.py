"""Where a run that goes on with another one begins, and what it does otherwise than that one.

Takes:  a Config with `resume`.
Gives:  `start`: the checkpoint and what the loop knew then; `changes`: the options that differ, in one line.
Knows:  what a checkpoint's tensors can't do without.
Never:  writes; starts an actor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flux_ray import names, run_dir
from flux_ray.config import Config, changed, options, to_dict
from flux_ray.errors import UserError
from flux_ray.records import LoopState
from flux_ray.run import checkpoint as saved

#: The options that the shapes of a checkpoint's tensors depend on, beside the model.
FIXED = ("train.lora.rank", "train.lora.alpha", "train.lora.targets")
#: Options, and sections of them, that don't change what a group is: finished groups of before are trained on.
NOT_OF_GROUPS = ("driver.num_steps", "checkpoint", "cluster", "eval", "observability", "train", "weights")
OF_THE_PLACE = ("run_dir", "resume")  # they differ in every resumed run, and say nothing
MOST_CHARS = 80  # of a value, as it is shown


@dataclass(frozen=True)
class Start:
    config: Config
    checkpoint: Path | None = None  # none: there is nothing to go on from
    state: LoopState = field(default_factory=lambda: LoopState(step=0))
    warnings: tuple[str, ...] = ()


def start(config: Config) -> Start:
    """UserError where the run can't go on as it is asked to."""
    if config.resume is None:
        return Start(config)
    found = run_dir.resumed_run(config.resume, config.run_dir)
    if found == run_dir.AUTO:
        # Of a run that ended before its first checkpoint there is a folder, which this one may go on in.
        begun = run_dir.is_begun(str(config.run_dir))
        return Start(changed(config, {"resume": config.run_dir if begun else None}))
    config = changed(config, {"resume": found})
    path, lines = saved.find(str(found))
    state = saved.load(path)
    if state.step > config.driver.num_steps:
        raise UserError(f"driver.num_steps={config.driver.num_steps} is less than the {state.step} steps done in "
                        f"{path}")
    _refuse_other_shapes(config, path)
    if state.kept and (others := _of_groups(_differences(config))):
        count, has = len(state.kept), "has" if len(others) == 1 else "have"
        groups = "1 finished group is" if count == 1 else f"{count} finished groups are"
        lines = [*lines, f"{groups} sampled again, for {', '.join(others)} {has} changed"]
        state = replace(state, kept=())
    return Start(config, path, state, tuple(lines))


def _of_groups(differing: Iterable[str]) -> list[str]:
    return [key for key in differing if key not in NOT_OF_GROUPS and key.partition(".")[0] not in NOT_OF_GROUPS]


def changes(config: Config) -> list[str]:
    """In one line, or none, what the resumed run does otherwise than before."""
    if config.resume is None:
        return []
    differ = [f"{key} {_written(before)} -> {_written(now)}" for key, (before, now) in _differences(config).items()]
    return [f"options that differ from those of {run_dir.run_of(config.resume)}: {', '.join(differ)}"] if differ else []


def _differences(config: Config) -> dict[str, tuple[Any, Any]]:
    """Option ► its value in the run that is resumed, and now; of those that both have."""
    keys = [key for key, _ in options()]
    before = names.flatten(run_dir.saved_config(str(config.resume)), options=keys)
    now = names.flatten(to_dict(run_dir.hidden(config)), options=keys)  # what differs is shown
    return {key: (before[key], now[key]) for key in now
            if key in before and before[key] != now[key] and key not in OF_THE_PLACE}


def _written(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= MOST_CHARS else f"{text[:MOST_CHARS]}..."


def _refuse_other_shapes(config: Config, path: Path) -> None:
    """UserError, with both values, where the checkpoint's tensors fit nothing that would be trained."""
    differences = _differences(config)
    adapts = config.train.lora.rank or differences.get("train.lora.rank", (0, 0))[0]
    for key in FIXED if adapts else ():
        if key in differences:
            before, now = map(_written, differences[key])
            raise UserError(f"resume={config.resume}: {key} was {before} and can't become {now}: the checkpoint holds "
                            "tensors of the former")
    if "model.path" in differences:
        before, now = differences["model.path"]
        other = _other_shape(path / "trainer", config)
        if other:
            raise UserError(f"resume={config.resume}: model.path was {before} and can't become {now}: {other}")


def _other_shape(folder: Path, config: Config) -> str | None:
    """The first trained tensor whose shape isn't the model's; None where those that both have are alike."""
    import transformers
    from safetensors import safe_open

    from flux_ray.model import skeleton

    kind = transformers.AutoModelForSequenceClassification if config.is_score else transformers.AutoModelForCausalLM
    model = skeleton(str(config.model.path), kind, **({"num_labels": 1} if config.is_score else {}))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            keys = list(stored.keys())
            found = {key.removeprefix("master."): tuple(stored.get_slice(key).get_shape()) for key in keys}
        for name in found.keys() & shapes.keys():
            if found[name] != shapes[name]:
                return f"{name} has shape {found[name]} in {folder}, {shapes[name]} there"
    return None
