"""Figures, by what is drawn on them: the places of the dots are worked out by hand from round
numbers."""

import base64
from itertools import combinations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from clawdemy_course.drawing import contrast, ink
from clawdemy_course.figures import beside, mark, pareto, roofline, waterfall
from clawdemy_course.guesses import guesses
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
    roofline(ax, MACHINE, "bf16", intensities=(1, 1000))
    line = ax.lines[0]
    assert line.get_ydata()[[0, -1]] == pytest.approx([100e9, 2e12])
    assert max(line.get_ydata()) == pytest.approx(2e12)
    assert dots(ax) == [(20, 2e12)]
    assert line.get_label() == "round numbers"


def test_intensities_are_written_out_and_rates_carry_prefixes(ax):
    roofline(ax, MACHINE, "bf16")
    assert ticks(ax.xaxis, [0.1, 1, 10_000]) == ["0.1", "1", "10,000"]
    assert ticks(ax.yaxis, [100e9, 1e12]) == ["100 GFLOP/s", "1 TFLOP/s"]


@pytest.mark.parametrize(("flops", "bytes", "rate"), [(6e9, 3e9, 200e9), (9e12, 9e9, 2e12)],
                         ids=["memory-bound", "compute-bound"])
def test_a_mark_without_a_time_is_on_the_roof(ax, flops, bytes, rate):
    mark(ax, MACHINE, Work(flops, bytes, dtype="bf16"))
    assert dots(ax) == [(pytest.approx(flops / bytes), pytest.approx(rate))]


def test_a_mark_with_a_time_is_at_the_rate_that_the_work_ran_at(ax):
    mark(ax, MACHINE, Work(6e9, 3e9, dtype="bf16"), seconds=0.12, label="slow")
    assert dots(ax) == [(2, pytest.approx(50e9))]
    assert [text.get_text() for text in ax.texts] == ["slow"]


def test_a_mark_in_a_dtype_that_the_machine_has_no_figure_for_is_refused_and_draws_nothing(ax):
    with pytest.raises(ValueError, match="fp32.*bf16"):
        mark(ax, MACHINE, Work(1, 1, dtype="fp32"))
    assert not ax.lines


