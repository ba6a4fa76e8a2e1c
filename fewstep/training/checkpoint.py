"""Checkpoints that a kill at any moment leaves whole: written aside, then renamed; safetensors and JSON, no pickles."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep import io
from fewstep.data import Stream
from fewstep.errors import FewstepError, MissingError
from fewstep.methods.base import Method
from fewstep.teachers.denoiser import own_tensors
from fewstep.training.early_stopping import EarlyStopping, StoppingState
from fewstep.training.roles import Roles

if TYPE_CHECKING:
    from accelerate import Accelerator

RANKS = "ranks"
"""The name under which all processes of a run write into one checkpoint."""


class StateFile(TypedDict, total=False):
    """state.json."""

    iteration: int
    updates: dict[str, int]
    nonfinite: int
    best: dict[str, float]
    patience: StoppingState
    data: dict[str, int]
    num_processes: int


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        iteration: iterations that are done.
        nonfinite: updates in a row that were not finite.
        best: "fid" and "iteration" of the best weights, in best.safetensors; empty for none.
        stopping: early stopping on that score.
    """

    stopping: EarlyStopping
    best: dict[str, float]
    iteration: int = 0
    nonfinite: int = 0


@dataclass(frozen=True)
class Checkpointer:
    """Writes and reads all that exact resume needs.

    Attributes:
        folder: of the checkpoints, each a folder by the number of its iteration.
        keep: how many are kept, newest first.
    """

    folder: Path
    keep: int
    accelerator: "Accelerator"
    roles: Roles
    method: Method
    stream: Stream

    def save(self, progress: Progress) -> Path:
        """Write a checkpoint; a failed write leaves the last one whole. Called on all processes."""
        path, a = self.folder / f"{progress.iteration}", self.accelerator
        partial = io.partial_path(path, RANKS)
        partial.mkdir(parents=True, exist_ok=True)
        save_file(rng_state(a.device), partial / f"rng_{a.process_index}.safetensors")
        if own := self.method.state():
            named = {k: v.contiguous().cpu() for k, v in own.items()}
            save_file(named, partial / f"method_{a.process_index}.safetensors")
        a.wait_for_everyone()
        if a.is_main_process:
            with io.atomic(path, RANKS) as aside:
                self._write_roles(aside)
                io.write_json(self._state(progress), aside / "state.json")
            prune(self.folder, self.keep)
        a.wait_for_everyone()
        return path

    def _write_roles(self, folder: Path) -> None:
        for name, role in self.roles.items():
            if role.changes:
                save_module(role.net, folder / f"{name}.safetensors")
        for name, role in self.roles.items():
            if role.optimizer is not None:
                save_file(pack_optimizer(role.optimizer), folder / f"{name}_optimizer.safetensors")

    def _state(self, progress: Progress) -> StateFile:
        return {
            "iteration": progress.iteration,
            "updates": {name: role.updates for name, role in self.roles.items() if role.optimizer is not None},
            "nonfinite": progress.nonfinite, "best": progress.best, "patience": progress.stopping.state(),
            "data": self.stream.state_dict(), "num_processes": self.accelerator.num_processes,
        }  # fmt: skip

    def load(self, name: str, progress: Progress) -> None:
        """Go on from a checkpoint ("latest" or a folder), bit for bit on the same number of processes.

        Raises FewstepError where the number of processes differs, or weights do not fit, MissingError for no checkpoint.
        """
        path, a = find(self.folder, name), self.accelerator
        state: StateFile = io.read_json(path / "state.json")
        if state["num_processes"] != a.num_processes:
            raise FewstepError(
                "checkpoint.resume", f"{path}, written by {state['num_processes']} processes",
                f"the number of this run, {a.num_processes}", "Exact resume needs the same number of processes",
            )  # fmt: skip
        for role, its in self.roles.items():
            if its.changes:
                load_module(its.net, path / f"{role}.safetensors")
        for role, its in self.roles.items():
            if its.optimizer is not None:
                unpack_optimizer(its.optimizer, load_file(path / f"{role}_optimizer.safetensors"))
                its.updates = state["updates"][role]
        progress.iteration, progress.nonfinite = state["iteration"], state["nonfinite"]
        progress.best = state["best"]
        if "patience" in state:  # not in checkpoints of early versions
            progress.stopping.load_state(state["patience"])
        self.stream.load_state_dict(state["data"])
        set_rng_state(load_file(path / f"rng_{a.process_index}.safetensors"), a.device)
        if (own := path / f"method_{a.process_index}.safetensors").exists():
            self.method.load_state({k: v.to(a.device) for k, v in load_file(own).items()})


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
    """Undo `pack_optimizer`."""
    state: dict[int, dict[str, Tensor | int | float]] = {}
    for key, value in tensors.items():
        i, name = key.split(".", 1)
        # bitsandbytes counts its steps in whole numbers that are no tensors; torch's are float32.
        counted = value.ndim == 0 and value.dtype == torch.int64
        state.setdefault(int(i), {})[name] = value.item() if counted else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators that a process on the device draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def save_module(module: nn.Module, path: Path) -> None:
    """Write the module's own tensors: of a network under adapters, these and its other trained tensors."""
    save_file({k: v.detach().contiguous().cpu() for k, v in own_tensors(module).items()}, path)


def load_module(module: nn.Module, path: Path) -> None:
    """Read the module's own tensors. Raises FewstepError where the file holds others."""
    found = load_file(path)
    if different := found.keys() ^ own_tensors(module).keys():
        raise FewstepError(
            "checkpoint", f"{path}, of another kind of network ({len(different)} tensors differ, first {min(different)})",
            "that of this run", "train.student and what the method embeds have to be those of the checkpoint's run",
        )  # fmt: skip
    module.load_state_dict(found, strict=False)


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [p for p in folder.glob("*") if p.name.isdigit() and (p / "state.json").exists()] if folder.exists() else []
    return sorted(found, key=lambda p: int(p.name))


def find(folder: Path, name: str) -> Path:
    """The checkpoint that `resume: NAME` means; "latest" is the newest whole one.

    Raises MissingError where there is none.
    """
    if name == "latest":
        found = checkpoints(folder)
        if not found:
            raise MissingError(
                "checkpoint.resume", f"latest with no checkpoint in {folder}", "a checkpoint",
                "Leave it out to start from the beginning",
            )  # fmt: skip
        return found[-1]
    path = Path(name)
    if not (path / "state.json").exists():
        raise MissingError("checkpoint.resume", f"{path}, which has no state.json", "a checkpoint's folder")
    return path


def prune(folder: Path, keep: int) -> None:
    """Delete the oldest checkpoints beyond `keep`, and what interrupted writes left behind."""
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    io.prune(folder)
