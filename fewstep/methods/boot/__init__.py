"""Bootstrapping from noise, without images: BOOT (Gu et al. 2023).

`method` has the losses; `config` the settings (no torch), `grid` the sub-times of every segment, `starts` where segments begin,
`teacher` the guided, bounded and solved teacher. The arithmetic is in `fewstep.diffusion.signal_ode`.
"""
