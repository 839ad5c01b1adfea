"""Every `.cu` file compiles for the GPUs of a data centre, from pip's wheels alone."""

import pytest

from fastbp.kernels.cupy_sources import FILES, OPTIONS, source, source_of_parts

nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-bindings", exc_type=ImportError)


def run(function, *arguments):
    status, *results = function(*arguments)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, f"{function.__name__}: {status}"
    return results[0] if results else None


# a classifier's training step, as one kernel
STEP = "next_batch", "take", "take_labels", "dense_relu_forward", "dense_forward", "softmax_cross_entropy"
STEP += "dense_bias_grad", "dense_weight_grad", "dense_relu_input_grad", "bias_grad", "adam"


@pytest.mark.parametrize("file", [*FILES[1:], 1, 8], ids=str)
@pytest.mark.parametrize("floats", ["float32", "float64"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_kernels_compile(file, floats, architecture):
    """Those of a file, or a step as one kernel of so many blocks."""
    if (file, architecture) == (8, "sm_80"):
        pytest.skip("sm_80 has no clusters of blocks")
    try:
        run(nvrtc.nvrtcVersion)
    except RuntimeError as error:
        pytest.skip(f"needs nvidia-cuda-nvrtc: {error}")
    code = source_of_parts(STEP, floats, file) if isinstance(file, int) else source([file], floats)
    program = run(nvrtc.nvrtcCreateProgram, code.encode(), b"kernels.cu", 0, [], [])
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", "-ftz=true", *OPTIONS)]  # as CuPy
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    log = b" " * run(nvrtc.nvrtcGetProgramLogSize, program)
    run(nvrtc.nvrtcGetProgramLog, program, log)
    assert status == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()
    assert run(nvrtc.nvrtcGetCUBINSize, program) > 0
