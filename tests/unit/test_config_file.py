"""Claims about config.toml: what is written is read back the same, and mistakes are named."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.config import ASSIGNMENTS, DATA, ENGINES, Async, Bounded, Job, Local, Quorum, Sync
from paceline.config_file import dump, load
from paceline.errors import ConfigError, UsageError

counts = st.none() | st.integers(1, 2**53)
paths = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1).map(Path)
rates = st.floats(0, allow_nan=False, allow_infinity=False)
in_rounds = st.one_of(
    st.just(Sync()),
    st.integers(1, 256).map(Quorum),
    st.builds(Local, st.integers(1, 2**53), rates, st.floats(0, 1, exclude_max=True)),
)
on_arrival = st.integers(0, 2**53).map(Bounded) | st.integers(1, 2**53).map(Async)
paces = st.one_of(
    st.fixed_dictionaries({"pace": in_rounds}),
    st.fixed_dictionaries(
        {"pace": on_arrival, "staleness_damping": st.booleans(), "compensate": st.none() | st.floats(0, 1e38)}
    ),
)


def job(of: dict[str, Any], workers: int, **options: Any) -> Job:
    needed = of["pace"].count if isinstance(of["pace"], Quorum) else 1
    if options["data"] == "own":
        options["assign"] = None
    if options["max_servers"] is not None:
        options["max_servers"] = max(options["max_servers"], options["servers"]) if options["servers"] else None
    if options["engine"] != "local":
        options |= {"data": "shared", "checkpoint_every": None}
    options["servers_apart"] &= bool(options["servers"]) and options["engine"] != "local"
    if options["servers_apart"] and not (isinstance(of["pace"], Local | Async) and of["pace"].every > 1):
        options["server_hosts"] = min(options["server_hosts"], options["servers"])
    else:
        options["server_hosts"] = 1
    if options["server_hosts"] > 1:
        options["max_servers"] = None
    return Job(**of, workers=max(workers, needed), **options)


jobs = st.builds(
    job,
    paces,
    name=st.text(),
    workers=st.integers(1, 256),
    servers=st.integers(0, 64),
    max_servers=st.none() | st.integers(1, 64),
    assign=st.none() | st.sampled_from(ASSIGNMENTS),
    data=st.sampled_from(DATA),
    clip=st.none() | st.floats(1e-300, 1e300),
    restarts=st.integers(0, 2**53),
    min_workers=st.none() | st.just(1),
    hang_timeout=st.floats(1e-300, 1e300),
    checkpoint_every=counts,
    keep=st.integers(1, 2**53),
    threads=counts,
    seed=st.integers(0, 2**63 - 1),
    steps=counts,
    epochs=counts,
    until_loss=st.none() | st.floats(allow_nan=False),
    patience=counts,
    runs=paths,
    engine=st.sampled_from(ENGINES),
    ray_address=st.none() | st.text(),
    interface=st.none() | st.text(),
    port=st.integers(0, 2**16 - 1),
    insecure=st.booleans(),
    servers_apart=st.booleans(),
    server_hosts=st.integers(1, 64),
    return_timeout=st.floats(1e-300, 1e300),
)


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


@given(job=jobs, script=st.none() | st.text(), args=st.lists(st.text()).map(tuple))
def test_what_is_dumped_is_loaded_the_same(
    tmp_path_factory: pytest.TempPathFactory, job: Job, script: str | None, args: tuple[str, ...]
) -> None:
    loaded = load(written(tmp_path_factory.mktemp("job"), dump(job, script, args)))

    assert loaded.pop("script", None) == script
    assert loaded.pop("args", ()) == (args if script is not None else ())
    expected = {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}
    assert loaded == {key: value for key, value in expected.items() if value is not None}
    assert Job(**loaded) == job  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "pace", [Quorum(2), Bounded(0), Async(), Async(8), Local(4), Local(4, 0.7, 0.9), Local(4, 0.5)]
)
def test_each_pace_is_one_word_in_the_file(tmp_path: Path, pace: Quorum | Bounded | Async | Local) -> None:
    text = dump(Job("train", pace=pace), None, ())
    assert f'pace = "{pace}"' in text.splitlines()
    assert load(written(tmp_path, text))["pace"] == pace


def test_none_is_left_out_and_the_rest_is_plain_toml() -> None:
    text = dump(Job("train", steps=30), "train.py", ("--lr", '0.1 "quoted"', "naïve\n\x7f"))

    assert text.splitlines() == [
        'script = "train.py"',
        r'args = ["--lr", "0.1 \"quoted\"", "naïve\n\u007f"]',
        'name = "train"',
        "workers = 2",
        "servers = 0",
        'pace = "sync"',
        'assign = "round_robin"',
        'data = "shared"',
        'engine = "local"',
        "port = 0",
        "insecure = false",
        "servers_apart = false",
        "server_hosts = 1",
        "return_timeout = 60.0",
        "staleness_damping = false",
        "restarts = 3",
        "hang_timeout = 30.0",
        "keep = 2",
        "seed = 0",
        "steps = 30",
        'runs = "runs"',
    ]


def test_a_file_by_hand_may_hold_a_few_keys(tmp_path: Path) -> None:
    path = written(tmp_path, "# mine\nworkers = 4\npace = 'Sync'\nuntil_loss = 2\n")
    assert load(path) == {"workers": 4, "pace": Sync(), "until_loss": 2.0}


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("wrokers = 4", ConfigError, "did you mean 'workers'?"),
        ("until-loss = 4", ConfigError, "did you mean 'until_loss'?"),
        ("workers = 'two'", ConfigError, "workers is 'two'; it must be a whole number"),
        ("workers = true", ConfigError, "workers is True; it must be a whole number"),
        ("until_loss = 'low'", ConfigError, "until_loss is 'low'; it must be a number"),
        ("args = '--lr 1'", ConfigError, "it must be a list of strings"),
        ("pace = sync", ConfigError, "strings need quotes"),
        ("pace = 'synk'", UsageError, "did you mean 'sync'?"),
        ("pace = 3", ConfigError, "pace is 3; it must be a string"),
        ("staleness_damping = 1", ConfigError, "staleness_damping is 1; it must be true or false"),
        ("compensate = true", ConfigError, "compensate is True; it must be a number"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error) as raised:
        load(written(tmp_path, text))
    assert says in str(raised.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"')
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "latin.toml")


def test_an_argument_that_is_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="args has bytes that are not UTF-8"):
        dump(Job("train"), "train.py", ("\udcff",))
