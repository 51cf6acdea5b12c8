"""The mathematics of discrete diffusion on sequences: it takes log scores and token ids, and knows no model.

    schedules.py    how much noise there is at a time: sigma_bar(t), rate(t), and how a batch draws its times
    curriculum.py   less noise in the first steps of training, told to all who use it
    graphs.py       which state noise leads to (absorbing, uniform), and the ways back
    losses.py       nats per token: score entropy, and the cross-entropy that it equals
    bound.py        an upper bound of -log p of whole sequences, without bias, the same number twice
    samplers.py     Euler, analytic, first-hitting; infill around fixed positions
    draws.py        random numbers and choices in float64
    sequences.py    how tokens divide into sequences, and how a model is asked
    given.py        what callers give, checked

Words: `clean` and `noised` tokens; a site is `free` if noise may change it (padding, boundaries and given residues are
not); `sigma_bar` is the noise gathered until a time, one number a sequence or a token; `ids` are what a free site holds
when it is clean.
"""
