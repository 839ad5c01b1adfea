"""Every op on every engine, and the notebook's own way to go back through a softmax.

Run with ``pytest benchmarks``. Each kernel's results are checked before it is timed.
"""

from __future__ import annotations

import numpy as np
import pytest

import fastbp
from fastbp.kernels.formulas import FORMULAS
from fastbp.kernels.ops import OPS

ENGINES = [info.name for info in fastbp.engines() if info.available]
SIZES = {"small": {"B": 32, "K": 64, "N": 10}, "large": {"B": 512, "K": 512, "N": 256}}
OTHER_SIZES = {"M": 2000, "P": 100_000}


def agree(op, results, expected):
    for result, wanted in zip(results, expected, strict=True):
        largest = np.abs(wanted[np.isfinite(wanted)]).max(initial=1)
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-5 * largest, err_msg=op.name)


def reference(op, inputs, outputs):
    """What is updated and the outputs, in float64: by NumPy's kernel, or by the formula, which takes more memory."""
    numpy = fastbp.engine("numpy")
    if not numpy.supports(op):
        return FORMULAS[op.name](*inputs)
    wide = [np.zeros(x.shape, np.float64 if x.dtype == np.float32 else x.dtype) for x in outputs]
    numpy.execute(op, [*inputs, *wide])
    return [*[x for arg, x in zip(op.inputs, inputs, strict=True) if arg.inplace], *wide]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [name for name in OPS if name != "softmax_jacobian"])
def test_op(benchmark, name, engine, size):
    op, engine = OPS[name], fastbp.engine(engine)
    if not engine.supports(op):
        pytest.skip("no must, since it is fused of others")
    sizes = SIZES[size] | OTHER_SIZES
    inputs = op.sample(np.random.default_rng(0), sizes, np.dtype(np.float32))
    shapes = [(op.shape(arg, sizes), arg.dtype(np.dtype(np.float32))) for arg in op.outputs]
    outputs = [np.zeros(*shape) for shape in shapes]
    wide = [x.astype(np.float64) if x.dtype == np.float32 else x.copy() for x in inputs]
    wanted = reference(op, wide, outputs)
    engine.execute(op, [*inputs, *outputs])
    agree(op, [*[x for arg, x in zip(op.inputs, inputs, strict=True) if arg.inplace], *outputs], wanted)

    benchmark.group = f"{name} {size}"
    benchmark.extra_info["flops"] = op.flops(sizes)
    benchmark.extra_info["bytes"] = op.bytes(sizes, np.dtype(np.float32))
    if name == "next_batch":  # its cursor would run out of rows
        benchmark.pedantic(lambda: inputs[1].fill(0) or engine.execute(op, [*inputs, *outputs]), rounds=100)
    else:
        benchmark(engine.execute, op, [*inputs, *outputs])


def jacobian_loop(dvalues, outputs):
    """The notebook's way: one sample's Jacobian after the other."""
    result = np.empty_like(dvalues)
    for i, (output, dvalue) in enumerate(zip(outputs, dvalues, strict=True)):
        result[i] = (np.diagflat(output) - np.outer(output, output)) @ dvalue
    return result


def jacobian_einsum(dvalues, outputs):
    return np.einsum("bij,bj->bi", fastbp.engine("numpy").softmax_jacobian(outputs), dvalues)


WAYS = {"Jacobian loop": jacobian_loop, "Jacobian einsum": jacobian_einsum} | {
    f"closed form, {name}": fastbp.engine(name).softmax_backward for name in ENGINES
}


@pytest.mark.parametrize("way", WAYS)
def test_softmax_backward(benchmark, way):
    rng = np.random.default_rng(0)
    outputs, dvalues = rng.dirichlet(np.ones(10), 300), rng.standard_normal((300, 10))
    np.testing.assert_allclose(WAYS[way](dvalues, outputs), jacobian_loop(dvalues, outputs), atol=1e-12)
    benchmark.group = "softmax backward, 300 rows of 10"
    benchmark(WAYS[way], dvalues, outputs)
