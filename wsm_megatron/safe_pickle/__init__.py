"""Pickles and zip archives read without importing or calling what they name.

May import nothing but ``errors``.
"""
