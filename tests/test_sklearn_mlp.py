"""scikit-learn's own tests of its perceptrons, from the installed package, with these in their place."""

import importlib.util

import pytest
import sklearn.neural_network

from fastbp import estimators

pytestmark = pytest.mark.filterwarnings("default", "ignore::sklearn.exceptions.ConvergenceWarning")
PRIVATE = "test_fit", "test_gradient"  # which reach into methods that only scikit-learn's own have


@pytest.fixture
def global_random_seed():
    return 42


def their_tests():
    theirs = importlib.util.find_spec("sklearn.neural_network.tests.test_mlp")
    if theirs is None or theirs.loader is None:
        pytest.skip("this scikit-learn came without its tests", allow_module_level=True)
    module = importlib.util.module_from_spec(theirs)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLPClassifier", "MLPRegressor"):
            patch.setattr(sklearn.neural_network, name, getattr(estimators, name))
        theirs.loader.exec_module(module)
    return {name: test for name, test in vars(module).items() if name.startswith("test_") and name not in PRIVATE}


globals().update(their_tests())
