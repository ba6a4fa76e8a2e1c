"""Continuous-time consistency models: sCM (Lu and Song 2024).

`method` has the loss and the learnt weight of noise levels; `config` the settings (no torch). The arithmetic is in
`fewstep.diffusion.trigflow`.
"""
