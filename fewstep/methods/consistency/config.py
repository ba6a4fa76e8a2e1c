"""What can be set for consistency distillation; read, and answered, before torch is loaded."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from fewstep.config import MethodConfig, OptimConfig, Strict

Endpoint = Literal["x0", "x0_plain", "phase"]
Solver = Literal["ddim", "heun"]
States = Literal["noised_data", "trajectory", "student_rollout"]
GridSize = Annotated[int, Ge(2)]


Weighting = Literal["none", "inverse_gap", "edm"]


class TuningConfig(Strict):
    """Gaps of Easy Consistency Tuning: r = sigma (1 - q^-(j + 1) (1 + k sigmoid(-b sigma))) in stage j."""

    q: Annotated[float, Gt(1)] = 2.0
    """What the gap is divided by from one stage to the next."""
    k: NonNegativeFloat = 8.0
    """How much wider gaps are at low noise."""
    b: NonNegativeFloat = 1.0
    """How fast that wears off with sigma."""
    double_iterations: PositiveInt
    """Iterations of a stage."""


class StageConfig(Strict):
    """A stretch of the training; what is null is the method's."""

    iterations: PositiveInt | None = None
    """Iterations of this stage; null, for the last one only, = to the end of the run."""
    lr: PositiveFloat | None = None
    """Peak learning rate."""
    endpoint: Endpoint | None = None
    """As the method's key."""
    phases: PositiveInt | None = None
    """As the method's key."""
    states: States | None = None
    """As the method's key."""
    solver_steps: GridSize | None = None
    """As the method's key."""
    teacher_steps: PositiveInt | None = None
    """As the method's key."""
    reward_weight: NonNegativeFloat | None = None
    """As the method's key."""


class PlannedStage(Strict):
    """A stage with nothing left open; `start` is its first iteration."""

    start: int
    lr: float
    endpoint: Endpoint
    phases: int
    states: States
    solver_steps: int
    teacher_steps: int
    reward_weight: float


class StoredConfig(Strict):
    count: PositiveInt
    """Trajectories that the teacher draws before training; they are kept in the run's folder and not drawn twice."""
    batch_size: PositiveInt = 64
    """Trajectories drawn at a time; also the size of a file."""
    solver: Literal["ddim", "dpm"] = "dpm"
    """DDIM (Euler), or DPM-Solver++ of second order."""
    substeps: PositiveInt = 2
    """Steps of the solver from one point of the grid to the next; more below the last one, as details are made there."""


