"""Noise schedules, readings of a network, ODE steps, distances: pure functions of tensors."""
