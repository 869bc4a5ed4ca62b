"""The Python API: makes a Config from the names that people use, and runs it.

Takes:  `FluxConfig(model_path=..., algorithm="grpo", algorithm_config={...})`; prompts as a file or in memory.
Gives:  a Config; `FluxTrainer(config).fit(prompts=...)` ► TrainingResult, `.evaluate(prompts)` ► metrics;
        `create_rl_trainer(...)`, a FluxTrainer from the names of model, data set, algorithm and backend.
Knows:  rows and functions must reach other processes: rows become a file, functions go by the name of their file.
Never:  runs a loop of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_ray import backends, names, run_dir, settings
from flux_ray import config as configs
from flux_ray.config import Config
from flux_ray.errors import UserError
from flux_ray.names.methods import FurtherMethods
from flux_ray.observability.callbacks import Callback, Metrics, as_callback
from flux_ray.outside_loop import outside_loop
from flux_ray.plugins import hand_over, refuse_while_importing

if TYPE_CHECKING:
    from flux_ray.run import TrainingResult

IN_MEMORY = "rows in memory"  # stands for data.train until the rows have a file

Rows = Sequence[str] | Sequence[Mapping[str, object]]
#: A file, a folder, a hub data set, several of them, or rows: also as a table of pandas, polars, Arrow or datasets.
Prompts = str | Path | Sequence[Path] | Mapping[str, object] | Rows | Any
Reward = str | Callable[..., object]


def FluxConfig(**options: object) -> Config:
    """Make the config of a run: these options over the algorithm's preset.

    Args:
        options: Options, nested (`train={"num_ranks": 2}`), by their short names (`num_steps=50`), or by the names that
            other libraries use (`epsilon=0.3`). With `resume` the options of that run hold where none is given here.

    Raises:
        UserError: An option is unknown (the message has the nearest one) or of a wrong type, two names of one option
            disagree, or there is no run to resume.

    Examples:
        >>> config = FluxConfig(model_path="Qwen/Qwen3-8B", algorithm="grpo", num_steps=50, train={"num_ranks": 2},
        ...                     algorithm_config={"epsilon": 0.3, "group_size": 8})
        >>> config.algo.clip_range, config.rollout.group_size, config.driver.num_steps, config.train.num_ranks
        (0.3, 8, 50, 2)
    """
    keys = [key for key, _ in configs.options()]
    return _config({**settings.from_environment(), **names.flatten(options, options=keys)})


def from_yaml(file: str | Path, **options: object) -> Config:
    """`FluxConfig` of the options in a YAML file, as `FluxConfig.from_yaml`. Those given here come over the file's.

    Args:
        file: A mapping of options, nested or by their names as `FluxConfig` takes them.
        options: As `FluxConfig` takes them.

    Raises:
        UserError: As `FluxConfig`, and for a file that can't be read.
    """
    keys = [key for key, _ in configs.options()]
    written = settings.from_file(file)
    return _config({**written, **settings.from_environment(), **names.flatten(options, options=keys)})


def to_yaml(config: Config, file: str | Path) -> None:
    """Writes the options of a config, as `FluxConfig.to_yaml`; `FluxConfig.from_yaml` reads them again."""
    Path(file).write_text(configs.to_yaml(config), encoding="utf-8")


FluxConfig.from_yaml, FluxConfig.to_yaml = from_yaml, to_yaml   # type: ignore[attr-defined]  # as people look for them


def _config(flat: dict[str, Any]) -> Config:
    """The config of options by their dotted names, which come over the algorithm's preset and a resumed run's."""
    keys = [key for key, _ in configs.options()]
    resumed = run_dir.resumed_run(flat.get("resume"), flat.get("run_dir"))
    if resumed == run_dir.AUTO:
        resumed = None
    elif resumed:
        flat = {**flat, "resume": resumed}
    before = names.flatten(run_dir.saved_config(resumed), options=keys) if resumed else {}
    algorithm = flat.get("algo.name", before.get("algo.name", configs.DEFAULT_ALGORITHM))
    if algorithm == before.get("algo.name"):
        return configs.from_dict(flat, before=before)
    before = {key: value for key, value in before.items() if not key.startswith("algo.")}
    return configs.from_dict({**names.flatten(configs.preset(algorithm), options=keys), **flat}, before=before)


class FluxTrainer(FurtherMethods):
    """Train from Python, as `flux-ray train` does.

    Every process that a call starts has ended when the call returns. In a `with` statement the trainer refuses further
    calls after the block.

    Args:
        config: What `FluxConfig` gives.
        rewards: One reward or several: a rule's name, a registered name, "path/to/file.py:function", or a function.
            A function travels by its file, or as it is where it has none. None keeps `reward.functions`.
        backend: ray (ours, also auto), trl (TRL's trainers), or unsloth (TRL's, on a model that Unsloth opened).
    """

    def __init__(
        self, config: Config, *, rewards: Reward | Sequence[Reward] | None = None, backend: str = "ray",
    ) -> None:
        if not isinstance(config, Config):
            raise UserError(f"FluxTrainer takes what FluxConfig(...) gives, not {type(config).__name__}")
        backend = backends.chosen(backend, config)
        if rewards is not None:
            several = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
            functions = [reward if isinstance(reward, str) else reference_of(reward) for reward in several]
            config = configs.from_dict({**_flat(config), "reward.functions": functions})
        self.config, self.backend = config, backend
        self._callbacks: list[Callback] = []
        self._result: TrainingResult | None = None
        self._fits = 0
        self._closed = False

    def __enter__(self) -> FluxTrainer:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True

    def add_callback(self, callback: Callback | Callable[[int, Metrics], None]) -> None:
        """Call a Callback, or a function of (step, metrics), in every later `fit` and `evaluate`."""
        self._callbacks.append(as_callback(callback))

    def fit(
        self,
        prompts: Prompts | None = None,
        *,
        num_steps: int | None = None,
        eval_prompts: Prompts | None = None,
        eval_interval: int | None = None,
        checkpoint_interval: int | None = None,
        callbacks: Sequence[Callback | Callable[[int, Metrics], None]] = (),
    ) -> TrainingResult:
        """Train, here or in a notebook. What isn't given is the config's.

        A second `fit` goes on from the model that the first one trained, with a new optimizer, in a folder of its own.
        The reference of a KL stays.

        Args:
            prompts: A data file, a data set of the hub, or whatever else `data.train` takes; a list of texts or of rows
                (dicts); a table of pandas, polars, Arrow or the datasets library.
            num_steps: Steps to train, those of a resumed run included.
            eval_prompts: What to evaluate on, in any form that `prompts` may have.
            eval_interval: Steps between two evaluations.
            checkpoint_interval: Steps between two checkpoints.
            callbacks: Called in this process, after those of `add_callback`.

        Raises:
            UserError: Something that the user can mend; before anything starts, wherever it can be known then.
        """
        self._refuse_closed()
        called = [*self._callbacks, *map(as_callback, callbacks)]
        changes = {
            "driver.num_steps": num_steps,
            "eval.every": eval_interval,
            "checkpoint.every": checkpoint_interval,
        }
        config = self.prepare(prompts, eval_prompts=eval_prompts, **changes, **self._going_on())
        self._fits += 1
        self._result = outside_loop(functools.partial(backends.runner(self.backend), callbacks=called), config)
        return self._result

    def train(self, *, callbacks: Sequence[Callback | Callable[[int, Metrics], None]] = ()) -> TrainingResult:
        """Train on the config's own data: `fit` without arguments."""
        return self.fit(callbacks=callbacks)

    def evaluate(self, prompts: Prompts | None = None) -> Metrics:
        """Evaluate each prompt once (None takes `eval.data`, or `eval.share`), and give the metrics `eval/*`.

        The model is what `fit` trained, or `model.path` before any `fit`. Only engines and reward workers start. For
        pairs and completions, ranks that train nothing start, with the reference that `fit` had. The results lie in the
        folder `evaluation` of the run. It raises what `fit` raises.
        """
        self._refuse_closed()
        given = prompts is not None
        evaluation = self.config.eval if isinstance(self.config, configs.EvaluatedConfig) else None
        if not given and not (evaluation and (evaluation.data or evaluation.share)):
            raise UserError("evaluate: no prompts given, and eval.data names none")
        pairs = isinstance(self.config, configs.PairsConfig)   # an evaluation compares them with the reference
        run = self._result.run_dir if self._result else self.config.run_dir
        # Options of training alone: they might not fit the rest of the config here, as they fit in `fit`.
        of_training: dict[str, object] = {"resume": None, "eval.stop_at": None, "critic.warmup_steps": 0}
        of_training |= {"eval.share": 0.0} if given else {}
        own = dict(configs.options_of(type(self.config)))
        nothing_to_train = configs.changed(
            self.config, {key: value for key, value in of_training.items() if key in own})
        prompts = list(prompts) if isinstance(prompts, Iterator) else prompts   # it is read twice
        named = evaluation.data if evaluation and not given else None
        config = FluxTrainer(nothing_to_train).prepare(prompts, eval_prompts=prompts, **{
            "data.train": named,
            "data.split": evaluation.split if evaluation and (given or named) else None,
            "model.path": str(self._result.model_path) if self._result else None,
            "reference.path": self._reference_path() if self._result and pairs else None,
            "run_dir": str(Path(run, "evaluation")) if run else None,
        })
        from flux_ray import run as runs

        return outside_loop(functools.partial(runs.evaluate, callbacks=self._callbacks), config)

    def _going_on(self) -> dict[str, str | None]:
        """The options of a further `fit`: it starts with what the last one trained."""
        if self._result is None:
            return {}
        folder = self.config.run_dir
        return {"model.path": str(self._result.model_path), "reference.path": self._reference_path(),
                "run_dir": f"{folder}_{self._fits + 1}" if folder else None}

    def _reference_path(self) -> str | None:
        """The frozen policy, where one is needed: the one named, or else the policy at the start of the first `fit`."""
        from flux_ray import algo

        config = self.config
        if not isinstance(config, configs.ReferencedConfig) or not algo.needs_reference(config.algo):
            return None
        return config.reference.path or config.model.path

    def _refuse_closed(self) -> None:
        if self._closed:
            raise UserError("this FluxTrainer's `with` block has ended: make another")

    def prepare(self, prompts: Prompts | None, *, eval_prompts: Prompts | None = None,
                **changes: object) -> Config:
        """Check the config that `fit` would run, and give it. Rows in memory are written to a file in the run's folder.

        `changes` are options by their dotted names; None changes nothing.
        """
        from flux_ray import handed_over  # torch is behind it

        refuse_while_importing()
        sources = {"data.train": _source(prompts), "eval.data": _source(eval_prompts)}
        given = {key: value for part in (changes, sources) for key, value in part.items() if value is not None}
        resumed = {"resume": None} if self._result else {}   # by the first `fit`: a further one goes on from its model
        config = configs.validate(configs.from_dict({**_flat(self.config), **resumed, **given}))
        config = handed_over.as_given(config, name_of=name_of)
        config = configs.changed(config, {"plugins": [*config.plugins, *_files_of_registered(config)]})
        if all(source != IN_MEMORY for source in sources.values()):
            return config
        config = run_dir.claim(config)
        files = {
            "data.train": _write(prompts, config),
            "eval.data": _write(eval_prompts, config, evaluation=True),
        }
        written = {key: file for key, file in files.items() if file is not None}
        return configs.from_dict({**_flat(config), **written})


