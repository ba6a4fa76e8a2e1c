"""What the golden numbers are of: one line of data for each case; names are permanent.

A method here is a name of the registry; settings are its own without the optimizer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

from builders.families import build_dit, build_edm, build_flux, build_pixart, build_sana, build_sd3, build_sdxl
from builders.pipelines import build_ddpm, build_sd
from fewstep.config import merged


@dataclass(frozen=True)
class Case:
    """A method with its settings on a tiny teacher of FAMILIES.

    Attributes:
        iterations: those that are run, one after the other, on the same method; weights stay as they are between them.
        student: `full` or `lora`.
    """

    family: str
    method: str
    settings: dict[str, Any]
    iterations: tuple[int, ...] = (0,)
    student: str = "full"


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "sd": build_sd,
    "sd_epsilon": partial(build_sd, prediction_type="epsilon"),
    "sd_zero_snr": partial(build_sd, zero_terminal_snr=True),
    "ddpm": build_ddpm,
    "ddpm_grey": partial(build_ddpm, channels=1),
    "sdxl": build_sdxl,
    "dit": partial(build_dit, num_labels=1000),
    "pixart": build_pixart,
    "pixart_sigma": partial(build_pixart, sigma=True),
    "sd3": build_sd3,
    "sd35": partial(build_sd3, medium=True),
    "flux": build_flux,
    "flux_schnell": partial(build_flux, schnell=True),
    "sana": build_sana,
    "sana_euler": partial(build_sana, solver=False),
    "edm": build_edm,
    "edm_unlabelled": partial(build_edm, num_labels=None),
}
CONTRACT = ("sd", "ddpm", "sdxl", "dit", "pixart", "sd3", "flux", "sana", "edm")
"""Families that have every base method."""
VARIANTS = (
    "sd_epsilon",
    "sd_zero_snr",
    "pixart_sigma",
    "sd35",
    "flux_schnell",
    "sana_euler",
    "ddpm_grey",
    "edm_unlabelled",
)
"""Families that have two of them."""
BATCH_SIZES = {
    "sd": 3,
    "sd_epsilon": 3,
    "sd_zero_snr": 3,
    "ddpm": 3,
    "flux": 1,
    "flux_schnell": 1,
    "sana": 1,
    "sana_euler": 1,
}
"""Where it is not 2."""

LATENT_SIDES = {"flux": 16, "flux_schnell": 16}
"""Where it is not the pipeline's own, whose many pixels take their time."""
TEXT_IN_FLOAT32 = ("sana", "sana_euler")
"""Whose tiny tokenizer makes no token of an empty prompt; in float64 its encoding then is not a number."""

# The five base methods on every family ----------------------------------------------------------------------------------

GUIDED: dict[str, Any] = {"guidance": {"range": [1.0, 3.0], "export_scale": 2.0}}
SOLVER = {"kind": "solver", "decay": 0.95}
LCM: dict[str, Any] = {"grid": {"kind": "even", "points": 8}, "steps": 4, "target": SOLVER, **GUIDED}
PCM: dict[str, Any] = {"points": 8, "steps": 4, "phases": 4, "sampling": "renoise", "target": SOLVER, **GUIDED}
MLCM: dict[str, Any] = {
    "points": 8, "steps": 4, "stages": [{"phases": 4}], "states": {"kind": "shared_trajectories", "replay": 4},
    "target": SOLVER, **GUIDED,
}  # fmt: skip
DMD2 = {"steps": 4, "guidance": {"scale": 2.0}, "adversarial": {"weight": 0.1}, "student_update_every": 2}
BOOT = {"steps": 2, "n_sub": 4, "guidance": {"scale": 2.0}}
SCM = {"steps": 4, "guidance": {"range": [1.0, 3.0], "export_scale": 2}, "warmup_iterations": 0}
BASE: dict[str, Case] = {
    "consistency": Case("", "lcm", LCM),
    "mlcm": Case("", "mlcm", MLCM, iterations=(0, 1)),
    "dmd2": Case("", "dmd2", DMD2, iterations=(0, 1)),
    "boot": Case("", "boot", BOOT),
    "scm": Case("", "scm", SCM),
}
UNGUIDABLE = ("ddpm", "ddpm_grey", "edm", "edm_unlabelled")
KARRAS = {"kind": "karras", "points": 18}
HEUN = SOLVER | {"solver": "heun"}
ONE_JUMP: dict[str, dict[str, Any]] = {
    "consistency": {"grid": {"kind": "karras", "points": 8}, "target": HEUN},
    "mlcm": {"stages": [{"phases": 1}]},
    "boot": {"steps": 1},
}
"""For EDM's, whose stock pipeline takes one deterministic step."""


