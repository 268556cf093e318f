"""Lesson 00's exercises: a machine from three times, rows that make a product compute-bound, and
copies and launches."""

from clawdemy_course.checks import Exercise, Step
from clawdemy_infer.arithmetic import matmul
from clawdemy_infer.from_config import catalog

MiB, GiB = 2**20, 2**30
H100, L4 = catalog.machine("h100-sxm"), catalog.machine("l4")

# ---- 1. Three times of an unknown machine, in fp32 ----

ONE_S, SUM_S, PRODUCT_S = 8e-6, 91.9e-6, 34.8e-6
"""Seconds to add two numbers, to sum 16 MiB from main memory, and of a 512³ product."""
_SUM, _FLOPS = 16 * MiB, 2 * 512**3
_BANDWIDTH, _PEAK = _SUM / (SUM_S - ONE_S), _FLOPS / (PRODUCT_S - ONE_S)
_ROWS = matmul(64, 2048, 2048)
_MEMORY_S, _COMPUTE_S = _ROWS.bytes / _BANDWIDTH, _ROWS.flops / _PEAK

UNKNOWN_MACHINE = Exercise("unknown_machine", {
    "launch": Step(ONE_S, {
        ONE_S / 2: "One addition is one launch.",
        ONE_S * 1e3: "Microseconds are 1e-6 s, milliseconds 1e-3 s."}, unit="s"),
    "bytes_per_second": Step(_BANDWIDTH, {
        _SUM / SUM_S: "91.9 µs have a launch in them: take it off first.",
        16e6 / (SUM_S - ONE_S): "16 MiB are 16 · 2²⁰ bytes, 5 % more than 16 MB.",
        _BANDWIDTH / 4: "That counts numbers; each has 4 bytes.",
        _BANDWIDTH * 8: "That counts bits."}, unit="B/s"),
    "flops_per_second": Step(_PEAK, {
        _FLOPS / PRODUCT_S: "34.8 µs have a launch in them: take it off first.",
        _PEAK / 2: "A multiply-add is 2 FLOPs: 2 · 512³ in all.",
        _FLOPS / PRODUCT_S / 2: "A multiply-add is 2 FLOPs, and 34.8 µs have a launch in them.",
        _PEAK / 512: "Each of the 512² results takes 512 multiply-adds.",
        _PEAK / 1e6: "34.8 µs are 34.8e-6 s."}, unit="FLOP/s"),
    "ridge": Step(_PEAK / _BANDWIDTH, {
        _PEAK / 2 / _BANDWIDTH: "A multiply-add is 2 FLOPs, in the peak too.",
        _FLOPS / PRODUCT_S / _BANDWIDTH: "The peak is without the launch, as the bandwidth is.",
        _BANDWIDTH / _PEAK: "Upside down: FLOPs per byte is peak over bandwidth.",
        4 * _PEAK / _BANDWIDTH: "That is FLOPs per number of 4 bytes, not per byte."}),
    "rows_64": Step(_MEMORY_S + ONE_S, {
        _MEMORY_S: "And the launch?",
        _COMPUTE_S + ONE_S: "64 rows are below the ridge: the bytes take longer than the FLOPs.",
        _MEMORY_S + _COMPUTE_S + ONE_S: "Fetching and computing overlap: the larger, not the sum.",
        64 * (2048**2 * 4 / _BANDWIDTH + ONE_S):
            "W is read once for all 64 rows, and it is one launch."}, unit="s"),
}, means="Three stopwatch readings make a machine, and the machine predicts a fourth.")

# ---- 2. From which row on is X[B, D] @ W[D, D] compute-bound, in bf16? ----


def _rows(D: float, ridge: float, per_row: float = 1.0) -> float:
    """B where the intensity per_row · B · D / (2B + D) is `ridge`."""
    return ridge * D / (per_row * D - 2 * ridge)