def create_rl_trainer(
    *, model_name: str, dataset_name: str, algorithm: str = "grpo", backend: str = "ray",
    reward_model_name: str | None = None, rewards: Reward | Sequence[Reward] | None = None, **options: object,
) -> FluxTrainer:
    """Make a trainer from the names of a model, a data set and an algorithm.

    algorithm="dpo" (also ipo, cdpo, reward_model) learns from preference rows. Of such rows without a prompt column the
    other algorithms take the prompt that both responses share.

    Args:
        model_name: A local folder or a name of the hub.
        dataset_name: A file or a name of the hub.
        algorithm: A preset of conf/algo/, or the name of a plugin's algorithm.
        backend: As FluxTrainer has it.
        reward_model_name: A sequence classification model with one label: a folder or a name of the hub.
        rewards: As FluxTrainer has them. They are summed with the reward model's score, if both are given.
        options: As FluxConfig has them.

    Raises:
        UserError: The algorithm or the backend is unknown, the backend lacks an option, two reward models are named, or
            a reward model is named where nothing is scored.

    Examples:
        >>> trainer = create_rl_trainer(model_name="Qwen/Qwen3-0.6B", dataset_name="data.jsonl", algorithm="drgrpo")
        >>> trainer.backend, trainer.config.algo.name
        ('ray', 'dr_grpo')
    """
    from flux_ray import algo

    config = FluxConfig(model_path=model_name, algorithm=algorithm, **{"data.train": dataset_name}, **options)
    if isinstance(config, configs.PolicyGradientConfig) and not config.plugins:   # a plugin's are known once loaded
        algo.resolve(config.algo)
    if reward_model_name is not None:
        rewards = _with_model(config, rewards, reward_model_name)
    trainer = FluxTrainer(config, rewards=rewards, backend=backend)
    if reward_model_name is not None and trainer.backend != "ray":
        raise UserError(f"backend={backend} has no reward models; use backend=ray (ours, the default)")
    return trainer


