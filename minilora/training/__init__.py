"""Everything a run needs around its loop: set-up, checkpoints, log, report."""
