"""Hugging Face's `transformers`: its `generate`."""

import time

import torch
import transformers


class Engine:
    version = transformers.__version__

    def __init__(self, model: str, weights: str, threads: int, **_):
        torch.set_num_threads(threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[weights]).eval()
        self.model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], new: int) -> dict:
        ids, times = torch.tensor(prompts), [time.perf_counter()]

        def note(*_, **__):                     # asked after each token whether that was the last
            times.append(time.perf_counter())
            return torch.zeros(len(prompts), dtype=torch.bool)

        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new,
                                  stopping_criteria=[note])
        return {"tokens": out[:, ids.shape[1]:].tolist(), "prefill_s": times[1] - times[0],
                "decode_s": times[-1] - times[1], "decode_tokens": len(prompts) * (new - 1)}
