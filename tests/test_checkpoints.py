"""Training that was stopped goes on to the same bits; the file is whole at any time."""

import subprocess
import sys

import pytest

import fastbp
from fastbp.files import describe, write

from .checks import Bottleneck, small_data, small_model, state_of

pytest.importorskip("safetensors")

X, Y = small_data(50)
HELD_OUT = small_data(20)


def model_with_everything(engine, seed=0):
    return fastbp.Sequential(
        [
            fastbp.Dense(4, 8),
            fastbp.BatchNorm(8),
            fastbp.Residual([fastbp.Dense(8, 8), fastbp.ReLU(), fastbp.Dropout(0.3)]),
            Bottleneck(8, 2),
            fastbp.Dense(8, 3),
        ],
        loss=fastbp.SoftmaxCrossEntropy(label_smoothing=0.1),
        optimizer=fastbp.Adam(0.01, schedule=fastbp.ReduceLROnPlateau(patience=1, monitor="loss")),
        engine=engine,
        seed=seed,
    )


class Halve(fastbp.Callback):
    def epoch(self, model, figures):
        model.optimizer.weight_decay += 0.01


class Stop(fastbp.Callback):
    """Ctrl-C after some epochs."""

    def __init__(self, after):
        self.after = after

    def epoch(self, model, figures):
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


def train(model, path, *, after=99, patience=50, **options):
    options = {"epochs": 9, "batch_size": 16, "validation_data": HELD_OUT, "checkpoint": path} | options
    callbacks = [fastbp.EarlyStopping(patience=patience), Halve(), Stop(after)]
    return model.fit(X, Y, callbacks=callbacks, **options)


@pytest.mark.parametrize(("every", "after"), [(1, 4), (2, 4), (3, 5), (4, 2), (5, 9)])
def test_training_goes_on_to_the_same_bits(engine, every, after, tmp_path):
    whole = train(model_with_everything(engine), None)
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(model_with_everything(engine), path, after=after, every=every)
    done = (after - 1) // every * every  # the epoch in which it was stopped was not written
    assert path.exists() == (done > 0)
    resumed = train(model_with_everything(engine, seed=0 if not done else 7), path, every=every, resume=True)
    assert state_of(resumed) == state_of(whole)
    assert resumed.optimizer.weight_decay == whole.optimizer.weight_decay


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_goes_on_where_the_number_of_batches_is_unknown(engine, accumulate, tmp_path):
    def fit(model, epochs, **options):
        def batches():
            return ((X[start : start + 9], Y[start : start + 9]) for start in range(0, len(X), 9))

        return model.fit(batches, epochs=epochs, accumulate=accumulate, **options)

    def made():
        return small_model(engine, optimizer=fastbp.SGD(0.5, schedule=fastbp.CosineAnnealingLR(4)))

    path = tmp_path / "checkpoint"
    whole, half = fit(made(), 4), fit(made(), 2, checkpoint=path)
    loaded = fastbp.load(path, engine=engine)
    for each in (fit(made(), 4, checkpoint=path, resume=True), fit(half, 2), fit(loaded, 2)):
        assert state_of(each) == state_of(whole)


def test_early_stopping_goes_on_where_it_was(engine, tmp_path):
    whole = train(model_with_everything(engine), None, patience=2, epochs=200)
    epochs = len(whole.history["loss"])
    path = tmp_path / "checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(model_with_everything(engine), path, after=epochs - 1, patience=2, epochs=200)
    resumed = train(model_with_everything(engine), path, patience=2, epochs=200, resume=True)
    assert state_of(resumed) == state_of(whole)
    again = train(model_with_everything(engine), path, patience=2, epochs=200, resume=True)
    assert state_of(again) == state_of(whole)  # it had ended


def test_more_epochs_than_before(engine, tmp_path):
    path = tmp_path / "checkpoint"
    train(model_with_everything(engine), path, epochs=4)
    resumed = train(model_with_everything(engine), path, resume=True)
    assert state_of(resumed) == state_of(train(model_with_everything(engine), None))


def test_a_checkpoint_is_a_model_file(engine, tmp_path):
    path = tmp_path / "checkpoint"
    model = train(model_with_everything(engine), path, patience=50)
    loaded = fastbp.load(path, engine=engine, custom={"Bottleneck": Bottleneck})
    assert loaded.history == model.history


def test_a_checkpoint_of_another_model_changes_nothing(engine, tmp_path):
    path = tmp_path / "checkpoint"
    train(small_model(engine), path, epochs=1)
    other = fastbp.Sequential(
        [fastbp.Dense(4, 3)], loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.SGD(0.1), engine=engine, seed=0
    )
    before = state_of(other)
    with pytest.raises(
        ValueError, match=r"is a checkpoint of another model: it has Dense\(.*8\), this one Dense\(.*3\)"
    ):
        train(other, path, resume=True)
    with pytest.raises(ValueError, match=r"must be a checkpoint of fit with the callbacks \[\]; remove it"):
        other.fit(X, Y, checkpoint=path, resume=True)
    other.save(path)
    with pytest.raises(ValueError, match="must be a checkpoint of fit, but holds a model alone; "):
        train(other, path, resume=True)
    assert state_of(other) == before


