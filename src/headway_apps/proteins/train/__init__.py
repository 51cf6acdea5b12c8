"""Training: from a config and a prepared folder to a run's folder, on one process or many.

    objective.py   what a batch costs: its noise, the model's scores, the loss
    ahead.py       the batches of the next steps, made while a step runs
    state.py       all that a run is, as tensors and plain values, and back
    trainer.py     the loop: step, log, evaluate, sample, save

All randomness of a batch comes of the seed and the batch's number in the run. So a run that goes on is the run that was
not stopped, and two processes that share the batches of a step do what one does. Nobody's random state is kept.
"""