def _with_model(config: Config, rewards: Reward | Sequence[Reward] | None, model: str) -> list[Reward]:
    """The run's rewards with the model among them. UserError where nothing is scored, or by another model too."""
    if not isinstance(config, configs.PolicyGradientConfig):
        raise UserError(f"reward_model_name={model!r}: algorithm {config.algo.name!r} scores nothing: leave it out")
    several: list[Reward] = list(config.reward.functions)
    if rewards is not None:
        several = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
    named = f"{names.REWARD_MODEL}{model}"
    for reward in several:
        if isinstance(reward, str) and names.reward_model_path(reward) not in (None, model):
            raise UserError(f"reward_model_name={model!r} and reward.functions' {reward!r} are two reward models: give "
                            "both in reward.functions, with reward.weights, or one of them")
    return several if named in several else [*several, named]


def _files_of_registered(config: Config) -> list[str]:
    """The files of registered functions that the config names. As plugins they reach every process.

    Raises UserError, as `name_of`, for a function that no other process can import.
    """
    from flux_ray.algo.estimators import ESTIMATORS
    from flux_ray.algo.losses import POLICY_LOSSES
    from flux_ray.reward import get_reward, list_rewards
    from flux_ray.reward.rules import RULES
    from flux_ray.rollout.functions import get_rollout, list_rollouts, single_turn

    if not isinstance(config, configs.PolicyGradientConfig):
        return []
    named = {config.algo.name, config.algo.estimator, config.algo.policy_loss}
    functions: list[Callable[..., object]] = []
    functions += [entry.function for name, entry in ESTIMATORS.items() if name in named and not entry.ours]
    functions += [entry.function for name, entry in POLICY_LOSSES.items() if name in named and not entry.ours]
    functions += [get_reward(name) for name in config.reward.functions if name in list_rewards() and name not in RULES]
    rollout = get_rollout(config.rollout.function) if config.rollout.function in list_rollouts() else single_turn
    functions += [rollout] if rollout is not single_turn else []
    loaded = {str(Path(path).expanduser().resolve()) for path in config.plugins}
    files = {str(Path(inspect.unwrap(function).__code__.co_filename).resolve())
             for function in functions if name_of(function)}
    return sorted(files - loaded)


