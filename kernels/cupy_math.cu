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
__device__ static int block_size() { return THREADS; }
__device__ static Index block_x() { return 0; }
__device__ static Index block_y() { return 0; }
__device__ static Index grid_x() { return 1; }
__device__ static Index grid_y() { return 1; }
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
    __device__ Lanes(Index columns, int most) : Lanes(columns, most, thread_of_block(), block_size()) {}
    __device__ Lanes(Index columns, int most, int thread, int threads)
    {
        int bits = columns < most ? 32 - __clz((int)columns - 1) : 31 - __clz(most);
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
#define EACH_ROW(i, lanes, n, columns) \
    if (Lanes lanes((columns) < WIDE ? ((columns) + 3) / 4 : block_size(), (columns) < WIDE ? 32 : block_size()); true) \
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

template <class T> __device__ T over_block(T x, bool largest = false)
{
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
__device__ __noinline__ static double over_column(double x, Lanes lanes)
{
    __shared__ double parts[1024];
    int thread = thread_of_block(), apart = max(32, lanes.count);
    for (int distance = 16; distance >= lanes.count; distance /= 2) // rows side by side in a warp
        x += __shfl_xor_sync(0xffffffffu, x, distance);
#ifdef PARTS
    return x;
#endif
    __syncthreads(); // what was here before has been read
    if (thread % apart < lanes.count)
        parts[thread / apart * lanes.count + lanes.mine] = x;
    __syncthreads();
    x = 0;
    for (int group = 0; group < block_size() / apart; group++)
        x += parts[group * lanes.count + lanes.mine];
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
__device__ static bool over_grid(double &x, Room room)
{
    x = over_block(x);
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

// Add a sum, and a weight that all threads know, to what outlives the kernel.
__device__ static void add_up(double x, double weight, Doubles total, Room room)
{
    double before[2] = {};
    if (is_first_thread()) // asks for these now, in order not to wait later
        before[0] = total[0], before[1] = total[1];
    if (over_grid(x, room) && is_first_thread()) {
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
__device__ static Word &rows_of_batch()
{
    __shared__ Word rows;
    return rows;
}
__device__ static Word whole(Word) { return rows_of_batch(); }
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

// Elements side by side, which a thread reads or writes at once where they lie on a boundary of so many bytes, up to 16:
// memory-bound kernels need that to be as fast as memory.
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T items[N];
};

// Whether each row begins where a pack can.
template <int N, class T> __device__ bool is_aligned(Rows<T> x)
{
    return ((Word)x.data | x.step * sizeof(T)) % alignof(Pack<T, N>) == 0;
}

// Whether four columns can be read and written at a time.
template <class T> __device__ bool by_fours(Matrix x, Rows<T> out)
{
#ifdef PARTS
    return false;
#else
    return x.columns % 4 == 0 && is_aligned<4>(x) && is_aligned<4>(out);
#endif
}

// Elements from (i, j) on, at once if the pack is whole; else one by one, and the row's last one for those beyond it.
template <int N, class T> __device__ Pack<T, N> load(Rows<T> x, Index i, Index j, bool whole)
{
    if (whole)
        return *(const Pack<T, N> *)&x(i, j);
    Pack<T, N> pack;
    for (int n = 0; n < N; n++)
        pack.items[n] = x(i, j + n < x.columns ? j + n : (Index)x.columns - 1);
    return pack;
}

template <int N, class T> __device__ void store(Pack<T, N> pack, Rows<T> x, Index i, Index j, bool whole)
{
    const int WORDS = N * sizeof(T) / sizeof(unsigned);
    if (WORDS && whole) { // else halves would go one by one
        Pack<unsigned, WORDS + !WORDS> words;
        memcpy(&words, &pack, sizeof(words));
        *(Pack<unsigned, WORDS + !WORDS> *)&x(i, j) = words;
    } else
        for (int n = 0; n < N && j + n < x.columns; n++)
            x(i, j + n) = pack.items[n];
}

// What is at the same place in several rows.
template <class T, int N, int DEEP> struct Packs {
    Pack<T, N> rows[DEEP];
};

template <int N, int DEEP, class T>
__device__ Packs<T, N, DEEP> load_rows(Rows<T> x, Index i, Index step, Index j, bool whole)
{
    Packs<T, N, DEEP> packs;
    for (int row = 0; row < DEEP; row++)
        packs.rows[row] = load<N>(x, i + row * step < x.rows ? i + row * step : i, j, whole);
    return packs;
}

// Call f with what arrays hold from column j on, in some rows `step` apart: with its place in a pack, and the element of
// each array, for f to change. All is read before the first WRITTEN arrays are written.
template <int N, int DEEP, int WRITTEN, class F, class T, class... More>
__device__ void with_packs(F f, Index i, Index step, Index j, bool whole, Rows<T> x, Rows<More>... more)
{
    [&](auto packs, auto... others) {
        for (int row = 0; row < DEEP; row++, i += step) {
            if (i >= x.rows)
                return;
            for (int n = 0; n < N; n++)
                f(n, packs.rows[row].items[n], others.rows[row].items[n]...);
            int place = 0;
            if (place++ < WRITTEN)
                store(packs.rows[row], x, i, j, whole);
            ((place++ < WRITTEN ? store(others.rows[row], more, i, j, whole) : void()), ...);
        }
    }(load_rows<N, DEEP>(x, i, step, j, whole), load_rows<N, DEEP>(more, i, step, j, whole)...);
}

template <int N, int WRITTEN, class F, class... T>
__device__ void each_pack(F f, Index rows, Index columns, Rows<T>... x)
{
    Steps steps(columns, N);
    for (Index i = steps.row; i < rows; i += steps.down)
#pragma unroll 1
        for (Index j = steps.column; j < columns; j += steps.right)
            with_packs<N, 1, WRITTEN>([f](int, auto &...items) { f(items...); }, i, 0, j, j + N <= columns, x...);
}

__device__ constexpr int smallest(int size) { return size; }
template <class... More> __device__ constexpr int smallest(int size, More... more)
{
    return size < smallest(more...) ? size : smallest(more...);
}

// Call f with the element of each array, for all places, and let it change the first WRITTEN arrays.
template <int WRITTEN, class F, class T, class... More> __device__ void each(F f, Rows<T> x, Rows<More>... more)
{
#ifndef PARTS
    const int N = 16 / smallest(sizeof(T), sizeof(More)...);
    if (is_aligned<N>(x) && (is_aligned<N>(more) && ...))
        return each_pack<N, WRITTEN>(f, x.rows, x.columns, x, more...);
#endif
    each_pack<1, WRITTEN>(f, x.rows, x.columns, x, more...);
}

template <int WRITTEN, class F, class... T> __device__ void each(F f, Numbers<T>... x)
{
    each<WRITTEN>(f, Rows<T>{x.data, 1, x.size, 0}...);
}

__device__ static Real multiplied(Real x, Real y) { return x * y; }

// out = f(in...), for each element.
template <class F, class Out, class... In> __device__ void map(Out out, F f, In... in)
{
    each<1>([f](auto &out, auto... in) { out = f(Real(in)...); }, out, in...);
}

// A row as if it stood in each row of a matrix.
template <class T> __device__ Rows<T> in_each_row(Rows<T> row, Word rows) { return {row.data, rows, row.columns, 0}; }

// The sums over rows of what f gives for each element of some arrays, the first WRITTEN of which it may change.
#ifdef PARTS
template <int WRITTEN, class F, class T, class... More>
__device__ void sum_rows(Matrix sums, Room, F f, Rows<T> x, Rows<More>... more)
{
    EACH_COLUMN(j, lanes, x) {
        Real sum = 0;
        ALONG_COLUMN(i, j, lanes, x)
            sum += f(x(i, j), more(i, j)...);
        sum = over_column(sum, lanes);
        if (j < x.columns)
            sums(0, j) = sum;
    }
}
#else
const int LINE = 128; // bytes of a row, which are some columns of a block
template <int WRITTEN, class F, class T, class... More>
__device__ void sum_rows(Matrix sums, Room room, F f, Rows<T> x, Rows<More>... more)
{
    const int N = 16 / sizeof(T), ACROSS = LINE / sizeof(T);
    const int AHEAD = 16 / N / (1 + sizeof...(More)); // rows that a thread waits for, as many as fit in registers
    __shared__ Real parts[8][ACROSS]; // of each warp
    bool aligned = is_aligned<N>(x) && (is_aligned<N>(more) && ...);
    Lanes lanes((x.columns + N - 1) / N, ACROSS / N);
    int thread = thread_of_block(), warps = block_size() / 32, width = lanes.count * N;
    for (Index group = block_x(); group * width < x.columns; group += grid_x()) {
        Index first = group * width, j = first + N * lanes.mine;
        Real sum[N] = {};
        auto add_rows = [&](bool whole) {
            Index step = grid_y() * lanes.rows;
            for (Index i = block_y() * lanes.rows + lanes.row; i < x.rows; i += AHEAD * step)
                with_packs<N, AHEAD, WRITTEN>([&](int n, auto &...items) { sum[n] += f(items...); }, i, step, j, whole,
                                              x, more...);
        };
        if (aligned && j + N <= x.columns)
            add_rows(true);
        else if (j < x.columns)
            add_rows(false);
        for (int n = 0; n < N; n++)
            for (int distance = 16; distance >= lanes.count; distance /= 2) // rows side by side in a warp
                sum[n] += __shfl_xor_sync(0xffffffffu, sum[n], distance);
        __syncthreads(); // what was here before has been read
        if (thread % 32 < lanes.count)
            for (int n = 0; n < N; n++)
                parts[thread / 32][N * lanes.mine + n] = sum[n];
        __syncthreads();
        bool keeps = thread < width && first + thread < x.columns;
        Real total = 0;
        for (int warp = 0; warp < warps && keeps; warp++)
            total += parts[warp][thread];
        if (grid_y() > 1) {
            if (keeps)
                room.part(block_y(), first + thread, x.columns) = total;
            if (!is_last_block(room.blocks(group), grid_y()))
                continue;
            total = 0;
            for (Index block = 0; block < grid_y() && keeps; block++)
                total += room.part(block, first + thread, x.columns);
        }
        if (keeps)
            sums(0, first + thread) = total;
    }
}
#endif

// A number's bits, which as a whole number are above 0, or below, where it is. Comparisons of floats take subnormal ones
// for 0, because CuPy compiles with -ftz=true.
__device__ static int bits_of(float x) { return __float_as_int(x); }
__device__ static Word bits_of(double x) { return __double_as_longlong(x); }

__device__ static bool above_zero(Real x) { return x == x && bits_of(x) > 0; }
__device__ static bool up_to_zero(Real x) { return x == x && bits_of(x) <= 0; }

// As a double, in which a subnormal float is another number than 0.
__device__ static double widened(float x)
{
    int bits = bits_of(x), fraction = bits & 0x7fffff;
    return bits & 0x7f800000 ? x : (bits < 0 ? -fraction : fraction) * 1.401298464324817e-45; // 2 ** -149
}
__device__ static double widened(double x) { return x; }

__device__ static Real sign(Real x)
{
    double wide = widened(x);
    return wide > 0 ? Real(1) : wide < 0 ? Real(-1) : x;
}

__device__ static Real rectified(Real x) { return up_to_zero(x) ? 0 : x; } // which lets NaN through
__device__ static Real sigmoid(Real x)
{
    Real e = exp(-fabs(x));
    return (x > 0 ? Real(1) : e) / (1 + e);
}

// dy times an activation's slope where it gives y.
__device__ static Real relu_slope(Real dy, Real y) { return up_to_zero(y) ? 0 : dy; }
__device__ static Real leaky_relu_slope(Real dy, Real y, Real below) { return above_zero(y) ? dy : below * dy; }
__device__ static Real elu_slope(Real dy, Real y, Real scale) { return above_zero(y) ? dy : dy * (y + scale); }
__device__ static Real tanh_slope(Real dy, Real y) { return dy * ((1 - y) * (1 + y)); }
__device__ static Real sigmoid_slope(Real dy, Real y) { return dy * (y * (1 - y)); }
