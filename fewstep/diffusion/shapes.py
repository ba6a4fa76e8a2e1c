"""Shapes of tensors in signatures, by name; the tests check them at run time (tests/builders/shapes.py).

In one call the same letter is the same size: b samples, c channels, h and w of latents, H and W of images, n points or
steps, *s the rest of a sample's shape, whatever its rank. `Float` is any floating-point type, `Shaped` any type.
"""

from jaxtyping import Float, Int, Shaped
from torch import Tensor

# One sample a row ---------------------------------------------------------------------------------------------------------

Samples = Float[Tensor, "b *s"]
"""Noisy or clean samples, noise, or a network's output at them."""
Latents = Float[Tensor, "b c h w"]
Images = Float[Tensor, "b 3 H W"]
FeatureMap = Float[Tensor, "b _ _ _"]
"""Of one of several layers, each of its own size."""
Trajectory = Float[Tensor, "n k *s"]
"""States of n trajectories at k timesteps."""
ScalesOfTrajectories = Float[Tensor, "n"]
Tokens = Float[Tensor, "b n k"]
Sinusoids = Float[Tensor, "b k"]
Embedded = Float[Tensor, "b d"]
Logits = Float[Tensor, "b heads"]

# One number for each sample -----------------------------------------------------------------------------------------------

Times = Shaped[Tensor, "b"]
"""Timesteps in diffusers' units, whole numbers or not; -1 is clean data."""
Time = Shaped[Tensor, ""]
"""One timestep for all samples."""
Scales = Float[Tensor, "b"]
"""Guidance scales; 1 is none."""
PerSample = Float[Tensor, "b"]
Counts = Int[Tensor, "b"]
"""Whole numbers: counts of steps, or positions in a grid."""
TimeInputs = Shaped[Tensor, "b *inputs"]
"""Times, or a row of a time and what else a network embeds with it."""
Rows = Shaped[Tensor, "r"]
"""Which samples: by index, or by a mask."""

# Grids --------------------------------------------------------------------------------------------------------------------

GridTimes = Shaped[Tensor, "n"]
"""Timesteps of a grid, the same for all samples."""
SamplerTimes = Shaped[Tensor, "steps"]
"""Timesteps of a sampler's steps, the same for all samples."""
Levels = Float[Tensor, "n"]
TimesOfSteps = Shaped[Tensor, "n b"]
"""Timesteps of each sample, a row for each step."""

# Anything else ------------------------------------------------------------------------------------------------------------

Scalar = Float[Tensor, ""]
Values = Float[Tensor, "*s"]
"""Tensors of one shape, whatever it is."""
Numbers = Float[Tensor, "..."]
"""Tensors of any shapes."""
Anything = Shaped[Tensor, "..."]
Histogram = Float[Tensor, "2 n"]
"""Sums and counts at each of n places."""
