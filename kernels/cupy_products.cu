// Matrix products of small networks; see cupy_math.cu. Larger ones are left to cuBLAS.
//
// A thread computes a tile of 4 x 4 elements, which lie apart, so that threads side by side read what lies side by side.
// Where a block has fewer tiles than threads, several threads share a tile, each with a slice of the sums.

const int TILE = 4;

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

const int PART = TILE * TILE / 2; // for all of a tile at once, double would take too much shared memory

__device__ static Real (&parts_of_sums())[PART][512]
{
    __shared__ Real parts[PART][512];
    return parts;
}

// Give what threads have found of tiles to `store`, with the sums of all slices of a tile.
template <class Store> __device__ void join(const Real (&sums)[TILE * TILE], int tiles, int slices, Store store)
{
    Real(&parts)[PART][512] = parts_of_sums();
    int thread = thread_of_block();
    for (int start = 0; start < TILE * TILE; start += PART) {
        __syncthreads(); // what was here before has been read
        for (int n = 0; n < PART; n++)
            parts[n][thread] = start ? sums[PART + n] : sums[n];
        __syncthreads();
        for (int at = thread; at < PART * tiles; at += block_size()) {
            Real sum = 0;
            for (int slice = 0; slice < slices; slice++)
                sum += parts[at / tiles][slice * tiles + at % tiles];
            store(at % tiles, start + at / tiles, sum);
        }
    }
}

// Call store(i, j, sum), for each row i and column j, with the sum of all terms a(i, k) * b(j, k).
template <bool A, bool B, class Store>
__device__ void product(Factor<A> a, Factor<B> b, int rows, int columns, int terms, Store store)
{
    int down = (rows + TILE - 1) / TILE, across = (columns + TILE - 1) / TILE, all = down * across;
    int share = (all + (int)grid_size() - 1) / (int)grid_size(), first = share * (int)block_of_grid();
    int tiles = min(share, all - first), fours = terms / 4;
    if (tiles <= 0)
        return;
    auto keep = [&](int tile, int n, Real sum) {
        int i = (first + tile) / across + n / TILE * down, j = (first + tile) % across + n % TILE * across;
        if (i < rows && j < columns)
            store(i, j, sum);
    };
    int slices = max(1, min(block_size() / tiles, fours));
    for (int thread = thread_of_block(); thread - thread_of_block() < tiles * slices; thread += block_size()) {
        Real sums[TILE * TILE] = {};
        int tile = thread % tiles, slice = thread / tiles, i[TILE], j[TILE];
        for (int n = 0; n < TILE; n++) { // beyond the last, the last once more, which nobody keeps
            i[n] = min((first + tile) / across + n * down, rows - 1);
            j[n] = min((first + tile) % across + n * across, columns - 1);
        }
        int start = fours * slice / slices, end = slice < slices ? fours * (slice + 1) / slices : start;
        // where both factors are read along rows, threads side by side begin at terms apart, which lie in other banks
        int turn = A && B && end > start ? j[0] % (end - start) : 0;
        for (int n = start; n < end; n++) {
            int k = 4 * (n + turn < end ? n + turn : n + turn - end + start);
            Four x[TILE], y[TILE];
            for (int m = 0; m < TILE; m++)
                x[m] = a.four(i[m], k), y[m] = b.four(j[m], k);
            for (int m = 0; m < TILE * TILE; m++)
                for (int term = 0; term < 4; term++)
                    sums[m] += x[m / TILE].terms[term] * y[m % TILE].terms[term];
        }
        for (int k = 4 * fours; k < terms && slice == slices - 1; k++)
            for (int m = 0; m < TILE * TILE; m++)
                sums[m] += *a.at(i[m / TILE], k) * *b.at(j[m % TILE], k);
        if (slices > 1)
            join(sums, tiles, slices, keep);
        else if (thread < tiles)
            for (int m = 0; m < TILE * TILE; m++)
                keep(tile, m, sums[m]);
    }
}

typedef Factor<true> AsItIs;
typedef Factor<false> Transposed;

ELEMENTS dense_forward(Matrix x, Matrix w, Matrix b, Matrix z)
{
    product(AsItIs(x), Transposed(w), z.rows, z.columns, x.columns, [=](int i, int j, Real sum) { z(i, j) = sum + b(0, j); });
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
    product(Transposed(x), Transposed(dz), dw.rows, dw.columns, x.rows, [=](int i, int j, Real sum) { dw(i, j) = sum; });
}
