"""What is known not to hold yet is left out of the schedules, so that the rest is tested.

A name is True once paceline holds it; README.md tells the stories.
"""

from __future__ import annotations

# Evaluations that a newcomer's script makes while it catches up.
NEWCOMERS_EVALUATE_WITHIN_PASSES = True
NEWCOMERS_EVALUATE_IN_TRAINING_MODE = True
NEWCOMERS_EVALUATE_NOTHING = True
# A step that a newcomer's script takes outside of its loops as soon as it has caught up.
NEWCOMERS_STEP_AFTER_BREAKS = True
# A pass by lease with fewer batches than there are workers; from a stream.
FEWER_LEASES_THAN_WORKERS = True
STREAMS_ARE_LEASED = True
# A push is dropped, and the script evaluates before it draws the next batch.
QUORUMS_EVALUATE_WITHIN_PASSES = True
# A worker that has left, and is killed before its process has ended.
LEFT_ARE_KILLED = True
# The last that has not finished its script is given up in a round, and a server waits for it for ever.
LAST_IS_GIVEN_UP = True
# Worker 0 dies before it has filled the memory that all share, and nobody takes its place.
FIRST_IS_GIVEN_UP_EARLY = True
# A round that only the dead have asked a norm in is closed empty, member by member, the servers last.
SERVERS_SEE_EMPTY_ROUNDS = True
# One dies that has asked for the norm of a round and not pushed it; others may come to that round yet.
NORMS_OF_THE_DEAD = True
# At pace bounded a newcomer takes up the clock of the slowest, and counts some time later.
NEWCOMERS_JOIN_WITHIN_THE_BOUND = True
# In a run that goes on from a checkpoint all that could have taken it up are dead before they have.
RESUMED_ARE_KILLED_AT_ONCE = True
# A death gives back batches while a round that it is in is not over, and frees who waits for them at the tail.
DEATHS_FREE_TAILS = True
