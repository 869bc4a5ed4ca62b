"""Texts as token ids, many at a time and compactly.

Takes:  texts, a tokenizer.
Gives:  Tokens: the ids of many texts in one flat array; `encode_starts` for what a sequence begins with,
        `encode_continuations` for what follows in it.
Knows:  what tokenizers add by themselves: special tokens around a text, and a blank before it.
Never:  cuts a text off.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from flux_ray.data.rows import BadCell
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer

CHUNK = 8192  # texts that the tokenizer gets at once: many enough for its threads, few enough to hold
PROBE = "4"  # a text whose ids show what a tokenizer adds to one
ANCHORS = ("\n", ":", ".", "a")  # after which a text is encoded as one that goes on


T = TypeVar("T")


class Tokens:
    """Token ids (T,) int32 of each text, one after another in one array: a list of arrays would take twice as much.

    >>> tokens = Tokens.of([[5, 6], [], [7]])
    >>> tokens[0].tolist(), tokens.lengths.tolist()
    ([5, 6], [2, 0, 1])
    """

    def __init__(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        self.flat, self.lengths = flat, lengths
        self._ends = np.cumsum(lengths)

    @classmethod
    def of(cls, texts: Sequence[Sequence[int] | np.ndarray]) -> Tokens:
        lengths = np.array([len(ids) for ids in texts], np.int64)
        flat = np.fromiter(itertools.chain.from_iterable(texts), np.int32, int(lengths.sum()))
        return cls(flat, lengths)

    @classmethod
    def joined(cls, parts: list[Tokens]) -> Tokens:
        """One after another. `parts` is empty afterwards: each is freed once it is copied, or all would be there twice.
        """
        lengths = np.concatenate([part.lengths for part in parts]) if parts else np.zeros(0, np.int64)
        flat, end = np.empty(int(lengths.sum()), np.int32), int(lengths.sum())
        while parts:
            part = parts.pop()
            flat[end - len(part.flat) : end] = part.flat
            end -= len(part.flat)
        return cls(flat, lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> np.ndarray:
        end = self._ends[number]
        return self.flat[end - self.lengths[number] : end]

    def beyond(self, vocab_size: int | None) -> list[tuple[int, int]]:
        """(text, id) of the first id of each text for which the model's embedding has no row."""
        if vocab_size is None:
            return []
        (places,) = np.nonzero(self.flat >= vocab_size)
        texts, firsts = np.unique(np.searchsorted(self._ends, places, side="right"), return_index=True)
        return list(zip(texts.tolist(), self.flat[places[firsts]].tolist(), strict=True))


def encode_starts(tokenizer: Tokenizer, texts: Iterable[tuple[str, bool]]) -> Tokens:
    """Ids of what a sequence begins with: a text, and whether a template has written its special tokens already.

    The others begin with the tokenizer's own (its BOS), once, be it in the text or not; what it would add at a text's
    end is left out, for the sequence goes on.
    """
    prefix = special_prefix(tokenizer)
    parts = []
    for chunk in _chunks(texts):
        encoded = _encode(tokenizer, [text for text, _ in chunk])
        parts.append(Tokens.of([
            ids if is_chat or ids[: len(prefix)] == prefix else [*prefix, *ids]
            for ids, (_, is_chat) in zip(encoded, chunk, strict=True)
        ]))
    return Tokens.joined(parts)


def encode_continuations(tokenizer: Tokenizer, texts: Iterable[str]) -> Tokens:
    """Ids of what follows in a sequence: together with those before, they decode to the two texts.

    Many tokenizers put a blank before a text; within a sequence it would be one too many.
    """
    anchors = [anchor for anchor in ANCHORS if _holds(tokenizer, anchor)] if adds_blank(tokenizer) else []
    parts = []
    for chunk in _chunks(texts):
        found: list[list[int] | None] = [None] * len(chunk)
        for anchor in anchors:
            missing = [i for i, ids in enumerate(found) if ids is None]
            for i, ids in zip(missing, _after(tokenizer, anchor, [chunk[i] for i in missing]), strict=True):
                found[i] = ids
        alone = [i for i, ids in enumerate(found) if ids is None]
        for i, ids in zip(alone, _encode(tokenizer, [chunk[i] for i in alone]), strict=True):
            found[i] = ids
        parts.append(Tokens.of([ids or [] for ids in found]))
    return Tokens.joined(parts)


def special_prefix(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before a text by itself.

    UserError where text and special tokens can't be told apart.
    """
    whole, bare = tokenizer(PROBE)["input_ids"], tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    raise UserError(f"the tokenizer {tokenizer.name_or_path!r} encodes a text in another way with its special tokens")


def adds_blank(tokenizer: Tokenizer) -> bool:
    """Whether it encodes a text that stands alone in another way than one that goes on."""
    return any(_holds(tokenizer, anchor) and _after(tokenizer, anchor, [PROBE]) != _encode(tokenizer, [PROBE])
               for anchor in ANCHORS[:2])


def _holds(tokenizer: Tokenizer, anchor: str) -> bool:
    """Whether the anchor leaves tokens of its own behind, before a text that goes on."""
    return bool(_encode(tokenizer, [anchor])[0]) and _after(tokenizer, anchor, [PROBE])[0] is not None


def _after(tokenizer: Tokenizer, anchor: str, texts: list[str]) -> list[list[int] | None]:
    """Ids of the texts after the anchor's; None where the two have merged."""
    (start,) = _encode(tokenizer, [anchor])
    whole = _encode(tokenizer, [anchor + text for text in texts])
    return [ids[len(start):] if ids[: len(start)] == start else None for ids in whole]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return encoded["input_ids"]


def _chunks(items: Iterable[T]) -> Iterable[list[T]]:
    rest = iter(items)
    while chunk := list(itertools.islice(rest, CHUNK)):
        yield chunk


def not_in_embedding(tokenizer: Tokenizer, token_id: int, vocab_size: int) -> BadCell:
    """What is wrong with a text that has such a token."""
    token = tokenizer.convert_ids_to_tokens(token_id)
    return BadCell(f"token {token!r} has id {token_id}, but the model's embedding has {vocab_size} rows (the tokenizer "
                   f"has {len(tokenizer)} tokens): resize the model's embedding, or name its own model.tokenizer")
