"""Networks that scores are computed with."""
