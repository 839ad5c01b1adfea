// Sums over threads: of a part of a warp, of a block, of the grid, and of a cluster of blocks; see cupy_arrays.cu.

template <class T> __device__ T combine(T x, T y, bool largest) { return largest ? fmax(x, y) : x + y; }

// The sum, or the largest, of what threads side by side hold, a power of two up to a warp; the same bits in each of them.
template <class T> __device__ T over_lanes(T x, int count = 32, bool largest = false)
{
    unsigned all = count < 32 ? ((1u << count) - 1) << (thread_of_block() % 32 & -count) : 0xffffffffu;
    for (int distance = count / 2; distance; distance /= 2)
        x = combine(x, __shfl_xor_sync(all, x, distance), largest);
    return x;
}

__device__ static void *memory_of_block()
{
    __shared__ double parts[32];
    return parts;
}

// The first threads, `holding` of them, hold all that there is; where they are of one warp, that alone gets the sum.
template <class T> __device__ T over_block(T x, bool largest = false, int holding = block_size())
{
    if (holding <= 32)
        return over_lanes(x, 32, largest);
    T *parts = (T *)memory_of_block();
    int thread = thread_of_block(), warps = block_size() / 32;
    x = over_lanes(x, 32, largest);
    __syncthreads(); // what was here before has been read
    if (thread % 32 == 0)
        parts[thread / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int warp = 1; warp < warps; warp++)
        x = combine(x, parts[warp], largest);
    return x;
}

template <class T> __device__ T over_row(T x, Lanes lanes, bool largest = false)
{
    return lanes.count > 32 ? over_block(x, largest) : over_lanes(x, lanes.count, largest);
}

// The sum of what the threads of a column hold, in each of them.
template <class T> __device__ T over_column(T x, Lanes lanes)
{
    for (int distance = 16; distance >= lanes.count; distance /= 2) // rows side by side in a warp
        x += __shfl_xor_sync(0xffffffffu, x, distance);
#ifndef PARTS
    __shared__ T parts[1024];
    int thread = thread_of_block(), apart = max(32, lanes.count);
    __syncthreads(); // what was here before has been read
    if (thread % apart < lanes.count)
        parts[thread / apart * lanes.count + lanes.mine] = x;
    __syncthreads();
    x = 0;
    for (int group = 0; group < block_size() / apart; group++)
        x += parts[group * lanes.count + lanes.mine];
#endif
    return x;
}

// Whether this is the last thread to come here, of one in each block, which sees all that the others did before.
__device__ static bool is_last_thread(unsigned *count, unsigned blocks)
{
    if (blocks == 1)
        return true;
    __threadfence();
    bool last = atomicInc(count, blocks - 1) == blocks - 1;
    __threadfence();
    return last;
}

// The same for whole blocks.
__device__ static bool is_last_block(unsigned *count, unsigned blocks)
{
    __shared__ bool last;
    __syncthreads();
    if (blocks == 1)
        return true;
    if (is_first_thread())
        last = is_last_thread(count, blocks);
    __syncthreads();
    return last;
}
__device__ static bool is_last_block(Room room) { return is_last_block(room.blocks(), grid_size()); }

// Add up what all threads of the grid hold, always in the same order; true in the last block alone, which has the sum.
__device__ static bool over_grid(double &x, Room room, int holding = block_size())
{
    x = over_block(x, false, holding);
    if (grid_size() == 1)
        return true;
    if (is_first_thread())
        room.part(block_of_grid()) = x;
    if (!is_last_block(room))
        return false;
    x = 0;
    for (Index i = thread_of_block(); i < grid_size(); i += block_size())
        x += room.part(i);
    x = over_block(x);
    return true;
}

// Add a sum of what a block's first threads hold, and a weight that all know, to what outlives the kernel.
__device__ static void add_up(double x, double weight, Doubles total, Room room, int holding = block_size())
{
    double before[2] = {};
    if (is_first_thread()) // asks for these now, in order not to wait later
        before[0] = total[0], before[1] = total[1];
    if (over_grid(x, room, holding) && is_first_thread()) {
        total[0] = before[0] + x;
        total[1] = before[1] + weight;
    }
}

// Blocks of a cluster, each on a multiprocessor of its own, share the rows of a batch, and reach each other's memory.
#if defined PARTS && BLOCKS > 1
__device__ static int rank() { return blockIdx.x; }
__device__ static void wait_for_all()
{
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
}
// Blocks go on once they have sent parameters, up to where they need those of others.
__device__ static void parameters_are_sent() { __cluster_barrier_arrive(); }
__device__ static void wait_for_parameters() { __cluster_barrier_wait(); }
// where another block has what this one has at x
template <class T> __device__ T *of_share(T *x, int other) { return (T *)__cluster_map_shared_rank(x, other); }
__device__ static Word whole(Word) { return ROWS_OF_ALL; }
#else
__device__ static int rank() { return 0; }
__device__ static void wait_for_all() { __syncthreads(); }
__device__ static void parameters_are_sent() {}
__device__ static void wait_for_parameters() { __syncthreads(); }
template <class T> __device__ T *of_share(T *x, int) { return x; }
__device__ static Word whole(Word rows) { return rows; }
#endif
#ifndef PARTS
#define BLOCKS 1
#endif

// Leave a sum for the next kernel; that of all blocks of a cluster, in each.
__device__ static void keep_sum(double x, Room room)
{
    bool last = over_grid(x, room);
    if (BLOCKS > 1) {
        if (is_first_thread())
            room.part(0) = x;
        wait_for_all();
        x = 0;
        for (int other = 0; other < BLOCKS; other++)
            x += *of_share(&room.part(0), other);
    }
    if (last && is_first_thread())
        room.sum() = x;
}
