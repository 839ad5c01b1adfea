// What the kernels share: arrays, how loops are spread over threads, and sums.
//
// A kernel is named as its op, and its parameters as the op's arguments; cupy_engine.py reads both here. Real is float
// or double, as the file is compiled. How many threads there are changes speed alone, except where it is said below.

typedef long long Word;
#ifdef PARTS
typedef int Index; // which a GPU computes with in half as many instructions, and small networks have no more elements
#else
typedef long long Index;
#endif

template <class T> struct Rows {
    T *data;
    Word rows, columns, step;
    __device__ T &operator()(Index i, Index j) const { return data[i * (Index)step + j]; }
};
typedef Rows<Real> Matrix;

// A bfloat16, which is the first half of a float.
struct Half {
    unsigned short bits;
    __device__ operator Real() const { return __int_as_float(bits << 16); }
    __device__ void operator=(Real x) // the nearest, of two the even one
    {
        unsigned whole = __float_as_uint(x);
        bits = x != x ? 0x7fc0 : (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
    }
};
typedef Rows<Half> Halves;

template <class T> struct Numbers {
    T *data;
    Word size;
    __device__ T &operator[](Word i) const { return data[i]; }
};
typedef Numbers<Real> Vector;
typedef Numbers<double> Doubles;
typedef Numbers<Word> Integers;
typedef Numbers<unsigned long long> Words;

// A user's array, of any type (in the order of TYPES in cupy_sources.py) and strides in bytes.
struct Table {
    const char *data;
    Word rows, columns, row_step, column_step, type;
    // an element as it lies in memory, and as a number: apart, so that a thread can ask for several before it needs one
    __device__ Word bits(Word i, Word j) const
    {
        const char *at = data + i * row_step + j * column_step;
        switch (type) {
        case 1: return *(const signed char *)at;
        case 2: return *(const short *)at;
        case 3: return *(const int *)at;
        case 0:
        case 5: return *(const unsigned char *)at;
        case 6: return *(const unsigned short *)at;
        case 7:
        case 9: return *(const unsigned *)at;
        default: return *(const Word *)at;
        }
    }
    __device__ double number(Word bits) const
    {
        switch (type) {
        case 8: return (unsigned long long)bits;
        case 9: return __int_as_float(bits);
        case 10: return __longlong_as_double(bits);
        default: return bits;
        }
    }
};

// Room to work in. It begins with a count of blocks, which is 0 between launches, and two sums for a later kernel.
struct Room {
    double *data;
    Word size;
    __device__ unsigned *blocks() const { return (unsigned *)data; }
    __device__ double &sum(int which) const { return data[1 + which]; }
    __device__ double &part(Index block, int which) const { return data[3 + 2 * block + which]; }
};

// A kernel may be spread over any number of blocks, whose threads lie in a row. The patterns only tell cupy_engine.py how
// many suit the last array (ELEMENTS) or the first (the others). With PARTS, they are parts of one kernel.
#ifdef PARTS
#define KERNEL(threads) __device__ static void
#else
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#endif
#define ELEMENTS KERNEL(256)
#define ROWS KERNEL(256)
#define COLUMNS KERNEL(1024)
#define ONE_BLOCK KERNEL(256)

#ifdef PARTS
const int THREADS = 512; // of a block
const int ACROSS = BLOCKS > 1 ? 16 : 128; // columns that a block sums up at a time
__device__ static int block_size() { return THREADS; }
__device__ static Index block_x() { return 0; }
__device__ static Index block_y() { return BLOCKS > 1 ? blockIdx.y : 0; }
__device__ static Index grid_x() { return 1; }
__device__ static Index grid_y() { return BLOCKS; }
#else
const int ACROSS = 16;
__device__ static int block_size() { return blockDim.x; }
__device__ static Index block_x() { return blockIdx.x; }
__device__ static Index block_y() { return blockIdx.y; }
__device__ static Index grid_x() { return gridDim.x; }
__device__ static Index grid_y() { return gridDim.y; }
#endif
__device__ static Index block_of_grid() { return block_y() * grid_x() + block_x(); }
__device__ static Index grid_size() { return grid_x() * grid_y(); }
__device__ static int thread_of_block() { return threadIdx.x; }
__device__ static bool is_first_thread() { return thread_of_block() == 0; }

// How a block's threads lie over an array: in rows of as many as it has columns, or the next power of two, up to `most`.
struct Lanes {
    int count, mine, row, rows;
    __device__ Lanes(Index columns, int most)
    {
        int bits = columns < most ? 32 - __clz((int)columns - 1) : 31 - __clz(most);
        count = 1 << bits, mine = thread_of_block() & (count - 1);
        row = thread_of_block() >> bits, rows = block_size() >> bits;
    }
};

#define EACH(i, n) \
    for (Index i = block_of_grid() * block_size() + thread_of_block(); i < (n); i += grid_size() * block_size())
#define EACH_OF_BLOCK(i, n) for (Word i = thread_of_block(); i < (n); i += block_size())
#define EACH_ELEMENT(i, j, array) \
    if (Lanes lanes((array).columns, block_size()); true) \
        for (Index i = block_y() * lanes.rows + lanes.row; i < (array).rows; i += grid_y() * lanes.rows) \
            for (Index j = block_x() * lanes.count + lanes.mine; j < (array).columns; \
                 j += grid_x() * lanes.count)
// a thread for each four columns, up to a warp for each row, or a block where rows are WIDE
#define EACH_ROW(i, lanes, n, columns) \
    if (Lanes lanes((columns) < WIDE ? ((columns) + 3) / 4 : block_size(), (columns) < WIDE ? 32 : block_size()); true) \
        for (Index i = block_of_grid() * lanes.rows + lanes.row; i < (n); i += grid_size() * lanes.rows)
#define ALONG_ROW(j, lanes, n) for (Index j = lanes.mine; j < (n); j += lanes.count)
// all threads of a block go through as many columns, beyond the last one too: over_column waits for them
#define EACH_COLUMN(j, lanes, array) \
    if (Lanes lanes((array).columns, ACROSS); true) \
        for (Index j = block_of_grid() * lanes.count + lanes.mine; j - lanes.mine < (array).columns; \
             j += grid_size() * lanes.count)
#define ALONG_COLUMN(i, j, lanes, array) \
    for (Index i = lanes.row; i < (array).rows && (j) < (array).columns; i += lanes.rows)

template <class T> __device__ T combine(T x, T y, bool largest) { return largest ? fmax(x, y) : x + y; }

// The sum, or the largest, of what threads side by side hold, a power of two up to a warp; the same bits in each of them.
template <class T> __device__ T over_lanes(T x, int count = 32, bool largest = false)
{
    unsigned all = count < 32 ? ((1u << count) - 1) << (thread_of_block() % 32 & -count) : 0xffffffffu;
    for (int distance = count / 2; distance; distance /= 2)
        x = combine(x, __shfl_xor_sync(all, x, distance), largest);
    return x;
}

__device__ __noinline__ static double over_block(double x, bool largest = false)
{
    __shared__ double parts[32];
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
    return lanes.count > 32 ? T(over_block(x, largest)) : over_lanes(x, lanes.count, largest);
}

// The sum of what the threads of a column hold, in each of them.
__device__ __noinline__ static double over_column(double x, Lanes lanes)
{
    __shared__ double parts[1024];
    int thread = thread_of_block(), apart = max(32, lanes.count);
    for (int distance = 16; distance >= lanes.count; distance /= 2) // rows side by side in a warp
        x += __shfl_xor_sync(0xffffffffu, x, distance);
    __syncthreads(); // what was here before has been read
    if (thread % apart < lanes.count)
        parts[thread / apart * lanes.count + lanes.mine] = x;
    __syncthreads();
    x = 0;
    for (int group = 0; group < block_size() / apart; group++)
        x += parts[group * lanes.count + lanes.mine];
    return x;
}

// Whether this is the last block of the grid to come here, which sees all that the others did before.
__device__ static bool is_last_block(Room room)
{
    __shared__ bool last;
    __syncthreads();
    if (grid_size() == 1)
        return true;
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
    if (grid_size() == 1)
        return true;
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
