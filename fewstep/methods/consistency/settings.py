"""Sections of the settings of consistency methods: what each part can be; imports no torch."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt, MinLen
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fewstep.config import OptimConfig, Strict

GridSize = Annotated[int, Ge(2)]
Decay = Annotated[float, Ge(0), Lt(1)]
LogNormal = tuple[float, Annotated[float, Gt(0)]]

# Grids ----------------------------------------------------------------------------------------------------------------


class EvenGrid(Strict):
    """Points that are even in timesteps (LCM)."""

    kind: Literal["even"] = "even"
    """The kind of grid."""
    points: GridSize = 50
    """Points of the teacher's ODE grid; must divide the teacher's training timesteps."""


class KarrasGrid(Strict):
    """Noise levels of Karras et al. (2022) between the teacher's ends (CD)."""

    kind: Literal["karras"] = "karras"
    """The kind of grid."""
    points: GridSize = 40
    """Noise levels of the teacher's ODE grid."""
    rho: PositiveFloat = 7.0
    """Root in which the levels are even."""


Grid = Annotated[EvenGrid | KarrasGrid, Field(discriminator="kind")]


class Gap(Strict):
    """Gaps of Easy Consistency Tuning: r = sigma (1 - q^-(j + 1) (1 + k sigmoid(-b sigma))) in stage j."""

    q: Annotated[float, Gt(1)] = 2.0
    """Factor by which the gap shrinks from one stage to the next."""
    k: NonNegativeFloat = 8.0
    """Widening of gaps at low noise."""
    b: NonNegativeFloat = 1.0
    """Decay of the widening with sigma."""
    double_iterations: PositiveInt
    """Iterations of a stage."""


# States ---------------------------------------------------------------------------------------------------------------


class NoisedData(Strict):
    """Noised images."""

    kind: Literal["noised_data"] = "noised_data"
    """States at which the student is trained."""
    lognormal: LogNormal | None = None
    """Mean and deviation of the log of the noise level sigma / alpha at t (P_mean, P_std); null = uniform over the grid."""


class SharedTrajectories(Strict):
    """The teacher's trajectories from noise: one evaluation moves a state on by a segment and gives its target."""

    kind: Literal["shared_trajectories"] = "shared_trajectories"
    """States at which the student is trained."""
    segments: PositiveInt = 8
    """Steps of a whole trajectory; each ends at a random point of its segment."""
    replay: NonNegativeInt = 0
    """Trajectories that are kept, from which every batch draws; 0 = one for each sample of a batch."""


class SolverTrajectories(Strict):
    """The teacher's trajectories from noise, through every point of the grid: the state of a target is the next state."""

    kind: Literal["solver_trajectories"] = "solver_trajectories"
    """States at which the student is trained."""
    replay: NonNegativeInt = 0
    """Trajectories that are kept, from which every batch draws; 0 = one for each sample of a batch."""


class SampledTrajectories(Strict):
    """The teacher's trajectories from noise, a new one for every state (MLCM, algorithm 1)."""

    kind: Literal["sampled_trajectories"] = "sampled_trajectories"
    """States at which the student is trained."""
    segments: PositiveInt = 8
    """Steps of a whole trajectory."""


class StoredTrajectories(Strict):
    """The teacher's trajectories from noise, drawn before training and kept at the points of the grid."""

    kind: Literal["stored_trajectories"] = "stored_trajectories"
    """States at which the student is trained."""
    count: PositiveInt
    """Trajectories that the teacher draws before training; they are kept in the run's folder and not drawn twice."""
    batch_size: PositiveInt = 64
    """Trajectories drawn at a time; also the size of a file."""
    solver: Literal["ddim", "dpm"] = "dpm"
    """DDIM (Euler), or DPM-Solver++ of second order."""
    substeps: PositiveInt = 2
    """Steps of the solver from one point of the grid to the next; more below the last one, where details form."""
    lognormal: LogNormal | None = None
    """Mean and deviation of the log of the noise level sigma / alpha at t (P_mean, P_std); null = uniform over the grid."""


class StudentRollout(Strict):
    """Samples of the averaged student, noised (TLCM's second stage)."""

    kind: Literal["student_rollout"] = "student_rollout"
    """States at which the student is trained."""
    steps: PositiveInt = 4
    """Steps of the averaged student; at most `steps` of the method."""


TeacherStates = SharedTrajectories | SolverTrajectories | SampledTrajectories
AllStates = Annotated[NoisedData | TeacherStates | StoredTrajectories | StudentRollout, Field(discriminator="kind")]
PhaseStates = Annotated[NoisedData | TeacherStates, Field(discriminator="kind")]
StageStates = Annotated[NoisedData | TeacherStates | StudentRollout, Field(discriminator="kind")]

