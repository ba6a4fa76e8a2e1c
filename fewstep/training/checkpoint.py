"""Checkpoints that a kill at any moment leaves whole: written aside, then renamed; safetensors and JSON, no pickles."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep import io
from fewstep.teachers.denoiser import own_tensors


def pack_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The per-parameter tensors of an optimizer, as "<parameter>.<name>"; its hyper-parameters belong to the config."""
    packed: dict[str, Tensor] = {}
    seen: set[int] = set()
    for i, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            # bitsandbytes keeps some in a dictionary of their own, away from FSDP; it takes them back without.
            for key, v in value.items() if isinstance(value, dict) else [(name, value)]:
                tensor = torch.as_tensor(v).contiguous()
                # Its tables of eight-bit numbers are one tensor for all parameters, and a file shares none.
                packed[f"{i}.{key}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
                seen.add(tensor.data_ptr())
    return packed


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        # bitsandbytes counts its steps in whole numbers that are no tensors; torch's are float32.
        counted = value.ndim == 0 and value.dtype == torch.int64
        state.setdefault(int(i), {})[name] = value.item() if counted else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_state(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def save_module(module: nn.Module, path: Path) -> None:
    """Write the module's own tensors: of a network under adapters, these and what else it learns."""
    save_file({k: v.detach().contiguous().cpu() for k, v in own_tensors(module).items()}, path)


def load_module(module: nn.Module, path: Path) -> None:
    """Raises ValueError where the file holds other tensors than the module's own."""
    found = load_file(path)
    if different := found.keys() ^ own_tensors(module).keys():
        raise ValueError(
            f"{path} belongs to another kind of network ({len(different)} tensors differ, first {min(different)}): "
            "student, lora and what the method embeds have to be those of its run"
        )
    module.load_state_dict(found, strict=False)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [p for p in folder.glob("*") if p.name.isdigit() and (p / "state.json").exists()] if folder.exists() else []
    return sorted(found, key=lambda p: int(p.name))


def find(folder: Path, name: str) -> Path:
    """The checkpoint that `resume: NAME` means; "latest" is the newest whole one.

    Raises:
        FileNotFoundError: there is none; says where it looked.
    """
    if name == "latest":
        found = checkpoints(folder)
        if not found:
            raise FileNotFoundError(
                f"checkpoint.resume: latest: no checkpoint in {folder}; leave it out to start from the beginning"
            )
        return found[-1]
    path = Path(name)
    if not (path / "state.json").exists():
        raise FileNotFoundError(f"checkpoint.resume: {path} is not a checkpoint (it has no state.json)")
    return path


def prune(folder: Path, keep: int) -> None:
    """Delete the oldest checkpoints beyond `keep`, and what interrupted writes left behind."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    io.prune(folder)
