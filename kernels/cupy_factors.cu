// What cuBLAS needs done before it multiplies matrices; see cupy_arrays.cu.

const int SIDE = 64; // of a tile
const int AT_ONCE = 16; // elements of a tile for each of 256 threads

// By tiles that go through shared memory, so that threads side by side read, and write, what lies side by side.
ELEMENTS transpose(Matrix x, Matrix t)
{
    __shared__ Real tile[SIDE][SIDE + 1]; // one more, so that the elements of a column are in different banks
    Index down = (x.rows + SIDE - 1) / SIDE, across = (x.columns + SIDE - 1) / SIDE;
    int j = thread_of_block() % SIDE, first = thread_of_block() / SIDE, step = SIDE / AT_ONCE;
    for (Index at = block_of_grid(); at < down * across; at += grid_size()) {
        Index row = at / across * SIDE, column = at % across * SIDE;
        Real held[AT_ONCE]; // so that a thread asks for all before it needs one
        for (int n = 0, i = first; n < AT_ONCE; n++, i += step)
            held[n] = row + i < x.rows && column + j < x.columns ? x(row + i, column + j) : Real(0);
        __syncthreads(); // what was here before has been read
        for (int n = 0, i = first; n < AT_ONCE; n++, i += step)
            tile[i][j] = held[n];
        __syncthreads();
        for (int n = 0, i = first; n < AT_ONCE; n++, i += step)
            if (column + i < x.columns && row + j < x.rows)
                t(column + i, row + j) = tile[j][i];
    }
}

// Those of a product, and of the weights that it changes.
ONE_BLOCK step_factors(Doubles lr, Vector factors)
{
    if (is_first_thread()) {
        factors[0] = -lr[0];
        factors[1] = 1;
    }
}
