import subprocess
import sys

SCRIPT = """
import resource, torch
from masformer import WindowSpan, attend

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(length):
    tensors = [torch.randn(1, 1, length, 64, requires_grad=True) for _ in range(3)]
    base = peak()
    attend(*tensors, WindowSpan(512)).sum().backward()
    return peak() - base

run(2048)  # torch's own one-time allocations
print(run(32768))
"""


def test_32768_tokens_forward_and_backward_within_1_gib_of_extra_memory():
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2**30
