"""One optimizer update: losses of micro-batches, their gradients, the learning rate, moving averages."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewstep.config import MethodConfig, OptimConfig, RunConfig
from fewstep.errors import FewstepError
from fewstep.methods.base import Batch, Carry, Losses, Networks, Step, StepOutput
from fewstep.training.checkpoint import Progress, checkpoints
from fewstep.training.log import UpdateResult
from fewstep.training.optim import lr_factor
from fewstep.training.roles import Roles, RoleState, follow, networks, require_grad_only

if TYPE_CHECKING:
    from accelerate import Accelerator


class NonFiniteError(FewstepError):
    """Too many updates in a row had a loss or gradient that is not a finite number."""


@dataclass(frozen=True)
class Updater:
    """Runs updates, and skips those whose gradient is not finite.

    Attributes:
        progress: has the number of the current iteration, and counts updates that were skipped in a row.
    """

    config: RunConfig[MethodConfig]
    accelerator: "Accelerator"
    roles: Roles
    progress: Progress

    def update(self, step: Step, batches: Sequence[Batch], carries: Sequence[dict[str, Tensor]]) -> UpdateResult:
        """Update one role once, on the micro-batches of an iteration.

        carries: what earlier steps have carried over, for each micro-batch; this step's is added.
        Raises NonFiniteError where more than `train.max_nonfinite` in a row were skipped.
        """
        role = self.roles[step.role]
        optim = role.role.optim
        assert optim is not None and role.optimizer is not None  # a step descends a role that learns
        require_grad_only(self.roles, step.role)
        outputs = self._gradients(step, role, batches, carries)
        limit = math.inf if optim.max_grad_norm is None else optim.max_grad_norm  # infinite: the norm is only measured
        norm = self.accelerator.clip_grad_norm_(role.tensors.parameters, limit)
        # The scaler of fp16 skips such updates by itself.
        finite = self.accelerator.mixed_precision == "fp16" or bool(torch.isfinite(norm))
        if finite:
            role.updates += 1
            lr = self._learning_rate(step, optim, role.updates)
            for group in role.optimizer.param_groups:
                group["lr"] = lr
            role.optimizer.step()
        self._count_nonfinite(finite)
        role.optimizer.zero_grad()
        if finite:
            follow(self.roles, step.role)
        return UpdateResult(_means(outputs) | {f"{step.role}_grad_norm": norm.detach()}, outputs)

    def _gradients(
        self, step: Step, role: RoleState, batches: Sequence[Batch], carries: Sequence[dict[str, Tensor]]
    ) -> list[StepOutput]:
        nets = networks(self.roles, step.role)
        outputs: list[StepOutput] = []
        for i, (batch, carry) in enumerate(zip(batches, carries, strict=True)):
            # Processes exchange gradients at the last micro-batch.
            with self.accelerator.no_sync(role.wrapped) if i < len(batches) - 1 else nullcontext():
                outputs.append(self._backward(step, nets, batch, carry))
            carry.update(outputs[-1].carry)
        return outputs

    def _backward(self, step: Step, nets: Networks, batch: Batch, carry: Carry) -> StepOutput:
        """The loss of a micro-batch and its gradients; what is returned keeps no graph alive."""
        with self.accelerator.autocast():
            output = step.loss(nets, batch, carry)
        self.accelerator.backward(torch.stack(list(output.losses.values())).sum() / self.config.train.accumulate)
        losses, logs = ({key: value.detach() for key, value in d.items()} for d in (output.losses, output.logs))
        return replace(output, losses=losses, logs=logs)

    def _learning_rate(self, step: Step, optim: OptimConfig, update: int) -> float:
        updates = self.config.max_iterations // step.every
        factor = lr_factor(update, updates, optim.warmup_iterations, optim.decay)
        return optim.lr * factor * step.lr_scale(self.progress.iteration)

    def _count_nonfinite(self, finite: bool) -> None:
        self.progress.nonfinite = 0 if finite else self.progress.nonfinite + 1
        if self.progress.nonfinite > self.config.train.max_nonfinite:
            last = checkpoints(self.config.output_dir / "checkpoints")
            raise NonFiniteError(
                "train.max_nonfinite", f"{self.progress.nonfinite} updates in a row that were not finite",
                f"at most {self.config.train.max_nonfinite}",
                f"Lower method.optim.lr. Last good checkpoint: {last[-1] if last else 'none'}",
            )  # fmt: skip


def _means(outputs: Sequence[StepOutput]) -> Losses:
    means: Losses = {}
    for output in outputs:
        for key, value in output.losses.items():
            means[key] = means.get(key, torch.zeros((), device=value.device)) + value / len(outputs)
    return means
