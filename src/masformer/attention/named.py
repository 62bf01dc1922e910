"""The backends by their names."""

from __future__ import annotations

from masformer.attention.auto import Auto
from masformer.attention.call import Backend
from masformer.attention.flash import Flash
from masformer.attention.flex import Flex
from masformer.attention.reference import Reference
from masformer.attention.tiled import Tiled

BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Auto(), Reference(), Tiled(), Flash(), Flex())}
