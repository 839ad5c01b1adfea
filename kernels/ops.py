"""The contract: every op that an engine computes, one row each; `op` says how a row is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from .op import (
    Arg,
    Array,
    Op,
    Sampler,
    below,
    between,
    constant,
    flag,
    normal,
    order,
    probabilities,
    rectified,
    small,
    uniform,
)

__all__ = ["OPS", "Arg", "Array", "Op"]


def _product(d: Mapping[str, int]) -> int:
    return 2 * d["B"] * d["K"] * d["N"]


def _product_of_stored(d: Mapping[str, int]) -> int:
    return 2 * d["B"] * d["P"] * d["N"] // d["M"]


def _per_element(n: int) -> Callable[[Mapping[str, int]], int]:
    """`n` operations for each element of the op's largest argument."""
    return lambda d: n * d.get("B", 1) * d.get("N", 1) * d.get("P", 1)


def _of_products(d: Mapping[str, int]) -> int:
    """Room for the weights' gradient and the inputs; none for outputs, unless they are narrow."""
    return d["K"] * d["N"] + d["B"] * d["K"] + 16 * d["K"] + _of_rows(d)


def _of_batch(d: Mapping[str, int]) -> int:
    """Room for what is taken from a table, in any of its types: none for the table itself."""
    return 2 * d["B"] * d.get("K", 1)


def _of_rows(d: Mapping[str, int]) -> int:
    """Room for some rows at a time, or for all of them if they are short: wide ones are never copied whole."""
    return 24 * d["B"] + 4 * max(d["N"], 1 << 15)


_PLACES = "column:i[N]<K start:i[N] codes:i[N] stride:i[N]"
# up to three codes, at every other place where the table is long enough
_places_in_a_table: dict[str, Sampler] = {
    "x": lambda rng, shape, d: rng.integers(0, 4, shape),
    "column": below("K"),
    "start": lambda rng, shape, d: rng.integers(0, max(d["P"] - 4, 1), shape),
    "codes": lambda rng, shape, d: rng.integers(0, 2, shape) * (3 if d["P"] > 4 else 1),
    "stride": lambda rng, shape, d: rng.integers(2, 3, shape),
}


def _places_read(arrays: Mapping[str, Array], _: Mapping[str, int]) -> tuple[str, Array, Array, str]:
    """Where a table is read: from the vectors of the first codes to those of the last."""
    has_codes = arrays["codes"] > 0
    last = arrays["start"] + 1.0 * arrays["stride"] * (arrays["codes"] - 1)  # as floats, which do not wrap around
    return "start", has_codes * arrays["start"], has_codes * last, "P"


_STORED = "values:a[P] columns:i[P]<K starts:i[M] stops:i[M] rows:i[B]<M"
_stored: dict[str, Sampler] = {
    "columns": lambda rng, shape, d: (rng.integers(d["K"]) + np.arange(d["P"])) % d["K"],
    "starts": lambda rng, shape, d: np.arange(d["M"]) * d["P"] // d["M"],
    "stops": lambda rng, shape, d: np.arange(d["M"]) * d["P"] // d["M"] + min(d["P"] // d["M"], d["K"]),
    "zeros": lambda rng, shape, d: np.zeros(shape),
}


def _stored_read(arrays: Mapping[str, Array], _: Mapping[str, int]) -> tuple[str, Array, Array, str]:
    """Where what is stored is read: from each row's first value to its last, where it has any."""
    has_values = arrays["stops"] > arrays["starts"]
    return "starts", has_values * arrays["starts"], has_values * (arrays["stops"] - 1), "P"


# what an activation may give, where that is not any number
ACTIVATED = {"relu": rectified, "elu": between(-0.8, 3), "tanh": between(-1, 1), "sigmoid": uniform}

# what each activation is told, and what its backward op reads: its output, or else its input
ACTIVATIONS = [
    ("relu", "", "y"),
    ("leaky_relu", " negative_slope:s[1]", "y"),
    ("elu", " alpha:s[1]", "y"),
    ("tanh", "", "y"),
    ("sigmoid", "", "y"),
    ("gelu", "", "x"),
    ("gelu_tanh", "", "x"),
    ("silu", "", "x"),
    ("softplus", " beta:s[1] threshold:s[1]", "x"),
]

