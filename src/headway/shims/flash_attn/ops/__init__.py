"""flash_attn.ops: what flash-attn fuses around attention, from PyTorch's own operators."""
