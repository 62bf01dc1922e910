"""A conversation with a model, in one cache."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from transformers import PreTrainedModel

from masformer.cache import SpanCache
from masformer.data.tokens import part_tokens
from masformer.errors import LARGEST_SEED, MasformerError, check_seed
from masformer.generation.continuing import Generation, generate
from masformer.generation.prompts import chat_text, uses_chat
from masformer.models import rotary
from masformer.models.wrappers import bare_model
from masformer.plan import AttentionPlan


class Chat:
    """A conversation in the model's chat template, in one cache: of each turn only the new tokens are read.

    Where the template writes an earlier answer in another way than the model did, the cache goes back to the last token
    that stays, or is filled anew where a window has moved past it.

    Args:
        model: a model with a plan, in evaluation mode.
        tokenizer: its tokenizer.
        system: system message.
        seed: of sampling, for the whole conversation.
        options: of `generate`: `max_new_tokens`, `temperature`, `top_p`, `top_k`, `chunk`.

    Attributes:
        messages: what was said, as templates read it.

    Raises:
        MasformerError: the tokenizer has no chat template.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, *, system: str | None = None, seed: int = 0, **options: Any
    ) -> None:
        uses_chat(tokenizer, True)
        check_seed(seed)
        self.model, self.tokenizer, self.options = bare_model(model), tokenizer, options
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._random, self._seed = random.Random(seed), seed
        self._read: list[int] = []
        self._cache = SpanCache(AttentionPlan.from_dict(self.model.config.masformer))

    def answer(
        self,
        text: str,
        on_text: Callable[[str], None] = lambda text: None,
        on_prompt: Callable[[int, int], None] = lambda done, new: None,
    ) -> Generation:
        """Says something to the model, and gives its answer.

        Args:
            text: of the user.
            on_text: see `generate`.
            on_prompt: called with how many of the new tokens of the prompt were read, and how many those are.

        Raises:
            MasformerError: there is nothing to answer, or the conversation is beyond the model's positions.
            KeyboardInterrupt: it was interrupted. What the model had said till then stays in the conversation; without
                a word of it, the turn is as if it had not been.
        """
        if not text.strip():
            raise MasformerError("the message is empty")
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = part_tokens(self.tokenizer, chat_text(self.tokenizer, messages))
        self._go_back(prompt)
        new = len(prompt) - len(self._read)
        pieces: list[str] = []

        def hand_on(piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        try:
            result = generate(
                self.model,
                self.tokenizer,
                prompt,
                cache=self._cache,
                seed=self._seed,
                on_text=hand_on,
                on_prompt=lambda done: on_prompt(done, new),
                **self.options,
            )
        except BaseException:
            self._forget()
            if said := "".join(pieces):
                self.messages = [*messages, {"role": "assistant", "content": said}]
            raise
        self._seed = self._random.randrange(LARGEST_SEED)
        self._read = [*prompt, *result.token_ids][: self._cache.get_seq_length()]
        self.messages = [*messages, {"role": "assistant", "content": result.text}]
        return result

    def _go_back(self, prompt: list[int]) -> None:
        """Leaves in the cache what the prompt begins with, and less than all of it."""
        pairs = zip(self._read, prompt[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        first, now = (rotary.table(self.model.config, length) for length in (self._cache.prompt, len(prompt)))
        try:
            if first != now or not same:
                self._forget()  # what was read has other rotary positions than this text
            elif same < len(self._read):
                self._cache.crop(same - len(self._read))
                self._read = self._read[:same]
        except MasformerError:  # a window has moved past it
            self._forget()

    def _forget(self) -> None:
        self._cache.reset()
        self._read = []
