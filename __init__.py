"""Fathom: every DeepSeek generation as one readable Hugging Face model.

`import fathom` imports neither torch nor transformers; the first name that is used from it imports the model, and with
it both. After `import fathom`, before or after transformers, transformers' Auto classes read Fathom's folders:

    >>> from fathom import FathomConfig, FathomForCausalLM
    >>> model = FathomForCausalLM(FathomConfig.preset("v3", size="nano"))
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
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

# FathomConfig comes from there, too: that module registers the model classes of the config with the Auto classes.
_EXPORTS = {
    "FathomConfig": ".modeling.modeling_fathom",
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


# transformers names the classes of a `model_type` in tables, and imports them from `transformers.models.{model_type}`
# once they are asked for. Here that module is this package, whose classes are lazy as well.
_MODEL_TYPE = "fathom"
_TABLES = {
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING_NAMES": "FathomConfig"},
    "transformers.models.auto.modeling_auto": {
        "MODEL_MAPPING_NAMES": "FathomModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "FathomForCausalLM",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "FathomForSequenceClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "FathomForTokenClassification",
    },
}


def _enter(module: ModuleType) -> None:
    """Enters Fathom's classes in the tables of a module of transformers."""
    for table, name in _TABLES[module.__name__].items():
        getattr(module, table)[_MODEL_TYPE] = name


class _AfterTables:
    """A finder on `sys.meta_path` that leaves the finding to the others, and enters Fathom in the tables they find."""

    searching = False  # another finder may ask all finders as well

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in _TABLES or cls.searching:
            return None
        cls.searching = True
        try:
            spec = find_spec(name)
        finally:
            cls.searching = False
        if spec is not None and spec.loader is not None:
            # On this one loader object: inspect, linecache and the like see the loader that they know.
            spec.loader.exec_module = partial(_execute_and_enter, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec


def _execute_and_enter(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    execute(module)
    _enter(module)


def _register() -> None:
    """Makes transformers' Auto classes know Fathom, without importing transformers."""
    sys.modules.setdefault(f"transformers.models.{_MODEL_TYPE}", sys.modules[__name__])
    for name in _TABLES:
        if name in sys.modules:
            _enter(import_module(name))  # waits where another thread is still importing it
    sys.meta_path.insert(0, _AfterTables)  # type: ignore[arg-type]


_register()
