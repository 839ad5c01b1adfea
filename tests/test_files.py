"""Model files."""

import copy
import json
import os
import stat
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fastbp
from fastbp.boundary import as_number
from fastbp.files import checksum, read_metadata
from fastbp.part import Setting

from .checks import Bottleneck, assert_same_parameters, parameters_of, small_data, small_model, state_of
from .conftest import ENGINES

pytest.importorskip("safetensors")
X, Y = small_data()

OPTIMIZERS = {
    "sgd": lambda: fastbp.SGD(0.1),
    "nesterov": lambda: fastbp.SGD(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: fastbp.Adam(0.01, betas=(0.8, 0.99), eps=1e-6),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("trained", [True, False])
def test_a_loaded_model_goes_on_bit_for_bit(engine, dtype, optimizer, trained, path):
    model = small_model(engine, dropout=0.3, optimizer=OPTIMIZERS[optimizer](), dtype=dtype)
    if trained:
        model.fit(X, Y, epochs=2, validation_data=(X, Y))
    model.save(path)
    loaded = fastbp.load(path, engine=engine)
    assert state_of(loaded) == state_of(model) and repr(loaded) == repr(model)
    assert loaded.dtype == dtype and loaded.engine is engine
    np.testing.assert_array_equal(loaded.predict_proba(X), model.predict_proba(X))
    for each in (loaded, model):
        each.fit(X, Y, epochs=2, validation_data=(X, Y))
    assert state_of(loaded) == state_of(model)


def test_layers_added_later_start_alike(engine, path):
    model = small_model(engine, seed=3)
    model.save(path)
    models = model, fastbp.load(path, engine=engine)
    for each in models:
        each.layers = (*each.layers, fastbp.Dropout(0.4), fastbp.Dense(3, 3))
        each.fit(X, Y, epochs=1)
    assert state_of(models[0]) == state_of(models[1])


@pytest.mark.parametrize("other", ENGINES)
def test_a_model_of_another_engine(engine, other, path):
    model = small_model(engine).fit(X, Y, epochs=1)
    model.save(path)
    loaded = fastbp.load(path, engine=other)
    assert loaded.engine.name == other and state_of(loaded) == state_of(model)
    np.testing.assert_allclose(loaded.predict_proba(X), model.predict_proba(X), rtol=1e-12)


def test_models_without_loss_or_optimizer(engine, path):
    model = fastbp.Sequential([fastbp.Dense(4, 3), fastbp.Softmax()], engine=engine, seed=1)
    model.save(path)
    loaded = fastbp.load(path, engine=engine)
    assert loaded.loss is None and loaded.optimizer is None
    np.testing.assert_array_equal(loaded.predict(X), model.predict(X))


@pytest.mark.parametrize("kind", [fastbp.SoftmaxCrossEntropy, fastbp.CategoricalCrossEntropy])
def test_class_weights_by_label(kind, path):
    layers = [fastbp.Dense(4, 3), fastbp.Softmax()]
    model = fastbp.Sequential(layers, loss=kind({0: 5.0, 2: 0.5}), optimizer=fastbp.SGD(0.1), seed=0)
    model.fit(X, Y, epochs=1, checkpoint=path)
    loaded = fastbp.load(path)
    assert loaded.loss.class_weight == {0: 5.0, 2: 0.5}
    assert state_of(loaded.fit(X, Y)) == state_of(model.fit(X, Y))
    model.fit(X, Y, epochs=2, checkpoint=path, resume=True)
    about = json.loads(header_of(path)["__metadata__"]["fastbp"])
    rewrite(path, about | {"loss": {"type": kind.__name__, "config": {"class_weight": {"0": 5.0}}}})
    assert fastbp.load(path).loss.class_weight == {0: 5.0}  # whose labels JSON turned into text


class Pair(fastbp.Residual):
    """A layer that makes the layers inside it itself."""

    def __init__(self, size):
        super().__init__([fastbp.Dense(size, size), fastbp.Dropout(0.3)])

    def config(self):
        return {"size": self.features}


@pytest.mark.parametrize("switch", ["trainable", "training"])
@pytest.mark.parametrize("on", [(False, False), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("block", [Pair, lambda size: fastbp.Residual([fastbp.Dense(size, size), fastbp.Dropout(0.3)])])
def test_what_is_switched_off_in_a_layer_stays_so(engine, switch, on, block, path):
    def made():
        model = small_model(engine)
        model.layers = (fastbp.BatchNorm(4), block(4), *model.layers)
        return model

    def switches(model):
        return [(layer.trainable, layer.training) for layer in model.walk()]

    model = made()
    setattr(model.layers[0], switch, False)
    setattr(model.layers[1], switch, on[0])
    setattr(model.layers[1].layers[0], switch, on[1])
    model.fit(X, Y, epochs=1, checkpoint=path)
    loaded = fastbp.load(path, engine=engine, custom={"Pair": Pair})
    assert switches(loaded) == switches(model)
    resumed = made().fit(X, Y, epochs=2, checkpoint=path, resume=True)
    assert switches(resumed) == switches(model)
    for each in (model, loaded):
        each.fit(X, Y, epochs=1)
        assert state_of(each) == state_of(resumed)


class Share(fastbp.MeanSquaredError):
    def __init__(self, share=None, **options):
        super().__init__(**options)
        self.share = 0.5 if share is None else share  # so that the default makes it again


class Renamed(fastbp.Dense):
    def __init__(self, rows, columns, **options):
        super().__init__(rows, columns, **options)


class Warm(fastbp.Schedule):
    def __init__(self, by=2):
        self.by = by

    def __call__(self, epochs, lr):
        return lr * self.by**-epochs


@pytest.mark.parametrize(
    ("parts", "lacks"),
    [
        ({"loss": Share(0.9)}, r"this Share: Share.config must return all arguments .*, and lacks share=0.9"),
        ({"layers": [Renamed(4, 1)]}, r"this Renamed: Renamed.config .*, got inputs, neurons: missing .* 'rows'"),
        ({"optimizer": fastbp.SGD(0.1, schedule=Warm(3))}, r"this Warm: Warm.config .*, and lacks by=3"),
    ],
    ids=["loss", "layer", "schedule"],
)
def test_a_part_that_could_not_be_made_again_is_refused(parts, lacks, path):
    standard = {"layers": [fastbp.Dense(4, 1)], "loss": Share(), "optimizer": fastbp.SGD(0.1, schedule=Warm())}
    model = fastbp.Sequential(**copy.deepcopy(standard | parts))
    with pytest.raises(TypeError, match=lacks):
        model.save(path)
    with pytest.raises(TypeError, match=lacks):
        model.fit(X, Y[:, None], checkpoint=path)
    assert not path.exists() and not model.history
    fastbp.Sequential(**standard).save(path)
    custom = {"Share": Share, "Warm": Warm}
    assert repr(fastbp.load(path, custom=custom)) == repr(fastbp.Sequential(**copy.deepcopy(standard)))


def test_parts_of_ones_own(engine, path):
    class Doubled(fastbp.MeanSquaredError):
        pass

    model = fastbp.Sequential(
        [fastbp.Dense(4, 6), Bottleneck(6, 2), fastbp.Dense(6, 1)],
        loss=Doubled(), optimizer=fastbp.Adam(), engine=engine, seed=0,
    ).fit(X, Y[:, None], epochs=1)  # fmt: skip
    model.save(path)
    custom = {"Bottleneck": Bottleneck, "Doubled": Doubled}
    loaded = fastbp.load(path, engine=engine, custom=custom)
    assert state_of(loaded) == state_of(model) and type(loaded.loss) is Doubled
    assert state_of(loaded.fit(X, Y[:, None])) == state_of(model.fit(X, Y[:, None]))
    with pytest.raises(ValueError, match="the file names 'Bottleneck', which fastbp does not have; pass custom="):
        fastbp.load(path)


@pytest.mark.parametrize("slope", [0.01, 0.2, 0.3])
def test_a_setting_with_another_default_than_that_of_the_class_above(path, slope):
    class Leakier(fastbp.LeakyReLU):
        negative_slope = Setting(as_number, default=0.2)

        def __init__(self, negative_slope=0.2, *, engine=None):
            super().__init__(negative_slope, engine=engine)

    fastbp.Sequential([fastbp.Dense(4, 2), Leakier(slope)]).save(path)
    loaded = fastbp.load(path, custom={"Leakier": Leakier}).layers[1]
    assert loaded.negative_slope == slope
    assert loaded.config() == ({} if slope == 0.2 else {"negative_slope": slope})


def test_metadata(path):
    small_model().save(path, {"classes": ["a", "b", "c"]})
    assert read_metadata(path) == {"classes": ["a", "b", "c"]}
    small_model().save(str(path))
    assert read_metadata(str(path)) == {}


def test_arguments_of_the_wrong_kind_are_named(path):
    with pytest.raises(TypeError, match="metadata must hold what JSON holds: Object of type float32 is not"):
        small_model().save(path, {"a": np.float32(1)})
    assert not path.exists()
    small_model().save(path)
    with pytest.raises(TypeError, match=r"custom must be a dict of classes by name, got \[<class"):
        fastbp.load(path, custom=[Bottleneck])


def test_a_file_is_plain_safetensors(path):
    from safetensors.numpy import load_file

    model = small_model(dtype=np.float32)
    model.save(path)
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["layers.0.weights"], model.layers[0].weights)
    about = json.loads(header_of(path)["__metadata__"]["fastbp"])
    assert about["format"] == 1 and about["layers"][0] == {"type": "Dense", "config": {"inputs": 4, "neurons": 8}}


def header_of(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def rewrite(path, about=None, **tensors):
    """Write a file again with another description or other arrays; None leaves an array out."""
    from safetensors.numpy import load_file, save_file

    arrays = {name: array for name, array in (load_file(path) | tensors).items() if array is not None}
    text = json.dumps(about or json.loads(header_of(path)["__metadata__"]["fastbp"]))
    save_file(arrays, path, {"fastbp": text, "crc32": checksum(text, arrays)})


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.99])
def test_a_cut_file(path, keep):
    small_model().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match=rf"{path.name} is not a model file"):
        fastbp.load(path)


def test_a_flipped_bit_is_found(path, rng):
    model = small_model()
    model.save(path)
    content = path.read_bytes()
    places = [*range(64), *rng.integers(64, len(content), 300)]
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        try:
            loaded = fastbp.load(path)
        except ValueError:
            continue
        assert state_of(loaded) == state_of(model)  # white space, or the name of the checksum


def test_a_file_that_was_changed_on_purpose(path):
    from safetensors.numpy import load_file, save_file

    small_model(dtype=np.float32).save(path)
    metadata = header_of(path)["__metadata__"]
    arrays = load_file(path) | {"layers.0.weights": np.ones((4, 8), np.float32)}
    save_file(arrays, path, metadata)
    with pytest.raises(
        ValueError, match=r"is damaged; a file that was changed on purpose loads without its entry crc32"
    ):
        fastbp.load(path)
    save_file(arrays, path, {"fastbp": metadata["fastbp"]})
    assert (fastbp.load(path).layers[0].weights == 1).all()


@pytest.mark.parametrize(
    "layer",
    [
        {"type": "Dense", "config": {"inputs": 4, "neurons": 10**12}},
        {"type": "Dense", "config": {"inputs": 20_000, "neurons": 20_000}},
        {"type": "BatchNorm", "config": {"features": 10**13}},
        {"type": "Residual", "config": {"layers": 99 * [{"type": "BatchNorm", "config": {"features": 9000}}]}},
        {
            "type": "Embedding",
            "config": {"features": 4, "columns": [0], "num_embeddings": [2**24], "embedding_dim": [9]},
        },
        {"type": "Residual", "config": {"layers": [{"type": "LayerNorm", "config": {"features": 10**11}}]}},
    ],
    ids=lambda layer: layer["type"],
)
def test_a_giant_description_takes_no_memory(path, layer):
    small_model().save(path)
    about = json.loads(header_of(path)["__metadata__"]["fastbp"])
    about["layers"].insert(0, layer)
    rewrite(path, about)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"the file describes layers of size|must be of shape"):
        fastbp.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_header_of_a_giant_length(path):
    path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}" * 100)
    with pytest.raises(ValueError, match="is not a model file"):
        fastbp.load(path)


