"""Models whose files are missing, and loads that are still being prepared."""

from __future__ import annotations

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.state import Residency
from tests.support.core import Rig, fleet_spec, model, server

ABSENT = ("/Volumes/B/x.gguf (the volume /Volumes/B is not mounted)",)


def serving(**changes: object) -> Rig:
    rig = Rig(fleet_spec([server("o")], [model("m", "o", **changes), model("other", "o", size=0)]))
    rig.spawned("o")
    return rig


def test_request_for_a_missing_file_names_the_volume() -> None:
    rig = serving()
    rig.send(e.ModelPrerequisitesChanged("m", ABSENT))
    refused = rig.ask("m")
    assert rig.rejects()[refused] == "model_blocked"
    assert "the volume /Volumes/B is not mounted" in rig.take(c.Reject)[-1].reason
    rig.send(e.ModelPrerequisitesChanged("m"))
    rig.ask("m")
    assert [load.model for load in rig.take(c.Load)] == ["m"]


def test_missing_file_delays_a_preload_until_it_is_back() -> None:
    rig = Rig(fleet_spec([server("o")], [model("m", "o", preload=True)]), missing_models={"m": ABSENT})
    rig.spawned("o")
    assert not rig.take(c.Load)
    rig.send(e.ModelPrerequisitesChanged("m"))
    assert [load.model for load in rig.take(c.Load)] == ["m"]


def test_failed_load_is_retried_when_the_file_is_back() -> None:
    rig = serving()
    rig.ask("m")
    rig.send(e.ModelPrerequisitesChanged("m", ABSENT))
    rig.send(e.LoadFailed("m", "o", 1, "no such file"))
    assert list(rig.rejects().values()) == ["model_blocked"]
    rig.wait(1.0)
    rig.send(e.ModelPrerequisitesChanged("m"))
    assert rig.fleet.models["m"].state is Residency.ABSENT
    rig.clear()
    rig.ask("m")
    assert [load.model for load in rig.take(c.Load)] == ["m"]


def test_lost_volume_unloads_and_its_return_preloads() -> None:
    rig = serving(preload=True)
    rig.send(e.Loaded("m", "o", 1))
    rig.clear()
    rig.send(e.ModelPrerequisitesChanged("m", ABSENT))
    assert [unload.model for unload in rig.take(c.Unload)] == ["m"]
    rig.send(e.Unloaded("m", "o", 1))
    rig.wait(1.0)
    assert not rig.take(c.Load)
    rig.send(e.ModelPrerequisitesChanged("m"))
    assert [load.model for load in rig.take(c.Load)] == ["m"]


def test_route_skips_a_model_without_its_file() -> None:
    routes = [e_route("m"), e_route("other")]
    spec = fleet_spec([server("o")], [model("m", "o"), model("other", "o", size=0), model("r", routes=tuple(routes))])
    rig = Rig(spec, missing_models={"m": ABSENT})
    rig.spawned("o")
    for _ in range(8):
        rig.ask("r")
    assert {load.model for load in rig.take(c.Load)} == {"other"}


def e_route(to: str) -> object:
    from fleetd.core.data.specs import Route

    return Route(to)


def test_load_progress_moves_the_deadline() -> None:
    rig = serving(load_timeout_s=20.0, queue_timeout_s=500.0)
    rig.ask("m")
    for _ in range(5):
        rig.wait(15.0)
        rig.send(e.LoadProgress("m", "o", 1, "quantizing"))
    placement = rig.fleet.models["m"].placements["o"]
    assert (placement.state, placement.reason) == (Residency.LOADING, "quantizing")
    rig.wait(31.0)
    assert "not loaded within 20 s" in str(rig.fleet.models["m"].failure)


def test_request_failed_by_its_engine_uses_the_fallback() -> None:
    models = [model("m", "o", fallback=("n",)), model("n", "p", size=0)]
    rig = Rig(fleet_spec([server("o"), server("p")], models))
    rig.spawned("o")
    rig.spawned("p")
    for name, holder in (("m", "o"), ("n", "p")):
        rig.ask(name)
        rig.loaded(name, holder)
    rig.clear()
    rig.ask("m", avoid=("o",))
    assert [grant.process for grant in rig.take(c.Grant)] == ["p"]
    rig.clear()
    rig.ask("n", avoid=("p",))  # no fallback: the one that failed may have come back
    assert [grant.process for grant in rig.take(c.Grant)] == ["p"]
