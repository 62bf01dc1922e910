"""The span cache: grows where a layer's span is full, a ring buffer where it is not.

A local layer stores the keys of a document by position: its sinks in the first slots, every later key in a ring that
the newest overwrites, as many slots as the span can still see. A full layer stores every key in storage that doubles
when it is full. Nothing is concatenated or moved when a token is added.

The bridge announces each forward pass (`begin`), so that every layer knows which tokens are padding; each layer then
stores its new keys and hands out those that the new queries may see, with a `View` that says what they are.
"""

from masformer.cache.layer import PAST
from masformer.cache.span_cache import SpanCache

__all__ = ["PAST", "SpanCache"]
