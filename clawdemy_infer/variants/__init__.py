"""One part replaced by another: windows, rounded caches, latents, experts and what else a lesson
needs. Each file stands alone; `parts` serves the caches whose keys lie in an order of their own."""
