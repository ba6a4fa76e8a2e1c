"""Regression onto the ends of the teacher's trajectories: `method.Trajectory` and its `settings`.

Knowledge distillation, not consistency distillation: there is no target network. The states and endpoints are those of
`methods.consistency`.
"""
