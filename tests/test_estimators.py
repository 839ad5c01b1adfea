"""The estimators: scikit-learn's checks, its own results, and what goes beyond it."""

import copy
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest
import sklearn
import sklearn.neural_network as theirs
from scipy.sparse import csr_array
from sklearn.base import clone
from sklearn.datasets import load_iris, make_multilabel_classification, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import fastbp
from fastbp import estimators
from fastbp.estimators import MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_iris(return_X_y=True)
LABELLED = make_multilabel_classification(120, 6, random_state=0)
X = StandardScaler().fit_transform(X)
NUMBERS = X[:, :3] @ [1, -2, 0.5] + np.sin(X[:, 3])
WEIGHTS = np.random.default_rng(0).uniform(0.1, 3, len(X))
BOTH = pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])


def target(kind):
    return Y if kind is MLPClassifier else NUMBERS


@parametrize_with_checks([MLPClassifier(max_iter=100), MLPRegressor(max_iter=100)])
@pytest.mark.filterwarnings("default")
def test_scikit_learns_checks(estimator, check):
    check(estimator)


PROBLEMS = {
    "three classes": ("MLPClassifier", X, Y, {}),
    "two classes": ("MLPClassifier", X, np.where(Y == 1, 7, 3), {}),
    "several labels": ("MLPClassifier", LABELLED[0] / 10, LABELLED[1], {}),
    "numbers": ("MLPRegressor", X, NUMBERS, {}),
    "rows of numbers": ("MLPRegressor", X, np.stack([NUMBERS, X[:, 1], X[:, 2] ** 2], 1), {}),
    "counts": ("MLPRegressor", X, np.stack([Y, 2 * Y], 1), {"loss": "poisson"}),
}
SETTINGS = {
    "adam": {},
    "sgd": {"solver": "sgd", "learning_rate_init": 0.05},
    "momentum 1": {"solver": "sgd", "momentum": 1.0, "nesterovs_momentum": False, "learning_rate_init": 1e-4},
    "no momentum": {"solver": "sgd", "momentum": 0.0, "batch_size": 7},
    "invscaling": {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.1},
    "adaptive": {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 2, "max_iter": 30},
    "invscaling adam": {"learning_rate": "invscaling"},
    "adaptive adam": {"learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 2, "max_iter": 30},
    "lbfgs": {"solver": "lbfgs"},
    "alpha": {"alpha": 3.0, "hidden_layer_sizes": (9, 5)},
    "unshuffled": {"shuffle": False, "batch_size": 40},
    "early stopping": {"early_stopping": True, "n_iter_no_change": 2, "max_iter": 40, "learning_rate_init": 0.02},
    "tanh": {"activation": "tanh", "epsilon": 1e-3},
    "logistic": {"activation": "logistic"},
    "identity": {"activation": "identity"},
}


@pytest.mark.filterwarnings("ignore:.*weight.*:FutureWarning")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_one_seed_gives_scikit_learns_results(engine, problem, setting, weighted):
    name, data, y, options = PROBLEMS[problem]
    options = {"hidden_layer_sizes": 8, "max_iter": 6, "random_state": 3} | options | SETTINGS[setting]
    weights = WEIGHTS[: len(data)] if weighted else None
    expected = getattr(theirs, name)(**options).fit(data, y, weights)
    found = getattr(estimators, name)(**options, engine=engine).fit(data, y, weights)
    for a, b in zip([*expected.coefs_, *expected.intercepts_], [*found.coefs_, *found.intercepts_], strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-8)
    assert found.loss_ == pytest.approx(expected.loss_, rel=1e-6)
    for book in ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_"):
        assert getattr(found, book) == getattr(expected, book)
    if options.get("solver") != "lbfgs":
        assert found.loss_curve_ == pytest.approx(expected.loss_curve_, rel=1e-6)
        assert found.validation_scores_ == pytest.approx(expected.validation_scores_)
        assert found._optimizer.learning_rate == pytest.approx(
            expected._optimizer.learning_rate if found.solver == "sgd" else found.learning_rate_init
        )
    if name == "MLPClassifier":
        np.testing.assert_array_equal(found.predict(data), expected.predict(data))
        np.testing.assert_allclose(found.predict_proba(data), expected.predict_proba(data), rtol=1e-6, atol=1e-9)
    else:
        np.testing.assert_allclose(found.predict(data), expected.predict(data), rtol=1e-6, atol=1e-7)
    assert found.score(data, y) == pytest.approx(expected.score(data, y), abs=1e-9)


@BOTH
def test_partial_fit_gives_scikit_learns_results(engine, kind):
    expected, found = getattr(theirs, kind.__name__)(random_state=1), kind(random_state=1, engine=engine)
    options = {"classes": [0, 1, 2]} if kind is MLPClassifier else {}
    for rows in (slice(0, 150, 4), slice(1, 150, 4), slice(2, 150, 5)):
        for model in (expected, found):
            model.partial_fit(X[rows], target(kind)[rows], **options)
    np.testing.assert_allclose(found.loss_curve_, expected.loss_curve_)
    np.testing.assert_allclose(found.coefs_[0], expected.coefs_[0])


@BOTH
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_sparse_rows_train_as_dense_ones(kind, solver):
    options = {"max_iter": 3, "random_state": 0, "batch_size": 32, "solver": solver}
    dense = kind(**options).fit(X, target(kind), WEIGHTS)
    sparse = kind(**options).fit(csr_array(X), target(kind), WEIGHTS)
    np.testing.assert_allclose(sparse.coefs_[0], dense.coefs_[0])
    np.testing.assert_allclose(sparse.predict(csr_array(X)), dense.predict(X))


@BOTH
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_goes_on_as_the_original_would(kind, copied):
    model = kind(random_state=0, max_iter=3).fit(X, target(kind))
    model.coefs_[1] = model.coefs_[1] * 2
    other = copied(model)
    np.testing.assert_array_equal(other.coefs_[1], model.coefs_[1])
    before = model.coefs_[0].copy()
    other.partial_fit(X, target(kind))
    if copied is not copy.copy:
        np.testing.assert_array_equal(model.coefs_[0], before)
    model = model if copied is not copy.copy else copy.deepcopy(other)
    if copied is not copy.copy:
        model.partial_fit(X, target(kind))
    np.testing.assert_array_equal(other.coefs_[0], model.coefs_[0])
    np.testing.assert_array_equal(other.predict(X), model.predict(X))


@BOTH
def test_weights_that_are_assigned_are_used(kind):
    model, other = (kind(random_state=seed, max_iter=3).fit(X, target(kind)) for seed in (0, 1))
    model.coefs_ = [weights.copy() for weights in other.coefs_]
    for i, biases in enumerate(other.intercepts_):
        model.intercepts_[i] = biases.tolist()
    np.testing.assert_array_equal(model.predict(X), other.predict(X))
    model.coefs_[0][:] = 0
    assert len(np.unique(model.predict(X))) == 1


@BOTH
@pytest.mark.parametrize("precision", [None, "float32", "float64"])
def test_computes_in_the_dtype_of_x_or_as_told(kind, precision, dtype):
    model = kind(max_iter=2, precision=precision).fit(X.astype(dtype), target(kind))
    assert {a.dtype for a in (*model.coefs_, *model.intercepts_)} == {np.dtype(precision or dtype)}


def test_the_engine_in_force_is_used_else_the_fastest(engine):
    assert MLPClassifier(engine=engine.name, max_iter=1).fit(X, Y).engine_ == engine.name
    with fastbp.use(engine):
        assert MLPClassifier(max_iter=1).fit(X, Y).engine_ == engine.name
    numba = any(info.name == "numba" and info.available for info in fastbp.engines())
    assert MLPClassifier(max_iter=1).fit(X, Y).engine_ == ("numba" if numba else "numpy")


def test_class_weights_are_weights_of_rows():
    uneven = slice(30, 150)
    options = {"max_iter": 4, "random_state": 0}
    for class_weight in ("balanced", {0: 2.0, 1: 0.8, 2: 0.8}):
        model = MLPClassifier(class_weight=class_weight, **options).fit(X[uneven], Y[uneven], WEIGHTS[uneven])
        by_class = np.array([2.0, 0.8, 0.8])[Y[uneven]]
        other = MLPClassifier(**options).fit(X[uneven], Y[uneven], WEIGHTS[uneven] * by_class)
        np.testing.assert_allclose(model.coefs_[0], other.coefs_[0])


@pytest.mark.parametrize(
    ("kind", "arguments", "match"),
    [
        (MLPClassifier, {"X": np.ma.masked_array(X, X > 1)}, "X is a masked array"),
        (MLPRegressor, {"y": np.ma.masked_array(Y, Y > 1)}, "y is a masked array"),
        (MLPRegressor, {"sample_weight": np.ma.masked_array(Y + 1, Y > 1)}, "sample_weight is a masked array"),
        (MLPRegressor, {"y": Y.astype(str)}, "y must hold real numbers, got dtype <U"),
        (MLPClassifier, {"class_weight": {0: np.nan}}, "class_weight must hold finite"),
        (MLPClassifier, {"class_weight": {1: -1}}, r"class_weight must hold numbers of at least 0, got -1\.0"),
    ],
)
def test_what_scikit_learn_would_take_is_refused(kind, arguments, match):
    options = {"class_weight": arguments.pop("class_weight")} if "class_weight" in arguments else {}
    with pytest.raises(ValueError, match=match):
        kind(max_iter=1, **options).fit(**({"X": X, "y": Y} | arguments))


def test_masked_rows_and_wrong_indices_get_no_prediction():
    fitted = MLPClassifier(max_iter=200).fit(X, Y)
    with pytest.raises(ValueError, match="X is a masked array"):
        fitted.predict(np.ma.masked_array(X, X > 1))
    table = csr_array(X)
    table.indices[0] = 10**6
    for use in (fitted.predict, lambda table: fitted.fit(table, Y)):
        with pytest.raises(ValueError, match="X is a sparse matrix of a wrong format: "):
            use(table)


@pytest.mark.parametrize("classes", [2, 3])
def test_smoothed_labels_keep_predictions_from_certainty(classes):
    rows = classes > Y
    options = {"random_state": 0, "solver": "lbfgs", "alpha": 0.0, "max_iter": 300, "tol": 1e-8}
    model = MLPClassifier(label_smoothing=0.3, **options).fit(X[rows], Y[rows])
    highest = model.predict_proba(X[rows]).max(axis=1)
    np.testing.assert_allclose(np.median(highest), 0.7 + 0.3 / classes, atol=0.01)  # where the loss is least


@pytest.mark.parametrize("option", [{"activation": name} for name in ("gelu", "silu", "elu", "leaky_relu")] + [
    {"solver": "adamw", "alpha": 0.1}, {"dropout": 0.2}, {"clip_norm": 0.5}])  # fmt: skip
@BOTH
def test_what_scikit_learn_does_not_have_trains_and_repeats(kind, option):
    options = {"random_state": 0, "max_iter": 60, "learning_rate_init": 0.01} | option
    model = kind(**options).fit(X, target(kind))
    assert model.score(X, target(kind)) > 0.9
    np.testing.assert_array_equal(kind(**options).fit(X, target(kind)).coefs_[0], model.coefs_[0])


def test_clipped_gradients_make_steps_no_longer_than_the_rate():
    options = {"solver": "sgd", "momentum": 0.0, "learning_rate_init": 1.0, "random_state": 0, "batch_size": 150}
    model = MLPRegressor(clip_norm=1e-3, max_iter=1, **options).fit(X, 100 * NUMBERS)
    start = MLPRegressor(**options | {"learning_rate_init": 1e-30}, max_iter=1).fit(X, 100 * NUMBERS)
    moved = [a - b for a, b in zip(model.coefs_ + model.intercepts_, start.coefs_ + start.intercepts_, strict=True)]
    assert np.sqrt(sum((step**2).sum() for step in moved)) == pytest.approx(1e-3, rel=1e-2)


@BOTH
def test_early_stopping_on_given_data_and_any_scorer(kind):
    y = target(kind)
    scoring = "neg_log_loss" if kind is MLPClassifier else "neg_mean_absolute_error"
    model = kind(early_stopping=True, scoring=scoring, random_state=0, max_iter=30, learning_rate_init=0.01)
    model.fit(X[::2], y[::2], validation_data=(X[1::2], y[1::2]))
    assert len(model.validation_scores_) == model.n_iter_
    scorer = sklearn.metrics.get_scorer(scoring)
    assert scorer(model, X[1::2], y[1::2]) == pytest.approx(max(model.validation_scores_))  # of the best epoch
    assert model.t_ == model.n_iter_ * 75


def test_scorers_see_no_warning_of_missing_column_names():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcd"))
    model = MLPClassifier(early_stopping=True, scoring="accuracy", max_iter=2).fit(frame, Y)
    assert list(model.feature_names_in_) == list("abcd")


def test_callbacks_are_told_and_may_end_training():
    seen = []

    def watch(model, figures):
        seen.append(figures)
        model.optimizer.lr *= 0.5
        return len(seen) == 3

    model = MLPClassifier(callbacks=[watch], early_stopping=True, random_state=0).fit(X, Y)
    assert [list(figures) for figures in seen] == [["loss", "val_score"]] * 3
    assert [figures["loss"] for figures in seen] == model.loss_curve_
    assert model._optimizer.learning_rate == 0.001 / 8


def test_a_progress_bar(capsys):
    pytest.importorskip("tqdm")
    MLPClassifier(progress=True, max_iter=3).fit(X, Y)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [{"threads": 1}, {"engine": "numpy"}, {"activation": "tanh"}, {"dropout": 0.1}, {"label_smoothing": 0.1}],
    ids=str,
)
def test_the_optimizer_goes_on_where_a_parameter_is_another_one(change):
    first, second = np.arange(0, 100), np.arange(50, 150)
    model = MLPClassifier((7,), random_state=0)
    model.partial_fit(X[first], Y[first], classes=[0, 1, 2]).set_params(**change).partial_fit(X[second], Y[second])
    assert model._model.optimizer.steps == 2
    if change.keys() & {"dropout", "label_smoothing"}:
        return
    known = {name: value for name, value in change.items() if name == "activation"}
    reference = theirs.MLPClassifier((7,), random_state=0).partial_fit(X[first], Y[first], classes=[0, 1, 2])
    reference.set_params(**known).partial_fit(X[second], Y[second])
    np.testing.assert_allclose(model.predict_proba(X), reference.predict_proba(X), rtol=1e-9)


