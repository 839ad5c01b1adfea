// Normalisation and embeddings; see cupy_arrays.cu.
//
// Statistics, and the differences from a mean, are computed in double: columns whose mean is large lose nothing.

ROWS layer_norm_forward(Matrix x, Matrix w, Matrix b, Doubles eps, Matrix y, Matrix normal, Doubles scale)
{
    EACH_ROW(i, lanes, x.rows, x.columns) {
        double mean = 0, squares = 0;
        ALONG_ROW(j, lanes, x.columns)
            mean += x(i, j);
        mean = over_row(mean, lanes) / x.columns;
        ALONG_ROW(j, lanes, x.columns)
            squares += (x(i, j) - mean) * (x(i, j) - mean);
        double factor = 1 / sqrt(over_row(squares, lanes) / x.columns + eps[0]);
        ALONG_ROW(j, lanes, x.columns) {
            normal(i, j) = (x(i, j) - mean) * factor;
            y(i, j) = normal(i, j) * w(0, j) + b(0, j);
        }
        if (lanes.mine == 0)
            scale[i] = factor;
    }
}

ROWS layer_norm_input_grad(Matrix dy, Matrix w, Matrix normal, Doubles scale, Matrix dx)
{
    EACH_ROW(i, lanes, dy.rows, dy.columns) {
        Real mean = 0, share = 0;
        ALONG_ROW(j, lanes, dy.columns) {
            Real g = dy(i, j) * w(0, j);
            mean += g;
            share += g * normal(i, j);
        }
        mean = over_row(mean, lanes) / dy.columns;
        share = over_row(share, lanes) / dy.columns;
        ALONG_ROW(j, lanes, dy.columns)
            dx(i, j) = (dy(i, j) * w(0, j) - mean - normal(i, j) * share) * Real(scale[i]);
    }
}

// Column j's gradients by weight and bias, which all threads of the column get.
__device__ static void weight_grads(Index j, Lanes lanes, Matrix dy, Matrix normal, Matrix dw, Matrix db, Real &weight,
                                    Real &bias)
{
    ALONG_COLUMN(i, j, lanes, dy) {
        weight += dy(i, j) * normal(i, j);
        bias += dy(i, j);
    }
    weight = over_column(weight, lanes);
    bias = over_column(bias, lanes);
    if (j < dy.columns)
        dw(0, j) = weight, db(0, j) = bias;
}

COLUMNS layer_norm_weight_grads(Matrix dy, Matrix normal, Matrix dw, Matrix db)
{
    EACH_COLUMN(j, lanes, dy) {
        Real weight = 0, bias = 0;
        weight_grads(j, lanes, dy, normal, dw, db, weight, bias);
    }
}

COLUMNS batch_statistics(Matrix x, Doubles momentum, Doubles running_mean, Doubles running_var, Doubles mean,
                         Doubles var)
{
    EACH_COLUMN(j, lanes, x) {
        double middle = 0, squares = 0, new_share = momentum[0];
        ALONG_COLUMN(i, j, lanes, x)
            middle += x(i, j);
        middle = over_column(middle, lanes) / x.rows;
        ALONG_COLUMN(i, j, lanes, x)
            squares += (x(i, j) - middle) * (x(i, j) - middle);
        squares = over_column(squares, lanes);
        if (j >= x.columns || lanes.row)
            continue;
        mean[j] = middle;
        var[j] = squares / x.rows;
        if (x.rows > 1) {
            running_mean[j] = (1 - new_share) * running_mean[j] + new_share * middle;
            running_var[j] = (1 - new_share) * running_var[j] + new_share * squares / (x.rows - 1);
        }
    }
}

ELEMENTS batch_norm_forward(Matrix x, Matrix w, Matrix b, Doubles mean, Doubles var, Doubles eps, Matrix y,
                            Matrix normal, Doubles scale)
{
    EACH_ELEMENT(i, j, x) {
        double factor = 1 / sqrt(var[j] + eps[0]);
        normal(i, j) = (x(i, j) - mean[j]) * factor;
        y(i, j) = normal(i, j) * w(0, j) + b(0, j);
        if (i == 0)
            scale[j] = factor;
    }
}

COLUMNS batch_norm_backward(Matrix dy, Matrix w, Matrix normal, Doubles scale, Doubles by_batch, Matrix dx, Matrix dw,
                            Matrix db)
{
    EACH_COLUMN(j, lanes, dy) {
        Real weight = 0, bias = 0;
        weight_grads(j, lanes, dy, normal, dw, db, weight, bias);
        ALONG_COLUMN(i, j, lanes, dy) {
            Real shared = by_batch[0] ? (bias + normal(i, j) * weight) / dy.rows : 0;
            dx(i, j) = (dy(i, j) - shared) * (w(0, j) * Real(scale[j]));
        }
    }
}

// The place of a code in column j's part of a table, or -1 for what is no code.
__device__ static Word place(double code, Index j, Integers start, Integers codes, Integers stride)
{
    return code >= 0 && code < codes[j] && code == floor(code) ? start[j] + Word(code) * stride[j] : -1;
}

ELEMENTS embedding_forward(Matrix x, Vector w, Integers column, Integers start, Integers codes, Integers stride,
                           Matrix y)
{
    EACH_ELEMENT(i, j, y) {
        Real code = x(i, column[j]);
        Word at = place(widened(code), j, start, codes, stride);
        y(i, j) = codes[j] == 0 ? code : at < 0 ? Real(nan("")) : w[at];
    }
}

ELEMENTS embedding_input_grad(Matrix dy, Integers column, Integers codes, Matrix dx)
{
    EACH_ELEMENT(i, k, dx) {
        Real sum = 0;
        for (Index j = 0; j < dy.columns; j++)
            if (codes[j] == 0 && column[j] == k)
                sum += dy(i, j);
        dx(i, k) = sum;
    }
}

// A warp for each entry of the table, so that sums are always taken in the same order.
ROWS embedding_weight_grad(Vector dw, Matrix dy, Matrix x, Integers column, Integers start, Integers codes,
                           Integers stride)
{
    EACH_ROW(entry, lanes, dw.size, 4 * 32) {
        Real sum = 0;
        for (Index j = 0; j < dy.columns; j++)
            if (entry >= start[j] && entry < start[j] + codes[j] * stride[j])
                ALONG_ROW(i, lanes, dy.rows)
                    if (place(widened(x(i, column[j])), j, start, codes, stride) == entry)
                        sum += dy(i, j);
        sum = over_row(sum, lanes);
        if (lanes.mine == 0)
            dw[entry] = sum;
    }
}
