"""What engines import for a GPU and several processes, so that the rest of them imports on a CPU.

A module that stands in has every name, and behind each of them is `Absent`: a class that does nothing, a decorator that
leaves what it decorates, a base that adds nothing. Whatever computes with one fails or is never reached: only the code
that is there for real is what is tested.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any


class _Nothing(type):
    """Every attribute, call and item of it is itself."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and not kwargs and callable(args[0]) else cls

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Iterator[Any]:
        return iter(())

    def __bool__(cls) -> bool:
        return False


class Absent(metaclass=_Nothing):
    """Stands where something of a GPU would."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


class _Module(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str], known: dict[str, dict[str, Any]]) -> None:
        self._names, self._known = names, known

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if any(fullname == name or fullname.startswith(f"{name}.") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        vars(module).update(self._known.get(module.__name__, {}))


def stand_in(*names: str, known: "dict[str, dict[str, Any]] | None" = None) -> None:
    """Has imports of these modules, and of all below them, give stand-ins.

    Args:
        names: modules, by their full names.
        known: by module, what some of them have for real.
    """
    sys.meta_path.insert(0, _Finder(names, known or {}))


def bare(name: str) -> None:
    """Has a package import without its own `__init__`, which wants a GPU; what is in it imports as it is."""
    spec = importlib.machinery.PathFinder.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"{name} is not installed", name=name)
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
