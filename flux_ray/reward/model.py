"""A reward model: scores of groups as they come.

Takes:  a sequence classification model's path, the policy's tokenizer; Responses a call, many callers at once.
Gives:  `await scores(responses)`: one number a sample; `check_reward_models` for the start of a run.
Knows:  tokens go as they are where the two tokenizers have the same ones, else text is decoded and encoded again.
Never:  trains; scores a text that doesn't fit the model's context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import numpy as np
import torch

from flux_ray.batch import Serving, pack
from flux_ray.config import PolicyGradientConfig
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.model import (
    check_score_model,
    context_length,
    last_token,
    load_score,
    load_tokenizer,
    score_traits,
)
from flux_ray.model.load import Loading
from flux_ray.model.scoring import per_sample
from flux_ray.names import reward_model_path, reward_name
from flux_ray.records import FINISH_STOP, Responses, Sample


class RewardModel:
    """Calls are served in the order they came; a failed forward fails its callers."""

    def __init__(
        self, path: str, *, tokenizer_path: str, device: str, max_tokens_per_forward: int, **loading: Unpack[Loading],
    ) -> None:
        """`tokenizer_path`: the policy's. `loading`: dtype, attention, layout, as `load_score` takes them."""
        self.model = load_score(path, new_head=False, **loading)
        self.model.to(device).eval().requires_grad_(False)
        self._path, self._device, self._max_tokens = path, device, max_tokens_per_forward
        self._context = context_length(path)
        self._ours, self._its = load_tokenizer(tokenizer_path), load_tokenizer(path)
        self._same_tokens = have_same_tokens(self._ours, self._its)
        self._serving = Serving(self._forward, cost=_num_tokens, max_cost=max_tokens_per_forward)

    async def scores(self, responses: Responses) -> list[float]:
        """The score of each sample at its last token, as transformers' sequence classification gives it.

        Waits for the forwards of its own process only. Raises ValueError for a text that is longer than the context.
        """
        samples = [self._sample(responses, i) for i in range(len(responses.token_ids))]
        return await self._serving.ask(samples)

    def _sample(self, responses: Responses, i: int) -> Sample:
        ids = responses.token_ids[i] if self._same_tokens else self._encoded(responses, i)
        length = last_token(ids, self.model.original_config.pad_token_id) + 1
        if length > self._context:
            raise ValueError(f"reward model {self._path}: {length} tokens don't fit its context of {self._context}")
        return Sample(ids[:length].astype(np.int32), np.arange(length) == length - 1, np.zeros(length, np.float32))

    def _encoded(self, responses: Responses, i: int) -> np.ndarray:
        """The text in the model's own tokens: a chat by its own template where it has one; whole texts end."""
        prompt = responses.prompt
        if not isinstance(prompt.text, str) and self._its.chat_template:
            messages = [*prompt.text, {"role": "assistant", "content": responses.texts[i]}]
            text = self._its.apply_chat_template(messages, tokenize=False)
            return np.array(self._its(text, add_special_tokens=False)["input_ids"], np.int32)
        text = self._ours.decode(responses.token_ids[i].tolist(), skip_special_tokens=True)
        ids = list(self._its(text)["input_ids"])
        end = self._its.eos_token_id
        if responses.finish_reasons[i] == FINISH_STOP and end is not None and ids[-1:] != [end]:
            ids.append(end)
        return np.array(ids, np.int32)

    @torch.no_grad()
    def _forward(self, callers: list[list[Sample]]) -> list[list[float]]:
        """Scores of each caller's samples, in forwards of at most max_tokens_per_forward tokens (with padding)."""
        return [self._of_one(samples) for samples in callers]

    def _of_one(self, samples: list[Sample]) -> list[float]:
        """Several callers share no forward: a score's last bits would depend on who asked at the same moment."""
        micro_batches = pack(samples, max_tokens=self._max_tokens, max_samples=None,
                             padded=self.model.layout == "padded", device=self._device)
        scores = [self.model(m.to(self._device), at="last") for m in micro_batches]
        return [float(row[-1]) for row in per_sample(scores, micro_batches, len(samples))]


def _num_tokens(samples: Sequence[Sample]) -> int:
    return sum(sample.num_tokens for sample in samples)


def have_same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether each id means the same text in both tokenizers, special tokens included."""
    return one.get_vocab() == other.get_vocab() and one.eos_token_id == other.eos_token_id


def check_reward_models(config: PolicyGradientConfig, tokenizer: Tokenizer, *, longest_prompt: int) -> list[str]:
    """A warning for each reward model whose tokenizer isn't the policy's.

    UserError for what is no sequence classification model with one label, or has too short a context.
    """
    warnings = []
    for reference in config.reward.functions:
        path = reward_model_path(reference)
        if path is None:
            continue
        try:
            check_score_model(path)
            score_traits(path, config.model.attention)
            context, its = context_length(path), load_tokenizer(path)
        except UserError as error:
            raise UserError(f"reward.functions, {reference}: {error}") from error
        longest = longest_prompt + config.rollout.max_tokens
        if not have_same_tokens(tokenizer, its):
            warnings.append(f"reward model {reward_name(reference)} has another tokenizer than the policy: texts are "
                            "decoded and encoded again for it")
        elif longest > context:
            raise UserError(f"reward.functions, {reference}: its context is {context} tokens; prompts of up to "
                            f"{longest_prompt} and rollout.max_tokens={config.rollout.max_tokens} need {longest}")
    return warnings
