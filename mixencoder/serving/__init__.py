"""The HTTP server of ``mixencoder serve``: ranking for clients of four rerankers, candidates out of an index.

`app` assembles the parts. Importing this package imports nothing else; its modules need the extra ``serve``.
"""
