"""Figures, by what is drawn on them: the places of the dots are worked out by hand from round
numbers."""

import base64
from itertools import combinations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.lesson import plots
from clawdemy_infer.lesson.ledger import LedgerRow
from clawdemy_infer.lesson.waterfall import account

# 2 TFLOP/s over 100 GB/s: the ridge is at 20
MACHINE = Machine("round numbers", ((1.0, 100e9),), {"bf16": 2e12}, memory=1e9)


@pytest.fixture
def ax():
    with matplotlib.rc_context():
        plots.use_style()
        _, ax = plt.subplots()
        yield ax
        plt.close("all")


def dots(ax) -> list[tuple[float, float]]:
    """The single points on the axes, in the order in which they were drawn."""
    return [(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines
            if len(line.get_xdata()) == 1]


def ticks(axis, values) -> list[str]:
    return [axis.get_major_formatter()(value, 0) for value in values]


def test_a_roofline_rises_with_the_bandwidth_turns_at_the_ridge_and_stays_at_the_peak(ax):
    plots.roofline(ax, MACHINE, "bf16", intensities=(1, 1000))
    line = ax.lines[0]
    assert line.get_ydata()[[0, -1]] == pytest.approx([100e9, 2e12])
    assert max(line.get_ydata()) == pytest.approx(2e12)
    assert dots(ax) == [(20, 2e12)]
    assert line.get_label() == "round numbers"


def test_intensities_are_written_out_and_rates_carry_prefixes(ax):
    plots.roofline(ax, MACHINE, "bf16")
    assert ticks(ax.xaxis, [0.1, 1, 10_000]) == ["0.1", "1", "10,000"]
    assert ticks(ax.yaxis, [100e9, 1e12]) == ["100 GFLOP/s", "1 TFLOP/s"]


@pytest.mark.parametrize(("flops", "bytes", "rate"), [(6e9, 3e9, 200e9), (9e12, 9e9, 2e12)],
                         ids=["memory-bound", "compute-bound"])
def test_a_mark_without_a_time_is_on_the_roof(ax, flops, bytes, rate):
    plots.mark(ax, MACHINE, Work(flops, bytes, dtype="bf16"))
    assert dots(ax) == [(pytest.approx(flops / bytes), pytest.approx(rate))]


def test_a_mark_with_a_time_is_at_the_rate_that_the_work_ran_at(ax):
    plots.mark(ax, MACHINE, Work(6e9, 3e9, dtype="bf16"), seconds=0.12, label="slow")
    assert dots(ax) == [(2, pytest.approx(50e9))]
    assert [text.get_text() for text in ax.texts] == ["slow"]


def test_a_mark_in_a_dtype_that_the_machine_has_no_figure_for_is_refused_and_draws_nothing(ax):
    with pytest.raises(ValueError, match="fp32.*bf16"):
        plots.mark(ax, MACHINE, Work(1, 1, dtype="fp32"))
    assert not ax.lines


def test_a_waterfall_climbs_from_napkin_to_measured_and_says_so(ax):
    parts = [{"name": name, "napkin_s": napkin, "predicted_s": None, "measured_s": measured}
             for name, napkin, measured in (("qkv", 0.01, 0.016), ("attention", 0.004, 0.002))]
    row = LedgerRow("01", "time per token", "s", napkin=0.014, measured=0.02, parts=parts)
    text = plots.waterfall(ax, row, account(row))
    bars = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in ax.patches]
    assert bars == [pytest.approx(ends) for ends in (
        (0, 0.014), (0.014, 0.020), (0.020, 0.018), (0.018, 0.020), (0, 0.020))]
    assert [label.get_text().replace("\n", " ") for label in ax.get_xticklabels()] == [
        "napkin", "products", "attention", "not explained", "measured"]
    assert [label.get_text() for label in ax.texts] == [
        "14.0 ms", "+6.00 ms", "-2.00 ms", "+2.00 ms", "20.0 ms"]
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 0.020
    assert [bar.get_hatch() for bar in ax.patches] == [None, None, None, "//", None]
    assert ax.get_title("left") == "time per token\nProducts: +6.00 ms, 100% of the +6.00 ms"
    assert text.startswith("Waterfall of time per token: napkin 14.0 ms; products +6.00 ms; "
                           "attention -2.00 ms; not explained +2.00 ms; measured 20.0 ms. Products")


