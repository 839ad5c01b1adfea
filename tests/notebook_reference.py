"""The teaching notebook's classes, as slow and as plain as its mathematics: what fastbp is compared with."""

import numpy as np


class LayerDense:
    def __init__(self, inputs, neurons):
        self.weights = 0.01 * np.random.randn(inputs, neurons)
        self.biases = np.zeros((1, neurons))

    def forward(self, x):
        self.inputs = x
        self.output = x @ self.weights + self.biases

    def backward(self, dvalues):
        self.dweights = self.inputs.T @ dvalues
        self.dbiases = dvalues.sum(axis=0, keepdims=True)
        self.dinputs = dvalues @ self.weights.T


class ActivationRelU:
    def forward(self, x):
        self.inputs = x
        self.output = np.where(x > 0, x, 0)

    def backward(self, dvalues):
        self.dinputs = np.where(self.inputs > 0, dvalues, 0)


class ActivationSoftmax:
    def forward(self, x):
        self.inputs = x
        e = np.exp(x - x.max(axis=1, keepdims=True))
        self.output = e / e.sum(axis=1, keepdims=True)

    def backward(self, dvalues):
        """Row by row, by the Jacobian matrix of each."""
        self.dinputs = np.empty(dvalues.shape)
        for row, jacobian in enumerate(self.jacobian()):
            self.dinputs[row] = jacobian @ dvalues[row]

    def jacobian(self):
        return [np.diag(p) - np.outer(p, p) for p in self.output]


class Cost:
    def calculate(self, output, y):
        return np.mean(self.forward(output, y))


class CategoricalCrossEntropy(Cost):
    def forward(self, p, y):
        return -np.log((np.clip(p, 1e-7, 1 - 1e-7) * one_hot(y, p)).sum(axis=1))

    def backward(self, p, y):
        self.dinputs = -one_hot(y, p) / p / len(p)


class ActivationSoftmaxCost:
    def __init__(self):
        self.activation = ActivationSoftmax()
        self.cost = CategoricalCrossEntropy()

    def forward(self, x, y):
        self.activation.forward(x)
        self.output = self.activation.output
        return self.cost.calculate(self.output, y)

    def backward(self, p, y):
        self.dinputs = (p - one_hot(y, p)) / len(p)


def one_hot(y, p):
    return np.eye(p.shape[1])[y] if y.ndim == 1 else y
