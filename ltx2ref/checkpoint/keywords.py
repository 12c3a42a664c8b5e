"""Keywords of diffusers: what is refused of them, with the reason, and which device they name."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

Device = str | int | torch.device
SHARING_OUT = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps of accelerate


class UnsupportedKeyword(NamedTuple):
    """A keyword that is refused, unless it asks for what is done in any case."""

    harmless: tuple[Any, ...]  # values that ask for that; None always does
    reason: str


ONE_DEVICE = UnsupportedKeyword(
    (False,), "the whole model goes to one device; `ltx2ref.stream` runs a model that is larger than the memory"
)
NO_FLASHPACK = UnsupportedKeyword((False, {}), "only .safetensors and .gguf files are read and written")
LOADING = {
    "disable_mmap": UnsupportedKeyword((False,), "weights that are stored in the wanted dtype stay mapped on the CPU"),
    "flashpack_kwargs": NO_FLASHPACK,
    "force_download": UnsupportedKeyword(
        (False,), "a repository is fetched once; to fetch it again, delete it from the cache"
    ),
    "ignore_mismatched_sizes": UnsupportedKeyword((False,), "a checkpoint is loaded whole, or not at all"),
    "low_cpu_mem_usage": UnsupportedKeyword((True,), "weights always go from the file into an empty model, one by one"),
    "max_memory": ONE_DEVICE,
    "offload_folder": ONE_DEVICE,
    "offload_state_dict": ONE_DEVICE,
    "output_loading_info": UnsupportedKeyword((False,), "no key is missing or left over: that would be an error"),
    "parallel_config": UnsupportedKeyword(
        (), "a loaded model can be sharded by PyTorch's own means, as docs/sharding.md says"
    ),
    "proxies": UnsupportedKeyword((), "the hub's library takes them from HTTP_PROXY and HTTPS_PROXY"),
    "quantization_config": UnsupportedKeyword(
        (), "files that are quantised load without it, and are decoded to `dtype`"
    ),
    "token": UnsupportedKeyword((True,), "the hub's library has its own, from `hf auth login` or HF_TOKEN"),
    "use_flashpack": NO_FLASHPACK,
    "use_safetensors": UnsupportedKeyword((True,), "weights in pickles are never read"),
}
SAVING = {
    "is_main_process": UnsupportedKeyword((True,), "call it in one process"),
    "push_to_hub": UnsupportedKeyword((False,), "nothing is uploaded; `hf upload` does it"),
    "safe_serialization": UnsupportedKeyword((True,), "pickles are never written"),
    "save_function": UnsupportedKeyword((), "files are written by `ltx2ref.save`"),
    "use_flashpack": NO_FLASHPACK,
    "variant": UnsupportedKeyword(
        (), "the files have diffusers' plain names; save each variant to a folder of its own"
    ),
}


def refuse_keywords(
    given: Mapping[str, Any], unsupported: Mapping[str, UnsupportedKeyword], taken: Iterable[str]
) -> None:
    """Raise for keywords that are unknown (`TypeError`), or that ask for what is not done (`ValueError`)."""
    for name, value in given.items():
        if name not in unsupported:
            raise TypeError(f"{name}: unknown keyword; expected one of {', '.join(taken)}")
        harmless, reason = unsupported[name]
        if value not in (None, *harmless):
            raise ValueError(f"{name} = {value!r} is not supported: {reason}")


def one_device(device: Device | None, device_map: Device | Mapping[str, Device] | None) -> torch.device:
    """Return the device that `device` or diffusers' `device_map` names; the CPU if neither does.

    Raises `ValueError` for two different ones, and for a map that shares the model out.
    """
    if isinstance(device_map, Mapping):
        if [*device_map] != [""]:
            raise ValueError(f"device_map = {device_map!r} is not supported: {ONE_DEVICE.reason}")
        device_map = device_map[""]
    if device_map in SHARING_OUT:
        raise ValueError(f"device_map = {device_map!r} is not supported: {ONE_DEVICE.reason}")
    named = {name: as_device(name, x) for name, x in (("device", device), ("device_map", device_map)) if x is not None}
    if len({*named.values()}) > 1:
        raise ValueError(f"device = {device!r} and device_map = {device_map!r} mean the same: expected one of them")
    return next(iter(named.values()), torch.device("cpu"))


def as_device(name: str, device: Device) -> torch.device:
    """Return the device that an argument names. Raises `ValueError` if there is none of that name."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{name} = {device!r}: expected a device, such as 'cpu' or 'cuda:0'") from None
