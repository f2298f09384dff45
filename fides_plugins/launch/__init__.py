"""Real servers, started for the demo and the tests, and stopped by the ids of their processes."""