def test_a_deep_description(path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(3)}, path, {"fastbp": "[" * 100_000})
    with pytest.raises(ValueError, match="is not a model file"):
        fastbp.load(path)


later = pytest.mark.skipif(sys.version_info >= (3, 12), reason="so few frames are within Python's limit")


@pytest.mark.parametrize("depth", [pytest.param(200, marks=later), 1000])
def test_layers_in_layers_without_end(path, depth):
    from safetensors.numpy import load_file, save_file

    small_model().save(path)
    about, arrays = json.loads(header_of(path)["__metadata__"]["fastbp"]), load_file(path)
    layers = '[{"type": "Residual", "config": {"layers": ' * depth + json.dumps(about["layers"]) + "}}]" * depth
    text = json.dumps(about | {"layers": "in layers"}).replace('"in layers"', layers)
    save_file(arrays, path, {"fastbp": text, "crc32": checksum(text, arrays)})
    with pytest.raises(ValueError, match=r"is not a (complete fastbp model|model file)"):
        fastbp.load(path)


@pytest.mark.parametrize("content", [b"\0" * 1000, b"\xff" * 1000, b"hello, world" * 50, b"PK\x03\x04" + b"0" * 99])
def test_a_file_of_something_else(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path.name} is not a model file"):
        fastbp.load(path)


