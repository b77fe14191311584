"""Which device computes."""

import re

import torch

from nirvana.errors import InputError


def resolve_device(name: str) -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda`; `auto` takes a GPU where there is one.

    Raises:
        InputError: If `cuda` is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError("runtime.device: expected a machine with CUDA, found no usable GPU; set it to auto or cpu")
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", name) is None:
        raise InputError(f"device: expected auto, cpu, cuda or cuda:N, got {name[:40]!r}; correct it")
    return torch.device(name)
