"""The backend that `auto` takes: the first that can do the call, in the order of speed where it runs."""

from __future__ import annotations

from torch import Tensor

from masformer.attention.call import Backend, Call
from masformer.attention.flash import Flash
from masformer.attention.flex import Flex
from masformer.attention.tiled import Tiled

TILED = Tiled()
ON_CUDA: tuple[Backend, ...] = (Flash(), Flex(), TILED)


class Auto(Backend):
    """Chooses call by call: on CUDA among all backends, elsewhere the tiles."""

    name = "auto"

    def objection(self, call: Call) -> str | None:
        return None

    def run(self, call: Call) -> Tensor:
        return self.choose(call).run(call)

    def choose(self, call: Call) -> Backend:
        """The backend that `run` takes."""
        if not call.query.is_cuda:
            return TILED
        return next(backend for backend in ON_CUDA if backend.objection(call) is None)
