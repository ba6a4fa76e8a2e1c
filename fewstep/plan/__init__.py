"""What a run will hold in memory and compute, before it starts."""
