"""Many steps, threads and processes: the bits stay, and memory does not grow."""

import gc
import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastbp

from .checks import small_data, small_model, state_of

X, Y = small_data(60, np.float32)
SIZES = {"small": (8, 60), "for BLAS": (512, 300)}


def model_of(engine, seed=0, size="small", **options):
    width, _ = SIZES[size]
    layers = [fastbp.Dense(4, width), fastbp.ReLU(), fastbp.Dropout(0.1), fastbp.Dense(width, width), fastbp.Tanh()]
    return fastbp.Sequential(
        [*layers, fastbp.Dense(width, 3)],
        loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(0.01), engine=engine, seed=seed, **options,
    )  # fmt: skip


def data_of(size):
    return small_data(SIZES[size][1], np.float32)


def in_threads(functions):
    """Results of functions that begin at the same time."""
    together = threading.Barrier(len(functions))

    def run(function):
        together.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def test_memory_does_not_grow(engine):
    model = small_model(engine, dropout=0.1, dtype=np.float32)

    def work(times):
        for _ in range(times):
            model.train_on_batch(X, Y)
            model.predict(X)
            model.evaluate(X, Y)
            model.forward(X[:7])
        model.fit(X, Y, epochs=5 * times, batch_size=10)
        model.history.clear()
        gc.collect()

    work(20)
    tracemalloc.start()
    work(20)
    before = tracemalloc.get_traced_memory()[0]
    work(60)
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 100_000  # of 1800 steps and 240 other calls; an array kept of each would be more


@pytest.mark.parametrize("size", SIZES)
def test_models_train_in_threads_to_the_bits_of_each_alone(engine, size):
    data = data_of(size)
    alone = [state_of(model_of(engine, seed, size).fit(*data, epochs=3)) for seed in range(8)]
    models = [model_of(engine, seed, size) for seed in range(8)]
    together = in_threads([lambda model=model: state_of(model.fit(*data, epochs=3)) for model in models])
    assert together == alone


@pytest.mark.parametrize("size", SIZES)
def test_one_model_predicts_in_many_threads(engine, size):
    X, y = data_of(size)
    model = model_of(engine, size=size).fit(X, y, epochs=1)
    expected = [model.predict_proba(X[: 10 + rows]) for rows in range(8)]
    uses = [lambda rows=rows: [model.predict_proba(X[: 10 + rows]) for _ in range(20)] for rows in range(8)]
    for found, right in zip(in_threads(uses), expected, strict=True):
        for each in found:
            np.testing.assert_array_equal(each, right)


def test_one_seed_gives_one_run_whatever_the_process(installed_engine):
    code = f"""
import hashlib, fastbp, numpy as np
X, y = fastbp.spiral_data(100, 3, noise=0.1, seed=0)
layers = [fastbp.Dense(2, 64), fastbp.ReLU(), fastbp.Dropout(0.1), fastbp.Dense(64, 64), fastbp.GELU()]
model = fastbp.Sequential(
    [*layers, fastbp.Dense(64, 3)],
    loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(0.01), engine={installed_engine.name!r}, seed=0,
)
model.fit(X, y, epochs=3)
print(hashlib.sha256(model.memory.parameters.tobytes()).hexdigest())
"""
    answers = set()
    for threads, seed in (("1", "0"), ("2", "1"), ("8", "2")):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        answers.add(done.stdout)
    assert len(answers) == 1


@pytest.mark.parametrize("size", SIZES)
def test_one_seed_gives_one_run_on_as_many_threads(engine, size):
    pytest.importorskip("threadpoolctl")
    data = data_of(size)
    for threads in (1, 2):
        runs = [state_of(model_of(engine, size=size, threads=threads).fit(*data, epochs=2)) for _ in range(3)]
        assert runs[0] == runs[1] == runs[2]
    if size == "small":
        assert runs[0] == state_of(model_of(engine, threads=1).fit(*data, epochs=2))


def digest(model):
    return hashlib.sha256(model.memory.parameters.tobytes()).hexdigest()


