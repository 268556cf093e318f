"""The techniques of lesson 03 on one model: Llama-3-8B as it is, with other KV heads, latents or
windows, and with a cache of fewer bits. What was published of their quality, with its source."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from clawdemy_infer.arithmetic import MLA, Format, ModelShape
from clawdemy_infer.from_config import catalog

LLAMA = catalog.model("llama-3-8b")
LATENT = MLA(latent=512, rope=64, value=LLAMA.H)        # DeepSeek-V2's widths


@dataclass(frozen=True)
class Technique:
    """A `shape`, and the format `kv` of its cache. Without `retrained` a finished checkpoint
    takes it; `reach`: tokens back that some layer still sees, None for all."""

    shape: ModelShape
    kv: Format = "bf16"
    retrained: bool = True
    reach: int | None = None


TECHNIQUES = {
    "MHA": Technique(replace(LLAMA, K=LLAMA.N)),
    "GQA": Technique(LLAMA, retrained=False),
    "MQA": Technique(replace(LLAMA, K=1)),
    "MLA": Technique(replace(LLAMA, K=LLAMA.N, H=LLAMA.H + LATENT.rope, mla=LATENT)),
    "window of 4,096": Technique(replace(LLAMA, window=4096, pattern=("local",)), reach=4096),
    "5 local : 1 global": Technique(replace(LLAMA, window=1024,
                                            pattern=("local",) * 5 + ("global",))),
    "int8": Technique(LLAMA, 1 + 2 / LLAMA.H, retrained=False),     # a 16-bit scale a key or value
    "int4": Technique(LLAMA, 4 / 8 + 2 * 2 / 32, retrained=False),  # scale and lowest, of 32
}


class Published(NamedTuple):
    """A figure of quality before and after, as its source has it."""

    change: str
    model: str
    measure: str
    before: str
    after: str
    source: str


PUBLISHED = (
    Published("MHA → GQA, 8 KV heads", "T5-XXL, trained on for 5 %", "mean of 7 tasks", "47.2",
              "47.1", "Ainslie 2023, table 1"),
    Published("MHA → MQA", "T5-XXL, trained on for 5 %", "mean of 7 tasks", "47.2", "46.6",
              "Ainslie 2023, table 1"),
    Published("MHA → GQA, 8 KV heads", "7B, from scratch", "MMLU", "45.2", "41.2",
              "DeepSeek-V2, table 8"),
    Published("MHA → MQA", "7B, from scratch", "MMLU", "45.2", "37.9", "DeepSeek-V2, table 8"),
    Published("MHA → MLA", "250B experts, from scratch", "MMLU", "57.5", "59.0",
              "DeepSeek-V2, table 9"),
    Published("window of 1,024 → with 4 sinks", "Llama-2-13B as it is", "perplexity", "5,158",
              "5.40", "Xiao 2023, table 1"),
    Published("1 local : 1 global → 5 : 1", "2B and 9B, from scratch", "perplexity", "",
              "± 0.1", "Gemma 3, figure 3"),
    Published("fp16 cache → int8, int4", "Llama-2-7B-chat as it is", "MMLU", "35.6", "35.6, 34.8",
              "LMDeploy, kv_quant.md"),
)
"""Ainslie et al. 2023, "GQA", arXiv:2305.13245v3; DeepSeek-AI 2024, "DeepSeek-V2",
arXiv:2405.04434, appendix D; Xiao et al. 2023, "Efficient Streaming Language Models with Attention
Sinks", arXiv:2309.17453 (the first book of PG-19); Gemma Team 2025, "Gemma 3 Technical Report",
arXiv:2503.19786 (read off a figure: its axis ends at ± 0.1); InternLM/lmdeploy,
docs/en/quantization/kv_quant.md @0bf868e (35.64; 35.58, 34.79)."""

THROUGHPUT = {"fp16": 14.98, "int8": 19.01, "int4": 20.81}
"""Requests per second of LMDeploy with Llama-2-7B-chat on one GPU, by the format of the cache, up
to 256 at once (the same page, its table of performance). Which GPU it does not say."""
