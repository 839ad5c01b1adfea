// Activations and other work element by element; see cupy_arrays.cu.

ELEMENTS add(Matrix x, Matrix y, Matrix z)
{
    map(z, [](Real x, Real y) { return x + y; }, x, y);
}

ELEMENTS multiply(Matrix x, Matrix y, Matrix z) { map(z, multiplied, x, y); }

ELEMENTS scale(Matrix x, Doubles factor, Matrix y)
{
    Real by = factor[0];
    map(y, [by](Real x) { return by * x; }, x);
}

ELEMENTS relu_forward(Matrix x, Matrix y) { map(y, rectified, x); }

ELEMENTS relu_backward(Matrix dy, Matrix y, Matrix dx) { map(dx, relu_slope, dy, y); }

ELEMENTS leaky_relu_forward(Matrix x, Doubles negative_slope, Matrix y)
{
    Real slope = negative_slope[0];
    map(y, [slope](Real x) { return x > 0 ? x : slope * x; }, x);
}

ELEMENTS leaky_relu_backward(Matrix dy, Matrix y, Doubles negative_slope, Matrix dx)
{
    Real slope = negative_slope[0];
    map(dx, [slope](Real dy, Real y) { return leaky_relu_slope(dy, y, slope); }, dy, y);
}

ELEMENTS elu_forward(Matrix x, Doubles alpha, Matrix y)
{
    Real scale = alpha[0];
    map(y, [scale](Real x) { return x > 0 ? x : scale * expm1(x); }, x);
}

ELEMENTS elu_backward(Matrix dy, Matrix y, Doubles alpha, Matrix dx)
{
    Real scale = alpha[0];
    map(dx, [scale](Real dy, Real y) { return elu_slope(dy, y, scale); }, dy, y);
}

ELEMENTS tanh_forward(Matrix x, Matrix y)
{
    map(y, [](Real x) { return tanh(x); }, x);
}

ELEMENTS tanh_backward(Matrix dy, Matrix y, Matrix dx) { map(dx, tanh_slope, dy, y); }

ELEMENTS sigmoid_forward(Matrix x, Matrix y) { map(y, sigmoid, x); }

ELEMENTS sigmoid_backward(Matrix dy, Matrix y, Matrix dx) { map(dx, sigmoid_slope, dy, y); }

ELEMENTS gelu_forward(Matrix x, Matrix y)
{
    map(y, [](Real x) { return x * normcdf(x); }, x); // Hendrycks and Gimpel, 2016
}

ELEMENTS gelu_backward(Matrix dy, Matrix x, Matrix dx)
{
    const Real peak = 0.3989422804014327; // of the normal density, 1 / sqrt(2 * pi)
    map(dx, [peak](Real dy, Real x) { return dy * (normcdf(x) + x * peak * exp(-x * x / 2)); }, dy, x);
}

// u in GELU's approximation by x * sigmoid(u), and its slope
const double BEND = 1.5957691216057308, CUBIC = 0.044715; // the first is 2 * sqrt(2 / pi)
__device__ static Real bent(Real x) { return Real(BEND) * (x * (1 + Real(CUBIC) * x * x)); }
__device__ static Real bent_slope(Real x) { return Real(BEND) * (1 + Real(3 * CUBIC) * x * x); }

ELEMENTS gelu_tanh_forward(Matrix x, Matrix y)
{
    map(y, [](Real x) { return x * sigmoid(bent(x)); }, x);
}

ELEMENTS gelu_tanh_backward(Matrix dy, Matrix x, Matrix dx)
{
    map(dx, [](Real dy, Real x) {
        Real u = bent(x);
        return dy * sigmoid(u) * (1 + x * sigmoid(-u) * bent_slope(x));
    }, dy, x);
}

ELEMENTS silu_forward(Matrix x, Matrix y)
{
    map(y, [](Real x) { return x * sigmoid(x); }, x); // Elfwing et al., 2018
}

ELEMENTS silu_backward(Matrix dy, Matrix x, Matrix dx)
{
    map(dx, [](Real dy, Real x) { return dy * sigmoid(x) * (1 + x * sigmoid(-x)); }, dy, x);
}

ELEMENTS softplus_forward(Matrix x, Doubles beta, Doubles threshold, Matrix y)
{
    Real scale = beta[0], end = threshold[0];
    map(y, [scale, end](Real x) {
        Real u = scale * x;
        return u > end ? x : ((u > 0 ? u : 0) + log1p(exp(-fabs(u)))) / scale;
    }, x);
}

ELEMENTS softplus_backward(Matrix dy, Matrix x, Doubles beta, Doubles threshold, Matrix dx)
{
    Real scale = beta[0], end = threshold[0];
    map(dx, [scale, end](Real dy, Real x) {
        Real u = scale * x;
        return u > end ? dy : dy * sigmoid(u);
    }, dy, x);
}
