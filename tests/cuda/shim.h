// Runs CUDA kernels on the host, to check them where there is no GPU.
//
// The threads of a block are fibers. Warps run in shuffled order, each as far as it can come alone; barriers and shuffles
// wait for whom they must; shared memory holds NaN before each block. So a missing barrier, or a thread that never comes
// to one, shows.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

using std::exp, std::expm1, std::fabs, std::floor, std::fmax, std::log, std::log1p, std::pow, std::sqrt, std::tanh;

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("shared_memory")))
extern "C" char __start_shared_memory, __stop_shared_memory;
__shared__ __attribute__((used)) char always_some[16];
extern "C" size_t shared_size() { return &__stop_shared_memory - &__start_shared_memory; }
static char *dynamic_shared_memory; // as much as the launch asks for, and not a byte more

template <class Real> Real normcdf(Real x) { return std::erfc(-x * Real(M_SQRT1_2)) / 2; }
static unsigned long long __umul64hi(unsigned long long x, unsigned long long y)
{
    return (unsigned __int128)x * y >> 64;
}

struct dim3 {
    unsigned x, y, z;
};
static dim3 gridDim, blockDim, blockIdx, threadIdx;

enum State { RUNS, AT_BARRIER, IN_SHUFFLE, DONE };
struct Fiber {
    std::vector<char> stack;
    void *place[5]; // where it goes on
    State state;
    dim3 thread;
    int shuffles;
};
static std::vector<Fiber *> fibers;
static void *scheduler[5];
static int running;
static void (*work)();
static std::mt19937 shuffled;
static double exchanged[2][1024];

static __attribute__((noinline)) void jump(void **to) { __builtin_longjmp(to, 1); }
static __attribute__((noinline)) void leave(void **from, void **to)
{
    if (!__builtin_setjmp(from))
        jump(to);
}

static void wait_in(State state)
{
    fibers[running]->state = state;
    leave(fibers[running]->place, scheduler);
    threadIdx = fibers[running]->thread;
}

static void life()
{
    wait_in(DONE);
    for (;;) {
        work();
        wait_in(DONE);
    }
}

static __attribute__((noinline)) void make_fiber()
{
    Fiber *made = new Fiber;
    made->stack.resize(1 << 17);
    running = fibers.size();
    fibers.push_back(made);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {made->stack.data(), 0, made->stack.size()};
    makecontext(&context, life, 0);
    if (!__builtin_setjmp(scheduler))
        setcontext(&context);
}

static void __syncthreads() { wait_in(AT_BARRIER); }
static void __threadfence() {}
static unsigned atomicInc(unsigned *x, unsigned last)
{
    unsigned old = *x;
    *x = old >= last ? 0 : old + 1;
    return old;
}

static double __shfl_xor_sync(unsigned, double x, int distance)
{
    // two sides in turn, so that a value is not overwritten before all have read it
    int me = running, side = fibers[me]->shuffles++ % 2;
    exchanged[side][me] = x;
    wait_in(IN_SHUFFLE);
    return exchanged[side][me ^ distance];
}

// Let go on the `count` threads from `first` on, if they all wait in `state`.
static bool release(int first, int count, State state)
{
    for (int i = first; i < first + count; i++)
        if (fibers[i]->state != state)
            return false;
    for (int i = first; i < first + count; i++)
        fibers[i]->state = RUNS;
    return true;
}

static void run_warp(int first, int count)
{
    int start = shuffled() % count, step = count == 32 ? 1 + 2 * (shuffled() % 16) : 1; // an order like a shuffled one
    for (int i = 0; i < count; i++) {
        running = first + (start + i * step) % count;
        if (fibers[running]->state == RUNS) {
            threadIdx = fibers[running]->thread;
            leave(scheduler, fibers[running]->place);
        }
    }
}

// Whether all threads came to their end, and none waits in vain for another.
static bool run_block(int threads, size_t dynamic)
{
    memset(&__start_shared_memory, 0xff, shared_size());
    memset(dynamic_shared_memory, 0xff, dynamic);
    while ((int)fibers.size() < threads)
        make_fiber();
    for (int i = 0; i < threads; i++) {
        fibers[i]->state = RUNS;
        fibers[i]->shuffles = 0;
        fibers[i]->thread = {i % blockDim.x, i / blockDim.x, 0};
    }
    std::vector<int> warps((threads + 31) / 32);
    std::iota(warps.begin(), warps.end(), 0);
    do { // each warp as far as it can come alone, one after the other
        std::shuffle(warps.begin(), warps.end(), shuffled);
        for (int warp : warps)
            do
                run_warp(32 * warp, std::min(32, threads - 32 * warp));
            while (release(32 * warp, std::min(32, threads - 32 * warp), IN_SHUFFLE));
    } while (release(0, threads, AT_BARRIER));
    if (std::all_of(fibers.begin(), fibers.begin() + threads, [](Fiber *fiber) { return fiber->state == DONE; }))
        return true;
    fibers.clear();
    return false;
}

template <class... Parameters> struct Call {
    void (*kernel)(Parameters...);
    void **arguments;
    template <size_t... I> void with(std::index_sequence<I...>) { kernel(*(Parameters *)arguments[I]...); }
    void operator()() { with(std::index_sequence_for<Parameters...>()); }
};

// Launch as the driver does; 0, or 1 + the place of the first argument whose size is not that of its parameter, or -1
// where threads wait in vain.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), const unsigned *grid, const unsigned *block, size_t dynamic, void **arguments,
           const size_t *sizes, size_t count)
{
    const size_t wanted[] = {sizeof(Parameters)...};
    for (size_t i = 0; i < std::max(count, sizeof...(Parameters)); i++)
        if (count != sizeof...(Parameters) || sizes[i] != wanted[i])
            return 1 + i;
    static Call<Parameters...> call;
    call = {kernel, arguments};
    work = [] { call(); };
    gridDim = {grid[0], grid[1], 1};
    blockDim = {block[0], block[1], 1};
    std::vector<unsigned> blocks(grid[0] * grid[1]);
    for (unsigned i = 0; i < blocks.size(); i++)
        blocks[i] = i;
    std::shuffle(blocks.begin(), blocks.end(), shuffled);
    posix_memalign((void **)&dynamic_shared_memory, 16, dynamic);
    bool done = true;
    for (unsigned i : blocks) {
        blockIdx = {i % grid[0], i / grid[0], 0};
        done = done && run_block(block[0] * block[1], dynamic);
    }
    free(dynamic_shared_memory);
    return done ? 0 : -1;
}

#define LAUNCH(name) \
    extern "C" int launch_##name(const unsigned *grid, const unsigned *block, size_t dynamic, void **arguments, \
                                 const size_t *sizes, size_t count) \
    { \
        return launch(name, grid, block, dynamic, arguments, sizes, count); \
    }
