"""Loads ``libvblora.so``, the native build: this registers the operators ``torch.ops.vblora.*`` and their kernels."""

import ctypes
from pathlib import Path

import torch  # noqa: F401  # loads libtorch, which the library needs

LIBRARY = Path(__file__).with_name("libvblora.so")

if not LIBRARY.exists():
    raise ImportError(f"vblora's native build, {LIBRARY}, is missing. Install the package: pip install .")
# It does not use Python's C API, so the same file works with every Python.
_library = ctypes.CDLL(str(LIBRARY))
_library.vblora_build_info.restype = ctypes.c_char_p


def build_info() -> dict[str, str | bool]:
    """Facts about the native library.

    Returns:
        A dict with ``version``, ``compiler``, ``torch_target`` (the oldest torch that it runs on), ``built_with_torch``, ``cuda``
            (the CUDA version, or "none"), ``cuda_architectures``, ``cpu_instruction_set`` (of the CPU kernels in use) and
            ``debug``.

    Raises:
        RuntimeError: the environment variable ``VBLORA_CPU_ISA`` is not one of its values, or names an instruction set that the
            processor lacks.
    """
    fields = dict(line.split("=", 1) for line in _library.vblora_build_info().decode().splitlines())
    if "error" in fields:
        raise RuntimeError(fields["error"])
    return {name: value == "1" if name == "debug" else value for name, value in fields.items()}


def empty_cache() -> None:
    """Frees the CPU memory that vblora caches for large sub-vectors and gradients: up to eight blocks, of recently used sizes.
    ``torch.cuda.empty_cache`` does the same for CUDA."""
    _library.vblora_empty_cache()
