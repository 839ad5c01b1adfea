// Training steps as one kernel, of a block or of a cluster of blocks that share each batch; see cupy_arrays.cu, and
// cupy_one_kernel.py, which makes the tables.
//
// Unrolling loops in which most threads have one turn would take the compiler a tenth of its time.

#if BLOCKS > 1
#define TOGETHER __cluster_dims__(BLOCKS, 1, 1)
#else
#define TOGETHER
#endif

// The block's shared memory, as 16 bytes at a time, which are the most that a thread can copy.
struct alignas(16) Piece {
    Word halves[2];
};
extern __shared__ Piece near[];

__device__ static void copy(char *to, const char *from, Word size)
{
    Word pieces = ((Word)to | (Word)from) % 16 ? 0 : size / 16;
    EACH_OF_BLOCK(i, pieces)
        ((Piece *)to)[i] = ((const Piece *)from)[i];
    for (Word i = 16 * pieces + thread_of_block(); i < size; i += block_size())
        to[i] = from[i];
}

// Copy spans of memory, each an address, a place in shared memory and a size in bytes, to there or back.
__device__ static void copy_all(Integers spans, bool back)
{
    for (Index i = 0; i < spans.size; i += 3) {
        char *there = (char *)spans[i], *here = (char *)near + spans[i + 1];
        copy(back ? there : here, back ? here : there, spans[i + 2]);
    }
}

// What a thread takes of the next batch is asked for a step before, and the numbers of the rows two steps before, so that
// nobody waits for them; where that is more than MOST elements, or of several columns, all wait as everywhere else.
struct Ahead {
    static const int MOST = 8;
    bool begun = false;
    Word rows[MOST], bits[MOST];

    __device__ void ask_for_rows(Integers order, Index start, int first, int down)
    {
        for (int n = 0; n < MOST; n++) // behind the last row, it once more, which nobody keeps
            rows[n] = order[min(start + first + n * down, (int)order.size - 1)];
    }
    // Rows `first`, `first + down` ... of a batch of `count` rows: `read` asks for what is in a row of all the data, and
    // `keep` puts it into a row of the batch.
    template <class Read, class Keep>
    __device__ void take(Integers order, Integers cursor, int count, int first, int down, Read read, Keep keep)
    {
        Index start = cursor[0], next = start + whole(count);
        if (!begun)
            ask_for_rows(order, start, first, down);
        for (int n = 0; n < MOST && begun; n++)
            if (first + n * down < count)
                keep(first + n * down, bits[n]);
        for (int n = 0; n < MOST; n++)
            bits[n] = read(rows[n]);
        ask_for_rows(order, begun ? next + whole(count) : next, first, down);
    }

    __device__ void take_next(Table x, Integers order, Integers cursor, Matrix xb)
    {
        Steps steps(xb.columns, 1);
        Index column = min(steps.column, (int)xb.columns - 1); // threads beyond the last do as it does
        if (xb.columns <= steps.right && xb.rows <= MOST * steps.down)
            take(order, cursor, xb.rows, steps.row, steps.down, [=](Word row) { return x.bits(row, column); },
                 [=](Index row, Word bits) { xb(row, column) = x.number(bits); });
        else if (begun)
            ::take_next(x, order, cursor, xb);
        begun = true;
    }
    __device__ void take_labels_next(Integers t, Integers order, Integers cursor, Integers tb)
    {
        if (tb.size <= MOST * THREADS)
            take(order, cursor, tb.size, from_last(), THREADS, [=](Word row) { return t[row]; },
                 [=](Index row, Word label) { tb[row] = label; });
        else if (begun)
            ::take_labels_next(t, order, cursor, tb);
        begun = true;
    }
    __device__ void take_weights_next(Table w, Integers order, Integers cursor, Vector wb)
    {
        if (wb.size <= MOST * THREADS)
            take(order, cursor, wb.size, from_last(), THREADS, [=](Word row) { return w.bits(row, 0); },
                 [=](Index row, Word bits) { wb[row] = w.number(bits); });
        else if (begun)
            ::take_weights_next(w, order, cursor, wb);
        begun = true;
    }
    // the last threads of a block first, which have least to do in the parts around
    __device__ static int from_last() { return THREADS - 1 - thread_of_block(); }
};

