"""What the processes of a run compare before they work: numbers by which two sets of weights are told apart."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn


def held(sora: Any) -> dict[str, str]:
    """What the clip depends on and is here, in a number for each part."""
    numbers = {}
    dits = {"transformer": sora.dit, "second transformer": sora.second}
    dits = {name: dit for name, dit in dits.items() if dit is not None}
    for (name, dit), loras in zip(dits.items(), sora._loras, strict=True):
        if not dit.head_table.is_meta:  # of an expert whose weights are on other processes
            numbers |= {f"LoRA files of the {name}": loras.checksum(), name: checksum(dit)}
    coders = {"VAE": sora.vae, "text encoder": sora.text, "image encoder": sora.image}
    numbers |= {name: checksum(getattr(part, "model", part)) for name, part in coders.items() if part is not None}
    return {f"the checksum of the {name}": number for name, number in numbers.items()}


def checksum(module: nn.Module) -> str:
    """As `checkpoint.fingerprint`, for comparing within a run, at the price of reading the weights where they are: of
    their names, dtypes, shapes and the sums of their bits, and of the module's own config. Weights that have no memory
    here, or are divided among processes, are left out."""
    config = getattr(module, "config", None)
    told = [repr(config) if type(config).__module__.startswith(f"{__package__}.") else ""]  # others' name their folder
    for name, value in sorted(module.state_dict().items()):
        if not (value.is_meta or hasattr(value, "placements")):
            told.append(f"{name} {value.dtype} {list(value.shape)} {sum_of_bits(value)}")
    return f"{zlib.crc32(repr(told).encode()):08x}"


def sum_of_bits(t: Tensor) -> int:
    """Of the words of 64 bits, modulo 2⁶⁴, and of the bytes that are left: the same on every device."""
    found = octets(t)
    found = found.clone() if found.storage_offset() % 8 else found
    whole = len(found) // 8 * 8
    return int(found[:whole].view(torch.int64).sum()) + int(found[whole:].sum())


def octets(t: Tensor) -> Tensor:
    """Its bytes, in order."""
    flat = t.detach().flatten()
    flat = flat if flat.stride() == (1,) else flat.clone(memory_format=torch.contiguous_format)  # of one element, too
    return flat.view(torch.uint8)
