// Optimizers, over all parameters at once; see cupy_arrays.cu.

ELEMENTS clip_value(Vector g, Doubles limit)
{
    Real end = limit[0];
    map(g, [end](Real g) { return g > end ? end : g < -end ? -end : g; }, g);
}

__device__ static void keep_squares(Vector x, Room room)
{
    double squares = 0;
    EACH(i, x.size)
        squares += (double)x[i] * x[i]; // which cannot overflow
    keep_sum(squares, room);
}

ELEMENTS squares_of_gradients(Vector g, Room room) { keep_squares(g, room); }

ELEMENTS clip_norm(Vector g, Doubles limit, Room room)
{
    double wanted = limit[0] / (sqrt(room.sum()) + 1e-6);
    Real factor = wanted > 1 ? 1 : wanted;
    map(g, [factor](Real g) { return factor * g; }, g);
}

ELEMENTS penalize(Vector p, Vector g, Doubles l2, Doubles l1)
{
    Real square = l2[0], absolute = l1[0];
    map(g, [square, absolute](Real g, Real p) {
        return g + (square ? square * p : 0) + (absolute ? absolute * sign(p) : 0);
    }, g, p);
}

ELEMENTS decay(Vector p, Doubles lr, Doubles weight_decay)
{
    Real factor = 1 - lr[0] * weight_decay[0];
    map(p, [factor](Real p) { return factor * p; }, p);
}

ELEMENTS squares_of_parameters(Vector p, Room room) { keep_squares(p, room); }

ELEMENTS l2_loss(Vector p, Vector g, Doubles alpha, Doubles share, Doubles width, Doubles rows, Doubles batch,
                 Doubles total, Room room)
{
    double strength = batch[1] ? alpha[0] * width[0] / batch[1] : 0;
    Real slope = strength;
    if (batch[1])
        map(g, [slope](Real g, Real p) { return g + slope * p; }, g, p);
    if (!is_last_block(room) || !is_first_thread())
        return;
    if (batch[1])
        total[0] += rows[0] * (share[0] * batch[0] / batch[1] + strength / 2 * room.sum());
    total[1] += rows[0];
    batch[0] = batch[1] = 0;
}

ELEMENTS accumulate(Vector g, Doubles total, Doubles mean, Doubles seen, Doubles count, Vector sum, Room room)
{
    double share = mean[0] ? total[1] - seen[0] : 1;
    Real weight = share;
    map(sum, [weight](Real sum, Real g) { return sum + weight * g; }, sum, g);
    if (is_last_block(room) && is_first_thread()) {
        count[0] = mean[0] ? count[0] + share : 1;
        seen[0] = total[1];
    }
}

ELEMENTS average(Vector sum, Doubles count, Vector g, Room room)
{
    Real factor = count[0] ? 1 / count[0] : 0;
    each<2>([factor](Real &g, Real &sum) {
        g = factor * sum;
        sum = 0;
    }, g, sum);
    if (is_last_block(room) && is_first_thread())
        count[0] = 0;
}

ELEMENTS sgd(Vector p, Vector g, Doubles lr)
{
    Real rate = lr[0];
    map(p, [rate](Real p, Real g) { return p - rate * g; }, p, g);
}

ELEMENTS sgd_momentum(Vector p, Vector velocity, Vector g, Doubles lr, Doubles momentum, Doubles nesterov)
{
    Real rate = lr[0], mu = momentum[0];
    bool ahead = nesterov[0];
    each<2>([=](Real &p, Real &velocity, Real g) {
        velocity = mu * velocity + g;
        p -= rate * (ahead ? g + mu * velocity : velocity);
    }, p, velocity, g);
}

ELEMENTS rmsprop(Vector p, Vector v, Vector m, Vector velocity, Vector g, Doubles lr, Doubles alpha, Doubles eps,
                 Doubles momentum, Doubles centered)
{
    Real new_share = 1 - alpha[0], rate = lr[0], mu = momentum[0], tiny = eps[0];
    bool around_mean = centered[0];
    auto update = [=](Real &p, Real &v, Real &m, Real &velocity, Real g) {
        v += new_share * (g * g - v);
        Real spread = v;
        if (around_mean) {
            m += new_share * (g - m);
            spread -= m * m;
            spread = spread < 0 ? 0 : spread; // as rounding may leave it
        }
        Real step = g / (sqrt(spread) + tiny);
        if (mu)
            step = velocity = mu * velocity + step;
        p -= rate * step;
    };
    if (around_mean || mu)
        each<4>(update, p, v, m, velocity, g);
    else
        each<2>([update](Real &p, Real &v, Real g) {
            Real unused = 0;
            update(p, v, unused, unused, g);
        }, p, v, g);
}

ELEMENTS lion(Vector p, Vector m, Vector g, Doubles lr, Doubles betas)
{
    // Chen et al., 2023, algorithm 2
    Real new1 = 1 - betas[0], new2 = 1 - betas[1], rate = lr[0];
    each<2>([=](Real &p, Real &m, Real g) {
        Real toward = g - m;
        p -= rate * sign(m + new1 * toward);
        m += new2 * toward;
    }, p, m, g);
}

ELEMENTS adam(Vector p, Vector m, Vector v, Vector g, Doubles lr, Doubles betas, Doubles eps, Doubles steps, Room room)
{
    // Kingma and Ba, 2015, algorithm 1
    __shared__ Real factors[3];
    if (is_first_thread()) {
        double power1 = 1, power2 = 1, square1 = betas[0], square2 = betas[1];
        for (Word n = steps[0] + 1; n; n /= 2, square1 *= square1, square2 *= square2) // which is faster than pow
            if (n % 2)
                power1 *= square1, power2 *= square2;
        double growth = 1 / sqrt(1 - power2);
        factors[0] = lr[0] / (1 - power1), factors[1] = growth, factors[2] = eps[0] + eps[1] * growth;
    }
    __syncthreads();
    bool is_last = is_first_thread() && is_last_thread(room.blocks(), grid_size()); // to read steps
    Real new1 = 1 - betas[0], new2 = 1 - betas[1], rate = factors[0], unbias = factors[1], tiny = factors[2];
    each<3>([=](Real &p, Real &m, Real &v, Real g) {
        m += new1 * (g - m);
        v += new2 * (g * g - v);
        p -= rate * m / (sqrt(v) * unbias + tiny);
    }, p, m, v, g);
    if (is_last)
        steps[0]++;
}
