// Softmax, losses and their gradients; see cupy_arrays.cu.

// exp(z - top) of a row, where top is its largest element, and their sum. A thread reads and writes N columns at a time,
// and keeps the first ones in registers.
template <int N> struct Exponents {
#ifdef PARTS
    static const int KEPT = 4 / N;
#else
    static const int KEPT = 16 / N;
#endif
    Matrix z;
    Index i;
    int columns, start, step;
    Pack<Real, N> kept[KEPT];
    Real top, sum = 0;

    // `visit` gets each column that a thread has, and z - top there
    template <class Visit>
    __device__ Exponents(Matrix z, Index i, Lanes lanes, Visit visit)
        : z(z), i(i), columns(z.columns), start(N * lanes.mine), step(N * lanes.count), top(-1 / Real(0))
    {
        each_pack([this](int j, Pack<Real, N> &pack, bool is_kept) {
            if (is_kept)
                pack = logits(j);
        });
        each_pack([this](int j, Pack<Real, N> &pack, bool) {
            for (Real x : pack.items)
                top = fmax(top, x);
        });
        top = over_row(top, lanes, true);
        each_pack([this, visit](int j, Pack<Real, N> &pack, bool) {
            for (int n = 0; n < N; n++)
                visit(j + n, pack.items[n] - top);
            sum += raise(pack);
        });
        sum = over_row(sum, lanes);
    }

    __device__ Pack<Real, N> logits(int j) const { return load<N>(z, i, j, true); }

    template <class F> __device__ void each_pack(F f)
    {
        int j = start;
#pragma unroll
        for (int k = 0; k < KEPT && j < columns; k++, j += step)
            f(j, kept[k], true);
        if (KEPT * step >= columns) // which the compiler knows of a small network
            return;
#pragma unroll 1
        for (; j < columns; j += step) {
            Pack<Real, N> pack = logits(j);
            f(j, pack, false);
        }
    }

    // exp(z - top) instead of z, and the sum
    __device__ Real raise(Pack<Real, N> &pack) const
    {
        Real sum = 0;
        for (Real &x : pack.items)
            sum += x = exp(x - top);
        return sum;
    }

    // out(i, j) = f(j, exp(z(i, j) - top))
    template <class T, class F> __device__ void write(Rows<T> out, F f)
    {
        each_pack([=](int j, Pack<Real, N> &pack, bool is_kept) {
            if (!is_kept)
                raise(pack);
            Pack<T, N> result;
            for (int n = 0; n < N; n++)
                result.items[n] = f(j + n, pack.items[n]);
            store(result, out, i, j, true);
        });
    }
};

template <int N> __device__ void softmax(Matrix z, Matrix p)
{
    EACH_ROW(i, lanes, z.rows, z.columns) {
        Exponents<N> row(z, i, lanes, [](int, Real) {});
        Real factor = 1 / row.sum;
        row.write(p, [factor](int, Real e) { return e * factor; });
    }
}

ROWS softmax_forward(Matrix z, Matrix p)
{
    if (by_fours(z, p))
        softmax<4>(z, p);
    else
        softmax<1>(z, p);
}

ROWS softmax_jacobian(Matrix p, Matrix j)
{
    EACH_ROW(i, lanes, p.rows, p.columns)
        ALONG_ROW(k, lanes, p.columns * p.columns) {
            Real a = p(i, k / p.columns), b = p(i, k % p.columns);
            j(i, k) = (k / p.columns == k % p.columns ? a : 0) - a * b;
        }
}

ROWS softmax_backward(Matrix dp, Matrix p, Matrix dz)
{
    EACH_ROW(i, lanes, p.rows, p.columns) {
        Real mean = 0;
        ALONG_ROW(j, lanes, p.columns)
            mean += p(i, j) * dp(i, j);
        mean = over_row(mean, lanes);
        ALONG_ROW(j, lanes, p.columns)
            dz(i, j) = p(i, j) * (dp(i, j) - mean);
    }
}

__device__ static Real tiny() { return sizeof(Real) == 4 ? Real(1.17549435e-38) : Real(2.2250738585072014e-308); }

__device__ static Real clip(Real x, Real low, Real high) { return x < low ? low : x > high ? high : x; } // or NaN

ELEMENTS cross_entropy_forward(Matrix p, Integers t, Doubles total, Vector cost, Room room)
{
    double sum = 0;
    EACH(i, cost.size) {
        cost[i] = -log(clip(p(i, t[i]), 1e-7, 1 - 1e-7));
        sum += cost[i];
    }
    add_up(sum, cost.size, total, room);
}

ELEMENTS cross_entropy_backward(Matrix p, Integers t, Matrix dp)
{
    EACH_ELEMENT(i, j, p) // finite where a probability has underflowed to 0
        dp(i, j) = j == t[i] ? -1 / ((p(i, j) < tiny() ? tiny() : p(i, j)) * whole(p.rows)) : 0;
}

