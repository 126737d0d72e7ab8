"""Adapters for other frameworks; a module each, which imports its framework only when it is imported itself.

``langchain``, ``llama_index``, ``haystack``, ``pyterrier``, ``mteb``, ``rerankers`` and ``sentence_transformers``.
None is imported by the rest of the library. docs/integrations.md has an example of each.
"""
