"""Measurements, side by side with peers. Never part of the test run."""