def test_a_warm_start_may_carry_the_optimizer():
    options = {"random_state": np.random.RandomState(0), "shuffle": False}
    whole = MLPClassifier(max_iter=6, **options).fit(X, Y)
    options["random_state"] = np.random.RandomState(0)
    parts = MLPClassifier(max_iter=3, warm_start="optimizer", **options).fit(X, Y).fit(X, Y)
    np.testing.assert_array_equal(parts.coefs_[0], whole.coefs_[0])
    options["random_state"] = np.random.RandomState(0)
    other = MLPClassifier(max_iter=3, warm_start=True, **options).fit(X, Y).fit(X, Y)
    assert not np.array_equal(other.coefs_[0], whole.coefs_[0])


@pytest.mark.parametrize("how", ["fit", "partial_fit"])
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"solver": "lbfgs"}, {"solver": "adam"}),
        ({"early_stopping": True}, {"early_stopping": False}),
        ({}, {"early_stopping": True}),
        ({"solver": "lbfgs"}, {"solver": "sgd", "early_stopping": True}),
    ],
)
def test_a_warm_start_by_another_solver_or_stopping_rule_begins_its_books(options, changes, how):
    model = MLPClassifier(max_iter=3, random_state=0, warm_start=True, **options).fit(X, Y)
    before = getattr(model, "loss_curve_", [])[:]
    model.set_params(**changes)
    if model.early_stopping and how == "partial_fit":
        pytest.skip("partial_fit stops by no score")
    start = model.score(X, Y)
    getattr(model, how)(X, Y)
    new = model.loss_curve_[len(before) :]
    assert model.loss_curve_[: len(before)] == before and len(new) == model.n_iter_
    if model.early_stopping:
        assert (model.best_loss_, model.best_validation_score_) == (None, max(model.validation_scores_))
    else:
        assert (model.best_loss_, model.best_validation_score_) == (min(new), None)
    assert model.score(X, Y) > start - 0.1  # it goes on from the weights


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_frames_pipelines_and_searches(library):
    frames = pytest.importorskip(library)
    frame = frames.DataFrame({name: X[:, i] for i, name in enumerate("abcd")})
    search = GridSearchCV(
        make_pipeline(StandardScaler(), MLPClassifier(max_iter=30, random_state=0, learning_rate_init=0.02)),
        {"mlpclassifier__alpha": [1e-4, 100.0]},
        cv=3,
    ).fit(frame, Y)
    assert search.best_params_ == {"mlpclassifier__alpha": 1e-4}
    assert search.score(frame, Y) > 0.9


