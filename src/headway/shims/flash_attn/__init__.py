"""What `flash_attn` has, on `headway.attention`: it runs on any device, and any dtype."""

from headway.packages import SHIM
from headway.shims.absent import absent
from headway.shims.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__version__ = f"2.8.3.post1{SHIM}"  # "post1" keeps int(version.split(".")[2]) working, as people write it

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

__getattr__ = absent(__name__)
