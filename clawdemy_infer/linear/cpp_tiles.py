"""The innermost loop of a product in C++, for each format of the weights; `cpp_strips` has the loops around it.

    Y [M, N] = X [M, K] Wᵀ

A *panel* is 16 outputs, which lie side by side in a register, and a *tile* up to 8 rows of X by 3 panels: its 24 x 16 sums stay in
registers until all of K has gone by. A load of weights serves 8 rows, and a number of X three panels. At each step a panel gives

    fp32    1 input     64 bytes
    fp16    1 input     32 bytes, made fp32 on the way
    bf16    2 inputs    64 bytes: AVX512_BF16 multiplies 32 pairs at once and adds them up two by two, in 16 fp32 sums
    int8    2 inputs    32 bytes, made bf16, which holds such numbers exactly; 16 scales stand in front of the panel
    int4    8 inputs    64 bytes; behind each group 16 scales and 16 offsets

4-bit codes: a word of 16 bits has the codes of four inputs, and the processor looks 32 words up in a table at once, by their lowest 5
bits. So a shift and a look into a table of twice 16 numbers make 32 weights of 32 codes. With w = (code - zero) scale, a group's sum over
its inputs is scale (sum of code x) - scale zero (sum of x).
"""

from __future__ import annotations

import torch

from clawdemy_infer.linear.codes import Codes

FLOATS = r"""
const int64_t ROWS = 8, PANELS = 3;
static int64_t panel(int64_t K) { return FRONT + K / INPUTS * BYTES; }                      // its bytes

template <int rows, int panels, int lines>
static void tile(const X* x, const char* w, const char* next, Y* y, int64_t K, int64_t N) {
    const int64_t size = panel(K), steps = K / INPUTS;
    __m512 sum[rows][panels] = {};
    for (int64_t k = 0; k < steps; k++) {
        for (int p = 0; p < lines; p++) __builtin_prefetch(next + p * size + k * BYTES);
        vector weights[panels];
        for (int p = 0; p < panels; p++) weights[p] = load(w + p * size + FRONT + k * BYTES);
        for (int r = 0; r < rows; r++) {
            const vector number = all(x[r * steps + k]);
            for (int p = 0; p < panels; p++) sum[r][p] = add(sum[r][p], weights[p], number);
        }
    }
    for (int p = 0; p < panels; p++) {
        const __m512 scale = FRONT ? _mm512_loadu_ps(w + p * size) : _mm512_set1_ps(1);
        for (int r = 0; r < rows; r++) put(FRONT ? sum[r][p] * scale : sum[r][p], y + r * N + p * 16);
    }
}
"""
IN_FP32 = r"""
typedef float X; typedef __m512 vector;
const int64_t INPUTS = 1;
static inline vector all(X x) { return _mm512_set1_ps(x); }
static inline __m512 add(__m512 sum, vector w, vector x) { return _mm512_fmadd_ps(w, x, sum); }
"""
IN_BF16 = r"""
typedef int32_t X; typedef __m512bh vector;                                                 // two inputs
const int64_t INPUTS = 2;
static inline vector all(X x) { return (vector)_mm512_set1_epi32(x); }
static inline __m512 add(__m512 sum, vector w, vector x) { return _mm512_dpbf16_ps(sum, w, x); }
"""
INT4 = r"""
const int64_t ROWS = 5, PANELS = 3, WORDS = GROUP / 8 * 64, BYTES = WORDS + 64;             // of the codes of a group, and of all it has
static int64_t panel(int64_t K) { return K / GROUP * BYTES; }
static inline __m512 halves(const char* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }

template <int rows, int panels, int lines>
static void tile(const X* x, const char* w, const char* next, Y* y, int64_t K, int64_t N) {
    const int64_t size = panel(K);
    alignas(64) uint16_t numbers[32];                                                       // 0 ... 15 in bf16, twice
    for (int i = 0; i < 32; i++) { const float f = i % 16; uint32_t bits; memcpy(&bits, &f, 4); numbers[i] = bits >> 16; }
    const __m512i table = _mm512_load_si512(numbers);
    const vector ones = (vector)_mm512_set1_epi16(0x3f80);
    __m512 sum[rows][panels] = {};
    for (int64_t group = 0; group < K / GROUP; group++) {
        const int64_t at = group * BYTES;
        __m512 part[rows][panels] = {}, total[rows] = {};
        for (int64_t i = 0; i < GROUP / 8; i++) {
            __m512i words[panels];
            for (int p = 0; p < lines; p++) __builtin_prefetch(next + p * size + at + i * 64);
            for (int p = 0; p < panels; p++) words[p] = _mm512_loadu_si512(w + p * size + at + i * 64);
            for (int j = 0; j < 4; j++) {
                vector weights[panels];
                for (int p = 0; p < panels; p++) {
                    weights[p] = (vector)_mm512_permutexvar_epi16(words[p], table);
                    words[p] = _mm512_srli_epi16(words[p], 4);
                }
                for (int r = 0; r < rows; r++) {
                    const vector pair = all(x[r * K / 2 + group * GROUP / 2 + i * 4 + j]);
                    total[r] = add(total[r], ones, pair);
                    for (int p = 0; p < panels; p++) part[r][p] = add(part[r][p], weights[p], pair);
                }
            }
        }
        for (int p = 0; p < panels; p++) {
            const __m512 scale = halves(w + p * size + at + WORDS), offset = halves(w + p * size + at + WORDS + 32);
            for (int r = 0; r < rows; r++) sum[r][p] += part[r][p] * scale + total[r] * offset;
        }
    }
    for (int p = 0; p < panels; p++) for (int r = 0; r < rows; r++) put(sum[r][p], y + r * N + p * 16);
}
"""
WEIGHTS = {
    "fp32": """const int64_t BYTES = 64, FRONT = 0;
        static inline vector load(const char* w) { return _mm512_loadu_ps(w); }""",
    "fp16": """const int64_t BYTES = 32, FRONT = 0;
        static inline vector load(const char* w) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)w)); }""",
    "bf16": """const int64_t BYTES = 64, FRONT = 0;
        static inline vector load(const char* w) { return (vector)_mm512_loadu_si512(w); }""",
    "int8": """const int64_t BYTES = 32, FRONT = 64;
        static inline __m512 floats(const char* w) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w))); }
        static inline vector load(const char* w) { return _mm512_cvtne2ps_pbh(floats(w + 16), floats(w)); }""",
}
TILES = {format: (IN_FP32 if format in ("fp32", "fp16") else IN_BF16) + weights + FLOATS for format, weights in WEIGHTS.items()}
TILES["int4"] = IN_BF16 + INT4
"""By format: X, the type of one or two inputs; the bytes of a panel; and `tile`, which asks for so many `lines` of `next` at each step."""

