"""Reconstructed dynamics: piecewise-linear maps fitted to trajectories, and what such a map does in the long run.

The analysis modules (``piecewise``, ``regions``, ``fixed_points``, ``capture``, ``findings``) read the shallow form of
one fitted map, run in float64 and know nothing of training.
"""
