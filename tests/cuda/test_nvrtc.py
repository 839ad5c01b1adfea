"""Every `.cu` file compiles for the GPUs of a data centre, from pip's wheels alone."""

import re

import pytest

from fastbp.kernels.cupy_sources import FILES, KERNELS, OPTIONS, source, source_of_parts
from fastbp.kernels.cupy_tiles import TILES, source_of_tiles

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings", exc_type=ImportError)


def run(function, *arguments):
    status, *results = function(*arguments)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{function.__name__}: {status}"
    return results[0] if results else None


ONE_BY_ONE = [file for file in FILES if file != "products"]  # whose kernels are compiled so

# a classifier's training step, as one kernel
STEP = "next_batch", "take", "take_labels", "dense_relu_forward", "dense_forward", "softmax_cross_entropy"
STEP += "dense_bias_grad", "dense_weight_grad", "dense_relu_input_grad", "bias_grad", "adam"


def parts(blocks):
    """The parts of a step, on arrays of any shapes."""
    sizes = {"Table": ["given[1]", "5", "40", "8", "10"], "Matrix": ["given[2]", "5", "5"]}
    names = STEP if blocks == 1 else (*STEP[:-1], "add_shares", STEP[-1], "send_share")
    given = {name: [["given[0]", *sizes.get(kind, ["48"])] for kind, _ in KERNELS[name].parameters] for name in names}
    return [(name, place % (2 if blocks == 1 else 4), given[name]) for place, name in enumerate(names)]


@pytest.mark.parametrize("what", [*ONE_BY_ONE, *TILES, 1, 8], ids=str)
@pytest.mark.parametrize("floats", ["float32", "float64"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_kernels_compile(what, floats, architecture):
    """Those of a file, products by tiles, or a step as one kernel of so many blocks."""
    if (what, architecture) == (8, "sm_80"):
        pytest.skip("sm_80 has no clusters of blocks")
    if isinstance(what, str):
        code = source([what], floats)
    else:
        code = source_of_tiles(what, floats) if what in TILES else source_of_parts(parts(what), floats, what, 40)
    assert len(compiled(code, architecture)) > 0


@pytest.mark.parametrize("name", [next(name for name in KERNELS if KERNELS[name].file == file) for file in ONE_BY_ONE])
def test_a_kernel_is_compiled_alone(name):
    found = compiled(source([KERNELS[name].file], "float32", name), "sm_90a")
    assert {part.decode() for part in re.findall(rb"\.text\.(\w+)", found)} == {name}


@pytest.mark.parametrize("name", ["softmax_backward", "layer_norm_forward", "layer_norm_input_grad"])
def test_a_thread_asks_for_several_elements_of_a_row_at_a_time(name):
    """Loops along rows are unrolled, four elements of each array, so that not each waits for memory by itself."""
    count = sum(kind == "Matrix" for kind, _ in KERNELS[name].parameters)
    code = compiled(source([KERNELS[name].file], "float32", name), "sm_90", "PTX").decode()
    assert len(re.findall(r"ld\.global", code)) >= 4 * count


def compiled(code, architecture, form="CUBIN"):
    """A cubin, or PTX."""
    try:
        run(nvrtc.nvrtcVersion)
    except RuntimeError as error:
        pytest.skip(f"needs nvidia-cuda-nvrtc: {error}")
    program = run(nvrtc.nvrtcCreateProgram, code.encode(), b"kernels.cu", 0, [], [])
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", "-ftz=true", *OPTIONS)]  # as CuPy
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    log = b" " * run(nvrtc.nvrtcGetProgramLogSize, program)
    run(nvrtc.nvrtcGetProgramLog, program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    result = b" " * run(getattr(nvrtc, f"nvrtcGet{form}Size"), program)
    run(getattr(nvrtc, f"nvrtcGet{form}"), program, result)
    return result