COMPUTES_IN = {"fp32": torch.float32, "fp16": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16, "int4": torch.bfloat16}
"""What X is in."""


def panels(format: str, source: torch.Tensor | Codes) -> torch.Tensor:
    """The bytes of a float weight [N, K], or of its codes, as the tiles read them: [N / 16, bytes of a panel].

    Raises NotImplementedError unless N is a multiple of 16 and K of 2, and for codes in groups that are no multiple of 8.
    """
    codes = source.codes if isinstance(source, Codes) else source.detach()
    N, K = codes.shape
    group = K // source.scales.shape[1] if format == "int4" else 8
    if N % 16 or K % 2 or group % 8:
        raise NotImplementedError(f"weight [{N}, {K}] in groups of {group}: outputs by the sixteen, inputs by the two, groups by the eight")
    if format in ("fp32", "fp16"):
        return _bytes(codes.view(N // 16, 16, K).mT)
    if format in ("bf16", "int8"):
        made = _bytes(codes.view(N // 16, 16, K // 2, 2).transpose(1, 2))
        return made if format == "bf16" else torch.cat((_bytes(source.scales.float().view(-1, 16)), made), 1).contiguous()
    # [panels, 16 outputs, groups, words of 4 x 2 inputs] -> [panels, groups, words, 16 outputs x 2]: a word has one of the two, four times
    nibbles = codes.view(N // 16, 16, K // group, group // 8, 4, 2).permute(0, 2, 3, 1, 5, 4).int()
    words = (nibbles << torch.tensor([0, 4, 8, 12])).sum(-1).to(torch.uint16).flatten(2)
    offsets = -source.zeros.float() * source.scales.float()
    scales = torch.stack((source.scales.float(), offsets), -1).half().view(N // 16, 16, K // group, 2).permute(0, 2, 3, 1).flatten(2)
    return torch.cat((words.view(torch.uint8), scales.contiguous().view(torch.uint8)), -1).flatten(1).contiguous()


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """[panels, ...] -> [panels, bytes]."""
    return x.contiguous().view(len(x), -1).view(torch.uint8)
