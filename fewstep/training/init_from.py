"""Weights that a run starts from: a checkpoint of an earlier run, or the pipeline that one exported."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.methods.base import Role
from fewstep.teachers import NETWORKS
from fewstep.teachers.denoiser import Denoiser, own_tensors


def start_from(roles: dict[str, Role], folder: Path) -> None:
    """Fill learnt roles, and their followers with them; what a network has beyond the weights there stays as it is.

    folder: a checkpoint; or an exported pipeline, whose network is for the student alone.
    Raises FileNotFoundError where the folder has weights for none of the roles, ValueError where they do not fit.
    """
    found = _of_pipeline(roles, folder) if (folder / "model_index.json").exists() else _of_checkpoint(roles, folder)
    for name, (file, weights) in found.items():
        _fill(name, roles[name].net, file, weights)
        for role in roles.values():
            if role.follows == name:
                role.net.load_state_dict(own_tensors(roles[name].net), strict=False)


def _of_checkpoint(roles: dict[str, Role], folder: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    files = {name: folder / f"{name}.safetensors" for name, role in roles.items() if role.optim}
    found = {name: (file, load_file(file)) for name, file in files.items() if file.exists()}
    if not found:
        raise FileNotFoundError(
            f"train.init_from: {folder} holds none of {', '.join(file.name for file in files.values())}"
        )
    return found


def _of_pipeline(roles: dict[str, Role], folder: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    student = roles["student"].net
    assert isinstance(student, Denoiser)
    if student.shared:
        raise ValueError(
            f"train.init_from: {folder} is a pipeline, whose whole weights are no start for adapters: give a checkpoint of a run "
            "with train.student.kind: lora, or make that pipeline the teacher"
        )
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()).get("prediction_type")
    if kind is not None and kind != student.prediction_type:
        raise ValueError(f"train.init_from: {folder} predicts {kind}, the teacher {student.prediction_type}")
    files = sorted(file for part in NETWORKS for file in (folder / part).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"train.init_from: {folder} has no safetensors in {' or '.join(NETWORKS)}")
    weights = {f"net.{key}": value for file in files for key, value in load_file(file).items()}
    lacking = [key for key in roles["teacher"].net.state_dict() if key not in weights]
    if lacking:
        raise ValueError(
            f"train.init_from: {folder} lacks {lacking[0]}, which the teacher has: export made it part of other weights, and it "
            "would count twice"
        )
    return {"student": (files[0].parent, weights)}


def _fill(name: str, net: nn.Module, file: Path, weights: dict[str, Tensor]) -> None:
    own = own_tensors(net)
    # An embedding that was folded into other weights is left behind as zeros, and does nothing.
    weights = {key: value for key, value in weights.items() if key in own or value.any()}
    wrong = [key for key, value in weights.items() if key not in own or own[key].shape != value.shape]
    if wrong:
        raise ValueError(
            f"train.init_from: {file} does not fit the {name}: {len(wrong)} weights differ, first {wrong[0]}"
        )
    net.load_state_dict(weights, strict=False)
