"""Texts to learn from, in pieces: those that are read, and those that are learned.

Takes:  prompts and completions, or chats; a tokenizer.
Gives:  Example; `as_example`, `turns`; `encode_examples`: their Samples, one after another.
Knows:  where a rollout of the model would end: a learned piece ends there too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from flux_ray.config import DataConfig
from flux_ray.data.chat import ASSISTANT, check_template_kwargs, render, require_template
from flux_ray.data.encode import Text
from flux_ray.data.rows import BadCell
from flux_ray.data.tokens import CHUNK, encode_continuations, encode_starts, not_in_embedding
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.model.stops import stop_token_ids
from flux_ray.records import Message, Sample


@dataclass(frozen=True)
class Example:
    """A text in pieces, each with whether it is learned. The first is what the sequence begins with."""

    pieces: tuple[tuple[str, bool], ...]
    is_chat: bool = False  # the template has written the special tokens; what follows an end token is no response

    @classmethod
    def of_text(cls, text: str) -> Example:
        """A plain text, learned from its first token on."""
        return cls(((text, True),))


@dataclass(frozen=True)
class Limits:
    """What a sample may be."""

    context_length: int  # tokens
    vocab_size: int | None  # rows of the model's embedding; none: not known

    def check(self, samples: Iterable[Sample], tokenizer: Tokenizer) -> None:
        """BadCell for a sample that is too long, or has a token that the model hasn't."""
        for sample in samples:
            if sample.num_tokens > self.context_length:
                raise BadCell(f"{sample.num_tokens} tokens, more than the context of {self.context_length}")
            largest = int(sample.token_ids.max())
            if self.vocab_size is not None and largest >= self.vocab_size:
                raise not_in_embedding(tokenizer, largest, self.vocab_size)


def check_examples(tokenizer: Tokenizer, data: DataConfig) -> None:
    """UserError for a tokenizer that has no end token, or a template that doesn't know what it is given."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {tokenizer.name_or_path!r} has no end token, with which a response ends: set "
                        "eos_token in its tokenizer_config.json, or name another (model.tokenizer)")
    check_template_kwargs(tokenizer, data.chat_template_kwargs)


def as_example(prompt: Text, completion: str, tokenizer: Tokenizer, kwargs: dict[str, object]) -> Example:
    """The prompt, which is read, and the completion, which is learned. BadCell: the chat template refuses them."""
    if isinstance(prompt, str):
        return Example(((prompt, False), (completion, True)))
    reply = {"role": ASSISTANT, "content": completion}
    before, after = _answered(prompt, reply, tokenizer, kwargs)
    return Example(((before, False), (after[len(before):], True)), is_chat=True)


def turns(messages: list[Message], tokenizer: Tokenizer, kwargs: dict[str, object], *, every: bool) -> list[Example]:
    """What a chat teaches: its last turn, the assistant's, or every one of the assistant's.

    One example holds them all where the template writes a turn in the same way whatever follows it. Else each has an
    example of its own, after the earlier turns as the policy would be given them. BadCell: there is no such turn.
    """
    learned = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT and i]
    if not every:
        if messages[-1]["role"] != ASSISTANT or len(messages) < 2:
            raise BadCell("the last of at least two messages must be the assistant's")
        learned = learned[-1:]
    if not learned:
        raise BadCell("no message of the assistant's after another's")
    written = [_answered(messages[:i], messages[i], tokenizer, kwargs) for i in learned]
    apart = [Example(((before, False), (after[len(before):], True)), is_chat=True) for before, after in written]
    pieces, text = [], ""
    for before, after in written:
        if not before.startswith(text):
            return apart
        pieces += [(before[len(text):], False), (after[len(before):], True)]
        text = after
    return [Example(tuple(pieces), is_chat=True)]


def _answered(
    prompt: list[Message], reply: Message, tokenizer: Tokenizer, kwargs: dict[str, object]
) -> tuple[str, str]:
    """A chat's text before the reply, and with it."""
    require_template(tokenizer, "the data are chats")
    check_template_kwargs(tokenizer, kwargs)
    before = render(tokenizer, prompt, kwargs)
    after = render(tokenizer, [*prompt, reply], kwargs, whole=True)
    if not after.startswith(before):
        raise BadCell("the chat template writes the prompt in another way once it is answered: use plain text columns")
    return before, after


def encode_examples(tokenizer: Tokenizer, examples: Iterable[Example], *, model_path: str | None) -> Iterator[Sample]:
    """Samples of the examples, in their order: each piece encoded by itself, as in a rollout, then the end token.

    A learned turn of a chat ends where a rollout of this model does: at the first token that ends a response.
    """
    end = tokenizer.eos_token_id
    assert end is not None, "as check_examples says"
    stops = np.array(stop_token_ids(model_path, tokenizer), np.int32)
    rest = iter(examples)
    while chunk := list(itertools.islice(rest, CHUNK)):
        starts = encode_starts(tokenizer, ((one.pieces[0][0], one.is_chat) for one in chunk))
        later = iter(encode_continuations(tokenizer, [text for one in chunk for text, _ in one.pieces[1:]]))
        for one, start in zip(chunk, starts, strict=True):
            yield _sample(one, [start, *(next(later) for _ in one.pieces[1:])], stops, end)


def _sample(example: Example, pieces: list[np.ndarray], stops: np.ndarray, end: int) -> Sample:
    ids, masks = [], []
    last, is_open = len(pieces) - 1, False
    for place, (piece, (_, learned)) in enumerate(zip(pieces, example.pieces, strict=True)):
        # A template may end a turn by what opens the next one (GLM's <|user|>): a rollout samples that token.
        num_learned = len(piece) if learned else int(is_open and bool(np.isin(piece[:1], stops).any()))
        ends = np.flatnonzero(np.isin(piece, stops)) if learned and example.is_chat else np.zeros(0, np.int64)
        if len(ends):
            num_learned = int(ends[0]) + 1
            piece = piece[:num_learned] if place == last else piece
        elif learned and place == last and not (len(piece) and piece[-1] == end):
            piece = np.append(piece, np.int32(end))
            num_learned += 1
        is_open = learned and example.is_chat and not len(ends)
        ids.append(piece)
        masks.append(np.arange(len(piece)) < num_learned)
    token_ids = np.concatenate(ids).astype(np.int32)
    loss_mask = np.concatenate(masks)
    loss_mask[:1] = False   # nothing comes before the first token
    return Sample(token_ids, loss_mask, np.zeros(len(token_ids), np.float32))
