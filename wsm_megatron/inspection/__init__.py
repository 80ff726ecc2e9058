"""What is in a checkpoint, whether it is sound, how Megatron resumes from it.

May import ``execution`` and below.
"""
