"""Which tokens end a response, by the files of a model."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flux_ray.model.stops import stop_token_ids

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("config, generation, ends", [
    ([1, 7], None, [1, 2, 7]),  # no generation config: the model's own config names them
    (7, None, [2, 7]),
    (None, None, [2]),
    ([1, 7], [1, 9], [1, 2, 9]),  # as transformers: where there is a generation config, that one
    (7, None.__class__, [2]),  # a generation config that names none
])
def test_the_tokens_that_end_a_response(tmp_path: Path, config: Any, generation: Any, ends: list[int]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": config}))
    if generation is not None:
        named = {} if generation is type(None) else {"eos_token_id": generation}
        (tmp_path / "generation_config.json").write_text(json.dumps(named))
    assert stop_token_ids(str(tmp_path), SimpleNamespace(eos_token_id=2)) == ends


def test_without_a_model_the_tokenizer_alone_says_it() -> None:
    assert stop_token_ids(None, SimpleNamespace(eos_token_id=2)) == [2]
