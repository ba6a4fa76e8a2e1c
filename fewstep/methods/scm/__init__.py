"""Continuous-time consistency models, sCM (Lu & Song 2024)."""
