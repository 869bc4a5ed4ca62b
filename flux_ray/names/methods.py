"""What other projects' trainers can do, by the names that they have for it.

Gives:  FurtherMethods, for a trainer: `save_model`; any other name is answered with what there is instead.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_ray.errors import UserError

_GENERATE = ("vLLM or transformers generates from the trained model: its folder is what fit(...) gives as .model_path; "
             "evaluate(prompts) scores answers")
_HUB = "nothing is uploaded: `hf upload NAME FOLDER` takes the folder that fit(...) gives as .model_path"
_RESUME = "FluxConfig(resume=RUN) goes on from a run's newest checkpoint"

#: Method ► what there is instead.
METHODS = {
    "predict": _GENERATE, "generate": _GENERATE, "push_to_hub": _HUB,
    "save_checkpoint": "FluxConfig(checkpoint={'every': N}) makes a checkpoint every N steps",
    "load_checkpoint": _RESUME, "resume": _RESUME, "resume_from_checkpoint": _RESUME,
    "train_step": "fit(num_steps=N) trains N steps; a Callback is called after each one",
    "get_metrics": "fit(...) gives a result with .metrics and .history",
    "log_metrics": "every step is logged, to RUN/metrics.jsonl",
    "setup_model": "fit(...) opens the model by itself", "setup_data": "fit(...) reads the data by itself",
}


class FurtherMethods:
    """Of a trainer that keeps the result of its last `fit` in `_result`."""

    _result: Any = None

    def save_model(self, output_dir: str | Path) -> Path:
        """Copy the model that `fit` trained to a folder that isn't there yet, or is empty."""
        if self._result is None:
            raise UserError("save_model: nothing was trained yet: call fit(...) first")
        folder = Path(output_dir).expanduser().absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"save_model: {folder} isn't empty: name another folder")
        shutil.copytree(self._result.model_path, folder, dirs_exist_ok=True)
        return folder

    if not TYPE_CHECKING:   # of which a checker knows that it gives nothing
        def __getattr__(self, name: str) -> Any:
            if name in METHODS:
                raise AttributeError(f"{type(self).__name__} has no {name}: {METHODS[name]}")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
