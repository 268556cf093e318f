"""The same steps, faster: one door, `faster(model, weights, backend, compile)`.

In reading order: `formats` and `codes` (what a weight is kept in), `kernels` (what multiplies by
each, and the table that chooses), `layers` (a linear layer of packed weights); then one engine a
device, which runs whole steps: `cpp_step` for a CPU (`cpp/` has the C++), `triton_step` and
`recorded` for a GPU; `faster` joins them to a model. What a step starts and how long its parts
take, on any engine: `launches`, `watched`.
"""

from clawdemy_infer.fast.codes import Codes, int4_codes, int8_codes
from clawdemy_infer.fast.formats import FLOATS, FORMATS, computes_in, copy_of, packable
from clawdemy_infer.fast.layers import PackedLinear

__all__ = [
    "FLOATS", "FORMATS", "Codes", "PackedLinear", "computes_in", "copy_of", "int4_codes",
    "int8_codes", "packable"
]
