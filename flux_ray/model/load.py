"""Opening a policy, a score model or a tokenizer, or one readable line why not.

Takes:  a local folder or a hub name, a type, a layout.
Gives:  PolicyModel or ScoreModel in that type with dropout off; its tokenizer.
Knows:  what must be true of a model before its log-probs can be trusted: every weight loaded, an attention that heeds
        all that the model asks of it, a head whose form is known.
Never:  runs code that came with a model, or asks the network for what looks like a local path.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from flux_ray.errors import UserError, unknown
from flux_ray.hugging_face import Tokenizer
from flux_ray.model import norm, varlen
from flux_ray.model.attention import CAUSAL_BLOCKS
from flux_ray.model.finite import not_finite
from flux_ray.model.packed import LAYOUTS
from flux_ray.model.policy import PolicyModel
from flux_ray.model.score import HEAD, ScoreModel
from flux_ray.model.traits import EAGER, Traits, traits_of

T = TypeVar("T")

NUM_TRIAL_TOKENS = 8  # enough that a token which sees too much shows, too few to cost anything
#: Attention that keeps the sequences of one row apart by their borders: torch's, or that of a package of its own.
VARLEN_KERNELS = (varlen.TORCH_VARLEN, "flash_attention_2", "flash_attention_3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Loading(TypedDict):
    """How `load_policy` and `load_score` open a model that is only read."""

    dtype: torch.dtype
    attention: NotRequired[str]
    layout: NotRequired[str]


class PolicyLoading(Loading):
    chunk_tokens: int


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """The type called `name`; auto is bfloat16 on GPUs and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if name not in DTYPES:
        raise unknown("dtype", name, [*DTYPES, "auto"])
    return DTYPES[name]


def slow_dtype(name: str, device: str) -> str | None:
    """What to say of a type that this machine's processor has no instructions for; None where there is nothing."""
    has_none = platform.machine() == "x86_64" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    if device != "cpu" or resolve_dtype(name, device) != torch.bfloat16 or not has_none:
        return None
    return ("model.dtype=bfloat16 on a processor without AVX-512 or AMX: every product is emulated, and takes tens of "
            "times as long as with model.dtype=float32")


def resolve_layout(layout: str, attention: str, dtype: torch.dtype) -> tuple[str, str]:
    """(layout, transformers' attention implementation) for what config says; UserError where the two don't fit."""
    missing = varlen.why_not(dtype)
    if layout == "auto":
        layout = "varlen" if missing is None and attention in ("auto", *VARLEN_KERNELS) else "padded"
    if layout not in LAYOUTS:
        raise unknown("model.layout", layout, [*LAYOUTS, "auto"])
    if attention == "auto":
        padded = "sdpa" if torch.cuda.is_available() else CAUSAL_BLOCKS
        attention = varlen.TORCH_VARLEN if layout == "varlen" else padded
    if layout == "varlen" and (missing is not None or attention not in VARLEN_KERNELS):
        raise UserError(f"model.layout=varlen needs an NVIDIA GPU from Ampere on, model.dtype=bfloat16 and "
                        f"model.attention={' or '.join(VARLEN_KERNELS)}, got model.attention={attention}"
                        f"{f' and {missing}' if missing else ''}")
    if layout != "varlen" and attention == varlen.TORCH_VARLEN:
        raise UserError(f"model.attention={attention} is for model.layout=varlen, got model.layout={layout}")
    return layout, attention


def load_policy(
    path: str | Path, *, dtype: torch.dtype, attention: str = "auto", layout: str = "auto", chunk_tokens: int,
    gradient_checkpointing: bool = False,
) -> PolicyModel:
    """Load a causal language model. UserError (one line) for a path, a model or a setting that can't be used."""
    resolve_layout(layout, attention, dtype)  # what can't be is refused before the model is opened
    traits = policy_traits(path, attention)
    config = _open("model", path, transformers.AutoConfig.from_pretrained)
    _turn_off_dropout(config)
    hf, info = _open("model", path, transformers.AutoModelForCausalLM.from_pretrained, config=config, dtype=dtype,
                     attn_implementation=EAGER, output_loading_info=True)
    if info["missing_keys"]:
        raise UserError(f"model {str(path)!r} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}")
    _check_finite(hf, path)
    layout, attention = _layout_for(hf, traits, layout, attention)
    _ready_to_train(hf, traits, attention, gradient_checkpointing)
    policy = PolicyModel(hf, layout=layout, chunk_tokens=chunk_tokens, head=traits.head)
    policy.parts = traits.parts
    policy.original_config = _open("model", path, transformers.AutoConfig.from_pretrained)
    policy.original_config.dtype = dtype
    return policy


