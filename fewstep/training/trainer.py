"""The training loop: draws batches, runs the updates of a method's steps, logs, validates, checkpoints."""

from collections.abc import Sequence

import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm.auto import tqdm

from fewstep.config import MethodConfig, RunConfig
from fewstep.data import Source
from fewstep.evaluate.rewards.load import load_training_reward
from fewstep.methods.base import Batch, Method, Networks, Preparation, Reward, Step
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Denoiser
from fewstep.training.accelerator import new_accelerator
from fewstep.training.batches import Batches, Encodings, check_source, open_encodings, readable_source
from fewstep.training.callbacks import Callback
from fewstep.training.checkpoint import Checkpointer, Progress, load_module
from fewstep.training.early_stopping import EarlyStopping
from fewstep.training.log import Log, UpdateResult, Window
from fewstep.training.offloading import Offloading
from fewstep.training.optim import new_optimizer
from fewstep.training.roles import AVERAGE, OptimizerFactory, networks, new_roles
from fewstep.training.termination import Termination
from fewstep.training.updates import Updater
from fewstep.training.validation import BEST, Validation


class Trainer:
    """Trains a method's roles on a source.

    Args:
        optimizer_factory: makes the optimizer of a role.
        encodings: encoded prompts and images; None = those of `data.cache`, if it is set.
        offloading: which of the teacher's parts are offloaded to the CPU; None = as `memory` says.
        callbacks: called at lines of the log and checkpoints.
    """

    def __init__(
        self,
        config: RunConfig[MethodConfig],
        method: Method,
        teacher: Teacher,
        source: Source,
        *,
        optimizer_factory: OptimizerFactory = new_optimizer,
        encodings: Encodings | None = None,
        offloading: Offloading | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        check_source(config.data, method, teacher, source)
        self.config, self.method, self.teacher, self.folder = config, method, teacher, config.output_dir
        self.callbacks = callbacks
        self.accelerator = new_accelerator(config)
        self.device = self.accelerator.device
        self.offloading = offloading or Offloading.of(config.memory, teacher, self.device)
        set_seed(config.seed)  # the same on every process, for weights that are drawn
        encodings = encodings or open_encodings(config.data, teacher)
        source = readable_source(source, config.data, teacher, method.needs_images, encodings, self.accelerator)
        self.offloading.move_teacher(self.device, config.train, encodings is not None, method.needs_images)
        self.roles = new_roles(config, method, self.accelerator, self.offloading, optimizer_factory)
        self.offloading.offload_network()
        rank, world_size = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(config.seed + 1 + rank)  # and another on each, for noise
        self.batches = Batches(config, teacher, source, method.needs_images, self.device, rank, world_size, encodings)
        if config.data.cache_latents:
            teacher.placement.release(teacher.placement.image_parts)
        self.progress = Progress(EarlyStopping(config.score.patience, method.last_stage), best={})
        self.updater = Updater(config, self.accelerator, self.roles, self.progress)
        self.checkpointer = Checkpointer(
            self.folder / "checkpoints", config.checkpoint.keep, self.accelerator, self.roles, method, self.batches.stream
        )  # fmt: skip
        self.log = Log(self.folder, self.accelerator, config.log.tracker is not None, callbacks)
        self.validation = Validation(config, method, self.accelerator, self.average, source, self.progress, self.log)

    # The loop ---------------------------------------------------------------------------------------------------------

    @property
    def iteration(self) -> int:
        """Iterations that are done, which is the number of the current one."""
        return self.progress.iteration

    @iteration.setter
    def iteration(self, value: int) -> None:
        self.progress.iteration = value

    @property
    def average(self) -> Denoiser:
        """The student's moving average."""
        average = self.roles[AVERAGE].net
        assert isinstance(average, Denoiser)
        return average

    def preparation(self) -> Preparation:
        """Arguments of `Method.prepare`, before the first iteration."""
        source, a, teacher = self.batches.stream.source, self.accelerator, self.teacher

        def load_reward(name: str) -> Reward:
            return load_training_reward(name, self.device, teacher.image_size, teacher.conditions == "prompt")

        return Preparation(
            self.folder, source.conditions_at, len(source), self.config.seed, self.device, a.process_index,
            a.num_processes, a.wait_for_everyone, load_reward,
        )  # fmt: skip

    def fit(self) -> bool:
        """Train to the end. True when all iterations are done, or early stopping has ended them; False when a SIGTERM has
        stopped it after a checkpoint."""
        c, a = self.config, self.accelerator
        if a.is_main_process:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if c.log.tracker:
            a.init_trackers("fewstep", config={"method": self.method.name})
        self.method.prepare(self.preparation())
        try:
            with Termination(a) as termination:
                return self._loop(termination)
        finally:
            if c.log.tracker:
                a.end_training()

    def _loop(self, termination: Termination) -> bool:
        c, steps, window = self.config, self.method.steps(), Window()
        bar = tqdm(
            total=c.max_iterations, initial=self.iteration, desc=self.method.name,
            disable=not self.accelerator.is_main_process, dynamic_ncols=True,
        )  # fmt: skip
        stopped = False
        with bar:
            while self.iteration < c.max_iterations and not self.progress.stopping.over and not stopped:
                window.add_iteration(self.iterate(steps))
                self.iteration += 1
                bar.update()
                if self.iteration % c.log.every == 0 or self.iteration == c.max_iterations:
                    bar.set_postfix(self._log(window))
                    window = Window()
                self.validation.run()
                if self.iteration % c.checkpoint.every == 0:
                    self.save()
                stopped = termination.requested()
        if self.iteration % c.checkpoint.every:
            self.save()
        return not stopped

    def iterate(self, steps: Sequence[Step]) -> list[UpdateResult]:
        """Draw the micro-batches of the current iteration, and run its updates."""
        batches = [self.batches.draw(self.iteration, part) for part in range(self.config.train.accumulate)]
        carries: list[dict[str, Tensor]] = [{} for _ in batches]
        self.offloading.release_parts()
        results = [self.update(step, batches, carries) for step in steps if self.iteration % step.every == 0]
        self.offloading.release_parts()  # after the backward of losses on decoded images
        return results

    def update(self, step: Step, batches: Sequence[Batch], carries: Sequence[dict[str, Tensor]]) -> UpdateResult:
        """One optimizer update of one role; see `Updater.update`."""
        return self.updater.update(step, batches, carries)

    def networks(self) -> Networks:
        """The networks by role."""
        return networks(self.roles)

    def _log(self, window: Window) -> dict[str, str]:
        """Write a line of the log, and warnings; the figures for the progress bar."""
        c = self.config
        with torch.no_grad(), self.accelerator.autocast():
            window.add(self.method.health(self.networks(), self.iteration))
        images = c.batch_size * c.train.accumulate * self.accelerator.num_processes
        record, means = self.log.window(window, self.iteration, images)
        for warning in self.method.warnings(means):
            self.log.warn(self.iteration, warning)
        shown = {k: f"{v:.4g}" for k, v in means.items() if "grad_norm" not in k}
        best = {"best fid": f"{self.progress.best['fid']:.3g}"} if self.progress.best else {}
        return shown | {"img/s": f"{record['images_per_second']:.0f}"} | best

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of the current iteration."""
        path = self.checkpointer.save(self.progress)
        if self.accelerator.is_main_process:
            for callback in self.callbacks:
                callback.on_checkpoint(path, self.iteration)

    def resume(self, name: str) -> None:
        """Go on from a checkpoint ("latest" or a folder), bit for bit on the same number of processes."""
        self.checkpointer.load(name, self.progress)

    def exported_weights(self) -> Denoiser:
        """The student to export: the best by small-sample FID where scores were taken, otherwise the moving average."""
        if self.progress.best and (self.folder / BEST).exists():
            load_module(self.average, self.folder / BEST)
        return self.average
