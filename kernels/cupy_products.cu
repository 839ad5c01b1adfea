// Matrix products with what follows them. As kernels of their own they are computed by cupy_tiles.cu, or left to cuBLAS;
// as parts of one kernel, see cupy_arrays.cu, by what follows here.
//
// A thread computes a tile of HIGH x BROAD elements. Where a block has fewer tiles than threads, several threads of a warp
// share a tile, each with a slice of the sums. Shapes are known when this is compiled, but for rows that blocks share.
#ifdef PARTS

const int HIGH = 4, BROAD = 4, AT_ONCE = 4; // terms

// A matrix whose element (i, k) is term k of the sums for row i: as it is (ALONG), or else transposed.
template <bool ALONG> struct Factor {
    const Real *data;
    int step;
    bool aligned;
    __device__ Factor(Matrix m) : data(m.data), step(m.step), aligned(is_aligned<AT_ONCE>(m)) {}
    __device__ const Real *at(int i, int k) const { return data + (ALONG ? i * step + k : k * step + i); }
    // Terms from k on of each of some rows, at once where they lie so; the rows lie `beside` each other or not.
    template <int COUNT>
    __device__ void load(Real (&terms)[COUNT][AT_ONCE], const int (&rows)[COUNT], bool beside, int k) const
    {
        for (int n = 0; n < COUNT * AT_ONCE; n++) {
            int row = ALONG ? n / AT_ONCE : n % COUNT, term = ALONG ? n % AT_ONCE : n / COUNT;
            if (ALONG && aligned) {
                if (term == 0) {
                    Pack<Real, AT_ONCE> some = *(const Pack<Real, AT_ONCE> *)at(rows[row], k);
                    for (int m = 0; m < AT_ONCE; m++)
                        terms[row][m] = some.items[m];
                }
            } else if (!ALONG && aligned && beside) {
                if (row == 0) {
                    Pack<Real, COUNT> some = *(const Pack<Real, COUNT> *)at(rows[0], k + term);
                    for (int m = 0; m < COUNT; m++)
                        terms[m][term] = some.items[m];
                }
            } else
                terms[row][term] = *at(rows[row], k + term);
        }
    }
};
typedef Factor<true> AsItIs;
typedef Factor<false> Transposed;

