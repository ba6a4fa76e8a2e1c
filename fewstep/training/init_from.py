"""Weights that a run starts from: a checkpoint of an earlier run, or the pipeline that one exported."""

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.errors import FewstepError, MissingError
from fewstep.methods.base import Role
from fewstep.teachers import NETWORKS
from fewstep.teachers.denoiser import Denoiser, own_tensors


def start_from(roles: dict[str, Role], folder: Path) -> None:
    """Fill learnt roles, and their followers with them; weights that the folder does not have are unchanged.

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
        raise MissingError(
            "train.init_from",
            f"{folder} without weights of a trained role",
            f"one of {', '.join(file.name for file in files.values())} in it",
        )
    return found


def _of_pipeline(roles: dict[str, Role], folder: Path) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    student = roles["student"].net
    assert isinstance(student, Denoiser)
    if student.shared:
        raise FewstepError(
            "train.init_from",
            f"{folder}, a pipeline of whole weights",
            "a checkpoint of a run with train.student.kind lora",
            "Or make that pipeline the teacher",
        )
    kind = json.loads((folder / "scheduler" / "scheduler_config.json").read_text()).get("prediction_type")
    if kind is not None and kind != student.prediction_type:
        raise FewstepError(
            "train.init_from", f"{folder}, which predicts {kind}", f"{student.prediction_type}, as the teacher"
        )
    files = sorted(file for part in NETWORKS for file in (folder / part).glob("*.safetensors"))
    if not files:
        raise MissingError("train.init_from", f"no safetensors in {folder}", f"some in {' or '.join(NETWORKS)}")
    weights = {f"net.{key}": value for file in files for key, value in load_file(file).items()}
    lacking = [key for key in roles["teacher"].net.state_dict() if key not in weights]
    if lacking:
        raise FewstepError(
            "train.init_from",
            f"{folder} without {lacking[0]}",
            "all of the teacher's weights",
            "Export folded it into other weights, where it would count twice; start from the run's checkpoint",
        )
    return {"student": (files[0].parent, weights)}


def _fill(name: str, net: nn.Module, file: Path, weights: dict[str, Tensor]) -> None:
    own = own_tensors(net)
    # An embedding that was folded into other weights is left behind as zeros, and does nothing.
    weights = {key: value for key, value in weights.items() if key in own or value.any()}
    wrong = [key for key, value in weights.items() if key not in own or own[key].shape != value.shape]
    if wrong:
        raise FewstepError(
            "train.init_from",
            f"{file}, where {len(wrong)} weights differ, first {wrong[0]}",
            f"weights of the {name}",
        )
    net.load_state_dict(weights, strict=False)
