"""What a tokenizer of Hugging Face's is asked.

Gives:  Tokenizer, a Protocol for all parts.
Never:  imports transformers, which takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, overload

from flux_ray.records import Message


class Tokenizer(Protocol):
    """`PreTrainedTokenizerBase`, as far as we use it."""

    name_or_path: str
    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    all_special_ids: list[int]
    pad_token: str | None
    chat_template: object  # none: None

    def __len__(self) -> int: ...
    @overload
    def __call__(self, text: str, *, add_special_tokens: bool = ...) -> Mapping[str, list[int]]: ...
    @overload
    def __call__(
        self, text: list[str], *, add_special_tokens: bool = ..., return_attention_mask: bool = ...,
        verbose: bool = ...,
    ) -> Mapping[str, list[list[int]]]: ...
    def get_vocab(self) -> Mapping[str, int]: ...
    def convert_ids_to_tokens(self, ids: int) -> str: ...
    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def batch_decode(self, sequences: Sequence[Sequence[int]], *, skip_special_tokens: bool) -> list[str]: ...
    def apply_chat_template(
        self, conversation: list[Message], *, tokenize: bool, add_generation_prompt: bool = ...,
        continue_final_message: bool = ..., **kwargs: object,
    ) -> str: ...
    def save_pretrained(self, save_directory: Path) -> object: ...