class Share(fastbp.MeanSquaredError):
    def __init__(self, share, **options):
        super().__init__(**options)
        self.share = share

    def config(self):
        return super().config() | {"share": self.share}


@pytest.mark.parametrize(
    "kinds",
    [
        [
            lambda: {"layers": [fastbp.Residual([fastbp.Dense(4, 4), fastbp.ReLU()]), fastbp.Dense(4, 1)]},
            lambda: {"layers": [fastbp.Residual([fastbp.Dense(4, 4)]), fastbp.ReLU(), fastbp.Dense(4, 1)]},
        ],
        [
            lambda column=column: {"layers": [fastbp.Embedding(4, column, 4, 1), fastbp.Dense(4, 1)]}
            for column in (0, 1)
        ],
        [lambda share=share: {"layers": [fastbp.Dense(4, 1)], "loss": Share(share)} for share in (0.5, 0.9)],
    ],
    ids=["nesting", "columns", "loss"],
)
def test_a_checkpoint_of_a_model_of_the_same_shapes_changes_nothing(engine, kinds, tmp_path):
    def made(kind):
        parts = {"loss": fastbp.MeanSquaredError(), "optimizer": fastbp.Adam(0.01), "engine": engine, "seed": 0}
        return fastbp.Sequential(**(parts | kind()))

    path, data = tmp_path / "checkpoint", (abs(X).round().clip(0, 3), X[:, :1])
    made(kinds[0]).fit(*data, epochs=1, checkpoint=path)
    other = made(kinds[1])
    before = state_of(other)
    with pytest.raises(ValueError, match=r"is a checkpoint of another model: it has .*, this one"):
        other.fit(*data, epochs=2, checkpoint=path, resume=True)
    assert state_of(other) == before
    assert len(made(kinds[0]).fit(*data, epochs=2, checkpoint=path, resume=True).history["loss"]) == 2


def test_a_checkpoint_of_another_dtype_changes_nothing(engine, tmp_path):
    path = tmp_path / "checkpoint"
    train(small_model(engine, dtype="float32"), path, epochs=1)
    other = small_model(engine, dtype="float64")
    before = state_of(other)
    with pytest.raises(ValueError, match="is a checkpoint of a model in float32, this one computes in float64"):
        train(other, path, resume=True)
    assert state_of(other) == before


def test_a_checkpoint_with_other_callbacks_changes_nothing(engine, tmp_path):
    path = tmp_path / "checkpoint"
    train(small_model(engine), path, epochs=1)
    other = small_model(engine, seed=1)
    before = state_of(other)
    with pytest.raises(ValueError, match=r"with the callbacks \['Halve', 'EarlyStopping', 'Stop'\]"):
        other.fit(X, Y, callbacks=[Halve(), fastbp.EarlyStopping("loss"), Stop(9)], checkpoint=path, resume=True)
    assert state_of(other) == before


@pytest.mark.parametrize("fit", [5, [], {}, {"names": [], "done": "x"}, {"names": [], "done": 1, "over": 0}])
def test_a_checkpoint_that_is_not_complete_changes_nothing(fit, tmp_path):
    path, model = tmp_path / "checkpoint", small_model()
    tensors, about = describe(small_model(seed=1))
    write(path, tensors, about | {"fit": fit})
    before = state_of(model)
    with pytest.raises(
        ValueError,
        match=r"checkpoint must be a checkpoint|checkpoint is not a complete fastbp model|"
        r"checkpoint: invalid literal",
    ):
        model.fit(X, Y, checkpoint=path, resume=True)
    assert state_of(model) == before


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"resume": True}, ValueError, "resume=True needs checkpoint"),
        ({"every": 0, "checkpoint": "x"}, ValueError, "every must be at least 1"),
    ],
)
def test_bad_options(options, error, match):
    with pytest.raises(error, match=match):
        model_with_everything("numpy").fit(X, Y, **options)


def test_what_a_file_cannot_hold_is_said_before_training(tmp_path):
    model = fastbp.Sequential(
        [fastbp.Dense(4, 3)],
        loss=fastbp.SoftmaxCrossEntropy(),
        optimizer=fastbp.SGD(0.1, schedule=lambda epochs, lr: lr),
    )
    with pytest.raises(TypeError, match="a file cannot hold the function"):
        model.fit(X, Y, checkpoint=tmp_path / "checkpoint")
    assert not model.history


KILLED = """
import os, random, signal, sys, time
import fastbp

path, kills = sys.argv[1], int(sys.argv[2])
models = [
    fastbp.Sequential([fastbp.Dense(40, 100), fastbp.Dense(100, 9)], optimizer=fastbp.Adam(), seed=seed)
    for seed in (0, 1)
]
wanted = [[layer.weights.tobytes() for layer in model.layers] for model in models]
models[0].save(path)
random.seed(0)
seen = [0, 0]
for _ in range(kills):
    child = os.fork()
    if not child:
        while True:
            for model in models:
                model.save(path)
    time.sleep(random.uniform(0.001, 0.02))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen[wanted.index([layer.weights.tobytes() for layer in fastbp.load(path).layers])] += 1
print(*seen)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_process_killed_while_it_saves_leaves_a_whole_file(tmp_path):
    kills = 200
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "model"), str(kills)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    old, new = map(int, done.stdout.split())
    assert old + new == kills and old and new
