"""Training loops, streaming metrics, and experiment trackers of other libraries."""
