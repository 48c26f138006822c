"""Backbones, adapters and the classifier around them; plain PyTorch, no Ray."""

import logging
import os
import warnings

# Silences what does not concern a user: advice on optional kernels, notes between libraries about renamed attributes,
# tables of a checkpoint's unused weights (`backbones` checks them itself). Here, since some comes during imports.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

# Utterances have many lengths, and oneDNN caches a kernel and its buffers for each of the last 1024 shapes: 0.8 of
# 2.6 GB for one epoch of the demo's wav2vec2, at no gain in speed. oneDNN reads this when it makes its first kernel.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