def load_score(
    path: str | Path, *, dtype: torch.dtype, attention: str = "auto", layout: str = "auto",
    gradient_checkpointing: bool = False, new_head: bool = True,
) -> ScoreModel:
    """Load a sequence classification model with one label, or (new_head) the body of any causal language model.

    A new head is all zeros: it gives 0 everywhere, and the same on every rank. UserError (one line) for what can't be
    used.
    """
    resolve_layout(layout, attention, dtype)
    scores = not new_head or has_score_head(path)
    if scores:
        check_score_model(path)
    traits = score_traits(path, attention)
    config = _open("model", path, transformers.AutoConfig.from_pretrained, num_labels=1)
    _turn_off_dropout(config)
    hf, info = _open("model", path, transformers.AutoModelForSequenceClassification.from_pretrained, config=config,
                     dtype=dtype, attn_implementation=EAGER, output_loading_info=True)
    missing = {name for name in info["missing_keys"] if scores or not name.startswith(f"{HEAD}.")}
    if missing:
        raise UserError(f"model {str(path)!r} lacks weights: {', '.join(sorted(missing)[:3])}")
    _check_causal(hf, path)
    if not scores:
        getattr(hf, HEAD).weight.data.zero_()
    _check_finite(hf, path)
    layout, attention = _layout_for(hf, traits, layout, attention)
    _ready_to_train(hf, traits, attention, gradient_checkpointing)
    model = ScoreModel(hf, layout=layout, has_new_head=not scores)
    model.parts = traits.parts
    original = _open("model", path, transformers.AutoConfig.from_pretrained, num_labels=1)
    original.architectures, original.dtype = [type(hf).__name__], dtype
    model.original_config = original
    return model


def has_score_head(path: str | Path) -> bool:
    """Whether the model is one for sequence classification, from its config alone."""
    config = _open("model", path, transformers.AutoConfig.from_pretrained)
    return any("ForSequenceClassification" in name for name in config.architectures or [])


def check_score_model(path: str | Path) -> None:
    """UserError unless the model is a sequence classification model with one label, as its config has it."""
    config = _open("model", path, transformers.AutoConfig.from_pretrained)
    if not has_score_head(path):
        raise UserError(f"model {str(path)!r} is no sequence classification model (architectures: "
                        f"{', '.join(config.architectures or ['none named'])})")
    if config.num_labels != 1:
        raise UserError(f"model {str(path)!r} has {config.num_labels} labels: a score is one number")


def _check_finite(hf: PreTrainedModel, path: str | Path) -> None:
    """UserError for a weight that came as nan or infinity."""
    names, weights = zip(*hf.named_parameters(), strict=True)
    wrong = not_finite(weights)
    if wrong:
        raise UserError(f"model {str(path)!r}: its weight {names[wrong[0]]} has values that are not finite")


def _ready_to_train(hf: PreTrainedModel, traits: Traits, attention: str, gradient_checkpointing: bool) -> None:
    try:
        if not traits.own_attention:
            hf.set_attn_implementation(attention)
    except (ValueError, ImportError, KeyError) as error:
        raise UserError(f"model.attention={attention} can't be used here: {str(error).splitlines()[0]}") from error
    if not torch.cuda.is_available():
        norm.put_in_place(hf)
    if gradient_checkpointing:
        # The re-entrant form: the other one compares shapes of saved tensors, which ZeRO-3 changes underneath it.
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        hf.enable_input_require_grads()


def skeleton(
    path: str | Path, auto_class: Any = transformers.AutoModelForCausalLM, **config: object
) -> PreTrainedModel:
    """The modules of the causal language model at `path`, made from its config alone: no weight takes memory.

    UserError where transformers has no model of that class, such as a scoring one of some mixtures of experts.
    """
    opened = _open("model", path, transformers.AutoConfig.from_pretrained, **config)
    if type(opened) not in auto_class._model_mapping:  # transformers' own message lists all that it has
        raise UserError(f"model {str(path)!r}: transformers has no {auto_class.__name__.removeprefix('AutoModelFor')} "
                        f"model of type {opened.model_type!r}")
    opened.dtype = None  # some layers refuse to run in another type than a checkpoint's, even without numbers
    with torch.device("meta"):
        return _open("model", path, lambda _, **more: auto_class.from_config(
            opened, dtype=torch.bfloat16, attn_implementation=EAGER, **more))


