"""Claims about where a value comes from: flag, environment, file, default, in that order."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.cli.options import (
    OPTIONS,
    TRUTHS,
    JobFlags,
    ShowFlags,
    job_field,
    resolve,
    switched,
    unknown_variables,
    variable,
)
from paceline.config import Bounded, Job
from paceline.errors import UsageError

PLACES = ("flag", "environment", "file")


@given(given_in=st.sets(st.sampled_from(PLACES)))
def test_the_first_place_that_has_a_value_wins(tmp_path_factory: pytest.TempPathFactory, given_in: set[str]) -> None:
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text("workers = 30\n" if "file" in given_in else "")
    flags = JobFlags(workers="10" if "flag" in given_in else None)
    environment = {"PACELINE_WORKERS": "20"} if "environment" in given_in else {}

    settings = resolve(flags, environment, str(path), defaults={"workers": 5})

    winner = next((place for place in PLACES if place in given_in), "default")
    expected = {
        "flag": (10, "--workers"),
        "environment": (20, "PACELINE_WORKERS"),
        "file": (30, str(path)),
        "default": (5, "default"),
    }
    assert (settings.job("train").workers, settings.sources["workers"]) == expected[winner]


def test_every_option_can_stand_in_the_environment() -> None:
    texts = {
        "workers": "3",
        "servers": "2",
        "max_workers": "9",
        "max_servers": "2",
        "pace": "bounded:4",
        "assign": "hash",
        "data": "shared",
        "staleness_damping": "1",
        "compensate": "0.5",
        "clip": "0.5",
        "restarts": "5",
        "min_workers": "2",
        "hang_timeout": "60",
        "checkpoint_every": "500",
        "keep": "4",
        "threads": "2",
        "seed": "7",
        "steps": "10",
        "epochs": "4",
        "until_loss": "0.5",
        "patience": "6",
        "run_dir": "elsewhere",
        "engine": "ray",
        "ray_address": "10.0.0.1:6379",
        "interface": "eth1",
        "port": "29600",
        "insecure": "1",
        "servers_apart": "1",
        "server_hosts": "2",
        "return_timeout": "90",
    }
    assert set(texts) == set(OPTIONS)
    environment = {variable(option): text for option, text in texts.items()}

    settings = resolve(JobFlags(), environment)

    assert settings.job("train") == Job(
        "train",
        workers=3,
        servers=2,
        max_workers=9,
        max_servers=2,
        pace=Bounded(4),
        assign="hash",
        data="shared",
        staleness_damping=True,
        compensate=0.5,
        clip=0.5,
        restarts=5,
        min_workers=2,
        hang_timeout=60.0,
        checkpoint_every=500,
        keep=4,
        threads=2,
        seed=7,
        steps=10,
        epochs=4,
        until_loss=0.5,
        patience=6,
        runs=Path("elsewhere"),
        engine="ray",
        ray_address="10.0.0.1:6379",
        interface="eth1",
        port=29600,
        insecure=True,
        servers_apart=True,
        server_hosts=2,
        return_timeout=90.0,
    )
    truths = dict.fromkeys(TRUTHS, True)
    assert dict(settings.sources) == {job_field(option): variable(option) for option in OPTIONS}
    assert settings.job("train") == resolve(JobFlags(**texts | truths), {}).job("train")


def test_nothing_set_is_the_jobs_own_default() -> None:
    settings = resolve(JobFlags(), {"PACELINE_WORKERS": ""})
    assert settings.job("train") == Job("train")
    assert set(settings.sources.values()) == {"default"}


def test_the_environment_can_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("script = 'a.py'\nargs = ['--lr', '1']\nsteps = 9\n")
    settings = resolve(JobFlags(), {"PACELINE_CONFIG": str(tmp_path / "a.toml")})
    assert (settings.script, settings.args, settings.job("a").steps) == ("a.py", ("--lr", "1"), 9)


@pytest.mark.parametrize(
    ("flags", "environment", "says"),
    [
        (JobFlags(workers="two"), {}, "--workers is 'two'; it must be a whole number"),
        (JobFlags(), {"PACELINE_UNTIL_LOSS": "low"}, "PACELINE_UNTIL_LOSS is 'low'; it must be a number"),
        (JobFlags(pace="synk"), {}, "did you mean 'sync'?"),
        (JobFlags(assign="rond_robin"), {}, "did you mean 'round_robin'?"),
        (JobFlags(workers="0"), {}, "workers is 0; it must be 1 or more"),
        (JobFlags(until_loss="nan"), {}, "until-loss is nan"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_source(
    flags: JobFlags, environment: dict[str, str], says: str
) -> None:
    with pytest.raises(UsageError) as raised:
        resolve(flags, environment).job("train")
    assert says in str(raised.value)


def test_switches_can_be_set_in_the_environment() -> None:
    assert switched(ShowFlags(quiet=True), {"PACELINE_JSON": "1"}) == ShowFlags(json=True, quiet=True)
    assert switched(ShowFlags(), {"PACELINE_JSON": "off"}) == ShowFlags()
    with pytest.raises(UsageError, match="PACELINE_JSON is 'maybe'"):
        switched(ShowFlags(), {"PACELINE_JSON": "maybe"})


def test_variables_that_are_nearly_ours_are_told() -> None:
    ours = ["PACELINE_EPOCHS", "PACELINE_RUN_DIR", "PACELINE_JSON", "PACELINE_RESUME", "PACELINE_JOB_KEY_FILE"]
    others = ["PATH", "MY_PACELINE_X", "PACELINER"]
    assert unknown_variables(dict.fromkeys([*ours, *others], "1")) == []
    wrong = ["PACELINE_WORKER", "PACELINE_EPOCS", "PACELINE_COLOUR"]
    assert unknown_variables(dict.fromkeys(wrong, "")) == [
        ("PACELINE_COLOUR", ""),
        ("PACELINE_EPOCS", "PACELINE_EPOCHS"),
        ("PACELINE_WORKER", "PACELINE_WORKERS"),
    ]
