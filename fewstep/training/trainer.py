"""The one training loop: roles, steps, averages, logs, checkpoints, validation."""

import json
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from fewstep import io
from fewstep.config import OptimConfig, RunConfig
from fewstep.data import Source
from fewstep.data.encoding_cache import EncodingCache
from fewstep.data.validate import check_images
from fewstep.evaluate.rewards.load import load_training_reward
from fewstep.methods.base import Batch, Carry, Losses, Method, Networks, Preparation, Reward, Role, Step, StepOutput
from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Denoiser
from fewstep.training import checkpoint as ckpt
from fewstep.training.batches import Batches
from fewstep.training.early_stopping import Patience
from fewstep.training.init_from import start_from
from fewstep.training.optim import Own, new_optimizer, set_up
from fewstep.training.validation import Pictures, small_scores, student_guidance_scale

RANKS = "ranks"
"""Token of the partial folder of a checkpoint, which every rank writes to."""


class NonFiniteError(RuntimeError):
    """Too many updates in a row had a loss or gradient that is not a finite number."""


@dataclass(frozen=True)
class UpdateResult:
    """An optimizer update's losses, means over its micro-batches, with the gradient's norm; and what each loss returned."""

    losses: Losses
    outputs: list[StepOutput]


class Trainer:
    """Trains a method's roles on a source.

    `fit` returns True when all iterations are done, or `score.patience` is at its end, and False when a SIGTERM stopped it
    after a checkpoint.
    """

    def __init__(self, config: RunConfig[Any], method: Method, teacher: Teacher, source: Source) -> None:
        if method.needs_images and not source.has_images:
            raise ValueError(
                f"data.source: {config.data.source} gives no images, and {method.name} needs them: use fashion, folder or parquet"
            )
        if teacher.conditions not in ("none", source.conditions):
            raise ValueError(
                f"data.source: {config.data.source} gives {source.conditions}s, and the teacher wants {teacher.conditions}s"
            )
        self.config, self.method, self.teacher = config, method, teacher
        self.accelerator = Accelerator(
            mixed_precision=_precision(config.train.mixed_precision),
            log_with=config.log.tracker,
            project_dir=config.output_dir,
        )
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            # `accelerate launch` gives every process one thread, which leaves the other cores idle.
            share = max(1, (os.cpu_count() or 1) // self.accelerator.num_processes)
            torch.set_num_threads(config.train.cpu_threads or share)
        self.folder = Path(config.output_dir)
        self.offloads = config.memory.offload and self.device.type != "cpu"
        self.lends = config.memory.offload_teacher and self.device.type != "cpu"
        if self.offloads:
            teacher.placement.reload = None  # to wait in main memory, not to be read anew for each visit
        set_seed(config.seed)  # the same on every process, for weights that are drawn
        cache, source = self._open(source)
        # Before the move, so that what nothing will call never takes the device's memory.
        teacher.placement.release(teacher.placement.text_parts if cache else ())
        teacher.placement.release(teacher.placement.image_parts if cache or not method.needs_images else ())
        self.rest()
        teacher.placement.to(self.device, io.torch_dtype(config.train.base_dtype))
        if (lora := config.train.lora) is not None:
            teacher.students.adapt(lora)
        roles = method.roles()
        if config.train.init_from is not None:
            start_from(roles, config.train.init_from)
        self._prepare_roles(roles)
        if self.lends:
            teacher.placement.offload()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(config.seed + 1 + rank)  # and another on each, for noise
        self.iteration, self.nonfinite = 0, 0
        self.best: dict[str, float] = {}
        self.patience = Patience(config.score.patience, method.last_stage)
        self.pictures: Pictures | None = None
        self.stopping = False
        self.batches = Batches(config, teacher, source, method.needs_images, self.device, rank, world, cache)
        if config.data.cache_latents:
            teacher.placement.release(teacher.placement.image_parts)

    def _open(self, source: Source) -> tuple[EncodingCache | None, Source]:
        """The cache of `data.cache`, from which the teacher then takes its conditions, and what can be read of the source.

        Raises ValueError where images are broken, or entries missing.
        """
        data, a = self.config.data, self.accelerator
        if data.cache is None:
            if self.method.needs_images:
                source = check_images(source, data.on_error, a.process_index, a.num_processes, gather_object)
            return None, source
        cache = EncodingCache(data.cache, self.teacher)
        source = cache.open(source, self.method.needs_images, data.on_error, quiet=not a.is_main_process)
        if self.teacher.prompts is not None:
            self.teacher.prompts.stored = cache.conditions
        return cache, source

    def rest(self) -> None:
        """With `offload`, parts beside the network leave the device until they are called."""
        if self.offloads:
            self.teacher.placement.release(self.teacher.placement.parts)

    # Roles ------------------------------------------------------------------------------------------------------------

    new_optimizer = staticmethod(new_optimizer)

    def _prepare_roles(self, roles: dict[str, Role]) -> None:
        student = roles["student"].net
        assert isinstance(student, Denoiser)
        self.roles = roles | {"ema": Role(student.clone(), follows="student", decay=self.config.train.ema_decay)}
        self.raw: dict[str, nn.Module] = {}
        self.own: dict[str, Own] = {}
        self.wrapped: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Any] = {}
        self.updates: dict[str, int] = {}
        for name, role in self.roles.items():
            own = self.own[name] = Own.of(role.net.to(self.device))
            # Layers that come and go are not compiled.
            set_up(
                role.net,
                self.config,
                self.config.train.compile and not (self.lends and role.net is self.teacher.denoiser),
            )
            if role.optim is None:
                role.net.requires_grad_(False).eval()
            else:
                own.requires_grad_(True)
                role.net.train()
                optimizer = self.new_optimizer(own.parameters, role.optim)
                self.wrapped[name], self.optimizers[name] = self.accelerator.prepare(role.net, optimizer)
                self.updates[name] = 0
            self.raw[name] = role.net

    @torch.no_grad()
    def _follow(self, leader: str) -> None:
        for name, role in self.roles.items():
            if role.follows == leader:
                self.own[name].follow(self.own[leader], role.decay)

    # The loop ---------------------------------------------------------------------------------------------------------

    def fit(self) -> bool:
        c, main = self.config, self.accelerator.is_main_process
        if main:
            (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if c.log.tracker:
            self.accelerator.init_trackers("fewstep", config={"method": self.method.name})
        self.method.prepare(self._preparation())
        steps = self.method.steps()
        previous = signal.signal(signal.SIGTERM, self._ask_to_stop)
        bar = tqdm(
            total=c.max_iterations, initial=self.iteration, desc=self.method.name, disable=not main, dynamic_ncols=True
        )
        window = _Window()
        try:
            while self.iteration < c.max_iterations and not self.patience.over:
                window.add_iteration(self.iterate(steps))
                self.iteration += 1
                bar.update()
                if self.iteration % c.log.every == 0 or self.iteration == c.max_iterations:
                    self._log(window, bar)
                    window = _Window()
                self._events(bar)
                if self._should_stop():
                    if self.iteration % c.checkpoint.every:
                        self.save()
                    return False
        finally:
            bar.close()
            signal.signal(signal.SIGTERM, previous)
            if c.log.tracker:
                self.accelerator.end_training()
        if self.iteration % c.checkpoint.every:
            self.save()
        return True

    def iterate(self, steps: Sequence[Step]) -> list["UpdateResult"]:
        """Draw the micro-batches of the current iteration, and run its updates."""
        batches = [self.batches.draw(self.iteration, part) for part in range(self.config.train.accumulate)]
        carries: list[dict[str, Tensor]] = [{} for _ in batches]
        self.rest()
        results = [self.update(step, batches, carries) for step in steps if self.iteration % step.every == 0]
        self.rest()  # after the backward of losses on decoded images
        return results

    def _preparation(self) -> Preparation:
        source, a = self.batches.stream.source, self.accelerator
        return Preparation(
            self.folder, source.conditions_at, len(source), self.config.seed, self.device, a.process_index,
            a.num_processes, a.wait_for_everyone, self._load_reward,
        )  # fmt: skip

    def _load_reward(self, name: str) -> Reward:
        teacher = self.teacher
        return load_training_reward(name, self.device, teacher.image_size, teacher.conditions == "prompt")

    def _events(self, bar: Any) -> None:
        c = self.config
        if c.score.every and self.iteration % c.score.every == 0:
            self._score()
        if c.log.samples_every and self.iteration % c.log.samples_every == 0:
            self._picture()
        if self.iteration % c.checkpoint.every == 0:
            self.save()

    def update(self, step: Step, batches: Sequence[Batch], carries: Sequence[dict[str, Tensor]]) -> "UpdateResult":
        """One optimizer update of one role, over the iteration's micro-batches.

        carries: what earlier steps have carried over, for each micro-batch; this step's is added.
        """
        n, optim = len(batches), self.roles[step.role].optim
        assert optim is not None  # a step descends a learnt role
        net, optimizer = self.wrapped[step.role], self.optimizers[step.role]
        if len(self.optimizers) > 1:
            for name in self.optimizers:
                self.own[name].requires_grad_(name == step.role)
        nets = cast(Networks, self.raw | {step.role: net})
        logs: dict[str, Tensor] = {}
        outputs = []
        for i, (batch, carry) in enumerate(zip(batches, carries, strict=True)):
            with self.accelerator.no_sync(net) if i < n - 1 else nullcontext():
                outputs.append(self._backward(step, nets, batch, carry))
            carry |= outputs[-1].carry
            for key, value in outputs[-1].losses.items():
                logs[key] = logs.get(key, torch.zeros((), device=self.device)) + value / n
        limit = math.inf if optim.max_grad_norm is None else optim.max_grad_norm  # infinite: the norm is only measured
        norm = self.accelerator.clip_grad_norm_(self.own[step.role].parameters, limit)
        # The scaler of fp16 skips such updates by itself.
        finite = self.accelerator.mixed_precision == "fp16" or bool(torch.isfinite(norm))
        if finite:
            self.updates[step.role] += 1
            factor = lr_factor(optim, self.updates[step.role], self.config.max_iterations // step.every)
            for group in optimizer.param_groups:
                group["lr"] = optim.lr * factor * step.lr_scale(self.iteration)
            optimizer.step()
        self._guard(finite)
        optimizer.zero_grad()
        if finite:
            self._follow(step.role)
        return UpdateResult(logs | {f"{step.role}_grad_norm": norm.detach()}, outputs)

    def _backward(self, step: Step, nets: Networks, batch: Batch, carry: Carry) -> StepOutput:
        """The loss of a micro-batch and its gradients; what is returned keeps no graph alive."""
        with self.accelerator.autocast():
            output = step.loss(nets, batch, carry)
        self.accelerator.backward(torch.stack(list(output.losses.values())).sum() / self.config.train.accumulate)
        losses, logs = ({key: value.detach() for key, value in d.items()} for d in (output.losses, output.logs))
        return replace(output, losses=losses, logs=logs)

    def _guard(self, finite: bool) -> None:
        self.nonfinite = 0 if finite else self.nonfinite + 1
        if self.nonfinite > self.config.train.max_nonfinite:
            last = ckpt.checkpoints(self.folder / "checkpoints")
            raise NonFiniteError(
                f"{self.nonfinite} updates in a row were not finite (train.max_nonfinite: {self.config.train.max_nonfinite}); "
                f"lower method.optim.lr. Last good checkpoint: {last[-1] if last else 'none'}"
            )

    def _ask_to_stop(self, *_: object) -> None:
        self.stopping = True

    def _should_stop(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stopping
        flag = torch.tensor(float(self.stopping), device=self.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    # Logs and pictures ------------------------------------------------------------------------------------------------

    def _log(self, window: "_Window", bar: Any) -> None:
        c = self.config
        with torch.no_grad(), self.accelerator.autocast():
            window.add(self.method.health(cast(Networks, self.raw), self.iteration))
        values = {k: float(v) for k, v in window.means().items()}
        places = {k: seen_means(self.accelerator.reduce(v, "sum")) for k, v in window.tallies.items()}
        count = window.iterations * c.batch_size * c.train.accumulate * self.accelerator.num_processes
        record: dict[str, Any] = {"iteration": self.iteration, **values, **places}
        record["images_per_second"] = round(count / window.seconds(), 2)
        if self.device.type == "cuda":
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self._record(record)
        for warning in self.method.warnings(values):
            self._warn(warning)
        shown = {k: f"{v:.4g}" for k, v in values.items() if "grad_norm" not in k}
        bar.set_postfix(shown | {"img/s": f"{record['images_per_second']:.0f}"} | self._shown_best())

    def _warn(self, warning: str) -> None:
        self._record({"iteration": self.iteration, "warning": warning})
        if self.accelerator.is_main_process:
            tqdm.write(f"warning at iteration {self.iteration}: {warning}")

    def _record(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(record) + "\n")
        if self.config.log.tracker:
            self.accelerator.log({k: v for k, v in record.items() if k != "iteration"}, step=self.iteration)

    def _shown_best(self) -> dict[str, str]:
        return {"best fid": f"{self.best['fid']:.3g}"} if self.best else {}

    def _pipeline(self) -> Any:
        ema = self.raw["ema"]
        assert isinstance(ema, Denoiser)
        if self.method.keeps_guidance:
            return self.teacher.students.guided_pipeline(ema, self.method.scheduler())
        return self.teacher.students.pipeline(ema, self.method.scheduler(), self.method.export_guidance_scale)

    def _call_scale(self) -> float | None:
        return student_guidance_scale(self.config, self.teacher, self.method.keeps_guidance)

    def _score(self) -> None:
        """Small-sample FID and CLIP score of the averaged student; the best weights by FID are kept, the last stage's first."""
        with self.teacher.placement.whole():
            scores = small_scores(self._pipeline(), self.config, self.accelerator, self._call_scale())
        self._record({"iteration": self.iteration} | scores)
        fid = scores["fid"]
        self.patience.see(fid, self.iteration)
        if self.patience.over:
            self._warn(
                f"the FID has not been better than {self.patience.best:.4g}, of iteration {self.patience.best_at}, for "
                f"{self.patience.waited} scores (score.patience): training ends here"
            )
        if self.patience.beats(fid, self.iteration, self.best):
            self.best = {"fid": fid, "iteration": self.iteration}
            if self.accelerator.is_main_process:
                with io.atomic(self.folder / "best.safetensors") as partial:
                    ckpt.save_module(self.raw["ema"], partial)

    def _picture(self) -> None:
        if not self.accelerator.is_main_process:
            return
        if self.pictures is None:
            steps = self.method.allowed_steps()
            self.pictures = Pictures(self.config, self.teacher, self.batches.stream.source, steps, self._call_scale())
        (self.folder / "samples").mkdir(exist_ok=True)
        with self.teacher.placement.whole():
            self.pictures.draw(self._pipeline()).save(self.folder / "samples" / f"{self.iteration}.png")

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Write everything that exact resume needs to checkpoints/<iteration>; a failed write leaves the last one whole."""
        path = self.folder / "checkpoints" / f"{self.iteration}"
        rank = self.accelerator.process_index
        partial = io.partial_path(path, RANKS)
        partial.mkdir(parents=True, exist_ok=True)
        save_file(ckpt.rng_state(self.device), partial / f"rng_{rank}.safetensors")
        if own := self.method.state():
            save_file({k: v.contiguous().cpu() for k, v in own.items()}, partial / f"method_{rank}.safetensors")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with io.atomic(path, RANKS) as aside:
                for name, role in self.roles.items():
                    if role.optim or role.follows:
                        ckpt.save_module(self.raw[name], aside / f"{name}.safetensors")
                for name, optimizer in self.optimizers.items():
                    save_file(ckpt.pack_optimizer(optimizer), aside / f"{name}_optimizer.safetensors")
                state = {
                    "iteration": self.iteration, "updates": self.updates, "nonfinite": self.nonfinite, "best": self.best,
                    "patience": self.patience.state(), "data": self.batches.stream.state_dict(),
                    "num_processes": self.accelerator.num_processes,
                }  # fmt: skip
                io.write_json(state, aside / "state.json")
            ckpt.prune(self.folder / "checkpoints", self.config.checkpoint.keep)
        self.accelerator.wait_for_everyone()
        return path

    def resume(self, name: str) -> None:
        """Go on from a checkpoint ("latest" or a path), bit for bit on the same number of processes."""
        path = ckpt.find(self.folder / "checkpoints", name)
        state = io.read_json(path / "state.json")
        if state["num_processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"checkpoint.resume: {path} was written by {state['num_processes']} processes, this run has "
                f"{self.accelerator.num_processes}; exact resume needs the same number"
            )
        for name_, role in self.roles.items():
            if role.optim or role.follows:
                ckpt.load_module(self.raw[name_], path / f"{name_}.safetensors")
        for name_, optimizer in self.optimizers.items():
            ckpt.unpack_optimizer(optimizer, load_file(path / f"{name_}_optimizer.safetensors"))
        self.iteration, self.updates = state["iteration"], state["updates"]
        self.nonfinite, self.best = state["nonfinite"], state["best"]
        if "patience" in state:  # checkpoints of before there was one go on
            self.patience.load_state(state["patience"])
        self.batches.stream.load_state_dict(state["data"])
        rank = self.accelerator.process_index
        ckpt.set_rng_state(load_file(path / f"rng_{rank}.safetensors"), self.device)
        if (own := path / f"method_{rank}.safetensors").exists():
            self.method.load_state({k: v.to(self.device) for k, v in load_file(own).items()})

    def exported_weights(self) -> Denoiser:
        """The student to export: the best by small-sample FID where scores were taken, else the moving average."""
        ema = self.raw["ema"]
        assert isinstance(ema, Denoiser)
        if self.best and (self.folder / "best.safetensors").exists():
            ckpt.load_module(ema, self.folder / "best.safetensors")
        return ema


class _Window:
    """Means of the log terms since the last log line, kept on the device until asked."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.tallies: dict[str, Tensor] = {}
        self.iterations, self.start = 0, time.perf_counter()

    def add(self, logs: Mapping[str, Tensor]) -> None:
        for key, value in logs.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1

    def add_iteration(self, results: "Sequence[UpdateResult]") -> None:
        for result in results:
            self.add(result.losses)
        for output in (output for result in results for output in result.outputs):
            self.add(output.logs)
            self.tally(output.histograms)
        self.iterations += 1

    def tally(self, tallies: Mapping[str, Tensor]) -> None:
        for key, value in tallies.items():
            self.tallies[key] = self.tallies[key] + value if key in self.tallies else value

    def means(self) -> dict[str, Tensor]:
        return {key: value / self.counts[key] for key, value in self.sums.items()}

    def seconds(self) -> float:
        return time.perf_counter() - self.start


def seen_means(tally: Tensor) -> dict[str, float]:
    """Place -> mean, of sums and counts [2, n]; places that were not seen are left out."""
    return {str(i): total / count for i, (total, count) in enumerate(tally.T.tolist()) if count}


def lr_factor(optim: OptimConfig, update: int, updates: int) -> float:
    """What multiplies the learning rate at the `update`-th of `updates` updates (from 1): linear warm-up, then the decay."""
    if update <= optim.warmup_iterations:
        return update / optim.warmup_iterations
    if optim.decay == "constant":
        return 1.0
    progress = (update - optim.warmup_iterations) / max(1, updates - optim.warmup_iterations)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _precision(name: str) -> str:
    return ("bf16" if torch.cuda.is_available() else "no") if name == "auto" else name
