"""What one schedule plays: a job, a script for each worker, and how much goes wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from paceline.config import Async, Bounded, Local, Pace, Quorum, Sync
from paceline.data.ledger import RING
from tests.simulation import known

SMALL_RING = 4  # a loader that draws three ahead fills it with the batch in hand
WORLDS = ("rounds", "log")


@dataclass(frozen=True)
class Script:
    """How one worker's script goes through its passes; the process that takes its place runs the same one."""

    breaks_after: tuple[int | None, ...]  # in pass p, leave after so many batches
    steps_after_break: tuple[bool, ...]  # step once more outside of the loader
    accumulate: tuple[int, ...]  # batches to a step
    ends_in: int | None  # the script is over in this pass: after its break, or after its end
    ahead: int  # batches that the loader draws ahead of the one in hand


@dataclass(frozen=True)
class Plan:
    pace: Pace
    workers: int
    servers: int
    parts: int
    leased: bool
    streamed: bool  # batches come from a stream, which cannot go back
    batches: tuple[int, ...]  # of each pass, of all workers
    owners: tuple[tuple[int, ...], ...]  # where they are not leased: whose batch is which
    scripts: tuple[Script, ...]
    evaluates: tuple[bool, ...]  # after pass p
    evaluates_every: int | None  # and within a pass, after so many steps
    evaluators: int  # how many workers evaluate; with 1 only worker 0 does
    to_evaluate: int  # batches, dealt in turn
    says_eval: bool  # does the script call model.eval()?
    clips: int  # norms that are asked for with each step
    kill_every: float | None  # turns between kills, on average
    most_kills: int
    gives_up: float  # how often nobody takes the place of one that has died
    weights: tuple[int, ...]  # how fast each worker is
    places: int  # how many workers there may be
    wishes: tuple[tuple[int, int], ...]  # turns to wait, then so many workers are wished for
    server_places: int  # how many servers there may be
    server_wishes: tuple[tuple[int, int], ...]  # as ``wishes``
    kills_servers: bool
    naps: bool  # does who has just had a turn get none for a while, now and then?
    ring: int  # leases of one worker's that are not committed
    loads: tuple[bool, ...]  # before pass p, a checkpoint of the script's own
    asks_length: bool  # does the script ask at every batch whether it is the last of its pass?
    checkpoint_every: int | None  # steps
    stops_after: int  # turns, from the first checkpoint on: then the run is stopped, and another goes on from there
    goes_on_with: int  # workers

    def script(self, rank: int) -> Script:
        return self.scripts[rank % len(self.scripts)]

    def resumed(self) -> Plan:
        """Of the run that goes on. Nobody is wished for there, who was in the other."""
        workers = self.goes_on_with
        return replace(self, workers=workers, places=workers, wishes=(), checkpoint_every=None)

    @property
    def trains_on_all(self) -> bool:
        """Does every script read all that it is given, and take a step in its first pass, so that all know what it is?
        What it reads behind the last step of a pass is part of the next pass's first."""
        return all(self._trains_on_all(rank, script) for rank, script in enumerate(self.scripts))

    def _trains_on_all(self, rank: int, script: Script) -> bool:
        whole = script.ends_in is None and not any(after is not None for after in script.breaks_after)
        if self.leased or not whole:
            return whole and max(script.accumulate) == 1
        counts = [owners.count(rank) for owners in self.owners]
        first = next((number for number, count in enumerate(counts) if count), None)
        if self.kill_every is not None and self.gives_up:
            # Of what is dealt anew it may get less than a step's, before it has taken one.
            return max(script.accumulate[: None if first is None else first + 1]) == 1
        return first is None or counts[first] >= script.accumulate[first]