def threads_in_use(model, X, y):
    from threadpoolctl import threadpool_info

    return -float(max(pool["num_threads"] for pool in threadpool_info()))


def test_workers_side_by_side_share_the_cores():
    joblib = pytest.importorskip("joblib")
    model = MLPClassifier(max_iter=2)
    with joblib.parallel_config("loky", n_jobs=2):
        scores = cross_validate(model, X, Y, cv=2, scoring=threads_in_use, error_score="raise")
    assert -scores["test_score"].min() <= max(1, joblib.cpu_count() // 2)


def test_sample_weights_are_routed_by_request():
    with sklearn.config_context(enable_metadata_routing=True):
        model = MLPClassifier(max_iter=3, random_state=0).set_fit_request(sample_weight=True)
        scaler = StandardScaler().set_fit_request(sample_weight=False)
        pipe = make_pipeline(scaler, model).fit(X, Y, sample_weight=WEIGHTS)
    alone = clone(model).fit(StandardScaler().fit_transform(X), Y, WEIGHTS)
    np.testing.assert_array_equal(pipe[-1].coefs_[0], alone.coefs_[0])


@BOTH
def test_what_is_not_converged_warns(kind):
    with pytest.warns(ConvergenceWarning, match="Maximum iterations \\(2\\)"):
        kind(max_iter=2).fit(X, target(kind))
    with pytest.warns(ConvergenceWarning, match="lbfgs failed to converge after 1 iteration"):
        kind(max_iter=1, solver="lbfgs").fit(X, target(kind))


def test_ctrl_c_leaves_a_usable_model():
    def interrupt(model, figures):
        raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        model = MLPClassifier(callbacks=[interrupt]).fit(X, Y)
    assert model.n_iter_ == 1 and model.predict(X).shape == (150,)


def test_weights_that_overflow_raise():
    with pytest.raises(ValueError, match="non-finite parameter weights"):
        MLPRegressor(solver="sgd", learning_rate_init=1e30).fit(X, NUMBERS)


@pytest.mark.parametrize(
    "options, fits, message",
    [
        ({"hidden_layer_sizes": (3, -1)}, {}, r"hidden_layer_sizes must be > 0, got \[3, -1\]"),
        ({"activation": "sine"}, {}, "activation must be 'identity' or .*, got 'sine'"),
        ({"solver": "newton"}, {}, "solver must be 'lbfgs' or .*, got 'newton'"),
        ({"alpha": -1}, {}, "alpha must be at least 0 .*, got -1"),
        ({"batch_size": 0}, {}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": "falling"}, {}, "learning_rate must be .*, got 'falling'"),
        ({"learning_rate_init": 0}, {}, "learning_rate_init must be above 0 .*, got 0"),
        ({"max_iter": 1.5}, {}, "max_iter must be an integer, got 1.5"),
        ({"shuffle": "yes"}, {}, "shuffle must be True or False, got 'yes'"),
        ({"momentum": 1.1}, {}, "momentum must be at least 0 and at most 1, got 1.1"),
        ({"n_iter_no_change": 0}, {}, "n_iter_no_change must be at least 1, got 0"),
        ({"dropout": 1}, {}, "dropout must be at least 0 and below 1, got 1"),
        ({"dropout": 0.5, "solver": "lbfgs"}, {}, "dropout, clip_norm and callbacks need another solver"),
        ({"callbacks": [fastbp.EarlyStopping]}, {}, "callbacks must hold fastbp Callbacks or functions, got <class"),
        ({"clip_norm": 0}, {}, "clip_norm must be above 0 .*, got 0"),
        ({"precision": "float16"}, {}, "precision must be float32 or float64, got float16"),
        ({"warm_start": "all"}, {}, "warm_start must be True or False, got 'all'"),
        ({"engine": "abacus"}, {}, "engine must be one of .*, got 'abacus'"),
        ({}, {"validation_data": (X, Y)}, "validation_data needs early_stopping=True"),
        ({"early_stopping": True}, {"validation_data": X}, r"validation_data must be \(X, y\)"),
        (
            {"early_stopping": True},
            {"validation_data": (X[:, :2], Y)},
            "^validation_data: X has 2 features, but .* expecting 4",
        ),
        ({"early_stopping": True}, {"validation_data": (X, np.stack([Y, Y], 1))}, "^validation_data: y must "),
        ({"scoring": "nope"}, {}, "'scoring' parameter .*Got 'nope'"),
        ({"scoring": sklearn.metrics.accuracy_score}, {}, "scoring value .* a metric"),
        ({"scoring": ["accuracy", "r2"]}, {}, r"scoring must be a name or a function .*, got \['accuracy', 'r2'\]"),
    ],
)
@BOTH
def test_what_cannot_be_is_refused(kind, options, fits, message):
    model = kind(max_iter=1, random_state=0).fit(X, target(kind))
    before = model.predict(X)
    with pytest.raises(ValueError, match=message):
        model.set_params(**options).fit(X, target(kind), **fits)
    np.testing.assert_array_equal(model.set_params(activation="relu", engine=None, dropout=0).predict(X), before)


@pytest.mark.parametrize(
    ("labels", "options", "fits", "message"),
    [
        ("abc", {}, {"validation_data": (X[:, :2], Y)}, "validation_data: X has 2 features"),
        ("abc", {}, {"validation_data": (X, Y)}, "validation_data: y must hold labels such as 'a', got 0"),
        ("abc", {"validation_fraction": 0.001}, {}, "validation set is too small"),
        ((0, 1, 2), {"validation_fraction": 0.001, "warm_start": True}, {}, "validation set is too small"),
    ],
)
def test_a_fit_that_is_refused_changes_nothing(labels, options, fits, message):
    model = MLPClassifier(early_stopping=True, max_iter=2, random_state=0).fit(X, Y)
    other = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        model.set_params(**options).fit(X, np.array(list(labels))[Y], **fits)
    assert model.classes_.tolist() == [0, 1, 2]
    for each in (model, other):
        each.set_params(warm_start="optimizer", validation_fraction=0.1).fit(X, Y)
    np.testing.assert_array_equal(model.predict_proba(X), other.predict_proba(X))
    new = MLPClassifier()
    with pytest.raises(ValueError, match="classes not in"):
        new.partial_fit(X, Y, classes=[0, 1])
    assert new.partial_fit(X, Y, classes=[0, 1, 2]).n_outputs_ == 3


@pytest.mark.parametrize(
    "fit, message",
    [
        (lambda: MLPClassifier().fit(X, NUMBERS), "Unknown label type: continuous"),
        (lambda: MLPClassifier().fit(X, np.stack([Y, Y], 1)), "Unknown label type: multiclass-multioutput"),
        (lambda: MLPClassifier().partial_fit(X, Y), "classes must be passed on the first call"),
        (lambda: MLPClassifier().partial_fit(X, Y, classes=[0, 1]), "classes not in `self.classes_`"),
        (
            lambda: MLPClassifier(class_weight="balanced").partial_fit(X, Y, classes=[0, 1, 2]),
            "class_weight='balanced' needs all rows",
        ),
        (lambda: MLPRegressor(loss="poisson").fit(X, NUMBERS), "y must be at least 0 with loss='poisson', got -"),
        (lambda: MLPClassifier(max_iter=1).fit(X, Y).set_params(hidden_layer_sizes=3).partial_fit(X, Y), "must stay"),
        (lambda: MLPClassifier(max_iter=1).fit(X, Y).predict(X * np.nan), "contains NaN"),
        (lambda: MLPClassifier(max_iter=1).fit(X, Y).predict(X[:, :1]), "X has 1 features"),
        (lambda: MLPRegressor().predict(X), "not fitted yet"),
    ],
)
def test_data_that_does_not_fit_is_refused(fit, message):
    with pytest.raises(ValueError, match=message):
        fit()


def test_lbfgs_has_no_partial_fit():
    for kind in (MLPClassifier, MLPRegressor):
        assert not hasattr(kind(solver="lbfgs"), "partial_fit")


def test_fastbp_alone_does_not_import_scikit_learn():
    code = "import sys, fastbp; fastbp.Sequential; assert not {'sklearn', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_outputs_have_the_gradient_of_their_sum():
    """As scikit-learn has it: the printed loss is the mean over outputs, its gradient that of the sum."""
    data, numbers = make_regression(40, 3, n_targets=4, random_state=0)
    model = MLPRegressor(
        hidden_layer_sizes=(), activation="identity", solver="sgd", momentum=0.0, alpha=0.0, batch_size=40, max_iter=1,
        learning_rate_init=0.1, random_state=0,
    )  # fmt: skip
    start = MLPRegressor(**model.get_params() | {"learning_rate_init": 1e-300}).fit(data, numbers)
    error = data @ start.coefs_[0] + start.intercepts_[0] - numbers
    model.fit(data, numbers)
    np.testing.assert_allclose(model.coefs_[0], start.coefs_[0] - 0.1 * data.T @ error / 40)
    assert model.loss_ == pytest.approx((error**2).mean() / 2)


def test_others_predict_while_partial_fit_is_refused():
    X, y = np.random.default_rng(0).standard_normal((50, 4)), np.arange(50) % 3
    model, bad = MLPClassifier((5,), random_state=0).partial_fit(X, y, classes=[0, 1, 2]), X.copy()
    bad[0, 0] = np.nan
    expected, failed, done = model.predict(X), [], threading.Event()

    def predict():
        while not done.is_set():
            try:
                np.testing.assert_array_equal(model.predict(X), expected)
            except BaseException as error:
                failed.append(error)

    before, thread = sys.getswitchinterval(), threading.Thread(target=predict)
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(300):
            with pytest.raises(ValueError, match="NaN"):
                model.partial_fit(bad, y)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not failed


def test_a_loss_that_overflows_is_said():
    X, _ = make_regression(50, 3, random_state=0)
    with pytest.warns(ConvergenceWarning, match="The loss became inf, which ended training"):
        MLPRegressor(solver="sgd", random_state=0).fit(X, X[:, 0] * 1e160)


def test_large_numbers_are_predicted_without_a_warning():
    X, y = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32), np.arange(20) % 2
    model = MLPClassifier((5,), max_iter=1, random_state=0)
    with pytest.warns(ConvergenceWarning):
        model.fit(X, y)
    assert len(model.predict(np.full((20, 4), 3e37, np.float32))) == 20
