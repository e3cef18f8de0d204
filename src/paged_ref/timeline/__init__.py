"""What happened in a run: events, the state after each of them, and any moment of the run."""
