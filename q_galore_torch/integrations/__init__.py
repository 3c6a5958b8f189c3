"""Bridges to other libraries: torch.distributed and its checkpoints, Hugging Face, compressed-tensors."""
