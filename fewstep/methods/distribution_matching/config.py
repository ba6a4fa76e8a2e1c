"""Settings of distribution matching; free of torch, so that a mistake in them is told at once."""

from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from fewstep.config import MethodConfig, OptimConfig, Strict

Fraction = Annotated[float, Ge(0), Le(1)]
Range = tuple[Fraction, Fraction]
Timesteps = Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)]


class PairsConfig(Strict):
    count: PositiveInt
    """Samples that the teacher draws before training; they are kept in the run's folder and not drawn twice."""
    solver_steps: PositiveInt = 50
    """Steps of the teacher's ODE for each sample (DDIM)."""
    guidance_scale: PositiveFloat | None = None
    """Guidance of these samples, 1 = none; null = guidance_scale."""
    batch_size: PositiveInt = 64
    """Samples drawn at a time; also the size of a file."""


class DMD2Config(MethodConfig):
    name: Literal["dmd2"] = "dmd2"
    """The method."""
    optim: OptimConfig
    """Optimizer of the student."""
    critic_optim: OptimConfig | None = None
    """Optimizer of the critic and its heads; null = the student's settings."""
    steps: Annotated[int, Ge(1), Le(8)] | Timesteps = 4
    """Network evaluations at inference, on an even grid; or its timesteps, from the noisiest: n k - 1, ..., 2 k - 1, k - 1."""
    inputs: Literal["simulated", "noised_data"] = "simulated"
    """What the student is trained on beyond its first step: its own samples of fewer steps, or images, noised."""
    student_update_every: PositiveInt = 5
    """The critic learns on every iteration, the student on each of these (two time scales)."""
    guidance_scale: Annotated[float, Ge(1)] = 1.0
    """Guidance of the teacher, 1 = none; the student learns it and needs none."""
    dm_weight: NonNegativeFloat = 1.0
    """Weight of distribution matching in the student's loss; 0 = off."""
    dm_range: Range = (0.02, 0.98)
    """Noise at which teacher and critic are compared, as fractions of the training timesteps."""
    guidance_noise_range: Range | None = None
    """Noise at which guidance pulls, apart from the matching (decoupled DMD); null = one draw for both."""
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon"] = "reverse_kl"
    """Divergence that is descended; all but the paper's reverse_kl weigh samples by the discriminator's density ratio."""
    gan_weight: NonNegativeFloat = 0.0
    """Weight of the adversarial term in the student's loss; 0 = no discriminator, and no images are needed for one."""
    gan_critic_weight: PositiveFloat = 0.01
    """Weight of the discriminator's loss beside the critic's denoising."""
    gan_loss: Literal["softplus", "hinge"] = "softplus"
    """Form of the adversarial loss; softplus is the non-saturating one."""
    gan_range: Range = (0.0, 1.0)
    """Noise added before the discriminator looks, as fractions of the training timesteps."""
    gan_share_noise: bool = False
    """Whether samples are judged at the noise at which they are matched and denoised: fewer forwards, correlated terms."""
    gan_real: Literal["images", "teacher"] = "images"
    """What counts as real: the data's images, or the teacher's samples of `pairs`."""
    gan_feature_source: Literal["critic", "teacher"] = "critic"
    """Network whose features the discriminator sees: the critic, which learns with it, or the frozen teacher."""
    gan_layers: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """Modules of the network with one discriminator head each, by name; null = the middle block."""
    r1_weight: NonNegativeFloat = 0.0
    """Weight of the discriminator's gradient penalty on real samples, within gan_critic_weight."""
    regression_weight: NonNegativeFloat = 0.0
    """Weight of the distance to the teacher's sample from the same noise (DMD), on `pairs`; for one step only."""
    regression_distance: Literal["l2", "huber", "lpips"] = "l2"
    """Distance of the regression: on latents, or on decoded images (lpips)."""
    pairs: PairsConfig | None = None
    """Samples of the teacher, for regression or as real ones; null = none."""
    x0_dtype: Literal["float32", "float64"] = "float32"
    """Type in which network outputs are turned into x0; the official code takes float64."""

    @model_validator(mode="after")
    def _possible(self) -> "DMD2Config":
        for key in ("dm_range", "guidance_noise_range", "gan_range"):
            span = getattr(self, key)
            if span is not None and not span[0] <= span[1]:
                raise ValueError(f"{key}: {list(span)} is not an interval")
        if isinstance(self.steps, tuple):
            _check_grid(self.steps)
        if not (self.dm_weight or self.gan_weight or self.regression_weight):
            raise ValueError("dm_weight, gan_weight and regression_weight are all 0: the student would learn nothing")
        if self.guidance_noise_range is not None and self.guidance_scale == 1:
            raise ValueError("guidance_noise_range: there is no guidance to draw noise for; set guidance_scale above 1")
        if not self.gan_weight:
            for key, value in (
                ("divergence", "reverse_kl"),
                ("gan_real", "images"),
                ("gan_layers", None),
                ("gan_share_noise", False),
                ("r1_weight", 0.0),
            ):
                if getattr(self, key) != value:
                    raise ValueError(f"{key}: {getattr(self, key)!r} needs the discriminator; set gan_weight above 0")
        if self.divergence != "reverse_kl" and self.gan_loss != "softplus":
            raise ValueError(
                f"divergence: {self.divergence} needs density ratios, which are the logits of gan_loss softplus alone"
            )
        if self.gan_share_noise and (self.gan_feature_source != "critic" or self.gan_range != (0.0, 1.0)):
            raise ValueError(
                "gan_share_noise: the critic's own features are judged, at the noise of the other terms; set gan_feature_source "
                "to critic and leave gan_range out"
            )
        if self.regression_weight and self.count != 1:
            raise ValueError(f"regression_weight: pairs of noise and sample are for one step, found steps {self.steps}")
        wants = [k for k, on in (("regression_weight", self.regression_weight), ("gan_real", self.real_pairs)) if on]
        if wants and self.pairs is None:
            raise ValueError(f"{wants[0]}: needs the teacher's samples; set pairs.count")
        if self.pairs is not None and not wants:
            raise ValueError("pairs: nothing uses them; set regression_weight above 0 or gan_real to teacher")
        return self

    @property
    def count(self) -> int:
        """Network evaluations at inference."""
        return self.steps if isinstance(self.steps, int) else len(self.steps)

    @property
    def criticised(self) -> bool:
        """Whether a critic learns: for the score of samples, or to tell them from real ones."""
        return self.dm_weight > 0 or self.gan_weight > 0

    @property
    def real_pairs(self) -> bool:
        return self.gan_weight > 0 and self.gan_real == "teacher"

    @property
    def spacing(self) -> int | None:
        """Distance of the grid's timesteps; None = as even as the teacher's allow."""
        return None if isinstance(self.steps, int) else self.steps[-1] + 1


def _check_grid(steps: tuple[int, ...]) -> None:
    """No stock scheduler runs any other list when it is told a count and nothing else."""
    spacing = steps[-1] + 1
    even = tuple(spacing * n - 1 for n in range(len(steps), 0, -1))
    if steps != even:
        raise ValueError(
            f"steps: stock diffusers, given only a count, runs timesteps n k - 1, ..., 2 k - 1, k - 1; {list(steps)} is not "
            f"of this form (k = {spacing} gives {list(even)})"
        )
    if len(steps) > 8:
        raise ValueError(f"steps: {len(steps)} timesteps; allowed: 1 to 8")
