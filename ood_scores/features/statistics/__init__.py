"""Statistics of a feature set that fits request by name, collected in one pass."""
