"""Every constant of the machines against physics, and against figures that someone else wrote
down."""

import re

import pytest

from clawdemy_infer.envelope.roofline import Link
from clawdemy_infer.from_config import catalog

MACHINES = catalog.read("machines.toml")
each_machine = pytest.mark.parametrize("name", MACHINES)


def best_16_bit(name: str) -> float:
    peaks = MACHINES[name]["peak_flops"]
    return max(peaks["bf16"], peaks.get("fp16", 0))


# ---- sources ----


@each_machine
def test_every_figure_has_a_source(name):
    entry = MACHINES[name]
    figures = set(entry) - {"name", "kind", "priced", "sources"}
    assert set(entry["sources"]) == figures >= {"memory", "bandwidth", "peak_flops"}
    assert all(len(source) > 20 for source in entry["sources"].values())
    for source in entry["sources"].values():
        assert source in catalog.machine(name).source


@each_machine
def test_memory_bandwidth_and_power_are_the_figures_that_their_sources_print(name):
    """A slip of a digit between source and figure would go unseen otherwise."""
    entry = MACHINES[name]
    printed = re.findall(r"([\d.,]+) ?(TB/s|GB/s|GBps)", entry["sources"]["bandwidth"])
    rates = [
        float(figure.replace(",", ""))*{"T": 1e12, "G": 1e9}[unit[0]] for figure, unit in printed
    ]
    assert any(entry["bandwidth"] == pytest.approx(rate) for rate in rates)
    assert f"{entry['memory'] // 2**30} GB" in entry["sources"]["memory"]
    assert entry["memory"] % 2**30 == 0
    if "watts" in entry:
        assert f"{entry['watts']:,} W" in entry["sources"]["watts"]
    if "dollars_per_hour" in entry:
        assert re.search(r"\d dollars", entry["sources"]["dollars_per_hour"])
        assert entry["priced"][:4] in entry["sources"]["dollars_per_hour"]


def test_the_catalog_gives_what_the_file_says():
    h100 = catalog.machine("h100-sxm")
    assert h100.link == Link(450e9, 6.6e-6, 0.6e-6, "NVLink 4")
    assert (MACHINES["h100-sxm"]["cache_bytes"], h100.watts) == (50 * 2**20, 700)
    assert (h100.dollars_per_hour, h100.priced) == (10.8, "2025-02")
    assert catalog.machine("rtx-4090").peak("fp16") == 165.2e12
    assert MACHINES["rtx-4090"]["peak_flops_fp16_accumulation"]["fp16"] == 330.3e12
    assert catalog.machine("apple-m1-8c").link is None


def test_there_are_machines_of_every_kind():
    kinds = [entry["kind"] for entry in MACHINES.values()]
    assert len(kinds) >= 30
    assert set(kinds) == {
        "data-centre", "workstation", "desktop", "laptop", "board", "server-cpu", "desktop-cpu",
        "laptop-cpu"
    }


# ---- physics: a peak is units x work per cycle x clock ----

UNITS = {
    # multiprocessors (compute units, matrix units), dense 16-bit FLOPs a cycle of each with sums in
    # fp32, clock in GHz
    "b200": (148, 8192, 1.855),
    "h200-sxm": (132, 4096, 1.83),
    "h100-sxm": (132, 4096, 1.83),
    "h100-pcie": (114, 4096, 1.62),
    "a100-80gb-sxm": (108, 2048, 1.41),
    "a100-40gb-sxm": (108, 2048, 1.41),
    "a100-80gb-pcie": (108, 2048, 1.41),
    "a800-80gb-sxm": (108, 2048, 1.41),
    "v100-sxm": (80, 1024, 1.53),
    "t4": (40, 1024, 1.59),
    "a10": (72, 1024, 1.695),
    "a40": (84, 1024, 1.74),
    "rtx-a6000": (84, 1024, 1.80),
    "l4": (58, 1024, 2.04),
    "l40s": (142, 1024, 2.49),
    "rtx-3090": (82, 512, 1.695),
    "rtx-4090": (128, 512, 2.52),
    "rtx-5090": (170, 512, 2.407),
    "jetson-agx-orin": (16, 2048, 1.3),
    "mi355x": (256, 4096, 2.4),
    "mi325x": (304, 2048, 2.1),
    "mi300x": (304, 2048, 2.1),
    "mi250x-gcd": (110, 1024, 1.7),
    "tpu-v4": (8, 2*128**2, 1.05),
    "tpu-v5e": (4, 2*128**2, 1.5),
    "tpu-v5p": (8, 2*128**2, 1.75),
    "tpu-v6e": (4, 2*256**2, 1.75),
    "apple-m1-8c": (8, 256, 1.278),
    "apple-m1-max-32c": (32, 256, 1.278),
    "macbook-air-m2": (10, 256, 1.398),
    "xeon-8480": (56, 1024, 2.0),
    "epyc-9654": (96, 64, 2.4),
    "raspberry-pi-5": (4, 32, 2.4),
}