# Targets --------------------------------------------------------------------------------------------------------------


class SolverTarget(Strict):
    """The state to which the teacher's solver leads (distillation)."""

    kind: Literal["solver"] = "solver"
    """The kind of target."""
    solver: Literal["ddim", "heun"] = "ddim"
    """The teacher's step: one evaluation, or Heun's two (CD)."""
    steps_per_point: PositiveInt = 1
    """Steps of the guided teacher from one grid point to the next."""
    decay: Decay | None = 0.95
    """Decay per update of the moving average that gives the targets; null = the student itself, without gradient."""


class SameNoise(Strict):
    """The same image with the same noise (training and tuning): the teacher is not called."""

    kind: Literal["same_noise"] = "same_noise"
    """The kind of target."""
    decay: Decay | None = None
    """Decay per update of the moving average that gives the targets; null = the student itself, without gradient."""


class NextState(Strict):
    """A later state of the stored trajectory of x_t: the teacher is not called in training."""

    kind: Literal["next_state"] = "next_state"
    """The kind of target."""
    skip: PositiveInt = 1
    """Points of the grid from x_t to x_s, at most to the trajectory's sample; 1 = the neighbour (LCM's skipping step)."""
    decay: Decay | None = 0.95
    """Decay per update of the moving average that gives the targets; null = the student itself, without gradient."""


Target = Annotated[SolverTarget | SameNoise | NextState, Field(discriminator="kind")]
StepTarget = Annotated[SolverTarget | SameNoise, Field(discriminator="kind")]

# Endpoints and distances ----------------------------------------------------------------------------------------------


class Boundary(Strict):
    """x0 with LCM's c_skip and c_out."""

    kind: Literal["boundary"] = "boundary"
    """The consistency function."""
    timestep_scaling: PositiveFloat = 10.0
    """Factor on t in c_skip and c_out; also saved in the exported scheduler."""


class Plain(Strict):
    """x0 itself."""

    kind: Literal["plain"] = "plain"
    """The consistency function."""


Endpoint = Annotated[Boundary | Plain, Field(discriminator="kind")]


class L2(Strict):
    """Mean square of the elements."""

    kind: Literal["l2"] = "l2"
    """Distance between student and target."""


class PseudoHuber(Strict):
    """Mean over elements of sqrt(d^2 + c^2) - c (the public LCM recipes)."""

    kind: Literal["pseudo_huber"] = "pseudo_huber"
    """Distance between student and target."""
    c: PositiveFloat = 1e-3
    """Difference below which the distance is quadratic."""


class PseudoHuberSample(Strict):
    """sqrt(|d|^2 + c^2) - c of whole samples (iCT); c = 0 gives the norm (ECT)."""

    kind: Literal["pseudo_huber_sample"] = "pseudo_huber_sample"
    """Distance between student and target."""
    c: NonNegativeFloat = 1e-3
    """Norm below which the distance is quadratic."""


class Lpips(Strict):
    """Perceptual distance of decoded samples by VGG16 (CD)."""

    kind: Literal["lpips"] = "lpips"
    """Distance between student and target."""


Distance = Annotated[L2 | PseudoHuber | PseudoHuberSample | Lpips, Field(discriminator="kind")]
Weighting = Literal["none", "inverse_gap", "edm"]

# Terms beside the consistency loss ------------------------------------------------------------------------------------


class Reward(Strict):
    """A reward on the student's own samples."""

    name: str
    """Reward model: clip@FOLDER, such as clip@fashion, pickscore, aesthetic, hpsv2, hpsv2.1, image_reward, mps; or your own as
    package.module:callable, given images [B, 3, H, W] in [0, 1] and their prompts (or None), and returning [B], higher for
    better, differentiable in the images."""
    weight: PositiveFloat
    """Weight of the reward beside the consistency loss."""
    samples: PositiveInt = 16
    """Samples of the student per micro-batch that are decoded and rewarded."""
    ceiling: float | None = None
    """Rewards above this value give no gradient (TLCM's hinge), against reward hacking; null = no ceiling."""
    steps: PositiveInt = 4
    """Steps of the averaged student's sampler, one of which gets gradients; at most `steps` of the method."""


class Adversarial(Strict):
    """The adversarial loss on the ends of phases (PCM)."""

    weight: PositiveFloat
    """Weight of the adversarial loss beside the consistency loss."""
    optim: OptimConfig | None = None
    """Optimizer of the discriminator's heads; null = the student's."""
    loss: Literal["softplus", "hinge"] = "hinge"
    """Kind of adversarial loss."""
    layers: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """Modules of the frozen teacher whose outputs are the discriminator's features, by name; null = the family's middle."""
