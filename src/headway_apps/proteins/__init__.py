"""Discrete diffusion on protein sequences: from FASTA to samples, on any machine."""
