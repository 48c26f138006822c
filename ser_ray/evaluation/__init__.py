"""From predictions to figures: metrics, their intervals, baselines, plots, and the evaluation record."""
