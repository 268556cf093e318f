"""What the parts of a round should cost: by bytes and started operations, and where a step is one
call by the rates of its products."""

import shutil

import pytest
import torch

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.machine.calibrated import Calibrated, Speeds
from clawdemy_infer.model import Decoder, ModelConfig, Sampling
from clawdemy_infer.rigs import compare_drafts
from clawdemy_infer.rigs.compare_drafts import predict_costs
from clawdemy_infer.speculative import ModelDraft, PromptLookup
from clawdemy_infer.variants.self_drafts import EarlyExit

SHAPE = ModelShape(name="tiny", L=3, D=8, N=2, K=1, H=4, F=16, V=11, tied=True, max_context=64)


def test_costs_are_predicted_from_bytes_and_from_the_operations_that_are_dispatched():
    torch.manual_seed(0)
    model = Decoder(ModelConfig(SHAPE)).eval()
    drafts = {"lookup": PromptLookup(), "itself": ModelDraft(model), "exit": EarlyExit(model, 1)}
    bytes = Machine("bytes", ((1.0, 1.0),), {"fp32": 1e30}, 1e9)
    costs = predict_costs(bytes, model, drafts, 9, rows=(1, 4))
    assert costs.seconds[1] == SHAPE.decode(1, 10, weights="fp32", kv="fp32",
                                            activations="fp32").bytes
    assert costs.c("itself") == 1 and costs.c("lookup") == 0 and 1 < costs.v(4) < 2
    layer = SHAPE.layers[0].parameters() * 4
    assert costs.seconds[1] - costs.seconds["exit"] > 2 * layer  # two layers of three are not run
    slow = Machine("slow to start", ((1.0, 1e30),), {"fp32": 1e30}, 1e9, fixed_s_per_op=1.0)
    costs = predict_costs(slow, model, drafts, 9, rows=(1,))
    assert costs.seconds[1] > 60 and costs.c("exit") < 0.6


def test_choosing_at_a_temperature_goes_over_the_vocabulary_more_often():
    slow = Machine("slow", ((1.0, 1.0),), {"fp32": 1e30}, 1e9)
    greedy, drawn = (compare_drafts.sampling_seconds(slow, SHAPE, 3, sampling)
                     for sampling in (Sampling(), Sampling(temperature=1.0)))
    assert (greedy, drawn) == (4 * 3 * 11, 40 * 3 * 11)


def test_a_machine_is_taken_at_its_present_speed(monkeypatch):
    """Memory is twice as fast as it was, and all that the model does is bound by it."""
    torch.manual_seed(0)
    model = Decoder(ModelConfig(SHAPE)).eval()
    machine = Calibrated("then", ((1.0, 1.0),), {"fp32": 1e30}, 1e9)
    usual = predict_costs(machine, model, {}, 9, rows=(1,)).seconds[1]
    monkeypatch.setattr(compare_drafts, "at_present",
                        lambda machine: machine.at(Speeds(memory=2.0)))
    assert predict_costs(machine, model, {}, 9, rows=(1,)).seconds[1] == usual / 2


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler here")
def test_a_step_in_cpp_is_predicted_by_its_products_and_its_few_operations():
    torch.manual_seed(0)
    shape = ModelShape(name="small", L=3, D=64, N=2, K=1, H=32, F=96, V=50, tied=True,
                       max_context=64)
    model = faster(Decoder(ModelConfig(shape)).eval(), compile=True)
    slow = Machine("slow to start", ((1.0, 1e30),), {"fp32": 1e30}, 1e9, fixed_s_per_op=1.0)
    costs = predict_costs(slow, model, {}, 9, rows=(1, 4))
    eager = predict_costs(slow, Decoder(ModelConfig(shape)).eval(), {}, 9, rows=(1, 4))
    assert costs.seconds[4] < eager.seconds[4] / 2
