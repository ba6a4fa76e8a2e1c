"""Distribution matching distillation with an adversarial loss, DMD2 (Yin et al. 2024); without it and with pairs, DMD."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.diffusion.grids import trailing_timesteps
from fewstep.diffusion.guidance import GuidedDenoiser, both_sides, concatenate, guide
from fewstep.diffusion.losses import (
    descend,
    discriminator_loss,
    divergence_weights,
    generator_loss,
    gradient_penalty,
    huber,
    l2,
    matching_gradient,
)
from fewstep.diffusion.prediction import Prediction, add_noise, output_of
from fewstep.diffusion.schedule import like
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
from fewstep.methods.discriminator import Noised, features, named_layers, new_critic, noised, simulated_input
from fewstep.methods.distribution_matching.config import DMD2Config, Range
from fewstep.methods.distribution_matching.diagnostics import accuracies, alarms, prompt_distances, sample_figures
from fewstep.methods.perceptual import load_lpips
from fewstep.methods.trajectories import Trajectories, TrajectorySettings
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Cond, DenoiserLike


class DMD2(Method):
    """The student's samples, at every noise level, come to be distributed as the teacher's.

    Roles: the teacher; the student; the critic, a denoiser of the student's samples that also tells them from real ones.
    """

    name = "dmd2"
    paper = (
        "Yin et al. 2024, Improved Distribution Matching Distillation for Fast Image Synthesis, arXiv 2405.14867; "
        "Yin et al. 2024, One-step Diffusion with Distribution Matching Distillation, arXiv 2311.18828"
    )

    config: DMD2Config

    def __init__(self, config: DMD2Config, teacher: Teacher) -> None:
        super().__init__(config, teacher)
        if config.guidance_scale != 1:
            require_guidable(teacher, "guidance_scale", "1")
        self.needs_images = (config.gan_weight > 0 and config.gan_real == "images") or config.inputs == "noised_data"
        self.timesteps = self._timesteps(config.count)
        self.layers = named_layers(teacher, config.gan_layers) if config.gan_weight else ()
        self.pairs: Trajectories | None = None
        self.distance = self._distance()

    # Roles, steps, sampling -------------------------------------------------------------------------------------------

    def roles(self) -> dict[str, Role]:
        c = self.config
        roles = {
            "teacher": Role(self.teacher.denoiser),
            "student": Role(self.teacher.students.new(), optim=c.optim),
        }
        if c.criticised:
            roles["critic"] = Role(new_critic(self.teacher, self.layers), optim=c.critic_optim or c.optim)
        return roles

    def _distance(self) -> Callable[[Tensor, Tensor], Tensor]:
        match self.config.regression_distance if self.config.regression_weight else "l2":
            case "lpips":
                lpips, decode = load_lpips(), self.teacher.decode
                return lambda a, b: lpips(decode(a), decode(b)).mean()
            case "huber":
                return huber
        return l2

    def steps(self) -> tuple[Step, ...]:
        student = Step("student", self.student_loss, every=self.config.student_update_every)
        return (student, Step("critic", self.critic_loss)) if self.config.criticised else (student,)

    def scheduler(self):  # type: ignore[no-untyped-def]  # diffusers' class is not imported here
        spacing = self.config.spacing or self.teacher.num_train_timesteps // self.config.count
        return self.teacher.samplers.renoise(self.config.count, spacing=spacing)

    def allowed_steps(self) -> tuple[int, ...]:
        """The counts whose timesteps are the first of the trained ones: their last sample was matched, too."""
        trained = self.timesteps.tolist()
        counts = self.teacher.samplers.counts(len(trained))
        return tuple(n for n in counts if self._timesteps(n).tolist() == trained[:n])

    def _timesteps(self, count: int) -> Tensor:
        return self.teacher.samplers.grid(self.scheduler(), count)[:-1]

    def prepare(self, at: Preparation) -> None:
        """The teacher draws the pairs that are not in the run's folder yet."""
        c = self.config.pairs
        if c is None:
            return
        scale = self.config.guidance_scale if c.guidance_scale is None else c.guidance_scale
        times = trailing_timesteps(c.solver_steps, self.teacher.num_train_timesteps)
        settings = TrajectorySettings(c.count, c.batch_size, times, times[:1], "ddim", (scale, scale))
        self.pairs = at.trajectories(self.teacher, "pairs", settings)

    # The student's turn -----------------------------------------------------------------------------------------------

    def student_loss(self, nets: Networks, batch: Batch, carry: Carry = NOTHING) -> StepOutput:
        """Distribution matching, adversarial and regression terms on one sample, which the critic's turn is left."""
        c = self.config
        found = StepOutput({})
        losses: Losses = {}
        if c.criticised:
            x = self.sample(nets["student"], batch)
        if c.dm_weight:
            found = self.matching(nets, batch, x)
            losses |= found.losses
        if c.gan_weight and "gan" not in losses:
            losses["gan"] = c.gan_weight * self.realism(nets, batch, x)
        if c.regression_weight:
            losses["regression"] = c.regression_weight * self.regression(nets, batch)
        return StepOutput(losses, found.logs, carry={"sample": x.detach()} if c.criticised else {})

    def sample(
        self, student: DenoiserLike, batch: Batch, stop: int | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The student's x0 [B, C, h, w] after `stop` simulated steps and one that gradients see.

        Args:
            stop: 0 ... steps - 1; drawn, the same on every process, if None.
            noise: of the last input, [B, C, h, w]: all of it for stop = 0; drawn if None.
        """
        shape = (batch.size, *self.teacher.latent_shape)
        noise = torch.randn(shape, device=batch.device) if noise is None else noise
        t = self.timesteps.to(batch.device)
        if self.config.inputs == "noised_data":
            index = torch.randint(len(t), (batch.size,), device=batch.device)
            index = index if stop is None else torch.full_like(index, stop)
            data = add_noise(self.teacher.schedule, batch.x0, noise, t[index])
            x_t = torch.where((index == 0).view(-1, *[1] * (noise.ndim - 1)), noise, data)
            return self._x0(student, Noised(x_t, t[index], batch.cond))
        if stop is None:
            stop = int(torch.randint(len(t), (), generator=batch.generator))

        def denoise(x_t: Tensor, t: Tensor) -> Prediction:
            return self._denoise(student, Noised(x_t, t, batch.cond))

        x_t = simulated_input(denoise, self.teacher.schedule, t, stop, noise)
        return denoise(x_t, t[stop].expand(batch.size)).x0

    def matching(
        self, nets: Networks, batch: Batch, x: Tensor, t: Tensor | None = None, noise: Tensor | None = None
    ) -> StepOutput:
        """dm, whose gradient in x moves its distribution to the teacher's; t [B], noise like x: drawn if None.

        With `gan_share_noise` also gan, of the same noised x.
        """
        c, teacher = self.config, nets["teacher"]
        at = noised(self.teacher, x, c.dm_range, batch.cond, t, noise)
        losses, logits = {}, None
        if c.gan_share_noise:
            prediction, logits = nets["critic"](self._cast(at), alike=True)
            fake = prediction.x0.detach()
            losses["gan"] = c.gan_weight * generator_loss(c.gan_loss, logits)
        with torch.no_grad():
            at = at._replace(x_t=at.x_t.detach())
            apart = c.guidance_noise_range
            x_t, u, cond = self._cast(at)
            real = GuidedDenoiser(teacher, cond, batch.uncond, 1.0 if apart else c.guidance_scale)(x_t, u).x0
            if logits is None:
                fake = nets["critic"](self._cast(at))[0].x0
            gradient = matching_gradient(x, real, fake)
            if apart:
                # guided - critic = (conditional - critic) + (guided - conditional), the last at noise of its own.
                other = self._cast(noised(self.teacher, x, apart, batch.cond))
                plain, uncond = both_sides(teacher, *other, batch.uncond)
                gradient = gradient + matching_gradient(x, guide(plain, uncond, c.guidance_scale).x0, plain.x0)
            if c.divergence != "reverse_kl":
                seen = nets["critic"](**self._judged(nets, at))[1] if logits is None else logits
                gradient = gradient * like(divergence_weights(c.divergence, seen), x)
            logs = sample_figures(x, real, fake) | prompt_distances(x, real, batch.raw)
        return StepOutput({"dm": c.dm_weight * descend(x, gradient.to(x.dtype))} | losses, logs)

    def realism(
        self, nets: Networks, batch: Batch, x: Tensor, t: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """The student's side of the adversarial loss, on noised x."""
        at = noised(self.teacher, x, self.config.gan_range, batch.cond, t, noise)
        return generator_loss(self.config.gan_loss, nets["critic"](**self._judged(nets, at))[1])

    def regression(self, nets: Networks, batch: Batch) -> Tensor:
        """Distance to the teacher's samples from the same noises, on pairs of their own (DMD)."""
        noise, x0, cond = self._pick(batch)
        t = self.timesteps[0].to(batch.device).expand(batch.size)
        return self.distance(self._x0(nets["student"], Noised(noise, t, cond)), x0)

    # The critic's turn ------------------------------------------------------------------------------------------------

    def critic_loss(
        self,
        nets: Networks,
        batch: Batch,
        carry: Carry = NOTHING,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> StepOutput:
        """Denoising of the student's samples over all noise levels, and telling them from real ones, in one call.

        t [B], noise [B, C, h, w]: of the denoising; drawn if None.
        """
        c = self.config
        x = carry.get("sample")
        if x is None:
            with torch.no_grad():
                x = self.sample(nets["student"], batch)
        noise = torch.randn_like(x) if noise is None else noise
        at = noised(self.teacher, x, (0.0, 1.0), batch.cond, t, noise)
        if not c.gan_weight:
            prediction, _ = nets["critic"](self._cast(at))
            return StepOutput({"denoising": self._denoising(prediction, x, noise, at.t)})
        fake = None if c.gan_share_noise else noised(self.teacher, x, c.gan_range, batch.cond)
        real = noised(self.teacher, *self._real(batch))
        # The penalty differentiates twice, which fused attention cannot.
        with sdpa_kernel(SDPBackend.MATH) if c.r1_weight else nullcontext():
            real.x_t.requires_grad_(c.r1_weight > 0)
            judged = self._judged(nets, real if fake is None else _both(real, fake))
            prediction, logits = nets["critic"](self._cast(at), **judged, alike=fake is None)
            on_real, on_fake = logits.chunk(2)
            losses = {
                "denoising": self._denoising(prediction, x, noise, at.t),
                "discriminator": c.gan_critic_weight * discriminator_loss(c.gan_loss, on_real, on_fake),
            }
            if c.r1_weight:
                penalty = gradient_penalty(on_real, real.x_t)
                losses["r1"] = c.gan_critic_weight * c.r1_weight * penalty
        return StepOutput(losses, accuracies(on_real, on_fake))

    def warnings(self, figures: Mapping[str, float]) -> list[str]:
        return alarms(figures)

    # Parts ------------------------------------------------------------------------------------------------------------

    def _cast(self, at: Noised) -> Noised:
        return at._replace(x_t=at.x_t.to(getattr(torch, self.config.x0_dtype)))

    def _x0(self, net: DenoiserLike, at: Noised) -> Tensor:
        return self._denoise(net, at).x0

    def _denoise(self, net: DenoiserLike, at: Noised) -> Prediction:
        p = net(*self._cast(at))
        return p._replace(x0=p.x0.float())

    def _denoising(self, p: Prediction, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean square error of the network's own output, whatever it predicts (as in its own training)."""
        schedule, kind = self.teacher.schedule, self.teacher.denoiser.prediction_type
        wanted = output_of(schedule, kind, Prediction(x0, noise), t)
        root = like(self.teacher.error_weight(t).sqrt(), wanted)
        return l2(root * output_of(schedule, kind, p, t), root * wanted).float()

    def _real(self, batch: Batch) -> tuple[Tensor, Range, Cond]:
        if self.config.gan_real == "images":
            return batch.x0, self.config.gan_range, batch.cond
        _, x0, cond = self._pick(batch)
        return x0, self.config.gan_range, cond

    def _pick(self, batch: Batch) -> tuple[Tensor, Tensor, Cond]:
        if self.pairs is None:
            raise ValueError("the teacher's pairs are not there yet: call prepare first")
        index, cond = self.pairs.pick(batch.size, self.teacher)
        noise, x0 = self.pairs.x[index].to(batch.device).unbind(1)
        return noise, x0, cond

    def _judged(self, nets: Networks, at: Noised) -> dict[str, Any]:
        """What the critic's heads are to judge: noised samples, or the frozen teacher's features of them."""
        if self.config.gan_feature_source == "critic":
            return {"judge": at}
        return {"given": features(self.teacher.denoiser, self.layers, at)}


def _both(a: Noised, b: Noised) -> Noised:
    return Noised(torch.cat([a.x_t, b.x_t]), torch.cat([a.t, b.t]), concatenate(a.cond, b.cond))
