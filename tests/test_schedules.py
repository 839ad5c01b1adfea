"""Learning-rate schedules, against torch's, stepped at every batch, and against their formulas."""

import copy
import json
import pickle

import numpy as np
import pytest

import fastbp

from .checks import assert_allclose, assert_array_equal, assert_same_parameters, parameters_of, small_data, small_model

LR = 0.4
EPOCHS = 13


def times(steps_an_epoch, epochs=EPOCHS):
    return np.arange(epochs * steps_an_epoch) / steps_an_epoch


def torchs_rates(torch, make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], LR)
    schedule = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


# the schedule, and torch's from its module, the optimizer and the number of steps an epoch
SCHEDULES = {
    "step": (fastbp.StepLR(3), lambda t, o, n: t.StepLR(o, 3 * n)),
    "step gamma": (fastbp.StepLR(2, gamma=0.7), lambda t, o, n: t.StepLR(o, 2 * n, gamma=0.7)),
    "cosine": (fastbp.CosineAnnealingLR(EPOCHS), lambda t, o, n: t.CosineAnnealingLR(o, EPOCHS * n)),
    "cosine back": (fastbp.CosineAnnealingLR(5, 0.1), lambda t, o, n: t.CosineAnnealingLR(o, 5 * n, 0.1)),
    "warmup": (fastbp.LinearWarmup(5), lambda t, o, n: t.LinearLR(o, total_iters=5 * n)),
    "warmup factors": (
        fastbp.LinearWarmup(4, start_factor=0.1, end_factor=0.5),
        lambda t, o, n: t.LinearLR(o, 0.1, 0.5, total_iters=4 * n),
    ),
    "sequence": (
        fastbp.SequentialLR([fastbp.LinearWarmup(3), fastbp.StepLR(2), fastbp.CosineAnnealingLR(5)], [3, 8]),
        lambda t, o, n: t.SequentialLR(
            o, [t.LinearLR(o, total_iters=3 * n), t.StepLR(o, 2 * n), t.CosineAnnealingLR(o, 5 * n)], [3 * n, 8 * n]
        ),
    ),
}


