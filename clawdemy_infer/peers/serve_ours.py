"""Our own decoder and our own engine, asked as the peers are."""

from __future__ import annotations

import torch
from serve import serve

from clawdemy_infer import __version__
from clawdemy_infer.batching import Policy, Request
from clawdemy_infer.batching.torch_executor import engine
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.model import load_model
from clawdemy_infer.timing import now


class Ours:
    version = __version__

    def __init__(self, model: str, weights: str, threads: int, compile: bool = False, **_):
        torch.set_num_threads(threads)
        self.model = load_model(model, weights=weights, compile=compile)

    def generate(self, prompts: list[list[int]], new: int) -> dict:
        cache = ContiguousCache.for_model(self.model, len(prompts), len(prompts[0]) + new)
        tokens, times = torch.tensor(prompts), [now()]                          # [B, T]
        steps = []
        for _ in range(new):
            tokens = self.model(tokens, cache, last_only=True).argmax(-1)       # [B, 1]
            times.append(now())
            steps.append(tokens)
        return {"tokens": torch.cat(steps, 1).tolist(), "prefill_s": times[1] - times[0], "decode_s": times[-1] - times[1],
                "decode_tokens": len(prompts) * (new - 1)}

    def trace(self, prompts: list[list[int]], new: list[int], running: int) -> dict:
        room = running * max(len(prompt) + n + 32 for prompt, n in zip(prompts, new, strict=True))            # and two blocks
        server = engine(self.model, Policy(max_batch=running), kv_bytes=room * self.model.config.shape.kv_bytes_per_token("fp32"))
        requests = [Request(i, prompt, n, 0.0, output_tokens=n) for i, (prompt, n) in enumerate(zip(prompts, new, strict=True))]
        return {"seconds": server.run(requests).seconds}


if __name__ == "__main__":
    serve(Ours)
