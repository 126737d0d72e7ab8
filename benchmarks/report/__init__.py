"""From committed results to documents: ``python -m benchmarks.report`` writes every table and picture.

A document says where: what stands between ``<!-- NAME table: begin -->`` and its end mark is written anew, and likewise
for pictures. No figure there is typed by hand; tests/benchmarks/test_report.py fails when documents and results differ.
"""
