// Runs CUDA kernels on the host, to check them where there is no GPU.
//
// The threads of a block are fibers. Warps run in shuffled order, each as far as it can come alone; barriers and shuffles
// wait for whom they must; shared memory holds NaN before each block. So a missing barrier, or a thread that never comes
// to one, shows. Subnormal floats count as 0, as with -ftz=true.
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
#ifdef __SSE2__
#include <xmmintrin.h>
static unsigned float_settings() { return _mm_getcsr(); }
static void set_float_settings(unsigned settings) { _mm_setcsr(settings); }
#else
static unsigned float_settings() { return 0; }
static void set_float_settings(unsigned) {}
#endif
const unsigned FLUSH = 0x8040; // subnormal results and operands

using std::exp, std::expm1, std::fabs, std::floor, std::fmax, std::log, std::log1p, std::max, std::min, std::pow, std::sqrt, std::tanh;

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __shared__ static __attribute__((section("shared_memory")))
extern "C" char __start_shared_memory, __stop_shared_memory;
__shared__ __attribute__((used)) char always_some[16];
extern "C" size_t shared_size() { return &__stop_shared_memory - &__start_shared_memory; }
static char *dynamic_shared_memory; // as much as the launch asks for, and not a byte more

template <class Real> Real normcdf(Real x) { return std::erfc(-x * Real(M_SQRT1_2)) / 2; }
static float __fdividef(float x, float y) { return x / y; }
static int __clz(int x) { return x ? __builtin_clz(x) : 32; }
#define __isShared(x) true
#define __cvta_generic_to_shared(x) ((size_t)(x))
#define __cvta_global_to_generic(x) ((void *)(x))
#define __noinline__ __attribute__((noinline))
template <class To, class From> To bits_as(From x)
{
    To to;
    memcpy(&to, &x, sizeof(To));
    return to;
}
static unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
static int __float_as_int(float x) { return bits_as<int>(x); }
static float __int_as_float(int x) { return bits_as<float>(x); }
static long long __double_as_longlong(double x) { return bits_as<long long>(x); }
static double __longlong_as_double(long long x) { return bits_as<double>(x); }
static unsigned long long __umul64hi(unsigned long long x, unsigned long long y)
{
    return (unsigned __int128)x * y >> 64;
}

struct dim3 {
    unsigned x, y, z;
};
static dim3 gridDim, blockDim, blockIdx, threadIdx;

enum State { RUNS, AT_BARRIER, ARRIVED, AT_CLUSTER_BARRIER, IN_SHUFFLE, DONE };
struct Fiber {
    char *stack;
    void *place[5]; // where it goes on
    State state;
    dim3 thread;
    unsigned group; // of a shuffle: a bit for each thread of the warp
    int distance;
    double value;
    int arrived, awaited; // at barriers of the cluster, and behind them
};
static std::vector<Fiber *> fibers;
static void *scheduler[5];
static int running;
static void (*work)();
static std::mt19937 shuffled;

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
    made->stack = (char *)malloc(1 << 17); // of which little is touched
    running = fibers.size();
    fibers.push_back(made);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack = {made->stack, 0, 1 << 17};
    makecontext(&context, life, 0);
    if (!__builtin_setjmp(scheduler))
        setcontext(&context);
}

static void __syncthreads() { wait_in(AT_BARRIER); }
static std::vector<char *> memory_of_ranks; // of the blocks of the cluster that runs
static void *__cluster_map_shared_rank(const void *x, unsigned rank)
{
    return memory_of_ranks[rank] + ((const char *)x - dynamic_shared_memory);
}
static size_t threads_of_cluster;
static bool all_have_arrived(const Fiber *fiber)
{
    return std::all_of(fibers.begin(), fibers.begin() + threads_of_cluster,
                       [fiber](Fiber *other) { return other->arrived >= fiber->awaited; });
}
static bool goes_on; // whether the block that runs does so where it has arrived, before others
static void __cluster_barrier_arrive()
{
    fibers[running]->arrived++;
    if (!goes_on) // until others have come as far as they can
        wait_in(ARRIVED);
}
static void __cluster_barrier_wait()
{
    fibers[running]->awaited++;
    if (!all_have_arrived(fibers[running]))
        wait_in(AT_CLUSTER_BARRIER);
}
static void __threadfence() {}
static unsigned atomicInc(unsigned *x, unsigned last)
{
    unsigned old = *x;
    *x = old >= last ? 0 : old + 1;
    return old;
}

template <class T> T __shfl_xor_sync(unsigned group, T x, int distance)
{
    Fiber *me = fibers[running];
    me->group = group, me->distance = distance, me->value = x;
    wait_in(IN_SHUFFLE);
    return me->value;
}

static void __syncwarp() { __shfl_xor_sync(0xffffffffu, 0, 0); }

