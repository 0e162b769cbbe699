"""Feature sets on disk: the HDF5 cache, its shards, and the statistics kept with it."""
