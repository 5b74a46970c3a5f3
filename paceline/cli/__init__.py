"""The command line: the commands, the face of a run, and nothing that trains."""
