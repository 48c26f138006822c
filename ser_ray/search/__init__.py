"""What to try next: points of a search space, and the study that learns from what was tried."""
