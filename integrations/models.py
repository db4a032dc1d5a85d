"""Builds a transformers model from a name, without weights: every tensor is on ``meta``.

A name is a local directory, a ``config.json``, a model type (its default config, offline) or a hub
id, of which only the config is fetched. The class is that of a training task, so that the model
computes a loss. Depends on transformers; planning itself does not need this file.
"""

import difflib
import inspect
import json
import logging
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import huggingface_hub.constants
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.models.auto import modeling_auto

from memfit.planner.errors import MemfitError

# The auto class of each task, in the order in which a config that names no class is given one:
# encoder-decoders first, and encoders that can also decode (bert) as encoders.
_AUTO_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "seq2seq-lm": "AutoModelForSeq2SeqLM",
        "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
        "masked-lm": "AutoModelForMaskedLM",
        "causal-lm": "AutoModelForCausalLM",
        "image-classification": "AutoModelForImageClassification",
        "audio-classification": "AutoModelForAudioClassification",
        "sequence-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
        "question-answering": "AutoModelForQuestionAnswering",
    }
)
# Model types and the class of each, by task: names only, no model code is imported for them.
_CLASS_NAMES: Mapping[str, Mapping[str, str | Sequence[str]]] = MappingProxyType(
    {
        "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "speech-seq2seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "audio-classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
        "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    }
)
TASKS = tuple(_AUTO_CLASSES)

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
)
_NAMES_OF_A_MODEL = "a directory, a config.json, a model type or a hub id"


class ModelError(MemfitError, ValueError):
    """A model cannot be built from what was named."""


def build_model(
    name: str,
    *,
    task: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    class_name: str | None = None,
) -> nn.Module:
    """The model called ``name`` on ``torch.device("meta")``, in training mode.

    ``task`` is one of :data:`TASKS`, by default :func:`default_task` of the config, in which
    ``class_name`` takes the place of ``config.architectures``; ``dtype`` that of the weights, by
    default the config's own, else float32. Raises :class:`ModelError`.
    """
    weights = _parse_dtype(dtype)
    with quiet_transformers():
        config = _load_config(name, trust_remote_code)
        if class_name is not None:
            config.architectures = [class_name]
        task = _check_task(task, config) if task is not None else default_task(config)
        _complete(config, task)
        auto_class = getattr(transformers, _AUTO_CLASSES[task])
        weights = weights or getattr(config, "dtype", None) or torch.float32
        try:
            with torch.device("meta"):
                model: nn.Module = auto_class.from_config(
                    config, dtype=weights, trust_remote_code=trust_remote_code
                )
        except Exception as error:  # whatever a model makes of a config that does not suit it
            raise ModelError(
                f"{name!r} cannot be built for {task}: {_first_line(error)}; check its config"
            ) from error
    return model.train()


def default_task(config: Any) -> str:
    """What a model with this config is trained for.

    That of ``config.architectures``, where it is one of :data:`TASKS`; else the first of them that
    the model type has, which makes encoders masked language models and encoder-decoders sequence
    to sequence models.
    """
    for architecture in getattr(config, "architectures", None) or ():
        for task, classes in _CLASS_NAMES.items():
            names = classes.get(config.model_type, ())
            if architecture in ((names,) if isinstance(names, str) else names):
                return task
    tasks = tasks_of(config)
    if not tasks:
        raise ModelError(
            f"model type {config.model_type!r} has no class for any of {', '.join(TASKS)}; build "
            "the model in Python and pass it to plan()"
        )
    if not getattr(config, "is_encoder_decoder", False):  # such as the decoder of bart alone
        tasks = [t for t in tasks if not t.endswith(("seq2seq-lm", "seq2seq"))] or tasks
    if getattr(config, "is_decoder", False) and "causal-lm" in tasks:
        return "causal-lm"
    return tasks[0]


def tasks_of(config: Any) -> list[str]:
    """The tasks for which the model type of ``config`` has a class."""
    remote = getattr(config, "auto_map", None) or {}
    return [
        task
        for task in TASKS
        if config.model_type in _CLASS_NAMES[task] or _AUTO_CLASSES[task] in remote
    ]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Holds back what transformers logs below errors, which would puzzle on a command line."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


# -- configs -------------------------------------------------------------------------------------


def _load_config(name: str, trust_remote_code: bool) -> Any:
    path = Path(name)
    if path.is_file():
        return _read_config(path, trust_remote_code)
    if (path / "config.json").is_file():
        return _read_config(path / "config.json", trust_remote_code)
    if name in CONFIG_MAPPING:
        return _default_config(name)
    if path.is_dir():
        raise ModelError(f"there is no config.json in the directory {name!r}")
    return _fetch_config(name, trust_remote_code)


