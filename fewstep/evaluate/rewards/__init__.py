"""Human-preference reward models."""
