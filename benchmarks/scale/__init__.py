"""Ranking on more machines than can be measured here: arithmetic from records, and a simulation."""
