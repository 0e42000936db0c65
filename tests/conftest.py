"""For all tests."""

from hypothesis import HealthCheck, settings

# Machines are shared: how long a draw takes says nothing about what is tested.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
