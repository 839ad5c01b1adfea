// Behind a matrix product: an activation's slope, and the bias gradient of its layer; see cupy_arrays.cu.

// dx *= slope(y), and its sums over rows.
template <class T, class Slope> __device__ void bend(Rows<T> y, Rows<T> dx, Matrix db, Room room, Slope slope)
{
    sum_rows<1>(db, room, [slope](T &dx, Real y) {
        Real bent = slope(dx, y);
        dx = bent;
        return bent;
    }, dx, y);
}

SUMS relu_grads(Matrix y, Matrix dx, Matrix db, Room room) { bend(y, dx, db, room, relu_slope); }
SUMS relu_grads_bfloat16(Halves y, Halves dx, Matrix db, Room room) { bend(y, dx, db, room, relu_slope); }

SUMS leaky_relu_grads(Matrix y, Doubles negative_slope, Matrix dx, Matrix db, Room room)
{
    Real slope = negative_slope[0];
    bend(y, dx, db, room, [slope](Real dy, Real y) { return leaky_relu_slope(dy, y, slope); });
}

SUMS elu_grads(Matrix y, Doubles alpha, Matrix dx, Matrix db, Room room)
{
    Real scale = alpha[0];
    bend(y, dx, db, room, [scale](Real dy, Real y) { return elu_slope(dy, y, scale); });
}

SUMS tanh_grads(Matrix y, Matrix dx, Matrix db, Room room) { bend(y, dx, db, room, tanh_slope); }

SUMS sigmoid_grads(Matrix y, Matrix dx, Matrix db, Room room) { bend(y, dx, db, room, sigmoid_slope); }
