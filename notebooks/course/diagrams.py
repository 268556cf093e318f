"""Pictures of the mechanisms of the lessons. Every number in them is computed by the library.

    machine      00   three numbers on a picture of a machine
    layer        01   a transformer layer with its bytes and FLOPs, for a decode step and a prompt
    generation   02   naive generation beside cached generation: which rows are computed
    cache        02   the KV cache as memory
    heads        03   MHA, GQA, MQA and MLA: what query heads read
    grouped      03   three ways to read shared KV heads
    windows      03   which tokens each layer remembers
    batch        04   rows of several sequences that share one reading of the weights
"""

from clawdemy_course.diagrams_00 import machine
from clawdemy_course.diagrams_01 import layer
from clawdemy_course.diagrams_02 import cache, generation
from clawdemy_course.diagrams_03 import grouped, heads, windows
from clawdemy_course.diagrams_04 import batch

__all__ = ["batch", "cache", "generation", "grouped", "heads", "layer", "machine", "windows"]
