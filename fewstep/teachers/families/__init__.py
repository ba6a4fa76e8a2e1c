"""One file for each family of diffusers pipelines."""
