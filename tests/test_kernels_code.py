"""What the compiler makes of each kernel, for GPUs that are not here: no spills, wide loads, tensor
cores where they belong."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files

import pytest

pytest.importorskip("triton", reason="there is no Triton for this system")

PRODUCTS = {"decode_grouped", "decode_split", "decode_paged", "decode_int8", "decode_int4",
            "prefill_paged", "linear_int8", "linear_int4"}
WIDE = PRODUCTS | {"decode_naive", "rms_norm", "swiglu"}
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes that a program may have: CUDA C programming guide, table of compute capabilities; CDNA 3
instruction set, section 2.2."""


@pytest.fixture(scope="module", params=SHARED)
def codes(request):
    """Compiled in a process of its own: in this one kernels are interpreted."""
    ran = subprocess.run([sys.executable, "-m", "clawdemy_kernels.ahead", request.param],
                         capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()][1:]


def test_the_machine_code_is_what_the_table_in_data_says(codes):
    """Registers, spills, shared memory, widths of loads and tensor-core instructions. If a kernel
    was changed on purpose, make the table anew, and look at what became of it: `TRITON_INTERPRET=0
    python -m clawdemy_kernels.ahead > data/kernels_code.jsonl`."""
    lines = (files("clawdemy_data") / "kernels_code.jsonl").read_text().splitlines()
    made_by, *table = map(json.loads, lines)
    if made_by["triton"] != version("triton"):
        pytest.skip(f"the table was made by Triton {made_by['triton']}, and here is "
                    f"{version('triton')}, whose code may differ")
    assert codes == [row for row in table if row["target"] == codes[0]["target"]]


def test_no_kernel_spills_or_takes_more_shared_memory_than_there_is(codes):
    assert len(codes) == 15
    for code in codes:
        assert code["spilled"] == 0, code
        assert code["shared"] <= SHARED[code["target"]], code
        assert code["registers"] <= 256, code


def test_the_streams_are_loaded_16_bytes_at_a_time(codes):
    """Keys, values and weights: at least four fifths of what a kernel's loads fetch; the rest are
    scales and tables. On AMD scales and tables are loaded anew by the threads that need them, in
    more and narrower loads; 8 bytes at a time only the scales of 4-bit codes."""
    for code in codes:
        if code["kernel"].removesuffix("_kernel") not in WIDE:
            continue
        loads = {int(width): int(width) * count for width, count in code["loads"].items()}
        if code["target"] == "gfx942":
            assert loads[16] > loads.get(8, 0), code
            assert 8 not in loads or "int4" in code["kernel"], code
        else:
            assert loads[16] >= 0.8 * sum(loads.values()), code


def test_tensor_cores_are_used_where_there_is_a_product_and_nowhere_else(codes):
    for code in codes:
        assert (code["products"] > 0) == (code["kernel"].removesuffix("_kernel") in PRODUCTS), code


def test_without_the_hint_that_a_stride_is_a_multiple_of_16_the_loads_are_narrow():
    """The same kernel on keys whose rows begin at odd places: the compiler may not join what it
    cannot know to be aligned."""
    script = """
import json, torch
from dataclasses import asdict
from clawdemy_kernels.ahead import compiled
from clawdemy_kernels.decode_grouped import decode_grouped
q, lengths = torch.zeros(8, 32, 128, dtype=torch.bfloat16), torch.ones(8, dtype=torch.int32)
for row in (128, 129):
    k = torch.zeros(8, 8, 256, row, dtype=torch.bfloat16)[..., :128]
    [code] = compiled(lambda: decode_grouped(q, k, k, lengths), "sm_90")
    print(json.dumps(asdict(code)))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "0"})
    assert ran.returncode == 0, ran.stderr
    aligned, odd = (json.loads(line) for line in ran.stdout.splitlines())
    assert aligned["loads"]["16"] > 30
    assert odd["loads"].get("16", 0) < aligned["loads"]["16"] / 2 and odd["loads"]["2"] > 30
