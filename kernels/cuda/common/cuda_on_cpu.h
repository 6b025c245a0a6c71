// Runs CUDA kernels on a CPU, from the very files that nvcc compiles: for tests, not for speed.
//
// A CUDA thread is a fiber (ucontext) with its own stack; the threads of a block take turns in the order of their
// indices, and blocks run one after the other. A fiber gives up its turn only where the GPU would wait for others:
// __syncthreads, and the operations of a warp (__shfl_*_sync, __ballot_sync, __syncwarp, mma, ldmatrix), which complete
// when all lanes of their mask have arrived. So every run is the same run, and what the tests see is real: indexing,
// packing, the order of additions, and a missing barrier (a later thread's data has not been written yet). Shared memory
// is filled with NaN before each block; dynamic shared memory has exactly the bytes of the launch, so the address
// sanitizer sees one byte too many; an asynchronous copy arrives at its wait, not before.
//
// What a GPU may do silently ends the program here, with the kernel's name: threads that wait at different barriers, or
// at one that others have left the kernel without; a shuffle that reads a lane outside of its mask.
// What is not modelled: races that only another order of threads would show, and the speed of anything.
#pragma once

#include <math.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "half_on_cpu.h"
#include "launch.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static  // blocks run one after the other: one buffer serves them all
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define EDGE_DYNAMIC_SHARED(name) unsigned char* const name = edge_cpu::machine().shared

// --- vectors --------------------------------------------------------------------------------------------------------
#define EDGE_VECTORS(type, name)                                                                  \
    struct alignas(2 * sizeof(type)) name##2 { type x, y; };                                      \
    struct name##3 { type x, y, z; };                                                             \
    struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };                                \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                              \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                   \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EDGE_VECTORS(int, int)
EDGE_VECTORS(unsigned, uint)
EDGE_VECTORS(float, float)
EDGE_VECTORS(unsigned char, uchar)
EDGE_VECTORS(signed char, char)
EDGE_VECTORS(unsigned short, ushort)
#undef EDGE_VECTORS

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

inline float2 __half22float2(__half2 a) { return {a.x, a.y}; }
inline __half2 __float22half2_rn(float2 a) { return {a.x, a.y}; }

inline uint3 threadIdx, blockIdx;  // of the fiber whose turn it is
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace edge_cpu {

/// Where in the source an operation stands: threads that meet must meet at the same place.
struct Site {
    const char* file;
    int line;
    bool operator==(const Site& other) const { return line == other.line && file == other.file; }
};
inline Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }

struct Copy {
    void* to;
    const void* from;
};

enum class State { ready, block_barrier, warp_barrier, done };

struct Fiber {
    ucontext_t context;
    uint3 index;
    unsigned number;  // in the block
    State state;
    Site site;
    unsigned mask;                            // of the warp operation it waits in
    void* payload;                            // what it brought there and takes away
    std::vector<std::vector<Copy>> copies;    // groups under way; the last one is still open
    char* stack;
    void* fake_stack;
};

/// The one block that runs, and its fibers. Stacks are kept from launch to launch.
struct Machine {
    static constexpr size_t STACK = 256 * 1024;

    const char* kernel = "";
    unsigned char* shared = nullptr;
    std::vector<Fiber> fibers;
    Fiber* current = nullptr;
    ucontext_t scheduler;
    const std::function<void()>* body = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;

    [[noreturn]] void fail(const std::string& what) const {
        std::fprintf(stderr, "%s, block (%u, %u, %u): %s\n", kernel, blockIdx.x, blockIdx.y, blockIdx.z, what.c_str());
        std::abort();
    }

    static std::string where(const Fiber& fiber) {
        return std::string(fiber.site.file) + ":" + std::to_string(fiber.site.line);
    }

    /// Gives up the turn until `state` is ready again.
    void wait(State state) {
        Fiber& self = *current;
        self.state = state;
        switch_fiber(self.context, scheduler, &self.fake_stack, scheduler_stack, scheduler_stack_size);
    }

