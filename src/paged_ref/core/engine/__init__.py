"""Continuous batching: sequences, the scheduler, and one step of the engine."""
