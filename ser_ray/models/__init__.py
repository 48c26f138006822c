"""Backbones, adapters and the classifier around them; plain PyTorch, no Ray."""

import logging
import warnings

# For people: no advice on optional kernels, no note from one library to another about a renamed attribute, no table of
# a checkpoint's unused weights (`backbones` checks them itself). Here, since some of it is said during imports.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
logging.getLogger("transformers.distributed.tensor_parallel").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
