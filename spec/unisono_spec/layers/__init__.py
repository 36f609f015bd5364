"""Projections around an op: functions of a parameter dictionary and arrays."""
