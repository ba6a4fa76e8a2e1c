"""Errors in the sections of consistency methods: key, found, expected, nearest spelling, also within unions and lists."""

import pytest

from fewstep.config import ConfigError, Strict
from fewstep.config.help import models
from fewstep.methods.consistency import method_settings
from fewstep.methods.registry import load_run, settings_class

STATES = (
    "noised_data, shared_trajectories, solver_trajectories, sampled_trajectories, stored_trajectories, student_rollout"
)


@pytest.mark.parametrize(
    ("recipe", "override", "expected"),
    [
        (
            "fashion/lcm",
            "target.kind=solvr",
            "target.kind: found text 'solvr'; expected solver, same_noise, next_state; did you mean 'solver'?",
        ),
        ("fashion/lcm", "target={decay: 0.9}", "target.kind: missing; expected solver, same_noise, next_state"),
        (
            "fashion/lcm",
            "target=solver",
            "target: found text 'solver'; expected mapping with the key kind, which is one of solver",
        ),
        (
            "fashion/lcm",
            "states={kind: noised_data, segments: 3}",
            "states.segments: unknown key; expected one of kind, lognormal",
        ),
        (
            "fashion/lcm",
            "states.kind=shared_trajectoris",
            f"states.kind: found text 'shared_trajectoris'; expected {STATES}; did you mean 'shared_trajectories'?",
        ),
        ("fashion/lcm", "states={kind: stored_trajectories}", "states.count: missing; expected whole number > 0"),
        ("fashion/lcm", "solver_steps=8", "solver_steps: unknown key; expected one of name, optim, steps, guidance"),
        (
            "fashion/lcm",
            "guidance.range=[3.0, 1.0]",
            "guidance: range: found [3.0, 1.0]; expected two ascending scales >= 1",
        ),
        ("fashion/lcm", "distance={kind: pseudo_huber, c: -1.0}", "distance.c: found -1.0; expected number > 0"),
        ("fashion/lcm", "distance={kind: l2, c: 0.1}", "distance.c: unknown key; expected one of kind"),
        ("digits/cd", "grid={kind: even, rho: 3.0}", "grid.rho: unknown key; expected one of kind, points"),
        (
            "sdxl/mlcm",
            "stages=[{phases: 8, iterations: 3}, {phases: null, states: {kind: student_rolout}}]",
            "stages[1].states.kind: found text 'student_rolout'; expected noised_data, shared_trajectories",
        ),
        (
            "sdxl/mlcm",
            "stages=[{phases: 8, iterations: 0}, {phases: null}]",
            "stages[0].iterations: found 0; expected whole number > 0 or null",
        ),
        (
            "sdxl/mlcm",
            "stages=[{phases: null, states: {kind: student_rollout, stops: 4}}]",
            "stages[0].states.stops: unknown key; did you mean 'steps'?",
        ),
        (
            "fashion/trajectory",
            "trajectories.replay=5",
            "trajectories.replay: unknown key; expected one of kind, count",
        ),
        ("fashion/pcm", "adversarial={weight: 0.1, los: hinge}", "adversarial.los: unknown key; did you mean 'loss'?"),
    ],
)
def test_errors_name_the_key(recipe: str, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(recipe, [f"method.{override}"])
    (problem,) = error.value.problems
    assert problem.text.startswith(f"method.{expected}")


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("fashion/lcm", ["grid.points=7"], r"steps: found 8; expected a divisor of grid.points (7)"),
        (
            "fashion/lcm",
            ["target={kind: next_state}"],
            "target: found next_state without stored trajectories",
        ),
        ("fashion/lcm", ["target={kind: same_noise}"], "guidance: found a range with target same_noise"),
        (
            "fashion/lcm",
            ["states={kind: student_rollout, steps: 9}"],
            "states.steps: found 9; expected at most steps (8)",
        ),
        (
            "fashion/lcm",
            ["reward={name: x, weight: 1.0, steps: 9}"],
            "reward.steps: found 9; expected at most steps (8)",
        ),
        ("fashion/pcm", ["phases=2"], "steps: found 4; expected as many as phases (2)"),
        (
            "sdxl/mlcm",
            ["stages=[{phases: 8}, {phases: null}]"],
            "stages[0].iterations: found null; expected a number in all stages but the last",
        ),
        ("sdxl/mlcm", ["stages=[]"], "stages: found none"),
        (
            "sdxl/mlcm",
            ["stages=[{phases: 3}]"],
            "stages[0].phases: found 3; expected a divisor of stages[0].points (40)",
        ),
        ("sdxl/mlcm", ["stages=[{phases: 2, reward_weight: 1.0}]"], "stages[0].reward_weight: found a weight"),
        ("sdxl/mlcm", ["sampling=jump"], "sampling: found jump with steps"),
        (
            "sdxl/mlcm",
            ["stages=[{phases: 2, iterations: 1, states: {kind: sampled_trajectories}}, {phases: 2}]"],
            "stages: found trajectories of several kinds",
        ),
    ],
)
def test_what_relates_sections_is_refused(recipe: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run(recipe, [f"method.{override}" for override in overrides])
    (problem,) = error.value.problems
    assert expected in problem.text


def test_neighbours_of_stored_trajectories_with_a_target_network() -> None:
    """LCM on stored trajectories: x_s two points on, by a moving average."""
    stored = "method.states={kind: stored_trajectories, count: 5000, substeps: 1}"
    run = load_run("fashion/lcm", [stored, "method.target={kind: next_state, skip: 2, decay: 0.95}"])
    assert run.method.model_dump()["target"] == {"kind": "next_state", "skip": 2, "decay": 0.95}


@pytest.mark.parametrize("name", ["cd", "lcm", "ect", "pcm", "mlcm", "trajectory"])
def test_every_key_is_explained(name: str) -> None:
    """`--help` has a text for each, also in the members of unions."""

    def unexplained(model: type[Strict]) -> list[str]:
        found = [key for key, field in model.model_fields.items() if not field.description]
        return found + [
            key for field in model.model_fields.values() for m in models(field.annotation) for key in unexplained(m)
        ]

    assert not unexplained(settings_class(name))
    assert issubclass(settings_class(name), Strict) and method_settings.__doc__
