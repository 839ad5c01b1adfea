"""Optimizers, against torch and against their formulas."""

import copy

import numpy as np
import pytest

import fastbp
from fastbp.kernels.ops import OPS
from fastbp.steps import recorded
from fastbp.tape import Recorder

from .checks import (
    assert_allclose,
    assert_array_equal,
    assert_same_parameters,
    on_host,
    parameters_of,
    small_data,
    small_model,
    state_of,
)

OPTIMIZERS = {
    "sgd": (lambda: fastbp.SGD(0.1), lambda t, p: t.SGD(p, 0.1)),
    "momentum": (lambda: fastbp.SGD(0.1, momentum=0.9), lambda t, p: t.SGD(p, 0.1, momentum=0.9)),
    "nesterov": (lambda: fastbp.SGD(0.1, 0.9, nesterov=True), lambda t, p: t.SGD(p, 0.1, momentum=0.9, nesterov=True)),
    "adam": (lambda: fastbp.Adam(0.05), lambda t, p: t.Adam(p, 0.05)),
    "adam-own-betas": (
        lambda: fastbp.Adam(0.05, betas=(0.5, 0.9), eps=1e-3),
        lambda t, p: t.Adam(p, 0.05, betas=(0.5, 0.9), eps=1e-3),
    ),
    "rmsprop": (lambda: fastbp.RMSprop(0.01), lambda t, p: t.RMSprop(p, 0.01)),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


FADING = {"adam": "m v", "rmsprop": "v m velocity", "lion": "m", "sgd_momentum": "velocity", "decay": "p"}
NUMBERS = {
    "lr": [0.1], "betas": [0.9, 0.9], "alpha": [0.9], "momentum": [0.9], "eps": [0.1, 0], "centered": [1], "steps": [9],
    "nesterov": [0], "weight_decay": [1],
}  # fmt: skip


@pytest.mark.parametrize("engine", ["numba"], indirect=True)
@pytest.mark.parametrize("name", FADING)
def test_what_fades_comes_to_rest_at_0(engine, name, dtype):
    """And not at a subnormal number, with which processors compute many times as slowly."""
    tiny, arrays = np.finfo(dtype).tiny, {}
    for arg in OPS[name].inputs:
        numbers = np.array(NUMBERS.get(arg.name, np.zeros(4)), np.float64 if arg.kind == "s" else dtype)
        if arg.name in FADING[name].split():
            numbers[:] = tiny, -tiny, 2 * tiny, np.nan
        count = int(arg.dims[0]) if arg.dims[0].isdigit() else 4
        arrays[arg.name] = engine.asarray(numbers[:count])
    getattr(engine, name)(*arrays.values())
    for fading in FADING[name].split():
        assert_allclose(arrays[fading], [0, 0, 1.8 * tiny, np.nan], rtol=1e-6)


@each_optimizer
def test_25_steps_are_torchs(engine, name):
    torch = pytest.importorskip("torch")
    X, y = small_data(32)
    model = small_model(engine, optimizer=OPTIMIZERS[name][0]())
    twin = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
    for ours, theirs in zip((model.layers[0], model.layers[2]), (twin[0], twin[2]), strict=True):
        theirs.weight.data = torch.tensor(on_host(ours.weights).T.copy())
        theirs.bias.data = torch.tensor(on_host(ours.biases)[0].copy())
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
    assert_allclose(model.history["loss"], losses, rtol=1e-6)
    expected = {f"{i}.weights": twin[i].weight.detach().numpy().T for i in (0, 2)}
    expected |= {f"{i}.biases": twin[i].bias.detach().numpy()[None] for i in (0, 2)}
    assert_same_parameters(model, expected, rtol=1e-6)


class LionInTorch:
    """Chen et al., 2023, algorithm 2."""

    def __init__(self, groups, lr, betas=(0.9, 0.99)):
        self.groups = [(group, [0 * p for p in group["params"]]) for group in groups]
        self.lr, self.betas = lr, betas

    def step(self):
        a, b = self.betas
        for group, means in self.groups:
            for i, p in enumerate(group["params"]):
                update = (a * means[i] + (1 - a) * p.grad).sign() + group["weight_decay"] * p.data
                p.data = p.data - self.lr * update
                means[i] = b * means[i] + (1 - b) * p.grad


WEIGHTS, BIASES = 70, 9
STEPS = 25
# the optimizer, torch's, weight decay, and what is no argument of torch's
STEPPED = {
    "sgd": (fastbp.SGD, "SGD", {"lr": 0.1}, 0.0, {}),
    "sgd decay": (fastbp.SGD, "SGD", {"lr": 0.1}, 0.1, {}),
    "sgd decay l1": (fastbp.SGD, "SGD", {"lr": 0.1}, 0.1, {"l1": 0.05}),
    "momentum decay l1": (fastbp.SGD, "SGD", {"lr": 0.1, "momentum": 0.9}, 0.1, {"l1": 0.05}),
    "nesterov clip": (
        fastbp.SGD, "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, 0.1, {"clip_norm": 3.0, "clip_value": 1.0},
    ),
    "clip nothing": (fastbp.SGD, "SGD", {"lr": 0.1}, 0.1, {"clip_norm": 1e3, "clip_value": 1e3}),
    "rmsprop": (fastbp.RMSprop, "RMSprop", {}, 0.0, {}),
    "rmsprop decay": (fastbp.RMSprop, "RMSprop", {"lr": 0.02, "alpha": 0.8, "eps": 1e-3}, 0.1, {}),
    "rmsprop momentum": (fastbp.RMSprop, "RMSprop", {"momentum": 0.9}, 0.1, {"clip_value": 0.5}),
    "rmsprop centered": (fastbp.RMSprop, "RMSprop", {"centered": True}, 0.0, {}),
    "rmsprop both": (fastbp.RMSprop, "RMSprop", {"centered": True, "momentum": 0.5}, 0.1, {"l1": 0.1}),
    "adam": (fastbp.Adam, "Adam", {}, 0.0, {}),
    "adam decay l1": (fastbp.Adam, "Adam", {"lr": 0.01, "betas": (0.5, 0.9), "eps": 1e-4}, 0.1, {"l1": 0.05}),
    "adam clip": (fastbp.Adam, "Adam", {"lr": 0.01}, 0.1, {"clip_norm": 1.0}),
    "adamw": (fastbp.AdamW, "AdamW", {}, 0.01, {}),
    "adamw l1": (fastbp.AdamW, "AdamW", {"lr": 0.01}, 0.3, {"l1": 0.05, "clip_norm": 2.0}),
    "lion": (fastbp.Lion, LionInTorch, {"lr": 1e-4}, 0.0, {}),
    "lion decay": (fastbp.Lion, LionInTorch, {"lr": 0.02, "betas": (0.8, 0.9)}, 0.3, {"l1": 0.05}),
}  # fmt: skip


def torchs_steps(torch, make, arguments, weight_decay, options, start, noises):
    weights, biases = (torch.nn.Parameter(torch.tensor(x)) for x in np.split(start.copy(), [WEIGHTS]))
    groups = [{"params": [weights], "weight_decay": weight_decay}, {"params": [biases], "weight_decay": 0.0}]
    optimizer = (getattr(torch.optim, make) if isinstance(make, str) else make)(groups, **arguments)
    for noise in noises:
        for p, n in zip((weights, biases), np.split(noise, [WEIGHTS]), strict=True):
            p.grad = p.detach() + torch.tensor(n)
        if "clip_value" in options:
            torch.nn.utils.clip_grad_value_([weights, biases], options["clip_value"])
        if "clip_norm" in options:
            torch.nn.utils.clip_grad_norm_([weights, biases], options["clip_norm"])
        weights.grad += options.get("l1", 0.0) * weights.detach().sign()
        optimizer.step()
    return np.concatenate([weights.detach().numpy(), biases.detach().numpy()])


def steps(engine, optimizer, start, noises, *, replay=False):
    """Steps downhill on (p + noise)**2 / 2, by hand or from a recording."""
    optimizer.prepare(engine, start.size, start.dtype)
    parameters, gradients = engine.asarray(start.copy()), engine.zeros(start.shape, start.dtype)
    decayed = parameters[:WEIGHTS], gradients[:WEIGHTS]
    recorder = Recorder(engine, start.dtype)
    handles = [recorder.adopt(array) for array in (parameters, gradients, *decayed)]
    recorded(optimizer, recorder).update(*handles[:2], tuple(handles[2:]))
    tape = recorder.tape()
    with tape.bound():
        for noise in noises:
            gradients[...] = parameters + engine.asarray(noise)
            tape.run() if replay else optimizer.update(parameters, gradients, decayed)
    return engine.asnumpy(parameters), [call.op.name for call in tape.calls]


@pytest.fixture
def problem(rng):
    return rng.standard_normal(WEIGHTS + BIASES), rng.standard_normal((STEPS, WEIGHTS + BIASES))


@pytest.mark.parametrize("replay", [False, True], ids=["by hand", "replayed"])
@pytest.mark.parametrize("name", STEPPED)
def test_penalties_and_limits_are_torchs(engine, name, replay, problem):
    torch = pytest.importorskip("torch")
    kind, torchs, arguments, weight_decay, options = STEPPED[name]
    optimizer = kind(**arguments, weight_decay=weight_decay, **options)
    expected = torchs_steps(torch, torchs, {"lr": optimizer.lr} | arguments, weight_decay, options, *problem)
    assert_allclose(steps(engine, optimizer, *problem, replay=replay)[0], expected, rtol=1e-6, atol=1e-9)


PLAIN = {
    "sgd": lambda: fastbp.SGD(0.1),
    "sgd_momentum": lambda: fastbp.SGD(0.1, 0.9),
    "rmsprop": fastbp.RMSprop,
    "adam": fastbp.Adam,
    "lion": fastbp.Lion,
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_step_is_one_op(engine, name, problem):
    assert steps(engine, PLAIN[name](), *problem)[1] == [name]


def test_defaults_are_torchs():
    torch = pytest.importorskip("torch")
    p = torch.nn.Parameter(torch.zeros(1))
    for name in ("SGD", "RMSprop", "Adam", "AdamW"):
        ours = {"lr": 0.1} if name == "SGD" else {}
        theirs = getattr(torch.optim, name)([p], **ours).param_groups[0]
        config = getattr(fastbp, name)(**ours).config()
        assert config == {key: theirs[key] for key in config}


def test_plain_sgd_with_weight_decay_fuses(engine, rng):
    x, dz, start = rng.standard_normal((7, 32)), rng.standard_normal((7, 16)), rng.standard_normal(512)
    optimizer = fastbp.SGD(0.1, weight_decay=0.2)
    optimizer.prepare(engine, 512, np.float64)
    parameters, gradients = engine.asarray(start.copy()), engine.zeros((512,), np.float64)
    recorder = Recorder(engine, np.float64)
    dw = recorder.dense_weight_grad(*(recorder.adopt(engine.asarray(a)) for a in (x, dz)))
    recorder.want(dw, gradients.reshape(32, 16))
    handles = recorder.adopt(parameters), recorder.adopt(gradients)
    recorded(optimizer, recorder).update(*handles, handles)
    tape = recorder.tape()
    with tape.bound():
        tape.run()
    if engine.supports(OPS["dense_weight_sgd"]):
        assert [call.op.name for call in tape.calls] == ["decay", "dense_weight_sgd"]
    expected = start - 0.1 * ((x.T @ dz).ravel() + 0.2 * start)
    assert_allclose(parameters, expected, rtol=1e-12, atol=1e-12)


def test_gradients_too_large_to_square_in_float32_are_clipped(engine):
    start = np.zeros(WEIGHTS + BIASES, np.float32)
    parameters, _ = steps(engine, fastbp.SGD(1.0, clip_norm=1.0), start, [start + np.float32(1e30)])
    assert_allclose(parameters, -((WEIGHTS + BIASES) ** -0.5), rtol=1e-6)


def test_a_variance_that_rounding_makes_negative_counts_as_0(engine):
    start = np.zeros(WEIGHTS + BIASES, np.float32)
    noises = np.full((200, start.size), np.float32(0.1))
    optimizer = fastbp.RMSprop(0.0, alpha=0.5, centered=True)
    assert np.isfinite(steps(engine, optimizer, start, noises)[0]).all()


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
    monkeypatch.setattr("fastbp.training.record_training", pytest.fail)
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
    assert all(not getattr(used, name).any() for name in used.moments)
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
        (lambda: fastbp.Adam(eps=-1), ValueError, r"eps must be at least 0 and finite, got -1"),
        (lambda: fastbp.Adam(eps=0), ValueError, "eps must be above 0, or else eps_hat"),
    ],
)
def test_bad_settings(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.parametrize(
    ("optimizer", "name", "value", "error", "match"),
    [
        (fastbp.SGD(0.1), "lr", -1, ValueError, "lr must be at least 0 and finite, got -1"),
        (fastbp.SGD(0.1), "momentum", 2, ValueError, "momentum must be at least 0 and below 1, got 2"),
        (fastbp.SGD(0.1), "momentum", None, TypeError, "momentum must be a number, got None"),
        (fastbp.SGD(0.1), "nesterov", True, ValueError, r"nesterov needs a momentum above 0, got momentum=0\.0"),
        (fastbp.SGD(0.1, 0.9, True), "momentum", 0, ValueError, r"nesterov needs a momentum above 0, got .*=0\.0"),
        (fastbp.SGD(0.1, 0.9), "nesterov", "no", TypeError, "nesterov must be True or False, got 'no'"),
        (fastbp.Adam(), "betas", (0.9, 1.0), ValueError, r"betas\[1\] must be at least 0 and below 1, got 1\.0"),
        (fastbp.Adam(), "betas", "ab", TypeError, "betas must be two numbers, got 'ab'"),
        (fastbp.Adam(), "eps", 0, ValueError, "eps must be above 0, or else eps_hat"),
        (fastbp.Lion(), "betas", [0.9], TypeError, r"betas must be two numbers, got \[0\.9\]"),
        (fastbp.RMSprop(), "alpha", 1, ValueError, "alpha must be at least 0 and below 1, got 1"),
        (fastbp.RMSprop(), "eps", np.nan, ValueError, "eps must be above 0 and finite, got nan"),
        (fastbp.RMSprop(), "momentum", -0.1, ValueError, r"momentum must be at least 0 .*got -0\.1"),
        (fastbp.RMSprop(), "centered", 1, TypeError, "centered must be True or False, got 1"),
        (fastbp.AdamW(), "weight_decay", -1, ValueError, "weight_decay must be at least 0 and finite, got -1"),
        (fastbp.AdamW(), "l1", np.inf, ValueError, "l1 must be at least 0 and finite, got inf"),
        (fastbp.AdamW(), "clip_norm", 0, ValueError, "clip_norm must be above 0 and finite, got 0"),
        (fastbp.AdamW(), "clip_value", True, TypeError, "clip_value must be a number, got True"),
        (fastbp.AdamW(), "schedule", 0.1, TypeError, r"schedule must be a fastbp\.Schedule or .*, got 0\.1"),
        (fastbp.AdamW(), "schedule", fastbp.StepLR, TypeError, "schedule must be .*, got <class .*StepLR"),
    ],
)
def test_settings_are_checked_when_made_and_when_assigned(optimizer, name, value, error, match):
    before = repr(optimizer)
    with pytest.raises(error, match=match):
        setattr(optimizer, name, value)
    assert repr(optimizer) == before
    with pytest.raises(error, match=match):
        type(optimizer)(**optimizer.config() | {name: value})


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="weight_decays"):
        fastbp.Lion(weight_decays=0.1)


