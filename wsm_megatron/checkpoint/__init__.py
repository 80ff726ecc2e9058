"""Reading and writing of torch_dist checkpoints; nothing else in the package knows the format."""
