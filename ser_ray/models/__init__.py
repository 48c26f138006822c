"""Backbones, adapters and the classifier around them; plain PyTorch, no Ray."""

import logging
import os
import warnings

# For people: no advice on optional kernels, no note from one library to another about a renamed attribute, no table of
# a checkpoint's unused weights (`backbones` checks them itself). Here, since some of it is said during imports.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
# WavLM hands torch a boolean padding mask beside its float position bias, which is what it means to do.
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask", category=UserWarning)

# Utterances come in every length, and oneDNN keeps a kernel and its buffers for each of the last 1024 shapes:
# 0.8 of 2.6 GB for one epoch of the demo's wav2vec2, at no gain in speed. Read when the first kernel is made.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
