"""Signatures say shapes, and tests run with these checked."""

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from fewstep.diffusion.grids import even_steps
from fewstep.diffusion.prediction import Prediction, add_noise, ode_step
from fewstep.diffusion.schedule import RectifiedFlow


def test_wrong_shapes_are_refused() -> None:
    x, t = torch.zeros(2, 3, 4, 5), torch.tensor([500, 400])
    schedule = RectifiedFlow()
    assert ode_step(schedule, Prediction(x, x), t).shape == x.shape
    with pytest.raises(TypeCheckError, match="ode_step"):
        ode_step(schedule, Prediction(x, x), torch.tensor([500, 400, 300]))
    with pytest.raises(TypeCheckError, match="'p'"):
        ode_step(schedule, Prediction(x, x[:1]), t)
    with pytest.raises(TypeCheckError, match="eps"):
        add_noise(schedule, x, x[..., 1:], t)
    with pytest.raises(TypeCheckError, match="x0"):
        add_noise(schedule, x.long(), x, t)
    with pytest.raises(TypeCheckError, match="parameters"):
        even_steps(t, t[:1], 2)


def test_nothing_is_checked_outside_of_tests() -> None:
    code = (
        "import sys, fewstep.diffusion.prediction as p; print('beartype' in sys.modules, p.ode_step.__module__,"
        "hasattr(p.ode_step, '__wrapped__'))"
    )
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.split() == ["False", "fewstep.diffusion.prediction", "False"]
