"""The emulator's own routes: faults, killing workers, and the web page."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.unit.emulator.conftest import Site


@pytest.mark.parametrize(
    "rule",
    [
        {"kind": "explode"},
        {"kind": "drop", "rate": 1.1},
        {"kind": "error", "status": 200},
        {"kind": "latency"},
        {"kind": "duplicate", "route": "run"},
        {"kind": "kill", "route": "run"},
        {"kind": "drop", "unknown": 1},
        {"kind": "drop", "route": "runs"},
    ],
)
def test_an_invalid_rule_is_rejected_and_the_active_faults_stay(site: Site, rule: dict[str, Any]) -> None:
    site.put_faults({"kind": "error", "route": "cancel"})
    assert site.put_faults(rule).status_code == 400
    assert site.root.get("/faults").json()["rules"][0]["route"] == "cancel"


def test_faults_are_listed_with_counts_and_can_be_removed(site: Site) -> None:
    site.put_faults({"kind": "error", "route": "health", "status": 503, "times": 1}, seed=3).raise_for_status()
    assert site.client.get("/health").status_code == 503
    assert site.client.get("/health").status_code == 200
    assert site.root.get("/faults").json() == {
        "seed": 3,
        "rules": [
            {
                "kind": "error",
                "route": "health",
                "rate": 1.0,
                "when": "before",
                "status": 503,
                "latency_ms": 0,
                "times": 1,
                "endpoint": None,
            }
        ],
        "throttled_workers": 0,
        "missing_images": [],
        "struck": [1],
    }
    assert site.root.put("/faults", json={}).json()["rules"] == []


def test_a_misspelt_route_is_rejected_with_the_known_routes(site: Site) -> None:
    error = site.put_faults({"kind": "drop", "route": "job-tkae"}).json()["error"]
    assert "rules.0.route" in error
    assert "'job-take'" in error


def test_a_pending_duplicate_is_removed_with_its_fault(site: Site) -> None:
    site.put_faults({"kind": "duplicate", "route": "job-take", "times": 1})
    site.submit()
    assert site.take("w1") is not None
    site.put_faults()
    assert site.take("w2") is None


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/no/such/route", 404), ("PUT", "/v2/ep/run", 405)])
def test_an_unknown_route_or_method_is_answered_in_json(site: Site, method: str, path: str, status: int) -> None:
    response = site.root.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]
    assert ("allow" in response.headers) == (status == 405)


def test_fault_and_kill_routes_require_an_api_key(site: Site) -> None:
    with httpx.Client(base_url=site.url) as stranger:
        assert stranger.put("/faults", json={"rules": [{"kind": "drop"}]}).status_code == 401
        assert stranger.get("/faults").status_code == 401
        assert stranger.post("/workers/w1/kill").status_code == 401
    assert site.root.get("/faults").json()["rules"] == []


def test_an_external_worker_cannot_be_killed(site: Site) -> None:
    site.take()
    assert site.root.post("/workers/w1/kill").status_code == 404


def test_the_page_loads_only_from_its_own_origin_and_cannot_be_framed(site: Site) -> None:
    response = site.root.get("/").raise_for_status()
    rules = set(response.headers["content-security-policy"].split("; "))
    assert rules == {"default-src 'self'", "base-uri 'none'", "frame-ancestors 'none'", "form-action 'self'"}


@pytest.mark.parametrize("path", ["/", "/page/app.js", "/page/style.css"])
def test_page_files_are_revalidated_on_every_load(site: Site, path: str) -> None:
    response = site.root.get(path).raise_for_status()
    assert response.headers["cache-control"] == "no-cache"
    again = site.root.get(path, headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.headers["cache-control"]) == (200 if path == "/" else 304, "no-cache")


@pytest.mark.parametrize("action", ["freeze", "thaw"])
def test_an_unknown_worker_cannot_be_frozen_or_thawed(site: Site, action: str) -> None:
    response = site.root.post(f"/workers/unknown/{action}")
    assert (response.status_code, response.json()["error"]) == (404, "there is no managed worker unknown")
    with httpx.Client(base_url=site.url) as stranger:
        assert stranger.post(f"/workers/unknown/{action}").status_code == 401


def test_a_misspelt_option_of_a_freeze_is_refused(site: Site) -> None:
    response = site.root.post("/workers/unknown/freeze", json={"dropConnection": False})
    assert response.status_code == 400
    assert "dropConnection" in response.json()["error"]
