"""flash_attn.ops.triton: the same results from PyTorch's operators, on any device."""
