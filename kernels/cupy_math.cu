// Numbers, and the slopes of activations; see cupy_arrays.cu.

// A number's bits, which as a whole number are above 0, or below, where it is. Comparisons of floats take subnormal ones
// for 0, because CuPy compiles with -ftz=true.
__device__ static int bits_of(float x) { return __float_as_int(x); }
__device__ static Word bits_of(double x) { return __double_as_longlong(x); }

__device__ static bool above_zero(Real x) { return x == x && bits_of(x) > 0; }
__device__ static bool up_to_zero(Real x) { return x == x && bits_of(x) <= 0; }

// As a double, in which a subnormal float is another number than 0.
__device__ static double widened(float x)
{
    int bits = bits_of(x), fraction = bits & 0x7fffff;
    return bits & 0x7f800000 ? x : (bits < 0 ? -fraction : fraction) * 1.401298464324817e-45; // 2 ** -149
}
__device__ static double widened(double x) { return x; }

__device__ static Real sign(Real x)
{
    double wide = widened(x);
    return wide > 0 ? Real(1) : wide < 0 ? Real(-1) : x;
}

__device__ static Real multiplied(Real x, Real y) { return x * y; }
__device__ static Real rectified(Real x) { return up_to_zero(x) ? 0 : x; } // which lets NaN through
__device__ static Real sigmoid(Real x)
{
    Real e = exp(-fabs(x));
    return (x > 0 ? Real(1) : e) / (1 + e);
}

// dy times an activation's slope where it gives y.
__device__ static Real relu_slope(Real dy, Real y) { return up_to_zero(y) ? 0 : dy; }
__device__ static Real leaky_relu_slope(Real dy, Real y, Real below) { return above_zero(y) ? dy : below * dy; }
__device__ static Real elu_slope(Real dy, Real y, Real scale) { return above_zero(y) ? dy : dy * (y + scale); }
__device__ static Real tanh_slope(Real dy, Real y) { return dy * ((1 - y) * (1 + y)); }
__device__ static Real sigmoid_slope(Real dy, Real y) { return dy * (y * (1 - y)); }