def test_guesses_stand_over_their_lessons_and_late_ones_are_rings(ax):
    plots.guesses(ax, [
        LedgerRow("01 counting", "a", "s", napkin=1.0, measured=2.0, guess=8.0),
        LedgerRow("00 machine", "b", "s", napkin=1.0, measured=2.0, guess=1.0),
        LedgerRow("01 counting", "c", "s", napkin=1.0, measured=2.0, guess=2.0, late=True),
        LedgerRow("02 cache", "no guess", "s", napkin=1.0, measured=2.0),
        LedgerRow("02 cache", "not measured", "s", napkin=1.0, guess=2.0)])
    in_time, late = (sorted(map(tuple, line.get_xydata())) for line in ax.lines[:2])
    assert (in_time, late) == ([(0, 0.5), (1, 4.0)], [(1, 1.0)])
    assert ax.lines[1].get_markerfacecolor() == "none" != ax.lines[0].get_markerfacecolor()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["00", "01"]


def test_a_figure_is_shown_with_its_alternative_text_and_closed(ax, monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", lambda bundle, raw: shown.append(bundle))
    plots.show(ax.figure, 'bandwidth "now" < calibrated')
    [bundle] = shown
    assert bundle["text/plain"] == 'bandwidth "now" < calibrated'
    assert 'alt="bandwidth &quot;now&quot; &lt; calibrated"' in bundle["text/html"]
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["image/png"] in bundle["text/html"] and not plt.get_fignums()


# Linear sRGB as those see it who lack one kind of cone (Machado, Oliveira and Fernandes 2009).
VISION = {
    "all three": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]]}


def linear(colour: str) -> np.ndarray:
    c = np.array(matplotlib.colors.to_rgb(colour))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("vision", VISION)
def test_no_two_colours_look_alike_whatever_cones_one_has(vision):
    def lab(colour):
        to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                           [0.0193, 0.1192, 0.9505]])
        seen = np.clip(VISION[vision] @ linear(colour), 0, 1)
        x, y, z = np.cbrt(to_xyz @ seen / [0.9505, 1, 1.089])
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])

    for one, other in combinations(plots.COLOURS, 2):
        assert np.linalg.norm(lab(one) - lab(other)) > 25, (one, other)


@pytest.mark.parametrize("colour", [*plots.COLOURS, plots.NAPKIN, plots.TEXT])
def test_colours_stand_out_from_a_light_and_from_a_dark_background(colour):
    light = linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05
    need = 4.2 if colour == plots.TEXT else 2.75    # WCAG's contrast; JupyterLab's dark is #111111
    assert min(1.05 / light, light / (linear("#111111")[0] + 0.05)) > need


def test_a_frontier_has_a_dot_for_each_batch_that_fits(ax):
    def row(batch, seconds, fits=True):
        return {"batch": batch, "fits": fits, "seconds": seconds,
                "tokens_per_s": batch / seconds if fits else None}

    plots.pareto(ax, [row(1, 0.010), row(2, 0.016), row(4, None, fits=False)], label="one")
    plots.pareto(ax, [row(1, 0.030)], label="another")
    one, another = (line.get_xydata().tolist() for line in ax.lines)
    assert (one, another) == ([[0.010, 100], [0.016, 125]], [[0.030, pytest.approx(100 / 3)]])
    assert [text.get_text() for text in ax.texts] == ["1", "2", "1"]
    left, right = ax.get_xlim()
    assert left == 0 and right > 0.030  # from zero, and wide enough for both
    assert ticks(ax.xaxis, [0.02]) == ["20 ms"]


def test_napkin_roofline_and_measurement_stand_beside_each_other_over_zero(ax):
    plots.beside(ax, [64, 256], napkin=[0.010, 0.040], predicted=None, measured=[0.012, 0.050])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["napkin", "measured"]
    assert ax.get_ylim()[0] == 0
    assert ticks(ax.yaxis, [0.02]) == ["20 ms"]


def test_text_is_never_smaller_than_nine_points(ax):
    sizes = [plt.rcParams[name] for name in ("axes.titlesize", "legend.fontsize", "font.size")]
    assert min(sizes) >= 9
