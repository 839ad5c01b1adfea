// Element by element, and sums over rows, as fast as memory is: several elements at a time; see cupy_arrays.cu.

// Elements side by side, which a thread reads or writes at once where they lie on a boundary of so many bytes, up to 16:
// memory-bound kernels need that to be as fast as memory.
template <class T, int N> struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
    T items[N];
};

// Whether each row begins where a pack can.
template <int N, class T> __device__ bool is_aligned(Rows<T> x)
{
    Word address = (Word)x.data;
#ifdef PARTS
    if (__isShared(x.data)) // as an address there, the compiler knows its last bits
        address = __cvta_generic_to_shared(x.data);
#endif
    return (address | x.step * sizeof(T)) % alignof(Pack<T, N>) == 0;
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

// What is at the same place in several rows of an array.
template <class T, int N, int DEEP> struct Packs {
    Rows<T> array;
    Pack<T, N> rows[DEEP];
};

template <int N, int DEEP, class T>
__device__ Packs<T, N, DEEP> load_rows(Rows<T> x, Index i, Index step, Index j, bool whole)
{
    Packs<T, N, DEEP> packs = {x};
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
            if (i >= packs.array.rows)
                return;
            for (int n = 0; n < N; n++)
                f(n, packs.rows[row].items[n], others.rows[row].items[n]...);
            int place = 0;
            if (place++ < WRITTEN)
                store(packs.rows[row], packs.array, i, j, whole);
            ((place++ < WRITTEN ? store(others.rows[row], others.array, i, j, whole) : void()), ...);
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