// out(i, j) = of(i, j, sum), where that is the sum of all terms a(i, k) * b(j, k). If they are wanted, sums_of_b(0, j) is the
// sum of all b(j, k).
template <bool A, bool B, class Of>
__device__ void product(Factor<A> a, Factor<B> b, int terms, Matrix out, Of of, Matrix sums_of_b = {})
{
    int rows = out.rows, columns = out.columns;
    const int SIZE = HIGH * BROAD;
    int down = (rows + HIGH - 1) / HIGH, across = (columns + BROAD - 1) / BROAD, tiles = down * across;
    // whether a thread's rows, or columns, lie side by side, and so can be read at once, even those beyond the last; else
    // its columns lie apart, so that threads side by side read and write what lies side by side
    bool rows_beside = HIGH * down <= a.step, columns_beside = !B && BROAD * across <= b.step && b.aligned;
    int chunks = terms / AT_ONCE, bits = 5; // of a lane's number in its warp, which say whose slice it has not
    while (bits > 0 && tiles << (6 - bits) <= THREADS && 1 << (6 - bits) <= chunks)
        bits--;
    int slices = 32 >> bits, lane = thread_of_block() % 32, slice = lane >> bits;
    for (int start = 0; start < tiles; start += THREADS / 32 << bits) {
        int tile = start + (thread_of_block() / 32 << bits) + lane % (1 << bits), last = min(tile, tiles - 1);
        int y = last / across, x = last - y * across, i[HIGH], j[BROAD];
        auto column_of = [=](int n) { return columns_beside ? x * BROAD + n : x + n * across; };
        for (int n = 0; n < HIGH; n++) // beyond the last, the last once more, which nobody keeps
            i[n] = min(y * HIGH + n, rows - 1);
        for (int n = 0; n < BROAD; n++)
            j[n] = min(column_of(n), columns - 1);
        bool adds_b = sums_of_b.columns && tile < across;
        Real sums[SIZE] = {}, sum_of_b[BROAD] = {};
        for (int chunk = slice; chunk < chunks; chunk += slices) {
            Real u[HIGH][AT_ONCE], v[BROAD][AT_ONCE];
            // where both factors are read along rows, threads side by side begin at terms apart, which lie in other banks
            int k = AT_ONCE * (A && B ? (chunk + x) % chunks : chunk);
            a.load(u, i, rows_beside, k);
            b.load(v, j, columns_beside, k);
            for (int n = 0; n < SIZE; n++)
                for (int term = 0; term < AT_ONCE; term++)
                    sums[n] += u[n / BROAD][term] * v[n % BROAD][term];
            for (int n = 0; n < BROAD && adds_b; n++)
                for (Real term : v[n])
                    sum_of_b[n] += term;
        }
        for (int k = AT_ONCE * chunks + slice; k < terms; k += slices) {
            for (int n = 0; n < SIZE; n++)
                sums[n] += *a.at(i[n / BROAD], k) * *b.at(j[n % BROAD], k);
            for (int n = 0; n < BROAD && adds_b; n++)
                sum_of_b[n] += *b.at(j[n], k);
        }
        if (sums_of_b.columns)
            for (int n = 0; n < BROAD; n++) {
                for (int distance = 16; distance >> bits; distance /= 2)
                    sum_of_b[n] += __shfl_xor_sync(0xffffffffu, sum_of_b[n], distance);
                if (adds_b && slice == 0 && column_of(n) < columns)
                    sums_of_b(0, j[n]) = sum_of_b[n];
            }
        // Threads that share a tile exchange halves of their sums, until each has added up those that it keeps.
        int first = 0, kept = SIZE;
#pragma unroll
        for (int distance = 16, half = SIZE / 2; distance; distance /= 2, half /= 2)
            if (distance >> bits) {
                bool upper = lane & distance;
                for (int n = 0; n < max(1, half); n++) {
                    Real mine = upper ? sums[n + half] : sums[n], other = upper ? sums[n] : sums[n + half];
                    sums[n] = mine + __shfl_xor_sync(0xffffffffu, other, distance);
                }
                first += upper ? half : 0;
                kept = max(1, half);
            }
        auto for_kept = [&](auto f) {
            for (int n = 0; n < kept; n++) {
                int at = first + n, row = y * HIGH + at / BROAD;
                f(row, column_of(at % BROAD), sums[n]);
            }
        };
        // all is read before something is written, since the compiler has to think that it might be the same
        for_kept([=](int row, int column, Real &sum) { sum = of(min(row, rows - 1), min(column, columns - 1), sum); });
        if (columns_beside && kept >= BROAD && columns % BROAD == 0 && is_aligned<BROAD>(out)) {
            for (int n = 0; n < kept; n += BROAD) {
                Pack<Real, BROAD> some;
                memcpy(&some, sums + n, sizeof(some));
                int row = y * HIGH + (first + n) / BROAD;
                if (tile < tiles && row < rows)
                    *(Pack<Real, BROAD> *)&out(row, x * BROAD) = some;
            }
        } else
            for_kept([=](int row, int column, Real sum) {
                if (tile < tiles && row < rows && column < columns)
                    out(row, column) = sum;
            });
    }
}
#endif

TILES dense_forward(Matrix x, Matrix w, Matrix b, Matrix z)
{
    product(AsItIs(x), Transposed(w), x.columns, z, [b](int, int j, Real sum) { return sum + b(0, j); });
}

TILES dense_relu_forward(Matrix x, Matrix w, Matrix b, Matrix y)
{
    product(AsItIs(x), Transposed(w), x.columns, y, [b](int, int j, Real sum) {
        Real z = sum + b(0, j);
        return z <= 0 ? 0 : z;
    });
}

TILES dense_input_grad(Matrix dz, Matrix w, Matrix dx)
{
    product(AsItIs(dz), AsItIs(w), dz.columns, dx, [](int, int, Real sum) { return sum; });
}

TILES dense_relu_input_grad(Matrix dz, Matrix w, Matrix y, Matrix dx)
{
    product(AsItIs(dz), AsItIs(w), dz.columns, dx, [y](int i, int j, Real sum) { return relu_slope(sum, y(i, j)); });
}

TILES dense_weight_grad(Matrix x, Matrix dz, Matrix dw)
{
    product(Transposed(x), Transposed(dz), x.rows, dw, [](int, int, Real sum) { return sum; });
}
