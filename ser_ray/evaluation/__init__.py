"""Evaluation of predictions: metrics, their intervals, baselines, plots, and the evaluation record."""
