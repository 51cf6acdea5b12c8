"""Where models compute attention, one kind a file. Each says which sites a model has, and changes them."""
