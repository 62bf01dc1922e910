"""A tokenizer of whole words, for tests: every text of these words is one token a word."""

from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{index}" for index in range(60)]


def word_tokenizer(begin=False, end=True):
    """Adds `<s>` by itself if `begin`; names `</s>` as its end of sequence if `end`."""
    vocabulary = {word: index for index, word in enumerate(["<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"eos_token": "</s>"} if end else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", **names)


def text(count, first=0):
    """`count` words, the ones after number `first`."""
    return " ".join(WORDS[(first + index) % len(WORDS)] for index in range(count))
