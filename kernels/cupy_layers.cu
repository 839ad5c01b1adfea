// Batches, dropout, and what layers add to matrix products; see cupy_math.cu.

ELEMENTS shuffle(Words keys, Integers order)
{
    unsigned size = order.size;
    EACH(i, order.size) {
        unsigned row = i;
        for (Index k = 0; k < keys.size; k++) {
            unsigned middle = (keys[k] >> 32) * size >> 32, other = middle - row; // which is huge below 0
            other = other + size < other ? other + size : other;
            unsigned product = (row > other ? row : other) * (unsigned)keys[k];
            row = product >> 31 ? other : row;
        }
        order[i] = row;
    }
}

ONE_BLOCK next_batch(Integers order, Integers cursor, Integers rows)
{
    Word start = cursor[0];
    EACH_OF_BLOCK(i, rows.size)
        rows[i] = order[start + i];
    __syncthreads();
    if (is_first_thread())
        cursor[0] = start + rows.size;
}

ONE_BLOCK next_rate(Doubles rates, Integers step, Doubles rate)
{
    if (is_first_thread())
        rate[0] = rates[step[0]++];
}

// The rows of the next batch, where nobody has written them down.
struct Coming {
    Integers order, cursor;
    __device__ Word operator[](Word i) const { return order[cursor[0] + i]; }
};

template <class Places, class Batch> __device__ void take_rows(Table x, Places rows, Batch xb)
{
    const int AHEAD = 4; // how many elements a thread waits for at a time
    Lanes lanes(xb.columns, block_size());
    Index step = grid_y() * lanes.rows;
    for (Index i = block_y() * lanes.rows + lanes.row; i < xb.rows; i += AHEAD * step)
        for (Index j = block_x() * lanes.count + lanes.mine; j < xb.columns; j += grid_x() * lanes.count) {
            Word row[AHEAD], bits[AHEAD];
            for (int n = 0; n < AHEAD; n++)
                row[n] = i + n * step < xb.rows ? rows[i + n * step] : 0;
            for (int n = 0; n < AHEAD; n++)
                bits[n] = x.bits(row[n], j);
            for (int n = 0; n < AHEAD; n++)
                if (i + n * step < xb.rows)
                    xb(i + n * step, j) = x.number(bits[n]);
        }
}

template <class Places> __device__ void take_numbers(Integers t, Places rows, Integers tb)
{
    EACH(i, tb.size)
        tb[i] = t[rows[i]];
}

template <class Places> __device__ void take_column(Table w, Places rows, Vector wb)
{
    EACH(i, wb.size)
        wb[i] = w.number(w.bits(rows[i], 0));
}

ELEMENTS take(Table x, Integers rows, Matrix xb) { take_rows(x, rows, xb); }
ELEMENTS take_bfloat16(Table x, Integers rows, Halves xb) { take_rows(x, rows, xb); }
ELEMENTS take_labels(Integers t, Integers rows, Integers tb) { take_numbers(t, rows, tb); }
ELEMENTS take_weights(Table w, Integers rows, Vector wb) { take_column(w, rows, wb); }

ELEMENTS take_next(Table x, Integers order, Integers cursor, Matrix xb) { take_rows(x, Coming{order, cursor}, xb); }
ELEMENTS take_next_bfloat16(Table x, Integers order, Integers cursor, Halves xb)
{
    take_rows(x, Coming{order, cursor}, xb);
}
ELEMENTS take_labels_next(Integers t, Integers order, Integers cursor, Integers tb)
{
    take_numbers(t, Coming{order, cursor}, tb);
}
ELEMENTS take_weights_next(Table w, Integers order, Integers cursor, Vector wb)
{
    take_column(w, Coming{order, cursor}, wb);
}

ONE_BLOCK move_cursor(Integers rows, Integers cursor)
{
    if (is_first_thread())
        cursor[0] += rows.size;
}

template <class Slopes> __device__ void sum_rows(Slopes dz, Matrix db)
{
    EACH_COLUMN(j, lanes, dz) {
        Real sum = 0;
        ALONG_COLUMN(i, j, lanes, dz)
            sum += dz(i, j);
        sum = over_column(sum, lanes);
        if (j < dz.columns)
            db(0, j) = sum;
    }
}

COLUMNS dense_bias_grad(Matrix dz, Matrix db) { sum_rows(dz, db); }
COLUMNS dense_bias_grad_bfloat16(Halves dz, Matrix db) { sum_rows(dz, db); }

COLUMNS bias_grad(Matrix dy, Matrix db) { sum_rows(dy, db); } // of the layer before, behind its activation

template <class Sums> __device__ void add_row(Sums b, Sums z)
{
    EACH_ELEMENT(i, j, z)
        z(i, j) = Real(z(i, j)) + Real(b(0, j));
}

ELEMENTS add_bias(Matrix b, Matrix z) { add_row(b, z); }
ELEMENTS add_bias_bfloat16(Halves b, Halves z) { add_row(b, z); }

template <class Sums> __device__ void relu(Sums z)
{
    EACH_ELEMENT(i, j, z)
        if (z(i, j) <= 0) // the comparison lets NaN through
            z(i, j) = 0;
}

ELEMENTS rectify(Matrix z) { relu(z); }
ELEMENTS rectify_bfloat16(Halves z) { relu(z); }

ELEMENTS to_bfloat16(Matrix x, Halves h)
{
    EACH_ELEMENT(i, j, x)
        h(i, j) = x(i, j);
}

// Four random words of Philox4x64-10 (Salmon et al., 2011), as np.random.Philox gives them.
struct Block {
    unsigned long long word[4];
};

__device__ static Block philox(unsigned long long counter, Words key)
{
    unsigned long long c0 = counter, c1 = key[2], c2 = key[3], c3 = 0, k0 = key[0], k1 = key[1];
    const unsigned long long m0 = 0xD2E7470EE14C6C93ull, m1 = 0xCA5A826395121157ull;
    for (int round = 0; round < 10; round++) {
        unsigned long long high0 = __umul64hi(m0, c0), low0 = m0 * c0, high1 = __umul64hi(m1, c2), low1 = m1 * c2;
        c0 = high1 ^ c1 ^ k0, c1 = low1, c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B97F4A7C15ull, k1 += 0xBB67AE8584CAA73Bull;
    }
    return {{c0, c1, c2, c3}};
}

ELEMENTS dropout_forward(Matrix x, Doubles rate, Words key, Matrix y, Matrix mask, Room room)
{
    Index size = x.rows * x.columns;
    Real scale = rate[0] < 1 ? 1 / (1 - rate[0]) : 0;
    EACH(block, (size + 7) / 8) {
        Block random = philox(block + 1, key);
        Index i = 8 * block / x.columns, j = 8 * block % x.columns;
        for (int k = 0; k < 8; k++) // unrolled, and so with words in registers
            if (i < x.rows) {
                unsigned half = random.word[k / 2] >> (k % 2 ? 32 : 0);
                Real kept = (half >> 8) / 16777216.0 >= rate[0] ? scale : 0;
                mask(i, j) = kept;
                y(i, j) = x(i, j) * kept;
                if (++j == x.columns)
                    j = 0, i++;
            }
    }
    if (is_last_block(room) && is_first_thread())
        key[2]++;
}

ELEMENTS dropout_backward(Matrix dy, Matrix mask, Matrix dx)
{
    EACH_ELEMENT(i, j, dy)
        dx(i, j) = dy(i, j) * mask(i, j);
}
