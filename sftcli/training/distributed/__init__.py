"""Several processes as one: collective operations, a stop that all take at the same step, the bytes sent."""
