"""What ends or fills a text is no part of it; other special tokens are."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from flux_ray.errors import UserError
from flux_ray.rollout.texts import texts_of
from flux_ray.run.prepare import _opening
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def tokenizer():
    made = tiny_tokenizer(None)
    made.add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>", "<|end|>", "<think>"]})
    return made


@pytest.mark.parametrize(("skip", "text"), [(False, "<answer>42</answer>"), (True, "42")])
def test_special_tokens_reach_rewards_unless_an_option_says_otherwise(tokenizer, skip, text):
    ids = tokenizer("<answer>42</answer><|end|><eos><pad><pad>")["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert texts_of([np.array(ids)], tokenizer, end_ids=[end], skip_special_tokens=skip) == [text]


def test_what_a_template_begins_is_told_as_the_prompts_end(tokenizer):
    ids = np.array(tokenizer("1+1=<think>")["input_ids"])
    prompts = SimpleNamespace(prompt=lambda uid: SimpleNamespace(token_ids=ids))
    assert _opening("<think>", tokenizer, prompts) == "<think>"
    assert _opening(None, tokenizer, prompts) is None
    with pytest.raises(UserError, match=r"reward\.opening='<answer>': the prompts end in '1[+]1=<think>'"):
        _opening("<answer>", tokenizer, prompts)
