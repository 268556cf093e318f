"""Our own decoder, asked as the peers are."""

import torch

from clawdemy_infer import __version__
from clawdemy_infer.fast.faster import faster
from clawdemy_infer.files import load_model
from clawdemy_infer.kv_cache import ContiguousCache
from clawdemy_infer.timing import now


class Engine:
    version = __version__

    def __init__(self, model: str, weights: str, threads: int, compile: bool = False, **_):
        torch.set_num_threads(threads)
        self.model = faster(load_model(model), weights, compile=compile)

    def generate(self, prompts: list[list[int]], new: int) -> dict:
        cache = ContiguousCache.for_model(self.model, len(prompts), len(prompts[0]) + new)
        tokens, times, steps = torch.tensor(prompts), [now()], []           # [B, T]
        for _ in range(new):
            tokens = self.model(tokens, cache, last_only=True).argmax(-1)   # [B, 1]
            times.append(now())
            steps.append(tokens)
        return {"tokens": torch.cat(steps, 1).tolist(), "prefill_s": times[1] - times[0],
                "decode_s": times[-1] - times[1], "decode_tokens": len(prompts) * (new - 1)}
