"""Hugging Face's `transformers`: `generate`, and for a trace its own continuous batching."""

from __future__ import annotations

import time

import torch
import transformers
from serve import serve

from clawdemy_infer.batching import Request
from clawdemy_infer.batching.compare import transformers_continuous

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Transformers:
    version = transformers.__version__

    def __init__(self, model: str, weights: str, threads: int, **_):
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=DTYPES[weights]).eval()
        self.model.generation_config = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> dict:
        ids, times = torch.tensor(prompts), [time.perf_counter()]

        def note(*_, **__):                     # asked after each token whether that was the last
            times.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, stopping_criteria=[note])
        return {"tokens": out[:, ids.shape[1]:].tolist(), "prefill_s": times[1] - times[0], "decode_s": times[-1] - times[1],
                "decode_tokens": len(prompts) * (new - 1)}

    def trace(self, prompts: list[list[int]], new: list[int], running: int) -> dict:
        requests = [Request(i, prompt, n, 0.0, output_tokens=n) for i, (prompt, n) in enumerate(zip(prompts, new, strict=True))]
        return {"seconds": transformers_continuous(self.model, requests, running)}


if __name__ == "__main__":
    serve(Transformers)
