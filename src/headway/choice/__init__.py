"""Which backend runs a request here, and why not the others."""
