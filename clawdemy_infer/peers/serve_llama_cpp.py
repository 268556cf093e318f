"""llama.cpp through its C interface: batches of our own making, so that nothing but llama.cpp itself is on the clock.

Flash attention is off, which is faster on a CPU at long contexts, and every sequence has a cache of its own (`kv_unified`), which is
faster for batches.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

import llama_cpp as c
import numpy as np
from serve import serve

FTYPES = {"F32": c.LLAMA_FTYPE_ALL_F32, "F16": c.LLAMA_FTYPE_MOSTLY_F16, "Q8_0": c.LLAMA_FTYPE_MOSTLY_Q8_0}
"""Formats that are made from the given file; any other name stands for the file as it is."""

MADE = Path(sys.prefix) / "models"
SILENT = c.llama_log_callback(lambda *_: None)
MOST = 512
"""Tokens of a batch: what llama.cpp computes at once by default."""


class LlamaCpp:
    version = c.__version__ if hasattr(c, "__version__") else ""

    def __init__(self, model: str, weights: str, threads: int, **_):
        c.llama_log_set(SILENT, None)
        c.llama_backend_init()
        self.threads = threads
        file = made(Path(model), weights, threads) if weights in FTYPES else Path(model)
        self.model = c.llama_model_load_from_file(bytes(file), c.llama_model_default_params())
        self.weight_bytes = c.llama_model_size(self.model)
        self.V = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.batch = c.llama_batch_init(MOST, 0, 1)

    def context(self, sequences: int, tokens: int):
        """Room for so many sequences of so many tokens each."""
        params = c.llama_context_default_params()
        params.n_seq_max, params.n_ctx, params.n_batch, params.n_ubatch = sequences, sequences * (-(-tokens // 256) * 256), MOST, MOST
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type, params.kv_unified = c.LLAMA_FLASH_ATTN_TYPE_DISABLED, False
        return c.llama_init_from_model(self.model, params)

    def run(self, context, work: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Decode (token, position, sequence, is its answer wanted), `MOST` at a time; the likeliest next token by sequence."""
        found = {}
        for first in range(0, len(work), MOST):
            part, batch = work[first:first + MOST], self.batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, wanted
            if code := c.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returned {code}")
            for i, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    found[sequence] = int(np.ctypeslib.as_array(c.llama_get_logits_ith(context, i), (self.V,)).argmax())
        return found

    def generate(self, prompts: list[list[int]], new: int) -> dict:
        return self.serve(prompts, [new] * len(prompts), len(prompts), self.context(len(prompts), len(prompts[0]) + new))

    def trace(self, prompts: list[list[int]], new: list[int], running: int) -> dict:
        longest = max(len(prompt) + n for prompt, n in zip(prompts, new, strict=True))
        served = self.serve(prompts, new, running, self.context(running, longest))
        return {"seconds": served["prefill_s"] + served["decode_s"]}

    def serve(self, prompts: list[list[int]], new: list[int], running: int, context) -> dict:
        """Continuous batching: whoever is free takes the next request; its prompt goes through together with the others' next tokens."""
        memory, start, first, already = c.llama_get_memory(context), time.perf_counter(), None, 0
        tokens: list[list[int]] = [[] for _ in prompts]
        waiting, slots = list(range(len(prompts))), {}                          # slots: sequence -> request
        while waiting or slots:
            for sequence in range(running):
                if waiting and sequence not in slots:
                    slots[sequence] = waiting.pop(0)
            work = []
            for sequence, request in slots.items():
                prompt, done = prompts[request], tokens[request]
                if done:
                    work.append((done[-1], len(prompt) + len(done) - 1, sequence, True))
                else:
                    work += [(token, i, sequence, i == len(prompt) - 1) for i, token in enumerate(prompt)]
            for sequence, token in self.run(context, work).items():
                request = slots[sequence]
                tokens[request].append(token)
                if len(tokens[request]) == new[request]:
                    del slots[sequence]
                    c.llama_memory_seq_rm(memory, sequence, -1, -1)
            if first is None and all(tokens):
                first, already = time.perf_counter(), sum(map(len, tokens))
        end = time.perf_counter()
        c.llama_free(context)
        return {"tokens": tokens, "prefill_s": first - start, "decode_s": end - first, "decode_tokens": sum(new) - already}


def made(source: Path, weights: str, threads: int) -> Path:
    """The same weights in another format, by llama.cpp's own quantizer, kept in this environment."""
    file = MADE / f"{source.stem}.{weights}.gguf"
    if not file.exists():
        MADE.mkdir(exist_ok=True)
        params = c.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = FTYPES[weights], True, threads
        part = file.with_suffix(".part")
        if code := c.llama_model_quantize(bytes(source), bytes(part), ctypes.byref(params)):
            raise RuntimeError(f"llama_model_quantize returned {code}")
        part.rename(file)
    return file


if __name__ == "__main__":
    serve(LlamaCpp)
