"""What the README shows runs as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest

import fastbp

from .checks import assert_same_parameters

PAGE = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_each_block_runs(block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """The README's own layer."""
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in BLOCKS if "class Gate" in block)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    return names["Gate"]


def test_the_layer_of_ones_own_is_short():
    (block,) = (block for block in BLOCKS if "class Gate" in block)
    lines = block[block.index("class Gate") : block.index("assert")].strip().splitlines()
    assert len([line for line in lines if line]) <= 15


def test_the_layer_of_ones_own_trains_alike_on_each_engine(engine, gate, dtype):
    X, y = fastbp.spiral_data(30, 3, seed=0)
    models = [
        fastbp.Sequential(
            [fastbp.Dense(2, 9), fastbp.ReLU(), gate(9, 9), fastbp.Dense(9, 3)],
            loss=fastbp.SoftmaxCrossEntropy(),
            optimizer=fastbp.SGD(0.05),
            engine=which,
            dtype=dtype,
            seed=0,
        ).fit(X, y, epochs=3)
        for which in ("numpy", engine)
    ]
    assert_same_parameters(*models, rtol=1e-10 if dtype == np.float64 else 1e-3)


def test_what_may_go_wrong_in_a_layer_of_ones_own_is_said():
    class NoInit(fastbp.Layer):
        def __init__(self):
            pass

        def forward(self, x):
            self.output = self.engine.relu_forward(x)

    with pytest.raises(
        AttributeError, match=r"has no attribute 'engine': its __init__ must call super\(\).__init__\(\)"
    ):
        NoInit().forward(np.ones((2, 3)))

    class InNumPy(fastbp.Tanh):
        def forward(self, x):
            self.output = np.tanh(x)
            return self.output

    with pytest.raises(fastbp.RecordingError, match=r"InNumPy\(\): forward cannot .* call an op of self.engine"):
        fastbp.Sequential([fastbp.Dense(2, 3), InNumPy()]).predict(np.ones((2, 2)))
    model = fastbp.Sequential([fastbp.Dense(2, 3), NoInit()])
    with pytest.raises(fastbp.RecordingError, match=r"forward cannot be recorded: .* forward returns its output"):
        model.predict(np.ones((2, 2)))
