"""What starts, watches and tells of a run: the front, the launcher, the zygote."""
