"""Parts to build models from."""

from headway.layers.multihead import MultiheadAttention
from headway.layers.sigma_reparam import remove_sigma_reparam, sigma_reparam

__all__ = ["MultiheadAttention", "remove_sigma_reparam", "sigma_reparam"]
