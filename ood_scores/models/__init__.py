"""Models: opened by name or from a checkpoint, run without leaving a trace, and the networks of the literature."""
