"""onnxruntime's LayerNormalization on the CPU: as a session is run, and into bound memory."""

from typing import Any

import numpy as np

from bench.cpu_contender import Builder, CpuContender, refuse
from bench.cpu_data import CpuInputs
from bench.cpu_machine import threads
from bench.gpu_grid import FWD

__all__ = ["onnx_peers", "session"]

OPSET, IR = 17, 10  # LayerNormalization came with 17; an IR version that older runtimes read


def onnx_peers(inputs: CpuInputs) -> list[Builder]:
    """`session.run`, whose arena keeps the result's memory mapped; and IO binding."""
    return [
        ("onnxruntime", lambda: _run(inputs)),
        ("onnxruntime out=", lambda: _bound(inputs)),
    ]


def session(inputs: CpuInputs) -> Any:
    """Session of one node with weight and bias as constants."""
    case = inputs.case
    if case.op != FWD:
        refuse("onnxruntime's wheel has no gradients")
    if inputs.weight is None:
        refuse("the operator needs a scale")
    if case.axis != -1 or case.order != "C":
        refuse("the operator normalizes trailing axes of row-major tensors")
    import onnx
    import onnxruntime
    from onnx import helper, numpy_helper

    kind = helper.np_dtype_to_tensor_dtype(inputs.x.dtype)
    node = helper.make_node(
        "LayerNormalization", ["x", "weight", "bias"], ["y"], axis=-1, epsilon=case.eps
    )
    graph = helper.make_graph(
        [node],
        "layer_norm",
        [helper.make_tensor_value_info("x", kind, case.shape)],
        [helper.make_tensor_value_info("y", kind, case.shape)],
        [
            numpy_helper.from_array(inputs.weight, "weight"),
            numpy_helper.from_array(inputs.bias, "bias"),
        ],
    )
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _run(inputs: CpuInputs) -> CpuContender:
    made, feed = session(inputs), {"x": inputs.x}
    return CpuContender(lambda: made.run(None, feed)[0])


def _bound(inputs: CpuInputs) -> CpuContender:
    made, out = session(inputs), np.empty_like(inputs.x)
    binding = made.io_binding()
    binding.bind_cpu_input("x", inputs.x)
    binding.bind_output("y", "cpu", 0, inputs.x.dtype, out.shape, out.ctypes.data)

    def call() -> Any:
        made.run_with_iobinding(binding)
        return out

    return CpuContender(call, kept=out)
