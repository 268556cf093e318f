// Operations of vector.h on n numbers, for tests: 2^x; x in bf16, one by one and WIDTH at a time;
// what is in fp16 in fp32. n is a multiple of 16.
#include "vector.h"

extern "C" void vector(const float* x, const bf16* half, float* power, bf16* one, bf16* many,
                       float* wide, int64_t n) {
    for (int64_t i = 0; i < n; i++) put(x[i], one + i);
    for (int64_t i = 0; i < n; i += WIDTH) {
        put(power_of_2(read<vec>(x + i)), power + i);
        put(read<vec>(x + i), many + i);
        put(from_fp16((const char*)(half + i)), wide + i);
    }
}