def base_case(family: str, method: str) -> Case:
    case = BASE[method]
    settings = dict(case.settings)
    if family in UNGUIDABLE:
        settings["guidance"] = {"scale": 1.0} if "scale" in settings["guidance"] else None
    if family in ("edm", "edm_unlabelled"):
        settings |= ONE_JUMP.get(method, {})
        if method == "consistency":
            case = replace(case, method="cd")
    return replace(case, family=family, settings=settings)


FAMILY_CASES = {f"{family}/{method}": base_case(family, method) for family in CONTRACT for method in BASE}
VARIANT_CASES = {
    f"{family}/{method}": base_case(family, method) for family in VARIANTS for method in ("consistency", "dmd2")
}
SAMPLERS = tuple(FAMILY_CASES)
"""Cases whose exported scheduler is compared, too."""

# Every variant on Stable Diffusion --------------------------------------------------------------------------------------

FREE: dict[str, Any] = {"guidance": None}
LIVE = {"guidance": {"range": [1.0, 3.0]}}
BLIND = {"guidance": {"range": [1.0, 3.0], "embed": False}}
OWN = {"kind": "solver", "decay": None}
PLAIN = {"endpoint": {"kind": "plain"}}
SAME_NOISE = {"kind": "same_noise", "decay": 0.95}
CD = LCM | {"grid": KARRAS}
KEPT = FREE | {"null_share": 0.5}
ECT: dict[str, Any] = {"steps": 2, "gap": {"q": 2.0, "double_iterations": 10}}
SHARED = {"kind": "shared_trajectories"}
ROLLOUT = {"kind": "student_rollout"}
GAN = {"adversarial": {"weight": 0.1}}
REWARD = {"name": "clip@fashion", "samples": 2}
STORED: dict[str, Any] = {
    "points": 8, "steps": 8, "trajectories": {"count": 5, "batch_size": 3}, "distance": {"kind": "l2"}, **GUIDED,
}  # fmt: skip
NEXT: dict[str, Any] = {
    "grid": {"kind": "even", "points": 8}, "steps": 8, "target": {"kind": "next_state", "decay": 0.95},
    "states": {"kind": "stored_trajectories", "count": 5, "batch_size": 3}, **GUIDED,
}  # fmt: skip
STAGES = [
    {"iterations": 2, "phases": 4, "reward_weight": 0.0},
    {
        "iterations": 2, "phases": 2, "states": ROLLOUT, "points": 16, "steps_per_point": 2, "lr": 1e-4,
        "reward_weight": 0.0,
    },
    {"iterations": 2, "phases": 1, "states": {"kind": "noised_data"}, "reward_weight": 0.0},
    {"phases": None},
]  # fmt: skip

