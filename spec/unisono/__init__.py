"""Unisono: linear-time sequence models, sung alike by NumPy, JAX, PyTorch and ONNX. Each room is a package of its own:

    import unisono_torch as un     # or unisono_jax, or unisono_spec (NumPy): create, load, from_hf, preset
    import unisono_onnx            # export: graphs
    import unisono_conformance     # the court

What they need is in extras: pip install 'unisono[torch]', [jax], [onnx], [conformance], [tools] for the `unisono` command.
"""

from importlib.metadata import version

__version__ = version("unisono")
__all__ = ["__version__"]
