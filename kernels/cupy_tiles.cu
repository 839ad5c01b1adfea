// Matrix products that are too small for cuBLAS to spread over a GPU; see cupy_arrays.cu, and Tile in cupy_tiles.py.
//
// A block computes a tile of the result. Its warps share the terms of the sums, and so do SHARES groups of a warp's lanes;
// those of a group lie over the tile in DOWN rows of OVER, and each computes HIGH x BROAD elements, so that what it reads
// from shared memory serves several. In the end the sums are added up, always in the same order. A warp copies what it
// needs by itself, so that none waits for another until then.

const int SHARES = 32 / (DOWN * OVER);
const int WIDTH = 16 / sizeof(Real);                       // numbers that a thread copies at once: a piece
const int CHUNK = SHARES * WIDTH > 8 ? SHARES * WIDTH : 8; // terms that a warp takes at a time
const int PIECES = CHUNK / WIDTH;                          // of a row of a chunk

typedef Pack<Real, WIDTH> Piece;
extern __shared__ Piece near[];

// Begin to copy the first `count` of SIZE bytes, and zeros for the others.
template <int SIZE> __device__ void begin_copy(void *to, const void *from, int count)
{
#if __CUDA_ARCH__ >= 800
    unsigned near = __cvta_generic_to_shared(to);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(near), "l"(from), "n"(SIZE), "r"(count) : "memory");
#else
    for (int n = 0; n < SIZE; n++)
        ((char *)to)[n] = n < count ? ((const char *)from)[n] : 0;
#endif
}

__device__ static void end_group() // of copies
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int NEWER> __device__ void wait_for_group() // and for those before it, but not for so many newer ones
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(NEWER) : "memory");
#endif
}

// A matrix whose element (i, k) is term k of the sums for row i: as it is (ALONG), or else transposed.
template <bool ALONG> struct Factor {
    const Real *data;
    Word step;
    bool aligned;
    __device__ Factor(Matrix m) : data(m.data), step(m.step), aligned(((Word)data | step * sizeof(Real)) % 16 == 0) {}
};
typedef Factor<true> AsItIs;
typedef Factor<false> Transposed;

// One side of a tile: the rows of a factor that LANES lanes share, OWN for each; shared memory has a chunk of their terms.
template <bool ALONG, int LANES, int OWN> struct Side {
    static const int SIZE = LANES * OWN, ACROSS_CHUNK = SIZE / WIDTH;
    static const int COUNT = ACROSS_CHUNK * CHUNK, COPIES = (COUNT + 31) / 32; // pieces of a chunk, and of a lane
    static const int TOGETHER = ALONG ? 1 : OWN < WIDTH ? OWN : WIDTH; // rows of a lane that lie side by side
    static const int ROWS_ON = ALONG ? 32 / PIECES : 0, TERMS_ON = ALONG ? 0 : 32 / ACROSS_CHUNK; // from copy to copy
    static_assert(PIECES <= 4, "along() is the same for all rows that a lane copies to");
    bool aligned;
    int lane, place, rows, terms; // where the lane copies its first piece to; rows and terms there are from that on
    const Real *from;
    Word to_next_copy, to_next_chunk;

    // Where in shared memory a piece of a row along its terms is: lanes side by side read from different banks.
    __device__ static int along(int i, int piece) { return i * PIECES + (piece ^ i * PIECES / 8 % PIECES); }

    // Which lane has a row, and as which of its own: lanes side by side read what lies side by side.
    __device__ static int lane_of(int i) { return i / TOGETHER % LANES; }
    __device__ static int own_of(int i) { return i / (LANES * TOGETHER) * TOGETHER + i % TOGETHER; }

    __device__ Side(Factor<ALONG> factor, int first, int rows, int terms, int lane, int warp, int warps)
        : aligned(factor.aligned), lane(lane)
    {
        int n = thread_of_block() % 32;
        int i = first + (ALONG ? n / PIECES : n % ACROSS_CHUNK * WIDTH);
        int k = warp * CHUNK + (ALONG ? n % PIECES * WIDTH : n / ACROSS_CHUNK);
        place = ALONG ? along(n / PIECES, n % PIECES) : n;
        this->rows = rows - i;
        this->terms = terms - k;
        from = factor.data + (ALONG ? i * factor.step + k : k * factor.step + i);
        to_next_copy = (ROWS_ON + TERMS_ON) * factor.step;
        to_next_chunk = warps * CHUNK * (ALONG ? 1 : factor.step);
    }

    // Begin to copy the next chunk.
    __device__ void begin(Piece *to, int terms_on)
    {
#pragma unroll
        for (int n = 0; n < COPIES; n++) {
            int rows_left = rows - n * ROWS_ON, terms_left = terms - n * TERMS_ON;
            int left = rows_left > 0 && terms_left > 0 ? min(ALONG ? terms_left : rows_left, WIDTH) : 0;
            Piece *at = to + place + 32 * n;
            const Real *next = from + n * to_next_copy;
            if (32 * n + thread_of_block() % 32 >= COUNT)
                continue;
            if (aligned)
                begin_copy<16>(at, next, left * (int)sizeof(Real));
            else
#pragma unroll 1
                for (int m = 0; m < WIDTH; m++)
                    begin_copy<sizeof(Real)>(at->items + m, next + m, m < left ? sizeof(Real) : 0);
        }
        from += to_next_chunk;
        terms -= terms_on;
    }

    // WIDTH terms for each row of this lane
    __device__ void read(const Piece *from, int piece, Real (&numbers)[OWN][WIDTH]) const
    {
        if (ALONG)
#pragma unroll
            for (int n = 0; n < OWN; n++) {
                Piece some = from[along(lane + LANES * n, piece)];
#pragma unroll
                for (int term = 0; term < WIDTH; term++)
                    numbers[n][term] = some.items[term];
            }
        else
#pragma unroll
            for (int n = 0; n < OWN * WIDTH; n += TOGETHER) {
                int term = n / OWN, row = n % OWN;
                const Piece *of_term = from + (piece * WIDTH + term) * ACROSS_CHUNK;
                Pack<Real, TOGETHER> some = ((const Pack<Real, TOGETHER> *)of_term)[row / TOGETHER * LANES + lane];
#pragma unroll
                for (int m = 0; m < TOGETHER; m++)
                    numbers[row + m][term] = some.items[m];
            }
    }
};

