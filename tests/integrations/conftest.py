"""Tests of Ray are collected where it is installed alone (make test-ray); there they cannot be left out unseen."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("ray") else ["test_ray.py"]
