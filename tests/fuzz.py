"""How many random examples a test tries.

FASTBP_FUZZ=5000 tries so many of each test, at random; by default there are some dozens, always the same.
"""

import os

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("FASTBP_FUZZ", "0"))
fuzz = settings(
    max_examples=EXAMPLES or 50,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
