"""BOOT (Gu et al. 2023): data-free distillation by bootstrapping along the teacher's ODE."""
