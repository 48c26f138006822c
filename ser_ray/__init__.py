"""ser_ray: fine-tune, search and evaluate speech backbones for emotion recognition, on Ray."""

__version__ = "0.1.0"
