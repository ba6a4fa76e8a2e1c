"""Where images, prompts and labels come from, and the order in which a run sees them."""
