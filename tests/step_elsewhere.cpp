// One `step` as a program of its own, for a machine, a compiler or a check that PyTorch's process
// is not there for. Read from the file that is named, in 64 bits: the count of arrays, the bytes
// of each, 12 indices of arrays (from 1 on; 0 is null), 7 numbers; then the arrays, each of which
// gets memory of its own, so that a sanitizer sees its borders. Written back: the arrays.
#include "step.cpp"
#include <cstdio>

const int TENSORS = 12, SIZES = 7, LAYERS = 2, CLOCKS = 11;

int main(int, char** words) {
    FILE* file = fopen(words[1], "r+b");
    auto read_in = [&](void* to, int64_t bytes) {
        if (fread(to, 1, bytes, file) != size_t(bytes)) exit(3);
    };
    int64_t count, index[TENSORS], size[SIZES];
    read_in(&count, 8);
    std::vector<int64_t> bytes(count);
    read_in(bytes.data(), 8 * count), read_in(index, sizeof index), read_in(size, sizeof size);
    std::vector<char*> arrays = {nullptr};
    for (int64_t each : bytes) arrays.push_back((char*)malloc(each)), read_in(arrays.back(), each);
    // A layer's own pointers are indices too.
    auto pointer = [&](auto& field) {
        field = (std::remove_reference_t<decltype(field)>)arrays[(int64_t)field];
    };
    std::vector<Layer> layers(size[0]);
    memcpy((void*)layers.data(), arrays[index[LAYERS]], layers.size() * sizeof(Layer));
    for (Layer& each : layers) {
        for (Matrix* matrix : {&each.qkv, &each.out, &each.gate_up, &each.down})
            pointer(matrix->panels);
        for (const float** vector : {&each.gamma, &each.mlp_gamma, &each.bias, &each.q_gamma,
                                     &each.k_gamma}) pointer(*vector);
    }
    char* at[TENSORS];
    for (int i = 0; i < TENSORS; i++) at[i] = arrays[index[i]];
    step((float*)at[0], (float*)at[1], layers.data(), (float*)at[3], (float*)at[4], (float*)at[5],
         (Kept*)at[6], (Kept*)at[7], (int32_t*)at[8], (int64_t*)at[9], (int64_t*)at[10],
         (double*)at[CLOCKS], size[0], size[1], size[2], size[3], size[4], size[5], size[6]);
    fseek(file, 8 * (1 + count + TENSORS + SIZES), SEEK_SET);
    for (int64_t i = 0; i < count; i++) {
        fwrite(arrays[i + 1], 1, bytes[i], file);
        free(arrays[i + 1]);
    }
    return fclose(file);
}
