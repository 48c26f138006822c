"""Who is trained on and who is tested on (folds), and what crosses the line all the same (leakage)."""