CONSISTENCY: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "lcm-student-as-target": ("lcm", LCM | {"target": OWN}, (0,)),
    "lcm-live-guidance": ("lcm", LCM | LIVE, (0,)),
    "lcm-guidance-not-embedded": ("lcm", LCM | BLIND, (0,)),
    "lcm-unguided": ("lcm", LCM | FREE, (0,)),
    "lcm-scale-for-each-step": (
        "lcm", LCM | {"guidance": {"range": [1.0, 3.0], "export_scale": [3.0, 2.0, 2.0, 1.0]}}, (0,),
    ),
    "lcm-pseudo-huber": ("lcm", LCM | {"distance": {"kind": "pseudo_huber"}}, (0,)),
    "lcm-pseudo-huber-sample": ("lcm", LCM | {"distance": {"kind": "pseudo_huber_sample", "c": 0.03}}, (0,)),
    "lcm-norm": ("lcm", LCM | {"distance": {"kind": "pseudo_huber_sample", "c": 0.0}}, (0,)),
    "lcm-weighting-inverse-gap": ("cd", LCM | {"weighting": "inverse_gap"}, (0,)),
    "lcm-weighting-edm": ("cd", LCM | {"weighting": "edm"}, (0,)),
    "lcm-lognormal": ("lcm", LCM | {"states": {"kind": "noised_data", "lognormal": [-0.5, 1.0]}}, (0,)),
    "lcm-x0-plain": ("lcm", LCM | PLAIN, (0,)),
    "lcm-heun": ("lcm", LCM | {"target": HEUN}, (0,)),
    "lcm-two-teacher-steps": ("lcm", LCM | {"target": SOLVER | {"steps_per_point": 2}}, (0,)),
    "lcm-heun-three-teacher-steps": ("lcm", LCM | {"target": HEUN | {"steps_per_point": 3}}, (0,)),
    "lcm-timestep-scaling": ("lcm", LCM | {"endpoint": {"kind": "boundary", "timestep_scaling": 0.01}}, (0,)),
    "lcm-same-noise": ("lcm", LCM | FREE | {"target": SAME_NOISE}, (0,)),
    "lcm-dropout": ("lcm", LCM | {"dropout": 0.3, "target": OWN}, (0,)),
    "lcm-dropout-target-network": ("lcm", LCM | {"dropout": 0.3}, (0,)),
    "cd-karras-heun": ("cd", CD | FREE | PLAIN | {"target": HEUN}, (0,)),
    "cd-karras-guided-rho": ("cd", CD | {"grid": KARRAS | {"rho": 3.0}}, (0,)),
    "cd-karras-lognormal-edm": (
        "cd", CD | FREE | {"states": {"kind": "noised_data", "lognormal": [-1.0, 1.4]}, "weighting": "edm"}, (0,),
    ),
    "ect": ("ect", ECT, (0, 9, 35)),
    "ect-edm-weighting": ("ect", ECT | {"weighting": "edm", "distance": {"kind": "l2"}}, (35,)),
    "ect-dropout": ("ect", ECT | {"dropout": 0.3}, (35,)),
    "ect-target-network": ("ect", ECT | {"target": SAME_NOISE}, (35,)),
    "ect-q-k-b": ("ect", ECT | {"gap": {"q": 4.0, "k": 3.0, "b": 0.5, "double_iterations": 10}}, (15,)),
    "ect-teacher-step": ("ect", ECT | GUIDED | {"target": OWN, "lognormal": None}, (35,)),
    "pcm": ("pcm", PCM, (0,)),
    "pcm-jump": ("pcm", PCM | {"sampling": "jump"}, (0,)),
    "pcm-two-phases-heun": ("pcm", PCM | {"phases": 2, "target": HEUN}, (0,)),
    "pcm-uneven-phases": ("pcm", PCM | {"points": 12, "steps": 3, "phases": 3, "sampling": "jump"}, (0,)),
    "pcm-same-noise": ("pcm", PCM | FREE | {"target": SAME_NOISE}, (0,)),
    "pcm-stages": (
        "mlcm",
        MLCM | {
            "sampling": "jump", "states": {"kind": "noised_data"},
            "stages": [{"iterations": 2, "phases": 4}, {"phases": 2, "lr": 1e-4}],
        },
        (0, 2),
    ),
    "pcm-gan-hinge": ("pcm", PCM | GAN, (0,)),
    "pcm-gan-softplus": ("pcm", PCM | {"adversarial": {"weight": 0.1, "loss": "softplus"}}, (0,)),
    "pcm-gan-layers": (
        "pcm", PCM | {"adversarial": {"weight": 0.1, "layers": ["down_blocks.1", "mid_block"]}}, (0,),
    ),
    "pcm-gan-two-phases-unguided": ("pcm", PCM | FREE | GAN | {"phases": 2}, (0,)),
    "pcm-keep-guidance": ("pcm", PCM | KEPT, (0,)),
    "pcm-keep-guidance-gan": ("pcm", PCM | KEPT | GAN, (0,)),
    "trajectory-shared": ("pcm", PCM | {"states": SHARED | {"segments": 4}}, (0, 1, 2)),
    "trajectory-shared-x0-two-teacher-steps": (
        "lcm", LCM | {"states": SHARED | {"segments": 2}, "target": SOLVER | {"steps_per_point": 2}}, (0, 1, 2),
    ),
    "trajectory-shared-unguided": ("pcm", PCM | FREE | {"states": SHARED | {"segments": 4}}, (0, 1)),
    "trajectory-shared-keep-guidance": ("pcm", PCM | KEPT | {"states": SHARED}, (0, 1)),
    "trajectory-solver": ("pcm", PCM | {"states": {"kind": "solver_trajectories"}, "target": HEUN}, (0, 1, 2)),
    "trajectory-solver-replay": ("pcm", PCM | {"states": {"kind": "solver_trajectories", "replay": 5}}, (0, 1, 2, 3)),
    "trajectory-sample": ("pcm", PCM | {"states": {"kind": "sampled_trajectories", "segments": 4}}, (0, 1)),
    "trajectory-gan": ("pcm", PCM | GAN | {"states": SHARED}, (0,)),
    "trajectory-replay": ("pcm", PCM | {"states": SHARED | {"replay": 7, "segments": 3}}, (0, 1, 2, 3, 4)),
    "mlcm-stages-reward": ("mlcm", MLCM | {"reward": REWARD | {"weight": 0.5}, "stages": STAGES}, (0, 1, 2, 4, 6)),
    "mlcm-reward-ceiling": (
        "mlcm", MLCM | {"reward": REWARD | {"weight": 0.1, "ceiling": 70.0, "steps": 2}}, (0, 1),
    ),
    "mlcm-reward-unguided-jump": (
        "mlcm",
        MLCM | FREE | {"states": SHARED, "sampling": "jump", "reward": REWARD | {"weight": 0.1, "samples": 16}},
        (0, 1),
    ),
    "student-rollout": ("lcm", LCM | {"states": ROLLOUT}, (0,)),
    "student-rollout-jump": ("mlcm", MLCM | {"states": ROLLOUT | {"steps": 2}, "sampling": "jump"}, (0,)),
    "student-rollout-unguided": ("lcm", LCM | FREE | PLAIN | {"states": ROLLOUT}, (0,)),
    "student-rollout-reward": ("lcm", LCM | {"states": ROLLOUT, "reward": REWARD | {"weight": 0.2}}, (0, 1)),
    "stored-end": ("trajectory", STORED, (0,)),
    "stored-end-unguided-x0-plain-ddim": (
        "trajectory", STORED | FREE | PLAIN | {"trajectories": {"count": 4, "solver": "ddim", "substeps": 1}}, (0,),
    ),
    "stored-target-network": ("lcm", NEXT, (0,)),
    "stored-student-as-target-lognormal": (
        "lcm",
        NEXT | {
            "target": {"kind": "next_state", "decay": None},
            "states": {"kind": "stored_trajectories", "count": 5, "batch_size": 3, "lognormal": [0.0, 1.5]},
        },
        (0,),
    ),
}  # fmt: skip


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """Settings, each changed by the next at any depth."""
    return reduce(merged, parts)


