"""Tags by which the runs of a study and of its trials are told from others, and what became of them."""

from __future__ import annotations

STUDY = "tsforge.study"  # its name, at its own run
TRIALS = "tsforge.trials"  # so many complete, pruned and failed
BEST_TRIAL = "tsforge.best_trial"
TRIAL = "tsforge.study.trial"  # its number, at the run of a trial
OUTCOME, NOTE = "tsforge.outcome", "tsforge.note"
PRUNED = "pruned"
