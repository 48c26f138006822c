"""Where the embedded backbones come from: made-up speech (speech), and what happens to it on its way (channel)."""
