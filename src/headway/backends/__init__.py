"""The kernel families: one declaration each in the registry, one file each beside it."""
