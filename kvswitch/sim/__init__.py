"""A serving simulator that drives the real planner and scheduler with models of engine and link."""
