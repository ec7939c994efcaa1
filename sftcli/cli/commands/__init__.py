"""One module for each command: flags in, a service called, results out."""