    void run_block(const EdgeLaunch& plan) {
        const unsigned threads = plan.block[0] * plan.block[1] * plan.block[2];
        // The bytes asked for and no more, from an address that is a multiple of 16 (as malloc's are).
        shared = static_cast<unsigned char*>(std::malloc(std::max(plan.shared_bytes, 1u)));
        std::memset(shared, 0xff, plan.shared_bytes);
        for (unsigned i = 0; i < threads; ++i) start(fibers[i], i);
        for (unsigned done = 0; done < threads;) {
            bool moved = false;
            for (unsigned i = 0; i < threads; ++i) {
                Fiber& fiber = fibers[i];
                if (fiber.state != State::ready) continue;
                moved = true;
                current = &fiber;
                threadIdx = fiber.index;
                void* fake = nullptr;
                switch_fiber(scheduler, fiber.context, &fake, fiber.stack, STACK);
                done += fiber.state == State::done;
            }
            if (!moved) open_barrier(threads);
        }
        std::free(shared);
    }

    /// Nobody can go on: either all wait at one __syncthreads, or the kernel would hang.
    void open_barrier(unsigned threads) {
        const Fiber& first = *std::find_if(fibers.begin(), fibers.begin() + threads,
                                           [](const Fiber& f) { return f.state != State::done; });
        for (unsigned i = 0; i < threads; ++i) {
            const Fiber& fiber = fibers[i];
            const std::string other = "; thread " + std::to_string(fiber.number) +
                                      (fiber.state == State::done ? " has returned" : " waits at " + where(fiber));
            if (fiber.state == State::done || fiber.state == State::warp_barrier || !(fiber.site == first.site) ||
                first.state == State::warp_barrier)
                fail("deadlock: thread " + std::to_string(first.number) + " waits at " + where(first) + other);
        }
        for (unsigned i = 0; i < threads; ++i) fibers[i].state = State::ready;
    }

    void start(Fiber& fiber, unsigned number) {
        if (!fiber.stack) {  // with a page below it that must not be touched
            const size_t page = size_t(sysconf(_SC_PAGESIZE));
            char* memory = static_cast<char*>(
                mmap(nullptr, STACK + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
            if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE)) fail("no memory for stacks");
            fiber.stack = memory + page;
        }
        fiber.number = number;
        fiber.index = {number % blockDim.x, number / blockDim.x % blockDim.y, number / (blockDim.x * blockDim.y)};
        fiber.state = State::ready;
        fiber.copies.assign(1, {});
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack;
        fiber.context.uc_stack.ss_size = STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, &Machine::enter, 0);
    }

    static void enter();

    void switch_fiber(ucontext_t& from, ucontext_t& to, [[maybe_unused]] void** fake,
                      [[maybe_unused]] const void* bottom, [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(fake, bottom, size);
        swapcontext(&from, &to);
        __sanitizer_finish_switch_fiber(*fake, nullptr, nullptr);
#else
        swapcontext(&from, &to);
#endif
    }
};

inline Machine& machine() {
    static Machine one;
    return one;
}

inline void Machine::enter() {
    Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
    (*m.body)();
    Fiber& self = *m.current;
    for (const auto& group : self.copies)
        if (!group.empty()) m.fail("a thread returned before its asynchronous copies had arrived");
    self.state = State::done;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(nullptr, m.scheduler_stack, m.scheduler_stack_size);
#endif
    setcontext(&m.scheduler);
}

inline void run_grid(const EdgeLaunch& plan, const std::function<void()>& body) {
    Machine& m = machine();
    m.kernel = plan.kernel;
    m.body = &body;
    const unsigned threads = plan.block[0] * plan.block[1] * plan.block[2];
    if (threads == 0 || threads > 1024) m.fail("a block has 1 to 1024 threads, not " + std::to_string(threads));
    if (m.fibers.size() < threads) m.fibers.resize(threads);
    blockDim = {plan.block[0], plan.block[1], plan.block[2]};
    gridDim = {plan.grid[0], plan.grid[1], plan.grid[2]};
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) m.run_block(plan);
}

/// launch(kernel, plan, arguments...): the arguments as the kernel takes them.
template <class... P, class... A>
void launch(void (*kernel)(P...), const EdgeLaunch& plan, A... arguments) {
    run_grid(plan, [&] { kernel(P(arguments)...); });
}

