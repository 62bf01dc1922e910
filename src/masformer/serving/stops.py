"""Stop sequences in a text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Gives the text before the first stop sequence, and holds back no more than what may still become one.

    Attributes:
        found: whether one was met.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.found, self._held = tuple(stops), False, ""

    def feed(self, text: str) -> str:
        """What is certain after this piece."""
        text = self._held + text
        places = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        self.found = bool(places)
        certain = min(places) if places else len(text) - max((_begun(stop, text) for stop in self.stops), default=0)
        self._held = "" if places else text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """What was held back, where no more text follows."""
        text, self._held = self._held, ""
        return text


def _begun(stop: str, text: str) -> int:
    """How many letters at the end of a text are the beginning of a stop sequence."""
    longest = min(len(stop) - 1, len(text))
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
