"""flash_attn.modules: parts to build models from, with flash-attn's own parameter names."""
