"""One file per paper. ``tsforge.models.registry`` lists them; importing this package loads nothing else."""