CHANGES = [
    (lambda: fastbp.RMSprop(), {"alpha": 0.5}),
    (lambda: fastbp.RMSprop(), {"centered": True}),
    (lambda: fastbp.RMSprop(), {"momentum": 0.5}),
    (lambda: fastbp.Adam(), {"betas": (0.5, 0.5)}),
    (lambda: fastbp.Adam(), {"eps": 0.1}),
    (lambda: fastbp.Lion(0.01), {"betas": (0.0, 0.5)}),
    (lambda: fastbp.SGD(0.1), {"clip_norm": 0.01}),
    (lambda: fastbp.SGD(0.1, clip_value=0.1), {"clip_value": None}),
]


@pytest.mark.parametrize(("make", "change"), CHANGES, ids=lambda x: None if callable(x) else str(x))
def test_a_changed_setting_takes_effect_in_a_recording(engine, make, change):
    X, y = small_data()
    model, other = (small_model(engine, optimizer=make()).fit(X, y, epochs=1) for _ in range(2))
    for name, value in change.items():
        setattr(model.optimizer, name, value)
    without_tapes = copy.deepcopy(model)
    for each in (model, without_tapes, other):
        each.fit(X, y, epochs=1)
    assert state_of(model) == state_of(without_tapes) != state_of(other)


def test_a_copy_shares_nothing_that_steps_change(engine, problem):
    optimizer = fastbp.Adam(0.1)
    steps(engine, optimizer, *problem)
    before = {name: getattr(optimizer, name).copy() for name in optimizer.state}
    other = copy.copy(optimizer)
    other.lr = 0.5
    steps(engine, other, *problem)
    for name, array in before.items():
        assert_array_equal(getattr(optimizer, name), array)


