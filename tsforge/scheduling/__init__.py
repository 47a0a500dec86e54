"""What runs when: cron slots, the ledger that gives each slot to one process, child processes with time limits."""
