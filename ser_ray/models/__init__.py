"""Backbones, adapters and the classifier around them; plain PyTorch, no Ray."""