def policy_traits(path: str | Path, attention: str = "auto") -> Traits:
    """What the causal language model at `path` computes. UserError where we, or this attention, can't do as it does."""
    with _quiet():
        return _heeded(traits_of(skeleton(path), f"model {str(path)!r}"), path, attention)


def score_traits(path: str | Path, attention: str = "auto") -> Traits:
    """As `policy_traits`, of the model at `path` with a head that scores."""
    with _quiet():
        model = skeleton(path, transformers.AutoModelForSequenceClassification, num_labels=1)
        head = getattr(model, HEAD, None)
        if head is None or type(head) is not nn.Linear or head.bias is not None:
            raise UserError(f"model {str(path)!r} ({model.config.model_type}): its scores don't come from one linear "
                            f"layer {HEAD!r} without a bias over the hidden states: such models are not supported")
        return _heeded(traits_of(model, f"model {str(path)!r}"), path, attention)


@contextmanager
def _quiet() -> Iterator[None]:
    """While it lasts transformers logs errors alone: what a skeleton can't do, or not fast, says nothing of a run."""
    before = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(before)


def _heeded(traits: Traits, path: str | Path, attention: str) -> Traits:
    """The same. UserError where `attention` was chosen and isn't the model's to have."""
    unheeded = traits.unheeded(attention)
    if attention != "auto" and traits.own_attention:
        raise UserError(f"model.attention={attention}: model {str(path)!r} lets nobody choose its attention: leave "
                        "model.attention at auto")
    if attention != "auto" and unheeded:
        raise UserError(f"model.attention={attention}: model {str(path)!r} has {' and '.join(unheeded)}, which this "
                        f"attention passes over: leave model.attention at auto, or set it to {EAGER}")
    return traits


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer beside a model. UserError (one line) where there is none."""
    return _open("tokenizer", path, transformers.AutoTokenizer.from_pretrained)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or (os.sep != "/" and os.sep in path)


def _open(what: str, path: str | Path, opener: Callable[..., T], **options: object) -> T:
    """`opener(path)`, its many ways to fail turned into one line; a path never becomes a question to the hub."""
    name = os.path.expanduser(str(path))
    folder = Path(name)
    if _looks_local(str(path)) and not folder.is_dir():
        raise UserError(f"{what} {str(path)!r}: no such folder")
    if folder.is_dir() and what == "model" and not (folder / "config.json").is_file():
        raise UserError(f"{what} {str(path)!r}: {_adapter(folder) or 'the folder has no config.json'}")
    hf_logging.disable_progress_bar()
    try:
        return opener(name, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "" if folder.is_dir() else ": neither a local folder nor a hub name that can be read from here"
        raise UserError(f"{what} {str(path)!r}{where}: {reason}") from error


def _adapter(folder: Path) -> str | None:
    """What to do with a folder that holds an adapter (LoRA) and no model; None for any other."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    return (f"the folder holds an adapter of {base!r}, not a model: merge the two first, "
            f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r}).merge_and_unload().save_pretrained(FOLDER) "
            "with peft, copy the tokenizer's files there, and name that FOLDER")


def _turn_off_dropout(config: PretrainedConfig) -> None:
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def _check_causal(hf: PreTrainedModel, path: str | Path) -> None:
    """UserError for a model in which a token sees those after it."""
    ids = torch.arange(NUM_TRIAL_TOKENS)[None] % hf.config.get_text_config().vocab_size
    half = NUM_TRIAL_TOKENS // 2
    hf.eval()
    with torch.no_grad():
        whole, part = (hf.base_model(input_ids=i, use_cache=False)[0].float() for i in (ids, ids[:, :half]))
    tolerance = 1e-4 if hf.dtype == torch.float32 else 3e-2  # relative to the largest hidden number
    if (whole[:, :half] - part).abs().max() > tolerance * part.abs().max():
        raise UserError(f"model {str(path)!r} ({hf.config.model_type}): its tokens see those after them: only causal "
                        "models are supported")