def draw(random_: random.Random, world: str, more: random.Random, rare: random.Random) -> Plan:
    """A plan; most of them kill, and few do everything at once. What ``more`` draws changes nothing else, nor what
    ``rare`` does."""
    workers, passes = random_.randint(1, 4), random_.randint(1, 3)
    if world == "rounds":
        pace: Pace = random_.choice((Sync(), Sync(), Sync(), Local(2)))
    else:
        pace = random_.choice((Quorum(random_.randint(1, workers)), Bounded(random_.randint(0, 2)), Async(), Async(2)))
    servers = random_.choice((0, 0, 0, 1, 2))
    unusual = random_.choice((0.0, 0.0, 0.2, 0.5))

    def happens() -> bool:
        return random_.random() < unusual

    batches = tuple(random_.randint(0, 4 * workers) for _ in range(passes))
    scripts = tuple(
        Script(
            breaks_after=tuple(random_.randint(1, 3) if happens() else None for _ in range(passes)),
            steps_after_break=tuple(happens() for _ in range(passes)),
            accumulate=tuple(2 if happens() else 1 for _ in range(passes)),
            ends_in=random_.randrange(passes) if happens() else None,
            ahead=random_.choice((0, 0, 1, 3)),
        )
        for _ in range(workers)
    )
    plan = Plan(
        pace=pace,
        workers=workers,
        servers=servers,
        parts=0 if world == "rounds" else servers * 2 or random_.randint(1, workers),
        leased=random_.random() < 0.5,
        streamed=random_.random() < 0.2,
        batches=batches,
        owners=tuple(
            tuple(random_.randrange(workers) if happens() else ordinal % workers for ordinal in range(count))
            for count in batches
        ),
        scripts=scripts,
        evaluates=tuple(random_.random() < 0.3 for _ in range(passes)),
        evaluates_every=random_.choice((None, 1, 2, 3)),
        evaluators=random_.choice((1, workers)),
        to_evaluate=random_.randint(1, workers),
        says_eval=random_.random() < 0.5,
        clips=_norms(random_) if isinstance(pace, Sync) else 0,
        kill_every=random_.choice((None, None, 100.0, 300.0, 1000.0)),
        most_kills=random_.choice((1, 2, 6)),
        gives_up=random_.choice((0.0, 0.0, 0.5)),
        weights=tuple(random_.choice((1, 1, 1, 20)) for _ in range(workers)),
        places=workers,
        wishes=(),
        server_places=servers,
        server_wishes=(),
        kills_servers=False,
        naps=False,
        ring=RING,
        loads=(False,) * passes,
        asks_length=False,
        checkpoint_every=None,
        stops_after=0,
        goes_on_with=workers,
    )
    plan = _with_server_wishes(_with_wishes(plan, random_), random_)
    return _without_what_is_known(_with_rarities(_with_steps_outside(_with_more(plan, more), more), rare))


def _with_rarities(plan: Plan, rare: random.Random) -> Plan:
    """Some scripts load checkpoints of their own, or ask how long their pass is; some rings of the ledger are as short
    as can be, where workers push for several batches at once."""
    if rare.random() < 0.15:
        plan = replace(plan, loads=tuple(rare.random() < 0.6 for _ in plan.batches))
    if rare.random() < 0.15:
        plan = replace(plan, asks_length=True)
    others = plan.checkpoint_every is not None and plan.goes_on_with < plan.workers  # whose rings do not hold it all
    often = 0.15 if plan.checkpoint_every is None else 0.5 if plan.workers > 1 else 0.9
    if plan.leased and not others and rare.random() < often:
        every, ahead = rare.randint(2, 4), max(script.ahead for script in plan.scripts)
        pace = Async(every) if plan.parts else Local(every)
        ring = ahead + 1 + plan.asks_length + rare.randint(0, 2)
        batches, owners = tuple(2 * count for count in plan.batches), tuple(2 * one for one in plan.owners)
        plan = replace(plan, pace=pace, clips=False, ring=ring, kill_every=rare.choice((plan.kill_every, 100.0, 300.0)))
        # More than the ring holds cannot be read in training mode without a step.
        plan = replace(plan, says_eval=True, batches=batches, owners=owners)
    if rare.random() < 0.15:
        # Little to train on, and nothing to evaluate for some, or for anybody.
        passes, few = len(plan.batches), rare.choice((0, 0, 1))
        owners = tuple(one[: rare.randint(0, 2)] for one in plan.owners)
        plan = replace(
            plan,
            batches=tuple(map(len, owners)),
            owners=owners,
            evaluates=(True,) * passes,
            evaluators=rare.choice((1, plan.workers)),
            to_evaluate=few,
            says_eval=rare.random() < 0.3,
        )
    if plan.leased and rare.random() < 0.15:
        plan = replace(plan, streamed=True, kill_every=rare.choice((100.0, 300.0)))
    return plan


def _norms(random_: random.Random) -> int:
    luck = random_.random()
    return 2 if luck < 0.08 else 1 if luck < 0.25 else 0


def _with_steps_outside(plan: Plan, more: random.Random) -> Plan:
    """In a tenth of the plans with rounds some leave their passes early and step behind them, while others read on, end
    before the rest, or are given up."""
    if plan.parts or plan.checkpoint_every is not None or more.random() < 0.9:
        return plan
    passes = len(plan.batches)

    def script(role: str, rank: int) -> Script:
        steps = role == "steps"
        return Script(
            breaks_after=tuple(more.randint(1, 2) if steps else None for _ in range(passes)),
            steps_after_break=(steps,) * passes,
            accumulate=(1,) * passes,
            ends_in=more.randrange(passes) if role == "ends" else None,
            ahead=plan.scripts[rank].ahead,
        )

    roles = [more.choice(("steps", "reads", "reads", "ends")) for _ in range(plan.workers)]
    scripts = tuple(script(role, rank) for rank, role in enumerate(roles))
    return replace(plan, scripts=scripts, gives_up=0.5 if more.random() < 0.5 else plan.gives_up)


