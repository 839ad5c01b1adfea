// Activations and other work element by element; see cupy_math.cu.

ELEMENTS add(Matrix x, Matrix y, Matrix z)
{
    EACH_ELEMENT(i, j, x)
        z(i, j) = x(i, j) + y(i, j);
}

ELEMENTS multiply(Matrix x, Matrix y, Matrix z)
{
    EACH_ELEMENT(i, j, x)
        z(i, j) = x(i, j) * y(i, j);
}

ELEMENTS scale(Matrix x, Doubles factor, Matrix y)
{
    EACH_ELEMENT(i, j, x)
        y(i, j) = Real(factor[0]) * x(i, j);
}

ELEMENTS relu_forward(Matrix x, Matrix y)
{
    EACH_ELEMENT(i, j, x)
        y(i, j) = x(i, j) <= 0 ? 0 : x(i, j); // the comparison lets NaN through
}

ELEMENTS relu_backward(Matrix dy, Matrix y, Matrix dx)
{
    EACH_ELEMENT(i, j, y)
        dx(i, j) = y(i, j) <= 0 ? 0 : dy(i, j);
}

ELEMENTS leaky_relu_forward(Matrix x, Doubles negative_slope, Matrix y)
{
    EACH_ELEMENT(i, j, x)
        y(i, j) = x(i, j) > 0 ? x(i, j) : Real(negative_slope[0]) * x(i, j);
}

ELEMENTS leaky_relu_backward(Matrix dy, Matrix y, Doubles negative_slope, Matrix dx)
{
    EACH_ELEMENT(i, j, y)
        dx(i, j) = y(i, j) > 0 ? dy(i, j) : Real(negative_slope[0]) * dy(i, j);
}

ELEMENTS elu_forward(Matrix x, Doubles alpha, Matrix y)
{
    EACH_ELEMENT(i, j, x)
        y(i, j) = x(i, j) > 0 ? x(i, j) : Real(alpha[0]) * expm1(x(i, j));
}

ELEMENTS elu_backward(Matrix dy, Matrix y, Doubles alpha, Matrix dx)
{
    EACH_ELEMENT(i, j, y)
        dx(i, j) = y(i, j) > 0 ? dy(i, j) : dy(i, j) * (y(i, j) + Real(alpha[0]));
}

ELEMENTS tanh_forward(Matrix x, Matrix y)
{
    EACH_ELEMENT(i, j, x)
        y(i, j) = tanh(x(i, j));
}

ELEMENTS tanh_backward(Matrix dy, Matrix y, Matrix dx)
{
    EACH_ELEMENT(i, j, y)
        dx(i, j) = dy(i, j) * ((1 - y(i, j)) * (1 + y(i, j)));
}

ELEMENTS sigmoid_forward(Matrix x, Matrix y)
{
    EACH_ELEMENT(i, j, x)
        y(i, j) = sigmoid(x(i, j));
}

ELEMENTS sigmoid_backward(Matrix dy, Matrix y, Matrix dx)
{
    EACH_ELEMENT(i, j, y)
        dx(i, j) = dy(i, j) * (y(i, j) * (1 - y(i, j)));
}

ELEMENTS gelu_forward(Matrix x, Matrix y)
{
    EACH_ELEMENT(i, j, x)
        y(i, j) = x(i, j) * normcdf(x(i, j)); // Hendrycks and Gimpel, 2016
}

ELEMENTS gelu_backward(Matrix dy, Matrix x, Matrix dx)
{
    const Real peak = 0.3989422804014327; // of the normal density, 1 / sqrt(2 * pi)
    EACH_ELEMENT(i, j, x) {
        Real u = x(i, j);
        dx(i, j) = dy(i, j) * (normcdf(u) + u * peak * exp(-u * u / 2));
    }
}

// u in GELU's approximation by x * sigmoid(u), and its slope
const double BEND = 1.5957691216057308, CUBIC = 0.044715; // the first is 2 * sqrt(2 / pi)
__device__ static Real bent(Real x) { return Real(BEND) * (x * (1 + Real(CUBIC) * x * x)); }
__device__ static Real bent_slope(Real x) { return Real(BEND) * (1 + Real(3 * CUBIC) * x * x); }

ELEMENTS gelu_tanh_forward(Matrix x, Matrix y)
{
    EACH_ELEMENT(i, j, x)
        y(i, j) = x(i, j) * sigmoid(bent(x(i, j)));
}

ELEMENTS gelu_tanh_backward(Matrix dy, Matrix x, Matrix dx)
{
    EACH_ELEMENT(i, j, x) {
        Real u = bent(x(i, j));
        dx(i, j) = dy(i, j) * sigmoid(u) * (1 + x(i, j) * sigmoid(-u) * bent_slope(x(i, j)));
    }
}

ELEMENTS silu_forward(Matrix x, Matrix y)
{
    EACH_ELEMENT(i, j, x)
        y(i, j) = x(i, j) * sigmoid(x(i, j)); // Elfwing et al., 2018
}

ELEMENTS silu_backward(Matrix dy, Matrix x, Matrix dx)
{
    EACH_ELEMENT(i, j, x)
        dx(i, j) = dy(i, j) * sigmoid(x(i, j)) * (1 + x(i, j) * sigmoid(-x(i, j)));
}

ELEMENTS softplus_forward(Matrix x, Doubles beta, Doubles threshold, Matrix y)
{
    Real scale = beta[0], end = threshold[0];
    EACH_ELEMENT(i, j, x) {
        Real u = scale * x(i, j);
        y(i, j) = u > end ? x(i, j) : ((u > 0 ? u : 0) + log1p(exp(-fabs(u)))) / scale;
    }
}

ELEMENTS softplus_backward(Matrix dy, Matrix x, Doubles beta, Doubles threshold, Matrix dx)
{
    Real scale = beta[0], end = threshold[0];
    EACH_ELEMENT(i, j, x) {
        Real u = scale * x(i, j);
        dx(i, j) = u > end ? dy(i, j) : dy(i, j) * sigmoid(u);
    }
}
