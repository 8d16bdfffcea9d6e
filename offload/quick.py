"""Imports transformers without libraries that it would load and never use here.

Reading `transformers.modeling_utils` takes 3.5 s of processor time with them, and 1.6 s without.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

DYNAMO = "torch._dynamo"  # torch's compiler; it takes 1.2 s
MARK = f"{DYNAMO}._trace_wrapped_higher_order_op"  # a class of transformers' masks is found there


@contextlib.contextmanager
def without_hqq() -> Iterator[None]:
    """Keep transformers, if it is imported meanwhile, from importing hqq, which takes 1.1 s.

    transformers uses hqq in a quantised KV cache; this project only uses it when a pack is made.
    """
    if "hqq" in sys.modules or "transformers" in sys.modules:
        yield
        return
    sys.modules["hqq"] = None  # type: ignore[assignment]  # Python's way to say: it is not there
    try:
        yield
    finally:
        del sys.modules["hqq"]
        if utils := sys.modules.get("transformers.utils.import_utils"):
            utils.is_hqq_available.cache_clear()


def import_transformers() -> None:
    """Import torch and transformers for a command, whose process belongs to this project.

    Besides hqq, torch's compiler is left out, which decorators of torch and transformers would
    import, and everything that is for several machines. `load` in a user's program does not do
    that, because the program may compile its own models.
    """
    if "torch" in sys.modules or "transformers" in sys.modules:
        return
    import numpy  # noqa: F401  # torch's C code would drop Ctrl-C meanwhile, and leave half of it

    sys.modules[DYNAMO] = _NoCompiler(DYNAMO)
    sys.meta_path.insert(0, _Compiler())
    import torch

    torch.distributed.is_available = lambda: False
    with without_hqq():
        importlib.import_module("transformers.modeling_utils")
        importlib.import_module("transformers.generation.utils")


def _undecorated(function: Any = None, *_: object, **__: object) -> Any:
    """A decorator that changes nothing, with or without arguments of its own."""
    return _undecorated if function is None else function


class _NoCompiler(ModuleType):
    """torch's compiler, as long as nothing of it is asked for but what leaves functions alone."""

    __path__: list[str] = []  # noqa: RUF012
    disable = assume_constant_result = allow_in_graph = staticmethod(_undecorated)
    mark_static_address = staticmethod(_undecorated)  # transformers marks recurrent states

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # whoever looks at all modules, as `inspect` does
            raise AttributeError(name)
        return getattr(_import_compiler(), name)


class _Compiler(MetaPathFinder, Loader):
    """Finds modules of torch's compiler, and brings in the whole compiler for all but `MARK`."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(f"{DYNAMO}."):
            return None
        if name != MARK:
            _import_compiler()
            if name in sys.modules:
                return ModuleSpec(name, self)
        torch = Path(sys.modules["torch"].__file__ or "")
        return PathFinder.find_spec(name, [str(torch.with_name("_dynamo"))])

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]  # the compiler has imported it already

    def exec_module(self, module: ModuleType) -> None: ...


def _import_compiler() -> ModuleType:
    """torch's compiler itself, in place of `_NoCompiler`."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Compiler)]
    if isinstance(sys.modules.get(DYNAMO), _NoCompiler):
        del sys.modules[DYNAMO]
    return importlib.import_module(DYNAMO)
