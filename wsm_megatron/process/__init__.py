"""This process: signals, standard streams, memory, worker threads, garbage collection."""
