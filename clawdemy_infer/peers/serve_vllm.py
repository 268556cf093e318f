"""vLLM on the CPU, compiled, in this one process: by default it keeps a core for its scheduler, and a small machine has none to spare."""

from __future__ import annotations

import os
import time

from serve import serve

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1",
               "VLLM_LOGGING_LEVEL": "WARNING"}


class VLLM:
    def __init__(self, model: str, weights: str, threads: int, batch: int, context: int, **_):
        import vllm

        self.version, self.sampling = vllm.__version__, vllm.SamplingParams
        llm = vllm.LLM(model, dtype={"fp32": "float32", "bf16": "bfloat16"}[weights], skip_tokenizer_init=True, max_model_len=context,
                       max_num_seqs=batch, max_num_batched_tokens=max(4096, context), enable_prefix_caching=False,
                       hf_overrides={"architectures": ["LlamaForCausalLM"]})
        self.engine, self.asked = llm.llm_engine, 0

    def add(self, prompt: list[int], new: int) -> str:
        self.asked += 1
        self.engine.add_request(str(self.asked), {"prompt_token_ids": prompt},
                                self.sampling(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False))
        return str(self.asked)

    def generate(self, prompts: list[list[int]], new: int) -> dict:
        start = time.perf_counter()
        tokens = {self.add(prompt, new): [] for prompt in prompts}
        first = None
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            if first is None and all(tokens.values()):
                first, already = time.perf_counter(), sum(map(len, tokens.values()))
        end = time.perf_counter()
        return {"tokens": list(tokens.values()), "prefill_s": first - start, "decode_s": end - first,
                "decode_tokens": len(prompts) * new - already}

    def trace(self, prompts: list[list[int]], new: list[int], running: int) -> dict:
        start, waiting, inside = time.perf_counter(), list(zip(prompts, new, strict=True)), 0
        while waiting or inside:
            while waiting and inside < running:
                self.add(*waiting.pop(0))
                inside += 1
            inside -= sum(output.finished for output in self.engine.step())
        return {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    serve(VLLM)
