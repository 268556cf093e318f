"""Other engines on the same work: transformers, llama.cpp and vLLM beside ours, in turn, in one call.

In reading order: `contestants` (who takes part, in which formats, and how each is set up), `workloads` (what they are asked to do),
`worker` (a process that one of them lives in), `race` (all of them in turn), `result` (tokens/s, ratios, fractions of the bound).
`serve` and the `serve_*` are the other side of the talk and run in the engines' own environments; nothing imports them from here.
"""
