"""vLLM on the CPU, compiled, in this one process: by default it keeps a core for its scheduler, and
a small machine has none to spare."""

import os
import time

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2",
               "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


class Engine:
    def __init__(self, model: str, weights: str, threads: int, batch: int, context: int, **_):
        import vllm

        self.version, self.sampling = vllm.__version__, vllm.SamplingParams
        llm = vllm.LLM(
            model, dtype={"fp32": "float32", "bf16": "bfloat16"}[weights], max_model_len=context,
            max_num_seqs=batch, max_num_batched_tokens=max(4096, context),
            skip_tokenizer_init=True, enable_prefix_caching=False,
            hf_overrides={"architectures": ["LlamaForCausalLM"]})
        self.engine, self.asked = llm.llm_engine, 0

    def generate(self, prompts: list[list[int]], new: int) -> dict:
        start, first, tokens = time.perf_counter(), None, {}
        sampling = self.sampling(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            self.asked, tokens[str(self.asked)] = self.asked + 1, []
            self.engine.add_request(str(self.asked - 1), {"prompt_token_ids": prompt}, sampling)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            if first is None and all(tokens.values()):
                first, already = time.perf_counter(), sum(map(len, tokens.values()))
        return {"tokens": list(tokens.values()), "prefill_s": first - start,
                "decode_s": time.perf_counter() - first,
                "decode_tokens": len(prompts) * new - already}
