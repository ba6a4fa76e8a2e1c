"""Consistency distillation and tuning, composed of parts: CD, LCM, ECT, PCM and MLCM.

* `loss`: the one loss, of `Parts`, and the method that all compositions are.
* `cd`, `lcm`, `ect`, `pcm`, `mlcm`: which parts each paper combines; `phased` is what the last two share.
* `states`: where the student is trained; `pool`: trajectories that are moved on by the loss's own evaluations.
* `points`: timesteps of pairs, and their weights; `targets`: x_s and the target network; `endpoints`: the consistency functions.
* `terms`: a reward on samples, an adversarial loss on phases' ends (`adversarial`).
* `settings`: sections of the settings; `method_settings`: those of each method; `build`: parts from sections.

Only `methods.registry` names the classes; `methods.trajectory` uses states, endpoints and `build`.
"""
