"""Fathom: every DeepSeek generation as one readable Hugging Face model.

`import fathom` costs nothing; the first name that is used from it imports the model and with it torch, and
registers Fathom with transformers' Auto classes:

    >>> from fathom import FathomConfig, FathomForCausalLM
    >>> model = FathomForCausalLM(FathomConfig.preset("v3", size="nano"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .modeling.configuration_fathom import FathomConfig
    from .modeling.modeling_fathom import (
        FathomForCausalLM,
        FathomForSequenceClassification,
        FathomForTokenClassification,
        FathomModel,
        register_deepseek,
    )
    from .training.trainer import FathomTrainer, RouterBiasCallback

__version__ = "0.1.0"

_EXPORTS = {
    "FathomConfig": ".modeling.configuration_fathom",
    "FathomModel": ".modeling.modeling_fathom",
    "FathomForCausalLM": ".modeling.modeling_fathom",
    "FathomForSequenceClassification": ".modeling.modeling_fathom",
    "FathomForTokenClassification": ".modeling.modeling_fathom",
    "register_deepseek": ".modeling.modeling_fathom",
    "FathomTrainer": ".training.trainer",
    "RouterBiasCallback": ".training.trainer",
}

__all__ = [
    "FathomConfig",
    "FathomForCausalLM",
    "FathomForSequenceClassification",
    "FathomForTokenClassification",
    "FathomModel",
    "FathomTrainer",
    "RouterBiasCallback",
    "__version__",
    "register_deepseek",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
