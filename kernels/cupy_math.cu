// What the kernels share: arrays, how loops are spread over threads, and sums.
//
// A kernel is named as its op, and its parameters as the op's arguments; cupy_engine.py reads both here. Real is float
// or double, as the file is compiled. How many threads there are changes speed alone, except where it is said below.

typedef long long Index;

struct Matrix {
    Real *data;
    Index rows, columns, step;
    __device__ Real &operator()(Index i, Index j) const { return data[i * step + j]; }
};

template <class T> struct Numbers {
    T *data;
    Index size;
    __device__ T &operator[](Index i) const { return data[i]; }
};
typedef Numbers<Real> Vector;
typedef Numbers<double> Doubles;
typedef Numbers<Index> Integers;
typedef Numbers<unsigned long long> Words;

// A user's array, of any type (in the order of TYPES in cupy_engine.py) and strides in bytes.
struct Table {
    const char *data;
    Index rows, columns, row_step, column_step, type;
    __device__ double operator()(Index i, Index j) const
    {
        const char *at = data + i * row_step + j * column_step;
        switch (type) {
        case 0: return *(const unsigned char *)at;
        case 1: return *(const signed char *)at;
        case 2: return *(const short *)at;
        case 3: return *(const int *)at;
        case 4: return *(const long long *)at;
        case 5: return *(const unsigned char *)at;
        case 6: return *(const unsigned short *)at;
        case 7: return *(const unsigned *)at;
        case 8: return *(const unsigned long long *)at;
        case 9: return *(const float *)at;
        default: return *(const double *)at;
        }
    }
};

// Room to work in. It begins with a count of blocks, which is 0 between launches, and two sums for a later kernel.
struct Room {
    double *data;
    Index size;
    __device__ unsigned *blocks() const { return (unsigned *)data; }
    __device__ double &sum(int which) const { return data[1 + which]; }
    __device__ double &part(Index block, int which) const { return data[3 + 2 * block + which]; }
};

// ELEMENTS: as many threads as the last array has elements, or fewer. For the others the first array counts. ROWS: blocks
// of (32, any), a warp for each row, or of (any, 1), a block for each row. COLUMNS: blocks of (32, up to 32). So one
// block of (32, up to 32) suits all of them, which is how cupy_engine.py runs small networks: as parts of one kernel.
#ifdef PARTS
#define KERNEL(threads) __device__ static void
#else
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#endif
#define ELEMENTS KERNEL(256)
#define ROWS KERNEL(256)
#define COLUMNS KERNEL(1024)
#define ONE_BLOCK KERNEL(256)

__device__ static Index block_size() { return blockDim.x * blockDim.y; }
__device__ static Index thread_of_block() { return threadIdx.y * blockDim.x + threadIdx.x; }
__device__ static Index block_of_grid() { return blockIdx.y * gridDim.x + blockIdx.x; }
__device__ static Index grid_size() { return gridDim.x * gridDim.y; }
__device__ static bool is_first_thread() { return thread_of_block() == 0; }

#define EACH(i, n) \
    for (Index i = block_of_grid() * block_size() + thread_of_block(); i < (n); i += grid_size() * block_size())
#define EACH_ELEMENT(i, j, array) \
    for (Index i = blockIdx.y * (Index)blockDim.y + threadIdx.y; i < (array).rows; i += gridDim.y * (Index)blockDim.y) \
        for (Index j = blockIdx.x * (Index)blockDim.x + threadIdx.x; j < (array).columns; \
             j += gridDim.x * (Index)blockDim.x)
#define EACH_ROW(i, n) \
    for (Index i = blockIdx.x * (Index)blockDim.y + threadIdx.y; i < (n); i += gridDim.x * (Index)blockDim.y)
#define ALONG_ROW(j, n) for (Index j = threadIdx.x; j < (n); j += blockDim.x)
// all threads of a block go through as many columns, beyond the last one too: over_column waits for them
#define EACH_COLUMN(j, n) \
    for (Index j = blockIdx.x * (Index)32 + threadIdx.x; j - threadIdx.x < (n); j += gridDim.x * (Index)32)
#define ALONG_COLUMN(i, j, array) \
    for (Index i = threadIdx.y; i < (array).rows && (j) < (array).columns; i += blockDim.y)

__device__ static double combine(double x, double y, bool largest) { return largest ? fmax(x, y) : x + y; }

// The sum, or the largest, of what the threads of a warp hold; the same bits in each of them.
__device__ static double over_warp(double x, bool largest = false)
{
    for (int distance = 16; distance; distance /= 2)
        x = combine(x, __shfl_xor_sync(0xffffffffu, x, distance), largest);
    return x;
}

__device__ static double over_block(double x, bool largest = false)
{
    __shared__ double parts[32];
    int thread = thread_of_block(), warps = block_size() / 32;
    x = over_warp(x, largest);
    __syncthreads(); // what was here before has been read
    if (thread % 32 == 0)
        parts[thread / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int warp = 1; warp < warps; warp++)
        x = combine(x, parts[warp], largest);
    return x;
}

__device__ static double over_row(double x, bool largest = false)
{
    return blockDim.x == 32 ? over_warp(x, largest) : over_block(x, largest);
}

__device__ static double over_column(double x)
{
    __shared__ double parts[32][33];
    __syncthreads(); // what was here before has been read
    parts[threadIdx.y][threadIdx.x] = x;
    __syncthreads();
    x = 0;
    for (int i = 0; i < blockDim.y; i++)
        x += parts[i][threadIdx.x];
    return x;
}

// Whether this is the last block of the grid to come here, which sees all that the others did before.
__device__ static bool is_last_block(Room room)
{
    __shared__ bool last;
    __syncthreads();
    if (is_first_thread()) {
        unsigned others = grid_size() - 1;
        __threadfence();
        last = atomicInc(room.blocks(), others) == others;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Add up what all threads of the grid hold, always in the same order; true in the last block alone, which has the sums.
__device__ static bool over_grid(double &x, double &y, Room room)
{
    x = over_block(x);
    y = over_block(y);
    if (is_first_thread()) {
        room.part(block_of_grid(), 0) = x;
        room.part(block_of_grid(), 1) = y;
    }
    if (!is_last_block(room))
        return false;
    x = y = 0;
    for (Index i = thread_of_block(); i < grid_size(); i += block_size()) {
        x += room.part(i, 0);
        y += room.part(i, 1);
    }
    x = over_block(x);
    y = over_block(y);
    return true;
}

// Add to two sums that outlive the kernel.
__device__ static void add_up(double x, double y, Doubles total, Room room)
{
    if (over_grid(x, y, room) && is_first_thread()) {
        total[0] += x;
        total[1] += y;
    }
}

// Leave a sum for the next kernel, as room.sum(0).
__device__ static void keep_sum(double x, Room room)
{
    double nothing = 0;
    if (over_grid(x, nothing, room) && is_first_thread())
        room.sum(0) = x;
}

__device__ static Real sign(Real x) { return x > 0 ? Real(1) : x < 0 ? Real(-1) : x; }

__device__ static Real sigmoid(Real x)
{
    Real e = exp(-fabs(x));
    return (x > 0 ? Real(1) : e) / (1 + e);
}