PAIRS = {"count": 4, "solver_steps": 4, "batch_size": 3}
ONE_STEP = joined(DMD2, {"steps": 1, "adversarial": None})
NO_GAN = joined(DMD2, {"adversarial": None})
APART = {"guidance": {"noise_range": [0.3, 0.9]}}
DISTRIBUTION: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "dmd2-no-gan": (NO_GAN, (0, 1)),
    "dmd2-unguided": (joined(DMD2, {"guidance": {"scale": 1.0}}), (0,)),
    "dmd2-other-stops": (joined(NO_GAN, {"student_update_every": 1}), (1, 2, 3)),
    "dmd2-dm-range": (joined(NO_GAN, {"matching": {"range": [0.5, 0.7], "weight": 0.5}}), (0,)),
    "dmd2-decoupled": (joined(DMD2, APART), (0,)),
    "dmd2-decoupled-no-gan": (joined(NO_GAN, APART), (0,)),
    "dmd2-forward-kl": (joined(DMD2, {"matching": {"divergence": "forward_kl"}}), (0,)),
    "dmd2-jensen-shannon": (joined(DMD2, {"matching": {"divergence": "jensen_shannon"}}), (0,)),
    "dmd2-jensen-shannon-decoupled": (joined(DMD2, APART, {"matching": {"divergence": "jensen_shannon"}}), (0,)),
    "dmd2-gan-hinge": (joined(DMD2, {"adversarial": {"loss": "hinge"}}), (0,)),
    "dmd2-gan-only": (joined(DMD2, {"matching": None}), (0,)),
    "dmd2-gan-range": (joined(DMD2, {"adversarial": {"range": [0.1, 0.6], "critic_weight": 0.5}}), (0,)),
    "dmd2-gan-share-noise": (joined(DMD2, {"adversarial": {"share_noise": True}}), (0, 1)),
    "dmd2-gan-share-noise-hinge-r1": (
        joined(DMD2, {"adversarial": {"share_noise": True, "loss": "hinge", "r1_weight": 1.0}}),
        (0,),
    ),
    "dmd2-gan-share-noise-forward-kl": (
        joined(DMD2, {"adversarial": {"share_noise": True}, "matching": {"divergence": "forward_kl"}}),
        (0,),
    ),
    "dmd2-gan-share-noise-decoupled": (joined(DMD2, APART, {"adversarial": {"share_noise": True}}), (0,)),
    "dmd2-gan-real-teacher": (joined(DMD2, {"adversarial": {"real": "teacher"}, "pairs": PAIRS}), (0,)),
    "dmd2-gan-real-teacher-other-guidance": (
        joined(DMD2, {"adversarial": {"real": "teacher"}, "pairs": PAIRS | {"guidance_scale": 1.0}}),
        (0,),
    ),
    "dmd2-gan-teacher-features": (joined(DMD2, {"adversarial": {"feature_source": "teacher"}}), (0,)),
    "dmd2-gan-teacher-features-forward-kl-r1": (
        joined(
            DMD2,
            {"adversarial": {"feature_source": "teacher", "r1_weight": 1.0}, "matching": {"divergence": "forward_kl"}},
        ),
        (0,),
    ),
    "dmd2-gan-layers": (joined(DMD2, {"adversarial": {"layers": ["mid_block", "up_blocks.0"]}}), (0,)),
    "dmd2-r1": (joined(DMD2, {"adversarial": {"r1_weight": 1.0}}), (0,)),
    "dmd2-noised-data": (joined(DMD2, {"inputs": "noised_data"}), (0,)),
    "dmd2-noised-data-no-gan": (joined(NO_GAN, {"inputs": "noised_data"}), (0, 1)),
    "dmd2-two-given-timesteps": (joined(NO_GAN, {"steps": [999, 499]}), (0,)),
    "dmd2-spaced-timesteps": (joined(NO_GAN, {"steps": [749, 499, 249]}), (0, 1)),
    "dmd2-x0-float64": (joined(DMD2, {"x0_dtype": "float64"}), (0,)),
    "dmd-one-step": (ONE_STEP, (0,)),
    "dmd-regression": (joined(ONE_STEP, {"regression": {"weight": 0.25}, "pairs": PAIRS}), (0,)),
    "dmd-regression-huber-gan": (
        joined(
            ONE_STEP,
            {"adversarial": {"weight": 0.1}, "regression": {"weight": 0.25, "distance": "huber"}, "pairs": PAIRS},
        ),
        (0,),
    ),
    "dmd-regression-only": (
        joined(ONE_STEP, {"matching": None, "regression": {"weight": 1.0}, "pairs": PAIRS | {"guidance_scale": 3.0}}),
        (0,),
    ),
}

