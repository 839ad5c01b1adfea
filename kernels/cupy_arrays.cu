// What all kernels begin with: arrays, and how loops over them are spread over threads.
//
// A kernel is named as its op, and its parameters as the op's arguments; cupy_sources.py reads both here. Real is float
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

// Room to work in. It begins with a sum for a later kernel, and ends with counts of blocks, which are 0 between launches.
// Between these lie the sums that blocks leave for the last of them.
struct Room {
    double *data;
    Word size;
    __device__ unsigned *blocks(Index which = 0) const { return (unsigned *)(data + size) - 1 - which; }
    __device__ double &sum() const { return data[0]; }
    __device__ double &part(Index block) const { return data[1 + block]; }
    __device__ Real &part(Index block, Index j, Index columns) const { return ((Real *)(data + 1))[block * columns + j]; }
};

// A kernel may be spread over any number of blocks, whose threads lie in a row. The patterns only tell cupy_engine.py how
// many suit the last array (ELEMENTS) or the first (the others). A multiprocessor has room for at least four blocks of 256
// threads, which is as many as most_blocks says. With PARTS, they are parts of one kernel.
#ifdef PARTS
#define KERNEL(threads, blocks) __device__ static void
#else
#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#endif
#define ELEMENTS KERNEL(256, 4)
#define ROWS KERNEL(512, 2)
#define COLUMNS KERNEL(1024, 1)
#define SUMS KERNEL(256, 4)
#define ONE_BLOCK KERNEL(256, 1)
#define TILES KERNEL(256, 1)

#ifdef PARTS
const int THREADS = 256; // of a block
const int ACROSS = 8; // columns that a warp sums up at a time
__device__ static int thread_of_block() { return threadIdx.x % THREADS; } // so that the compiler knows the largest
__device__ static int block_size() { return THREADS; }
__device__ static Index block_x() { return 0; }
__device__ static Index block_y() { return 0; }
__device__ static Index grid_x() { return 1; }
__device__ static Index grid_y() { return 1; }
#else
const int ACROSS = 16;
__device__ static int thread_of_block() { return threadIdx.x; }
__device__ static int block_size() { return blockDim.x; }
__device__ static Index block_x() { return blockIdx.x; }
__device__ static Index block_y() { return blockIdx.y; }
__device__ static Index grid_x() { return gridDim.x; }
__device__ static Index grid_y() { return gridDim.y; }
#endif
__device__ static Index block_of_grid() { return block_y() * grid_x() + block_x(); }
__device__ static Index grid_size() { return grid_x() * grid_y(); }
__device__ static bool is_first_thread() { return thread_of_block() == 0; }

// How a block's threads lie over an array: in rows of as many as it has columns, or the next power of two, up to `most`.
struct Lanes {
    int count, mine, row, rows;
    __device__ Lanes(Index columns, int most) : Lanes(columns, most, thread_of_block(), block_size()) {}
    __device__ Lanes(Index columns, int most, int thread, int threads)
    {
        int bits = columns < 2 ? 0 : columns < most ? 32 - __clz((int)columns - 1) : 31 - __clz(most);
        count = 1 << bits, mine = thread & (count - 1);
        row = thread >> bits, rows = threads >> bits;
    }
};

// Where a thread begins in an array, and its steps to what it is to do next, if it does `together` columns at a time:
// blocks lie side by side along a row, as many as it takes, and so on downward.
struct Steps {
    Index row, column, down, right;
    __device__ Steps(Index columns, int together)
    {
        Lanes lanes((columns + together - 1) / together, block_size());
#ifdef PARTS
        row = lanes.row, column = together * lanes.mine, down = lanes.rows, right = together * lanes.count;
#else
        unsigned width = together * lanes.count, most = (columns + width - 1) / width, blocks = grid_size();
        unsigned block = block_of_grid(), across = most < blocks ? most : blocks, x = block % across;
        row = block / across * lanes.rows + lanes.row, column = x * width + together * lanes.mine;
        down = (blocks - x + across - 1) / across * lanes.rows, right = across * width;
#endif
    }
};

// Before a loop in which most threads of a small network have one turn, so that the compiler does not unroll it.
#ifdef PARTS
#define ONE_TURN _Pragma("unroll 1")
#else
#define ONE_TURN
#endif

#define EACH(i, n) \
    for (Index i = block_of_grid() * block_size() + thread_of_block(); i < (n); i += grid_size() * block_size())
// the last threads of a block first, which have least to do in the parts around
#define EACH_FROM_LAST(i, n) \
    for (Index i = (block_of_grid() + 1) * block_size() - 1 - thread_of_block(); i < (n); i += grid_size() * block_size())
#define EACH_OF_BLOCK(i, n) for (Word i = thread_of_block(); i < (n); i += block_size())
#define EACH_ELEMENT(i, j, array) \
    if (Steps steps((array).columns, 1); true) \
        for (Index i = steps.row; i < (array).rows; i += steps.down) \
            for (Index j = steps.column; j < (array).columns; j += steps.right)
// a thread for each four columns, up to a warp for each row, or a block where rows are WIDE
__device__ static Lanes lanes_of_row(Index columns)
{
    bool wide = columns >= WIDE; // one call, or the compiler forgets that lanes are never none, and unrolls nothing
    return Lanes(wide ? block_size() : (columns + 3) / 4, wide ? block_size() : 32);
}
#define EACH_ROW(i, lanes, n, columns) \
    if (Lanes lanes = lanes_of_row(columns); true) \
        for (Index i = block_of_grid() * lanes.rows + lanes.row; i < (n); i += grid_size() * lanes.rows)
#define ALONG_ROW(j, lanes, n) for (Index j = lanes.mine; j < (n); j += lanes.count)
// all threads of a group, a block or else a warp, go through as many columns, beyond the last one too: over_column waits
// for them; the last warps first, which have least to do in the parts around
#ifdef PARTS
#define EACH_COLUMN(j, lanes, array) \
    if (Lanes lanes((array).columns, ACROSS, thread_of_block() % 32, 32); true) \
        for (Index j = (block_size() - 1 - thread_of_block()) / 32 * lanes.count + lanes.mine; \
             j - lanes.mine < (array).columns; j += block_size() / 32 * lanes.count)
#else
#define EACH_COLUMN(j, lanes, array) \
    if (Lanes lanes((array).columns, ACROSS); true) \
        for (Index j = block_of_grid() * lanes.count + lanes.mine; j - lanes.mine < (array).columns; \
             j += grid_size() * lanes.count)
#endif
#define ALONG_COLUMN(i, j, lanes, array) \
    for (Index i = lanes.row; i < (array).rows && (j) < (array).columns; i += lanes.rows)
