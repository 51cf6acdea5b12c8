"""New proteins from a trained model.

lengths.py      how long they are: as the training data, or as asked
templates.py    which residues are given, and which are to be drawn
sample.py       the samplers by name, run over packed batches
files.py        FASTA out
"""
