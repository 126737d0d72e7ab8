"""Whole processes measured: how long they take to start, and how threads get along beside others."""
