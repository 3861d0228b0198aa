"""Tiny simulated hospitals, written as WFDB and ingested once for all tests that need a real site store."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from client.site import load_site, write_site
from simulation.consortium import Hospital, make_hospital
from simulation.hospitals import HospitalSpec

SPECS = (
    HospitalSpec(name="alpha", patients=60, pressure_shift=0.3),
    HospitalSpec(name="beta", patients=40, pressure_shift=0.3, sampling_rate_hz=250, lead_order="cabrera"),
    HospitalSpec(name="gamma", patients=30, labelled_share=0.0, sampling_rate_hz=250),
)


@pytest.fixture(scope="session")
def larger_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site whose test split is large enough for the tier "clear" to let something out."""
    spec = HospitalSpec(name="delta", patients=300, pressure_shift=0.3, sampling_rate_hz=250)
    hospital = Hospital(spec, tmp_path_factory.mktemp("larger") / "delta")
    make_hospital(hospital, seed=3)
    return hospital.site_dir


@pytest.fixture(scope="session")
def site_dirs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Site folders by name: alpha and beta have labels, gamma has none. Not to be changed: see `copy_site`."""
    folder = tmp_path_factory.mktemp("hospitals")
    hospitals = [Hospital(spec, folder / spec.name) for spec in SPECS]
    for hospital in hospitals:
        make_hospital(hospital, seed=3)
        settings = load_site(hospital.site_dir)
        write_site(hospital.site_dir, settings.model_copy(update={"minimum_cell": 5}))  # they are very small
    return {hospital.spec.name: hospital.site_dir for hospital in hospitals}
