"""Distribution matching distillation with an adversarial loss, DMD2 (Yin et al. 2024); without it and with pairs, DMD."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.diffusion.grids import trailing_timesteps
from fewstep.diffusion.guidance import GuidedDenoiser, both_sides, guide
from fewstep.diffusion.losses import (
    descend,
    discriminator_loss,
    divergence_weights,
    generator_loss,
    gradient_penalty,
    matching_gradient,
)
from fewstep.diffusion.prediction import Prediction, add_noise
from fewstep.diffusion.schedule import like
from fewstep.diffusion.shapes import GridTimes, Logits, Samples, Scalar, Times
from fewstep.methods.base import (
    NOTHING,
    Batch,
    Carry,
    Losses,
    Method,
    Networks,
    Preparation,
    Role,
    Step,
    StepOutput,
    require_guidable,
)
from fewstep.methods.discriminator import HeadInput, features, named_layers, new_critic, noised, simulated_input
from fewstep.methods.distribution_matching.config import FULL, AdversarialConfig, DMD2Config
from fewstep.methods.distribution_matching.diagnostics import accuracies, alarms, prompt_distances, sample_figures
from fewstep.methods.distribution_matching.terms import denoising_loss, pick_pairs, regression_distance
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.methods.trajectories import Trajectories, TrajectorySettings
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, DenoiserLike

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class DMD2(Method):
    """The student's samples, at every noise level, come to be distributed as the teacher's.

    Roles: the teacher (the real score); the student (the generator); the critic, a denoiser of the student's samples (the fake
    score) with the discriminator's heads.
    """

    name = "dmd2"
    paper = (
        "Yin et al. 2024, Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv 2405.14867; "
        "Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828"
    )

    config: DMD2Config

    def __init__(self, config: DMD2Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.guidance.scale != 1:
            require_guidable(teacher, "guidance.scale", "1")
        self.needs_images = config.real_images or config.inputs == "noised_data"
        self.timesteps = self._timesteps(config.count)
        self.layers: tuple[str, ...] = ()
        if config.adversarial is not None:
            self.layers = named_layers(teacher, config.adversarial.layers, "method.adversarial.layers")
        self.pairs: Trajectories | None = None
        self.distance = regression_distance(config.regression, teacher)

    # Roles, steps, sampling -------------------------------------------------------------------------------------------

    def roles(self) -> dict[str, Role]:
        c = self.config
        roles = {"teacher": Role(self.teacher.denoiser), "student": Role(self.teacher.students.new(), optim=c.optim)}
        if c.has_fake_score:
            roles["critic"] = Role(new_critic(self.teacher, self.layers), optim=c.critic_optim or c.optim)
        return roles

    def steps(self) -> tuple[Step, ...]:
        student = Step("student", self.generator_loss, every=self.config.student_update_every)
        return (student, Step("critic", self.critic_loss)) if self.config.has_fake_score else (student,)

    def scheduler(self) -> "SchedulerMixin":
        spacing = self.config.spacing or self.teacher.num_train_timesteps // self.config.count
        return self.teacher.samplers.renoise(self.config.count, spacing=spacing)

    def allowed_steps(self) -> tuple[int, ...]:
        """The counts whose timesteps are the first of the trained ones: their last sample was matched, too."""
        trained = self.timesteps.tolist()
        counts = self.teacher.samplers.counts(len(trained))
        return tuple(n for n in counts if self._timesteps(n).tolist() == trained[:n])

    def _timesteps(self, count: int) -> GridTimes:
        return self.teacher.samplers.grid(self.scheduler(), count)[:-1]

    def prepare(self, at: Preparation) -> None:
        """Let the teacher draw the pairs that are not in the run's folder yet."""
        c = self.config.pairs
        if c is None:
            return
        scale = self.config.guidance.scale if c.guidance_scale is None else c.guidance_scale
        times = trailing_timesteps(c.solver_steps, self.teacher.num_train_timesteps)
        settings = TrajectorySettings(c.count, c.batch_size, times, times[:1], "ddim", (scale, scale))
        self.pairs = at.trajectories(self.teacher, "pairs", settings)

    # The student: generator -------------------------------------------------------------------------------------------

    def generator_loss(self, nets: Networks, batch: Batch, carry: Carry = NOTHING) -> StepOutput:
        """Distribution matching and adversarial terms on one sample, which the critic's step reuses; and regression."""
        c = self.config
        matched, left = StepOutput({}), {}
        losses: Losses = {}
        if c.has_fake_score:
            x = self.sample(nets["student"], batch)
            left = {"sample": x.detach()}
            if c.matching is not None:
                matched = self.distribution_matching_loss(nets, batch, x)
                losses |= matched.losses
            if c.adversarial is not None and "gan" not in losses:
                losses["gan"] = c.adversarial.weight * self.adversarial_loss(nets, batch, x)
        if c.regression is not None:
            losses["regression"] = c.regression.weight * self.regression_loss(nets, batch)
        return StepOutput(losses, matched.logs, carry=left)

    def sample(
        self, student: DenoiserLike, batch: Batch, stop: int | None = None, noise: Samples | None = None
    ) -> Samples:
        """The student's x0 after `stop` simulated steps and one that has gradients.

        Args:
            stop: 0 ... steps - 1; drawn, the same on every process, if None.
            noise: of the last input: all of it for stop = 0; drawn if None.
        """
        shape = (batch.size, *self.teacher.latent_shape)
        noise = torch.randn(shape, device=batch.device) if noise is None else noise
        t = self.timesteps.to(batch.device)
        if self.config.inputs == "noised_data":
            index = torch.randint(len(t), (batch.size,), device=batch.device)
            index = index if stop is None else torch.full_like(index, stop)
            data = add_noise(self.teacher.schedule, batch.x0, noise, t[index])
            x_t = torch.where((index == 0).view(-1, *[1] * (noise.ndim - 1)), noise, data)
            return self._x0(student, NoisyBatch(x_t, t[index], batch.cond))
        if stop is None:
            stop = int(torch.randint(len(t), (), generator=batch.generator))

        def denoise(x_t: Samples, t: Times) -> Prediction:
            return self._denoise(student, NoisyBatch(x_t, t, batch.cond))

        x_t = simulated_input(denoise, self.teacher.schedule, t, stop, noise)
        return denoise(x_t, t[stop].expand(batch.size)).x0

    def distribution_matching_loss(
        self, nets: Networks, batch: Batch, x: Samples, t: Times | None = None, noise: Samples | None = None
    ) -> StepOutput:
        """dm, whose gradient in x moves its distribution to the teacher's (Yin et al. 2024, DMD, eq. 7).

        With `adversarial.share_noise` also gan, of the same noisy x. t, noise: drawn if None.
        """
        c = self.config
        assert c.matching is not None
        noisy = noised(self.teacher, x, c.matching.range, batch.cond, t, noise)
        losses: Losses = {}
        logits: Logits | None = None
        if c.adversarial is not None and c.adversarial.share_noise:
            prediction, logits = nets["critic"](self._cast(noisy), share_features=True)
            fake_x0 = prediction.x0.detach()
            losses["gan"] = c.adversarial.weight * generator_loss(c.adversarial.loss, logits)
        with torch.no_grad():
            noisy = replace(noisy, x=noisy.x.detach())
            decoupled = c.guidance.noise_range is not None
            real_x0 = self._real_x0(nets, batch, noisy, 1.0 if decoupled else c.guidance.scale)
            if logits is None:
                fake_x0 = nets["critic"](self._cast(noisy))[0].x0
            gradient = matching_gradient(x, real_x0, fake_x0)
            if decoupled:
                gradient = gradient + self._guidance_gradient(nets, batch, x)
            if c.matching.divergence != "reverse_kl":
                logits = self._logits(nets, noisy) if logits is None else logits
                gradient = gradient * like(divergence_weights(c.matching.divergence, logits), x)
            logs = sample_figures(x, real_x0, fake_x0) | prompt_distances(x, real_x0, batch.raw)
        return StepOutput({"dm": c.matching.weight * descend(x, gradient.to(x.dtype))} | losses, logs)

    def _guidance_gradient(self, nets: Networks, batch: Batch, x: Samples) -> Samples:
        """Decoupled DMD: guided - fake = (conditional - fake) + (guided - conditional), the last at noise of its own."""
        guidance = self.config.guidance
        assert guidance.noise_range is not None
        noisy = self._cast(noised(self.teacher, x, guidance.noise_range, batch.cond))
        plain, uncond = both_sides(nets["teacher"], noisy.x, noisy.t, noisy.cond, batch.uncond)
        return matching_gradient(x, guide(plain, uncond, guidance.scale).x0, plain.x0)

    def adversarial_loss(
        self, nets: Networks, batch: Batch, x: Samples, t: Times | None = None, noise: Samples | None = None
    ) -> Scalar:
        """The student's side of the adversarial loss, on noisy x."""
        adversarial = self._adversarial
        noisy = noised(self.teacher, x, adversarial.range, batch.cond, t, noise)
        return generator_loss(adversarial.loss, self._logits(nets, noisy))

    def regression_loss(self, nets: Networks, batch: Batch) -> Scalar:
        """Distance to the teacher's samples from the same initial noise, on pairs of their own (DMD, eq. 9)."""
        noise, x0, cond = pick_pairs(self.pairs, self.teacher, batch.size, batch.device)
        t = self.timesteps[0].to(batch.device).expand(batch.size)
        return self.distance(self._x0(nets["student"], NoisyBatch(noise, t, cond)), x0)

    # The critic: fake score and discriminator -------------------------------------------------------------------------

    def critic_loss(
        self,
        nets: Networks,
        batch: Batch,
        carry: Carry = NOTHING,
        *,
        t: Times | None = None,
        noise: Samples | None = None,
    ) -> StepOutput:
        """Denoising of the student's samples over all noise levels, and the discriminator's loss, in one call of the critic.

        t, noise: of the denoising; drawn if None.
        """
        x = carry.get("sample")
        if x is None:
            with torch.no_grad():
                x = self.sample(nets["student"], batch)
        noise = torch.randn_like(x) if noise is None else noise
        noisy = noised(self.teacher, x, FULL, batch.cond, t, noise)
        if self.config.adversarial is None:
            prediction, _ = nets["critic"](self._cast(noisy))
            return StepOutput({"denoising": denoising_loss(self.teacher, prediction, x, noise, noisy.t)})
        adversarial = self._adversarial
        fake = None if adversarial.share_noise else noised(self.teacher, x, adversarial.range, batch.cond)
        real_x0, cond = self._real(batch)
        real = noised(self.teacher, real_x0, adversarial.range, cond)
        # The penalty differentiates twice, which fused attention cannot.
        with sdpa_kernel(SDPBackend.MATH) if adversarial.r1_weight else nullcontext():
            real.x.requires_grad_(adversarial.r1_weight > 0)
            heads = self._head_input(real if fake is None else NoisyBatch.cat([real, fake]))
            prediction, logits = nets["critic"](self._cast(noisy), **heads, share_features=fake is None)
            on_real, on_fake = logits.chunk(2)
            losses = {
                "denoising": denoising_loss(self.teacher, prediction, x, noise, noisy.t),
                "discriminator": adversarial.critic_weight * discriminator_loss(adversarial.loss, on_real, on_fake),
            }
            if adversarial.r1_weight:
                penalty = gradient_penalty(on_real, real.x)
                losses["r1"] = adversarial.critic_weight * adversarial.r1_weight * penalty
        return StepOutput(losses, accuracies(on_real, on_fake))

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        return alarms(figures)

    # Parts ------------------------------------------------------------------------------------------------------------

    @property
    def _adversarial(self) -> AdversarialConfig:
        assert self.config.adversarial is not None  # asked for only where there is a discriminator
        return self.config.adversarial

    def _cast(self, noisy: NoisyBatch) -> NoisyBatch:
        return replace(noisy, x=noisy.x.to(DTYPES[self.config.x0_dtype]))

    def _x0(self, net: DenoiserLike, noisy: NoisyBatch) -> Samples:
        return self._denoise(net, noisy).x0

    def _denoise(self, net: DenoiserLike, noisy: NoisyBatch) -> Prediction:
        noisy = self._cast(noisy)
        p = net(noisy.x, noisy.t, noisy.cond)
        return p._replace(x0=p.x0.float())

    def _real_x0(self, nets: Networks, batch: Batch, noisy: NoisyBatch, scale: float) -> Samples:
        """The teacher's x0: what the real score says."""
        noisy = self._cast(noisy)
        return GuidedDenoiser(nets["teacher"], noisy.cond, batch.uncond, scale)(noisy.x, noisy.t).x0

    def _real(self, batch: Batch) -> tuple[Samples, Cond]:
        """Real samples for the discriminator, and their conditions."""
        if self.config.real_images:
            return batch.x0, batch.cond
        _, x0, cond = pick_pairs(self.pairs, self.teacher, batch.size, batch.device)
        return x0, cond

    def _logits(self, nets: Networks, noisy: NoisyBatch) -> Logits:
        logits: Logits = nets["critic"](**self._head_input(noisy))[1]
        return logits

    def _head_input(self, noisy: NoisyBatch) -> HeadInput:
        """Input of the discriminator's heads: noisy samples for the critic, or the frozen teacher's features of them."""
        if self._adversarial.feature_source == "critic":
            return {"discriminate": noisy}
        return {"given": features(self.teacher.denoiser, self.layers, noisy)}
