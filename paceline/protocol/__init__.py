"""Decisions, as pure functions and small state machines: no sockets, clocks, threads or tensors here."""
