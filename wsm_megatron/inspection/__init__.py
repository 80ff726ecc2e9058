"""What is in a checkpoint, whether it is sound, and how Megatron resumes from it."""
