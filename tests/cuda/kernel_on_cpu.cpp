// The copy kernel's own source as C++, its threads run one after the other: what it computes can be
// tested without a GPU, since its threads do not talk to each other.

#include <algorithm>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__

struct Dimension { unsigned x; };
static Dimension blockIdx, threadIdx, blockDim, gridDim;
struct uint4 { unsigned x, y, z, w; };
static long wrong_alignment = 0;

template <typename T> T checked(const T* from) {
    wrong_alignment += reinterpret_cast<unsigned long long>(from) % sizeof(T) != 0;
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}
template <typename T> T __ldcs(const T* from) { return checked(from); }
template <typename T> void __stcs(T* to, T value) { checked(to), std::memcpy(to, &value, sizeof(T)); }
using std::min;

#include "copy_runs.cu"

extern "C" long launch(const Runs* runs, unsigned grid, unsigned block) {
    gridDim.x = grid, blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++) copy_runs(*runs);
    return wrong_alignment;
}
