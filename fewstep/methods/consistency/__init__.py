"""Consistency distillation: CD, LCM, PCM, MLCM, and Easy Consistency Tuning."""
