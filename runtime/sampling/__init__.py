"""From noise to a latent: requests, schedules, the sampling loop, noise."""
