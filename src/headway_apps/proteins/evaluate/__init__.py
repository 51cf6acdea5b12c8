"""How good a model and its proteins are, each number beside what it is to be compared with.

likelihood.py   nats per residue of a part, by a bound that is the same number twice
ngrams.py       what counting short stretches of the training sequences gives on the same part
statistics.py   of a set of proteins against real ones: k-mers, lengths, repeats, nearness to the training sequences
nearest.py      how much of a protein stands in one training sequence
references.py   the rows that every table of statistics carries: random, training and real proteins, also shuffled
attention.py    which backend computes attention of packed proteins, and why
evaluation.py   all of it, and the file that keeps it
"""