def test_a_safetensors_file_of_something_else(path):
    from safetensors.numpy import save_file

    for metadata in (None, {"format": "pt"}, {"fastbp": "[]"}):
        save_file({"x": np.zeros(3)}, path, metadata)
        with pytest.raises(ValueError, match="is a safetensors file, but not one of fastbp"):
            fastbp.load(path)
    save_file({"x": np.zeros(3)}, path, {"fastbp": "{"})
    with pytest.raises(ValueError, match="is not a model file"):
        fastbp.load(path)


def test_a_later_format(path):
    small_model().save(path)
    about = json.loads(header_of(path)["__metadata__"]["fastbp"])
    rewrite(path, about | {"format": 2})
    with pytest.raises(ValueError, match="has format 2; this version of fastbp reads format 1"):
        fastbp.load(path)


def replaced(about, *keys, value):
    inner = about
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("layers",), None),
        (("layers",), []),
        (("layers", 0), {}),
        (("layers", 0, "type"), "os.system"),
        (("layers", 0, "type"), "Parameter"),
        (("layers", 0, "type"), ["Dense"]),
        (("layers", 0, "type"), "__import__"),
        (("layers", 0, "type"), 10**6 * "x"),
        (("layers", 0, "config", "__class__"), "Dense"),
        (("format",), 10**6 * "x"),
        (("layers", 0, "config"), {"inputs": 4}),
        (("layers", 0, "config", "neurons"), 9),
        (("layers", 0, "config", "neurons"), "8"),
        (("layers", 2, "type"), "Layer"),
        (("dtype",), "int8"),
        (("dtype",), "quaternion"),
        (("dtype",), None),
        (("loss",), "SoftmaxCrossEntropy"),
        (("optimizer", "type"), "Dense"),
        (("optimizer", "config"), {"speed": 1}),
        (("optimizer", "config", "lr"), "fast"),
        (("history",), None),
        (("history",), {"loss": ["low"]}),
        (("history",), {"loss": 3}),
        (("random",), None),
        (("random", "seed"), "x"),
        (("random", "seed"), -1),
        (("random", "state"), {}),
        (("random", "state", "counter"), [-1, 0, 0, 0]),
        (("random", "state", "counter"), [2**70, 0, 0, 0]),
        (("random", "bit_generator"), "PCG64"),
        (("random", "buffer_pos"), -(10**8)),
        (("random", "buffer_pos"), 5),
        (("random", "buffer"), [1]),
    ],
    ids=str,
)
def test_a_description_that_is_wrong_is_a_value_error(path, keys, value):
    small_model(dropout=0.5).save(path)
    about = json.loads(header_of(path)["__metadata__"]["fastbp"])
    replaced(about, *keys, value=value)
    rewrite(path, about)
    with pytest.raises(ValueError, match=path.name) as refused:
        fastbp.load(path)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "name", ["layers.0.weights", "layers.3.biases", "layers.2.key", "optimizer.m", "optimizer.steps"]
)
@pytest.mark.parametrize("array", [None, np.zeros((7, 7), np.float32)], ids=["missing", "shape"])
def test_arrays_that_are_wrong_are_a_value_error_by_name(path, name, array):
    small_model(dropout=0.5, dtype=np.float32).save(path)
    rewrite(path, **{name: array})
    with pytest.raises(ValueError, match=name if array is None else r"must (be|have)"):
        fastbp.load(path)