_H100, _L4 = H100.ridge("bf16"), L4.ridge("bf16")
ROWS_NEEDED = Exercise("rows_needed", {
    "h100_4096": Step(_rows(4096, _H100), {
        _H100: "X and Y are bytes too: 2BD + D² numbers, not D².",
        _rows(4096, _H100, 0.5): "A multiply-add is 2 FLOPs.",
        _rows(4096, _H100, 2.0): "A number in bf16 has 2 bytes, not 1.",
        1 / (1 / _H100 - 1 / 4096): "X is read and Y is written: count both."}),
    "l4_4096": Step(_rows(4096, _L4), {
        _L4: "X and Y are bytes too: 2BD + D² numbers, not D².",
        _rows(4096, _H100): "That is the H100's; the L4 has a ridge of its own.",
        _rows(4096, _L4, 0.5): "A multiply-add is 2 FLOPs."}),
    "most_512": Step(512 / 2, {
        512: "X and Y both grow with B: the limit of B·D / (2B + D) is D/2.",
        512 / 4: "That is the limit in fp32 or with 1 FLOP for a multiply-add.",
        512 / 6: "D/6 is a square product in fp32; here B grows without end."}),
    "h100_512": Step(False, {
        True: "Its intensity stays below 256 FLOPs per byte; the ridge is at 295."}),
    "narrowest": Step(2 * _H100, {
        _H100: "The intensity tends to D/2, not to D.",
        4 * _H100: "The intensity tends to D/2 in bf16, not to D/4."}),
}, means="Rows are not enough: a matrix that is too narrow stays memory-bound with any batch.")

# ---- 3. An H100 that loads, copies and launches ----

WEIGHTS, LAUNCH_S, LAUNCHES = 15 * GiB, 4e-6, 500
_HBM, _PCIE = H100.bandwidth_at(), catalog.machine("h100-pcie").link.bytes_per_s
_READ_S, _LAUNCHES_S = WEIGHTS / _HBM, LAUNCHES * LAUNCH_S
COPY_AND_LAUNCH = Exercise("copy_and_launch", {
    "load": Step(WEIGHTS / _PCIE, {
        15e9 / _PCIE: "A GiB is 7 % more than a GB.",
        2 * WEIGHTS / _PCIE: "The link carries each byte once.",
        8 * WEIGHTS / _PCIE: "The link is given in bytes/s, not in bits/s.",
        WEIGHTS / _HBM: "Loading crosses the link, not the GPU's own memory."}, unit="s"),
    "copy": Step(2 * _READ_S, {
        _READ_S: "A copy reads each byte and writes it: twice across the bus.",
        30e9 / _HBM: "A GiB is 7 % more than a GB.",
        2000 * _READ_S: "That is in ms; a plain number is in s."}, unit="s"),
    "share": Step(_LAUNCHES_S / (_LAUNCHES_S + _READ_S), {
        _LAUNCHES_S / _READ_S: "That is launches over reading; here nothing overlaps, so the step "
                               "takes both.",
        _READ_S / (_LAUNCHES_S + _READ_S): "That is the share of reading.",
        _LAUNCHES_S / (_LAUNCHES_S + 2 * _READ_S): "A step reads the weights and does not copy."}),
    "too_small": Step(LAUNCH_S * _HBM, {
        LAUNCH_S * _HBM / 4: "Bytes were asked for, not numbers.",
        LAUNCH_S * _HBM * 8: "Bytes were asked for, not bits.",
        LAUNCH_S * _HBM * LAUNCHES: "That is for all 500; one operation was asked for.",
        LAUNCH_S * _PCIE: "The operation reads the GPU's own memory."}, unit="B"),
}, means="Below 13 MB, an operation on this GPU takes longer to launch than to read: fusing "
         "operations and recording them pays.")

EXERCISES = {each.name: each for each in (UNKNOWN_MACHINE, ROWS_NEEDED, COPY_AND_LAUNCH)}
