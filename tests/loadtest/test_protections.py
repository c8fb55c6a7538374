"""Services with each protection are described right, and their ratios taken round by round."""

from app.access.keys import read_keys
from app.settings import Settings
from loadtest.protections import figures, services


def test_every_service_has_settings_that_are_allowed(tmp_path):
    found = dict(services(tmp_path, "redis://127.0.0.1:1/0"))
    assert next(iter(found)) == "none"
    assert found["none"].settings == {}
    for name, one in found.items():
        settings = Settings(model="mnist", **one.settings)
        assert (settings.keys_file is not None) == bool(one.headers), name
        if settings.keys_file is not None:
            assert len(read_keys(settings.keys_file).keys) == 1
    everything = found["the same with TLS"].settings
    assert {"keys_file", "store", "audit_file", "defense", "tls_cert", "tls_key"} == set(everything)


def test_ratios_are_medians_of_the_rounds_ratios():
    bare = [(100.0, 1000.0), (200.0, 500.0), (100.0, 1000.0)]
    runs = [(150.0, 800.0), (260.0, 250.0), (160.0, 900.0)]
    found = dict(figures(runs, bare))
    assert found == {"us": 160.0, "rps": 800, "more_us": 60.0, "rps_over_none": 0.8}
