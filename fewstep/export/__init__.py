"""A trained student as a pipeline folder or adapter files that plain diffusers opens, verified in a process of its own."""
