"""Optimizers, against torch and against their formulas."""

import numpy as np
import pytest

import fastbp

from .checks import assert_same_parameters, parameters_of, small_data, small_model, state_of

OPTIMIZERS = {
    "sgd": (lambda: fastbp.SGD(0.1), lambda t, p: t.SGD(p, 0.1)),
    "momentum": (lambda: fastbp.SGD(0.1, momentum=0.9), lambda t, p: t.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (lambda: fastbp.SGD(0.1, 0.9, nesterov=True), lambda t, p: t.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "adam": (lambda: fastbp.Adam(0.05), lambda t, p: t.Adam(p, 0.05)),
    "adam-own-betas": (
        lambda: fastbp.Adam(0.05, betas=(0.5, 0.9), eps=1e-3),
        lambda t, p: t.Adam(p, 0.05, betas=(0.5, 0.9), eps=1e-3),
    ),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


@each_optimizer
def test_25_steps_are_torchs(engine, name):
    torch = pytest.importorskip("torch")
    X, y = small_data(32)
    model = small_model(engine, optimizer=OPTIMIZERS[name][0]())
    twin = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
    for ours, theirs in zip((model.layers[0], model.layers[2]), (twin[0], twin[2]), strict=True):
        theirs.weight.data = torch.tensor(ours.weights.T.copy())
        theirs.bias.data = torch.tensor(ours.biases[0].copy())
    optimizer = OPTIMIZERS[name][1](torch.optim, twin.parameters())
    losses = []
    for step in range(25):
        if step == 15:
            optimizer.param_groups[0]["lr"] = 0.02
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(twin(torch.tensor(X)), torch.tensor(y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.fit(X, y, epochs=15, batch_size=32, shuffle=False)
    model.optimizer.lr = 0.02
    model.fit(X, y, epochs=10, batch_size=32, shuffle=False)
    np.testing.assert_allclose(model.history["loss"], losses, rtol=1e-6)
    expected = {f"{i}.weights": twin[i].weight.detach().numpy().T for i in (0, 2)}
    expected |= {f"{i}.biases": twin[i].bias.detach().numpy()[None] for i in (0, 2)}
    assert_same_parameters(model, expected, rtol=1e-6)


@each_optimizer
def test_steps_by_hand_are_the_steps_of_fit(engine, name):
    X, y = small_data(16)
    fitted, stepped = (small_model(engine, optimizer=OPTIMIZERS[name][0]()) for _ in range(2))
    fitted.fit(X, y, epochs=3, batch_size=16, shuffle=False)
    loss = fastbp.SoftmaxCrossEntropy(engine=engine)
    for _ in range(3):
        loss.forward(stepped.forward(X), y)
        stepped.backward(loss.backward())
        stepped.step()
    assert_same_parameters(fitted, stepped, rtol=1e-12)


@each_optimizer
def test_float32_stays_close_to_float64(engine, name):
    X, y = small_data(32)
    models = [small_model(engine, optimizer=OPTIMIZERS[name][0](), dtype=d) for d in (np.float32, np.float64)]
    for model in models:
        model.fit(X, y, epochs=5, batch_size=32, shuffle=False)
    assert_same_parameters(*models, rtol=2e-4)


def test_lr_may_change_without_another_recording(engine, monkeypatch):
    X, y = small_data()
    model = small_model(engine).fit(X, y, epochs=1)
    monkeypatch.setattr(fastbp.model, "record_training", pytest.fail)
    model.optimizer.lr = 0.0
    before = parameters_of(model)
    model.fit(X, y, epochs=1)
    assert_same_parameters(model, before, rtol=0)


@each_optimizer
def test_a_new_optimizer_starts_afresh(engine, name):
    X, y = small_data()
    model, fresh = small_model(engine, optimizer=OPTIMIZERS[name][0]()), small_model(engine, optimizer=fastbp.SGD(0.1))
    used = model.fit(X, y, epochs=2).optimizer
    model.optimizer = None
    fresh.optimizer = used  # from a model that is done with it
    assert all(not getattr(used, slot).any() for slot in used.slots)
    again = small_model(engine, optimizer=OPTIMIZERS[name][0]())
    for other in (fresh, again):
        other.fit(X, y, epochs=1)
    arrays = {key: value for key, value in state_of(fresh).items() if key != "history"}
    assert arrays == {key: value for key, value in state_of(again).items() if key != "history"}


def test_the_same_optimizer_assigned_again_goes_on(engine):
    X, y = small_data()
    models = [small_model(engine).fit(X, y, epochs=1) for _ in range(2)]
    models[0].optimizer = models[0].optimizer
    for model in models:
        model.fit(X, y, epochs=1)
    assert state_of(models[0]) == state_of(models[1])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: fastbp.SGD(-0.1), ValueError, r"lr must be at least 0.*, got -0\.1"),
        (lambda: fastbp.SGD(np.nan), ValueError, "lr must be .*, got nan"),
        (lambda: fastbp.SGD(np.inf), ValueError, "lr must be .*finite.*, got inf"),
        (lambda: fastbp.SGD("0.1"), TypeError, r"lr must be a number, got '0\.1'"),
        (lambda: fastbp.SGD(0.1, momentum=1.0), ValueError, r"momentum must be at least 0 and below 1, got 1\.0"),
        (lambda: fastbp.SGD(0.1, nesterov=True), ValueError, "nesterov needs a momentum"),
        (lambda: fastbp.Adam(None), TypeError, "lr must be a number, got None"),
        (lambda: fastbp.Adam(betas=(0.9, 1)), ValueError, r"betas\[1\] must be at least 0 and below 1, got 1"),
        (lambda: fastbp.Adam(betas=0.9), (TypeError, ValueError), r"betas must be .*, got 0\.9"),
        (lambda: fastbp.Adam(betas=(0.9,)), (TypeError, ValueError), "betas must be .*two"),
        (lambda: fastbp.Adam(eps=-1), ValueError, r"eps must be at least 0.*, got -1"),
    ],
)
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_a_bad_lr_later_changes_nothing():
    optimizer = fastbp.Adam(0.1)
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.lr = -1
    assert optimizer.lr == 0.1


@each_optimizer
def test_repr_makes_the_optimizer_again(name):
    optimizer = OPTIMIZERS[name][0]()
    assert repr(eval(repr(optimizer), vars(fastbp))) == repr(optimizer)
