"""Consistency distillation (Song et al. 2023) in latent space with guidance, as LCM does it (Luo et al. 2023)."""

import torch
from torch import Tensor

from fewstep.losses import l2, pseudo_huber
from fewstep.methods.base import NO_LIVE_GUIDANCE, Batch, Losses, Method, Networks, Role, Step
from fewstep.methods.consistency_config import ConsistencyConfig
from fewstep.process import Prediction, add_noise, guide, like, ode_step
from fewstep.teachers.base import Teacher
from fewstep.teachers.guidance import both_sides

SIGMA_DATA = 0.5


def boundary_scalings(t: Tensor, timestep_scaling: float) -> tuple[Tensor, Tensor]:
    """c_skip and c_out at t [B] (Luo et al. 2023, appendix): 1 and 0 at t = 0, so that the student is the identity there.

    c_out multiplies a prediction of x0 and so has no factor sigma_data, unlike Song et al.'s eq. 5.
    """
    q = timestep_scaling * t.double()
    c_skip = SIGMA_DATA**2 / (q**2 + SIGMA_DATA**2)
    c_out = q / (q**2 + SIGMA_DATA**2).sqrt()
    return c_skip, c_out


def solver_grid(solver_steps: int, num_train_timesteps: int) -> tuple[Tensor, Tensor]:
    """Timesteps of the teacher's grid [N], ascending, and for each the next cleaner one (t = 0 below the first)."""
    k = num_train_timesteps // solver_steps
    t = torch.arange(1, solver_steps + 1) * k - 1
    return t, (t - k).clamp_min(0)


class Consistency(Method):
    """The student maps every point of a trajectory of the guided teacher to its end."""

    name = "consistency"
    paper = "Luo et al. 2023, Latent Consistency Models, arXiv 2310.04378; Song et al. 2023, Consistency Models, arXiv 2303.01469"

    config: ConsistencyConfig

    def __init__(self, config: ConsistencyConfig, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if teacher.num_train_timesteps % config.solver_steps:
            raise ValueError(
                f"method.solver_steps: {config.solver_steps} does not divide the teacher's "
                f"{teacher.num_train_timesteps} timesteps, so its noisiest one would never be trained"
            )
        if config.guidance_range is not None and teacher.conditions == "none":
            raise ValueError("method.guidance_range: an unconditional teacher has no guidance; set it to null")
        if config.guidance_range is not None and config.export_guidance_scale is None and not teacher.live_guidance:
            raise ValueError(NO_LIVE_GUIDANCE)
        self.export_guidance_scale = config.export_guidance_scale
        self.grid = solver_grid(config.solver_steps, teacher.num_train_timesteps)

    def roles(self) -> dict[str, Role]:
        c, embedded = self.config, self.config.guidance_range is not None
        student = self.teacher.student(guidance_embedding=embedded)
        roles = {"teacher": Role(self.teacher.denoiser), "student": Role(student, optim=c.optim)}
        if c.target_decay is not None:
            roles["target"] = Role(student.clone(), follows="student", decay=c.target_decay)
        return roles

    def steps(self) -> tuple[Step, ...]:
        return (Step("student", self.loss),)

    def scheduler(self):  # type: ignore[no-untyped-def]  # diffusers' class is not imported here
        return self.teacher.renoise_scheduler(self.config.steps, self.config.timestep_scaling)

    def allowed_steps(self) -> tuple[int, ...]:
        return self.teacher.renoise_counts(self.config.steps)

    def loss(
        self,
        nets: Networks,
        batch: Batch,
        index: Tensor | None = None,
        noise: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> Losses:
        """Consistency loss (Luo et al. 2023, eq. 16 with skipping): distance of f(x_t, t) to f_target(x_s, s).

        Args:
            index: positions in the solver's grid, [B]; drawn if None.
            noise: like x0, [B, C, h, w]; drawn if None.
            guidance_scale: 1 = none, [B]; drawn from guidance_range if None.
        """
        c, x0, schedule = self.config, batch.x0, self.teacher.schedule
        if index is None:
            index = torch.randint(c.solver_steps, (batch.size,), device=batch.device)
        noise = torch.randn_like(x0) if noise is None else noise
        if guidance_scale is None and c.guidance_range is not None:
            low, high = c.guidance_range
            guidance_scale = low + (high - low) * torch.rand(batch.size, device=batch.device)
        t, s = (grid.to(batch.device)[index] for grid in self.grid)
        x_t = add_noise(schedule, x0, noise, t)

        student = nets["student"](x_t, t, batch.cond, guidance_scale)
        with torch.no_grad():
            x_s = ode_step(schedule, self._teacher(nets, x_t, t, batch, guidance_scale), s)
            target_net = nets["student" if c.target_decay is None else "target"]
            target = self._endpoint(target_net(x_s, s, batch.cond, guidance_scale), x_s, s)
        prediction = self._endpoint(student, x_t, t)
        if c.distance == "l2":
            return {"consistency": l2(prediction, target)}
        return {"consistency": pseudo_huber(prediction, target, c.huber_c)}

    def _teacher(self, nets: Networks, x_t: Tensor, t: Tensor, batch: Batch, scale: Tensor | None) -> Prediction:
        if scale is None:
            return nets["teacher"](x_t, t, batch.cond)  # type: ignore[no-any-return]
        return guide(*both_sides(nets["teacher"], x_t, t, batch.cond, batch.uncond), scale)

    def _endpoint(self, p: Prediction, x: Tensor, t: Tensor) -> Tensor:
        c_skip, c_out = (like(v, p.x0) for v in boundary_scalings(t, self.config.timestep_scaling))
        return c_skip * x + c_out * p.x0
