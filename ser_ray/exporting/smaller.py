"""A graph whose weights take fewer bits: fp16, half the size, and int8, about a quarter.

Only the weights of the backbone; its front end, biases, norms and the head are small, and stay in fp32.

fp16: each weight is followed by a conversion to fp32, which onnxruntime does once when it loads the model: no number
can overflow, and it runs where nothing computes in fp16, which are most processors and browsers.
int8: dynamic quantisation by onnxruntime. Linear layers alone, each output with a scale of its own; what goes into them
is quantised as it comes. Unsigned, since sums of signed ones saturate on processors without VNNI: the answer would
depend on the machine.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from ser_ray.exporting import graph as graphs

SMALL: Final = 1024
"""Numbers of a tensor below which its bits do not matter."""


def to_fp16(graph: Any) -> None:
    """Hold the weights of the backbone in fp16, in place."""
    import onnx_ir

    for value in list(graph.graph.initializers.values()):
        users = list(value.uses())
        array = value.const_value.numpy()
        if array.dtype != np.float32 or array.size < SMALL or not all(graphs.of_backbone(use.node) for use in users):
            continue
        half = onnx_ir.Value(name=f"{value.name}.fp16", const_value=onnx_ir.tensor(array.astype(np.float16)))
        half.shape, half.dtype = value.shape, onnx_ir.DataType.FLOAT16
        cast = onnx_ir.node("Cast", [half], {"to": onnx_ir.DataType.FLOAT.value}, name=f"{value.name}.fp32")
        cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, onnx_ir.DataType.FLOAT
        del graph.graph.initializers[value.name]
        graph.graph.register_initializer(half)
        graph.graph.insert_before(graph.graph[0], cast)
        for use in users:
            use.node.replace_input_with(use.idx, cast.outputs[0])


def save_int8(graph: Any, path: Path) -> None:
    """Write a graph with the linear layers of its backbone in int8."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    linear = [node for node in graph.graph if node.op_type in ("MatMul", "Gemm") and graphs.of_backbone(node)]
    names = [node.name for node in linear if any(i is not None and i.const_value is not None for i in node.inputs)]
    with tempfile.TemporaryDirectory(prefix="ser-ray-") as scratch:
        whole = Path(scratch) / path.name
        graphs.save(graph, whole)
        root = logging.getLogger()  # on which onnxruntime advises to simplify a graph that is simplified
        level = root.level
        root.setLevel(logging.ERROR)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            quantize_dynamic(
                whole,
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                nodes_to_quantize=names,
                per_channel=True,
                weight_type=QuantType.QUInt8,
            )
        finally:
            root.setLevel(level)
        made = onnx.load(path)
        _restore_inputs(made.graph, graph.graph)
        onnx.save(made, path)
    onnx.checker.check_model(str(path), full_check=True)


# -- below: how it is done


def _restore_inputs(made: Any, graph: Any) -> None:
    """Give what quantize_dynamic made of a graph the inputs that may be left out, with their defaults: it removes them,
    and of those that nothing uses, as the variance of a voice where a head only centres, the default too."""
    import onnx_ir

    inputs, defaults = ({one.name for one in part} for part in (made.input, made.initializer))
    for value in graph.inputs:
        if value.name not in inputs:
            made.input.append(onnx_ir.to_proto(value))
        if value.name in graph.initializers and value.name not in defaults:
            made.initializer.append(onnx_ir.to_proto(value.const_value))
