"""What is consistent: functions of a prediction at x_t that are the identity at the end of its trajectory or phase."""

from torch import Tensor

SIGMA_DATA = 0.5


def boundary_scalings(t: Tensor, timestep_scaling: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at t [B] (Luo et al. 2023, appendix): 1 and 0 at t = 0, so that the student is the identity there.

    c_out multiplies a prediction of x0 and so has no factor sigma_data, unlike Song et al.'s eq. 5.
    """
    q = timestep_scaling * t.double()
    c_skip = SIGMA_DATA**2 / (q**2 + SIGMA_DATA**2)
    c_out = q / (q**2 + SIGMA_DATA**2).sqrt()
    return c_skip, c_out