@pytest.mark.parametrize("name", UNITS)
def test_a_16_bit_peak_is_units_times_flops_a_cycle_times_clock(name):
    """A figure with sparsity would be twice that, one with fp16 accumulation too on the cards for
    players."""
    units, per_cycle, clock = UNITS[name]
    assert best_16_bit(name) == pytest.approx(units * per_cycle * clock * 1e9, rel=0.02)


BUSES = {
    # bits, gigatransfers a second
    "b200": (8192, 8.0),
    "h200-sxm": (6144, 6.25),
    "h100-sxm": (5120, 5.23),
    "h100-pcie": (5120, 3.2),
    "h100-nvl": (6016, 5.2),
    "a100-80gb-sxm": (5120, 3.186),
    "a100-40gb-sxm": (5120, 2.43),
    "a100-80gb-pcie": (5120, 3.024),
    "v100-sxm": (4096, 1.752),
    "t4": (256, 10),
    "a10": (384, 12.5),
    "a40": (384, 14.5),
    "l4": (192, 12.5),
    "l40s": (384, 18),
    "rtx-a6000": (384, 16),
    "rtx-3090": (384, 19.5),
    "rtx-4090": (384, 21),
    "rtx-5090": (512, 28),
    "rtx-4070-laptop": (128, 16),
    "jetson-agx-orin": (256, 6.4),
    "mi355x": (8192, 8.0),
    "mi325x": (8192, 6.0),
    "mi300x": (8192, 5.2),
    "mi250x-gcd": (4096, 3.2),
    "apple-m1-8c": (128, 4.266),
    "apple-m1-pro-16c": (256, 6.4),
    "apple-m1-max-32c": (512, 6.4),
    "apple-m1-ultra-64c": (1024, 6.4),
    "macbook-air-m2": (128, 6.4),
    "apple-m2-max-38c": (512, 6.4),
    "apple-m3-pro-18c": (192, 6.4),
    "apple-m3-max-40c": (512, 6.4),
    "apple-m4-10c": (128, 7.5),
    "apple-m4-pro-20c": (256, 8.533),
    "apple-m4-max-40c": (512, 8.533),
    "xeon-8480": (512, 4.8),
    "epyc-9654": (768, 4.8),
    "i9-13900k": (128, 5.6),
    "i7-12700h": (128, 4.8),
    "raspberry-pi-5": (32, 4.267),
}


@pytest.mark.parametrize("name", BUSES)
def test_a_bandwidth_is_the_width_of_the_bus_times_its_rate(name):
    """Vendors round, Apple by as much as 2.4 per cent."""
    bits, rate = BUSES[name]
    assert MACHINES[name]["bandwidth"] == pytest.approx(bits / 8 * rate * 1e9, rel=0.03)


SPARSE = {
    "h100-sxm": 1979, "h100-nvl": 1671, "h100-pcie": 1513, "a100-80gb-sxm": 624, "a10": 250,
    "a40": 299.4, "l4": 242, "l40s": 733, "rtx-a6000": 309.7, "rtx-3090": 142, "rtx-4090": 330.4,
    "rtx-5090": 419, "b200": 4500, "mi300x": 2614.9
}


@pytest.mark.parametrize("name", SPARSE)
def test_no_figure_is_the_one_with_sparsity(name):
    """Data sheets print both, or the larger alone: 16-bit TFLOPS with 2:4 sparsity."""
    assert best_16_bit(name) == pytest.approx(SPARSE[name] * 1e12 / 2, rel=0.02)


@each_machine
def test_halving_the_bits_doubles_the_rate_or_leaves_it(name):
    entry = MACHINES[name]
    peaks, halved = entry["peak_flops"], "peak_flops_fp16_accumulation" in entry
    if "fp8" in peaks:
        assert peaks["fp8"] / best_16_bit(name) == pytest.approx(2, rel=0.02)
    if "int8" in peaks:                     # sums of integers are not slowed where sums in fp32 are
        accepted = (4,) if halved else (1, 2)
        assert any(
            peaks["int8"]/best_16_bit(name) == pytest.approx(ratio, rel=0.02) for ratio in accepted)
    if "fp4" in peaks:
        assert peaks["fp4"] / peaks["fp8"] == pytest.approx(4 if halved else 2, rel=0.02)
    if halved:
        for dtype, peak in entry["peak_flops_fp16_accumulation"].items():
            assert peak / peaks[dtype] == pytest.approx(2, rel=0.01)
    if "fp32" in peaks:
        assert 1 <= best_16_bit(name) / peaks["fp32"] <= 40


