"""xFormers' names, computed by `headway.attention`."""

from headway.packages import SHIM
from headway.shims.absent import absent

__version__ = f"0.0.35.post1{SHIM}"  # "post1" keeps int(version.split(".")[2]) working, as people write it
_has_cpp_library = False
_is_opensource = True


__getattr__ = absent(__name__)


def _is_triton_available() -> bool:
    return False  # nothing here is xFormers' own kernel