template <int N, class T> __device__ double costs_of_logits(Matrix z, Integers t, Rows<T> dz)
{
    double cost = 0;
    EACH_ROW(i, lanes, z.rows, z.columns) {
        int label = t[i];
        Real mine = 0; // the label's z - top, if it is this thread that has it
        Exponents<N> row(z, i, lanes, [&](int j, Real logit) { mine = j == label ? logit : mine; });
        Real part = Real(1) / whole(z.rows), factor = part / row.sum;
        row.write(dz, [=](int j, Real e) { return e * factor - (j == label ? part : 0); });
        cost += (lanes.mine == 0 ? log(row.sum) : 0) - mine;
    }
    return cost;
}

template <class T>
__device__ void cross_entropy_of_logits(Matrix z, Integers t, Doubles total, Rows<T> dz, Room room)
{
    double cost = by_fours(z, dz) ? costs_of_logits<4>(z, t, dz) : costs_of_logits<1>(z, t, dz);
    add_up(cost, z.rows, total, room, min((Index)block_size(), (Index)z.rows * lanes_of_row(z.columns).count));
}

ROWS softmax_cross_entropy(Matrix z, Integers t, Doubles total, Matrix dz, Room room)
{
    cross_entropy_of_logits(z, t, total, dz, room);
}

ROWS softmax_cross_entropy_bfloat16(Matrix z, Integers t, Doubles total, Halves dz, Room room)
{
    cross_entropy_of_logits(z, t, total, dz, room);
}

ELEMENTS softmax_cross_entropy_backward(Matrix p, Integers t, Matrix dz)
{
    EACH_ELEMENT(i, j, p)
        dz(i, j) = (p(i, j) - (j == t[i])) / whole(p.rows);
}

ELEMENTS one_hot(Integers t, Matrix p, Matrix rows)
{
    EACH_ELEMENT(i, j, p)
        rows(i, j) = j == t[i];
}

// What gradients are multiplied by, where room.sum() is the weight of all rows.
__device__ static Real inverse_weight(Doubles mean, Room room)
{
    return !mean[0] ? 1 : room.sum() ? 1 / room.sum() : 0;
}

// What kernels of weighted losses need first: the weight of all rows.
ELEMENTS weigh_labels(Integers t, Vector weights, Doubles class_weight, Room room)
{
    double weight = 0;
    EACH(i, weights.size)
        weight += weights[i] * class_weight[t[i]];
    keep_sum(weight, room);
}

ROWS weigh_rows(Matrix t, Vector weights, Doubles class_weight, Room room)
{
    double weight = 0;
    EACH_ROW(i, lanes, t.rows, t.columns)
        ALONG_ROW(j, lanes, t.columns)
            weight += weights[i] * (t(i, j) * class_weight[j]);
    keep_sum(weight, room);
}

ELEMENTS weigh_elements(Vector weights, Room room)
{
    double weight = 0;
    EACH(i, weights.size)
        weight += weights[i];
    keep_sum(weight, room);
}

// A row's targets: whole ones, or labels.
struct Soft {
    Matrix t;
    __device__ Real operator()(Index i, Index j) const { return t(i, j); }
};
struct Label {
    Integers t;
    __device__ Real operator()(Index i, Index j) const { return j == t[i]; }
};

// What a class's -log p is multiplied by.
template <class Targets> __device__ Real share_of(Targets t, Index i, Index j, Doubles class_weight, Doubles smoothing)
{
    return (Real(1 - smoothing[0]) * t(i, j) + Real(smoothing[0] / class_weight.size)) * Real(class_weight[j]);
}

template <class Targets>
__device__ void softmax_rows(Matrix z, Targets t, Vector weights, Doubles class_weight, Doubles smoothing, Doubles mean,
                             Doubles total, Vector cost, Matrix dz, Room room)
{
    double costs = 0;
    Real scale = inverse_weight(mean, room);
    EACH_ROW(i, lanes, z.rows, z.columns) {
        double sums = 0, logits = 0;
        Exponents<1> row(z, i, lanes, [&](int j, Real logit) {
            Real q = share_of(t, i, j, class_weight, smoothing);
            sums += q;
            logits += q == 0 ? 0 : q * logit;
        });
        sums = over_row(sums, lanes);
        logits = over_row(logits, lanes);
        Real w = sums == 0 ? 0 : weights[i]; // a row that does not count becomes 0, whatever it holds
        if (lanes.mine == 0) {
            cost[i] = w == 0 ? 0 : w * (sums * log(row.sum) - logits);
            costs += cost[i];
        }
        Real factor = sums / row.sum;
        row.write(dz, [=](int j, Real e) {
            Real q = share_of(t, i, j, class_weight, smoothing);
            return w == 0 ? 0 : (e * factor - q) * (w * scale);
        });
    }
    add_up(costs, rank() == 0 ? room.sum() : 0, total, room);
}

ROWS weighted_softmax_cross_entropy(Matrix z, Integers t, Vector weights, Doubles class_weight, Doubles smoothing,
                                    Doubles mean, Doubles total, Vector cost, Matrix dz, Room room)
{
    softmax_rows(z, Label{t}, weights, class_weight, smoothing, mean, total, cost, dz, room);
}