def _with_more(plan: Plan, more: random.Random) -> Plan:
    """In two fifths of the plans one or several of: naps, rings that are soon full, checkpoints to go on from."""
    if more.random() < 0.62:
        return plan
    if more.random() < 0.6:
        plan = replace(plan, naps=True)
    if more.random() < 0.5:
        plan = replace(plan, ring=more.randint(SMALL_RING, SMALL_RING + 2))
    elif more.random() < 0.8:
        least = plan.pace.count if isinstance(plan.pace, Quorum) else 1
        # What was read behind the last step of a finished pass is gone.
        scripts = tuple(replace(script, accumulate=(1,) * len(plan.batches)) for script in plan.scripts)
        with_others = more.random() < 0.6
        plan = replace(
            plan,
            scripts=scripts,
            checkpoint_every=more.randint(1, 3),
            stops_after=int(more.expovariate(1 / 200)),
            goes_on_with=more.randint(least, max(least, 4)) if with_others else plan.workers,
            wishes=plan.wishes if plan.leased else (),
        )
    return plan


def _with_wishes(plan: Plan, random_: random.Random) -> Plan:
    """In a third of the plans workers are added and leave; nothing else differs from what the seed had drawn."""
    if random_.random() < 2 / 3:
        return plan
    places = plan.workers + random_.randint(0, 2)
    least = plan.pace.count if isinstance(plan.pace, Quorum) else 1
    wishes = tuple(
        (int(random_.expovariate(1 / 150)), random_.randint(least, places)) for _ in range(random_.randint(1, 4))
    )
    # A gradient that waits for its step when a worker leaves is gone with it.
    scripts = tuple(replace(script, accumulate=(1,) * len(plan.batches)) for script in plan.scripts)
    return replace(plan, places=places, wishes=wishes, scripts=scripts)


def _with_server_wishes(plan: Plan, random_: random.Random) -> Plan:
    """In half of the plans with servers these come and leave, too, and are killed where workers are."""
    if not plan.servers or random_.random() < 1 / 2:
        return plan
    places = plan.servers + random_.randint(0, 2)
    wishes = tuple(
        (int(random_.expovariate(1 / 150)), random_.randint(1, places)) for _ in range(random_.randint(1, 5))
    )
    parts = plan.parts and max(plan.parts, places)
    return replace(plan, server_places=places, parts=parts, server_wishes=wishes, kills_servers=random_.random() < 0.7)


def _without_what_is_known(plan: Plan) -> Plan:
    if plan.streamed and not (plan.leased and known.STREAMS_ARE_LEASED):
        plan = replace(plan, streamed=False)
    if isinstance(plan.pace, Quorum) and not known.QUORUMS_EVALUATE_WITHIN_PASSES:
        plan = replace(plan, evaluates_every=None)
    if plan.kill_every is not None or plan.wishes or plan.checkpoint_every is not None:
        plan = _without_what_newcomers_cannot(plan)
    if plan.leased and not known.FEWER_LEASES_THAN_WORKERS:
        owners = tuple(one if len(one) >= plan.places else tuple(range(plan.places)) for one in plan.owners)
        plan = replace(plan, batches=tuple(map(len, owners)), owners=owners, to_evaluate=plan.places)
    return plan


def _without_what_newcomers_cannot(plan: Plan) -> Plan:
    looks_like_training = not plan.says_eval or plan.to_evaluate < plan.workers
    if looks_like_training and not known.NEWCOMERS_EVALUATE_WITHIN_PASSES:
        plan = replace(plan, evaluates_every=None)
    if not known.NEWCOMERS_EVALUATE_IN_TRAINING_MODE:
        plan = replace(plan, says_eval=True)
    if not known.NEWCOMERS_EVALUATE_NOTHING:
        plan = replace(plan, to_evaluate=plan.workers)
    if not known.NEWCOMERS_STEP_AFTER_BREAKS:
        scripts = (replace(script, steps_after_break=(False,) * len(plan.batches)) for script in plan.scripts)
        plan = replace(plan, scripts=tuple(scripts))
    if plan.servers and not known.SERVERS_SEE_EMPTY_ROUNDS:
        plan = replace(plan, clips=0)
    if not plan.parts and plan.workers > 2 and not known.DEATHS_FREE_TAILS:
        plan = replace(plan, leased=False, streamed=False)
    return plan
