"""Kernels in Triton, in its interpreter on the CPU: in a process of their own, since that is chosen at the start."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which is not installed")
@pytest.mark.parametrize("script", ["sinks_kernels.py", "stored_kernels.py"])
def test_kernels_against_torch(script):
    surroundings = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, Path(__file__).parents[1] / script]
    run = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
