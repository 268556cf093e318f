// One product for PyTorch: x [M, I] and y [M, O] of type Y, the weight packed in FORMAT.
#include "product.h"

extern "C" void product(const Y* x, const char* w, Y* y, int64_t M, int64_t I, int64_t O,
                        int64_t group, int64_t threads) {
    const Size size(I, O, group);
    std::vector<IN> room;
    if (sizeof(IN) != sizeof(Y)) room.resize(M * I);
    const IN* in = room.empty() ? (const IN*)x : room.data();
    #pragma omp parallel num_threads(threads)
    {
        if (!room.empty()) {
            #pragma omp for schedule(static)
            for (int64_t i = 0; i < M * I; i++) put(number(x[i]), &room[i]);
        }
        multiply(in, w, y, M, size);
    }
}
