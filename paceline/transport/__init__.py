"""How bytes get from one process to another: shared segments, futexes, framed sockets."""
