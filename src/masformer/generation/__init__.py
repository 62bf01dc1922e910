"""Generation from long prompts: prefill in chunks, streamed text, and what it cost; conversations and batches."""

from masformer.defaults import PREFILL_CHUNK as CHUNK
from masformer.generation.chat import Chat
from masformer.generation.continuing import (
    BatchGeneration,
    CheckNumbers,
    Continuation,
    Generation,
    end_tokens,
    generate,
    generate_batch,
)
from masformer.generation.prompts import chat_text, prompt_tokens, uses_chat

__all__ = [
    "CHUNK",
    "BatchGeneration",
    "Chat",
    "CheckNumbers",
    "Continuation",
    "Generation",
    "chat_text",
    "end_tokens",
    "generate",
    "generate_batch",
    "prompt_tokens",
    "uses_chat",
]
