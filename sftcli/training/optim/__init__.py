"""What moves the weights: optimizers and the schedule of the learning rate."""
