"""How the embedded backbones are trained: synthetic speech (speech), its voice and channel (channel), batches
(material), losses (objectives), the training itself (recipe)."""
