"""The text of each token of a rollout.

Takes:  a run: its tokenizer.json lies in model/, in its `model.path`, or where the hub's files are kept.
Gives:  `Texts.of`: a text for each token; `Texts.note`: why they are numbers instead.
Never:  asks the network; runs code of a model; needs transformers, which takes seconds to load.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from flux_ray.observability.page.runs import Run

FILE = "tokenizer.json"
HALF = "\ufffd"  # stands for bytes that are no whole letter
WORD_BEGIN = "▁"  # of SentencePiece, which leaves the space before a lone token out


class Texts:
    """Of one run's tokenizer."""

    def __init__(self, run: Run) -> None:
        self._tokenizer = None
        self.note = ""
        file = tokenizer_file(run)
        if file is None:
            self.note = f"tokens are shown by their numbers: {FILE} is neither in model/ nor in model.path"
            return
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # it raises Exception itself
            self.note = f"tokens are shown by their numbers: {file} can't be read: {error}"
        self._of_one = functools.cache(self._decoded)

    def of(self, token_ids: Sequence[int]) -> list[str]:
        """As long as `token_ids`. Where several tokens make one letter, the first has it and the others have nothing.
        """
        if self._tokenizer is None:
            return [f"{token} " for token in token_ids]
        texts = [self._of_one(token) for token in token_ids]
        at = 0
        while at < len(texts):
            end = at
            while end < len(texts) and HALF in texts[end]:
                end += 1
            if end - at > 1:
                whole = self._tokenizer.decode(list(token_ids[at:end]), skip_special_tokens=False)
                texts[at:end] = [whole, *[""] * (end - at - 1)]
            at = max(end, at + 1)
        return texts

    def _decoded(self, token: int) -> str:
        assert self._tokenizer is not None
        text: str = self._tokenizer.decode([token], skip_special_tokens=False)
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return f"[{token}]"
        return f" {text}" if piece.startswith(WORD_BEGIN) and not text.startswith(" ") else text


def tokenizer_file(run: Run) -> Path | None:
    """Where it lies on this machine."""
    if (run.path / "model" / FILE).is_file():
        return run.path / "model" / FILE
    named = run.options().get("model.path")
    if not isinstance(named, str) or not named:
        return None
    local = Path(named).expanduser() / FILE
    if local.is_file():
        return local
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        kept = try_to_load_from_cache(named, FILE)
    except HFValidationError:  # it is a path
        return None
    return Path(kept) if isinstance(kept, str) else None
