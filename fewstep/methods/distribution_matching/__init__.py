"""Distribution matching distillation: DMD and DMD2 (Yin et al. 2024)."""
