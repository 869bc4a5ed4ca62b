"""`flux-ray chat MODEL`: talk with a model in the terminal.

Takes:  a run's folder or any model, options; lines of the person's.
Gives:  answers, as they are sampled: by the template and at the temperature that the model was trained with.
Knows:  Ctrl-C ends an answer that is under way, and the chat where none is.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Sequence

import numpy as np

from flux_ray.config import PolicyGradientConfig
from flux_ray.data.chat import render, require_template
from flux_ray.data.order import stable_seed
from flux_ray.data.rows import BadCell
from flux_ray.data.tokens import encode_starts
from flux_ray.errors import UserError
from flux_ray.hugging_face import Tokenizer
from flux_ray.local_models import opened
from flux_ray.models_of_runs import parsed, sampling_config_for
from flux_ray.records import Message, SamplingRequest
from flux_ray.rollout.local import LocalEngine, local_config

USAGE = """\
flux-ray chat MODEL [OPTION=VALUE ...]

  flux-ray chat runs/mine
  flux-ray chat Qwen/Qwen3-0.6B rollout.temperature=0.7 rollout.max_tokens=512

MODEL is a run's folder, whose options hold here too (temperature, system prompt), or any model.

  /reset         forgets the conversation
  /system TEXT   begins anew under this system prompt; without TEXT under none
  /quit          ends, as Ctrl-D does. Ctrl-C ends an answer
"""
COMMANDS = "/reset, /system TEXT, /quit"
YOU = "> "  # before what the person writes


class Chat:
    """A conversation: what has been said, and what the model is to be asked next.

    Without a chat template each line is a prompt by itself, as plain text.
    """

    def __init__(self, config: PolicyGradientConfig, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer
        self.system = config.data.system_prompt
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self.messages: list[Message] = []
        self._asked = 0

    def reset(self, system: str | None = None) -> None:
        """Forget what was said, under this system prompt."""
        if system is not None:
            require_template(self._tokenizer, "a system prompt needs a chat")
        self.system, self.messages = system, []

    def request(self, text: str) -> SamplingRequest:
        """What the engine is asked after this line. UserError where the template refuses it, or it is too long."""
        rollout = self._config.rollout
        tokens = encode_starts(self._tokenizer, [(self._written(text), self.has_template)])[0]
        left = int(rollout.max_model_len or 0) - len(tokens)
        if left < 1:
            raise UserError(f"the conversation has {len(tokens)} tokens, and the context {rollout.max_model_len}: "
                            "/reset begins anew (rollout.max_model_len is the context)")
        self._asked += 1
        seed = stable_seed(self._config.seed, "chat", self._asked)
        return SamplingRequest(np.asarray(tokens, np.int32), 1, seed=seed, temperature=rollout.temperature,
                               max_tokens=min(rollout.max_tokens, left))

    def _written(self, text: str) -> str:
        if not self.has_template:
            return text
        system = [{"role": "system", "content": self.system}] if self.system else []
        said = [*system, *self.messages, {"role": "user", "content": text}]
        try:
            return render(self._tokenizer, said, self._config.data.chat_template_kwargs)
        except BadCell as error:
            raise UserError(str(error)) from error

    def answered(self, text: str, answer: str) -> None:
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


def command(arguments: Sequence[str]) -> None:
    """`flux-ray chat ...`."""
    if not arguments or {"-h", "--help"} & set(arguments):
        return print(USAGE, end="")
    model, *words = arguments
    if "=" in model or model.startswith("-"):
        raise UserError("flux-ray chat MODEL [OPTION=VALUE ...]: the model comes first")
    config = local_config(sampling_config_for(model, parsed(words)))
    print(f"loading {config.model.path} ...", flush=True)
    asyncio.run(_talk(config))


async def _talk(config: PolicyGradientConfig) -> None:
    async with opened(config) as (engine, tokenizer):
        chat = Chat(config, tokenizer)
        print(f"temperature {config.rollout.temperature:g}, at most {config.rollout.max_tokens} tokens an answer; "
              f"{COMMANDS}")
        if not chat.has_template:
            print("the model has no chat template: each line is a prompt by itself")
        while (line := _read()) is not None and await _obey(chat, engine, line.strip()):
            pass


async def _obey(chat: Chat, engine: LocalEngine, line: str) -> bool:
    """Do what a line says, or say why not. False: the chat ends."""
    try:
        return await _done(chat, engine, line)
    except UserError as error:
        print(f"flux-ray: {error}")
        return True


async def _done(chat: Chat, engine: LocalEngine, line: str) -> bool:
    word, _, rest = line.partition(" ")
    if word in ("/quit", "/exit"):
        return False
    if word == "/reset":
        chat.reset(chat.system)
    elif word == "/system":
        chat.reset(rest.strip() or None)
    elif word.startswith("/") and word[1:].isalpha():
        print(f"{word} is none of {COMMANDS}")
    elif line:
        answer = await _answer(engine, chat.request(line))
        if answer is not None:
            chat.answered(line, answer)
    return True


def _read() -> str | None:
    """A line of the person's; None at Ctrl-D or Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return input(YOU if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        print()
        return None
    finally:
        signal.signal(signal.SIGINT, before)


async def _answer(engine: LocalEngine, request: SamplingRequest) -> str | None:
    """Print the answer as it comes. None where Ctrl-C ended it: it is no part of the conversation."""
    pieces: list[str] = []

    async def show() -> None:
        async for piece in engine.stream(request):
            pieces.append(piece)
            print(piece, end="", flush=True)

    showing, loop = asyncio.ensure_future(show()), asyncio.get_running_loop()
    before = signal.getsignal(signal.SIGINT)
    loop.add_signal_handler(signal.SIGINT, showing.cancel)
    try:
        await showing
    except asyncio.CancelledError:
        if not showing.cancelled():   # this chat itself is to end
            raise
        print(" (ended; not kept)")
        return None
    finally:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, before)
    print(f" (cut at {request.max_tokens} tokens)" if engine.was_cut else "")
    return "".join(pieces)
