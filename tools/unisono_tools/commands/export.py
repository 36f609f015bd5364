"""unisono export"""

from __future__ import annotations

from unisono_spec.contract.plain import expanded

from unisono_tools.backends import backend
from unisono_tools.commands.arguments import call
from unisono_tools.train.checkpoint import model_file, tokenizer_of, training_of


def run(checkpoint: str, out: str = "model.onnx", target: str = "portable", precision: str = "float32") -> int:
    """Write a checkpoint as one ONNX graph that reads and decodes, with its state as named inputs and outputs.

    Args:
        checkpoint: folder of a run or of a checkpoint, or a .safetensors file.
        out: where the graph goes; a name that ends in .onnx.
        precision: of matrices and embeddings in the file: float32, float16, int8, or int4, which needs onnxruntime.
        target: portable holds standard operators of opset 21 only; ort uses onnxruntime's own for linear attention, selective scans and
            convolutions; opset27 the standard's for the same, which needs onnxruntime 1.32.
    """
    path = model_file(expanded(checkpoint))
    training = training_of(path)
    backend("onnx").export(
        path, expanded(out), tokenizer_of(path), training.seq_len if training else None, target=target, precision=precision
    )
    print(f"{out}: written from {path}")
    return 0


def main(argv: list[str]) -> int:
    return call("export", run, argv)
