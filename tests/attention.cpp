// Attention over pages alone, for tests: q and out [M, N, H] of type Kept. (In a step, `turn`
// scales queries.)
#include "attention.h"

extern "C" void attention(const Kept* q, Kept* keys, Kept* values, const int32_t* table,
                          const int64_t* past, const int64_t* num_new_tokens, Kept* out, int64_t B,
                          int64_t most_blocks, int64_t block_size, int64_t window,
                          int64_t threads) {
    const Pages in = {keys, values, table, most_blocks, block_size, window};
    const Rows rows(B, past, num_new_tokens);
    const int64_t M = rows.position.size(), numbers = K * G * H;
    std::vector<float> scaled(M * numbers);
    std::vector<Factor> laid_keys, laid_values;
    for (int64_t i = 0; i < M * numbers; i++) scaled[i] = number(q[i]) * SCALE;
    #pragma omp parallel num_threads(threads)
    attend(scaled.data(), numbers, in, rows, out, laid_keys, laid_values);
}
