// Matrix products of small networks, a thread for each element; see cupy_math.cu. Larger ones are left to cuBLAS.

ELEMENTS dense_forward(Matrix x, Matrix w, Matrix b, Matrix z)
{
    EACH_ELEMENT(i, j, z) {
        Real sum = 0;
        for (Index k = 0; k < x.columns; k++)
            sum += x(i, k) * w(k, j);
        z(i, j) = sum + b(0, j);
    }
}

ELEMENTS dense_relu_forward(Matrix x, Matrix w, Matrix b, Matrix y)
{
    EACH_ELEMENT(i, j, y) {
        Real sum = 0;
        for (Index k = 0; k < x.columns; k++)
            sum += x(i, k) * w(k, j);
        sum += b(0, j);
        y(i, j) = sum <= 0 ? 0 : sum;
    }
}

ELEMENTS dense_input_grad(Matrix dz, Matrix w, Matrix dx)
{
    EACH_ELEMENT(i, k, dx) {
        Real sum = 0;
        for (Index j = 0; j < dz.columns; j++)
            sum += dz(i, j) * w(k, j);
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
