"""Where sweeps are kept: a folder that all machines see, or a bucket of an object store."""
