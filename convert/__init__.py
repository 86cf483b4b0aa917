"""From a Hugging Face checkpoint to an MXFP4 checkpoint: ``python -m convert``."""
