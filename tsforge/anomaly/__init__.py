"""Anomaly detection: scores, calibration, threshold rules, events and the variates behind them.

Everything up to ``detector`` works on plain arrays and knows no model; ``detector.detect`` applies it to an artifact.
Nothing is ever fitted on the scored span, and a score that cannot be computed is NaN, never 0.
"""
