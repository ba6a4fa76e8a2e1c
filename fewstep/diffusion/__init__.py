"""The mathematics of diffusion and flow models: pure functions of tensors.

* `schedule`: alpha(t) and sigma(t) of a noise process. Timesteps t are what the network receives, [B]; -1 is clean data.
* `prediction`: a network's output as (x0, eps), whatever it predicts; added noise; a step of the ODE.
* `guidance`: classifier-free guidance; `GuidedDenoiser`, the one guided denoiser `(x, t) -> Prediction`.
* `solvers`: rules of the ODE's steps (DDIM, Heun, DPM-Solver++ 2M), and their application along times.
* `rollout`: sampling by jumps or by re-noising, of a whole batch or with a count of steps for each sample.
* `grids`: timesteps of solvers and students: even, Karras, phases, trailing, milestones, log-normal.
* `losses`: distances, distribution matching, adversarial losses.
* `signal_ode`: BOOT's targets; `trigflow`: sCM's rotation.

Any package but `config` and `io` may import it; it imports torch alone.
"""