def test_loky_workers(installed_engine):
    joblib = pytest.importorskip("joblib")
    models = [model_of(installed_engine, seed) for seed in range(4)]
    fit = joblib.delayed(fastbp.Sequential.fit)
    with joblib.parallel_config("loky"):
        trained = joblib.Parallel(n_jobs=2)(fit(model, X, Y) for model in models)
    assert [digest(model) for model in trained] == [digest(model.fit(X, Y)) for model in models]


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # from JAX, where another test has imported it
def test_workers_of_multiprocessing(installed_engine, method):
    if method == "fork" and installed_engine.device == "cuda":
        pytest.skip("CUDA cannot be used in a process forked from one that has used it")
    models = [model_of(installed_engine, seed) for seed in range(4)]
    models[0].fit(X, Y)  # so that whatever is loaded late has been used here
    with multiprocessing.get_context(method).Pool(2) as pool:
        trained = pool.starmap(fastbp.Sequential.fit, [(model, X, Y) for model in models])
    assert [digest(model) for model in trained] == [digest(model.fit(X, Y)) for model in models]


FORKED = """
import hashlib, os, sys
import numpy as np
import fastbp

used, engine = sys.argv[1] == "used", sys.argv[2]
X, y = fastbp.spiral_data(200, 3, seed=0)

def run(width):
    layers = [fastbp.Dense(2, width), fastbp.ReLU(), fastbp.Dense(width, width), fastbp.Tanh(), fastbp.Dense(width, 3)]
    model = fastbp.Sequential(layers, loss=fastbp.SoftmaxCrossEntropy(), optimizer=fastbp.Adam(), engine=engine, seed=0)
    model.fit(X, y, epochs=2, batch_size=100)
    return hashlib.sha256(model.memory.parameters.tobytes()).hexdigest()

fastbp.engine(engine)
before = [run(8), run(700)] if used else None
for _ in range(3):
    child = os.fork()
    if not child:
        found = [run(8), run(700)]
        os._exit(0 if before in (None, found) else 3)
    assert os.waitpid(child, 0)[1] == 0
    before = before or [run(8), run(700)]
print("as before")
"""


FORKED_WHILE_TRAINING = """
import os, sys, threading, time
import fastbp
from fastbp.kernels.threads import blas_libraries

X, y = fastbp.spiral_data(300, 3, seed=0)


def fitted():
    layers = [fastbp.Dense(2, 16), fastbp.ReLU(), fastbp.Dense(16, 3)]
    loss, optimizer = fastbp.SoftmaxCrossEntropy(), fastbp.Adam()
    model = fastbp.Sequential(layers, loss=loss, optimizer=optimizer, engine=sys.argv[1], seed=0, threads=1)
    return model.fit(X, y)


model = fitted()
libraries = blas_libraries()
before = [library.get_num_threads() for library in libraries]
threading.Thread(target=model.fit, args=(X, y), kwargs={"epochs": 10**9}, daemon=True).start()
for _ in range(20):
    time.sleep(0.02)
    child = os.fork()
    if not child:
        model.predict(X)
        fitted()
        os._exit(0 if [library.get_num_threads() for library in libraries] == before else 3)
    end = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.001)
    if ended == (0, 0):
        os.kill(child, 9)
    assert ended == (child, 0), ended
print("each went its way", flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_has_blas_and_locks_for_itself(cpu_engine):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED_WHILE_TRAINING, cpu_engine.name], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "each went its way\n", done.stderr


FORKED_WHILE_NUMBA_COMPILES = """
import os, signal, threading, time
import fastbp
from numba.core.compiler_lock import global_compiler_lock

fastbp.engine("numba")
compiles = threading.Event()


def compile_for_a_while():
    with global_compiler_lock:
        compiles.set()
        time.sleep(0.3)


threading.Thread(target=compile_for_a_while).start()
compiles.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    with global_compiler_lock:
        os._exit(0)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_compiles_for_itself():
    pytest.importorskip("numba")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED_WHILE_NUMBA_COMPILES], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "0\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("when", ["imported", "used"])
def test_fork(cpu_engine, when):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, when, cpu_engine.name], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "as before\n", done.stderr
