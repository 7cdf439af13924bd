"""Names that were changed after version 0.1. The old ones work in 0.2, with a DeprecationWarning.

Renamed are modules, names in modules, settings of a configuration, and keys of JSON files.
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

# Both sides are below the package.
MODULES = {
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
        "of_deployed": "from_integer_model",
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
    return f"{old} is deprecated and goes in version 0.3; write {new}"


def warn(old: str, new: str, stacklevel: int = 3) -> None:
    """Warns those who write Python that ``old`` is now called ``new``."""
    warnings.warn(_text(old, new), DeprecationWarning, stacklevel=stacklevel)


@functools.cache
def tell(old: str, new: str) -> None:
    """Tells those who write commands and settings, once, that ``old`` is now called ``new``."""
    logging.getLogger(PACKAGE).warning("%s", _text(old, new))


def module_getattr(module: str) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` for ``module`` (its ``__name__``) that knows its old names."""
    names = NAMES[module.removeprefix(f"{PACKAGE}.")]

    def getattr_(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(sys.modules[module], names[name])

    return getattr_


def renamed_arguments(**names: str) -> Callable[[Function], Function]:
    """Returns a decorator: its function also takes keyword arguments by old names (old="new")."""

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
    """Returns ``tree`` with old keys under their new names, in their order."""
    return {
        names.get(key, key): value
        for key, value in tree.items()
        if key not in names or names[key] not in tree
    }


class _OldModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module by its old name: both names then mean the same module."""

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
        """The module has been run under its new name."""


def install() -> None:
    """Makes the old names of modules importable."""
    sys.meta_path.append(_OldModules())