ONE_JUMP_BOOT = BOOT | {"steps": 1}
RANGE = {"guidance": {"scale": [1.0, 3.0], "export_scale": 2}}
PAPER = ONE_JUMP_BOOT | {"form": {"kind": "paper"}}
BOOTSTRAP: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "boot-one-step": (ONE_JUMP_BOOT, (0,)),
    "boot-one-step-unguided": (ONE_JUMP_BOOT | {"guidance": {"scale": 1.0}}, (0,)),
    "boot-three-segments": (BOOT | {"steps": 3}, (0,)),
    "boot-two-sub-steps": (BOOT | {"n_sub": 8, "m_teacher": 2}, (0,)),
    "boot-heun": (BOOT | {"solver": "heun"}, (0,)),
    "boot-heun-two-sub-steps-teacher-starts": (
        BOOT | {"solver": "heun", "m_teacher": 2, "start": {"kind": "teacher"}},
        (0,),
    ),
    "boot-boundary-frac": (BOOT | {"boundary_frac": 0.8}, (0,)),
    "boot-guidance-range": (BOOT | RANGE, (0,)),
    "boot-live-guidance": (BOOT | RANGE | {"guidance": {"scale": [1.0, 3.0]}, "start": {"kind": "teacher"}}, (0,)),
    "boot-negative-prompt": (BOOT | {"guidance": {"scale": 2.0, "negative_prompt": "a shoe"}}, (0,)),
    "boot-start-teacher": (BOOT | {"steps": 4, "start": {"kind": "teacher"}}, (0,)),
    "boot-start-renoise": (BOOT | {"steps": 4, "start": {"kind": "renoise"}}, (0,)),
    "boot-start-pool": (BOOT | {"start": {"kind": "pool", "size": 4}}, (0, 1, 2, 3)),
    "boot-start-pool-guidance-range": (BOOT | RANGE | {"steps": 3, "start": {"kind": "pool", "size": 5}}, (0, 1, 2, 3)),
    "boot-warm-start": (
        BOOT | {"start": {"kind": "onpolicy", "warm_start": {"iterations": 4, "pool_size": 4}}},
        (0, 1, 2, 3, 5),
    ),
    "boot-pseudo-huber": (BOOT | {"distance": "pseudo_huber", "huber_c": 0.01}, (0,)),
    "boot-loss-in-states": (BOOT | {"form": {"kind": "anchored", "loss_space": "state"}}, (0,)),
    "boot-weighting-inv1": (BOOT | {"form": {"kind": "anchored", "weighting": "inv1"}}, (0,)),
    "boot-weighting-inv2-states": (
        BOOT | {"form": {"kind": "anchored", "weighting": "inv2", "loss_space": "state"}},
        (0,),
    ),
    "boot-paper": (PAPER, (0,)),
    "boot-paper-guidance-range": (PAPER | RANGE, (0,)),
    "boot-paper-times-unguided": (
        PAPER
        | {"guidance": {"scale": 1.0}, "form": {"kind": "paper", "t_max": 0.9, "t_min": 0.2, "boundary_weight": 0.5}},
        (0,),
    ),
    "boot-paper-pseudo-huber": (PAPER | {"distance": "pseudo_huber"}, (0,)),
}