@each_optimizer
def test_reset_forgets_the_steps_taken(engine, name, problem):
    optimizer, fresh = (OPTIMIZERS[name][0]() for _ in range(2))
    steps(engine, optimizer, *problem)
    optimizer.reset()
    results = [steps(engine, each, *problem)[0] for each in (optimizer, fresh)]
    assert_array_equal(*results)


def test_a_bad_lr_later_changes_nothing():
    optimizer = fastbp.Adam(0.1)
    with pytest.raises(ValueError, match="lr must be"):
        optimizer.lr = -1
    assert optimizer.lr == 0.1


@pytest.mark.parametrize("name", STEPPED)
def test_repr_makes_the_optimizer_again(name):
    kind, _, arguments, weight_decay, options = STEPPED[name]
    optimizer = kind(**arguments, weight_decay=weight_decay, **options, schedule=fastbp.StepLR(3))
    assert repr(eval(repr(optimizer), vars(fastbp))) == repr(optimizer)
    config = optimizer.config()
    assert {name: config[name] for name in (*arguments, *options)} == arguments | options


def test_eps_hat_is_added_before_the_bias_is_taken_out(engine, dtype):
    """Two steps by hand, as Kingma and Ba write them at the end of section 2."""
    optimizer = fastbp.Adam(0.1, betas=(0.5, 0.75), eps=0.0, eps_hat=0.25)
    optimizer.prepare(engine, 1, dtype)
    parameters, m, v, p = engine.zeros((1,), dtype), 0.0, 0.0, 0.0
    for step, gradient in enumerate([1.0, -2.0], 1):
        m, v = 0.5 * m + 0.5 * gradient, 0.75 * v + 0.25 * gradient**2
        p -= 0.1 * np.sqrt(1 - 0.75**step) / (1 - 0.5**step) * m / (np.sqrt(v) + 0.25)
        optimizer.update(parameters, engine.asarray(np.array([gradient]), dtype), None)
    assert_allclose(parameters, p, rtol=1e-6)
