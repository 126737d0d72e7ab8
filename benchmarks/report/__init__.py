"""Render documents from committed results: ``python -m benchmarks.report`` writes every table and picture.

The text between ``<!-- NAME table: begin -->`` and its end mark in a document is replaced; likewise for pictures. No
figure there is typed by hand; tests/benchmarks/test_report.py fails when documents and results differ.
"""
