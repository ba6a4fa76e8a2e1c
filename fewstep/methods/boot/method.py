"""BOOT (Gu et al. 2023): data-free distillation by bootstrapping along the teacher's ODE from noise, in 1 to 8 steps.

The student jumps from the start z of a segment to any later time in it. Its target for one sub-step further is its own
prediction, without gradient, corrected by one step of the teacher there. The arithmetic is in fewstep.diffusion.signal_ode.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.diffusion.prediction import add_noise
from fewstep.diffusion.schedule import like
from fewstep.diffusion.shapes import Counts, Histogram, PerSample, Samples, Scalar, Scales
from fewstep.diffusion.signal_ode import finite_difference
from fewstep.errors import FewstepError
from fewstep.methods.base import (
    NOTHING,
    Batch,
    Carry,
    Method,
    Networks,
    Role,
    Step,
    StepOutput,
    require_guidable,
    require_live_guidance,
)
from fewstep.methods.boot.config import BootConfig, DynamicThresholdConfig, PaperConfig
from fewstep.methods.boot.grid import sub_times, target_tables
from fewstep.methods.boot.starts import Cross, Pool, follow, student_cross
from fewstep.methods.boot.teacher import GuidedTeacher
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.teachers.base import Teacher
from fewstep.teachers.students import StudentGuidance

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


class Boot(Method):
    """The student is one jump per segment, trained for every target time in it; export keeps the segment's end."""

    name = "boot"
    paper = "Gu et al. 2023, BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping, arXiv 2306.05544"
    needs_images = False

    config: BootConfig

    def __init__(self, config: BootConfig, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        guidance, threshold = config.guidance, config.thresholding
        if guidance.range is not None:
            require_guidable(teacher, "guidance.scale", "1")
        if guidance.negative_prompt and teacher.conditions != "prompt":
            raise FewstepError(
                "method.guidance.negative_prompt", "a prompt", f"none for a teacher of {teacher.conditions}s"
            )
        if threshold is not None and teacher.latent_shape[-1] != teacher.image_size:
            raise FewstepError("method.thresholding", threshold.kind, "null, for the teacher works on latents")
        if guidance.embedded and guidance.export_scale is None:
            require_live_guidance(teacher)
        self.student_guidance, self.embedded = StudentGuidance(guidance.export_scale), guidance.embedded
        self.grid = sub_times(
            config, teacher.samplers.grid(self.scheduler(), config.steps), teacher.num_train_timesteps
        )
        self.count = config.n_sub // config.m_teacher
        self.weights, self.factors = target_tables(config, teacher.schedule, self.grid)
        self.pool = Pool(config.pool_size, self.grid[:, 0], config.n_sub)
        quantile = threshold.quantile if isinstance(threshold, DynamicThresholdConfig) else None
        self.guided = GuidedTeacher(teacher, guidance.negative_prompt, threshold is not None, quantile, config.solver)
        self.boundary_errors: list[float] = []

    def roles(self) -> dict[str, Role]:
        student = self.teacher.students.new(guidance_embedding=self.embedded, progress_embedding=True)
        return {"teacher": Role(self.teacher.denoiser), "student": Role(student, optim=self.config.optim)}

    def steps(self) -> tuple[Step, ...]:
        return (Step("student", self.paper_loss if self.config.form.kind == "paper" else self.loss),)

    def scheduler(self) -> "SchedulerMixin":
        samplers, n = self.teacher.samplers, self.config.steps
        return samplers.renoise(n) if self.config.renoises else samplers.jump(n)

    def allowed_steps(self) -> tuple[int, ...]:
        n = self.config.steps
        # With re-noising every segment's start is valid, with states of the ODE only that of the next segment.
        return self.teacher.samplers.counts(n) if self.config.renoises else (n,)

    def state(self) -> dict[str, Tensor]:
        return self.pool.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.pool.load_state(tensors)

    # Losses -----------------------------------------------------------------------------------------------------------

    def loss(
        self,
        nets: Networks,
        batch: Batch,
        carry: Carry = NOTHING,
        *,
        noise: Samples | None = None,
        segment: Counts | None = None,
        index: Counts | None = None,
        guidance_scale: Scales | None = None,
    ) -> StepOutput:
        """Distance of the student's jump to the bootstrapped one.

        Args:
            noise: drawn if None.
            segment: 0 ... steps - 1, on the CPU; drawn if None.
            index: the target's place in the chain, 0 (the teacher's own output) ... n_sub / m_teacher - 1, on the CPU.
            guidance_scale: 1 = none; drawn from the range, or the config's, if None.
        """
        m, student = self.config.m_teacher, nets["student"]
        index = self._draw_index(batch.size) if index is None else index
        with torch.no_grad():
            starts, segment = self._starts(nets, batch, noise, segment, guidance_scale)
            z, anchor, cond, scale = starts.x, starts.t, starts.cond, starts.guidance_scale
            embedded = scale if self.embedded else None
            times = torch.stack([self.grid[segment, m * index + i] for i in range(m + 1)]).to(z.device)
            own = student(z, anchor, cond, embedded, self._progress(m * index, batch))
            target = self.guided.bootstrap(self.guided.denoiser(nets["teacher"], cond, scale), own, anchor, times)
        jump = student(z, anchor, cond, embedded, self._progress(m * index + m, batch))
        factor, weight = (table[segment, index].to(z.device) for table in (self.factors, self.weights))
        each = weight * self._distance(like(factor, z) * (jump.x0 - target.x0))
        logs, histograms = self._report(each.detach(), index)
        if len(first := (index == 0).nonzero().flatten().to(z.device)) > 1:
            missed = (jump.x0.detach() - target.x0)[first].square().mean()
            logs["boundary_error"] = missed / target.x0[first].var()
        if self.config.steps > 1:
            logs["start_std"] = z.std()
        return StepOutput({"boot": each.mean()}, logs, histograms)

    def paper_loss(
        self,
        nets: Networks,
        batch: Batch,
        carry: Carry = NOTHING,
        *,
        noise: Samples | None = None,
        index: Counts | None = None,
    ) -> StepOutput:
        """The paper's finite difference along x_t = alpha(t) y + sigma(t) noise, and its boundary loss at t_max."""
        schedule, total, student = self.teacher.schedule, self.teacher.num_train_timesteps, nets["student"]
        index = self._draw_index(batch.size) if index is None else index
        with torch.no_grad():
            starts, _ = self._starts(nets, batch, noise, None, None)
            z, cond, scale = starts.x, starts.cond, starts.guidance_scale
            embedded = scale if self.embedded else None
            t, s, t_max = (self.grid[0, i].to(z.device) for i in (index, index + 1, 0 * index))
            anchor = torch.full_like(t, total - 1)
            y = student(z, anchor, cond, embedded, self._progress(index, batch)).x0
            denoise = self.guided.denoiser(nets["teacher"], cond, scale)
            f = denoise(add_noise(schedule, y, z, t), t).x0
            target = finite_difference(schedule, y, f, t, s)
            edge = denoise(z, t_max).x0
        # Both terms in one pass.
        twice = {key: torch.cat([value, value]) for key, value in cond.items()}
        scales = None if embedded is None else torch.cat([embedded, embedded])
        progress = self._progress(torch.cat([index + 1, 0 * index]), batch)
        y, first = student(torch.cat([z, z]), torch.cat([anchor, anchor]), twice, scales, progress).x0.chunk(2)
        each = self._distance(y - target) * (total / (t - s)) ** 2
        boundary = self._distance(first - edge).mean()
        logs, histograms = self._report(each.detach(), index)
        logs["boundary_error"] = (first.detach() - edge).square().mean() / edge.var()
        losses = {"boot": each.mean(), "boundary": self._paper.boundary_weight * boundary}
        return StepOutput(losses, logs, histograms)

    @property
    def _paper(self) -> PaperConfig:
        assert isinstance(self.config.form, PaperConfig)  # its loss is used for no other form
        return self.config.form

    def _draw_index(self, size: int) -> Counts:
        """A target for each of `size` samples: the first with probability boundary_frac, otherwise any; stratified."""
        share = (torch.randperm(size) + torch.rand(size)) / size
        share = (share - self.config.boundary_frac) / (1 - self.config.boundary_frac)
        return (share.clamp(0, 1 - 1e-6) * self.count).long()

    def _progress(self, sub_step: Counts, batch: Batch) -> PerSample:
        return (sub_step / self.config.n_sub).to(batch.device)

    def _distance(self, difference: Samples) -> PerSample:
        """One number per sample."""
        square, c = difference.square(), self.config.huber_c
        return (square if self.config.distance == "l2" else (square + c**2).sqrt() - c).flatten(1).mean(1)

    def _starts(
        self, nets: Networks, batch: Batch, noise: Samples | None, segment: Counts | None, scale: Scales | None
    ) -> tuple[NoisyBatch, Counts]:
        """Samples at the starts of segments, and the segments, on the CPU; what is None is drawn."""
        c, size, timesteps = self.config, batch.size, self.grid[:, 0]
        if noise is None:
            noise = torch.randn(size, *self.teacher.latent_shape, device=batch.device)
        if scale is None and c.guidance.range is not None:
            low, high = c.guidance.range
            scale = low + (high - low) * torch.rand(size, device=batch.device)
        if segment is None:
            segment = torch.randint(c.steps, (size,))
        initial = NoisyBatch(noise, timesteps[:1].expand(size).to(noise.device), batch.cond, scale)
        if c.steps == 1:
            return initial, segment
        warm = c.warm_start and float(torch.rand(())) >= batch.iteration / c.warm_start
        if c.start.kind == "pool" or warm:
            return self.pool.draw(self._teacher_cross(nets), initial)
        cross = self._teacher_cross(nets) if c.start.kind == "teacher" else self._student_cross(nets)
        return follow(cross, initial, segment, timesteps), segment

    def _teacher_cross(self, nets: Networks) -> Cross:
        """The teacher's ODE over a segment."""

        def cross(at: NoisyBatch, segment: Counts) -> Samples:
            denoise = self.guided.denoiser(nets["teacher"], at.cond, at.guidance_scale)
            return self.guided.walk(denoise, at.x, self.grid[segment].T.to(at.x.device))

        return cross

    def _student_cross(self, nets: Networks) -> Cross:
        """The averaged student's jump over a segment."""
        return student_cross(nets["ema"], self.teacher.schedule, self.grid[:, 0], self.embedded, self.config.renoises)

    # Health -----------------------------------------------------------------------------------------------------------

    def _report(self, each: PerSample, index: Counts) -> tuple[dict[str, Scalar], dict[str, Histogram]]:
        """The loss at every place of the chain, by the sub-step at which its target begins; and in few words: at the start
        of the chain, and in each third of the rest."""
        place = (self.config.m_teacher * index).to(each.device)
        once = torch.stack([each, torch.ones_like(each)])
        by_sub_step = once.new_zeros(2, self.config.n_sub).index_add_(1, place, once)
        logs = {}
        part = torch.where(index == 0, 0, 1 + 3 * index // self.count)
        for i, name in enumerate(("boundary", "front", "middle", "back")):
            if len(rows := (part == i).nonzero().flatten()):
                logs[f"loss_{name}"] = each[rows.to(each.device)].mean()
        return logs, {"loss_by_sub_step": by_sub_step}

    def health(self, nets: Networks, iteration: int) -> dict[str, Scalar]:
        """Distance of the pool's states from those that the student reaches."""
        if self.config.start.kind != "pool" and iteration > self.config.warm_start:
            return {}
        drift = self.pool.drift(self._student_cross(nets))
        return {} if drift is None else {"pool_drift": drift}

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        """A boundary error, as a share of x0's variance, that is large and does not fall: the chain lacks its beginning."""
        if (error := figures.get("boundary_error")) is None:
            return []
        earlier, self.boundary_errors = self.boundary_errors, [*self.boundary_errors[-4:], error]
        if error < 0.5 or not earlier or error < 0.9 * min(earlier):
            return []
        return [
            f"boundary_error: found {error:.0%} of the variance, not falling; expected below 50%. The student does not learn "
            "the start of segments: raise method.boundary_frac, or lower method.optim.lr or method.guidance.scale"
        ]
