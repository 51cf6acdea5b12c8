"""What `xformers` has, on `headway.attention`."""
