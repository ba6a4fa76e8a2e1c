"""Settings of distribution matching; free of torch, so that a mistake in them is reported at once."""

from typing import Annotated, Literal

from annotated_types import Ge, Le, MinLen
from pydantic import AfterValidator, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from fewstep.config import MethodConfig, OptimConfig, Strict

Fraction = Annotated[float, Ge(0), Le(1)]


def _ordered(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError(f"found {list(span)}; expected an interval, its lower end first")
    return span


Range = Annotated[tuple[Fraction, Fraction], AfterValidator(_ordered)]
"""Noise levels, as fractions of the training timesteps."""
Timesteps = Annotated[tuple[Annotated[int, Ge(0)], ...], MinLen(1)]
FULL: tuple[float, float] = (0.0, 1.0)


class GuidanceConfig(Strict):
    """Guidance of the teacher, which the student learns and then needs none."""

    scale: Annotated[float, Ge(1)] = 1.0
    """Guidance scale, 1 = none."""
    noise_range: Range | None = None
    """Noise at which guidance is computed, drawn separately from the matching (decoupled DMD); null = one draw for both."""

    @model_validator(mode="after")
    def _guides(self) -> "GuidanceConfig":
        if self.noise_range is not None and self.scale == 1:
            raise ValueError(
                f"noise_range: found {list(self.noise_range)}; expected null without guidance. Set scale above 1"
            )
        return self


class MatchingConfig(Strict):
    """Distribution matching: the difference of the fake and the real score."""

    weight: PositiveFloat = 1.0
    """Weight in the student's loss."""
    range: Range = (0.02, 0.98)
    """Noise at which the two scores are compared."""
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon"] = "reverse_kl"
    """Divergence that is descended; all but the paper's reverse_kl weight samples by the discriminator's density ratio."""


class AdversarialConfig(Strict):
    """A discriminator on features of noisy samples."""

    weight: PositiveFloat
    """Weight in the student's loss."""
    critic_weight: PositiveFloat = 0.01
    """Weight of the discriminator's loss beside the critic's denoising."""
    loss: Literal["softplus", "hinge"] = "softplus"
    """Form of the adversarial loss; softplus is the non-saturating one."""
    range: Range = FULL
    """Noise added to the discriminator's inputs."""
    share_noise: bool = False
    """Whether the discriminator sees samples at the noise at which they are matched and denoised: fewer forwards, correlated
    terms."""
    real: Literal["images", "teacher"] = "images"
    """Real samples: the data's images, or the teacher's samples of `pairs`."""
    feature_source: Literal["critic", "teacher"] = "critic"
    """Network whose features the discriminator sees: the critic, which learns with it, or the frozen teacher."""
    layers: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """Modules of the network with one discriminator head each, by name; null = the middle block."""
    r1_weight: NonNegativeFloat = 0.0
    """Weight of the discriminator's gradient penalty on real samples, within critic_weight."""

    @model_validator(mode="after")
    def _shares(self) -> "AdversarialConfig":
        if self.share_noise and (self.feature_source != "critic" or self.range != FULL):
            raise ValueError(
                f"share_noise: found true with feature_source {self.feature_source} and range {list(self.range)}; expected the "
                "critic's features at the noise of the other terms. Set feature_source to critic and leave range out"
            )
        return self


class RegressionConfig(Strict):
    """Distance to the teacher's sample from the same initial noise (DMD), on `pairs`; for one step only."""

    weight: PositiveFloat
    """Weight in the student's loss."""
    distance: Literal["l2", "huber", "lpips"] = "l2"
    """Distance, on latents, or on decoded images (lpips)."""


class PairsConfig(Strict):
    """Samples of the teacher with the initial noise they come from."""

    count: PositiveInt
    """Samples that the teacher draws before training; they are kept in the run's folder and not drawn twice."""
    solver_steps: PositiveInt = 50
    """Steps of the teacher's ODE for each sample (DDIM)."""
    guidance_scale: PositiveFloat | None = None
    """Guidance of these samples, 1 = none; null = guidance.scale."""
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
    """The student's training inputs after its first step: its own samples of fewer steps, or images, noised."""
    student_update_every: PositiveInt = 5
    """The critic learns on every iteration, the student on each of these (two time scales)."""
    guidance: GuidanceConfig = GuidanceConfig()
    """Guidance of the teacher."""
    matching: MatchingConfig | None = MatchingConfig()
    """Distribution matching; null = off."""
    adversarial: AdversarialConfig | None = None
    """Discriminator; null = none, and no images are needed for one."""
    regression: RegressionConfig | None = None
    """Regression onto the teacher's samples; null = off."""
    pairs: PairsConfig | None = None
    """Samples of the teacher, for regression or as real ones; null = none."""
    x0_dtype: Literal["float32", "float64"] = "float32"
    """Type in which network outputs are turned into x0; the official code takes float64."""

    @model_validator(mode="after")
    def _possible(self) -> "DMD2Config":
        if isinstance(self.steps, tuple):
            _check_grid(self.steps)
        if not (self.matching or self.adversarial or self.regression):
            raise ValueError(
                "matching: found null, as are adversarial and regression; expected one of them to learn from"
            )
        if self.regression and self.count != 1:
            raise ValueError(
                f"regression: found steps {self.steps}; expected 1, for which pairs of noise and sample are"
            )
        self._check_divergence()
        self._check_pairs()
        return self

    def _check_divergence(self) -> None:
        divergence = self.matching.divergence if self.matching else "reverse_kl"
        if divergence == "reverse_kl":
            return
        if self.adversarial is None:
            raise ValueError(
                f"matching.divergence: found {divergence}; expected reverse_kl without a discriminator. Set adversarial.weight"
            )
        if self.adversarial.loss != "softplus":
            raise ValueError(
                f"matching.divergence: found {divergence} with adversarial.loss {self.adversarial.loss}; expected softplus, "
                "whose logits are density ratios"
            )

    def _check_pairs(self) -> None:
        users = {"regression": self.regression is not None, "adversarial.real": self.real_pairs}
        using = [key for key, uses in users.items() if uses]
        if using and self.pairs is None:
            raise ValueError(f"pairs: found null; expected the teacher's samples for {using[0]}. Set pairs.count")
        if self.pairs is not None and not using:
            raise ValueError(
                f"pairs: found {self.pairs.count} unused samples; expected null, regression or adversarial.real teacher"
            )

    @property
    def count(self) -> int:
        """Network evaluations at inference."""
        return self.steps if isinstance(self.steps, int) else len(self.steps)

    @property
    def has_fake_score(self) -> bool:
        """Whether a critic learns: the score of the student's samples, and the discriminator's features."""
        return self.matching is not None or self.adversarial is not None

    @property
    def real_pairs(self) -> bool:
        """Whether the discriminator's real samples are the teacher's."""
        return self.adversarial is not None and self.adversarial.real == "teacher"

    @property
    def real_images(self) -> bool:
        """Whether they are the data's images."""
        return self.adversarial is not None and self.adversarial.real == "images"

    @property
    def spacing(self) -> int | None:
        """Distance of the grid's timesteps; None = as even as the teacher's allow."""
        return None if isinstance(self.steps, int) else self.steps[-1] + 1


def _check_grid(steps: tuple[int, ...]) -> None:
    """No stock scheduler runs any other list for a count alone."""
    spacing = steps[-1] + 1
    even = tuple(spacing * n - 1 for n in range(len(steps), 0, -1))
    if steps != even:
        raise ValueError(
            f"steps: found {list(steps)}; expected timesteps n k - 1, ..., 2 k - 1, k - 1, which stock diffusers runs for a "
            f"count alone (k = {spacing} gives {list(even)})"
        )
    if len(steps) > 8:
        raise ValueError(f"steps: found {len(steps)} timesteps; expected 1 to 8")
