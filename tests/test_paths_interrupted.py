"""Ctrl-C at any line of a write leaves what was there before, or all that is new, and nothing
beside."""

import gc
import json
import shutil
import sys
from itertools import count
from random import Random

import pytest
import torch
from test_calibrate import RECORD

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.lesson import ledger
from clawdemy_infer.machine import calibrate
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.quantization import format_named, round_to_nearest
from clawdemy_infer.rigs.checkpoint import load_quantized, save_quantized

MOMENTS, LAST = 20, 60


def lines_of(work, line=None):
    """Do `work()`, and press Ctrl-C as its `line`-th line begins, counted from 0, in our files and
    those of the standard library. Returns how many lines began."""
    lines = count()

    def trace(frame, event, _):
        if any(part in frame.f_code.co_filename for part in ("/torch/", "<string>")):
            return None
        if event == "line" and next(lines) == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    gc.collect(0)                           # what an interrupted frame holds
    return next(lines)


def interruptions(work, before=lambda: None):
    """Yields after each time that `work()`, behind `before()`, was interrupted: at some lines, the
    same in every run, and at all of the last, where files move. It has been done before, so that
    nothing is left to be imported."""
    for _ in range(2):
        before()
        lines = lines_of(work)
    some = Random(0).sample(range(lines), min(lines, MOMENTS))
    for line in sorted({*some, *range(max(0, lines - LAST), lines)}):
        before()
        assert lines_of(work, line) == line + 1
        yield line


def test_a_calibration(tmp_path, monkeypatch):
    monkeypatch.setenv("CLAWDEMY_CACHE", str(tmp_path))
    path, written = tmp_path / "calibration-cpu.json", []

    def before():
        written.append(len(written))
        calibrate._keep(RECORD | {"fixed": {}, "reference": {"fp32": -1}}, {}, 0.0)

    def keep():
        calibrate._keep(RECORD | {"fixed": {}, "reference": {"fp32": len(written)}}, {}, 0.0)

    for _ in interruptions(keep, before):
        assert json.loads(path.read_bytes())["reference"]["fp32"] in (-1, len(written))
        assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("rows, tail", [(0, ""), (1, ""), (1, '{"lesson": "0'), (2, "cut")],
                         ids=["empty", "whole", "torn", "without its end"])
def test_a_ledger(tmp_path, rows, tail, recwarn):
    path = tmp_path / "ledger.jsonl"
    *some, new, last = [ledger.LedgerRow("01", f"row {i}", "s", 1.0, measured=2.0)
                        for i in range(rows + 2)]

    def before():
        path.write_text("")
        for row in some:
            ledger.append(row, path)
        text = path.read_text()
        path.write_text(text[:-1] if tail == "cut" else text + tail)

    before()
    old = path.read_text()
    for _ in interruptions(lambda: ledger.append(new, path), before):
        assert (text := path.read_text()) == old or text.endswith("}\n")
        assert (found := ledger.read(path)) in (some, [*some, new])
        ledger.append(last, path)
        assert ledger.read(path) == [*found, last]
        assert [*tmp_path.iterdir()] == [path]
    assert UserWarning not in [each.category for each in recwarn.list]


def test_a_quantized_checkpoint(tmp_path):
    torch.manual_seed(0)
    model = Decoder(ModelConfig(ModelShape(name="tiny", L=1, D=32, N=2, K=1, H=16, F=32, V=9,
                                           tied=True, max_context=9))).requires_grad_(False)
    made, out = round_to_nearest(model, format_named("int4")), tmp_path / "made"
    save_quantized(made, out)
    expected = {file.name: file.read_bytes() for file in out.iterdir()}
    assert load_quantized(out).tensors.keys() == made.tensors.keys()
    for _ in interruptions(lambda: save_quantized(made, out),
                           lambda: shutil.rmtree(out, ignore_errors=True)):
        assert [*tmp_path.iterdir()] in ([], [out])
        if out.exists():
            assert {file.name: file.read_bytes() for file in out.iterdir()} == expected
