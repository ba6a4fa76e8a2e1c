"""Extra inputs of a student's network (target time, guidance scale), folded away at export."""