@pytest.mark.parametrize("steps_an_epoch", [1, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_torchs_at_every_step(name, steps_an_epoch):
    torch = pytest.importorskip("torch")
    ours, theirs = SCHEDULES[name]
    optimizer = fastbp.SGD(LR, schedule=ours)
    expected = torchs_rates(torch, lambda t, o: theirs(t, o, steps_an_epoch), EPOCHS * steps_an_epoch)
    assert_allclose(optimizer.rates(times(steps_an_epoch)), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize(("epochs", "steps", "pct_start"), [(12, 5, 0.25), (10, 7, 0.3), (3, 1, 0.5), (1, 20, 0.07)])
def test_one_cycle_of_known_steps_is_torchs(strategy, epochs, steps, pct_start):
    torch = pytest.importorskip("torch")
    options = {"pct_start": pct_start, "anneal_strategy": strategy, "steps_per_epoch": steps, "epochs": epochs}
    optimizer = fastbp.SGD(LR, schedule=fastbp.OneCycleLR(2.0, **options))
    expected = torchs_rates(torch, lambda t, o: t.OneCycleLR(o, 2.0, **options, cycle_momentum=False), epochs * steps)
    assert_allclose(optimizer.rates(np.arange(epochs * steps) / steps), expected, rtol=1e-9)


class Batches:
    """Batches that note the rate of each step; with a length, or without."""

    def __init__(self, model, count):
        self.model, self.count, self.rates = model, count, []

    def __iter__(self):
        X, y = small_data(48)
        for start in range(0, 48, 16):
            yield X[start : start + 16], y[start : start + 16]
            self.rates.append(float(self.model.optimizer.rate[0]))

    def __len__(self):
        return self.count


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("known", [True, False])
def test_rates_move_with_each_batch(engine, known, accumulate):
    model = small_model(engine, optimizer=fastbp.SGD(0.1, schedule=lambda epochs, lr: lr * (1 + epochs)))
    batches = Batches(model, 3)
    model.fit(batches if known else (lambda: iter(batches)), epochs=2, accumulate=accumulate)
    times = {1: [0, 1 / 3, 2 / 3], 2: [None, 0, 0]}[accumulate]  # the rate of a step is seen when it has been made
    first = times if known else [time and 0 for time in times]
    for place, time in enumerate([*first, *(time if time is None else 1 + time for time in times)]):
        if time is not None:
            assert_allclose(batches.rates[place], 0.1 * (1 + time), rtol=1e-12)
    if accumulate == 2:  # and that of the last, left over batch
        assert_allclose(model.optimizer.rate[0], 0.1 * (1 + 1.5), rtol=1e-12)


def test_more_batches_than_before_end_at_the_next_epoch():
    model = small_model(optimizer=fastbp.SGD(0.1, schedule=lambda epochs, lr: lr * (1 + epochs)))
    batches = Batches(model, 2)
    model.fit(batches, epochs=1)
    assert_allclose(batches.rates, [0.1, 0.15, 0.2])


def test_single_steps_are_told_the_time(engine):
    X, y = small_data(48)
    schedule = fastbp.LinearWarmup(1, start_factor=0.0)
    model, expected = (small_model(engine, optimizer=fastbp.SGD(0.1, schedule=schedule)) for _ in range(2))
    for step in range(3):
        rows = slice(16 * step, 16 * step + 16)
        model.train_on_batch(X[rows], y[rows], epoch=step / 3)
    expected.fit(X, y, epochs=1, batch_size=16, shuffle=False)
    assert_same_parameters(model, expected, rtol=0)

    by_hand = small_model(engine, optimizer=fastbp.SGD(0.1, schedule=schedule))
    by_hand.loss.forward(by_hand.forward(X), y)
    by_hand.backward(by_hand.loss.backward())
    by_hand.step(epoch=0.5)
    assert by_hand.optimizer.rate[0] == 0.05
    before = parameters_of(model)
    for call in (lambda: model.train_on_batch(X, y), by_hand.step):
        with pytest.raises(ValueError, match=r"epoch must say when this step is, .* for the schedule LinearWarmup"):
            call()
    with pytest.raises(TypeError, match="epoch must be a number, got 'now'"):
        model.train_on_batch(X, y, epoch="now")
    assert_same_parameters(model, before, rtol=0)


@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("pct_start", [0.25, 0.5])
def test_one_cycle_is_torchs_whose_peak_and_end_are_a_step_earlier(strategy, pct_start):
    torch = pytest.importorskip("torch")
    epochs, steps_an_epoch = 12, 5
    n = epochs * steps_an_epoch
    options = {"div_factor": 10.0, "final_div_factor": 100.0, "anneal_strategy": strategy}
    ours = fastbp.SGD(LR, schedule=fastbp.OneCycleLR(2.0, epochs, pct_start, **options))
    # with a step more, and the peak where it would have been, torch's knots are at pct_start * n and n
    theirs = {"total_steps": n + 1, "pct_start": (pct_start * n + 1) / (n + 1)}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2.0, cycle_momentum=False, **theirs, **options | {"anneal_strategy": strategy}
    )
    expected = [schedule.get_last_lr()[0]]
    for _ in range(n):
        optimizer.step()
        schedule.step()
        expected += schedule.get_last_lr()
    assert_allclose(ours.rates(np.arange(n + 1) / steps_an_epoch), expected, rtol=1e-9)
    assert_allclose(ours.rates(np.array([epochs + 3.0])), 2.0 / 10 / 100)


@pytest.mark.parametrize("options", [{}, {"cooldown": 2}, {"min_lr": 0.03}, {"patience": 0, "factor": 0.8}], ids=str)
@pytest.mark.parametrize("threshold_mode", ["rel", "abs"])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateaus_are_torchs(mode, threshold_mode, options, rng):
    torch = pytest.importorskip("torch")
    options = {"factor": 0.5, "patience": 2, "threshold": 0.05} | options
    ours = fastbp.SGD(LR, schedule=fastbp.ReduceLROnPlateau(mode, threshold_mode=threshold_mode, **options))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], LR)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, threshold_mode=threshold_mode, **options)
    trend = np.linspace(2, 1, 60) if mode == "min" else np.linspace(1, 2, 60)
    figures = trend + 0.2 * rng.standard_normal(60)
    figures[7] = np.nan
    reduced = set()
    for epoch, figure in enumerate(figures):
        ours.observe({"val_loss": figure})
        theirs.step(figure)
        (rate,) = ours.rates(np.array([epoch + 1.0]))
        assert_allclose(rate, optimizer.param_groups[0]["lr"], rtol=1e-9, atol=1e-8)
        reduced.add(rate)
    assert len(reduced) > 2


def test_min_lr_raises_no_rate():
    optimizer = fastbp.SGD(0.1, schedule=fastbp.ReduceLROnPlateau(min_lr=0.5))
    assert optimizer.rates(np.zeros(1)) == 0.1


def test_one_schedule_serves_any_batch_size():
    for schedule, _ in SCHEDULES.values():
        optimizer = fastbp.SGD(LR, schedule=schedule)
        assert_allclose(optimizer.rates(times(10))[::5], optimizer.rates(times(2)), rtol=1e-12)


