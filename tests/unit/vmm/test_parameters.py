"""What clients set for migrations to come."""

import json

import pytest

from pageferry.core.errors import UsageError
from pageferry.vmm.arguments import Arguments
from pageferry.vmm.parameters import Parameters, limits_of_policy
from pageferry.vmm.qmp_error import QmpError


def kept(**given):
    parameters = Parameters()
    parameters.keep(*parameters.take(Arguments({name.replace("_", "-"): value for name, value in given.items()})))
    return parameters


def test_at_first_there_are_the_defaults():
    assert Parameters().told() == {"downtime-limit": 300, "max-bandwidth": 0}
    assert Parameters().kept_for("downtime", saves=False) == {}


def test_what_is_kept_goes_to_the_policies_that_have_it():
    parameters = kept(downtime_limit=70, x_max_rounds=4, x_deadline_s=9, max_bandwidth=1 << 20)
    assert parameters.told() == {"downtime-limit": 70, "x-max-rounds": 4, "x-deadline-s": 9, "max-bandwidth": 1 << 20}
    bandwidth = {"x-bandwidth": 1 << 20}
    both = {"x-downtime-limit-s": 0.07, "x-max-rounds": 4} | bandwidth
    assert parameters.kept_for("downtime", saves=False) == parameters.kept_for("postcopy", saves=True) == both
    assert parameters.kept_for("xen", saves=False) == {"x-max-rounds": 4} | bandwidth
    assert parameters.kept_for("deadline", saves=False) == {"x-deadline-s": 9} | bandwidth
    for strange in ("mine:Policy", None, ["downtime"], 5):
        assert parameters.kept_for(strange, saves=False) == bandwidth
    parameters.keep(*parameters.take(Arguments({"max-bandwidth": 0})))
    assert parameters.kept_for("mine:Policy", saves=False) == {}


def test_whole_milliseconds_are_told_as_an_integer():
    assert json.dumps(kept(downtime_limit=500).told()) == '{"downtime-limit": 500, "max-bandwidth": 0}'
    assert kept(downtime_limit=0.5).told()["downtime-limit"] == 0.5


def test_limits_are_given_to_a_policy_in_its_words():
    assert limits_of_policy({"downtime-limit": 70, "x-max-rounds": 4}) == {"downtime_limit_s": 0.07, "max_rounds": 4}


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"tls-creds": "x"}, QmpError, "there is no migration parameter 'tls-creds' here"),
        ({"downtime-limit": 0}, QmpError, "downtime-limit"),
        ({"downtime-limit": 10**400}, QmpError, "downtime-limit"),
        ({"x-max-rounds": 1.5}, QmpError, "x-max-rounds"),
        ({"max-bandwidth": -1}, QmpError, "max-bandwidth"),
        ({"max-bandwidth": 5}, UsageError, "too little"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name_and_not_kept(given, error, says):
    parameters = Parameters()
    with pytest.raises(error, match=says):
        parameters.take(Arguments({"x-deadline-s": 3} | given))
    assert parameters.told() == Parameters().told()


def test_a_migration_is_held_if_it_is_to_pause_before_the_switchover():
    parameters = Parameters()
    states = [{"capability": "pause-before-switchover", "state": True}, {"capability": "events", "state": True}]
    parameters.set_capabilities(Arguments({"capabilities": states}))
    assert {each["capability"]: each["state"] for each in parameters.capabilities()} == {
        "events": True,
        "pause-before-switchover": True,
    }
    assert parameters.kept_for("xen", saves=False) == {"x-hold": True}
    assert parameters.kept_for("xen", saves=True) == {}


@pytest.mark.parametrize(
    ("states", "says"),
    [
        ([{"capability": "rdma-pin-all", "state": False}], "no capability 'rdma-pin-all' here"),
        ([{"capability": "events", "state": False}], "events are always sent"),
        ([{"capability": "events", "state": True, "why": 1}], "'why' is unexpected"),
        ([{"state": True}], "'capability' is missing"),
        (["events"], "array of objects"),
        ({}, "array"),
    ],
)
def test_a_capability_that_does_not_exist_is_refused_by_name_and_nothing_is_changed(states, says):
    parameters = Parameters()
    held = [{"capability": "pause-before-switchover", "state": True}]
    with pytest.raises(QmpError, match=says):
        parameters.set_capabilities(Arguments({"capabilities": held + states if isinstance(states, list) else states}))
    assert parameters.capabilities() == Parameters().capabilities()
