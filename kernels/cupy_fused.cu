// Behind a matrix product: an activation's slope, and the bias gradient of its layer; see cupy_math.cu.

// dx *= slope(y), and its sums over rows.
template <class Array, class Slope> __device__ void bend(Array y, Array dx, Matrix db, Slope slope)
{
    EACH_COLUMN(j, lanes, dx) {
        Real sum = 0;
        ALONG_COLUMN(i, j, lanes, dx) {
            Real bent = slope(dx(i, j), y(i, j));
            dx(i, j) = bent;
            sum += bent;
        }
        sum = over_column(sum, lanes);
        if (j < dx.columns)
            db(0, j) = sum;
    }
}

struct ReluSlope {
    __device__ Real operator()(Real dy, Real y) const { return y <= 0 ? 0 : dy; }
};

COLUMNS relu_grads(Matrix y, Matrix dx, Matrix db) { bend(y, dx, db, ReluSlope()); }
COLUMNS relu_grads_bfloat16(Halves y, Halves dx, Matrix db) { bend(y, dx, db, ReluSlope()); }

COLUMNS leaky_relu_grads(Matrix y, Doubles negative_slope, Matrix dx, Matrix db)
{
    Real slope = negative_slope[0];
    bend(y, dx, db, [slope](Real dy, Real y) { return y > 0 ? dy : slope * dy; });
}

COLUMNS elu_grads(Matrix y, Doubles alpha, Matrix dx, Matrix db)
{
    Real scale = alpha[0];
    bend(y, dx, db, [scale](Real dy, Real y) { return y > 0 ? dy : dy * (y + scale); });
}

COLUMNS tanh_grads(Matrix y, Matrix dx, Matrix db)
{
    bend(y, dx, db, [](Real dy, Real y) { return dy * ((1 - y) * (1 + y)); });
}

COLUMNS sigmoid_grads(Matrix y, Matrix dx, Matrix db)
{
    bend(y, dx, db, [](Real dy, Real y) { return dy * (y * (1 - y)); });
}