// Let the `count` threads from `first` on go on, if they all wait in `state`.
static bool release(int first, int count, State state)
{
    for (int i = first; i < first + count; i++)
        if (fibers[i]->state != state)
            return false;
    for (int i = first; i < first + count; i++)
        fibers[i]->state = RUNS;
    return true;
}

// Let each group of a warp's threads go on whose all wait in the same shuffle; whether there is one.
static bool release_groups(int first, int count)
{
    bool any = false;
    for (int i = 0; i < count; i++) {
        Fiber **warp = &fibers[first], *one = warp[i];
        if (one->state != IN_SHUFFLE || !(one->group >> i & 1))
            continue;
        double values[32];
        bool all = true;
        for (int j = 0; j < 32; j++)
            if (one->group >> j & 1) {
                all = all && j < count && warp[j]->state == IN_SHUFFLE && warp[j]->group == one->group;
                values[j] = all ? warp[j]->value : 0;
            }
        for (int j = 0; all && j < 32; j++)
            if (one->group >> j & 1) {
                warp[j]->value = values[j ^ warp[j]->distance];
                warp[j]->state = RUNS;
                any = true;
            }
    }
    return any;
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

static void run_block(int first, int threads)
{
    std::vector<int> warps((threads + 31) / 32);
    std::iota(warps.begin(), warps.end(), 0);
    do { // each warp as far as it can come alone, one after the other
        std::shuffle(warps.begin(), warps.end(), shuffled);
        for (int warp : warps)
            do
                run_warp(first + 32 * warp, std::min(32, threads - 32 * warp));
            while (release_groups(first + 32 * warp, std::min(32, threads - 32 * warp)));
    } while (release(first, threads, AT_BARRIER));
}

static bool release_from_cluster_barrier()
{
    bool any = false;
    for (size_t i = 0; i < threads_of_cluster; i++)
        if (fibers[i]->state == ARRIVED || (fibers[i]->state == AT_CLUSTER_BARRIER && all_have_arrived(fibers[i])))
            fibers[i]->state = RUNS, any = true;
    return any;
}

// Run blocks at the same time, each as far as it can come alone. Whether all threads came to their end, and none waits
// in vain for another.
static bool run_cluster(std::vector<unsigned> blocks, int threads, size_t dynamic)
{
    std::vector<std::vector<char>> shared(blocks.size(), std::vector<char>(shared_size(), 0xff));
    std::vector<char *> dynamics(blocks.size());
    for (char *&memory : dynamics)
        posix_memalign((void **)&memory, 16, dynamic), memset(memory, 0xff, dynamic);
    memory_of_ranks.resize(blocks.size());
    for (size_t i = 0; i < blocks.size(); i++)
        memory_of_ranks[blocks[i] % blocks.size()] = dynamics[i];
    threads_of_cluster = blocks.size() * threads;
    while (fibers.size() < threads_of_cluster)
        make_fiber();
    for (unsigned i = 0; i < blocks.size() * threads; i++) {
        fibers[i]->state = RUNS;
        fibers[i]->arrived = fibers[i]->awaited = 0;
        fibers[i]->thread = {i % threads % blockDim.x, i % threads / blockDim.x, 0};
    }
    std::vector<unsigned> order(blocks.size());
    std::iota(order.begin(), order.end(), 0);
    do {
        std::shuffle(order.begin(), order.end(), shuffled);
        for (unsigned block : order) {
            blockIdx = {blocks[block] % gridDim.x, blocks[block] / gridDim.x, 0};
            dynamic_shared_memory = dynamics[block];
            memcpy(&__start_shared_memory, shared[block].data(), shared_size());
            goes_on = shuffled() % 2;
            run_block(block * threads, threads);
            memcpy(shared[block].data(), &__start_shared_memory, shared_size());
        }
    } while (release_from_cluster_barrier());
    for (char *memory : dynamics)
        free(memory);
    if (std::all_of(fibers.begin(), fibers.begin() + blocks.size() * threads,
                    [](Fiber *fiber) { return fiber->state == DONE && fiber->arrived == fiber->awaited; }))
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
int launch(int together, bool flush, void (*kernel)(Parameters...), const unsigned *grid, const unsigned *block, size_t dynamic, void **arguments,
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
    bool done = blocks.size() % together == 0;
    unsigned settings = float_settings();
    set_float_settings(flush ? settings | FLUSH : settings);
    for (unsigned i = 0; i < blocks.size(); i += together)
        done = done && run_cluster({&blocks[i], &blocks[i] + together}, block[0] * block[1], dynamic);
    set_float_settings(settings);
    return done ? 0 : -1;
}

#define LAUNCH(name) \
    extern "C" int launch_##name(const unsigned *grid, const unsigned *block, size_t dynamic, void **arguments, \
                                 const size_t *sizes, size_t count) \
    { \
        return launch(BLOCKS, sizeof(Real) == sizeof(float), name, grid, block, dynamic, arguments, sizes, count); \
    }
