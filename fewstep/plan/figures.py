"""The figures of a plan."""

from dataclasses import asdict, dataclass

GIB = 2**30
CARDS = (16, 24, 40, 80)
"""Memory of common GPUs in GiB."""
CUDA_CONTEXT = GIB
"""Memory of CUDA's context and libraries beside the tensors, about."""
FRAGMENTATION = 1.05
"""Memory of the allocator as a multiple of the tensors', about."""


@dataclass(frozen=True)
class RolePlan:
    """One network. Bytes; operations are in F, one forward of the teacher on a batch, per iteration.

    Attributes:
        kind: "learnt", "frozen" or "average".
        weights: without those that an earlier role holds already.
        activations: what its update has kept when its loss is known: for the backward, and weights cast by autocast.
        forward: its own forwards, in anyone's update. backward: those of its updates, through whichever networks.
    """

    kind: str
    parameters: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    forward: float
    backward: float


@dataclass(frozen=True)
class Plan:
    """Memory (bytes) and operations of one process of a run.

    Attributes:
        parts: what else stays in memory, by the pipeline's names.
        waiting: weights of the teacher's network in main memory, with `offload_teacher`.
        buckets: copies of gradients for their exchange among processes.
        prompts: to what the kept conditions of prompts may grow in a long run.
        resident: weights and states of optimizers, between iterations.
        peaks: phase -> most bytes during it; all in all.
        forward_tflop: F. elsewhere: operations of encoders and autoencoder, in F.
        timesteps: of the student, at each number of steps that it is trained for.
        fits: size of a card in GiB -> whether the run fits.
    """

    method: str
    device: str
    mixed_precision: str
    batch_size: int
    accumulate: int
    processes: int
    roles: dict[str, RolePlan]
    parts: dict[str, int]
    waiting: int
    buckets: int
    prompts: int
    resident: int
    peaks: dict[str, int]
    forward_tflop: float
    elsewhere: float
    timesteps: dict[int, list[float]]

    @property
    def peak(self) -> int:
        return self.buckets + max(self.peaks.values())

    @property
    def total_forwards(self) -> float:
        """F per iteration."""
        return self.elsewhere + sum(role.forward + role.backward for role in self.roles.values())

    @property
    def fits(self) -> dict[int, bool]:
        need = (self.peak + self.prompts) * FRAGMENTATION + CUDA_CONTEXT
        return {card: need <= card * GIB for card in CARDS}

    def as_dict(self) -> dict[str, object]:
        total = {"forwards": self.total_forwards, "tflop": self.total_forwards * self.forward_tflop}
        return asdict(self) | {"peak": self.peak, "fits": self.fits, "per_iteration": total}
