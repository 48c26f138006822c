"""A model behind HTTP: what `ser-ray serve` consists of. Only `deployment` knows Ray Serve; the rest is plain code."""
