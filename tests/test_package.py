"""What importing the package changes."""

import subprocess
import sys
from pathlib import Path

import pytest

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
{first}
import resource, torch
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
torch.zeros(2**24)                              # 64 MB
print(faults() - before)
"""


@pytest.mark.skipif(not PAGES.exists() or "[madvise]" not in PAGES.read_text(),
                    reason="large pages are not there for who asks")
def test_arrays_lie_on_large_pages():
    def count(first: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", FAULTS.format(first=first)], capture_output=True,
                           text=True, check=True).stdout)

    assert count("import os; os.environ['THP_MEM_ALLOC_ENABLE'] = '0'") > 2**26 // 4096 - 10
    assert count("import clawdemy_infer") < 2**26 // 4096 // 4
