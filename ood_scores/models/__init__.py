"""Models: opening them by name or from a checkpoint, running them unchanged, and networks of the literature."""