@each_machine
def test_nothing_breaks_physics(name):
    entry = MACHINES[name]
    lowest, highest = {"data-centre": (80, 600), "workstation": (80, 300),
                       "server-cpu": (20, 400)}.get(entry["kind"], (5, 300))
    assert lowest <= best_16_bit(name) / entry["bandwidth"] <= highest          # the ridge
    # Seconds to read all of the memory once: hundredths where memory is fast and dear, up to two
    # where it is DIMMs.
    slowest = 0.1 if entry["kind"] in ("data-centre", "workstation") else 2
    assert 0.015 < entry["memory"] / entry["bandwidth"] < slowest
    if "cache_bytes" in entry:
        assert 2**20 <= entry["cache_bytes"] <= 2**29
    if "link" in entry:
        # always the narrowest way that bytes take
        assert 0.01 < entry["link"]["bytes_per_s"] / entry["bandwidth"] < 0.3
        assert entry["link"].get("latency_s", 0) < 20e-6 and entry["link"].get("hop_s", 0) <= 2e-6
    if "watts" in entry:
        assert 1e9 < best_16_bit(name) / entry["watts"] < 4e12  # FLOPs per joule: a CPU to a B200
    if "dollars_per_hour" in entry:
        assert re.fullmatch(r"20\d\d(-\d\d)?", entry["priced"])
        assert 0.1 < entry["dollars_per_hour"] < 15
        # per TB/s: all of a kind
        assert 0.5 < entry["dollars_per_hour"] / (entry["bandwidth"] / 1e12) < 5


# ---- what others wrote down ----

PUBLISHED = {
    # The machines of published runs as those who measured name them: ours, GB/s, GB.
    "A100-40GB SXM": ("a100-40gb-sxm", 1555, 42.9),
    "A100-80GB SXM": ("a100-80gb-sxm", 2039, 85.9),
    "A800-80GB": ("a800-80gb-sxm", 2039, 85.9),
    "A100-80GB SXM 330W": ("a100-80gb-sxm", 2039, 85.9),
    "A40-48GB": ("a40", 696, 51.5),
    "H100-80GB SXM": ("h100-sxm", 3350, 85.9),
    "L40S-48GB": ("l40s", 864, 51.5),
    "Jetson AGX Orin 64GB": ("jetson-agx-orin", 204.8, 68.7),
    "RTX 4090": ("rtx-4090", 1008, 25.8),
    "RTX A6000": ("rtx-a6000", 768, 51.5),
    "RTX 4070 Laptop": ("rtx-4070-laptop", 256, 8.6),
    "MI250X (1 GCD)": ("mi250x-gcd", 1638, 68.7),
    "TPU v4": ("tpu-v4", 1228, 34.4),
    "TPU v5e": ("tpu-v5e", 820, 17.2),
    "Apple M1 7c GPU": ("apple-m1-7c", 68, None),
    "Apple M1 8c GPU": ("apple-m1-8c", 68, None),
    "Apple M1 Pro 14c GPU": ("apple-m1-pro-14c", 200, None),
    "Apple M1 Pro 16c GPU": ("apple-m1-pro-16c", 200, None),
    "Apple M1 Max 24c GPU": ("apple-m1-max-24c", 400, None),
    "Apple M1 Max 32c GPU": ("apple-m1-max-32c", 400, None),
    "Apple M1 Ultra 48c GPU": ("apple-m1-ultra-48c", 800, None),
    "Apple M1 Ultra 64c GPU": ("apple-m1-ultra-64c", 800, None),
    "Apple M2 10c GPU": ("macbook-air-m2", 100, None),
    "Apple M2 Pro 19c GPU": ("apple-m2-pro-19c", 200, None),
    "Apple M2 Max 38c GPU": ("apple-m2-max-38c", 400, None),
    "Apple M2 Ultra 76c GPU": ("apple-m2-ultra-76c", 800, None),
    "Apple M3 Pro 18c GPU": ("apple-m3-pro-18c", 150, None),
    "Apple M3 Max 40c GPU": ("apple-m3-max-40c", 400, None),
    "Apple M3 Ultra 80c GPU": ("apple-m3-ultra-80c", 800, None),
    "Apple M4 10c GPU": ("apple-m4-10c", 120, None),
    "Apple M4 (CPU)": ("apple-m4-10c", 120, None),
    "Apple M4 Pro 20c GPU": ("apple-m4-pro-20c", 273, None),
    "Apple M4 Max 40c GPU": ("apple-m4-max-40c", 546, None),
}


@pytest.mark.parametrize("hardware", PUBLISHED)
def test_the_machines_of_published_runs_are_here(hardware):
    name, bandwidth, memory = PUBLISHED[hardware]
    assert MACHINES[name]["bandwidth"] / 1e9 == pytest.approx(bandwidth, rel=0.03)
    assert memory is None or MACHINES[name]["memory"] / 1e9 == pytest.approx(memory, abs=0.1)


@pytest.mark.parametrize("name, measured", [("raspberry-pi-5", 14.0e9), ("i7-12700h", 54.3e9)])
def test_no_measured_bandwidth_exceeds_the_data_sheets(name, measured):
    assert 0.5 < measured / MACHINES[name]["bandwidth"] < 1


# ---- names ----


@pytest.mark.parametrize("name, message", [
    ("h100", r"machine='h100' is not in machines.toml; near matches: .*h100-(sxm|pcie|nvl)"),
    ("RTX-4090", "near matches: rtx-4090"), ("m1-max", "apple-m1-max"), ("", "machine=''"),
])
def test_an_unknown_name_gets_near_ones(name, message):
    with pytest.raises(ValueError, match=message):
        catalog.machine(name)
