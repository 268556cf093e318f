"""Figures, by what is drawn on them: the places of the dots are worked out by hand from round
numbers."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.lesson import plots
from clawdemy_infer.lesson.ledger import LedgerRow

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


def test_ratios_have_a_line_for_each_measured_row_and_a_dot_for_each_prediction(ax):
    rows = [
        LedgerRow("00", "both", "s", napkin=2.0, predicted=4.0, measured=6.0),
        LedgerRow("00", "not measured", "s", napkin=1.0),
        LedgerRow("00", "napkin only", "s", napkin=2.0, measured=1.0),
    ]
    plots.ratios(ax, rows)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["both", "napkin only"]
    drawn = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
             for line in ax.lines}
    assert drawn["over the napkin"] == [(3.0, 2), (0.5, 1)]
    assert drawn["over the calibrated roofline"] == [(1.5, 2)]
    assert ticks(ax.xaxis, [0.5, 1, 2]) == ["0.5×", "1×", "2×"]


def test_ratios_of_nothing_are_an_empty_figure(ax):
    plots.ratios(ax, [])
    ax.figure.canvas.draw()


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
