"""Teachers: pretrained diffusers pipelines behind one interface. Everything above `diffusion` and `config` may import this.

`load_teacher` opens a folder, a hub id, an embedded name or a pipeline in memory. A `Teacher` (base) holds the facts of its
pipeline and the services that methods, training and export call:

    denoiser       Denoiser     (x_t, t, cond) -> Prediction (x0, eps); `Inputs` and `Call` are how its network is called
    conditioner    Prompts, Labels or Unconditional: the input of `condition`, and the unconditional one
    codec          latents      images to latents and back
    students       Students     trainable networks (copies, adapters, extra inputs) and the stock pipelines they leave in
    samplers       Samplers     stock schedulers for few steps, and the timesteps that they run
    placement      Placement    where the networks are: device, main memory, disk
    guidance       GuidanceContract: who guides, and how a student's pipeline is called

To add a family, write one file `families/<name>.py` of 40 to 110 lines and name it in `load.FAMILIES`. It has:

1. a call, `(net, inputs) -> output`, that passes `Inputs` to the network as the stock pipeline does: the timestep in the
   network's units (`embeddings.transformer.time_input` adds a student's extra inputs), conditions in its dtype;
2. a `Teacher` with a class attribute `guidance` and a constructor that checks the pipeline, makes its `Placement` and
   `Denoiser`, and gives `super().__init__` the other services: `Prompts(placement, self._encode_prompts)`, `Autoencoder`,
   and those of a shared base (`_transformer.TransformerStudents`, `_unet.UNetStudents`, `DiscreteSamplers`, `FlowSamplers`);
3. where the stock pipeline differs, a subclass of one service: the count of steps a scheduler can run, the class of the
   pipeline that a student leaves in, an autoencoder without a deviation.

A tiny pipeline of it in `tests/builders/families.py` then takes it through the checks of `tests/integration/test_families.py`:
the network is given what the stock pipeline gives it, and an exported student draws in plain diffusers what it drew in memory.
"""

from fewstep.teachers.base import Teacher
from fewstep.teachers.denoiser import Call, Cond, Denoiser, Inputs, Posterior
from fewstep.teachers.guidance_contract import GuidanceContract
from fewstep.teachers.load import FAMILIES, load_teacher, locate, quiet
from fewstep.teachers.placement import NETWORKS

__all__ = [
    "FAMILIES",
    "NETWORKS",
    "Call",
    "Cond",
    "Denoiser",
    "GuidanceContract",
    "Inputs",
    "Posterior",
    "Teacher",
    "load_teacher",
    "locate",
    "quiet",
]
