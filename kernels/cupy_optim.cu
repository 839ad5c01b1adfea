// Optimizers, over all parameters at once; see cupy_math.cu.

ELEMENTS clip_value(Vector g, Doubles limit)
{
    Real end = limit[0];
    EACH(i, g.size)
        g[i] = g[i] > end ? end : g[i] < -end ? -end : g[i];
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
    double factor = limit[0] / (sqrt(room.sum(0)) + 1e-6);
    EACH(i, g.size)
        g[i] *= Real(factor > 1 ? 1 : factor);
}

ELEMENTS penalize(Vector p, Vector g, Doubles l2, Doubles l1)
{
    Real square = l2[0], absolute = l1[0];
    EACH(i, g.size)
        g[i] += (square ? square * p[i] : 0) + (absolute ? absolute * sign(p[i]) : 0);
}

ELEMENTS decay(Vector p, Doubles lr, Doubles weight_decay)
{
    Real factor = 1 - lr[0] * weight_decay[0];
    EACH(i, p.size)
        p[i] *= factor;
}

ELEMENTS squares_of_parameters(Vector p, Room room) { keep_squares(p, room); }

ELEMENTS l2_loss(Vector p, Vector g, Doubles alpha, Doubles share, Doubles width, Doubles rows, Doubles batch,
                 Doubles total, Room room)
{
    double strength = batch[1] ? alpha[0] * width[0] / batch[1] : 0;
    if (batch[1])
        EACH(i, g.size)
            g[i] += Real(strength) * p[i];
    if (!is_last_block(room) || !is_first_thread())
        return;
    if (batch[1])
        total[0] += rows[0] * (share[0] * batch[0] / batch[1] + strength / 2 * room.sum(0));
    total[1] += rows[0];
    batch[0] = batch[1] = 0;
}

ELEMENTS accumulate(Vector g, Doubles total, Doubles mean, Doubles seen, Doubles count, Vector sum, Room room)
{
    double share = mean[0] ? total[1] - seen[0] : 1;
    EACH(i, g.size)
        sum[i] += Real(share) * g[i];
    if (is_last_block(room) && is_first_thread()) {
        count[0] = mean[0] ? count[0] + share : 1;
        seen[0] = total[1];
    }
}

ELEMENTS average(Vector sum, Doubles count, Vector g, Room room)
{
    Real factor = count[0] ? 1 / count[0] : 0;
    EACH(i, g.size) {
        g[i] = factor * sum[i];
        sum[i] = 0;
    }
    if (is_last_block(room) && is_first_thread())
        count[0] = 0;
}

ELEMENTS sgd(Vector p, Vector g, Doubles lr)
{
    Real rate = lr[0];
    EACH(i, p.size)
        p[i] -= rate * g[i];
}

ELEMENTS sgd_momentum(Vector p, Vector velocity, Vector g, Doubles lr, Doubles momentum, Doubles nesterov)
{
    Real rate = lr[0], mu = momentum[0];
    bool ahead = nesterov[0];
    EACH(i, p.size) {
        velocity[i] = mu * velocity[i] + g[i];
        p[i] -= rate * (ahead ? g[i] + mu * velocity[i] : velocity[i]);
    }
}

ELEMENTS rmsprop(Vector p, Vector v, Vector m, Vector velocity, Vector g, Doubles lr, Doubles alpha, Doubles eps,
                 Doubles momentum, Doubles centered)
{
    Real new_share = 1 - alpha[0], rate = lr[0], mu = momentum[0];
    EACH(i, p.size) {
        v[i] += new_share * (g[i] * g[i] - v[i]);
        Real spread = v[i];
        if (centered[0]) {
            m[i] += new_share * (g[i] - m[i]);
            spread -= m[i] * m[i];
            spread = spread < 0 ? 0 : spread; // as rounding may leave it
        }
        Real step = g[i] / (sqrt(spread) + Real(eps[0]));
        if (mu)
            step = velocity[i] = mu * velocity[i] + step;
        p[i] -= rate * step;
    }
}

ELEMENTS lion(Vector p, Vector m, Vector g, Doubles lr, Doubles betas)
{
    // Chen et al., 2023, algorithm 2
    Real new1 = 1 - betas[0], new2 = 1 - betas[1], rate = lr[0];
    EACH(i, p.size) {
        Real toward = g[i] - m[i];
        p[i] -= rate * sign(m[i] + new1 * toward);
        m[i] += new2 * toward;
    }
}

ELEMENTS adam(Vector p, Vector m, Vector v, Vector g, Doubles lr, Doubles betas, Doubles eps, Doubles steps, Room room)
{
    // Kingma and Ba, 2015, algorithm 1
    __shared__ Real rate, unbias, tiny;
    if (is_first_thread()) {
        double growth = 1 / sqrt(1 - pow(betas[1], steps[0] + 1));
        rate = lr[0] / (1 - pow(betas[0], steps[0] + 1));
        unbias = growth;
        tiny = eps[0] + eps[1] * growth;
    }
    __syncthreads();
    Real new1 = 1 - betas[0], new2 = 1 - betas[1];
    EACH(i, p.size) {
        m[i] += new1 * (g[i] - m[i]);
        v[i] += new2 * (g[i] * g[i] - v[i]);
        p[i] -= rate * m[i] / (sqrt(v[i]) * unbias + tiny);
    }
    if (is_last_block(room) && is_first_thread())
        steps[0]++;
}
