"""Tables of runs as users bring them: whole, torn, or not tables at all. And the fit behind the
predictions."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawdemy_infer.cli import main as cli
from clawdemy_infer.published import (
    FIGURES,
    Demand,
    Evidence,
    Stack,
    contradictions,
    fit,
    read,
    simpler,
    verdicts,
)
from clawdemy_infer.published.demand import Op
from clawdemy_infer.published.rows import NUMBERS, TEXT
from clawdemy_infer.published.setting import Chip
from clawdemy_infer.published.summary import aims_table, contradictions_table

# Every data sheet true and nothing else costing anything: the naive bound, kernel by kernel.
IDEAL = dict.fromkeys(FIGURES, 1.0) | {"overlap": 64.0, "gap": 0.0, "unpack": 0.0,
                                       "all_reduce": 0.0}
A_RUN = {
    "id": "x1", "category": "decode_bs1", "model": "Llama-3.1-8B", "params_B": "8.03",
    "active_params_B": "8.03", "layers": "32", "d_model": "4096", "n_heads": "32",
    "n_kv_heads": "8", "head_dim": "128", "d_ff": "14336", "vocab": "128256", "tied": "0",
    "weight_dtype": "bf16", "weight_bits_eff": "16", "act_dtype": "bf16", "kv_dtype": "bf16",
    "hardware": "H100-80GB SXM", "n_devices": "1", "tp": "1", "peak_bw_GBps_per_device": "3350",
    "peak_TFLOPs_per_device": "989", "mem_GB_per_device": "85.9", "batch": "1",
    "decode_context": "512", "metric": "decode_ms", "value": "6.6", "unit": "ms/token",
    "software": "vLLM", "source": "a/b",
}


@pytest.fixture
def table(tmp_path):
    """Writes rows, given as what differs from A_RUN, and returns the path."""
    def write(*changes, columns=(*TEXT, *NUMBERS)):
        path = tmp_path / "runs.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(A_RUN | change for change in changes)
        return path
    return write


@pytest.fixture(scope="module")
def evidence():
    return Evidence()


def statuses(path, evidence):
    return [(row.status, row.reason) for row in verdicts(read(path), evidence)]


# ---- files ----


def test_a_file_of_the_same_columns_is_judged_whatever_their_order(table, evidence):
    path = table({}, columns=(*reversed(NUMBERS), *TEXT, "a column of one's own"))
    assert statuses(path, evidence)[0][0] == "ok"


def test_a_file_without_the_columns_is_refused_with_its_first_line(table):
    with pytest.raises(
            ValueError,
            match=r"runs\.csv', line 1: no column batch; those of data/published_runs\.csv"):
        read(table({}, columns=[name for name in (*TEXT, *NUMBERS) if name != "batch"]))


@pytest.mark.parametrize("content, said", [
    (b"", "line 1: no column id"),
    (b"\xff\xfe\x00hello", "UTF-8"),
    (b"a,b,c\n1,2,3\n", "line 1: no column id, category, model and 35 more"),
])
def test_what_is_no_table_is_refused(tmp_path, content, said):
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="csv=.*" + said):
        read(path)


@pytest.mark.parametrize("torn", ["x2,decode_bs1", "," * 60])
def test_a_line_of_another_length_is_its_rows_problem_with_its_number(table, evidence, torn):
    path = table({}, {"id": "x3"})
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1], torn, lines[2]]))
    first, odd, last = statuses(path, evidence)
    assert first[0] == last[0] == "ok"
    assert odd == ("inexpressible", "line 3: it has not as many cells as the header")


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="csv=.*No such file"):
        read(tmp_path / "none.csv")


# ---- rows ----


@pytest.mark.parametrize("change, said", [
    ({"value": "fast"}, "value='fast' is not a number"),
    ({"value": ""}, "no published value"),
    ({"value": "-3"}, "value='-3' is below zero"),
    ({"value": "0"}, "no published value"),
    ({"gamma": "-1"}, "gamma='-1' is below zero"),
    ({"value": "nan"}, "value='nan' is not a number"),
    ({"batch": "many"}, "batch='many' is not a number"),
    ({"batch": "0"}, "batch=0"),
    ({"params_B": "1e18"}, "params_B='1e18' is not between 1e-12 and 1e+12"),
    ({"value": "1e-300"}, "value='1e-300' is not between"),
    ({"category": "cpu_decode_bs1", "value": "fast"}, "value='fast' is not a number"),
    ({"category": "cpu_decode_bs1", "batch": "0"}, "batch=0"),
    ({"batch": "1.5"}, "batch=1.5"),
    ({"tp": "3"}, "tp=3 does not divide the 32 query heads"),
    ({"peak_bw_GBps_per_device": ""}, "the bandwidth is not stated"),
    ({"weight_bits_eff": ""}, "the width of the weights is not stated"),
    ({"model": "unheard of", "layers": "1e9"}, "layers=1e+09: at most 1,000"),
    ({"model": "unheard of", "layers": ""}, "layers is not stated"),
    ({"model": "unheard of", "n_kv_heads": "5"}, "KV heads must divide"),
    ({"metric": "joules"}, "metric 'joules'"),
    ({"metric": "ttft_ms"}, "prompt_len is not stated"),
    ({"metric": "gemm_ms", "notes": "a big one"}, "[M,K]x[K,N]"),
    ({"metric": "allreduce_ms"}, "size of the message"),
    ({"gamma": "4", "draft_model": "small", "draft_params_B": "1"}, "alpha"),
    ({"id": "id", "category": "category", "value": "value"}, "value='value' is not a number"),
])
def test_a_row_that_cannot_be_expressed_is_kept_and_says_why(table, evidence, change, said):
    status, reason = statuses(table(change, {"id": "x2"}), evidence)[0]
    assert status == "inexpressible" and said in reason
    assert statuses(table(change, {"id": "x2"}), evidence)[1][0] == "ok"


ODD = st.sampled_from(["", "0", "-1", "-0", "1e12", "1e18", "1e300", "1e-300", "1e-12", "nan",
                       "inf",
                       "x", "1.5", "3", "1000000007", "9" * 320, "é", "a\nb"])


@given(st.dictionaries(st.sampled_from([*NUMBERS, *TEXT]), ODD, min_size=1, max_size=4),
       st.sampled_from(["decode_bs1", "cpu_decode_bs1", "serving_throughput", "gemm_profile"]))
@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_stands_in_a_row_is_its_own_status(table, evidence, cells, category):
    runs = read(table({"category": category} | cells, {"id": "x2"}))
    rows = verdicts(runs, evidence)
    assert rows[1].status == "ok" and rows[0].status in ("ok", "impossible", "inexpressible")
    json.dumps([row.as_dict() for row in rows], allow_nan=False)
    aims_table(rows, simpler(runs, evidence)), contradictions_table(contradictions(runs))


def test_a_row_of_another_kind_of_chip_is_predicted_with_what_is_known_of_chips(table, evidence):
    (status, _), = statuses(table({"hardware": "Some New Accelerator"}), evidence)
    assert status == "ok"


def test_unpacking_and_batches_and_lengths_cost_time(table, evidence):
    """More of anything is never faster."""
    def seconds(**change):
        return next(iter(verdicts(read(table(change | {"value": "1000"})), evidence))).predicted
    assert seconds() < seconds(decode_context="8192") < seconds(decode_context="8192", batch="8")
    assert seconds(weight_bits_eff="4.5", weight_dtype="int4") < seconds(
        weight_bits_eff="8", weight_dtype="int8") < seconds()
    assert seconds(tp="2", n_devices="2") < seconds()
    assert seconds(software="gpt-fast") < seconds(software="transformers")


# ---- the fit ----


def made(compute=0.0, memory=0.0, kernels=0.0, **more) -> Demand:
    return Demand(Chip(GHz=1.0), 1.0, rate=False, ops=[Op(compute, memory)], kernels=kernels,
                  **more)


def test_ideal_figures_give_the_larger_of_compute_and_memory():
    stack = Stack([made(2.0, 1.0, kernels=9), made(1.0, 3.0), made(0.0, 3.0), made(2.0, 0.0)])
    assert stack.seconds(IDEAL) == pytest.approx([2, 3, 3, 2], rel=1e-9)


def test_overlap_goes_from_the_sum_to_the_maximum():
    def seconds(p):
        return float(Stack([made(3.0, 4.0)]).seconds(IDEAL | {"overlap": p})[0])

    assert seconds(1.0) == pytest.approx(7) and seconds(2.0) == pytest.approx(5) and seconds(
        50.0) == pytest.approx(4)


def test_terms_add_up_and_are_what_they_are_called():
    figures = IDEAL | {"gap": 1e9, "all_reduce": 2.0, "link": 0.5, "bandwidth": 0.5}
    stack = Stack([made(0.0, 3.0, kernels=7, all_reduces=5, sent=11.0)])
    terms = {name: float(value[0]) for name, value in stack.terms(figures).items()}
    assert terms == {
        "memory": 6.0, "compute": 0.0, "unpack": 0.0, "fixed": 7.0, "communication": 32.0
    }


def test_a_fit_finds_the_figures_that_made_the_data():
    """Rows made by known figures, without noise: memory alone, compute alone, kernels alone."""
    rng = np.random.default_rng(0)
    true = {name: figure.start
            for name, figure in FIGURES.items()
            } | {"bandwidth": 0.6, "tile": 0.5, "gap": 20000.0, "overlap": 3.0}
    plans = [made(*rng.uniform(0, 1, 2) ** 4, kernels=rng.integers(0, 20000)) for _ in range(300)]
    seconds = Stack(plans).seconds(true)
    found = fit(plans, list(seconds), [str(index % 10) for index in range(300)])
    for name in ("bandwidth", "tile", "gap"):
        assert found[name] == pytest.approx(true[name], rel=0.03), name


def test_one_wild_row_does_not_move_a_fit():
    rng = np.random.default_rng(1)
    plans = [made(memory=x, compute=x / 50) for x in rng.uniform(0.1, 1, 60)]
    seconds = [plan.ops[0].memory / 0.7 for plan in plans]
    calm = fit(plans, seconds, ["a"] * 60)
    wild = fit(plans, [1000 * seconds[0], *seconds[1:]], ["a"] * 60)
    assert wild["bandwidth"] == pytest.approx(calm["bandwidth"], rel=0.01)


def test_shares_of_a_data_sheet_stay_below_one():
    plans = [made(memory=x, compute=x) for x in (0.1, 0.2, 0.4)]
    # three times as fast as can be
    found = fit(plans, [plan.ops[0].memory / 3 for plan in plans], ["a", "b", "c"])
    assert max(found[name] for name in ("bandwidth", "tile", "link")) <= 1


def test_the_same_rows_give_the_same_figures(evidence):
    assert Evidence().without(None) == evidence.without(None)


def test_rows_that_went_wrong_teach_nothing(evidence):
    taught = {run.category for run in evidence.runs}
    assert not any(word in category
                   for category in taught
                   for word in ("failure", "negative", "reference", "speculative"))
    rejected = [run for run in read() if run.category == "negative_control"]
    assert Evidence([*evidence.runs,
                     *(run.changed(category="decode_bs1")
                       for run in rejected)]).without(None) == evidence.without(None)


# ---- the command ----


def run(capsys, *arguments):
    try:
        code = cli.main(["published", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_json_is_one_object_with_the_names_that_scripts_rely_on(capsys, table):
    code, out, err = run(capsys, "--csv",
                         table({}, {"id": "x2", "category": "other", "value": "0.1"}), "--json")
    result = json.loads(out)
    assert code == 0 and err == "" and out.count("\n") == 1
    assert [row["id"] for row in result["rows"]] == ["x1", "x2"]
    assert {"id", "category", "source", "status", "reason", "predicted", "published",
            "ratio"} <= set(result["rows"][0])
    assert [row["status"] for row in result["rows"]] == ["ok", "impossible"]
    assert set(result["summary"]) == {"decode_bs1", "other"}
    assert {"n", "median_error", "p90_error", "within_25"} <= set(result["summary"]["decode_bs1"])
    assert result["summary"]["decode_bs1"]["n"] == 1 and result["summary"]["other"]["n"] == 0


def test_a_category_is_chosen_and_an_unknown_one_refused(capsys):
    code, out, _ = run(capsys, "--category", "negative_control", "--json")
    assert code == 0 and {row["status"] for row in json.loads(out)["rows"]} == {"impossible"}
    code, out, err = run(capsys, "--category", "negative")
    assert code == 2 and out == ""
    assert "category='negative' is not supported; accepted: allreduce" in err


def test_the_page_shows_rows_reasons_sources_aims_and_figures(capsys):
    code, out, _ = run(capsys)
    assert code == 0
    for words in ("400 rows", "does not fit: 138.0 GB", "the width of the weights is not stated",
                  "IST-DASLab/gptq", "decode at batch 1", "naive bound", "clock cycles",
                  "far apart"):
        assert words in out, words


def test_the_scoreboard_in_the_results_is_what_is_printed(capsys):
    page = (Path(__file__).parents[1] / "notebooks" / "RESULTS.md").read_text(encoding="utf-8")
    shown = page.split("$ clawdemy-infer published\n")[1].split("```")[0]
    printed = [line.rstrip() for line in run(capsys)[1].splitlines()]
    table = [line for line in shown.splitlines() if line != "…"]
    assert len(table) > 5 and "\n".join(table) in "\n".join(printed)


def test_an_unreadable_file_is_one_line_that_names_the_argument(capsys, tmp_path):
    code, out, err = run(capsys, "--csv", tmp_path / "none.csv")
    assert code == 2 and out == "" and err.count("\n") == 1 and "csv=" in err
