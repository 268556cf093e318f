"""llama.cpp through its C interface, in batches of our own making: nothing else is on the clock.
Faster on a CPU: no flash attention at long contexts, and in batches a cache for each sequence."""

import ctypes
import sys
import time
from pathlib import Path

import llama_cpp as c
import numpy as np

FTYPES = {"F32": c.LLAMA_FTYPE_ALL_F32, "F16": c.LLAMA_FTYPE_MOSTLY_F16,
          "Q8_0": c.LLAMA_FTYPE_MOSTLY_Q8_0}
"""Formats that are made from the given file; any other name stands for the file as it is."""
BATCH_TOKENS = 512              # what llama.cpp computes at once by default
SILENT = c.llama_log_callback(lambda *_: None)


class Engine:
    version = getattr(c, "__version__", "")

    def __init__(self, model: str, weights: str, threads: int, **_):
        c.llama_log_set(SILENT, None)
        c.llama_backend_init()
        self.threads = threads
        file = made(Path(model), weights, threads) if weights in FTYPES else Path(model)
        self.model = c.llama_model_load_from_file(bytes(file), c.llama_model_default_params())
        self.weight_bytes = c.llama_model_size(self.model)
        self.V = c.llama_vocab_n_tokens(c.llama_model_get_vocab(self.model))
        self.batch = c.llama_batch_init(BATCH_TOKENS, 0, 1)

    def generate(self, prompts: list[list[int]], new: int) -> dict:
        context = self.context(len(prompts), max(map(len, prompts)) + new)
        work = [(token, i, sequence, i == len(prompt) - 1)  # (token, position, sequence, wanted)
                for sequence, prompt in enumerate(prompts) for i, token in enumerate(prompt)]
        steps, times = [], [time.perf_counter()]
        for step in range(new):
            steps.append(self.decode(context, work))
            times.append(time.perf_counter())
            work = [(steps[-1][sequence], len(prompt) + step, sequence, True)
                    for sequence, prompt in enumerate(prompts)]
        c.llama_free(context)
        tokens = [[found[sequence] for found in steps] for sequence in range(len(prompts))]
        return {"tokens": tokens, "prefill_s": times[1] - times[0],
                "decode_s": times[-1] - times[1], "decode_tokens": len(prompts) * (new - 1)}

    def context(self, sequences: int, tokens: int):
        """Room for `sequences` sequences of `tokens` tokens each."""
        params = c.llama_context_default_params()
        params.n_seq_max, params.n_ctx = sequences, sequences * -(-tokens // 256) * 256
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type, params.kv_unified = c.LLAMA_FLASH_ATTN_TYPE_DISABLED, False
        return c.llama_init_from_model(self.model, params)

    def decode(self, context, work: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """The likeliest next token by sequence, `BATCH_TOKENS` tokens of work at a time."""
        found, batch = {}, self.batch
        for first in range(0, len(work), BATCH_TOKENS):
            part = work[first:first + BATCH_TOKENS]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, wanted
            if code := c.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode returned {code}")
            for i, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    logits = c.llama_get_logits_ith(context, i)
                    found[sequence] = int(np.ctypeslib.as_array(logits, (self.V,)).argmax())
        return found


def made(source: Path, weights: str, threads: int) -> Path:
    """The same weights in another format, by llama.cpp's own quantizer, kept beside it."""
    file = Path(sys.prefix) / "models" / f"{source.stem}.{weights}.gguf"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        params = c.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = FTYPES[weights], True, threads
        part = file.with_suffix(".part")
        if code := c.llama_model_quantize(bytes(source), bytes(part), ctypes.byref(params)):
            raise RuntimeError(f"llama_model_quantize returned {code}")
        part.rename(file)
    return file
