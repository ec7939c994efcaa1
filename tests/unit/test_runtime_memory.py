"""Freed memory stays with the process where the C library can be told so."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from sftcli.runtime import keep_freed_memory
assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(16_000_000)
before = faults()
for _ in range(5):
    torch.ones(16_000_000)
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_tensors_get_the_pages_of_freed_ones_again():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # 5 x 64 MB are 78,000 pages