def _layout_for(hf: PreTrainedModel, traits: Traits, layout: str, attention: str) -> tuple[str, str]:
    """As resolve_layout, with an attention that heeds all that the model asks; where sequences in one row would see one
    another, or the model asks for what the kernels can't do, auto is padded, and a choice a UserError.
    """
    resolved = resolve_layout(layout, attention, hf.dtype)
    if resolved[0] != "varlen":
        resolved = resolved[0], EAGER if traits.unheeded(resolved[1]) else resolved[1]
    unable = None if resolved[0] == "padded" else _why_not_in_one_row(hf, traits, resolved[1])
    if unable is None:
        return resolved
    if layout != "auto" or attention == varlen.TORCH_VARLEN:
        chosen = f"model.layout={layout}" if layout != "auto" else f"model.attention={attention}"
        raise UserError(f"{chosen}: {hf.config.model_type} has {unable}: leave model.layout and model.attention at "
                        "auto")
    warnings.warn(f"{hf.config.model_type} has {unable}: its micro-batches are padded rows", stacklevel=2)
    return _layout_for(hf, traits, "padded", attention)


def _why_not_in_one_row(hf: PreTrainedModel, traits: Traits, attention: str) -> str | None:
    """What the model has that keeps its sequences from being in one row; None where they stay apart there.

    Tried on a few tokens: a hybrid model's convolutions and recurrences carry their state over the border, whatever
    attention does; others give attention more than torch's kernels take. Twice the same sequence must give the same
    hidden states: the first has nothing before it.
    """
    config, unheeded = hf.config.get_text_config(), traits.unheeded(attention)
    if unheeded:
        return " and ".join(unheeded)
    if attention == varlen.TORCH_VARLEN and getattr(config, varlen.CHUNKED, None):
        return "attention in chunks"
    num_tokens = NUM_TRIAL_TOKENS // 2
    positions = torch.arange(num_tokens).repeat(2)[None]
    was_training, before = hf.training, hf.config._attn_implementation
    hf.eval()
    try:
        borders = {}
        if attention == varlen.TORCH_VARLEN:  # the others can't run on a CPU
            hf.set_attn_implementation(attention)
            borders = varlen.borders_of(torch.tensor([num_tokens] * 2), positions.device)
        with torch.no_grad():
            both = hf.base_model(input_ids=positions % config.vocab_size, position_ids=positions, use_cache=False,
                                 **borders)[0][0].float()
    except Exception as error:  # in whatever way it says that it can't: the reason is told
        return f"{error}".partition("\n")[0] or type(error).__name__
    finally:
        hf.set_attn_implementation(before)
        hf.train(was_training)
    first, second = both.split(num_tokens)
    tolerance = 1e-5 if hf.dtype == torch.float32 else 1e-2  # relative to the norm of a token's hidden state
    if bool(((second - first).norm(dim=-1) <= tolerance * first.norm(dim=-1)).all()):
        return None
    return "layers that carry their state from one sequence of a row into the next"


#: How configs call the length of their context; the first that is there counts.
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "seq_len")
#: A kind of rotary positions whose config names the length before it is multiplied by its factor.
STRETCHED = "linear"
#: Kinds that beyond a length turn all positions of a text otherwise: by the longest text of the batch in transformers,
#: by the longest that may ever come in vLLM. They agree up to that length alone. ► where configs name it.
BY_LENGTH = {"longrope": "original_max_position_embeddings", "dynamic": "max_position_embeddings"}


def context_length(path: str | Path) -> int:
    """The model's context in tokens, from its config alone. UserError (one line) where there is no model."""
    length = longest_context(path)
    if length is None:
        raise UserError(f"model {str(path)!r}: its config names no length of its context ({LENGTHS[0]}): set "
                        "rollout.max_model_len")
    return length


def longest_context(path: str | Path) -> int | None:
    """As `context_length`; None where the config names none."""
    config = _open("model", path, transformers.AutoConfig.from_pretrained).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kind, length = rope.get("rope_type"), next(filter(None, (getattr(config, name, None) for name in LENGTHS)), None)
    if length is None:
        return None
    if kind in BY_LENGTH:
        return int(rope.get(BY_LENGTH[kind]) or getattr(config, BY_LENGTH[kind], length))
    return int(length * (rope.get("factor") or 1 if kind == STRETCHED else 1))


def turns(path: str | Path) -> list[int]:
    """Positions from which on the model at `path` computes otherwise than before: its windows, its rotary stretches."""
    config = _open("model", path, transformers.AutoConfig.from_pretrained).get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    several = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    found = [getattr(config, name, None) for name in ("sliding_window", varlen.CHUNKED)]
    found += [one.get("original_max_position_embeddings") for one in several]
    return sorted({int(turn) for turn in found if turn})
