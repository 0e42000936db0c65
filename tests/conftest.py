"""For all tests."""

import signal

from hypothesis import HealthCheck, settings

# Machines are shared: how long a draw takes says nothing about what is tested.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")
# A shell ignores it for what runs in the background, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
