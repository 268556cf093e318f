"""Block sizes: the rule's without a GPU, the clock's on one. Every candidate computes the same, and
compiles for every GPU."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this system")

from clawdemy_kernels import ahead, blocks, checks, launch
from clawdemy_kernels.examples import SMALL, examples
from clawdemy_kernels.launch import triton
from clawdemy_kernels.tolerance import KERNEL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
SMALLEST = 99 * 1024
"""Bytes of shared memory that a program may have on sm_86 and sm_89 (RTX 3090 and 4090), as of all
GPUs from sm_80 on the fewest."""
TUNED = {"decode_split", "decode_sinks", "decode_paged", "decode_int8", "decode_int4",
         "prefill_paged", "linear_int8", "linear_int4"}


def asked_by(example):
    blocks.ASKED.clear()
    example.launch()
    return set(blocks.ASKED)


@pytest.mark.parametrize("name", sorted(TUNED))
def test_every_candidate_gives_what_fp64_gives(name):
    torch.manual_seed(0)
    example = examples(SMALL, DEVICE, torch.float32)[name]
    for kernel, e, H in asked_by(example):
        for options in blocks.candidates(kernel, e, H):
            with blocks.using(kernel, options):
                assert checks.error(example, **KERNEL[torch.float32])[1] <= 1, options


def test_a_block_of_keys_has_16_KiB_and_16_to_64_tokens_and_in_fp32_32_at_most():
    sizes = {e: [blocks.candidates("decode_paged", e, H)[0]["S_BLOCK"]
                 for H in (32, 64, 80, 128, 256, 512, 2048)] for e in (2, 4)}
    assert sizes == {2: [64, 64, 64, 64, 32, 16, 16], 4: [32, 32, 32, 32, 16, 16, 16]}


def test_threads_are_warps_of_32_on_nvidia_and_of_64_on_amd(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for target, warps in (("sm_90", 4), ("gfx942", 2)):
        gpu = ahead.Elsewhere(ahead.TARGETS[target])
        monkeypatch.setattr(triton.runtime.driver, "_active", gpu)
        assert blocks.blocks("decode_int4", torch.bfloat16) == {"num_warps": warps}


def test_without_a_gpu_nothing_is_timed_and_nothing_that_was_chosen_counts(monkeypatch):
    monkeypatch.setattr(blocks, "chosen", lambda place: pytest.fail("it was looked at"))
    monkeypatch.setattr(blocks, "on_gpu", lambda: False)
    rule = blocks.candidates("decode_paged", 2, 64)[0]
    assert blocks.blocks("decode_paged", torch.half, 64) == rule
    with pytest.raises(RuntimeError, match="by the clock of a GPU, and there is none here"):
        blocks.choose(lambda: None, lambda work: pytest.fail("it was timed"))


def test_on_a_gpu_the_fastest_is_chosen_and_kept_for_that_gpu_and_one_without_room_is_not(
        monkeypatch, tmp_path):
    here = {"gpu": "one"}
    monkeypatch.setattr(blocks, "on_gpu", lambda: True)
    monkeypatch.setattr(blocks, "place", lambda: (tmp_path / "triton" / "blocks.json", here["gpu"]))
    rule, smaller, larger, _ = blocks.candidates("decode_paged", 2, 64)
    chosen = partial(blocks.blocks, "decode_paged", torch.half, 64)

    def seconds(launch):
        options = launch()
        if options == larger:
            raise triton.runtime.errors.OutOfResources(300_000, 100_000, "shared memory")
        return 1.0 if options == smaller else 2.0
    assert blocks.choose(chosen, seconds) == {"decode_paged 64 x 2 B": smaller}
    other = blocks.candidates("decode_paged", 2, 128)[0]
    assert chosen() == smaller and blocks.blocks("decode_paged", torch.half, 128) == other
    blocks.choose(lambda: blocks.blocks("linear_int8", torch.half), lambda launch: 1.0)
    assert chosen() == smaller                              # another choice does not undo it
    with blocks.using("decode_paged", larger):
        assert chosen() == larger
    here["gpu"] = "another"
    assert chosen() == rule


def test_a_choice_that_is_no_candidate_any_more_gives_way_to_the_rule(monkeypatch):
    monkeypatch.setattr(blocks, "on_gpu", lambda: True)
    monkeypatch.setattr(blocks, "place", lambda: None)
    monkeypatch.setattr(blocks, "chosen", lambda _: {"linear_int8 2 B": {"K_BLOCK": 64}})
    assert blocks.blocks("linear_int8", torch.half) == blocks.candidates("linear_int8", 2)[0]


SCRIPT = """
import itertools, json, sys, torch
from dataclasses import asdict, replace
from clawdemy_kernels.ahead import compiled
from clawdemy_kernels.blocks import ASKED, candidates, using
from clawdemy_kernels.examples import LLAMA_3_8B, examples
done, (first, step) = set(), map(int, sys.argv[3:])
def mine(of, counted=itertools.count()):
    return [each for each in of if next(counted) % step == first]
def show(launch, options):
    for code in compiled(launch, sys.argv[1]):
        print(json.dumps(asdict(code) | {"options": options}), flush=True)
for name, example in examples().items():
    ASKED.clear()
    compiled(example.launch, sys.argv[1])
    for asked in sorted(set(ASKED) - done):
        for options in mine(candidates(*asked)[1:]):
            with using(asked[0], options):
                show(example.launch, options)
    done |= ASKED
wide = examples(replace(LLAMA_3_8B, H=int(sys.argv[2])), dtype=torch.float32)
for example in mine(wide.values()):
    show(example.launch, "fp32")
"""


@pytest.mark.parametrize("target, H, share", [("sm_80", 64, "0 3"), ("sm_90", 128, "1 3"),
                                              ("sm_100", 64, "2 3"), ("gfx942", 128, "0 1")])
def test_every_candidate_compiles_for_nvidia_and_for_amd_and_the_rule_in_fp32_too(target, H, share):
    """On NVIDIA, whose GPUs share the candidates out between them, without spills, and within the
    shared memory; on AMD one spills and one finds no room, which the clock passes by. In fp32,
    whose products have no tensor cores, the rule does not spill either, and stays within the shared
    memory of the smallest GPU."""
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, target, str(H), *share.split()]
    ran = subprocess.run(command, capture_output=True, text=True,
                         env=os.environ | {"TRITON_INTERPRET": "0"})
    assert ran.returncode == 0, ran.stderr
    codes = [json.loads(line) for line in ran.stdout.splitlines()]
    found = {code["kernel"] for code in codes if code["options"] != "fp32"}
    if share == "0 1":
        assert len(found & {f"{name}_kernel" for name in TUNED}) == 7
    for code in codes:
        if code["options"] == "fp32":
            assert code["spilled"] == 0 and code["shared"] <= SMALLEST, code
        elif target != "gfx942":
            assert code["spilled"] == 0 and code["shared"] <= SHARED[target], code
