"""Pictures and pages for people: coefficients, runs, sweeps, trajectories.

The only package that imports matplotlib, and that when a picture is drawn. Shows what ``sweeps``,
``inspection``, ``trajectory`` and ``schedule`` have found, and works nothing out. Only ``cli``
imports it.
"""
