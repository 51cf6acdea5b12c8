"""What training of any model needs: it knows no model, no data and no app.

precision.py    which device, and what it computes in, with the reason
average.py      the moving average of weights
rates.py        the learning rate of each optimizer step
checkpoints.py  a folder of checkpoints, each of which is whole
folders.py      a folder that appears when it is whole, or not at all
tensors.py      a safetensors file that others may read
gradients.py    all gradients in one tensor
interrupts.py   Ctrl-C and SIGTERM end work in order
trackers.py     numbers out: a file always, TensorBoard, W&B or Trackio where asked for
errors.py       what these raise
"""
