"""What `flash_attn` has, on `headway.attention`."""

__version__ = "2.8.3.post1+headway"  # "post1" keeps int(version.split(".")[2]) working, as people write it