@pytest.mark.parametrize("step", [0.1, 0.3, 0.7])
def test_falls_are_where_fractions_of_an_epoch_say(step):
    at = np.arange(1, 300) * step
    schedule = fastbp.StepLR(step, gamma=0.99)
    assert_allclose(schedule(at, 1.0), 0.99 ** np.arange(1, 300), rtol=1e-12)


def test_without_a_schedule_the_rate_is_constant():
    assert_array_equal(fastbp.Adam(0.2).rates(times(3)), np.full(3 * EPOCHS, 0.2))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda epochs, lr: lr / (1 + epochs), [0.4, 0.2, 0.1]),
        (lambda epochs, lr: 0.3, [0.3, 0.3, 0.3]),
        (np.vectorize(lambda epoch, lr: lr if epoch < 2 else 0.0), [0.4, 0.4, 0.0]),
    ],
)
def test_a_function_is_a_schedule(function, expected):
    optimizer = fastbp.SGD(LR, schedule=function)
    assert_allclose(optimizer.rates(np.array([0.0, 1.0, 3.0])), expected)
    optimizer.observe({"loss": 1.0})
    assert optimizer.monitored() == ()


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda epochs, lr: -epochs, r"schedule must give finite .* at least 0, got -1\.0 at epoch 1\.0"),
        (lambda epochs, lr: epochs * np.nan, r"schedule must give finite .*, got nan at epoch 0\.0"),
        (lambda epochs, lr: np.ones(2), r"schedule must map .* of shape \(3,\) to learning rates of that shape"),
        (lambda epochs, lr: None, "schedule must give finite|schedule must map"),
        (lambda epochs: 0.1, r"schedule must map .*: .*arguments?"),
        (lambda epochs, lr: lr if epochs < 2 else 0.0, r"schedule must map .*np\.vectorize"),
    ],
)
def test_a_bad_function_is_named(function, match):
    with pytest.raises(ValueError, match=match):
        fastbp.SGD(LR, schedule=function).rates(np.array([0.0, 1.0, 3.0]))


def test_lr_is_what_a_schedule_starts_from():
    optimizer = fastbp.SGD(LR, schedule=fastbp.StepLR(1, 0.5))
    optimizer.rate[...] = 0.01  # as steps leave it
    assert optimizer.lr == LR and optimizer.config()["lr"] == LR
    optimizer.lr = 1.0
    assert_array_equal(optimizer.rates(times(1, 3)), [1, 0.5, 0.25])
    optimizer.rate[...] = 0.01
    optimizer.schedule = None
    assert optimizer.rate[0] == 1.0


def plateau(**options):
    return fastbp.ReduceLROnPlateau(patience=0, factor=0.5, **options)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: fastbp.SequentialLR([fastbp.LinearWarmup(1), s], [1])])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), "by progress"])
def test_what_a_plateau_has_seen_survives_a_copy(wrap, copied):
    optimizer = fastbp.SGD(LR, schedule=wrap(plateau(cooldown=1)))
    for loss in (1.0, 2.0):
        optimizer.observe({"val_loss": loss})
    if copied == "by progress":
        other = fastbp.SGD(LR, schedule=wrap(plateau(cooldown=1)))
        other.schedule.resume(json.loads(json.dumps(optimizer.schedule.progress())))
    else:
        other = copied(optimizer)
    expected = [LR / 2, LR / 2, LR / 4]
    for each in (optimizer, other):
        rates = []
        for loss in (2.0, 2.0, 2.0):
            rates += list(each.rates(np.array([5.0])))
            each.observe({"val_loss": loss})
        assert_allclose(rates, expected)
    optimizer.reset()
    assert optimizer.rates(np.array([5.0])) == LR


def test_a_sequence_observes_for_its_schedules():
    schedule = fastbp.SequentialLR([plateau(monitor="loss"), lambda epochs, lr: lr, plateau()], [1, 2])
    optimizer = fastbp.SGD(LR, schedule=schedule)
    assert optimizer.monitored() == ("loss", "val_loss")
    for _ in range(2):
        optimizer.observe({"loss": 1.0, "val_loss": 1.0})
    assert_allclose(optimizer.rates(np.array([0.0, 1.0, 2.0])), [LR / 2, LR, LR / 2])


def test_a_figure_that_is_missing_is_named():
    optimizer = fastbp.SGD(LR, schedule=plateau())
    before = optimizer.schedule.progress()
    with pytest.raises(ValueError, match=r"monitor must name a figure of an epoch \(loss\), got 'val_loss'"):
        optimizer.observe({"loss": 1.0})
    assert optimizer.schedule.progress() == before


