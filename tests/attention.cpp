// Attention over pages alone, for tests: q and out [M, K G, H] of type T.
#include "attention.h"

extern "C" void attention(const T* q, T* keys, T* values, const int32_t* table, const int64_t* past,
                          const int64_t* brought, T* out, int64_t B, int64_t K, int64_t columns,
                          int64_t size, int64_t window, int64_t threads) {
    const Pages in = {keys, values, table, K, columns, size, window};
    const Rows rows(B, past, brought);
    const int64_t M = rows.token.size(), numbers = K * G * H;
    std::vector<float> scaled(M * numbers);
    std::vector<R> room[2];
    for (int64_t i = 0; i < M * numbers; i++) scaled[i] = number(q[i]) * SCALE;
    #pragma omp parallel num_threads(threads)
    attend(scaled.data(), numbers, in, rows, out, room);
}