class ConsistencyConfig(MethodConfig):
    name: Literal["cd", "ect", "lcm", "mlcm", "pcm", "trajectory"] = "lcm"
    """The method."""
    optim: OptimConfig
    """Optimizer of the student."""
    solver_steps: GridSize = 50
    """Points N of the teacher's ODE grid; an even one of endpoints x0 must divide the teacher's training timesteps."""
    grid: Literal["even", "karras"] = "even"
    """Points that are even in timesteps (LCM), or noise levels of Karras et al. between the teacher's ends (CD)."""
    karras_rho: PositiveFloat = 7.0
    """Root in which Karras' levels are even."""
    solver: Solver = "ddim"
    """The teacher's step from one point to the next: one evaluation, or Heun's two (CD)."""
    target_step: Literal["solver", "same_noise", "end"] = "solver"
    """x_s by the teacher's step (distillation); of the same image and noise as x_t (training: no teacher is called); or the
    end of the teacher's trajectory, for which no target network is asked (`rollout: stored`)."""
    tuning: TuningConfig | None = None
    """Easy Consistency Tuning: t is any of the teacher's timesteps and s follows from it, in place of a grid; null = the grid."""
    lognormal: tuple[float, Annotated[float, Gt(0)]] | None = None
    """Mean and deviation of the log of the noise level sigma / alpha at t (P_mean, P_std); null = uniform over the grid."""
    weighting: Weighting = "none"
    """Weight of a sample's distance: 1, 1 over the gap in sigma, or (sigma^2 + 0.25) / (0.25 sigma^2)."""
    dropout: Annotated[float, Ge(0), Lt(1)] | None = None
    """Dropout of the student in training, the same in its target where that is the student; null = as the teacher has it."""
    steps: int = Field(10, ge=1)
    """Largest number of network evaluations at inference; must divide solver_steps, so that every step count lies on the grid."""
    endpoint: Endpoint = "x0"
    """What is consistent: x0 with LCM's c_skip and c_out, x0 itself, or the jump to the end of the phase (PCM, MLCM)."""
    phases: PositiveInt = 1
    """Pieces of the trajectory that `endpoint: phase` is consistent within; they end where the sampler's steps do."""
    sampling: Literal["renoise", "jump"] = "renoise"
    """Between steps: x0 noised anew, any count up to `steps`; or the ODE's jumps, for which `steps` is the most phases."""
    states: States = "noised_data"
    """Where the student is trained: noised images, the teacher's trajectories from noise, or noised samples of its own."""
    rollout: Literal["shared", "solver", "sample", "stored"] = "shared"
    """Trajectories: one evaluation of the teacher moves a state on by a segment and gives its target; or what the solver
    makes of a state for its target is the next state, at every point of the grid; or each state has its own from noise; or
    all are drawn before training, and their states at the points of the grid kept."""
    stored: StoredConfig | None = None
    """Trajectories for `rollout: stored`; null = none."""
    rollout_segments: PositiveInt = 8
    """Steps of a whole trajectory of the teacher; each ends at a random point of its segment."""
    replay: NonNegativeInt = 0
    """Shared trajectories that are kept, of which every batch draws others; 0 = one for each sample of a batch."""
    student_steps: PositiveInt = 4
    """Steps of the averaged student for `states: student_rollout`."""
    teacher_steps: PositiveInt = 1
    """Evaluations of the guided teacher from one grid point to the next."""
    reward: str | None = None
    """What the student's own samples are to please: clip@FOLDER, such as clip@fashion, pickscore, aesthetic, hpsv2, hpsv2.1,
    image_reward, mps; or your own as package.module:callable, given images [B, 3, H, W] in [0, 1] and their prompts (or None),
    and returning [B], higher for better, differentiable in the images; null = nothing."""
    reward_weight: NonNegativeFloat = 0.0
    """Weight of the reward beside the consistency loss."""
    reward_samples: PositiveInt = 16
    """Samples of the student per micro-batch that are decoded and rewarded."""
    reward_ceiling: float | None = None
    """Reward from which on a sample is good enough, against pleasing the reward alone (TLCM's hinge); null = none."""
    gan_weight: NonNegativeFloat = 0.0
    """Weight of the adversarial loss on the ends of phases (PCM); 0 = none."""
    gan_optim: OptimConfig | None = None
    """Optimizer of the discriminator's heads; null = the student's."""
    gan_loss: Literal["softplus", "hinge"] = "hinge"
    """Kind of adversarial loss."""
    gan_layers: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """Modules of the frozen teacher on whose outputs the discriminator listens, by name; null = the family's middle."""
    stages: tuple[StageConfig, ...] = ()
    """Stages one after the other, such as 8, 4, 2, 1 phases; none = one stage."""
    guidance_range: tuple[float, float] | None = (3.0, 15.0)
    """Guidance scales (1 = none), drawn uniformly for the teacher's step and embedded in the student; null = no guidance."""
    embed_guidance: bool = True
    """Whether the student is told the guidance scale; if not, it learns the mean over guidance_range."""
    keep_guidance: bool = False
    """PCM without guidance in the teacher's step: the exported student is guided by its caller, negative prompts included."""
    null_share: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Share of samples whose condition is the null one, for keep_guidance."""
    export_guidance_scale: float | Annotated[tuple[float, ...], MinLen(2)] | None = None
    """Guidance scale folded into the exported student, or one for each of the sampler's `steps` timesteps, from the noisiest;
    null leaves it to the caller's guidance_scale."""
    target_decay: float | None = Field(0.95, ge=0, lt=1)
    """Decay per update of the moving average that gives the targets; null = the student itself, without gradient."""
    distance: Literal["l2", "pseudo_huber", "pseudo_huber_sample", "lpips"] = "l2"
    """Distance between student and target: of elements, of whole samples (iCT), or of what VGG16 sees of decoded images (CD)."""
    huber_c: float = Field(1e-3, ge=0)
    """c of the pseudo-Huber distances; 0, for whole samples only, is the norm."""
    timestep_scaling: float = Field(10.0, gt=0)
    """Factor on t in c_skip and c_out; also saved in the exported scheduler."""

    @property
    def embedded(self) -> bool:
        """Whether the student has a guidance embedding."""
        return self.guidance_range is not None and self.embed_guidance

    @property
    def rolls_out(self) -> bool:
        """Whether the student samples during training."""
        return any(stage.states == "student_rollout" or stage.reward_weight > 0 for stage in self.plan)

    @property
    def plan(self) -> tuple[PlannedStage, ...]:
        """The stages in order, at least one."""
        start, planned = 0, []
        for stage in self.stages or (StageConfig(),):
            planned.append(
                PlannedStage(
                    start=start,
                    lr=stage.lr or self.optim.lr,
                    endpoint=stage.endpoint or self.endpoint,
                    phases=stage.phases or self.phases,
                    states=stage.states or self.states,
                    solver_steps=stage.solver_steps or self.solver_steps,
                    teacher_steps=stage.teacher_steps or self.teacher_steps,
                    reward_weight=self.reward_weight if stage.reward_weight is None else stage.reward_weight,
                )
            )
            start += stage.iterations or 0
        return tuple(planned)

    @model_validator(mode="after")
    def _possible(self) -> "ConsistencyConfig":
        scale, span = self.export_guidance_scale, self.guidance_range
        scales = scale if isinstance(scale, tuple) else () if scale is None else (scale,)
        if span is not None and not 1 <= span[0] <= span[1]:
            raise ValueError(f"guidance_range: {list(span)} is not an interval of scales >= 1")
        for one in scales:
            if span is None or not span[0] <= one <= span[1]:
                raise ValueError(
                    f"export_guidance_scale: {one} lies outside guidance_range, where the student is not trained"
                )
        if isinstance(scale, tuple) and len(scale) != self.steps:
            raise ValueError(
                f"export_guidance_scale: {len(scale)} scales for {self.steps} steps; give one number or {self.steps}"
            )
        if not self.huber_c and self.distance != "pseudo_huber_sample":
            raise ValueError("huber_c: 0 is for distance pseudo_huber_sample, where it gives the norm")
        if self.target_step == "same_noise" and span is not None:
            raise ValueError("target_step: same_noise has no teacher to guide; set guidance_range to null")
        if self.keep_guidance and span is not None:
            raise ValueError("keep_guidance: the teacher's steps must not be guided then; set guidance_range to null")
        if scale is not None and not self.embed_guidance:
            raise ValueError(
                "export_guidance_scale: a student that does not embed guidance has one scale; set it to null"
            )
        return self

    @model_validator(mode="after")
    def _stages_possible(self) -> "ConsistencyConfig":
        for i, stage in enumerate(self.stages):
            if (stage.iterations is None) != (i == len(self.stages) - 1):
                raise ValueError(
                    "stages: every stage but the last needs iterations; the last lasts to the end of the run"
                )
        plan = self.plan
        for planned in plan:
            if self.target_step == "same_noise" and planned.states != "noised_data":
                raise ValueError(f"target_step: same_noise needs the image of x_t; found states {planned.states}")
            if self.tuning and (
                self.grid == "karras" or planned.endpoint != "x0_plain" or planned.states == "trajectory"
            ):
                raise ValueError(
                    "tuning: has times of its own, down to clean data; needs grid even, endpoint x0_plain and no trajectories"
                )
            if self.grid == "karras" and planned.endpoint == "phase":
                raise ValueError(
                    "grid: phases are cut on an even grid; set grid to even, or endpoint to x0 or x0_plain"
                )
            if self.grid == "even" and self.tuning is None and planned.solver_steps % self.steps:
                raise ValueError(f"steps: {self.steps} does not divide solver_steps ({planned.solver_steps})")
            if planned.endpoint == "phase" and planned.solver_steps % planned.phases:
                raise ValueError(f"phases: {planned.phases} does not divide solver_steps ({planned.solver_steps})")
            if planned.endpoint != "phase" and planned.phases != 1:
                raise ValueError(f"phases: {planned.phases} needs endpoint phase; found endpoint {planned.endpoint}")
        if self.sampling == "jump":
            most = max(stage.phases for stage in plan)
            if plan[-1].endpoint != "phase" or self.steps != most:
                raise ValueError(
                    f"sampling: jumps need endpoint phase and as many steps as there are phases; found endpoint "
                    f"{plan[-1].endpoint}, steps {self.steps}, phases {most}"
                )
        self._stored_possible()
        if self.replay and (
            self.rollout in ("sample", "stored") or all(stage.states != "trajectory" for stage in plan)
        ):
            raise ValueError(
                f"replay: {self.replay} trajectories are kept of states trajectory with rollout shared or solver; set it to 0"
            )
        if self.rolls_out and self.student_steps > self.steps:
            raise ValueError(f"student_steps: {self.student_steps} are more than steps ({self.steps})")
        if self.gan_weight and any(stage.endpoint != "phase" for stage in plan):
            raise ValueError(
                "gan_weight: the adversarial loss is on the ends of phases; needs endpoint phase throughout"
            )
        if self.reward is None and any(stage.reward_weight > 0 for stage in plan):
            raise ValueError("reward_weight: needs a reward, which is null; such as reward=clip@fashion")
        return self

    def _stored_possible(self) -> None:
        stored = self.rollout == "stored"
        if stored != (self.stored is not None):
            raise ValueError(
                "stored: rollout stored needs its trajectories; such as stored={count: 10000}"
                if stored
                else "stored: nothing uses these trajectories; set rollout to stored, or stored to null"
            )
        if stored:
            plan, points = self.plan, self.plan[0].solver_steps
            if self.grid == "karras" or any(
                stage.states != "trajectory" or stage.endpoint == "phase" or stage.solver_steps != points
                for stage in plan
            ):
                raise ValueError(
                    "rollout: stored trajectories need, in every stage, states trajectory, endpoint x0 or x0_plain and the same "
                    "solver_steps of an even grid"
                )
            if self.keep_guidance:
                raise ValueError("rollout: stored trajectories have no null conditions; set keep_guidance to false")
        if self.target_step == "end" and not stored:
            raise ValueError("target_step: end is known of stored trajectories only; set rollout to stored")
        if self.target_step == "end" and self.target_decay is not None:
            raise ValueError("target_decay: target_step end asks no target network; set it to null")