// Add up what groups of lanes have, of which each is left with a part: element `own` of a lane is then element own % LEFT
// of the lane in group holder(own).
template <int COUNT, int DISTANCE> struct Joined {
    static const int HALF = COUNT / 2;
    typedef Joined<HALF, 2 * DISTANCE> Next;
    static const int LEFT = Next::LEFT;
    __device__ static void join(Real *sums)
    {
        bool upper = thread_of_block() & DISTANCE;
#pragma unroll
        for (int n = 0; n < HALF; n++) {
            Real mine = upper ? sums[HALF + n] : sums[n], others = upper ? sums[n] : sums[HALF + n];
            sums[n] = mine + __shfl_xor_sync(0xffffffffu, others, DISTANCE);
        }
        Next::join(sums);
    }
    __device__ static int holder(int own) { return own / HALF + 2 * Next::holder(own % HALF); }
};
template <int COUNT> struct Joined<COUNT, 32> {
    static const int LEFT = COUNT;
    __device__ static void join(Real *) {}
    __device__ static int holder(int) { return 0; }
};

// out(i, j) = of(i, j, sum), where that is the sum of all terms a(i, k) * b(j, k).
template <bool A, bool B, class Of> __device__ void product(Factor<A> a, Factor<B> b, int terms, Matrix out, Of of)
{
    int rows = out.rows, columns = out.columns;
    typedef Side<A, DOWN, HIGH> Left;
    typedef Side<B, OVER, BROAD> Right;
    typedef Joined<HIGH * BROAD, DOWN * OVER> Sums;
    const int COUNT = Left::COUNT + Right::COUNT;
    const int APART = 40; // so that neither what lanes have nor what a row has lies in the same banks

    int lane = thread_of_block() % 32, warp = thread_of_block() / 32, warps = block_size() / 32;
    int share = lane / (DOWN * OVER), first_row = block_y() * Left::SIZE, first_column = block_x() * Right::SIZE;
    Left left(a, first_row, rows, terms, lane / OVER % DOWN, warp, warps);
    Right right(b, first_column, columns, terms, lane % OVER, warp, warps);
    Piece *chunks = near + warp * STAGES * COUNT;
    auto begin = [&](int n) { // beyond the last, zeros, which nobody reads
        Piece *to = chunks + n % STAGES * COUNT;
        left.begin(to, warps * CHUNK);
        right.begin(to + Left::COUNT, warps * CHUNK);
        end_group();
    };
#pragma unroll 1
    for (int n = 0; n < STAGES - 1; n++)
        begin(n);
    Real sums[HIGH * BROAD] = {};
    for (int n = 0; (warp + n * warps) * CHUNK < terms; n++) {
        wait_for_group<STAGES - 2>();
        __syncwarp(); // what all lanes have copied is there, and they have read what is overwritten next
        begin(n + STAGES - 1);
        const Piece *from = chunks + n % STAGES * COUNT;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece += SHARES) {
            Real u[HIGH][WIDTH], v[BROAD][WIDTH];
            left.read(from, piece + share, u);
            right.read(from + Left::COUNT, piece + share, v);
#pragma unroll
            for (int term = 0; term < WIDTH; term++)
#pragma unroll
                for (int own = 0; own < HIGH * BROAD; own++)
                    sums[own] += u[own / BROAD][term] * v[own % BROAD][term];
        }
    }

    Sums::join(sums);
    Real *parts = (Real *)near;
    wait_for_group<0>();
    __syncthreads(); // all chunks have been read, and nothing more is coming
#pragma unroll
    for (int n = 0; n < Sums::LEFT; n++)
        parts[(warp * Sums::LEFT + n) * APART + lane] = sums[n];
    __syncthreads();
    for (int element = thread_of_block(); element < Left::SIZE * Right::SIZE; element += block_size()) {
        int i = element / Right::SIZE, j = element % Right::SIZE;
        int own = Left::own_of(i) * BROAD + Right::own_of(j);
        int holder = Left::lane_of(i) * OVER + Right::lane_of(j) + DOWN * OVER * Sums::holder(own);
        Real sum = 0;
        for (int n = 0; n < warps; n++)
            sum += parts[(n * Sums::LEFT + own % Sums::LEFT) * APART + holder];
        if (first_row + i < rows && first_column + j < columns)
            out(first_row + i, first_column + j) = of(first_row + i, first_column + j, sum);
    }
}