def test_a_waterfall_climbs_from_napkin_to_measured_and_says_so(ax):
    parts = [{"name": name, "napkin_s": napkin, "predicted_s": None, "measured_s": measured}
             for name, napkin, measured in (("qkv", 0.01, 0.016), ("attention", 0.004, 0.002))]
    row = LedgerRow("01", "time per token", "s", napkin=0.014, measured=0.02, parts=parts)
    text = waterfall(ax, row, account(row))
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
    guesses(ax, [
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


def lab(colour: str, vision: str) -> np.ndarray:
    """CIELAB of what one sees of `colour`, under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                       [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(VISION[vision] @ linear(colour), 0, 1) / [0.9505, 1, 1.089]
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def ciede2000(one, other) -> float:
    """How different two colours in CIELAB look (CIE 142-2001; Sharma, Wu and Dalal 2005)."""
    chroma = (np.hypot(*one[1:]) + np.hypot(*other[1:])) / 2
    stretch = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25**7))
    (L1, a1, b1), (L2, a2, b2) = ((L, a * stretch, b) for L, a, b in (one, other))
    C1, C2 = np.hypot(a1, b1), np.hypot(a2, b2)
    hue = np.degrees(np.arctan2(b1, a1))
    turn = (np.degrees(np.arctan2(b2, a2)) - hue + 180) % 360 - 180
    L, C, h = (L1 + L2) / 2 - 50, (C1 + C2) / 2, np.radians(hue + turn / 2)
    T = (1 - 0.17 * np.cos(h - np.radians(30)) + 0.24 * np.cos(2 * h)
         + 0.32 * np.cos(3 * h + np.radians(6)) - 0.20 * np.cos(4 * h - np.radians(63)))
    light = (L2 - L1) / (1 + 0.015 * L**2 / np.sqrt(20 + L**2))
    colourful = (C2 - C1) / (1 + 0.045 * C)
    hued = 2 * np.sqrt(C1 * C2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * C * T)
    blue = np.radians(30) * np.exp(-(((np.degrees(h) % 360 - 275) / 25) ** 2))
    rotation = -2 * np.sqrt(C**7 / (C**7 + 25**7)) * np.sin(2 * blue)
    return np.sqrt(light**2 + colourful**2 + hued**2 + rotation * colourful * hued)


@pytest.mark.parametrize(("one", "other", "difference"), [      # of Sharma's table 1
    ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
    ((50, 2.5, 0), (73, 25, -18), 27.1492),
    ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
    ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441)])
def test_differences_of_colours_are_those_of_the_published_table(one, other, difference):
    assert ciede2000(one, other) == pytest.approx(difference, abs=5e-5)


@pytest.mark.parametrize("factor", [1, *plots.BRIGHTNESS.values()])
@pytest.mark.parametrize(("vision", "least"), [
    ("all three", 23), ("protanopia", 13.5), ("deuteranopia", 13.5), ("tritanopia", 13.5)])
def test_no_two_colours_look_alike_whatever_cones_one_has(vision, least, factor):
    """A difference of 1 is just seen by eyes side by side, one of 10 at a glance."""
    for one, other in combinations([brighter(colour, factor) for colour in plots.COLOURS], 2):
        assert ciede2000(lab(one, vision), lab(other, vision)) > least, (one, other)


def brighter(colour: str, factor: float) -> str:
    """`colour` as the CSS filter `brightness(factor)` shows it (Filter Effects Module 1, 6.3)."""
    return "#" + bytes(min(255, round(factor * c)) for c in bytes.fromhex(colour[1:])).hex()


@pytest.mark.parametrize("colour", [*plots.COLOURS, plots.NAPKIN, plots.TEXT])
def test_colours_stand_out_from_a_light_and_from_a_dark_background(colour):
    """WCAG asks of graphics a contrast of 3. It asks of text 4.5, which no colour reaches on both
    backgrounds: the two contrasts multiply to that of white on black."""
    on_white, on_dark = contrast(colour, "#ffffff"), contrast(colour, "#111111")
    assert on_white * on_dark == pytest.approx(contrast("#ffffff", "#111111"))
    assert contrast("#ffffff", "#111111") < 4.5**2
    best = contrast("#ffffff", "#111111") ** 0.5                # 4.35
    assert min(on_white, on_dark) > (best - 0.02 if colour == plots.TEXT else 3)


@pytest.mark.parametrize(("light", "background"), [("true", "#ffffff"), ("false", "#111111")])
def test_in_both_themes_of_jupyterlab_text_can_be_read_and_lines_be_seen(light, background):
    factor = plots.BRIGHTNESS[light]
    assert contrast(brighter(plots.TEXT, factor), background) > 4.7
    for colour in (*plots.COLOURS, plots.NAPKIN):
        assert contrast(brighter(colour, factor), background) > 3.2, colour
    for colour in plots.COLOURS:                                # and the text on what is filled
        assert contrast(brighter(colour, factor), brighter(ink(colour), factor)) > 5, colour


def test_a_picture_follows_the_theme_at_the_price_of_200_bytes():
    html = plots.as_html("data:,", "a line", 800)
    assert html.startswith('<img alt="a line" width="800" class="drawn" src="data:,"><style>')
    for light, factor in (("true", 0.95), ("false", 1.05)):
        assert f"[data-jp-theme-light={light}] .drawn{{filter:brightness({factor})}}" in html
    assert len(html) - len('<img alt="a line" width="800" src="data:,">') < 200


def test_contrast_is_wcags():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#ffffff", "#777777") == pytest.approx(4.48, abs=0.005)    # the known near miss


def test_a_frontier_has_a_dot_for_each_batch_that_fits(ax):
    def row(batch, seconds, fits=True):
        return {"batch": batch, "fits": fits, "seconds": seconds,
                "tokens_per_s": batch / seconds if fits else None}

    pareto(ax, [row(1, 0.010), row(2, 0.016), row(4, None, fits=False)], label="one")
    pareto(ax, [row(1, 0.030)], label="another")
    one, another = (line.get_xydata().tolist() for line in ax.lines)
    assert (one, another) == ([[0.010, 100], [0.016, 125]], [[0.030, pytest.approx(100 / 3)]])
    assert [text.get_text() for text in ax.texts] == ["1", "2", "1"]
    left, right = ax.get_xlim()
    assert left == 0 and right > 0.030  # from zero, and wide enough for both
    assert ticks(ax.xaxis, [0.02]) == ["20 ms"]


def test_napkin_roofline_and_measurement_stand_beside_each_other_over_zero(ax):
    beside(ax, [64, 256], napkin=[0.010, 0.040], predicted=None, measured=[0.012, 0.050])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["napkin", "measured"]
    assert ax.get_ylim()[0] == 0
    assert ticks(ax.yaxis, [0.02]) == ["20 ms"]


def test_text_is_never_smaller_than_nine_points(ax):
    sizes = [plt.rcParams[name] for name in ("axes.titlesize", "legend.fontsize", "font.size")]
    assert min(sizes) >= 9