/// The same with cuLaunchKernel's convention: an array of pointers to the arguments.
template <class... P, size_t... I>
void launch_packed(void (*kernel)(P...), const EdgeLaunch& plan, void** arguments, std::index_sequence<I...>) {
    run_grid(plan, [&] { kernel(*static_cast<P*>(arguments[I])...); });
}

using Packed = void (*)(const EdgeLaunch&, void**);
inline std::map<std::string, Packed>& entries() {
    static std::map<std::string, Packed> all;
    return all;
}

template <auto Kernel>
struct Entry;
template <class... P, void (*Kernel)(P...)>
struct Entry<Kernel> {
    static void call(const EdgeLaunch& plan, void** arguments) {
        launch_packed(Kernel, plan, arguments, std::index_sequence_for<P...>{});
    }
    explicit Entry(const char* name) { entries()[name] = &call; }
};

// --- warps ----------------------------------------------------------------------------------------------------------
/// All lanes of `mask` bring a payload; the last to arrive runs complete(payloads by lane), then all go on.
template <class Payload, class Complete>
void meet(unsigned mask, Payload& payload, Site site, Complete complete) {
    Machine& m = machine();
    Fiber& self = *m.current;
    Fiber* const warp = &self - self.number % 32;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    const unsigned there = std::min(32u, threads - (self.number - self.number % 32));
    if (there < 32) mask &= (1u << there) - 1;
    if (!(mask >> self.number % 32 & 1)) m.fail("a lane is not in its own mask at " + std::string(site.file));
    self.site = site;
    self.mask = mask;
    self.payload = &payload;
    self.state = State::warp_barrier;
    Payload* payloads[32] = {};
    for (unsigned i = 0; i < there; ++i) {
        if (!(mask >> i & 1)) continue;
        const Fiber& other = warp[i];
        if (other.state != State::warp_barrier || other.mask != mask || !(other.site == site))
            return m.wait(State::warp_barrier);
        payloads[i] = static_cast<Payload*>(other.payload);
    }
    complete(payloads);
    for (unsigned i = 0; i < there; ++i)
        if (mask >> i & 1) warp[i].state = State::ready;
}

template <class T>
struct Shuffle {
    T value, result;
    int source;  // lane
};

template <class T>
T shuffle(unsigned mask, T value, int source, Site site) {
    Shuffle<T> mine{value, value, source};
    meet(mask, mine, site, [](Shuffle<T>** all) {
        for (int i = 0; i < 32; ++i) {
            if (!all[i]) continue;
            if (!all[all[i]->source]) machine().fail("a shuffle reads a lane that is not in the mask");
            all[i]->result = all[all[i]->source]->value;
        }
    });
    return mine.result;
}

inline int lane() { return int(machine().current->number % 32); }

struct Mma {
    float* d;
    const unsigned* a;
    unsigned b[2];
};

inline float half_of(unsigned pair, int which) { return __half::widen(uint16_t(pair >> 16 * which)); }

/// mma.m16n8k16: products are exact, sums run in float32 over falling k; a GPU's order is its own.
inline void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, Site site = here()) {
    Mma mine{d, a, {b0, b1}};
    meet(0xffffffffu, mine, site, [](Mma** all) {
        float left[16][16], right[16][8];
        for (int i = 0; i < 32; ++i) {
            const int g = i / 4, t = i % 4;
            for (int which = 0; which < 2; ++which) {
                for (int r = 0; r < 4; ++r) left[g + 8 * (r % 2)][2 * t + which + 8 * (r / 2)] = half_of(all[i]->a[r], which);
                for (int r = 0; r < 2; ++r) right[2 * t + which + 8 * r][g] = half_of(all[i]->b[r], which);
            }
        }
        for (int i = 0; i < 32; ++i)
            for (int r = 0; r < 4; ++r) {
                const int row = i / 4 + 8 * (r / 2), column = 2 * (i % 4) + r % 2;
                for (int k = 0; k < 16; ++k) all[i]->d[r] += left[row][k] * right[k][column];
            }
    });
}

struct Matrices {
    unsigned* to;
    const unsigned char* row;
};