def _flat(config: Config) -> dict[str, object]:
    return names.flatten(configs.to_dict(config), options=[key for key, _ in configs.options()])


def _source(prompts: Prompts | None) -> Any:
    """data.train for these prompts. Rows in memory get a file's name later, when the run has a folder."""
    from flux_ray.data import memory

    if prompts is None:
        return None
    return memory.as_named(prompts) if memory.is_named(prompts) else IN_MEMORY


def _write(prompts: Prompts | None, config: Config, *, evaluation: bool = False) -> str | None:
    """Rows in memory as a jsonl file of the run; None where they are in a file already."""
    from flux_ray.data import memory

    if prompts is None or memory.is_named(prompts):
        return None
    assert config.run_dir is not None
    file = Path(config.run_dir, "eval_data.jsonl" if evaluation else "data.jsonl")
    of_eval = config.eval if evaluation and isinstance(config, configs.EvaluatedConfig) else config.data
    memory.write_rows(prompts, file, column=config.data.prompt_column, split=of_eval.split, max_rows=of_eval.max_rows)
    return str(file)


def reference_of(reward: Callable[..., object]) -> str:
    """The name of a reward in the config: by its file, or, for a notebook's, a lambda or a closure, as handed over."""
    try:
        return name_of(reward)
    except UserError:
        return hand_over(reward)


def name_of(function: Callable[..., object]) -> str:
    """`path/to/file.py:function` (or `package.module:function`): the name by which another process can import it.

    UserError for a function without such a name (a lambda, a nested or a notebook's function, a method).
    """
    function = inspect.unwrap(function)  # a decorator's wrapper is of the decorator's file
    name = getattr(function, "__qualname__", "")
    shown = name or repr(function)
    try:
        file = inspect.getsourcefile(function)
    except TypeError:
        file = None
    if not name.isidentifier() or not file or not Path(file).is_file():
        raise UserError(f"function {shown}: other processes can't import it. Put it at the top of a file of its own: a "
                        "reward is then passed as \"path/to/file.py:my_reward\", what registers is named in plugins")
    module = inspect.getmodule(function)
    if module is not None and module.__name__ != "__main__" and module.__package__:
        return f"{module.__name__}:{name}"   # of a package: its file alone may import its neighbours
    return f"{Path(file).resolve()}:{name}"
