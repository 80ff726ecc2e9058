"""This process: signals, standard streams, memory, threads, garbage collection.

May import nothing but ``errors``.
"""
