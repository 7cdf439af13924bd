"""Names that changed after version 0.1. The old names work in 0.2, with a DeprecationWarning.

These are names of modules, names in modules, settings of a configuration, and keys of JSON files.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

PACKAGE = "bitmixer_jax"
Function = TypeVar("Function", bound=Callable[..., Any])

# Old and new names of modules, without the name of the package.
MODULES = {
    "archives": "zip_files",
    "bits": "policy",
    "inputs": "loaded_model",
    "json_files": "files",
    "devices": "distributed",
    "runnable": "loaded_model",
    "export.assembly": "export.packed_reader",
    "export.deployed": "export.integer_model",
    "export.integer": "export.integer_engine",
    "export.predict": "predict",
    "export.workdir": "old_verbs",
    "runs": "old_verbs",
    "search.scores": "search.cache",
    "search.workdir": "old_verbs",
    "training.claims": "training.workdir",
    "training.hosts": "distributed",
    "training.plan": "training.schedule",
}
# Old and new names in modules, by the new name of the module.
NAMES: dict[str, dict[str, str]] = {
    "distributed": {
        "Leave": "ProcessAborted",
        "agree": "all_reduce_max",
        "by_the_first": "on_primary",
        "first": "is_primary",
        "leave": "as_aborted",
        "mine": "local_devices",
        "places": "local_batch_indices",
    },
    "evaluation": {"NeverVisited": "UncalibratedPairs"},
    "export.integer_model": {
        "Deployed": "IntegerModel",
        "deploy": "to_integer_model",
        "narrowed": "truncate_bits",
    },
    "layers": {"Quantization": "QuantConfig"},
    "loaded_model": {
        "Runnable": "LoadedModel",
        "load": "runtime.load_model",
        "of_deployed": "export.integer_engine.from_integer_model",
        "of_model": "from_variables",
    },
    "pairs": {
        "fill_unvisited_pairs": "fill_uncalibrated_pairs",
        "never_visited": "uncalibrated_pairs",
    },
    "quantizers": {
        "KINDS": "WEIGHT_QUANTIZERS",
        "activation_step": "activation_step_size",
        "bounds": "integer_range",
        "initial_step": "init_step_size",
        "levels": "code_histogram",
    },
    "search": {"Found": "SearchResult", "Limit": "Constraint", "ScoreBook": "EvaluationCache"},
    "training": {"float_config": "baseline_config"},
}
MODEL_SETTINGS = {"ends": "first_last_layers", "weight_kind": "weight_quantizer"}
CONFIG_KEYS = {"made_for": "dataset_info"}


def _text(old: str, new: str) -> str:
    return f"{old} is deprecated and will be removed in version 0.3; write {new}"


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns the caller of a Python function that ``old`` is now called ``new``."""
    warnings.warn(_text(old, new), DeprecationWarning, stacklevel=stacklevel)


@functools.cache
def tell(old: str, new: str) -> None:
    """Logs a warning, once, that a flag or a setting ``old`` is now called ``new``.

    Python hides a DeprecationWarning from those who only run commands.
    """
    logging.getLogger(PACKAGE).warning("%s", _text(old, new))


def module_getattr(module: str) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` that makes the old names of a module work.

    Args:
      module: ``__name__`` of the module.
    """
    names = NAMES[module.removeprefix(f"{PACKAGE}.")]

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, new = names[name].rpartition(".")  # a name with dots is of another module
        target = f"{PACKAGE}.{home}" if home else module
        warn(f"{module}.{name}", f"{target}.{new}")
        return getattr(importlib.import_module(target), new)

    return getattr_


def renamed_arguments(**names: str) -> Callable[[Function], Function]:
    """Returns a decorator. A function with it also takes keyword arguments by their old names.

    >>> @renamed_arguments(seed_number="seed")
    ... def draw(seed):
    ...     return seed
    >>> draw(seed_number=3)  # with a DeprecationWarning
    3
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                warn(f"{function.__name__}({old}=)", f"{names[old]}=")
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return cast(Function, call)

    return decorate


def new_keys(tree: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns ``tree`` with old keys replaced by new ones, in the same order.

    >>> new_keys({"made_for": 1, "seed": 0}, {"made_for": "dataset_info"})
    {'dataset_info': 1, 'seed': 0}
    """
    return {
        names.get(key, key): value
        for key, value in tree.items()
        if key not in names or names[key] not in tree
    }


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module by its old name. Both names then stand for the same module object."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.removeprefix(f"{PACKAGE}.") not in MODULES or not name.startswith(f"{PACKAGE}."):
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        new = f"{PACKAGE}.{MODULES[spec.name.removeprefix(f'{PACKAGE}.')]}"
        warn(spec.name, new)
        return importlib.import_module(new)

    def exec_module(self, module: types.ModuleType) -> None:
        """Does nothing: the import of the new name has run the module."""


def install() -> None:
    """Makes the old names of modules importable."""
    sys.meta_path.append(_OldModules())