def test_no_file(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no model file at {path}"):
            fastbp.load(path)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failed_save_leaves_the_old_file(path, function, monkeypatch):
    small_model(seed=1).save(path)
    before = path.read_bytes()

    def fail(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr(*((os, "fsync") if function == "fsync" else (type(path), "replace")), fail)
    with pytest.raises(OSError, match="no space left"):
        small_model(seed=2).save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_metadata_is_a_dict(path):
    small_model().save(path)
    for wrong in (5, "text", ["a"]):
        with pytest.raises(TypeError, match="metadata must be a dict, got"):
            small_model().save(path, wrong)
        rewrite(path, json.loads(header_of(path)["__metadata__"]["fastbp"]) | {"metadata": wrong})
        with pytest.raises(ValueError, match="metadata must be a dict, got"):
            read_metadata(path)


def test_metadata_that_json_cannot_hold_leaves_the_old_file(path):
    small_model(seed=1).save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        small_model(seed=2).save(path, {"when": object()})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_file_has_the_usual_permissions(path):
    small_model().save(path)
    usual = path.parent / "usual"
    usual.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are others there")
def test_a_file_that_is_there_keeps_its_permissions(path):
    small_model(seed=1).save(path)
    path.chmod(0o600)
    small_model(seed=2).save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_link_stays_a_link(path):
    small_model(seed=1).save(path)
    link = path.with_name("link")
    try:
        link.symlink_to(path)
    except OSError:
        pytest.skip("links are not allowed here")
    model = small_model(seed=2)
    model.save(link)
    assert link.is_symlink() and state_of(fastbp.load(path)) == state_of(model)


def test_what_is_no_file_stays(tmp_path):
    place = tmp_path / "place"
    kinds = [place.mkdir, lambda: os.mkfifo(place)] if hasattr(os, "mkfifo") else [place.mkdir]
    for make in kinds:
        make()
        kind = place.stat().st_mode
        with pytest.raises(OSError, match=r"place is no file that could be replaced"):
            small_model().save(place)
        assert place.stat().st_mode == kind and list(tmp_path.iterdir()) == [place]
        place.rmdir() if place.is_dir() else place.unlink()


def test_what_is_saved_while_another_thread_trains_is_of_one_step(engine, path):
    model = small_model(engine, optimizer=fastbp.Adam(0.01))
    done, seen = threading.Event(), []

    def look():
        while not done.is_set():
            model.save(path)
            seen.extend([fastbp.load(path, engine=engine), copy.deepcopy(model)])

    def steps_seen():
        return {int(each.optimizer.steps[0]): each for each in list(seen)}

    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(look)
        while len(steps_seen()) <= 3 and not looking.done():  # however seldom a busy machine lets it look
            model.fit(X, Y, epochs=500, batch_size=len(X), shuffle=False)
        done.set()
        looking.result()
    steps = {count: parameters_of(each) for count, each in steps_seen().items()}
    assert len(steps) > 3
    again = small_model(engine, optimizer=fastbp.Adam(0.01))
    for count in sorted(steps):
        for _ in range(count - int(again.optimizer.steps[0])):
            again.train_on_batch(X, Y)
        assert_same_parameters(again, steps[count], rtol=0)


def test_saving_changes_nothing(engine, path):
    model = small_model(engine, dropout=0.1).fit(X, Y, epochs=1)
    before = state_of(model)
    model.save(path)
    assert state_of(model) == before


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are others there")
def test_nobody_else_can_read_a_private_file_while_it_is_written(path, monkeypatch):
    path.write_text("private")
    path.chmod(0o600)
    seen = []
    flush = os.fsync

    def look(file):
        seen.append(stat.S_IMODE(os.fstat(file).st_mode))
        flush(file)

    monkeypatch.setattr(os, "fsync", look)
    small_model().save(path)
    assert seen == [0o600]
