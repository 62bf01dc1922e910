"""What `import masformer` changes in transformers: its Auto classes read checkpoints with plans.

Importing transformers takes seconds, so it is not done for this; the change waits until somebody else imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AWAITED = "transformers.models.auto.configuration_auto"
"""The module of `AutoConfig`."""
REGISTERS = "masformer.models.sealed"
"""The module whose import registers their config class; the rest of transformers may be half imported by then."""


def when_transformers_is_there() -> None:
    """Imports what registers the checkpoints: now if `AutoConfig` has been imported, else as soon as it is."""
    if AWAITED in sys.modules:
        import_module(REGISTERS)
    else:
        sys.meta_path.insert(0, _Awaiting())


class _Awaiting(MetaPathFinder):
    """Finds the awaited module, once, where the others find it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Loads a module as its own loader does, and then registers the checkpoints."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        import_module(REGISTERS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