inline void load_matrices(unsigned (&r)[4], const void* row, Site site = here()) {
    Matrices mine{r, static_cast<const unsigned char*>(row)};
    if (uintptr_t(row) % 16) machine().fail("ldmatrix from an address that is not a multiple of 16");
    meet(0xffffffffu, mine, site, [](Matrices** all) {
        for (int i = 0; i < 32; ++i)
            for (int matrix = 0; matrix < 4; ++matrix)
                std::memcpy(&all[i]->to[matrix], all[8 * matrix + i / 4]->row + 4 * (i % 4), 4);
    });
}

// --- memory ---------------------------------------------------------------------------------------------------------
/// A vector load, which must be aligned as on the GPU.
template <class T>
T load(const void* p) {
    if (uintptr_t(p) % sizeof(T)) machine().fail("a vector load from an address that is not a multiple of its size");
    T value;
    std::memcpy(&value, p, sizeof(T));
    return value;
}

inline void copy_async(void* to, const void* from) {
    if ((uintptr_t(to) | uintptr_t(from)) % 16) machine().fail("cp.async of an address that is not a multiple of 16");
    machine().current->copies.back().push_back({to, from});
}
inline void copy_commit() { machine().current->copies.emplace_back(); }
inline void copy_wait(unsigned pending) {
    auto& groups = machine().current->copies;
    while (groups.size() > pending + 1) {  // the last is the open one
        for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
        groups.erase(groups.begin());
    }
}

}  // namespace edge_cpu

#define EDGE_ENTRY(name) static const edge_cpu::Entry<&name> edge_cpu_entry_##name(#name)

// --- what CUDA calls them -------------------------------------------------------------------------------------------
inline void __syncthreads(edge_cpu::Site site = edge_cpu::here()) {
    edge_cpu::machine().current->site = site;
    edge_cpu::machine().wait(edge_cpu::State::block_barrier);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, edge_cpu::Site site = edge_cpu::here()) {
    int nothing = 0;
    edge_cpu::meet(mask, nothing, site, [](int**) {});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, edge_cpu::Site site = edge_cpu::here()) {
    std::pair<int, unsigned> mine{predicate, 0};
    edge_cpu::meet(mask, mine, site, [](std::pair<int, unsigned>** all) {
        unsigned votes = 0;
        for (int i = 0; i < 32; ++i) votes |= unsigned(all[i] && all[i]->first) << i;
        for (int i = 0; i < 32; ++i)
            if (all[i]) all[i]->second = votes;
    });
    return mine.second;
}
inline int __any_sync(unsigned mask, int predicate, edge_cpu::Site site = edge_cpu::here()) {
    return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, edge_cpu::Site site = edge_cpu::here()) {
    return __ballot_sync(mask, !predicate, site) == 0;
}

// Lanes form segments of `width`; a source outside of the own segment leaves the own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, edge_cpu::Site site = edge_cpu::here()) {
    return edge_cpu::shuffle(mask, value, edge_cpu::lane() / width * width + (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, edge_cpu::Site site = edge_cpu::here()) {
    const int lane = edge_cpu::lane(), source = lane ^ bits;
    return edge_cpu::shuffle(mask, value, source / width > lane / width ? lane : source, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, edge_cpu::Site site = edge_cpu::here()) {
    const int lane = edge_cpu::lane();
    return edge_cpu::shuffle(mask, value, lane % width + int(by) < width ? lane + int(by) : lane, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, edge_cpu::Site site = edge_cpu::here()) {
    const int lane = edge_cpu::lane();
    return edge_cpu::shuffle(mask, value, lane % width >= int(by) ? lane - int(by) : lane, site);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T atomicAdd(T* p, T value) { return std::exchange(*p, T(*p + value)); }
template <class T>
T atomicMax(T* p, T value) { return std::exchange(*p, std::max(*p, value)); }

template <class To, class From>
To edge_cpu_bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return edge_cpu_bits<unsigned>(x); }
inline int __float_as_int(float x) { return edge_cpu_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return edge_cpu_bits<float>(x); }
inline float __int_as_float(int x) { return edge_cpu_bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
    return result;
}

using std::max;
using std::min;
// The approximations are the exact functions here; their error on a GPU is in CUDA's guide (appendix Mathematical
// Functions) and part of the bounds.
#define __expf(x) expf(x)  // macros, since the C library declares functions of these names
#define __logf(x) logf(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float2int_rn(float x) { return int(std::nearbyint(x)); }
