"""The families: data. One file for each, or for some that differ little."""
