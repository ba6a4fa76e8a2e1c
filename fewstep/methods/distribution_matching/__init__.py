"""Distribution matching distillation: DMD and DMD2 (Yin et al. 2024).

`dmd2` has the losses of generator and critic; `config` the settings (no torch), `terms` parts that are functions of tensors,
`diagnostics` figures for the log and warnings. The critic and its heads are in `fewstep.methods.discriminator`.
"""
