"""Each Triton kernel at the sizes of Llama-3-8B (`clawdemy_kernels.examples`): what the roofline
allows, and on a GPU what the clock says beside PyTorch's own way."""

import torch

from clawdemy_infer.arithmetic import Work
from clawdemy_infer.envelope.roofline import Machine
from clawdemy_kernels.clock import seconds


@torch.inference_mode()
def kernel_rows(machine: Machine, copy: float | None = None) -> list[dict]:
    """Each kernel as predicted for `machine`, and with a `copy` bandwidth as timed on the GPU.

    bytes         that must move
    asked         bytes named by its loads and stores: what is asked for twice may come from a cache
    measured_s    the median with cold caches, without the time that Python takes to launch
    torch_s       the same of PyTorch, None where it has nothing alike; `over_torch` measured_s
    of_copy       bytes / measured_s as a fraction of the bandwidth that a copy reaches
    """
    from clawdemy_kernels.examples import LLAMA_3_8B, examples
    rows = []
    # Where nothing is launched nothing but sizes is needed: such tensors take no memory.
    for name, example in examples(LLAMA_3_8B, "meta" if copy is None else "cuda").items():
        prediction = machine.time(Work(example.flops, example.least, name, "bf16"))
        took = None if copy is None else seconds(example.launch)
        torch_s = seconds(example.torch) if took and example.torch else None
        rows.append({"kernel": name, "bytes": example.least, "asked": example.asked,
                     "flops": example.flops, "predicted_s": prediction.seconds,
                     "bound": prediction.bound, "measured_s": took,
                     "torch_s": torch_s, "over_torch": torch_s and torch_s / took,
                     "of_copy": took and example.least / took / copy})
    return rows
