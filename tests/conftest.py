"""Tests never ask a hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
