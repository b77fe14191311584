"""Orchestration: which step after which, retries, schedules. No tensors. This file holds none of it."""
