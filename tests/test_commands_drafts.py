"""`bench --drafts`, on a model of a few thousand parameters."""

import json

import pytest
import torch

from clawdemy_infer import files
from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.cli.main import main
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.rigs import prompts


@pytest.fixture
def small(monkeypatch):
    torch.manual_seed(0)
    shape = ModelShape("small", L=2, D=24, N=6, K=2, H=8, F=40, V=97, max_context=256)
    machine = Machine("a test machine", ((1.0, 1e9),), {"fp32": 1e12, "bf16": 1e12}, memory=1e9)
    monkeypatch.setattr(files, "load_model", lambda *_, **__: Decoder(ModelConfig(shape)).eval())
    monkeypatch.setattr("clawdemy_infer.machine.calibrate.this_machine", lambda *_: machine)
    monkeypatch.setattr(prompts, "prompts_of", lambda model: {"prose": [5, 6, 7, 5, 6]})


def test_each_draft_has_a_row_for_each_text_and_way_to_choose(small, capsys):
    line = ["bench", "--drafts", "lookup,exit:1", "--tokens", "6", "--rounds", "1", "--gamma", "2"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "a check of 5 tokens" in out and "a step of exit:1" in out and "{" not in out
    assert main([*line, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(row["mode"], row["draft"], row["prompt"]) for row in result["rows"]] == [
        (mode, draft, "prose") for mode in ("greedy", "T = 1") for draft in ("lookup", "exit:1")]
    assert [row["identical"] for row in result["rows"]] == [True, True, None, None]
    assert all(len(row["tokens"]) == 6 and row["measured"] > 0 for row in result["rows"])
    assert all(part["predicted"] > 0 for part in result["card"] if part["part"] != "a step of "
               "lookup")
