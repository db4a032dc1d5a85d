"""Lists the trainable model classes of transformers by name, without importing any model code.

The auto mappings tell which classes there are and what each is for. Depends on transformers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers.models.auto import modeling_auto
from transformers.utils.import_utils import is_scipy_available

# Tasks, as the auto mappings name them, in the order in which a model type is given one: those
# whose forward computes a loss first, the bare model last. Mappings not named here come between.
_FIRST = (
    "FOR_SEQ_TO_SEQ_CAUSAL_LM",
    "FOR_SPEECH_SEQ_2_SEQ",
    "FOR_MASKED_LM",
    "FOR_IMAGE_TEXT_TO_TEXT",
    "FOR_MULTIMODAL_LM",
    "FOR_TEXT_TO_WAVEFORM",
    "FOR_CAUSAL_LM",
    "FOR_RNNT",
    "FOR_TDT",
    "FOR_CTC",
    "FOR_OBJECT_DETECTION",
    "FOR_ZERO_SHOT_OBJECT_DETECTION",
    "FOR_UNIVERSAL_SEGMENTATION",
    "FOR_INSTANCE_SEGMENTATION",
    "FOR_SEMANTIC_SEGMENTATION",
    "FOR_IMAGE_CLASSIFICATION",
    "FOR_VIDEO_CLASSIFICATION",
    "FOR_AUDIO_CLASSIFICATION",
    "FOR_TIME_SERIES_PREDICTION",
    "FOR_PRETRAINING",
    "FOR_SEQUENCE_CLASSIFICATION",
    "FOR_TOKEN_CLASSIFICATION",
    "FOR_DEPTH_ESTIMATION",
    "FOR_ZERO_SHOT_IMAGE_CLASSIFICATION",
)
_LAST = (
    "FOR_QUESTION_ANSWERING",
    "FOR_MASK_GENERATION",
    "FOR_TEXT_ENCODING",
    "FOR_IMAGE",
    "FOR_BACKBONE",
    "",
)
# Those whose models match what they find with scipy, and cannot be made without it.
_MATCHED = ("FOR_UNIVERSAL_SEGMENTATION", "FOR_INSTANCE_SEGMENTATION")
_PREFIX, _SUFFIX = "MODEL_", "MAPPING_NAMES"


@dataclass(frozen=True, slots=True)
class ModelClass:
    """One class of transformers, and the model type whose config it is built from."""

    model_type: str
    class_name: str


def trainable_classes(every: bool = False) -> tuple[ModelClass, ...]:
    """One class for each model type, one that computes a loss if there is any; or all of them."""
    found: dict[str, list[str]] = {}
    for model_type, class_name in _entries():
        names = found.setdefault(model_type, [])
        if class_name not in names:
            names.append(class_name)
    return tuple(
        ModelClass(model_type, class_name)
        for model_type, names in sorted(found.items())
        for class_name in (names if every else names[:1])
    )


def _entries() -> Iterator[tuple[str, str]]:
    """Model types and class names, the preferred classes first."""
    for task in _tasks():
        mapping = getattr(modeling_auto, f"{_PREFIX}{task}{'_' if task else ''}{_SUFFIX}")
        for model_type, names in mapping.items():
            for name in (names,) if isinstance(names, str) else names:
                yield model_type, name


def _tasks() -> list[str]:
    names = [n for n in dir(modeling_auto) if n.startswith(_PREFIX) and n.endswith(_SUFFIX)]
    tasks = [n.removeprefix(_PREFIX).removesuffix(_SUFFIX).rstrip("_") for n in names]
    between = sorted(t for t in tasks if t not in _FIRST and t not in _LAST)
    first = [t for t in _FIRST if t not in _MATCHED or is_scipy_available()]
    order = dict.fromkeys((*first, *between, *_LAST, *_MATCHED))
    return [t for t in order if t in tasks]