// Two kernels at once.
TILES dense_weight_and_bias_grad(Matrix x, Matrix dz, Matrix dw, Matrix db)
{
    product(Transposed(x), Transposed(dz), x.rows, dw, [](int, int, Real sum) { return sum; }, db);
}

// As many numbers as a thread can copy at once; a block's parameters are whole such pieces.
typedef Pack<Real, 16 / sizeof(Real)> Reals;

// What shares have found of gradients becomes their sum, each block's part of it in that block.
ELEMENTS add_shares(Vector g)
{
    const int COUNT = 16 / sizeof(Real);
    ONE_TURN
    EACH(i, g.size / COUNT) {
        Reals *own = (Reals *)g.data + i, sum = {};
        for (int other = 0; other < BLOCKS; other++) {
            Reals found = *of_share(own, other);
            for (int n = 0; n < COUNT; n++)
                sum.items[n] += found.items[n];
        }
        *own = sum;
    }
}

// All blocks get the parameters that this one has changed.
ELEMENTS send_share(Vector p)
{
    ONE_TURN
    EACH(i, p.size * sizeof(Real) / 16) {
        Reals *own = (Reals *)p.data + i, piece = *own;
        for (int other = 1; other < BLOCKS; other++)
            *of_share(own, (rank() + other) % BLOCKS) = piece;
    }
    parameters_are_sent();
}

// A sum over steps, of which there are two at each place. Each block has its own; the first block's begins with what was
// there before, and grows by those of the others in the end. In order that it changes no bit how many steps a launch
// takes, each block goes on with its own sum, unless somebody has changed the sum of all: `kept` holds both, the latter
// behind those of blocks.
__device__ static double &total_at(Integers totals, Word i) { return ((double *)((char *)near + totals[i / 2]))[i % 2]; }

__device__ static void begin_totals(Integers totals, Doubles kept)
{
    Word count = 2 * totals.size;
    ONE_TURN
    EACH_OF_BLOCK(i, count) {
        double &total = total_at(totals, i);
        if (total == kept[BLOCKS * count + i])
            total = kept[rank() * count + i];
        else if (rank() > 0)
            total = 0;
    }
}

__device__ static void end_totals(Integers totals, Doubles kept)
{
    Word count = 2 * totals.size;
    ONE_TURN
    EACH_OF_BLOCK(i, count) {
        double &total = total_at(totals, i);
        kept[rank() * count + i] = total;
        if (rank() == 0) {
            for (int other = 1; other < BLOCKS; other++)
                total += *of_share(&total, other);
            kept[BLOCKS * count + i] = total;
        }
    }
}

__device__ static Integers mine(Integers of_all)
{
    Word size = of_all.size / BLOCKS;
    return {of_all.data + rank() * size, size};
}

// Tables, loads and stores are those of all blocks, one after the other.
// The second bound, that a multiprocessor runs but one such block, gives each thread all the registers that it may have.
extern "C" __global__ void TOGETHER __launch_bounds__(THREADS, 1)
    replay(Integers tables, Integers loads, Integers stores, Integers totals, Doubles kept, Word steps)
{
    Integers table = mine(tables);
    Word *given = (Word *)near;
    ONE_TURN
    EACH_OF_BLOCK(i, table.size)
        given[i] = table[i];
    copy_all(mine(loads), false);
    __syncthreads();
    begin_totals(totals, kept);
    parameters_are_sent();
BEFORE
    for (; steps; steps--) {
STEP
    }
    wait_for_parameters();
    end_totals(totals, kept);
    __syncthreads();
    copy_all(mine(stores), true);
    wait_for_all(); // a block's memory stays as long as another may read it
}
