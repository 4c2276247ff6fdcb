"""TurboQuant KV-cache compression in llama-cpp-python:

    import llama_cpp, turboquant
    turboquant.load()      # once, before the first model
    llm = llama_cpp.Llama("model.gguf", n_ctx=8192, n_gpu_layers=-1, flash_attn=True)

n_gpu_layers must be given: layers that are not "offloaded" keep llama.cpp's own f16 cache.
"""

import ctypes
import os
from pathlib import Path

__all__ = ["LoadError", "library_path", "load"]

_NAME = "libggml-turboquant.so"


class LoadError(RuntimeError):
    """The library did not take effect; the text says why and what to do."""


def library_path():
    """The library beside this module (an installed one), or in build/lib of the source tree that this module lies in. LoadError if in neither."""
    here = Path(__file__).resolve().parent
    places = [here / _NAME, here.parents[1] / "build/lib" / _NAME]
    for place in places:
        if place.exists():
            return place
    raise LoadError(f"no {_NAME} in {' or '.join(str(p.parent) for p in places)}: run `make build`, or name the file: turboquant.load(FILE)")


def load(library=None, kv=None):
    """Loads the library into the ggml that llama_cpp uses, and returns the names of its devices, the default one first.

    library: the file; None: library_path().
    kv: what a device name cannot say, as in the variable TURBOQUANT_KV: a SPEC ("k=tcq4,v=tcq3"), a plan file, or "auto:3.25". None: the
        variable, if it is set.
    Call it before the first model; again, it changes nothing. Raises LoadError if models would not see the devices.
    """
    import llama_cpp

    # libllama's own handle finds the ggml that libllama uses. lib/libggml.so is not it: in an installed wheel it is a second copy.
    ggml = llama_cpp.llama_cpp._lib
    for function in ("ggml_backend_load", "ggml_backend_reg_by_name", "ggml_backend_reg_dev_get"):
        if not hasattr(ggml, function):
            raise LoadError(f"this llama_cpp has no {function}: it was built without shared ggml libraries; install llama-cpp-python 0.3.22 to "
                            "0.3.36 as pip builds it")
        getattr(ggml, function).restype = ctypes.c_void_p
    ggml.ggml_backend_load.argtypes = ggml.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_reg_dev_get.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    ggml.ggml_backend_reg_dev_count.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_reg_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_name.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_dev_name.restype = ctypes.c_char_p

    if not ggml.ggml_backend_reg_by_name(b"turboquant"):
        path = Path(library) if library is not None else library_path()
        if not path.exists():
            raise LoadError(f"{path} does not exist: run `make build`, or name the file: turboquant.load(FILE)")
        before = os.environ.get("TURBOQUANT_KV")
        if kv is not None:
            os.environ["TURBOQUANT_KV"] = kv
        try:
            plugin = ctypes.CDLL(str(path.resolve()))
            if not ggml.ggml_backend_load(str(path.resolve()).encode()):
                plugin.turboquant_load_error.restype = ctypes.c_char_p
                raise LoadError(f"{path}: {plugin.turboquant_load_error().decode()}")
        except OSError as error:
            raise LoadError(f"{error}. It needs the ggml libraries of llama-cpp-python (libggml-base.so.0) in this process: build the library "
                            "for this system, and install llama-cpp-python with its shared libraries") from error
        finally:
            if kv is not None:
                os.environ.pop("TURBOQUANT_KV")
                if before is not None:
                    os.environ["TURBOQUANT_KV"] = before
    elif kv is not None:
        raise LoadError("the library is loaded already, and kv is read when it is loaded: give it in the first call of load()")

    registry = ggml.ggml_backend_reg_by_name(b"turboquant")
    if not registry or not llama_cpp.llama_supports_gpu_offload():
        raise LoadError("the library was loaded, but llama_cpp does not see it: its models would have an f16 cache. Is another ggml in this process?")
    return [ggml.ggml_backend_dev_name(ggml.ggml_backend_reg_dev_get(registry, i)).decode()
            for i in range(ggml.ggml_backend_reg_dev_count(registry))]
