"""Other engines on the same work: transformers, llama.cpp and vLLM beside ours, in turn.

In reading order: `contestants` (who takes part, what they do), `race` (a process for each, all in
turn), `result` (tokens/s, ratios, fractions of the bound). `serve` and the `serve_*` run in the
engines' own environments; nothing imports them from here.
"""