CONTINUOUS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "scm-unguided": (SCM | {"guidance": None}, (0,)),
    "scm-data": (SCM | {"guidance": None} | {"velocity": "data"}, (0,)),
    "scm-guidance-not-embedded": (SCM | {"guidance": {"range": [1.0, 3.0], "embed": False}}, (0,)),
    "scm-live-guidance": (SCM | {"guidance": {"range": [1.0, 3.0]}}, (0,)),
    "scm-clip": (SCM | {"tangent": "clip"}, (0,)),
    "scm-tangent-c": (SCM | {"tangent_c": 2.0}, (0,)),
    "scm-no-adaptive-weight": (SCM | {"adaptive_weight": False}, (0,)),
    "scm-data-clip-no-adaptive-weight": (
        SCM | {"guidance": None} | {"velocity": "data", "tangent": "clip", "adaptive_weight": False}, (0,),
    ),
    "scm-warmup": (SCM | {"warmup_iterations": 10}, (0, 4, 12)),
    "scm-lognormal": (SCM | {"lognormal": [0.5, 0.8]}, (0,)),
}  # fmt: skip

TABLES = {"dmd2": DISTRIBUTION, "boot": BOOTSTRAP, "scm": CONTINUOUS}
SD_CASES = {
    f"sd/{name}": Case("sd", method, settings, iterations)
    for method, table in TABLES.items()
    for name, (settings, iterations) in table.items()
} | {f"sd/{name}": Case("sd", *case) for name, case in CONSISTENCY.items()}