@pytest.mark.parametrize(
    "progress",
    [
        {},
        {"best": 1.0, "waited": -1, "cooling": 0, "reductions": 0},
        {"best": "low", "waited": 0, "cooling": 0, "reductions": 0},
    ],
    ids=str,
)
def test_bad_progress_changes_nothing(progress):
    schedule = plateau()
    schedule.observe({"val_loss": 3.0})
    before = schedule.progress()
    with pytest.raises((KeyError, ValueError, TypeError)):
        schedule.resume(progress)
    assert schedule.progress() == before


@pytest.mark.parametrize(
    ("kind", "arguments", "name", "value", "error", "match"),
    [
        (fastbp.StepLR, {"step_size": 3}, "step_size", 0, ValueError, "step_size must be above 0 and finite, got 0"),
        (fastbp.StepLR, {"step_size": 3}, "gamma", -1, ValueError, "gamma must be at least 0 and finite, got -1"),
        (fastbp.CosineAnnealingLR, {"T_max": 3}, "T_max", "3", TypeError, "T_max must be a number, got '3'"),
        (fastbp.CosineAnnealingLR, {"T_max": 3}, "eta_min", -1, ValueError, "eta_min must be at least 0"),
        (fastbp.LinearWarmup, {"epochs": 3}, "epochs", 0, ValueError, "epochs must be above 0"),
        (fastbp.LinearWarmup, {"epochs": 3}, "start_factor", -1, ValueError, "start_factor must be at least 0"),
        (fastbp.OneCycleLR, {"max_lr": 1, "epochs": 3}, "pct_start", 1, ValueError, "pct_start must be .* below 1"),
        (fastbp.OneCycleLR, {"max_lr": 1, "epochs": 3}, "max_lr", np.inf, ValueError, "max_lr must be .*got inf"),
        (
            fastbp.OneCycleLR, {"max_lr": 1, "epochs": 3}, "anneal_strategy", "cubic",
            ValueError, "anneal_strategy must be 'cos' or 'linear', got 'cubic'",
        ),
        (fastbp.OneCycleLR, {"max_lr": 1, "epochs": 3}, "div_factor", 0, ValueError, "div_factor must be above 0"),
        (fastbp.ReduceLROnPlateau, {}, "mode", "least", ValueError, "mode must be 'min' or 'max', got 'least'"),
        (fastbp.ReduceLROnPlateau, {}, "factor", 1, ValueError, "factor must be above 0 and below 1, got 1"),
        (fastbp.ReduceLROnPlateau, {}, "patience", 1.5, TypeError, r"patience must be an integer, got 1\.5"),
        (fastbp.ReduceLROnPlateau, {}, "threshold_mode", None, ValueError, "threshold_mode must be 'rel' or 'abs'"),
        (fastbp.ReduceLROnPlateau, {}, "monitor", 3, TypeError, "monitor must be a name, got 3"),
    ],
)  # fmt: skip
def test_settings_are_checked_when_made_and_when_assigned(kind, arguments, name, value, error, match):
    schedule = kind(**arguments)
    before = repr(schedule)
    with pytest.raises(error, match=match):
        setattr(schedule, name, value)
    assert repr(schedule) == before
    with pytest.raises(error, match=match):
        kind(**arguments | {name: value})


@pytest.mark.parametrize(
    ("schedules", "milestones", "error", "match"),
    [
        ([], [], TypeError, r"schedules must be a sequence of schedules, got \[\]"),
        (fastbp.StepLR(1), [], TypeError, "schedules must be a sequence"),
        ([fastbp.StepLR(1), 0.1], [1], TypeError, r"schedules\[1\] must be a fastbp\.Schedule or .*, got 0\.1"),
        ([fastbp.StepLR(1)], [1], ValueError, r"milestones must hold 0 numbers, got \[1\]"),
        ([fastbp.StepLR(1)] * 2, 1, ValueError, "milestones must hold 1 numbers, got 1"),
        ([fastbp.StepLR(1)] * 2, [0], ValueError, r"milestones\[0\] must be above 0 and finite, got 0"),
        ([fastbp.StepLR(1)] * 3, [2, 2], ValueError, r"milestones must rise, got \[2, 2\]"),
    ],
)
def test_a_bad_sequence_is_named(schedules, milestones, error, match):
    with pytest.raises(error, match=match):
        fastbp.SequentialLR(schedules, milestones)


ALL = [schedule for schedule, _ in SCHEDULES.values()]
ALL += [fastbp.OneCycleLR(1.0, 8, anneal_strategy="linear"), plateau(mode="max", monitor="val_accuracy")]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_repr_makes_the_schedule_again(schedule):
    again = eval(repr(schedule), vars(fastbp))
    assert repr(again) == repr(schedule)
    assert_array_equal(again(times(2), LR), schedule(times(2), LR))
