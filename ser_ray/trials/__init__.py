"""What to try next: points of a search space, and the Optuna study that models the trials so far."""
