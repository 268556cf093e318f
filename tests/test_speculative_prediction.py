"""What the parts of a round should cost: by bytes and started operations, and for compiled code by the rates of its products."""

import shutil

import pytest
import torch

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.linear import cpp_strips
from clawdemy_infer.model import Decoder, ModelConfig, Sampling, compiled
from clawdemy_infer.roofline import Machine
from clawdemy_infer.speculative import EarlyExit, ModelDraft, PromptLookup, SelfDraft, prediction
from clawdemy_infer.speculative.prediction import predict_costs

SHAPE = ModelShape(name="tiny", L=3, D=8, N=2, K=1, H=4, F=16, V=11, tied=True, max_context=64)
FREE = Machine("free", ((1.0, 1e30),), {"fp32": 1e30}, 1e9)
with_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")


def test_costs_are_predicted_from_bytes_and_from_the_operations_that_are_dispatched():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(SHAPE)).eval()
    drafts = {"lookup": PromptLookup(), "itself": ModelDraft(model), "exit": EarlyExit(model, 1)}
    bytes = Machine("bytes", ((1.0, 1.0),), {"fp32": 1e30}, 1e9)
    costs = predict_costs(bytes, model, drafts, 9, rows=(1, 4))
    assert costs.reading[1] == SHAPE.decode(1, 10, weights="fp32", kv="fp32", activations="fp32").bytes
    assert costs.c("itself") == 1 and costs.c("lookup") == 0 and 1 < costs.v(4) < 2
    layer = SHAPE.layer_parameters() * 4
    assert costs.reading[1] - costs.drafting["exit"] > 2 * layer                # two layers of three are not run
    slow = Machine("slow to start", ((1.0, 1e30),), {"fp32": 1e30}, 1e9, fixed_s_per_op=1.0)
    costs = predict_costs(slow, model, drafts, 9, rows=(1,))
    assert costs.reading[1] > 60 and costs.c("exit") < 0.6


@with_compiler
def test_a_compiled_check_costs_what_it_is_filled_up_to(monkeypatch):
    """At one FLOP a second all is counted by hand: 2 for each weight and row of the code, and what is besides the products."""
    torch.manual_seed(0)
    shape = ModelShape(name="small", L=3, D=64, N=2, K=1, H=32, F=96, V=50, tied=True, qk_norm=True, max_context=64)
    model = compiled(Decoder(ModelConfig(shape)).eval(), rows=(1, 5))
    draft = SelfDraft(compiled(Decoder(ModelConfig(shape)).eval(), "int8"))
    known = {(format, M, tall): 2.0 if tall else 1.0 for format, M in (("fp32", 1), ("fp32", 5), ("int8", 1)) for tall in (False, True)}
    monkeypatch.setattr(prediction, "compiled_rates", lambda kinds, D, F: {key: known[key] for key in known if key[:2] in kinds})
    monkeypatch.setattr(prediction, "besides_products", lambda layers, rows: {M: 1000.0 * M for M in rows})
    costs = predict_costs(FREE, model, {"int8": draft, "lookup": PromptLookup()}, 9, rows=(1, 3, 5, 6))
    down = shape.L * shape.D * shape.F
    weights = shape.matrix_parameters() + shape.D * shape.V - down / 2                  # tall ones at twice the rate
    assert costs.reading[1] == pytest.approx(2 * weights + 1000)
    assert costs.reading[3] == pytest.approx(costs.reading[5]) == pytest.approx(5 * (2 * weights + 1000))
    assert costs.reading[6] < 1                                                         # there is no code for it: by the roofline
    assert costs.drafting == {"int8": pytest.approx(2 * weights + 1000)}


@with_compiler
def test_rates_of_compiled_products_leave_out_what_a_call_costs(monkeypatch):
    monkeypatch.setattr(prediction, "NUMBERS", 2**20)
    monkeypatch.setattr(prediction, "COPIES", 3)
    found = prediction.compiled_rates((("fp32", 1), ("fp32", 2)), 64, 256)
    assert len(found) == 4 and all(rate > 1e8 for rate in found.values())
    assert set(prediction.besides_products(2, (1, 2))) == {1, 2}


def test_choosing_at_a_temperature_goes_over_the_vocabulary_more_often():
    slow = Machine("slow", ((1.0, 1.0),), {"fp32": 1e30}, 1e9)
    greedy, drawn = (prediction.choosing_s(slow, SHAPE, 3, False, sampling) for sampling in (Sampling(), Sampling(temperature=1.0)))
    assert (greedy, drawn) == (4 * 3 * 11, 40 * 3 * 11)


def test_products_in_cpp_run_at_what_the_probe_says_now_and_the_rest_at_memory(monkeypatch):
    """Memory is twice as fast as it was, which one row feels and eight do not. Between them: the mean of logarithms."""
    machine = Machine("now", ((1.0, 5.0),), {"fp32": 80.0}, 1e9, {"gemm": {"fp32": ((1, 10.0), (8, 80.0))}, "head": {"fp32": ((1, 20.0),)},
                                                                 "attention": {"fp32": ((1, 1.0),)}})
    monkeypatch.setattr(prediction, "probe", lambda format: None)
    monkeypatch.setattr(prediction, "gemm_step", lambda weights, m, dtype: m)
    monkeypatch.setattr(prediction, "rates", lambda steps, sample_s: {key: {1: 20.0, 8: 80.0}[key[1]] for key in steps})
    found = prediction.at_this_moment(machine, {"fp32"}, [1, 8])
    assert found.rates == {"gemm": {"fp32": ((1, 20.0), (8, 80.0))}, "head": {"fp32": ((1, 40.0), (8, 20.0))}}


@pytest.mark.skipif(not cpp_strips.available(), reason="no C++ compiler here, or a CPU without AVX512_BF16")
def test_a_step_in_cpp_is_predicted_by_its_products_and_its_few_operations(monkeypatch):
    torch.manual_seed(0)
    shape = ModelShape(name="small", L=3, D=64, N=2, K=1, H=32, F=96, V=50, tied=True, max_context=64)
    model = compiled(Decoder(ModelConfig(shape)).eval())
    slow = Machine("slow to start", ((1.0, 1e30),), {"fp32": 1e30}, 1e9, fixed_s_per_op=1.0)
    monkeypatch.setattr(prediction, "at_this_moment", lambda machine, formats, rows: machine.with_only_products())
    costs = predict_costs(slow, model, {}, 9, rows=(1, 4))
    eager = predict_costs(slow, Decoder(ModelConfig(shape)).eval(), {}, 9, rows=(1, 4))
    assert costs.reading[4] < eager.reading[4] / 2
