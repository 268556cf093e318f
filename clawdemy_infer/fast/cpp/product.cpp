// One product for PyTorch: x [M, I] and y [M, O] of type Result, the weight packed in FORMAT. An x
// of another type than Input is converted first, by all threads (`omp for` ends in a barrier); then
// they multiply. No exception leaves: without memory the process ends.
#include "product.h"

extern "C" void product(const Result* x, const char* w, Result* y, int64_t M, int64_t I, int64_t O,
                        int64_t group, int64_t threads) {
    const Shape shape(I, O, group);
    std::vector<Input> converted;
    if (sizeof(Input) != sizeof(Result)) converted.resize(M * I);
    const Input* in = converted.empty() ? (const Input*)x : converted.data();
    #pragma omp parallel num_threads(threads)
    {
        if (!converted.empty()) {
            #pragma omp for schedule(static)
            for (int64_t i = 0; i < M * I; i++) put(number(x[i]), &converted[i]);
        }
        multiply(in, w, y, M, shape);
    }
}