def _default_config(model_type: str) -> Any:
    try:
        return CONFIG_MAPPING[model_type]()
    except Exception as error:  # a few types have no default that passes their own checks
        raise ModelError(
            f"model type {model_type!r} has no valid default config: {_first_line(error)}; pass "
            "the config.json of a model of that type"
        ) from error


def _read_config(path: Path, trust_remote_code: bool) -> Any:
    values = _read_json(path)
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(
            f"{path} has no model_type, so it does not say which model it describes; add one, such "
            'as "model_type": "llama"'
        )
    remote = trust_remote_code and "auto_map" in values
    if not remote and model_type not in CONFIG_MAPPING:
        hint = "; its auto_map needs trust_remote_code" if "auto_map" in values else ""
        raise ModelError(
            f"{path} has the model_type {model_type!r}, unknown to transformers "
            f"{transformers.__version__}; the nearest are {_nearest(model_type)}{hint}"
        )
    try:
        # The directory, where the file has its usual name: remote code lies beside it.
        source = path.parent if path.name == "config.json" else path
        return AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
    except Exception as error:  # each config class checks its values in its own way
        raise ModelError(
            f"{path} is not a valid config of model type {model_type!r}: {_first_line(error)}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} cannot be read: {_first_line(error)}") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} holds {type(values).__name__}, not the object that a config is")
    return values


def _fetch_config(name: str, trust_remote_code: bool) -> Any:
    """The config behind a hub id. Only ``config.json`` is fetched, never weights."""
    try:
        return AutoConfig.from_pretrained(
            name, trust_remote_code=trust_remote_code, local_files_only=_hub_is_out_of_reach()
        )
    except Exception as error:
        # The hub's client raises errors of many kinds; all mean that there is no config.
        raise ModelError(
            f"{name!r} is no model that memfit can find: it names {_NAMES_OF_A_MODEL}; the nearest "
            f"model types are {_nearest(name)} ({_reason(error)})"
        ) from error


def _hub_is_out_of_reach() -> bool:
    """Asked first, since the hub's client retries for half a minute before it gives up."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    host = urllib.parse.urlparse(huggingface_hub.constants.ENDPOINT).hostname
    if host is None or urllib.request.getproxies():  # a proxy resolves names itself
        return False
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return True
    return False


def _reason(error: Exception) -> str:
    if _hub_is_out_of_reach():
        return "the hub is out of reach, and the id is not in the local cache"
    return _first_line(error)


# -- arguments -----------------------------------------------------------------------------------


def _check_task(task: str, config: Any) -> str:
    if task not in _AUTO_CLASSES:
        raise ModelError(f"{task!r} is not a task; use one of {', '.join(TASKS)}")
    supported = tasks_of(config)
    if task not in supported:
        raise ModelError(
            f"model type {config.model_type!r} has no class for {task}; it has one for "
            f"{', '.join(supported) or 'none of the tasks that memfit knows'}"
        )
    return task


def _complete(config: Any, task: str) -> None:
    """Gives a config what default ones lack and building or training asks for.

    Types with several classes for a task (deit) are looked up by the class. Encoder-decoders make
    their decoder's input with two tokens: the default configs of T5 and others lack the one
    that starts a sequence, while their checkpoints have it. Which ones they are costs nothing.
    """
    names = _CLASS_NAMES[task].get(config.model_type, "")
    if not isinstance(names, str) and not getattr(config, "architectures", None):
        config.architectures = [names[0]]
    if getattr(config, "is_encoder_decoder", False):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = config.pad_token_id


def _parse_dtype(dtype: str | None) -> torch.dtype | None:
    if dtype is None:
        return None
    if dtype not in _DTYPES:
        raise ModelError(f"{dtype!r} is not a dtype of weights; use one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _nearest(name: str) -> str:
    """The three model types spelled most like the last part of a name."""
    known = sorted(CONFIG_MAPPING.keys())
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return ", ".join(difflib.get_close_matches(last, known, n=3, cutoff=0.0))


def _first_line(error: Exception) -> str:
    """One line of an error; validation errors of configs put the cause on the second one."""
    lines = inspect.cleandoc(str(error)).splitlines() or [type(error).__name__]
    head = lines[0].strip()
    if head.endswith(":") and len(lines) > 1:
        head = f"{head} {lines[1].strip()}"
    return head