# Some of them on other networks -----------------------------------------------------------------------------------------


def on(family: str, name: str, **changes: Any) -> Case:
    """A case of Stable Diffusion's on another family."""
    case = SD_CASES[f"sd/{name}"]
    return replace(case, family=family, settings=case.settings | changes)


def adapted(name: str) -> Case:
    """A case with adapters that learn in place of whole networks."""
    return replace((FAMILY_CASES | SD_CASES)[name], student="lora")


OTHERS = {
    **{
        f"sd_epsilon/{name}": on("sd_epsilon", name)
        for name in (
            "pcm", "pcm-gan-hinge", "lcm-heun", "cd-karras-heun", "ect", "trajectory-solver", "stored-end", "dmd2-decoupled",
            "dmd2-gan-share-noise", "dmd-regression", "boot-one-step", "boot-start-renoise", "boot-paper", "scm-data",
        )
    },
    "sd_epsilon/boot": base_case("sd_epsilon", "boot"),
    "sd_epsilon/scm": base_case("sd_epsilon", "scm"),
    **{
        f"sd_zero_snr/{name}": on("sd_zero_snr", name)
        for name in ("pcm-jump", "lcm-heun", "stored-end", "dmd2-decoupled", "boot-heun", "scm-unguided")
    },
    "ddpm/boot-thresholding-static": on("ddpm", "boot-one-step-unguided", thresholding={"kind": "static"}),
    "ddpm/boot-thresholding-dynamic-heun": on(
        "ddpm", "boot-heun", guidance={"scale": 1.0}, thresholding={"kind": "dynamic", "quantile": 0.9}
    ),
    "ddpm/boot-paper-thresholding": on("ddpm", "boot-paper", guidance={"scale": 1.0}, thresholding={"kind": "static"}),
    "ddpm/boot-start-pool": on("ddpm", "boot-start-pool", guidance={"scale": 1.0}),
    "ddpm/ect": on("ddpm", "ect"),
    "ddpm/cd-karras-heun": on("ddpm", "cd-karras-heun"),
    "ddpm/scm-data": on("ddpm", "scm-data"),
    "ddpm/pcm-gan-two-phases-unguided": on("ddpm", "pcm-gan-two-phases-unguided"),
    "edm/ect": on("edm", "ect"),
    "edm/scm-data": on("edm", "scm-data"),
    "edm/dmd2-gan-share-noise": on("edm", "dmd2-gan-share-noise", guidance={"scale": 1.0}),
    "sd3/pcm-jump": on("sd3", "pcm-jump"),
    "sd3/pcm-uneven-phases": on("sd3", "pcm-uneven-phases"),
    "sd3/pcm-gan-hinge": on("sd3", "pcm-gan-hinge"),
    "sd3/lcm-heun": on("sd3", "lcm-heun"),
    "sd3/trajectory-sample": on("sd3", "trajectory-sample"),
    "sd3/stored-end": on("sd3", "stored-end"),
    "sd3/dmd2-decoupled": on("sd3", "dmd2-decoupled"),
    "sd3/boot-start-renoise": on("sd3", "boot-start-renoise"),
    "sd3/boot-heun": on("sd3", "boot-heun"),
    "sd3/boot-paper": on("sd3", "boot-paper"),
    "sdxl/pcm-keep-guidance": on("sdxl", "pcm-keep-guidance"),
    "sdxl/boot-negative-prompt": on("sdxl", "boot-negative-prompt"),
    "dit/pcm-gan-hinge": on("dit", "pcm-gan-hinge"),
    **{
        f"{name}-lora": adapted(name)
        for name in (
            "sd/consistency", "sd/mlcm", "sd/dmd2", "sd/boot", "sd/scm", "sd/lcm-student-as-target", "sd/pcm-gan-hinge",
            "sd/dmd2-gan-share-noise", "ddpm/boot", "sdxl/consistency", "sd3/dmd2", "dit/scm", "pixart/mlcm",
        )
    },
}  # fmt: skip

CASES: dict[str, Case] = {**FAMILY_CASES, **VARIANT_CASES, **SD_CASES, **OTHERS}