ROWS soft_softmax_cross_entropy(Matrix z, Matrix t, Vector weights, Doubles class_weight, Doubles smoothing,
                                Doubles mean, Doubles total, Vector cost, Matrix dz, Room room)
{
    softmax_rows(z, Soft{t}, weights, class_weight, smoothing, mean, total, cost, dz, room);
}

ROWS soft_cross_entropy(Matrix p, Matrix t, Vector weights, Doubles class_weight, Doubles smoothing, Doubles mean,
                        Doubles total, Vector cost, Matrix dp, Room room)
{
    double costs = 0;
    Real scale = inverse_weight(mean, room);
    EACH_ROW(i, lanes, p.rows, p.columns) {
        double sum = 0, sums = 0;
        ALONG_ROW(j, lanes, p.columns) {
            Real q = share_of(Soft{t}, i, j, class_weight, smoothing);
            sums += q;
            sum -= q == 0 ? 0 : q * log(clip(p(i, j), 1e-7, 1 - 1e-7));
        }
        sum = over_row(sum, lanes);
        Real w = over_row(sums, lanes) == 0 ? 0 : weights[i];
        if (lanes.mine == 0) {
            cost[i] = w == 0 ? 0 : w * sum;
            costs += cost[i];
        }
        ALONG_ROW(j, lanes, p.columns) {
            Real q = share_of(Soft{t}, i, j, class_weight, smoothing), x = fabs(p(i, j));
            Real slope = w == 0 || q == 0 ? 0 : w * scale * q / (x < tiny() ? tiny() : x);
            // weights may take it beyond what the float type holds
            dp(i, j) = x < Real(1e-7) && slope > 1 / tiny() ? -1 / tiny() : -slope;
        }
    }
    add_up(costs, rank() == 0 ? room.sum() : 0, total, room);
}

// A loss that is a weighted sum over elements; in double, because squares may be large.
template <class Loss>
__device__ void elementwise(Matrix y, Matrix t, Vector weights, Doubles mean, Doubles total, Matrix cost, Matrix dy,
                            Room room, Loss loss)
{
    double costs = 0, weight = room.sum() * y.columns;
    double scale = !mean[0] ? 1 : weight ? 1 / weight : 0;
    EACH_ELEMENT(i, j, y) {
        double slope, c = weights[i] * loss(widened(y(i, j)), widened(t(i, j)), j, slope);
        cost(i, j) = c;
        costs += c;
        dy(i, j) = slope * (weights[i] * scale);
    }
    add_up(costs, rank() == 0 ? weight : 0, total, room);
}

ELEMENTS mean_squared_error(Matrix y, Matrix t, Vector weights, Doubles mean, Doubles total, Matrix cost, Matrix dy,
                            Room room)
{
    elementwise(y, t, weights, mean, total, cost, dy, room, [](double y, double t, Index, double &slope) {
        slope = 2 * (y - t);
        return (y - t) * (y - t);
    });
}

ELEMENTS mean_absolute_error(Matrix y, Matrix t, Vector weights, Doubles mean, Doubles total, Matrix cost, Matrix dy,
                             Room room)
{
    elementwise(y, t, weights, mean, total, cost, dy, room, [](double y, double t, Index, double &slope) {
        slope = y > t ? 1 : y < t ? -1 : y - t;
        return fabs(y - t);
    });
}

ELEMENTS huber(Matrix y, Matrix t, Vector weights, Doubles delta, Doubles mean, Doubles total, Matrix cost, Matrix dy,
               Room room)
{
    double end = delta[0];
    elementwise(y, t, weights, mean, total, cost, dy, room, [end](double y, double t, Index, double &slope) {
        // with the slope e up to delta, and +-delta beyond, both branches are slope * (e - slope / 2)
        double e = y - t;
        slope = e > end ? end : e < -end ? -end : e;
        return slope * (e - slope / 2);
    });
}

ELEMENTS poisson(Matrix y, Matrix t, Vector weights, Doubles log_input, Doubles mean, Doubles total, Matrix cost,
                 Matrix dy, Room room)
{
    bool of_logs = log_input[0];
    elementwise(y, t, weights, mean, total, cost, dy, room, [of_logs](double y, double t, Index, double &slope) {
        double rate = of_logs ? exp(y) : y + 1e-8;
        slope = of_logs ? rate - t : 1 - t / rate;
        return of_logs ? rate - t * y : y - t * log(rate);
    });
}

__device__ static double softplus(double x) { return (x > 0 ? x : 0) + log1p(exp(-fabs(x))); }

ELEMENTS binary_cross_entropy(Matrix y, Matrix t, Vector weights, Doubles pos_weight, Doubles mean, Doubles total,
                              Matrix cost, Matrix dy, Room room)
{
    elementwise(y, t, weights, mean, total, cost, dy, room, [pos_weight](double z, double t, Index j, double &slope) {
        // log(1 + exp(-z)) where t is 1, and log(1 + exp(z)) where t is 0
        double low = softplus(-z), high = softplus(z);
        slope = (1 - t) * exp(-low) - pos_weight[j] * t * exp(-high);
        return pos_weight[j] * t * low + (1 - t) * high;
    });
}
