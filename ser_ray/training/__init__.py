"""The training loop; plain PyTorch, no Ray: it reports through one callback."""
