// Matrix products of small networks, a thread for each element; see cupy_math.cu. Larger ones are left to cuBLAS.

// What neuron j makes of row i.
__device__ static Real neuron(Index i, Index j, Matrix x, Matrix w, Matrix b)
{
    Real sum = 0;
    for (Index k = 0; k < x.columns; k++)
        sum += x(i, k) * w(k, j);
    return sum + b(0, j);
}

ELEMENTS dense_forward(Matrix x, Matrix w, Matrix b, Matrix z)
{
    EACH_ELEMENT(i, j, z)
        z(i, j) = neuron(i, j, x, w, b);
}

ELEMENTS dense_relu_forward(Matrix x, Matrix w, Matrix b, Matrix y)
{
    EACH_ELEMENT(i, j, y) {
        Real z = neuron(i, j, x, w, b);
        y(i, j) = z <= 0 ? 0 : z;
    }
}

ELEMENTS dense_input_grad(Matrix dz, Matrix w, Matrix dx)
{
    EACH_ELEMENT(i, k, dx) {
        Real sum = 0;
        Index j = k % dz.columns; // each row of w from another column on, so that threads do not queue for one bank
        for (Index n = 0; n < dz.columns; n++) {
            sum += dz(i, j) * w(k, j);
            j = j + 1 < dz.columns ? j + 1 : 0;
        }
        dx(i, k) = sum;
    }
}

ELEMENTS dense_weight_grad(Matrix x, Matrix dz, Matrix dw)
{
    EACH_ELEMENT(k, j, dw) {
        Real sum = 0;
        for (Index i = 0; i < x.rows; i++)
            sum += x(i, k) * dz(i, j);
        dw(k, j) = sum;
    }
}
