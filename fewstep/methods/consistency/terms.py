"""Terms beside the consistency loss: a reward on the student's samples, and an adversarial loss on the ends of phases."""

from typing import Protocol

import torch

from fewstep.config import OptimConfig
from fewstep.diffusion.guidance import unguided
from fewstep.diffusion.losses import discriminator_loss, generator_loss
from fewstep.diffusion.prediction import Prediction
from fewstep.diffusion.rollout import Move, rollout
from fewstep.diffusion.shapes import GridTimes, Samples, Times
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Carry, Networks, Preparation, Reward, Role, Step, StepOutput
from fewstep.methods.consistency import settings
from fewstep.methods.consistency.adversarial import Ends, judge, new_discriminator, times_in_phase
from fewstep.methods.consistency.states import State
from fewstep.methods.discriminator import named_layers
from fewstep.methods.distribution_matching.diagnostics import accuracies
from fewstep.methods.noisy_batch import NoisyBatch
from fewstep.teachers.base import Teacher


class Term(Protocol):
    """A term of the student's loss, which may ask the student about samples of its own."""

    def samples(self, nets: Networks, batch: Batch, state: State) -> NoisyBatch | None:
        """Further inputs of the student's one call; None for none."""

    def __call__(
        self, nets: Networks, batch: Batch, state: State, ends: tuple[Samples, Samples], sample: Prediction | None
    ) -> StepOutput:
        """ends: f of student and target; sample: the student's prediction for `samples`."""


class RewardTerm:
    """A reward on the student's samples by one step of its sampler: only through this step the reward gives gradients.

    times: of the sampler's steps; move: from one to the next; embedded: whether it receives the guidance scale.
    """

    def __init__(
        self, teacher: Teacher, reward: settings.Reward, weight: float, times: GridTimes, move: Move, embedded: bool
    ) -> None:
        self.teacher, self.settings, self.weight = teacher, reward, weight
        self.times, self.move, self.embedded = times, move, embedded
        self.reward: Reward | None = None

    def samples(self, nets: Networks, batch: Batch, state: State) -> NoisyBatch:
        """Inputs of a random step of the averaged student's sampler."""
        rows = torch.arange(min(self.settings.samples, batch.size), device=batch.device)
        noise = torch.randn(len(rows), *self.teacher.latent_shape, device=batch.device)
        start = state.fresh.rows(rows)
        # Shared across ranks; otherwise they would wait for the rank with the longest rollout.
        stop = int(torch.randint(len(self.times), (), generator=batch.generator))
        times = self.times[: stop + 1].to(batch.device)
        denoise = unguided(nets["ema"], start.cond, start.guidance_scale if self.embedded else None)
        x = rollout(denoise, self.teacher.schedule, noise, times, self.move)
        return start.with_x(x, times[-1].expand(len(rows)))

    def __call__(
        self, nets: Networks, batch: Batch, state: State, ends: tuple[Samples, Samples], sample: Prediction | None
    ) -> StepOutput:
        """-reward, or max(0, ceiling - reward); gradients go through decoder and reward model."""
        if self.reward is None or sample is None:
            raise RuntimeError("reward: found none; expected the model that prepare loads. Call prepare first")
        images = (self.teacher.decode(sample.x0) / 2 + 0.5).clamp(0, 1)
        prompts = list(batch.raw[: len(images)]) if self.teacher.conditions == "prompt" else None
        reward, ceiling = self.reward(images, prompts), self.settings.ceiling
        loss = -reward.mean() if ceiling is None else (ceiling - reward).relu().mean()
        return StepOutput({"reward": self.weight * loss}, {"reward_value": reward.detach().mean()})

    def prepare(self, at: Preparation) -> None:
        name = self.settings.name
        try:
            self.reward = at.load_reward(name)
        except FewstepError as e:
            found = e.found if name in str(e.found) else f"{name} with {e.found}"
            raise type(e)("method.reward.name", found, e.expected, e.hint) from None
        except ValueError as e:
            raise FewstepError("method.reward.name", f"{name}, which fails ({e})", "a reward of two images") from None


class AdversarialTerm:
    """The adversarial loss of phased consistency on f of the student (fake) and of the target (real)."""

    def __init__(self, teacher: Teacher, adversarial: settings.Adversarial, phases: int) -> None:
        self.teacher, self.settings = teacher, adversarial
        self.layers = named_layers(teacher, adversarial.layers, "method.adversarial.layers")
        self.span = teacher.num_train_timesteps // phases

    def role(self, optim: OptimConfig) -> Role:
        """The discriminator; optim: the student's optimizer."""
        return Role(new_discriminator(self.teacher, self.layers), optim=self.settings.optim or optim)

    def step(self) -> Step:
        return Step("discriminator", self.discriminator_loss)

    def samples(self, nets: Networks, batch: Batch, state: State) -> None:
        return None

    def __call__(
        self, nets: Networks, batch: Batch, state: State, ends: tuple[Samples, Samples], sample: Prediction | None
    ) -> StepOutput:
        fake, real = ends
        both = Ends(fake, real, state.end, state.at.cond)
        logits = nets["discriminator"](judge(self.teacher, self.layers, both.fake, both, self._times(both)))
        return StepOutput(
            {"gan": self.settings.weight * generator_loss(self.settings.loss, logits)}, carry=both.carried()
        )

    def discriminator_loss(self, nets: Networks, batch: Batch, carry: Carry) -> StepOutput:
        """Discrimination of the student's ends of phases from the targets, in one call."""
        ends = Ends.from_carried(carry)
        t = self._times(ends)
        with torch.no_grad():
            features = [judge(self.teacher, self.layers, x, ends, t) for x in (ends.real, ends.fake)]
        pairs = [torch.cat(pair) for pair in zip(*features, strict=True)]
        on_real, on_fake = nets["discriminator"](pairs).chunk(2)
        loss = discriminator_loss(self.settings.loss, on_real, on_fake)
        return StepOutput({"discriminator": loss}, accuracies(on_real, on_fake))

    def _times(self, ends: Ends) -> Times:
        return times_in_phase(ends.t, self.span, self.teacher.num_train_timesteps)
