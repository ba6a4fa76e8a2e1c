"""Distances and scores of sets of features."""
