"""Networks that scores are computed with: image features, FID's Inception, CLIP; `view` crops and resizes before them."""
