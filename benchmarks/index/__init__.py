"""Candidate indexes measured by themselves: speed, a million candidates, what stored precisions cost."""
