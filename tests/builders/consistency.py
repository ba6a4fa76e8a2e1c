"""Shared by the tests: consistency methods from short settings, batches for them and perturbed networks."""

from typing import Any

import torch

from fewstep.config import MethodConfig
from fewstep.diffusion.grids import Grid
from fewstep.methods.base import Batch
from fewstep.methods.registry import method_class, settings_class

OPTIM = {"lr": 1e-4}
SHORT: dict[str, Any] = {
    "solver_steps": 50, "steps": 10, "grid": "even", "solver": "ddim", "target_step": "solver", "tuning": None,
    "lognormal": None, "weighting": "none", "endpoint": "x0", "phases": 1, "sampling": "renoise", "states": "noised_data",
    "rollout": "shared", "stored": None, "skip": 1, "rollout_segments": 8, "replay": 0, "student_steps": 4,
    "teacher_steps": 1, "reward": None, "reward_weight": None, "reward_samples": 16, "reward_ceiling": None, "gan_weight": 0.0,
    "gan_layers": None, "stages": (), "guidance_range": (3.0, 8.0), "embed_guidance": True, "keep_guidance": False,
    "null_share": 0.1, "export_guidance_scale": None, "target_decay": 0.95, "distance": "l2", "huber_c": 1e-3,
    "timestep_scaling": 10.0, "dropout": None,
}  # fmt: skip
"""What `sections` takes, and what it is if it is not given: one key for each choice, whatever the method."""


def sections(**short: Any) -> dict[str, Any]:
    """Settings as a recipe has them, of the method that is the first to have all that is asked for."""
    name, optim = short.pop("name", None), short.pop("optim", OPTIM)
    if unknown := short.keys() - SHORT.keys():
        raise ValueError(f"unknown {unknown}")
    f = SHORT | short
    name = name or _name(f)
    made: dict[str, Any] = {"name": name, "optim": optim, "steps": f["steps"], "guidance": _guidance(f)}
    made |= {"distance": _distance(f), "dropout": f["dropout"]}
    if name == "trajectory":
        return made | {"points": f["solver_steps"], "trajectories": f["stored"], "endpoint": _endpoint(f)}
    made["target"] = _target(f)
    if name == "ect":
        lognormal = f["lognormal"] and list(f["lognormal"])
        return made | {"gap": f["tuning"], "lognormal": lognormal, "weighting": f["weighting"]}
    made["states"] = _states(f)
    if name in ("cd", "lcm"):
        made |= {"grid": {"kind": f["grid"], "points": f["solver_steps"]}, "endpoint": _endpoint(f)}
        return made | ({"weighting": f["weighting"]} if name == "cd" else {"reward": _reward(f)})
    made |= {"points": f["solver_steps"], "sampling": f["sampling"]}
    if name == "pcm":
        gan = {"weight": f["gan_weight"], "layers": f["gan_layers"]} if f["gan_weight"] else None
        share = f["null_share"] if f["keep_guidance"] else None
        return made | {"phases": f["phases"], "adversarial": gan, "null_share": share}
    return made | {"stages": [_stage(f, stage) for stage in f["stages"] or ({},)], "reward": _reward(f)}


def config(**short: Any) -> Any:
    """The settings that `sections` has made, checked; an object, for which tests know the class."""
    made = sections(**short)
    return settings_class(made["name"]).model_validate(made)


def consistency(settings: MethodConfig, teacher: Any) -> Any:
    """The method of settings."""
    return method_class(settings.name)(settings, teacher)


def grid_of(method: Any, stage: int = 0) -> Grid:
    """The timesteps of a method's stage, as they are in the first iteration."""
    points = method.stages[stage].parts.states.draw.points
    return points.at(torch.arange(len(points.t)), 0)


def _name(f: dict[str, Any]) -> str:
    if f["target_step"] == "end":
        return "trajectory"
    if f["tuning"]:
        return "ect"
    if f["stages"] or (f["endpoint"] == "phase" and (f["reward"] or f["states"] == "student_rollout")):
        return "mlcm"
    if f["endpoint"] == "phase":
        return "pcm"
    return "cd" if f["grid"] == "karras" or f["weighting"] != "none" else "lcm"


def _guidance(f: dict[str, Any]) -> dict[str, Any] | None:
    if f["guidance_range"] is None:
        return None
    return {"range": f["guidance_range"], "embed": f["embed_guidance"], "export_scale": f["export_guidance_scale"]}


def _distance(f: dict[str, Any]) -> dict[str, Any]:
    return {"kind": f["distance"]} | ({"c": f["huber_c"]} if "huber" in f["distance"] else {})


def _endpoint(f: dict[str, Any]) -> dict[str, Any]:
    if f["endpoint"] == "x0_plain":
        return {"kind": "plain"}
    return {"kind": "boundary", "timestep_scaling": f["timestep_scaling"]}


def _target(f: dict[str, Any]) -> dict[str, Any]:
    if f["target_step"] == "same_noise":
        return {"kind": "same_noise", "decay": f["target_decay"]}
    if f["states"] == "trajectory" and f["rollout"] == "stored":
        return {"kind": "next_state", "skip": f["skip"], "decay": f["target_decay"]}
    steps = f["teacher_steps"]
    return {"kind": "solver", "solver": f["solver"], "steps_per_point": steps, "decay": f["target_decay"]}


def _states(f: dict[str, Any]) -> dict[str, Any]:
    if f["states"] == "student_rollout":
        return {"kind": "student_rollout", "steps": f["student_steps"]}
    if f["states"] == "noised_data":
        return {"kind": "noised_data", "lognormal": f["lognormal"]}
    segments, replay = {"segments": f["rollout_segments"]}, {"replay": f["replay"]}
    return {
        "shared": {"kind": "shared_trajectories"} | segments | replay,
        "solver": {"kind": "solver_trajectories"} | replay,
        "sample": {"kind": "sampled_trajectories"} | segments,
        "stored": {"kind": "stored_trajectories", "lognormal": f["lognormal"]} | (f["stored"] or {}),
    }[f["rollout"]]


def _reward(f: dict[str, Any]) -> dict[str, Any] | None:
    if f["reward"] is None:
        return None
    found = {"name": f["reward"], "weight": f["reward_weight"] or 1.0, "samples": f["reward_samples"]}
    return found | {"ceiling": f["reward_ceiling"], "steps": f["student_steps"]}


def _stage(f: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    endpoint, own = stage.get("endpoint", f["endpoint"]), f | stage
    made = {"phases": own["phases"] if endpoint == "phase" else None, "points": own["solver_steps"]}
    made |= {key: stage[key] for key in ("iterations", "lr", "reward_weight") if key in stage}
    if f["reward"] and f["stages"] and "reward_weight" not in stage:
        made["reward_weight"] = f["reward_weight"] or 0.0
    if "teacher_steps" in stage:
        made["steps_per_point"] = stage["teacher_steps"]
    return made | ({"states": _states(own)} if "states" in stage else {})


def batch_for(teacher, size=4):
    g = torch.Generator().manual_seed(3)
    x0 = torch.randn(size, *teacher.latent_shape, generator=g)
    prompts = ["a coat", "a bag", "", "a shirt"][:size]
    return Batch(size, teacher.condition(prompts), teacher.null_condition(size), torch.device("cpu"), latents=x0)


def nets_for(method, perturb=0.02):
    nets = {name: role.net for name, role in method.roles().items()}
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in ("student", "target"):
            if name in nets:
                for p in nets[name].parameters():
                    p.add_(perturb * torch.randn(p.shape, generator=g))
    return nets
