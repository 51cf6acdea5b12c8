"""Import shims: code written for flash-attn and xFormers runs where they cannot, on `headway.attention`."""

from headway.shims.importing import Answer, install, installed, uninstall

__all__ = ["Answer", "install", "installed", "uninstall"]