OPS: dict[str, Op] = {
    op.name: op
    for op in [
        # a batch: the next rows in order, gathered and converted to the model's float type
        Op(
            "next_batch",
            "order:i[M] cursor!:i[1] rows!:i[B] ->",
            room=_of_batch,
            reach=lambda arrays, d: ("cursor", arrays["cursor"], arrays["cursor"] + (d["B"] - 1), "M"),
        ),
        Op("shuffle", "keys:u[20] order!:i[P] ->", room=lambda d: 3 * min(d["P"], 1 << 14)),
        Op(
            "next_rate",
            "rates:s[M] step!:i[1] rate!:s[1] ->",
            reach=lambda arrays, _: ("step", arrays["step"], arrays["step"], "M"),
        ),
        Op("take", "x:a[M,K] rows:i[B]<M -> xb:f[B,K]", room=_of_batch),
        Op("take_labels", "t:i[M] rows:i[B]<M -> tb:i[B]", samples={"t": order}, room=_of_batch),
        Op("take_weights", "w:a[M] rows:i[B]<M -> wb:f[B]", samples={"w": uniform}, room=_of_batch),
        # rows of a table that is stored sparsely: row i is zeros, but values[n] in columns[n] for n from starts[i] to
        # below stops[i], each column at most once
        Op("sparse_rows", f"{_STORED} zeros:f[1,K] -> xb:f[B,K]", samples=_stored, room=_of_batch, reach=_stored_read),
        # layers
        Op("dense_forward", "x:f[B,K] w:f[K,N] b:f[1,N] -> z:f[B,N]", _product, room=_of_products, cuts="BN"),
        Op("dense_input_grad", "dz:f[B,N] w:f[K,N] -> dx:f[B,K]", _product, room=_of_products, cuts="BK"),
        Op("dense_weight_grad", "x:f[B,K] dz:f[B,N] -> dw:f[K,N]", _product, room=_of_products, cuts="KN"),
        Op("dense_bias_grad", "dz:f[B,N] -> db:f[1,N]", _per_element(1), cuts="N"),
        # activations
        *[
            op
            for name, settings, reads in ACTIVATIONS
            for op in (
                Op(
                    f"{name}_forward",
                    f"x:f[B,N]{settings} -> y:f[B,N]",
                    _per_element(1 if "relu" in name else 8),
                    cuts="B",
                ),
                Op(
                    f"{name}_backward",
                    f"dy:f[B,N] {reads}:f[B,N]{settings} -> dx:f[B,N]",
                    _per_element(1 if "relu" in name else 8),
                    {"y": ACTIVATED.get(name, normal)},
                    cuts="B",
                ),
            )
        ],
        Op(
            "dropout_forward",
            "x:f[B,N] rate:s[1] key!:u[4] -> y:f[B,N] mask:f[B,N]",
            _per_element(2),
        ),
        Op("dropout_backward", "dy:f[B,N] mask:f[B,N] -> dx:f[B,N]", _per_element(1), cuts="B"),
        Op("softmax_forward", "z:f[B,N] -> p:f[B,N]", _per_element(4), room=_of_rows, cuts="B"),
        Op("softmax_jacobian", "p:f[B,N] -> j:f[B,N,N]", lambda d: 2 * d["B"] * d["N"] ** 2),
        Op("softmax_backward", "dp:f[B,N] p:f[B,N] -> dz:f[B,N]", _per_element(4), cuts="B"),
        Op("add", "x:f[B,N] y:f[B,N] -> z:f[B,N]", _per_element(1), cuts="B"),
        Op("multiply", "x:f[B,N] y:f[B,N] -> z:f[B,N]", _per_element(1), {"y": normal}, cuts="B"),
        Op("scale", "x:f[B,N] factor:s[1] -> y:f[B,N]", _per_element(1), cuts="B"),
        # normalisation: normal = (x - mean) * scale, scale = 1 / sqrt(var + eps), y = normal * w + b
        Op(
            "layer_norm_forward",
            "x:f[B,N] w:f[1,N] b:f[1,N] eps:s[1] -> y:f[B,N] normal:f[B,N] scale:s[B]",
            _per_element(8),
        ),
        Op(
            "layer_norm_backward",
            "dy:f[B,N] w:f[1,N] normal:f[B,N] scale:s[B] -> dx:f[B,N] dw:f[1,N] db:f[1,N]",
            _per_element(12),
            {"scale": uniform},
        ),
        Op(
            "batch_statistics",
            "x:f[B,N] momentum:s[1] running_mean!:s[N] running_var!:s[N] -> mean:s[N] var:s[N]",
            _per_element(4),
            {"momentum": constant(0.1), "running_mean": normal, "running_var": uniform},
        ),
        Op(
            "batch_norm_forward",
            "x:f[B,N] w:f[1,N] b:f[1,N] mean:s[N] var:s[N] eps:s[1] -> y:f[B,N] normal:f[B,N] scale:s[N]",
            _per_element(4),
            {"mean": normal, "var": uniform},
        ),
        # by_batch: whether mean and var were those of x, not fixed numbers
        Op(
            "batch_norm_backward",
            "dy:f[B,N] w:f[1,N] normal:f[B,N] scale:s[N] by_batch:s[1] -> dx:f[B,N] dw:f[1,N] db:f[1,N]",
            _per_element(8),
            {"scale": uniform, "by_batch": flag},
        ),
        # y[:, j] is x[:, column[j]] where codes[j] is 0; else that column holds codes from 0 to below codes[j], and
        # y[:, j] is w[start[j] + code * stride[j]]; NaN for what is no code.
        Op(
            "embedding_forward",
            f"x:f[B,K] w:f[P] {_PLACES} -> y:f[B,N]",
            samples=_places_in_a_table,
            room=lambda d: 6 * d["B"] * d["N"],
            reach=_places_read,
        ),
        Op(
            "embedding_backward",
            f"dy:f[B,N] x:f[B,K] w:f[P] {_PLACES} -> dx:f[B,K] dw:f[P]",
            lambda d: d["B"] * d["N"],
            _places_in_a_table,
            room=lambda d: 6 * d["B"] * d["N"],
            reach=_places_read,
        ),
        # losses: total[0] += the sum of the rows' losses, total[1] += what their mean is divided by; the gradient is
        # that of this mean or, where an op takes mean = 0, of the sum
        Op("cross_entropy_forward", "p:f[B,N] t:i[B]<N total!:s[2] -> cost:f[B]", lambda d: 2 * d["B"]),
        Op("cross_entropy_backward", "p:f[B,N] t:i[B]<N -> dp:f[B,N]", lambda d: 2 * d["B"]),
        Op("softmax_cross_entropy", "z:f[B,N] t:i[B]<N total!:s[2] -> dz:f[B,N]", _per_element(6), room=_of_rows),
        Op("softmax_cross_entropy_backward", "p:f[B,N] t:i[B]<N -> dz:f[B,N]", _per_element(1)),
        Op(
            "weighted_softmax_cross_entropy",
            "z:f[B,N] t:i[B]<N weights:f[B] class_weight:s[N] smoothing:s[1] mean:s[1] total!:s[2]"
            " -> cost:f[B] dz:f[B,N]",
            _per_element(8),
            room=_of_rows,
        ),
        Op(
            "soft_softmax_cross_entropy",
            "z:f[B,N] t:f[B,N] weights:f[B] class_weight:s[N] smoothing:s[1] mean:s[1] total!:s[2]"
            " -> cost:f[B] dz:f[B,N]",
            _per_element(10),
            {"t": probabilities},
            room=_of_rows,
        ),
        Op(
            "soft_cross_entropy",
            "p:f[B,N] t:f[B,N] weights:f[B] class_weight:s[N] smoothing:s[1] mean:s[1] total!:s[2]"
            " -> cost:f[B] dp:f[B,N]",
            _per_element(8),
            {"t": probabilities},
            room=_of_rows,
        ),
        Op("one_hot", "t:i[B]<N p:f[B,N] -> rows:f[B,N]"),
        *[
            Op(
                name,
                f"y:f[B,N] t:f[B,N] weights:f[B] {settings}mean:s[1] total!:s[2] -> cost:f[B,N] dy:f[B,N]",
                _per_element(6),
                {"y": outputs, "t": targets},
            )
            for name, settings, outputs, targets in [
                ("mean_squared_error", "", normal, normal),
                ("mean_absolute_error", "", normal, normal),
                ("huber", "delta:s[1] ", normal, normal),
                ("poisson", "log_input:s[1] ", uniform, uniform),
                ("binary_cross_entropy", "pos_weight:s[N] ", normal, flag),
            ]
        ],
        # dense_forward and dense_weight_grad of what sparse_rows gives
        Op(
            "sparse_forward",
            f"{_STORED} w:f[K,N] b:f[1,N] -> z:f[B,N]",
            _product_of_stored,
            _stored,
            room=lambda d: 6 * d["B"] * d["N"],
            reach=_stored_read,
        ),
        Op(
            "sparse_weight_grad",
            f"{_STORED} zeros:f[1,K] dz:f[B,N] -> dw:f[K,N]",
            _product_of_stored,
            _stored,
            room=lambda d: 6 * d["K"] * d["N"],
            reach=_stored_read,
        ),
        # two or three of the above in one; `fusion.RULES` says which
        Op("dense_relu_forward", "x:f[B,K] w:f[K,N] b:f[1,N] -> y:f[B,N]", _product, room=_of_products, cuts="BN"),
        Op("dense_relu_input_grad", "dz:f[B,N] w:f[K,N] y:f[B,K] -> dx:f[B,K]", _product, room=_of_products, cuts="BK"),
        *[
            Op(
                f"dense_{name}_grads",
                f"dz:f[B,N] w:f[K,N] y:f[B,K]{settings} -> dx:f[B,K] db:f[1,K]",
                _product,
                {"y": ACTIVATED.get(name, normal)},
                room=_of_products,
                cuts="K",
            )
            for name, settings, reads in ACTIVATIONS
            if reads == "y"
        ],
        Op("dense_weight_sgd", "x:f[B,K] dz:f[B,N] w!:f[K,N] lr:s[1] ->", _product, room=_of_products, cuts="KN"),
        Op("dense_bias_sgd", "dz:f[B,N] b!:f[1,N] lr:s[1] ->", _per_element(1), cuts="N"),
        Op(
            "dense_relu_sgd",
            "x:f[B,K] dz:f[B,N] w!:f[K,N] lr:s[1] -> dx:f[B,K] db:f[1,K]",
            lambda d: 2 * _product(d),
            {"x": rectified},
            room=_of_products,
            cuts="K",
        ),
        Op(
            "dense_softmax_cross_entropy",
            "x:f[B,K] w:f[K,N] b:f[1,N] t:i[B]<N total!:s[2] -> dz:f[B,N]",
            _product,
            room=_of_products,
        ),
        # from a ReLU's output through the last layer and the loss back to the gradient in front of that ReLU
        Op(
            "classifier_grads",
            "x:f[B,K] w:f[K,N] b:f[1,N] t:i[B]<N total!:s[2] -> dz:f[B,N] dx:f[B,K] db:f[1,K]",
            lambda d: 2 * _product(d),
            {"x": rectified},
            room=_of_products,
        ),
        # the same, and plain SGD on that layer
        Op(
            "classifier_sgd",
            "x:f[B,K] w!:f[K,N] b!:f[1,N] t:i[B]<N total!:s[2] lr:s[1] -> dx:f[B,K] db:f[1,K]",
            lambda d: 3 * _product(d),
            {"x": rectified},
            room=lambda d: d["B"] * d["N"] + _of_products(d),
        ),
        # before an optimizer's step: limits for the gradients, penalties on the weights
        Op("clip_value", "g!:f[P] limit:s[1] ->", _per_element(2), cuts="P"),
        Op("clip_norm", "g!:f[P] limit:s[1] ->", _per_element(3)),
        Op("penalize", "p:f[P] g!:f[P] l2:s[1] l1:s[1] ->", _per_element(4), {"p": normal}, cuts="P"),
        Op("decay", "p!:f[P] lr:s[1] weight_decay:s[1] ->", _per_element(1), {"p": normal}, cuts="P"),
        # a batch's loss as scikit-learn has it: share * batch[0] / batch[1], of what the op of a loss added, and
        # alpha / 2 * sum(p ** 2) / (batch[1] / width), the weight of its rows; total takes it `rows` times
        Op(
            "l2_loss",
            "p:f[P] g!:f[P] alpha:s[1] share:s[1] width:s[1] rows:s[1] batch!:s[2] total!:s[2] ->",
            _per_element(4),
            {"p": normal, "share": constant(0.5), "width": constant(2), "rows": constant(3), "batch": constant(0.7, 8)},
        ),
        # gradients of several batches: their mean, each counted by what was added to total[1], or (mean 0) their sum
        Op(
            "accumulate",
            "g:f[P] total:s[2] mean:s[1] seen!:s[1] count!:s[1] sum!:f[P] ->",
            _per_element(2),
            {"mean": constant(1), "seen": constant(1), "count": constant(4)},
        ),
        Op("average", "sum!:f[P] count!:s[1] -> g:f[P]", _per_element(1), {"count": constant(4)}),
        # optimizers, over all parameters at once
        Op("sgd", "p!:f[P] g:f[P] lr:s[1] ->", _per_element(2), {"p": normal}, cuts="P"),
        Op(
            "sgd_momentum",
            "p!:f[P] velocity!:f[P] g:f[P] lr:s[1] momentum:s[1] nesterov:s[1] ->",
            _per_element(6),
            {"p": normal},
            cuts="P",
        ),
        Op(
            "rmsprop",
            "p!:f[P] v!:f[P] m!:f[P] velocity!:f[P] g:f[P] lr:s[1] alpha:s[1] eps:s[1] momentum:s[1] centered:s[1] ->",
            _per_element(12),
            {"p": normal, "v": uniform, "m": small, "momentum": lambda *about: 0.9 * flag(*about)},
            cuts="P",
        ),
        Op("lion", "p!:f[P] m!:f[P] g:f[P] lr:s[1] betas:s[2] ->", _per_element(8), {"p": normal}, cuts="P"),
        Op(
            "adam",
            "p!:f[P] m!:f[P] v!:f[P] g:f[P] lr:s[1] betas:s[2] eps:s[2] steps!:s[1] ->",
            _per_element(12),
            {"p": normal, "v": uniform, "eps": constant(1e-2, 1e-3)},
            cuts="P",
        ),
    ]
}
