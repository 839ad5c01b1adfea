// Matrix products of small networks, as parts of one kernel; see cupy_math.cu. Larger ones are left to cuBLAS.
//
// A thread computes a tile of 4 x 4 elements, which lie apart, so that threads side by side read what lies side by side.
// Where a block has fewer tiles than threads, several threads share a tile, each with a slice of the sums.
#ifdef PARTS

const int TILE = 4;
const int PART = TILE * TILE / 2; // of a tile; to share all of it at once would take double too much memory

// n / d, in fewer instructions than a division of whole numbers takes, for n below 2**21.
__device__ static int divided(int n, int d) { return __fdividef(n + 0.5f, d); }

struct alignas(16) Four {
    Real terms[4];
};

// A matrix whose element (i, k) is term k of the sums for row i: as it is (ALONG), or else transposed.
template <bool ALONG> struct Factor {
    const Real *data;
    int step;
    bool aligned;
    __device__ Factor(Matrix m) : data(m.data), step(m.step), aligned(((Word)data | step * sizeof(Real)) % 16 == 0) {}
    __device__ const Real *at(int i, int k) const { return data + (ALONG ? i * step + k : k * step + i); }
    __device__ Four four(int i, int k) const
    {
        const Real *from = at(i, k);
        if (ALONG && aligned)
            return *(const Four *)from; // at once
        int next = ALONG ? 1 : step;
        return {{from[0], from[next], from[2 * next], from[3 * next]}};
    }
};
typedef Factor<true> AsItIs;
typedef Factor<false> Transposed;

__device__ static Real (&parts_of_sums())[PART][THREADS]
{
    __shared__ Real parts[PART][THREADS];
    return parts;
}

// Call keep(tile, n, sum) for each element n of a block's tiles, with what all threads have found of it.
template <class Keep> __device__ void join(const Real (&sums)[TILE * TILE], int tiles, int slices, Keep keep)
{
    Real(&parts)[PART][THREADS] = parts_of_sums();
    for (int start = 0; start < TILE * TILE; start += PART) {
        __syncthreads(); // what was here before has been read
        for (int n = 0; n < PART; n++)
            parts[n][thread_of_block()] = start ? sums[PART + n] : sums[n]; // known indices: sums stay in registers
        __syncthreads();
        for (int at = thread_of_block(); at < PART * tiles; at += THREADS) {
            int n = divided(at, tiles), tile = at - n * tiles;
            Real sum = 0;
            for (int slice = 0; slice < slices; slice++)
                sum += parts[n][slice * tiles + tile];
            keep(tile, start + n, sum);
        }
    }
}

// Call store(i, j, sum), for each row i and column j, with the sum of all terms a(i, k) * b(j, k).
template <bool A, bool B, class Store>
__device__ void product(Factor<A> a, Factor<B> b, int rows, int columns, int terms, Store store)
{
    int down = (rows + TILE - 1) / TILE, across = (columns + TILE - 1) / TILE, all = down * across;
    int share = (all + BLOCKS - 1) / BLOCKS, first = share * block_of_grid(), tiles = min(share, all - first);
    if (tiles <= 0)
        return;
    int fours = terms / 4, slices = max(1, min(divided(THREADS, tiles), fours)), size = divided(fours - 1, slices) + 1;
    auto keep = [&](int tile, int n, Real sum) {
        int y = divided(first + tile, across), x = first + tile - y * across;
        int i = y + n / TILE * down, j = x + n % TILE * across;
        if (i < rows && j < columns)
            store(i, j, sum);
    };
    for (int start = 0; start < tiles * slices; start += THREADS) {
        int thread = start + thread_of_block(), slice = divided(thread, tiles), tile = thread - slice * tiles;
        int y = divided(first + tile, across), x = first + tile - y * across, i[TILE], j[TILE];
        for (int n = 0; n < TILE; n++) { // beyond the last, the last once more, which nobody keeps
            i[n] = min(y + n * down, rows - 1);
            j[n] = min(x + n * across, columns - 1);
        }
        Real sums[TILE * TILE] = {};
        int begin = slice * size, end = min(begin + size, slice < slices ? fours : 0);
        // where both factors are read along rows, threads side by side begin at terms apart, which lie in other banks
        int k = A && B && end > begin ? begin + x % (end - begin) : begin;
        for (int n = begin; n < end; n++) {
            Four u[TILE], v[TILE];
            for (int m = 0; m < TILE; m++)
                u[m] = a.four(i[m], 4 * k), v[m] = b.four(j[m], 4 * k);
            for (int m = 0; m < TILE * TILE; m++)
                for (int term = 0; term < 4; term++)
                    sums[m] += u[m / TILE].terms[term] * v[m % TILE].terms[term];
            k = k + 1 < end ? k + 1 : begin;
        }
        for (k = 4 * fours; k < terms && slice == 0; k++)
            for (int m = 0; m < TILE * TILE; m++)
                sums[m] += *a.at(i[m / TILE], k) * *b.at(j[m % TILE], k);
        if (slices > 1)
            join(sums, tiles, slices, keep);
        else if (slice == 0)
            for (int m = 0; m < TILE * TILE; m++)
                keep(tile, m, sums[m]);
    }
}

ELEMENTS dense_forward(Matrix x, Matrix w, Matrix b, Matrix z)
{
    product(AsItIs(x), Transposed(w), z.rows, z.columns, x.columns, [=](int i, int j, Real sum) {
        z(i, j) = sum + b(0, j);
    });
}

ELEMENTS dense_relu_forward(Matrix x, Matrix w, Matrix b, Matrix y)
{
    product(AsItIs(x), Transposed(w), y.rows, y.columns, x.columns, [=](int i, int j, Real sum) {
        Real z = sum + b(0, j);
        y(i, j) = z <= 0 ? 0 : z;
    });
}

ELEMENTS dense_input_grad(Matrix dz, Matrix w, Matrix dx)
{
    product(AsItIs(dz), AsItIs(w), dx.rows, dx.columns, dz.columns, [=](int i, int j, Real sum) { dx(i, j) = sum; });
}

ELEMENTS dense_relu_input_grad(Matrix dz, Matrix w, Matrix y, Matrix dx)
{
    product(AsItIs(dz), AsItIs(w), dx.rows, dx.columns, dz.columns, [=](int i, int j, Real sum) {
        dx(i, j) = y(i, j) <= 0 ? 0 : sum;
    });
}

ELEMENTS dense_weight_grad(Matrix x, Matrix dz, Matrix dw)
{
    product(Transposed(x), Transposed(dz), dw.rows, dw.columns, x.rows, [=](int i, int j, Real sum) {
        dw(i, j) = sum;
    });
}
#endif
