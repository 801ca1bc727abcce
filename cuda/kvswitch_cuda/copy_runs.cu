// Copies scattered pieces between GPU memory and pinned host memory, as far as a few thread blocks
// go: the grid is the quota of multiprocessors that copies may take from the model.
//
// Pieces come as the kernel's own parameters, so there is no buffer of them to be kept and freed.
// Each piece is cut in chunks; chunks are dealt to the warps in turn, across pieces, so that a few
// large pieces keep all of them busy as well as many small ones.

constexpr int PIECES = 1024;  // as in dispatch.py; 24.6 of the 32.7 KB that parameters may take
constexpr unsigned WARP = 32;
constexpr int AHEAD = 4;  // loads of one thread under way at once: the link is far away
constexpr unsigned CHUNK = WARP * AHEAD * 16;  // bytes that a warp has under way at once

struct Runs {
    unsigned long long count;
    unsigned long long dst[PIECES];
    unsigned long long src[PIECES];
    unsigned long long nbytes[PIECES];
};

template <typename T>
__device__ __forceinline__ T load(const T* from) {
    return __ldcs(from);  // read once: not to be kept in the caches
}

template <typename T>
__device__ __forceinline__ void copy(char* dst, const char* src, unsigned nbytes) {
    const T* from = reinterpret_cast<const T*>(src);
    T* to = reinterpret_cast<T*>(dst);
    const unsigned words = nbytes / sizeof(T);
    unsigned i = threadIdx.x % WARP;
    for (; i + (AHEAD - 1) * WARP < words; i += AHEAD * WARP) {
        T held[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) held[k] = load(from + i + k * WARP);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) __stcs(to + i + k * WARP, held[k]);
    }
    for (; i < words; i += WARP) __stcs(to + i, load(from + i));
}

extern "C" __global__ void __launch_bounds__(1024) copy_runs(const __grid_constant__ Runs runs) {
    const unsigned warps = gridDim.x * (blockDim.x / WARP);
    // This warp's next chunk, counted from the present piece's first one.
    unsigned long long next = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    for (unsigned piece = 0; piece < runs.count; piece++) {
        const unsigned long long nbytes = runs.nbytes[piece];
        const unsigned long long chunks = (nbytes + CHUNK - 1) / CHUNK;
        for (; next < chunks; next += warps) {
            const unsigned long long offset = next * CHUNK;
            char* dst = reinterpret_cast<char*>(runs.dst[piece] + offset);
            const char* src = reinterpret_cast<const char*>(runs.src[piece] + offset);
            const unsigned left = static_cast<unsigned>(min(nbytes - offset, (unsigned long long)CHUNK));
            const unsigned long long bits = runs.dst[piece] | runs.src[piece] | nbytes;
            if (bits % 16 == 0) {
                copy<uint4>(dst, src, left);
            } else if (bits % 4 == 0) {
                copy<unsigned>(dst, src, left);
            } else {
                copy<unsigned char>(dst, src, left);
            }
        }
        next -= chunks;
    }
}
