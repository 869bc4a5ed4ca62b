"""A model that a command names, and how it was trained.

Takes:  MODEL: a run's folder, its model/, or any other model; OPTION=VALUE words.
Gives:  `config_for`: the config that goes with it; `sampling_config_for`: one that samples; `parsed`: the words as
        options.
Knows:  a run's own options (template, temperature, rewards) hold where none is given beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flux_ray import config as configs
from flux_ray import names, run_dir
from flux_ray.config import Config, PolicyGradientConfig
from flux_ray.errors import UserError

MODEL = "model"  # folder of a run that holds what it trained
SHARED = ("data.", "model.", "rollout.", "plugins", "seed")  # what any run tells of how its model is to be asked
OF_TRAINING = ("run_dir", "resume")  # where a run lies, and what it went on from: of that run alone


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """OPTION=VALUE words as options; a value is read as YAML. UserError for a word that is none."""
    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key or key.startswith("-"):
            raise UserError(f"{word!r} is no option: OPTION=VALUE")
        try:
            options["algo.name" if key == "algo" else key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{word}: no YAML value: {' '.join(str(error).split())}") from None
    return options


def run_of_model(model: str) -> Path | None:
    """The run that a model is of: `model` is its folder, or the folder model/ in it. None: of no run."""
    folder = Path(model).expanduser().absolute()
    for run in (folder, folder.parent if folder.name == MODEL else folder):
        if run_dir.is_begun(str(run)):
            return run
    return None


def config_for(model: str, options: Mapping[str, Any]) -> Config:
    """The config of these options over those of the model's run, with model.path; defaults where there is no run.

    UserError for a run without a model, a folder that isn't there, or an unknown option.
    """
    keys = [key for key, _ in configs.options()]
    flat = names.flatten(dict(options), options=keys)
    run = run_of_model(model)
    if run is None:
        return configs.from_dict({**_preset(flat, keys), **flat, "model.path": model})
    path = run / MODEL
    if not path.is_dir():
        raise UserError(f"{model}: the run has no {MODEL}/ yet: it goes on, or it ended before its last step "
                        f"(flux-ray checkpoint export makes a model of a checkpoint)")
    before = names.flatten({name: value for name, value in run_dir.saved_config(str(run), named="").items()
                            if name not in OF_TRAINING}, options=keys)
    if flat.get("algo.name", before.get("algo.name")) != before.get("algo.name"):
        before = {key: value for key, value in before.items() if not key.startswith("algo.")} | _preset(flat, keys)
    return configs.from_dict({**flat, "model.path": str(path)}, before=before)


def sampling_config_for(model: str, options: Mapping[str, Any]) -> PolicyGradientConfig:
    """As config_for, for whoever samples from the model: of a run without rollouts, model and data's options hold.

    UserError for a reward model, which writes no text.
    """
    run = run_of_model(model)
    if run is None:
        config: Config = config_for(model, options)
    else:
        saved = run_dir.saved_config(str(run), named="")
        of_run = configs.objective_of(str(names.flatten(saved, options=[key for key, _ in configs.options()])
                                          .get("algo.name", configs.DEFAULT_ALGORITHM)))
        if of_run.is_score:
            raise UserError(f"{model} is a reward model's run: it gives scores, and no text")
        config = config_for(model, options) if issubclass(of_run, PolicyGradientConfig) else _as_sampled(model, options)
    if not isinstance(config, PolicyGradientConfig):
        raise UserError(f"algo.name={config.algo.name} samples nothing: leave it out")
    return config


def _as_sampled(model: str, options: Mapping[str, Any]) -> Config:
    """The config of a run without rollouts, as that of one with them."""
    trained = config_for(model, {})
    shared = dict(configs.options_of(type(trained))).keys() & dict(configs.options_of(PolicyGradientConfig)).keys()
    kept = {key: configs.value_of(trained, key) for key in shared
            if key.startswith(SHARED) and key not in ("data.train", "model.path")}
    keys = [key for key, _ in configs.options()]
    flat = names.flatten(dict(options), options=keys)
    return configs.from_dict({**kept, **flat, "model.path": trained.model.path})


def _preset(flat: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    name = flat.get("algo.name")
    return names.flatten(configs.preset(name), options=keys) if name else {}
