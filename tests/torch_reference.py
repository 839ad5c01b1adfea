"""What layers, losses and optimizers compute, in torch's float64: another route to every number of a training step."""

import numpy as np
import pytest

from .checks import on_host

torch = pytest.importorskip("torch")
functional = torch.nn.functional

KINKED = 1e-5  # how near a corner of an activation rounding may decide the slope


class Reference:
    """A model's twin in torch.

    Attributes
    ----------
    margin : float
        How near any number in it came to a corner, where slopes jump.
    """

    def __init__(self, model):
        self.model, self.margin = model, np.inf
        tensor = lambda array: torch.tensor(np.array(on_host(array), np.float64))  # noqa: E731
        self.parameters = {
            (i, name): tensor(getattr(layer, name)).requires_grad_()
            for i, layer in enumerate(model.walk())
            for name in layer.shapes()
        }
        self.statistics = {
            i: (tensor(layer.running_mean), tensor(layer.running_var))
            for i, layer in enumerate(model.walk())
            if type(layer).__name__ == "BatchNorm"
        }

    def decayed(self):
        """Weights first, then what is not decayed, as optimizers of torch take them in groups."""
        groups = [], []
        for (i, name), tensor in self.parameters.items():
            layer = list(self.model.walk())[i]
            if layer.trainable:
                groups[not layer.parameters()[name].decay].append(tensor)
        return groups

    def corner(self, distance):
        self.margin = min(self.margin, float(distance.detach().abs().min()))

    def forward(self, x, training):
        places = {id(layer): i for i, layer in enumerate(self.model.walk())}

        def run(layers, x):
            for layer in layers:
                x = apply(layer, x)
            return x

        def apply(layer, x):
            kind, i = type(layer).__name__, places[id(layer)]
            own = {name: tensor for (place, name), tensor in self.parameters.items() if place == i}
            if kind in ("ReLU", "LeakyReLU", "ELU"):
                self.corner(x)
            if kind == "Dense":
                return x @ own["weights"] + own["biases"]
            if kind == "LayerNorm":
                return functional.layer_norm(x, x.shape[1:], own["weights"][0], own["biases"][0], layer.eps)
            if kind == "BatchNorm":
                parts = *self.statistics[i], own["weights"][0], own["biases"][0]
                return functional.batch_norm(x, *parts, training and layer.trainable, layer.momentum, layer.eps)
            if kind == "Embedding":
                pieces, start = [], 0
                tables = {}
                for column, codes, dim in zip(layer.columns, layer.num_embeddings, layer.embedding_dim, strict=True):
                    tables[column] = own["weights"][start : start + codes * dim].reshape(codes, dim)
                    start += codes * dim
                for column in range(layer.features):
                    values = x[:, column]
                    pieces.append(tables[column][values.long()] if column in tables else values[:, None])
                return torch.cat(pieces, 1)
            if kind == "Residual":
                return x + run(layer.layers, x)
            return {
                "Identity": lambda: x,
                "Dropout": lambda: x,
                "ReLU": lambda: functional.relu(x),
                "LeakyReLU": lambda: functional.leaky_relu(x, layer.negative_slope),
                "ELU": lambda: functional.elu(x, layer.alpha),
                "GELU": lambda: functional.gelu(x, approximate=layer.approximate),
                "SiLU": lambda: functional.silu(x),
                "Tanh": lambda: torch.tanh(x),
                "Sigmoid": lambda: torch.sigmoid(x),
                "Softplus": lambda: functional.softplus(x, layer.beta, layer.threshold),
                "Softmax": lambda: torch.softmax(x, 1),
            }[kind]()

        return run(self.model.layers, x)

    def loss(self, outputs, y, weights=None):
        """The loss by its definition, rows' weights included."""
        loss = self.model.loss
        kind, (rows, width) = type(loss).__name__, outputs.shape
        weights = torch.ones(rows, dtype=torch.float64) if weights is None else torch.tensor(weights)
        if kind in ("SoftmaxCrossEntropy", "CategoricalCrossEntropy"):
            targets = torch.tensor(y)
            if targets.ndim == 1:
                if loss.ignore_index is not None:
                    weights = torch.where(targets == loss.ignore_index, 0.0, weights)
                targets = functional.one_hot(targets.clamp(0, width - 1).long(), width).double()
            classes = torch.tensor(np.broadcast_to(loss.class_weight or 1.0, (width,)).copy(), dtype=torch.float64)
            smooth = (1 - loss.label_smoothing) * targets + loss.label_smoothing / width
            if kind == "SoftmaxCrossEntropy":
                logs = torch.log_softmax(outputs, 1)
            else:
                logs = torch.log(outputs.clamp(1e-7, 1 - 1e-7))
                self.corner((outputs - 1e-7).clamp(min=0))  # beyond, the slope is not that of the clipped loss
                self.corner((1 - 1e-7 - outputs).clamp(min=0))
            total = (weights[:, None] * smooth * classes * -logs).sum()
            count = (weights[:, None] * targets * classes).sum()
        else:
            y = torch.tensor(y, dtype=torch.float64)
            error = outputs - y
            if kind == "MeanAbsoluteError":
                self.corner(error)
            costs = {
                "MeanSquaredError": lambda: error**2,
                "MeanAbsoluteError": lambda: error.abs(),
                "Huber": lambda: functional.huber_loss(outputs, y, reduction="none", delta=loss.delta),
                "Poisson": lambda: functional.poisson_nll_loss(outputs, y, True, reduction="none"),
                "BinaryCrossEntropy": lambda: functional.binary_cross_entropy_with_logits(
                    outputs, y, reduction="none", pos_weight=torch.tensor(loss.pos_weight or 1.0, dtype=torch.float64)
                ),
            }[kind]()
            total, count = (weights[:, None] * costs).sum(), weights.sum() * width
        return total, count if loss.reduction == "mean" else torch.tensor(1.0)

    def optimizer(self):
        ours = self.model.optimizer
        groups = [
            {"params": tensors, "weight_decay": decay}
            for tensors, decay in zip(self.decayed(), (ours.weight_decay, 0.0), strict=True)
            if tensors
        ]
        make = {
            "SGD": lambda: torch.optim.SGD(groups, ours.lr, ours.momentum, nesterov=ours.nesterov),
            "Adam": lambda: torch.optim.Adam(groups, ours.lr, ours.betas, ours.eps),
            "AdamW": lambda: torch.optim.AdamW(groups, ours.lr, ours.betas, ours.eps),
            "RMSprop": lambda: torch.optim.RMSprop(
                groups, ours.lr, ours.alpha, ours.eps, momentum=ours.momentum, centered=ours.centered
            ),
        }
        return make[type(ours).__name__]()

    def fit(self, X, y, weights, batch_size, epochs):
        """Train on rows as they come; returns each epoch's loss."""
        optimizer, history, X = self.optimizer(), [], torch.tensor(X)
        for _ in range(epochs):
            sums = np.zeros(2)
            for start in range(0, len(X), batch_size):
                rows = slice(start, start + batch_size)
                optimizer.zero_grad()
                outputs = self.forward(X[rows], training=True)
                total, count = self.loss(outputs, y[rows], None if weights is None else weights[rows])
                sums += float(total.detach()), float(count)
                (total / count if count else 0 * total).backward()
                if self.model.optimizer.clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(
                        [x for group in optimizer.param_groups for x in group["params"]], self.model.optimizer.clip_norm
                    )
                optimizer.step()
            one = self.model.loss.reduction != "mean"
            history.append(sums[0] / (1 if one else sums[1] or 1))
        return history
